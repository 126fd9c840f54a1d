"""Where a picture is written: refused before anything is computed, if it cannot be one."""

from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from polygpt.errors import UserError


def writable(path: Path) -> Path:
    """The path itself; UserError unless its suffix is that of a kind of picture which can be written."""
    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(
            f"{path} is no picture: name a file that ends in .png, .svg or another kind that matplotlib writes"
        )
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    return path


def save(figure: Figure, path: Path) -> None:
    """Writes the figure, and the folders that it lies in; UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(writable(path), dpi=110)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
