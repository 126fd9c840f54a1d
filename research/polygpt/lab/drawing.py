"""Pictures of masks: the visible pairs in a row of a given layout, and the blocks that kernels skip."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from polygpt.attention.kernels.block_map import EMPTY, FULL, block_map, exact_block_map
from polygpt.attention.masks import Mask, allowed
from polygpt.attention.meta import Meta
from polygpt.errors import UserError
from polygpt.lab import picture
from polygpt.lab.layout import made_up

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")
"""Text, then media in order."""
DENSE = 1024
"""Maximum row length for which every pair is drawn; for longer rows, only blocks are."""
LINES = 64
"""Maximum number of lines between blocks or examples; more would cover the picture."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: its metadata, and the names of its modalities in numerical order."""

    meta: Meta
    names: tuple[str, ...]

    @property
    def length(self) -> int:
        """T."""
        return self.meta.index.shape[1]


def read_row(text: str, bidirectional: bool = True, labels: Iterable[str] = ()) -> Row:
    """Reads a layout such as "5 image:4 3 | 6 audio:3 2 | pad:2".

    Args:
        text: packed examples, separated by "|"; a number N stands for N positions of text, `NAME:N` for a medium of N
            positions, `pad:N` for padding.
        bidirectional: whether each medium is a bidirectional span.
        labels: names of labels that positions have, see `layout.made_up`.

    Raises:
        UserError: names the invalid word.
    """
    names = ["text"]
    fields = {name: [] for name in ("position", "segment", "span", "modality")}
    spans = 0
    for segment, example in enumerate(text.split("|"), start=1):
        position = 0
        for word in example.split():
            match = re.fullmatch(r"(?:([A-Za-z]\w*):)?(\d+)", word)
            if not match or not int(match[2]):
                raise UserError(f"layout: {word!r} is neither a number of text positions nor NAME:N as in image:4")
            name, n = match[1], int(match[2])
            if name not in (None, "pad", *names):
                names.append(name)
            medium = name not in (None, "pad", "text")
            spans += medium
            fields["position"] += [0] * n if name == "pad" else range(position, position + n)
            fields["segment"] += [0 if name == "pad" else segment] * n
            fields["span"] += [spans if medium and bidirectional else 0] * n
            fields["modality"] += [-1 if name == "pad" else names.index(name or "text")] * n
            position += 0 if name == "pad" else n
    if not fields["position"]:
        raise UserError("layout: it is empty: write the positions of a row, as in '5 image:4 3 | 6'")
    arrays = {name: jnp.asarray(values, jnp.int32)[None] for name, values in fields.items()}
    index = jnp.arange(len(fields["position"]), dtype=jnp.int32)[None]
    meta = Meta(index, **arrays)
    return Row(dataclasses.replace(meta, extra=jax.tree.map(jnp.asarray, made_up(meta, labels))), tuple(names))


def matrix(mask: Mask, row: Row) -> np.ndarray:
    """The visible pairs, bool [T, T]."""
    return np.concatenate([*_queries(mask, row)])


def seen(mask: Mask, row: Row) -> int:
    """The number of visible pairs, without building the matrix of all pairs."""
    return sum(int(part.sum()) for part in _queries(mask, row))


def _queries(mask: Mask, row: Row) -> Iterator[np.ndarray]:
    """The rows of the matrix, `DENSE` queries at a time."""
    for start in range(0, row.length, DENSE):
        query = jax.tree.map(lambda array, start=start: array[:, start : start + DENSE], row.meta)
        yield np.asarray(allowed(mask, query, row.meta))[0]


def blocks(mask: Mask, row: Row, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The block map used by kernels and the exact one, int8 [n, n], for blocks of `size` positions."""
    return tuple(np.asarray(lower(mask, row.meta, row.meta, size, size))[0] for lower in (block_map, exact_block_map))


def text_picture(mask: Mask, row: Row) -> str:
    """The matrix in characters, one line per query: `#` visible, `.` masked."""
    marks = "".join("-" if m < 0 else "T" if m == 0 else row.names[m][0] for m in np.asarray(row.meta.modality)[0])
    lines = ["".join("#" if seen else "." for seen in line) for line in matrix(mask, row)]
    return "\n".join([f"  {marks}", *(f"{mark} {line}" for mark, line in zip(marks, lines, strict=True))])


def draw(mask: Mask, row: Row, size: int, path: Path, title: str) -> None:
    """Draws the block map with modalities along its edges and, for rows up to `DENSE`, every pair next to it."""
    pairs = row.length <= DENSE
    figure = Figure(figsize=(11, 5.4) if pairs else (7, 6.4), layout="constrained")
    *left, right = figure.subplots(1, 1 + pairs, squeeze=False)[0]
    for axes in left:
        _draw_pairs(axes, matrix(mask, row), row)
    _draw_blocks(right, *blocks(mask, row, size), size)
    _draw_edges((left or [right])[0], row)
    figure.suptitle(title)
    picture.save(figure, path)


def _draw_pairs(axes, visible: np.ndarray, row: Row) -> None:
    T = row.length
    axes.imshow(visible, cmap=ListedColormap(["#f4f4f4", "#333333"]), vmin=0, vmax=1, extent=(0, T, T, 0))
    _draw_lines(axes, np.flatnonzero(np.diff(np.asarray(row.meta.segment)[0])) + 1, "#e45756")
    axes.set(xlim=(0, T), ylim=(T, 0), xlabel="key", ylabel="query")
    axes.set_title(f"{visible.sum():,} of {T * T:,} pairs are seen", pad=20)


def _draw_blocks(axes, found: np.ndarray, exact: np.ndarray, size: int) -> None:
    edge = found.shape[0] * size
    colours = ListedColormap(["#f4f4f4", "#9ecae9", "#2f6b9a"])
    axes.imshow(found, cmap=colours, vmin=EMPTY, vmax=FULL, extent=(0, edge, edge, 0))
    _draw_lines(axes, np.arange(found.shape[0] + 1) * size, "white")
    for kind, (name, colour) in enumerate(zip(("empty", "partial", "full"), colours.colors, strict=True)):
        label = f"{name}: {(found == kind).sum():,} (exactly {(exact == kind).sum():,})"
        axes.plot([], [], "s", color=colour, label=label)
    axes.legend(loc="upper right", fontsize="small")
    axes.set(xlim=(0, edge), ylim=(edge, 0), xlabel="key", ylabel="query")
    axes.set_title(f"blocks of {size}: {(found == EMPTY).mean():.0%} are skipped", pad=20)


def _draw_lines(axes, places: np.ndarray, colour: str) -> None:
    for place in places if len(places) <= LINES + 1 else ():
        axes.axhline(place, color=colour, linewidth=0.8)
        axes.axvline(place, color=colour, linewidth=0.8)


def _draw_edges(axes, row: Row) -> None:
    """Draws the modalities as strips above and to the left, and a legend."""
    T, modality = row.length, np.asarray(row.meta.modality)[0]
    limits = axes.get_xlim(), axes.get_ylim()
    near, far = -0.01 * limits[0][1], -0.04 * limits[0][1]
    colours = ListedColormap(["white", *(COLOURS[number % len(COLOURS)] for number in range(len(row.names)))])
    for strip, extent in ((modality[None, :], (0, T, near, far)), (modality[:, None], (far, near, T, 0))):
        options = {"vmin": -1, "vmax": len(row.names) - 1, "interpolation": "nearest", "clip_on": False}
        axes.imshow(strip, cmap=colours, extent=extent, **options)
    axes.set(xlim=limits[0], ylim=limits[1])
    marks = [axes.plot([], [], "s", color=colours.colors[number + 1])[0] for number in range(len(row.names))]
    if (blocks_legend := axes.get_legend()) is not None:
        axes.add_artist(blocks_legend)  # otherwise the second legend would replace it
    axes.legend(marks, row.names, loc="lower left" if blocks_legend else "upper right", fontsize="small")
    axes.tick_params(axis="y", pad=18)
