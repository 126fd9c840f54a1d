"""Layer patterns: which variant stands in which block, scanned or not, in training and over the caches."""

import dataclasses

import jax
import numpy as np
import pytest

from batches import build, columns, example, lively, tiny
from polygpt.attention.masks import Window
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.stack import StackSpec
from polygpt.errors import SpecError
from polygpt.models.functional import bind
from polygpt.overrides import override
from polygpt.parameters import paths


@dataclasses.dataclass(frozen=True)
class Local(MultiHead):
    """Sees the last positions."""

    window: int = 3
    """How many."""

    def mask(self, mask):
        return mask & Window(self.window)


WHOLE = MultiHead(4, 2)
LOCAL = Local(2, window=3)
T = 14
ROWS = [[example(9, seed=1), example(4, seed=2)], [example(12, seed=3)]]


@pytest.fixture(scope="module")
def scanned():
    """(model of the pattern local, local, whole, twice; its parameters; a batch)"""
    model = bind(tiny(adapters={}, depth=6, attention=LOCAL, pattern=(None, None, WHOLE)), 31)
    return model, lively(model, scale=0.2), build(ROWS, T, adapters={})


def test_the_pattern_repeats_to_the_depth(scanned):
    decoder = scanned[0].spec.decoder
    assert decoder.variants() == (LOCAL, LOCAL, WHOLE) * 2
    assert decoder.replace(depth=4, scan=False).variants() == (LOCAL, LOCAL, WHOLE, LOCAL)
    assert decoder.score_flops(2) == 4 * LOCAL.score_flops(16, 2) + 2 * WHOLE.score_flops(16, 2)
    for length in (1, 2, 3, 14, 101):  # a window of 3 keys sees fewer at the beginning of a row
        seen = [min(t, 3) for t in range(1, length + 1)], range(1, length + 1)
        local, whole = (4 * 16 * sum(keys) / length for keys in seen)
        np.testing.assert_allclose(decoder.causal_score_flops(length), 4 * local + 2 * whole, rtol=1e-12)
    assert StackSpec(depth=3).variants() == (StackSpec().attention,) * 3


def test_scanned_equals_unrolled_and_each_block_has_its_variant(scanned):
    model, params, batch = scanned
    unrolled = bind(model.spec.replace(decoder=model.spec.decoder.replace(scan=False)), 31)
    blocks = params["decoder"]["blocks"]
    each = {
        str(3 * time + slot): jax.tree.map(lambda leaf, t=time: leaf[t], blocks[str(slot)])
        for time in range(2)
        for slot in range(3)
    }
    own = {**params, "decoder": {**params["decoder"], "blocks": each}}
    assert paths(unrolled.abstract()).keys() == paths(own).keys()
    expected = jax.jit(unrolled.apply)(own, batch).logits_BTV
    np.testing.assert_allclose(jax.jit(model.apply)(params, batch).logits_BTV, expected, rtol=0, atol=2e-5)
    for which, weights in ((model, params), (unrolled, own)):
        found = jax.jit(which.attention)(weights, batch)
        assert sorted(found) == list(range(6))
        for layer, weights_BHTT in found.items():
            assert weights_BHTT.shape == (2, 4 if layer % 3 == 2 else 2, T, T)
            assert (weights_BHTT[1, :, 9, 2] > 0).all() == (layer % 3 == 2), "the whole past, or the window alone"


@pytest.mark.parametrize("scan", [True, False])
def test_decoding_through_caches_of_different_form(scanned, scan):
    model, params, batch = scanned
    if not scan:
        model = bind(tiny(adapters={}, depth=3, attention=LOCAL, pattern=(None, WHOLE), scan=False), 31)
        params = lively(model, scale=0.2)
    row = jax.tree.map(lambda x: x[1:], batch)
    expected = np.asarray(jax.jit(model.apply)(params, row).logits_BTV)[0]
    cache = model.init_cache(1, T)
    sizes = {leaf.shape[-2] for leaf in jax.tree.leaves(cache.layers) if leaf.ndim >= 4}
    assert sizes == {3, T}, "a ring of the window, and a place for every position"
    decode = jax.jit(model.decode)
    got, cache = decode(params, columns(row, 0, 5, media=False), cache)
    got = [got]
    for t in range(5, 12):
        logits, cache = decode(params, columns(row, t, t + 1, media=False), cache)
        got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1)[0], expected[:12], rtol=0, atol=2e-5)


def test_a_pattern_that_does_not_fit_the_depth_is_told():
    with pytest.raises(SpecError, match="depth is 4: it must be a multiple of the pattern"):
        StackSpec(depth=4, pattern=(None, None, WHOLE))
    with pytest.raises(SpecError, match="depth is 2: it must be at least the pattern"):
        StackSpec(depth=2, pattern=(None, None, WHOLE), scan=False)


def test_a_pattern_is_set_on_the_command_line():
    names = '[null, "polygpt.attention.multi_head:MultiHead"]'
    spec = override(StackSpec(), {"pattern": names, "pattern.1.heads": "2"})
    assert spec.variants() == (MultiHead(), MultiHead(2)) * 2
