"""Decoding with the cache equals the whole row, position by position, after a prompt with media."""

import jax
import numpy as np
import pytest
from batches import ADAPTERS, build, columns, example, tiny_model

from polygpt.nn.positions import Learned, NoPosition, Rope, Sinusoidal

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
    model, params = tiny_model(**FORMS[form])
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


@pytest.fixture(scope="module")
def toy():
    model, params = tiny_model()
    return model, params, jax.jit(model.decode)


def test_a_prompt_may_be_read_in_pieces_that_hold_media_each(toy):
    """A conversation: a picture, an answer, a recording. The slots of a piece count from its own media."""
    model, params, decode = toy
    parts = [(3, ("image", 4)), (2,), (("audio", 3), 1)]
    whole = build([[example(*sum(parts, ()), seed=4)]], 13)
    expected, _ = decode(params, whole, model.init_cache(1, 16))
    cache, got = model.init_cache(1, 16), []
    for start, stop, media in ((0, 7, True), (7, 9, False), (9, 13, True)):
        logits_BTV, cache = decode(params, columns(whole, start, stop, media=media), cache)
        got.append(logits_BTV)
    np.testing.assert_allclose(np.concatenate(got, axis=1), expected, rtol=0, atol=1e-5)


def test_padding_in_the_cache_is_never_seen(toy):
    """Ragged prompts, padded on the right: the shorter row answers as it does alone."""
    model, params, decode = toy
    ragged = [[example(3, ("image", 4), 3, seed=1)], [example(5, seed=2)]]
    answer = build([[example(2, seed=8)], [example(2, seed=9)]], 2)
    for row, length in ((0, 10), (1, 5)):
        position = np.int32([[10, 11], [5, 6]])
        together, cache = decode(params, build(ragged, 10), model.init_cache(2, 12))
        together, _ = decode(params, columns(answer.replace(position_BT=position), 0, 2, media=False), cache)
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], answer.replace(position_BT=position))
        alone, cache = decode(params, build([ragged[row]], length), model.init_cache(1, length + 2))
        alone, _ = decode(params, columns(one, 0, 2, media=False), cache)
        np.testing.assert_allclose(together[row], alone[0], rtol=0, atol=1e-5)


def test_some_modalities_may_be_left_out_of_a_piece(toy):
    """A piece with recordings alone: the audio adapter keeps its number although no pictures are given."""
    model, params, decode = toy
    batch = build([[example(("audio", 3), 2, seed=5)]], 5)
    expected, _ = decode(params, batch, model.init_cache(1, 5))
    got, _ = decode(params, batch.replace(media={"audio": batch.media["audio"]}), model.init_cache(1, 5))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_attention_weights_are_distributions_over_what_may_be_seen():
    model, params = tiny_model()
    batch = build(ROWS, T, bidirectional=True)
    weights_LBHTT = np.asarray(jax.jit(model.attention)(params, batch))
    assert weights_LBHTT.shape == (2, 3, 4, T, T) and weights_LBHTT.dtype == np.float32
    real = batch.segment_BT > 0
    np.testing.assert_allclose(weights_LBHTT.sum(-1), np.broadcast_to(real[None, :, None], (2, 3, 4, T)), atol=1e-6)
    later = np.triu(np.ones((T, T), bool), 1) & ~((batch.span_BT[:, :, None] == batch.span_BT[:, None]) & (batch.span_BT > 0)[:, None])
    assert not weights_LBHTT[:, :, :, :, :][np.broadcast_to(later[None, :, None], weights_LBHTT.shape)].any()
    picture = np.flatnonzero(batch.modality_BT[0] == 1 + list(ADAPTERS).index("image"))
    assert (weights_LBHTT[:, 0, :, picture[0], picture[-1]] > 0).all(), "a picture sees all of itself"
