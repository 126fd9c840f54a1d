"""Picture files: checks the path before anything is computed, and writes figures."""

from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from polygpt.errors import UserError


def writable(path: Path) -> Path:
    """The path itself. Raises UserError unless its suffix is an image format that can be written."""
    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"{path} is not a picture file: use .png, .svg or another format that matplotlib writes")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a file")
    return path


def save(figure: Figure, path: Path) -> None:
    """Writes the figure, creating missing folders. Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(writable(path), dpi=110)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
