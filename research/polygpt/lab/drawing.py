"""A mask as a picture: who sees whom in a row of a given layout, and which blocks of it a kernel skips."""

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from polygpt.attention.kernels.block_map import EMPTY, FULL, block_map, exact_block_map
from polygpt.attention.masks import Mask, Meta, allowed
from polygpt.errors import UserError

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")
"""Text, then media in order."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: what a mask looks at, and the names of its modalities in the order of their numbers."""

    meta: Meta
    names: tuple[str, ...]

    @property
    def length(self) -> int:
        """T."""
        return self.meta.index.shape[1]


def read_row(text: str, bidirectional: bool = True) -> Row:
    """Reads a layout such as "5 image:4 3 | 6 audio:3 2 | pad:2".

    Args:
        text: packed examples, parted by "|"; a number is that many positions of text, `NAME:N` a medium of N positions,
            `pad:N` padding.
        bidirectional: whether the positions of a medium form a span that sees all of itself.

    Raises:
        UserError: naming the word that is neither.
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
    return Row(Meta(index, **arrays), tuple(names))


def matrix(mask: Mask, row: Row) -> np.ndarray:
    """Who sees whom, bool [T, T]."""
    return np.asarray(allowed(mask, row.meta, row.meta))[0]


def blocks(mask: Mask, row: Row, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The block map that kernels use and the exact one, int8 [n, n], of blocks of `size` positions."""
    return tuple(np.asarray(lower(mask, row.meta, row.meta, size, size))[0] for lower in (block_map, exact_block_map))


def text_picture(mask: Mask, row: Row) -> str:
    """The matrix in characters, a line a query: `#` sees, `.` does not."""
    marks = "".join("-" if m < 0 else "T" if m == 0 else row.names[m][0] for m in np.asarray(row.meta.modality)[0])
    lines = ["".join("#" if seen else "." for seen in line) for line in matrix(mask, row)]
    return "\n".join([f"  {marks}", *(f"{mark} {line}" for mark, line in zip(marks, lines, strict=True))])


def draw(mask: Mask, row: Row, size: int, path: Path, title: str) -> None:
    """Writes a PNG: the mask, its modalities along both edges, and beside it the block map."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    T, seen = row.length, matrix(mask, row)
    left.imshow(seen, cmap=ListedColormap(["#f4f4f4", "#333333"]), vmin=0, vmax=1, extent=(0, T, T, 0))
    for t, number in enumerate(np.asarray(row.meta.modality)[0]):
        colour = "white" if number < 0 else COLOURS[number % len(COLOURS)]
        for corner, width, height in (((t, -0.04 * T), 1, 0.03 * T), ((-0.04 * T, t), 0.03 * T, 1)):
            left.add_patch(Rectangle(corner, width, height, color=colour, clip_on=False))
    for t in np.flatnonzero(np.diff(np.asarray(row.meta.segment)[0])) + 1:
        left.axhline(t, color="#e45756", linewidth=0.8)
        left.axvline(t, color="#e45756", linewidth=0.8)
    left.set(xlim=(0, T), ylim=(T, 0), xlabel="key", ylabel="query")
    left.set_title(f"{seen.sum()} of {T * T} pairs are seen", pad=20)
    for number, name in enumerate(row.names):
        left.plot([], [], "s", color=COLOURS[number % len(COLOURS)], label=name)
    left.legend(loc="upper right", fontsize="small")

    found, exact = blocks(mask, row, size)
    edge = found.shape[0] * size
    colours = ListedColormap(["#f4f4f4", "#9ecae9", "#2f6b9a"])
    right.imshow(found, cmap=colours, vmin=EMPTY, vmax=FULL, extent=(0, edge, edge, 0))
    for i in range(found.shape[0] + 1):
        right.axhline(i * size, color="white", linewidth=0.8)
        right.axvline(i * size, color="white", linewidth=0.8)
    for kind, (name, colour) in enumerate(zip(("empty", "partial", "full"), colours.colors, strict=True)):
        right.plot(
            [], [], "s", color=colour, label=f"{name}: {(found == kind).sum()} (exactly {(exact == kind).sum()})"
        )
    right.legend(loc="upper right", fontsize="small")
    right.set(xlabel="key", ylabel="query")
    right.set_title(f"blocks of {size}: {(found == EMPTY).mean():.0%} are skipped", pad=20)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
