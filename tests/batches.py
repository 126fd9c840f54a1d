"""Small batches and models, built without the data pipeline: what the model must do is stated by the layout alone."""

import dataclasses
from typing import Any

import jax
import numpy as np

from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.image import ImageAdapter
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.stack import StackSpec
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import Model, Params, bind
from polygpt.models.multimodal import ModelSpec
from polygpt.parameters import Traits, name_of
from polygpt.sequence import NAMED_ARRAYS, PADDING, TEXT, Batch, Media, check, coordinates

VOCABULARY = 31
TOWER = StackSpec(width=8, depth=1, attention=MultiHead(heads=2))
# In this order: not the alphabetical one, into which jax sorts the keys of a dict.
ADAPTERS = {
    "image": ImageAdapter(ImageFeatures(8, 8, channels=1), items=2, patch=4, tower=TOWER),
    "audio": AudioAdapter(LogMel(0.16, rate=8000, mels=8, window=200, hop=80), items=2, fold=2, tower=TOWER),
}
# For what does not depend on blocks in towers: they take long to compile.
LIGHT = {name: adapter.replace(tower=TOWER.replace(depth=0)) for name, adapter in ADAPTERS.items()}


@dataclasses.dataclass(frozen=True)
class Example:
    """What one packed example holds: an int is that many tokens of text, ("audio", 3) an item of three positions.

    All that it holds is drawn from `seed`, so that it is the same in whichever row it lies.
    """

    parts: tuple
    seed: int = 0


def example(*parts, seed: int = 0) -> Example:
    """`Example(parts, seed)`."""
    return Example(parts, seed)


def build(rows, length: int, *, adapters=ADAPTERS, bidirectional: bool = False, weight: float = 1.0) -> Batch:
    """Rows of examples, right-padded to `length`. Unused media items hold ones.

    With `bidirectional` the positions of a media item see each other. Every text token but the first of an example is
    predicted, with the weight `weight`.
    """
    B = len(rows)
    names = ("tokens", "modality", "slot", "position", "segment", "span", "target")
    array = {name: np.zeros((B, length), np.int32) for name in names}
    array["modality"][:] = PADDING
    weight_BT, coordinate_BT3 = np.zeros((B, length), np.float32), np.zeros((B, length, 3), np.int32)
    media = {
        name: Media(np.ones((B, a.items, *a.features.shape), np.float32), np.zeros((B, a.items), np.int32))
        for name, a in adapters.items()
    }
    for b, examples in enumerate(rows):
        used, t, span = dict.fromkeys(adapters, 0), 0, 0
        for segment, one in enumerate(examples, start=1):
            rng, start, origin = np.random.default_rng(one.seed), t, 0
            for part in one.parts:
                if isinstance(part, int):
                    here = slice(t, t + part)
                    array["tokens"][b, here] = rng.integers(0, VOCABULARY, part)
                    array["modality"][b, here] = TEXT
                    coordinate_BT3[b, here] = origin + np.arange(part)[:, None]
                else:
                    name, n = part
                    here, item, span = slice(t, t + n), used[name], span + 1
                    used[name] += 1
                    array["modality"][b, here] = 1 + list(adapters).index(name)
                    array["slot"][b, here] = item * adapters[name].positions + np.arange(n)
                    array["span"][b, here] = span if bidirectional else 0
                    media[name].features[b, item] = rng.normal(size=adapters[name].features.shape)
                    media[name].length_BN[b, item] = n
                    coordinate_BT3[b, here] = origin + coordinates(adapters[name].grid)[:n]
                origin = coordinate_BT3[b, start : here.stop].max(initial=-1) + 1
                t = here.stop
            array["position"][b, start:t] = np.arange(t - start)
            array["segment"][b, start:t] = segment
        predicted = (array["modality"][b, 1:] == TEXT) & (array["segment"][b, 1:] == array["segment"][b, :-1])
        array["target"][b, :-1] = np.where(predicted, array["tokens"][b, 1:], 0)
        weight_BT[b, :-1] = weight * predicted
    arrays = {f"{name}_BT": value for name, value in array.items()}
    batch = Batch(**arrays, weight_BT=weight_BT, media=media, coordinate_BT3=coordinate_BT3)
    batch = batch.replace(modality_BT=batch.modality_BT.astype(np.int8))
    check(batch, VOCABULARY, {name: adapter.positions for name, adapter in adapters.items()})
    return batch


def columns(batch: Batch, start: int, stop: int, *, media: bool) -> Batch:
    """The positions from `start` to `stop`, with all media or none."""
    arrays = {name: value[:, start:stop] for name, value in vars(batch).items() if name not in NAMED_ARRAYS}
    return Batch(**arrays, media=batch.media if media else {})


def tiny(
    *, adapters=ADAPTERS, dtype: str = "float32", heads: int = 4, kv_heads: int | None = 2, **decoder
) -> ModelSpec:
    """A model of two blocks and sixteen channels; keywords are fields of its decoder."""
    fields = {"width": 16, "depth": 2, "attention": MultiHead(heads, kv_heads)} | decoder
    return ModelSpec(DecoderSpec(**fields), adapters, dtype)


def lively(model: Model, seed: int = 0, scale: float = 0.3) -> Params:
    """Parameters without the zeros and ones of a fresh model, so that nothing it computes stays without effect."""
    leaves, tree = jax.tree.flatten(model.abstract())
    rng = np.random.default_rng(seed)
    return tree.unflatten([np.float32(rng.normal(0, scale, leaf.shape) + (leaf.ndim == 1)) for leaf in leaves])


def tiny_model(seed: int = 0, **options) -> tuple[Model, Params]:
    """`tiny(**options)` bound, and lively parameters for it."""
    model = bind(tiny(**options), VOCABULARY)
    return model, lively(model, seed)


def traits_of(arrays) -> Any:
    """The traits of arrays that belong to no module: what is called a kernel decays."""

    def of(path, leaf):
        return Traits(leaf.shape, (None,) * len(leaf.shape), name_of(path).endswith("kernel"))

    return jax.tree_util.tree_map_with_path(of, arrays)
