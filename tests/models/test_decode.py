"""Decoding with the cache equals the whole row, position by position, after a prompt with media."""

import jax
import numpy as np
import pytest

from batches import ADAPTERS, LIGHT, build, columns, example, tiny_model
from polygpt.nn.positions import Learned, MRope, NoPosition, Rope, Sinusoidal
from polygpt.sequence import NAMED_ARRAYS, PADDING, Batch

T, PROMPT = 20, 13
ROWS = [
    [example(2, ("image", 4), 1, ("audio", 3), 9, seed=1)],
    [example(("audio", 2), 4, ("image", 4), 5, seed=2)],
    [example(12, seed=3)],
]
FORMS = {
    "MHA-rope": {"kv_heads": None, "position": Rope()},
    "GQA-learned": {"kv_heads": 2, "position": Learned(T)},
    "MQA-sinusoidal-unrolled": {"kv_heads": 1, "position": Sinusoidal(), "scan": False},
    "GQA-none-free-remat": {"kv_heads": 2, "position": NoPosition(), "tied": False, "remat": "full"},
}


@pytest.mark.parametrize("form", FORMS)
def test_token_by_token_equals_the_whole_row(form):
    model, params = tiny_model(adapters=LIGHT, **FORMS[form])
    whole_of, decode = jax.jit(model.apply), jax.jit(model.decode)
    for bidirectional in (False, True):
        batch = build(ROWS, T, bidirectional=bidirectional)
        whole_BTV = np.asarray(whole_of(params, batch).logits_BTV)
        logits_BTV, cache = decode(params, columns(batch, 0, PROMPT, media=True), model.init_cache(len(ROWS), T + 3))
        steps = [logits_BTV]
        for t in range(PROMPT, T):
            logits_BTV, cache = decode(params, columns(batch, t, t + 1, media=False), cache)
            steps.append(logits_BTV)
        real = batch.segment_BT > 0
        np.testing.assert_allclose(np.concatenate(steps, axis=1)[real], whole_BTV[real], rtol=0, atol=1e-5)
        assert cache.cursor == T and cache.size == T + 3
        np.testing.assert_array_equal(cache.seen.segment[:, :T], batch.segment_BT)
        assert not np.asarray(cache.seen.segment[:, T:]).any()


def piece(batch: Batch, bounds, length: int) -> Batch:
    """Of every row the positions between its two bounds, right-padded to `length`."""
    arrays = {}
    for name, value in vars(batch).items():
        if name not in NAMED_ARRAYS:
            shape = (len(bounds), length, *value.shape[2:])
            arrays[name] = np.full(shape, PADDING if name == "modality_BT" else 0, value.dtype)
            for row, (start, stop) in enumerate(bounds):
                arrays[name][row, : stop - start] = value[row, start:stop]
    return Batch(**arrays, media=batch.media)


@pytest.fixture(scope="module")
def toy():
    """(model, params, whole batch, its logits, jitted decode)"""
    model, params = tiny_model(adapters=LIGHT, position=MRope())
    rows = [[example(1, ("image", 4), 3, ("audio", 3), 1, seed=4)], [example(("image", 4), 5, seed=5)]]
    batch = build(rows, 12, adapters=LIGHT)
    return model, params, batch, np.asarray(jax.jit(model.apply)(params, batch).logits_BTV), jax.jit(model.decode)


@pytest.mark.parametrize(
    "pieces",
    [[[(0, 5), (0, 4)], [(5, 8), (4, 5)], [(8, 12), (5, 9)]], [[(0, 7), (0, 2)], [(7, 8), (2, 9)], [(8, 12), (9, 9)]]],
    ids=["each with media", "ragged"],
)
def test_a_row_may_be_read_in_ragged_pieces(toy, pieces):
    """A conversation of several turns. The padding behind a shorter row stays in the cache, and is never seen."""
    model, params, batch, expected_BTV, decode = toy
    cache = model.init_cache(2, 3 * 8)
    for bounds in pieces:
        logits_BTV, cache = decode(params, piece(batch, bounds, 8), cache)
        for row, (start, stop) in enumerate(bounds):
            got = logits_BTV[row, : stop - start]
            np.testing.assert_allclose(got, expected_BTV[row, start:stop], rtol=0, atol=1e-5)


def test_some_modalities_may_be_left_out_of_a_piece(toy):
    """A piece with recordings alone: the audio adapter keeps its number although no pictures are given."""
    model, params, batch, expected_BTV, decode = toy
    _, cache = decode(params, piece(batch, [(0, 8), (0, 8)], 8), model.init_cache(2, 24))
    rest = piece(batch, [(8, 12), (8, 9)], 8)
    logits_BTV, _ = decode(params, rest.replace(media={"audio": batch.media["audio"]}), cache)
    np.testing.assert_allclose(logits_BTV[0, :4], expected_BTV[0, 8:12], rtol=0, atol=1e-5)


def test_attention_weights_are_distributions_over_what_may_be_seen():
    model, params = tiny_model(adapters=LIGHT)
    batch = build(ROWS, T, bidirectional=True)
    found = jax.jit(model.attention)(params, batch)
    weights_LBHTT = np.stack([found[layer] for layer in range(2)])
    assert weights_LBHTT.shape == (2, 3, 4, T, T) and weights_LBHTT.dtype == np.float32
    real = batch.segment_BT > 0
    np.testing.assert_allclose(weights_LBHTT.sum(-1), np.broadcast_to(real[None, :, None], (2, 3, 4, T)), atol=1e-6)
    together_BTT = (batch.span_BT[:, :, None] == batch.span_BT[:, None]) & (batch.span_BT > 0)[:, None]
    later_BTT = np.triu(np.ones((T, T), bool), 1) & ~together_BTT
    assert not weights_LBHTT[np.broadcast_to(later_BTT[None, :, None], weights_LBHTT.shape)].any()
    chosen = jax.jit(model.attention)(params, batch, np.int32([5, 2]))
    np.testing.assert_allclose(chosen[1], weights_LBHTT[1][:, :, [5, 2]], rtol=0, atol=1e-6)
    picture = np.flatnonzero(batch.modality_BT[0] == 1 + list(ADAPTERS).index("image"))
    assert (weights_LBHTT[:, 0, :, picture[0], picture[-1]] > 0).all(), "a picture sees all of itself"


def test_a_fresh_cache_can_be_donated():
    model, _ = tiny_model()
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model.init_cache(2, 8))]
    assert len(set(pointers)) == len(pointers)
