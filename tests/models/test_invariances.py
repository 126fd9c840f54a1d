"""What must not matter does not: packing, neighbours, unused media, padding, scan, remat, dropout without a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import ADAPTERS, TOWER, build, example, lively, tiny, tiny_model
from polygpt.models.functional import bind
from polygpt.sequence import Media

EXAMPLES = [
    example(3, ("image", 4), 2, ("audio", 3), 3, seed=1),
    example(4, seed=2),
    example(("audio", 2), 3, seed=3),
    example(("image", 4), 2, seed=4),
]
T = 32


@pytest.fixture(scope="module")
def toy():
    """(params, jitted apply, jitted loss and gradients)."""
    model, params = tiny_model()

    def loss(params, batch):
        logits_BTV = model.apply(params, batch).logits_BTV
        log_p_BTV = jax.nn.log_softmax(jnp.where((batch.weight_BT > 0)[..., None], logits_BTV, 0))
        picked_BT = jnp.take_along_axis(log_p_BTV, batch.target_BT[..., None], axis=-1)[..., 0]
        return -jnp.sum(batch.weight_BT * picked_BT)

    return params, jax.jit(lambda p, b: model.apply(p, b).logits_BTV), jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module", params=[False, True], ids=["causal", "bidirectional"])
def packed(request):
    return build([EXAMPLES, EXAMPLES[::-1], EXAMPLES[1:2], []], T, bidirectional=request.param), request.param


def test_packed_equals_unpacked(toy, packed):
    params, apply, _ = toy
    batch, bidirectional = packed
    logits_BTV = np.asarray(apply(params, batch))
    alone_BTV = np.asarray(apply(params, build([[one] for one in EXAMPLES], T, bidirectional=bidirectional)))
    for row, order in ((0, EXAMPLES), (1, EXAMPLES[::-1])):
        for segment, one in enumerate(order, start=1):
            here = logits_BTV[row, batch.segment_BT[row] == segment]
            np.testing.assert_allclose(here, alone_BTV[EXAMPLES.index(one), : len(here)], rtol=0, atol=1e-5)
    assert np.ptp(logits_BTV[0, batch.segment_BT[0] > 0], axis=0).min() > 0.5, "there is something to compare"


@pytest.mark.parametrize("what", ["tokens", "image", "audio"])
def test_a_packed_example_does_not_touch_the_others(toy, packed, what):
    params, apply, _ = toy
    batch, _ = packed
    tokens_BT, media = batch.tokens_BT.copy(), dict(batch.media)
    if what == "tokens":
        tokens_BT[0, 1] = (tokens_BT[0, 1] + 1) % 31
    else:
        features = media[what].features.copy()
        features[0, 0] *= -1  # the first item of the row belongs to its first example
        media[what] = Media(features, media[what].length_BN)
    before = np.asarray(apply(params, batch))
    after = np.asarray(apply(params, batch.replace(tokens_BT=tokens_BT, media=media)))
    changed = np.zeros(batch.shape, bool)
    changed[0] = batch.segment_BT[0] == 1
    np.testing.assert_array_equal(before[~changed], after[~changed])
    assert (before[changed] != after[changed]).any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e30])
def test_unused_media_reach_neither_logits_nor_gradients(toy, packed, garbage):
    params, _, loss_and_gradients = toy
    batch, _ = packed
    dirty = {}
    for name, media in batch.media.items():
        features = media.features.copy()
        features[~media.valid_BN] = garbage
        if name == "audio":  # frames beyond the last position of a used item
            for b, n in np.argwhere(media.valid_BN):
                features[b, n, 2 * ADAPTERS["audio"].fold * media.length_BN[b, n] :] = garbage
        dirty[name] = Media(features, media.length_BN)
    dirty = batch.replace(media=dirty)
    assert all(np.isnan(m.features).any() or (np.abs(m.features) > 1e29).any() for m in dirty.media.values())
    for clean, other in zip(
        jax.tree.leaves(loss_and_gradients(params, batch)),
        jax.tree.leaves(loss_and_gradients(params, dirty)),
        strict=True,
    ):
        np.testing.assert_array_equal(clean, other)
        assert np.isfinite(other).all()


def test_a_row_does_not_depend_on_its_neighbours_or_padding(toy, packed):
    params, apply, _ = toy
    batch, _ = packed
    swapped = jax.tree.map(lambda x: x[::-1], batch)
    np.testing.assert_array_equal(apply(params, batch)[2], apply(params, swapped)[1])
    noise = np.where(batch.segment_BT == 0, 7, batch.tokens_BT).astype(np.int32)
    position = np.where(batch.segment_BT == 0, 5, batch.position_BT).astype(np.int32)
    noisy = apply(params, batch.replace(tokens_BT=noise, position_BT=position))
    real = batch.segment_BT > 0
    np.testing.assert_array_equal(apply(params, batch)[real], noisy[real])


def test_padding_alone_gives_zero_loss_and_finite_gradients(toy):
    params, apply, loss_and_gradients = toy
    batch = build([[]] * 4, T)
    loss, gradients = loss_and_gradients(params, batch)
    assert loss == 0 and all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradients))
    assert np.isfinite(apply(params, batch)).all()


def test_every_parameter_has_a_gradient(toy, packed):
    params, _, loss_and_gradients = toy
    gradients = loss_and_gradients(params, packed[0])[1]
    still = [
        jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_flatten_with_path(gradients)[0] if not g.any()
    ]
    assert still == []


@pytest.mark.parametrize("name", ADAPTERS)
def test_media_arrive_where_the_layout_puts_them(toy, name):
    """Inside jit too, which hands dicts on with their keys sorted: the numbers come from the model's specification."""
    params, apply, _ = toy
    batch = build([EXAMPLES, EXAMPLES[::-1], EXAMPLES[1:2], []], T)
    turned = batch.media | {name: Media(-batch.media[name].features, batch.media[name].length_BN)}
    changed_BT = np.any(apply(params, batch) != apply(params, batch.replace(media=turned)), axis=-1)
    number = 1 + list(ADAPTERS).index(name)
    for row in (0, 1):
        assert np.argmax(changed_BT[row]) == np.argmax(batch.modality_BT[row] == number)
    assert not changed_BT[2:].any()


def test_a_text_row_is_the_same_in_a_model_without_adapters(toy):
    params, apply, _ = toy
    model = bind(tiny(adapters={}), 31)
    mixed = build([EXAMPLES, EXAMPLES[1:2]], T)
    text = build([EXAMPLES[1:2]], T, adapters={})
    alone = {key: value for key, value in params.items() if key in model.abstract()}
    expected = jax.jit(model.apply)(alone, text).logits_BTV[0, :4]
    np.testing.assert_allclose(apply(params, mixed)[1, :4], expected, rtol=0, atol=1e-5)


# --- forms of the same computation ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half():
    """The jitted forward pass in bfloat16."""
    model = bind(tiny(dtype="bfloat16"), 31)
    return jax.jit(lambda params, batch: model.apply(params, batch).logits_BTV)


def value_and_gradients(spec, params, batch, key=None):
    model = bind(spec, 31)

    @jax.jit
    def run(params):
        def total(params):
            logits_BTV = model.apply(params, batch, key).logits_BTV
            return jnp.sum(jnp.sin(logits_BTV) * (batch.segment_BT > 0)[..., None]), logits_BTV

        return jax.value_and_grad(total, has_aux=True)(params)

    (_, logits_BTV), gradients = run(params)
    return np.asarray(logits_BTV), gradients


def unrolled(params):
    """Parameters of scanned decoder blocks as those of a list of blocks."""
    decoder = params["decoder"]
    depth = jax.tree.leaves(decoder["blocks"])[0].shape[0]
    blocks = {str(i): jax.tree.map(lambda x, i=i: x[i], decoder["blocks"]) for i in range(depth)}
    return params | {"decoder": decoder | {"blocks": blocks}}


@pytest.fixture(scope="module")
def plain():
    """(batch, params, logits, gradients) of a scanned text model with dropout, its key given."""
    batch = build([[example(7, seed=5), example(4, seed=6)], [example(9, seed=7)]], 12, adapters={})
    spec = tiny(adapters={}, dropout=0.2)
    params, key = lively(bind(spec, 31)), jax.random.key(3)
    return batch, params, key, value_and_gradients(spec, params, batch, key)


def same(got, expected, atol=2e-5):
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=atol)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_value_and_no_gradient(plain, remat):
    batch, params, key, expected = plain
    same(value_and_gradients(tiny(adapters={}, dropout=0.2, remat=remat), params, batch, key), expected)


def test_unrolled_blocks_with_remat_equal_scanned_ones_without(plain):
    batch, params, key, (logits, gradients) = plain
    spec = tiny(adapters={}, dropout=0.2, scan=False, remat="dots")
    same(value_and_gradients(spec, unrolled(params), batch, key), (logits, unrolled(gradients)))


def test_dropout_needs_a_key_and_is_a_function_of_it(plain):
    batch, params, key, (dropped, _) = plain
    model = bind(tiny(adapters={}, dropout=0.2), 31)
    apply = jax.jit(lambda key: model.apply(params, batch, key).logits_BTV)
    np.testing.assert_array_equal(apply(key), apply(key))
    assert np.abs(apply(jax.random.key(4)) - dropped).max() > 0.1
    off = jax.jit(model.apply)(params, batch).logits_BTV
    without = jax.jit(bind(tiny(adapters={}), 31).apply)(params, batch).logits_BTV
    np.testing.assert_array_equal(off, without)
    assert np.abs(off - dropped).max() > 0.1


def test_dropout_reaches_the_towers():
    towers = {name: adapter.replace(tower=TOWER.replace(dropout=0.5, depth=0)) for name, adapter in ADAPTERS.items()}
    model, params = tiny_model(adapters=towers)
    batch = build([[example(("image", 4), 1)], [example(("audio", 4), 1)], [example(5)]], 5)
    apply = jax.jit(lambda key: model.apply(params, batch, key).hidden_BTD)
    differs = np.any(apply(jax.random.key(0)) != apply(jax.random.key(1)), axis=(1, 2))
    assert list(differs) == [True, True, False], "the decoder itself has no dropout here"


def test_bfloat16_stays_within_its_precision(toy, half, packed):
    """Eight bits of mantissa over two blocks: a relative error of a few hundredths of the logits' spread."""
    params, apply, _ = toy
    batch, _ = packed
    exact = np.asarray(apply(params, batch))
    rounded = np.asarray(half(params, batch))
    real = batch.segment_BT > 0
    error = np.abs(rounded - exact)[real]
    assert rounded.dtype == np.float32
    assert 0 < np.sqrt(np.mean(error**2)) < 0.02 * exact[real].std() and error.max() < 0.1 * exact[real].std()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "free"])
def test_logits_are_not_rounded_to_the_compute_dtype(tied):
    model, params = tiny_model(adapters={}, tied=tied, dtype="bfloat16", depth=0)
    logits = np.asarray(model.apply(params, build([[example(9)]], 10, adapters={})).logits_BTV)
    assert logits.dtype == np.float32
    assert (logits != np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float32)).mean() > 0.5
