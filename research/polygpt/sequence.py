"""The sequence layout: the arrays of a row, whatever its modalities.

Axis letters: B rows, T positions, N media items per row, P maximum positions per media item, D model width.

Every row consists of the same small set of arrays. Adapters turn raw media into embeddings `[B, N, P, D]`; the layout
says where each goes. Text-only rows, rows with two images, packed rows and padded rows all run the same program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.errors import UserError

TEXT = 0
"""Modality number of text. Adapters are numbered from 1 in the model's order."""
PADDING = -1
"""Modality number of a position that belongs to no example."""
PROMPT = 1
"""Span of a prompt if `LayoutSpec.prompt_span` is "bidirectional"."""
PREFERENCE = "preference"
"""Name in `Batch.extra` of an int32 array [B, T]: positive where a token of a preferred answer is predicted, its `eos`
included, and there FIRST for the first one and else 1; -1 for a rejected answer, 0 elsewhere. A rejected answer is in
the segment after its preferred one."""
FIRST = 2
"""Where the first token of a preferred answer is predicted, see PREFERENCE: the pairs of a row are counted by it."""
INSIDE_SPAN = 1.0
"""In place of a log-probability, at a token inside a span of bytes that a later token ends."""


def top_ids(scores: str) -> str:
    """The name in `Batch.extra` of the cached top-k tokens of a model: int32 [B, T, k].

    `scores` is the name of the model's scores in `data.scores`, and of a float32 array [B, T] itself: the
    log-probability of the target or, if the model has another tokenizer, of the bytes since the last token boundary
    that both tokenizers have, at the last token of such a span, and INSIDE_SPAN at its others. It is NaN where nothing
    is scored.
    """
    return f"{scores}.ids"


def top_log_p(scores: str) -> str:
    """The name of the log-probabilities of `top_ids`: float32 [B, T, k], falling; NaN where nothing is scored."""
    return f"{scores}.log_p"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Media:
    """The media items of one modality, for all rows.

    Attributes:
        features: [B, N, ...], the input of the adapter; unused items may contain anything, even NaN.
        length_BN: int32, number of positions that the item fills; 0 marks an unused item.
    """

    features: jax.Array | np.ndarray
    length_BN: jax.Array | np.ndarray

    @property
    def valid_BN(self):
        """bool, whether the item is used."""
        return self.length_BN > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of the sequence layout.

    Attributes:
        tokens_BT: int32, text token ids; 0 at media positions and padding.
        modality_BT: int8, TEXT, the number of an adapter, or PADDING.
        slot_BT: int32, at media positions the index into that row's embeddings of the modality, flattened from [N, P].
        position_BT: int32 position ids, restarted for each packed example.
        segment_BT: int32, the packed example, from 1; 0 is padding. Attention never crosses segments.
        span_BT: int32, positions of the same non-zero span (and segment) attend to each other bidirectionally; 0 is
            causal.
        target_BT: int32, the next token.
        weight_BT: float32, the weight of that prediction in the loss; 0 where nothing is predicted.
        media: by adapter name, the items that the row's media positions refer to.
        coordinate_BT3: int32 (time, row, column), for multidimensional position encodings; restarted for each packed
            example. Text advances in all three, the positions of a medium along its grid: see `coordinates`. None means
            `position_BT` in all three.
        extra: by name, further arrays [B, T, ...], such as labels: float32, NaN where there is no label.
    """

    tokens_BT: jax.Array | np.ndarray
    modality_BT: jax.Array | np.ndarray
    slot_BT: jax.Array | np.ndarray
    position_BT: jax.Array | np.ndarray
    segment_BT: jax.Array | np.ndarray
    span_BT: jax.Array | np.ndarray
    target_BT: jax.Array | np.ndarray
    weight_BT: jax.Array | np.ndarray
    media: dict[str, Media]
    coordinate_BT3: jax.Array | np.ndarray | None = None
    extra: dict[str, jax.Array | np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.tokens_BT.shape

    def replace(self, **changes) -> "Batch":
        """A copy with some arrays replaced."""
        return dataclasses.replace(self, **changes)


NAMED_ARRAYS = ("media", "extra")
"""The fields of `Batch` that hold arrays by name."""


@functools.cache
def coordinates(grid: tuple[int, int, int]) -> np.ndarray:
    """The coordinates (time, row, column) of a grid's positions, from 0, int32 [time * rows * columns, 3].

    Columns vary fastest, then rows, then time. A grid with time only, such as a recording, advances in all three
    coordinates, like text: Qwen2.5-Omni (2503.20215), section 2.2.
    """
    time, rows, columns = grid
    if rows == columns == 1:
        return np.repeat(np.arange(time, dtype=np.int32)[:, None], 3, axis=1)
    return np.stack(np.indices(grid, np.int32), axis=-1).reshape(-1, 3)


def scatter_media(x_BTD, batch: Batch, embeddings: dict[str, jax.Array | None]) -> jax.Array:
    """Inserts media embeddings at their positions.

    Args:
        x_BTD: text embeddings; their values at media positions are ignored.
        batch: the layout.
        embeddings: by adapter name in the model's order, [B, N, P, D]; None where the batch has no media of that name.

    Returns:
        [B, T, D]: text embeddings at text positions, media embeddings at media positions, zeros at padding.
    """
    x_BTD = jnp.where((batch.modality_BT == TEXT)[..., None], x_BTD, 0)
    for number, media_BNPD in enumerate(embeddings.values(), start=1):
        if media_BNPD is None:
            continue
        B, N, P, D = media_BNPD.shape
        here_BT = batch.modality_BT == number
        slot_BT = jnp.where(here_BT, batch.slot_BT, 0)
        placed_BTD = jnp.take_along_axis(media_BNPD.reshape(B, N * P, D), slot_BT[..., None], axis=1, mode="clip")
        x_BTD = jnp.where(here_BT[..., None], placed_BTD.astype(x_BTD.dtype), x_BTD)
    return x_BTD


def ids_in_range(batch: Batch, vocabulary: int) -> bool:
    """Whether all tokens and targets of a batch of NumPy arrays are in [0, vocabulary). Cheap."""
    return all(ids.min() >= 0 and ids.max() < vocabulary for ids in (batch.tokens_BT, batch.target_BT))


def check(batch: Batch, vocabulary: int, positions: dict[str, int]) -> None:
    """Checks a batch of NumPy arrays against the layout, before it is sent to a device.

    Args:
        batch: the batch.
        vocabulary: token ids must be below this.
        positions: by adapter name in the model's order, P, the maximum number of positions per item.

    Raises:
        UserError: names the array, the row and the fault.
    """
    B, T = batch.shape
    for field in dataclasses.fields(Batch):
        array = getattr(batch, field.name)
        if field.name in NAMED_ARRAYS or array is None:
            continue
        expected = (B, T, 3) if field.name == "coordinate_BT3" else (B, T)
        if array.shape != expected:
            raise UserError(f"batch: {field.name} has shape {array.shape}, but must have {expected}")
    for name, array in batch.extra.items():
        if array.shape[:2] != (B, T):
            raise UserError(f"batch: extra[{name!r}] has shape {array.shape}, but must begin with {(B, T)}")
    if set(batch.media) != set(positions):
        raise UserError(f"batch: media are {list(batch.media)}, but the model's adapters are {list(positions)}")

    def fail_where(bad_BT, what: str) -> None:
        bad = np.argwhere(bad_BT)
        if len(bad):
            raise UserError(f"batch: row {bad[0][0]}, position {bad[0][1]}: {what}")

    modality, segment = np.asarray(batch.modality_BT), np.asarray(batch.segment_BT)
    fail_where((batch.tokens_BT < 0) | (batch.tokens_BT >= vocabulary), f"a token outside [0, {vocabulary})")
    fail_where((batch.target_BT < 0) | (batch.target_BT >= vocabulary), f"a target outside [0, {vocabulary})")
    fail_where((modality < PADDING) | (modality > len(positions)), "a modality that no adapter has")
    fail_where((modality == PADDING) != (segment == 0), "padding and segment 0 do not coincide")
    fail_where((segment == 0) & (batch.weight_BT != 0), "a loss weight on padding")
    fail_where(batch.span_BT < 0, "a span below 0")
    for name, array in batch.extra.items():
        if np.issubdtype(array.dtype, np.floating):
            given_BT = np.isfinite(array).reshape(B, T, -1).any(axis=-1)
            fail_where((segment == 0) & given_BT, f"a label {name!r} on padding")
    _check_segments(segment, np.asarray(batch.position_BT), fail_where)
    for number, (name, P) in enumerate(positions.items(), start=1):
        length_BN = np.asarray(batch.media[name].length_BN)
        N = length_BN.shape[1]
        if (length_BN > P).any():
            longest = length_BN.max()
            raise UserError(f"batch: an item of {name} has length {longest}, but the adapter fills {P} positions")
        here = modality == number
        item = np.where(here, batch.slot_BT // P, 0)
        fail_where(here & ((batch.slot_BT < 0) | (item >= N)), f"a slot outside the {N} items of {name}")
        length_BT = np.take_along_axis(length_BN, np.clip(item, 0, N - 1), axis=1)
        fail_where(here & (batch.slot_BT % P >= length_BT), f"a slot beyond the length of its {name} item")


def _check_segments(segment_BT, position_BT, fail_where) -> None:
    """Examples must be contiguous, each with position ids 0, 1, 2, ...: windows and caches rely on it."""
    greatest_BT = np.maximum.accumulate(np.pad(segment_BT, ((0, 0), (1, 0))), axis=1)[:, :-1]
    real_BT, begins_BT = segment_BT > 0, segment_BT > greatest_BT
    fail_where(real_BT & (segment_BT < greatest_BT), "a segment that continues after another one")
    # Expected position ids: the number of real positions before each, minus those before its example.
    count_BT = np.cumsum(real_BT, axis=1) - 1
    first_BT = np.maximum.accumulate(np.where(begins_BT, count_BT, 0), axis=1)
    fail_where(real_BT & (position_BT != count_BT - first_BT), "a position id that does not count from 0 per example")
