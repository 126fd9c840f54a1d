"""Shows rows as the model sees them: a table of all positions, and an image of the layout, the media and the text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from polygpt.data.tokenizers.base import Tokenizer
from polygpt.sequence import PADDING, TEXT, Batch

COLOURS = ("white", "green", "magenta", "cyan", "yellow", "blue", "red")
"""Colours of text and of the adapters in order, by names that both rich and matplotlib know."""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A readable form of a token: special tokens by name, control characters and partial characters escaped."""
    for name, number in {"<bos>": tokenizer.bos, "<eos>": tokenizer.eos, **tokenizer.special}.items():
        if token == number:
            return name
    text = tokenizer.decode([token])
    return f"#{token}" if "\ufffd" in text else repr(text)[1:-1] if not text.isprintable() else text


def runs(batch: Batch, row: int) -> list[tuple[int, int]]:
    """Spans (start, stop) of positions that belong together: one item of media, a text of one weight, or padding."""
    keys = [batch.modality_BT[row], batch.segment_BT[row], batch.span_BT[row]]
    keys.append((batch.weight_BT[row] > 0) & (batch.modality_BT[row] == TEXT))
    media = batch.modality_BT[row] > TEXT
    changes = np.any([np.diff(key) != 0 for key in keys], axis=0)
    changes |= media[1:] & media[:-1] & (np.diff(batch.slot_BT[row]) != 1)
    stops = [*(np.flatnonzero(changes) + 1).tolist(), batch.shape[1]]
    return list(zip([0, *stops], stops, strict=False))


def beginning(batch: Batch, row: int, limit: int) -> list[int]:
    """Up to `limit` positions of the first example of a row: of each item of media, its first two and its last."""
    chosen: list[int] = []
    for start, stop in runs(batch, row):
        if batch.segment_BT[row, start] == 1:
            long = batch.modality_BT[row, start] > TEXT and stop - start > 4
            chosen += [start, start + 1, stop - 1] if long else range(start, stop)
    return chosen[:limit]


def table(batch: Batch, row: int, tokenizer: Tokenizer, positions: Sequence[int] | None = None) -> Table:
    """A table of the positions of a row, one per line, with a line "…" where some are left out.

    Args:
        batch: NumPy arrays.
        row: index of the row.
        tokenizer: decodes the text.
        positions: the positions to show, ascending; default: all up to the padding.
    """
    names = ["text", *batch.media]
    number = int((batch.segment_BT[row] > 0).sum())
    positions = range(number) if positions is None else positions
    result = Table(title=f"row {row}: {number} of {batch.shape[1]} positions, {batch.segment_BT[row].max()} examples")
    for column in ("t", "modality", "token", "slot", "position", "segment", "span", "target", "weight"):
        result.add_column(column, justify="left" if column in ("modality", "token", "target") else "right")
    for name in batch.extra:
        result.add_column(Text(name), justify="right")
    for before, t in zip([-1, *positions], positions, strict=False):
        if t != before + 1:
            result.add_row("…")
        modality, weight = int(batch.modality_BT[row, t]), float(batch.weight_BT[row, t])
        text = modality == TEXT
        ends = t + 1 == number or batch.segment_BT[row, t + 1] != batch.segment_BT[row, t]
        predicts = not ends and batch.modality_BT[row, t + 1] == TEXT
        cells = [
            t,
            names[modality],
            token_text(tokenizer, int(batch.tokens_BT[row, t])) if text else "",
            "" if text else batch.slot_BT[row, t],
            batch.position_BT[row, t],
            batch.segment_BT[row, t],
            batch.span_BT[row, t] or "",
            token_text(tokenizer, int(batch.target_BT[row, t])) if predicts else "",
            f"{weight:g}" if weight else "",
            *(_label(array[row, t]) for array in batch.extra.values()),
        ]
        # Text objects, because rich would interpret a string such as "[red]" as markup.
        styles = (
            [COLOURS[modality % len(COLOURS)]] * 7 + ["bold" if weight else "dim"] * 2 + ["bold"] * len(batch.extra)
        )
        result.add_row(
            *(Text(str(cell), style) for cell, style in zip(cells, styles, strict=True)), end_section=bool(ends)
        )
    return result


def _label(value: np.ndarray) -> str:
    """A label of any shape; empty if there is none."""
    return "" if np.isnan(value).all() else ", ".join("–" if np.isnan(one) else f"{one:g}" for one in value.ravel())


def draw(batch: Batch, tokenizer: Tokenizer, adapters: Mapping, path: str | Path, rows: int = 4) -> Path:
    """Draws the first rows as a PNG: a strip of positions coloured by modality, the text below it, then the media.

    Args:
        batch: NumPy arrays.
        tokenizer: decodes the text.
        adapters: the model's adapters, by modality; their features draw the media.
        path: the file to write.
        rows: largest number of rows drawn.

    Returns:
        The path.
    """
    rows = min(rows, batch.shape[0])
    items = [
        [(name, n) for name, m in batch.media.items() for n in np.flatnonzero(m.length_BN[b])] for b in range(rows)
    ]
    columns = max(1, *(len(some) for some in items))
    figure = Figure(figsize=(max(10, 2.2 * columns), 3.4 * rows), layout="constrained")
    for b, (part, some) in enumerate(zip(np.atleast_1d(figure.subfigures(rows, 1)), items, strict=True)):
        grid = part.add_gridspec(2, columns, height_ratios=(1, 1.6))
        _draw_strip(part.add_subplot(grid[0, :]), batch, b, tokenizer)
        for column, (name, n) in enumerate(some):
            axes = part.add_subplot(grid[1, column])
            _draw_item(axes, adapters[name], batch.media[name], b, n, f"{name} {n}")
    figure.savefig(path, dpi=110, format="png")
    return Path(path)


def _draw_strip(axes, batch: Batch, row: int, tokenizer: Tokenizer) -> None:
    names = ["text", *batch.media]
    for start, stop in runs(batch, row):
        modality = int(batch.modality_BT[row, start])
        if modality == PADDING:
            continue
        colour = "lightgrey" if modality == TEXT else COLOURS[modality % len(COLOURS)]
        axes.axvspan(start, stop, ymin=0.5, ymax=0.85, facecolor=colour, edgecolor="black", linewidth=0.4)
        said = tokenizer.decode(batch.tokens_BT[row, start:stop])
        label = names[modality] if modality != TEXT else said.replace("\n", "\\n").replace("$", r"\$")
        shown = label if len(label) <= 40 else f"{label[:39]}…"
        axes.text((start + stop) / 2, 0.47, shown, rotation=40, ha="right", va="top", fontsize=7)
    weight = batch.weight_BT[row]
    axes.bar(np.arange(len(weight)) + 0.5, 0.1 * (weight > 0), width=1, bottom=0.88, color="black")
    for start in np.flatnonzero(np.diff(batch.segment_BT[row])) + 1:
        axes.axvline(start, color="red", linewidth=1.2)
    axes.set(xlim=(0, batch.shape[1]), ylim=(0, 1), yticks=[])
    axes.set_title(f"row {row}   black: next token is predicted   red: end of an example", fontsize=8, loc="left")
    axes.tick_params(labelsize=7, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def _draw_item(axes, adapter, media, row: int, n: int, title: str) -> None:
    features = media.features[row, n]
    # Padding frames are zero. A real last frame of zeros is cut off too, but would be blank anyway.
    used = np.flatnonzero(features.reshape(len(features), -1).any(axis=1))
    picture = adapter.features.picture(features, int(used[-1]) + 1 if len(used) else 1)
    axes.imshow(picture, aspect="equal" if picture.ndim == 3 else "auto", interpolation="nearest")
    axes.set_title(f"{title}: {media.length_BN[row, n]} positions", fontsize=7)
    axes.set_axis_off()
