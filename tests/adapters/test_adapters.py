"""Media towers: what an item becomes, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from batches import ADAPTERS, TOWER
from equations import equations
from polygpt import sharding
from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.base import Connector
from polygpt.adapters.image import ImageAdapter, patches
from polygpt.adapters.text import TextEmbedding
from polygpt.adapters.tower import Tower
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.errors import SpecError
from polygpt.nn.positions import Learned, NoPosition, Rope, Rope2D
from polygpt.sequence import Media

RNG = np.random.default_rng(0)


def built(adapter, width: int = 16):
    """The adapter's module with parameters without zeros and ones."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: adapter.build(width, rngs=nnx.Rngs(0), dtype="float32")))
    rng = np.random.default_rng(1)
    return nnx.merge(graphdef, jax.tree.map(lambda x: rng.normal(0.2, 0.4, x.shape).astype(np.float32), state))


def test_patches_are_rows_of_rows():
    """The patch (i, j) is picture[4i : 4i + 4, 2..] flattened row by row, and patches are numbered row by row."""
    picture = np.float32(RNG.normal(size=(1, 8, 12, 3)))
    got = patches(picture, 4)
    assert got.shape == (1, 6, 48)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(got[0, 3 * i + j], picture[0, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].ravel())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_items_become_embeddings_each_by_itself(name, kind):
    adapter = ADAPTERS[name].replace(connector=Connector(kind))
    module = built(adapter)
    features = np.float32(RNG.normal(size=(2, 2, *adapter.features.shape)))
    length_BN = np.int32([[adapter.positions, 2], [0, adapter.positions]])
    apply = jax.jit(lambda features: module(Media(features, length_BN))[0])
    out = np.asarray(apply(features))
    assert out.shape == (2, 2, adapter.positions, 16)
    features[0, 0] = -features[0, 0]
    other = np.asarray(apply(features))
    assert (out[0, 0] != other[0, 0]).any(axis=-1).all()
    np.testing.assert_array_equal(out[0, 1], other[0, 1])
    np.testing.assert_array_equal(out[1], other[1])


def audio(seconds: float, fold: int, tower=TOWER) -> AudioAdapter:
    return AudioAdapter(LogMel(seconds, rate=8000, mels=8, window=200, hop=80), fold=fold, tower=tower)


@pytest.mark.parametrize(("frames", "fold"), [(11, 1), (11, 2), (12, 3)])
def test_a_recording_does_not_depend_on_the_longest_one(frames, fold):
    """The same clip under two bounds of length, and before garbage: an odd number of frames, a part of a fold."""
    clip, found = np.float32(RNG.normal(size=(frames, 8))), []
    for seconds in (frames / 100, 0.25):
        adapter = audio(seconds, fold)
        length = adapter.length(frames)
        module = jax.jit(built(adapter))
        for behind in (0, np.nan):
            features = np.full((1, 1, *adapter.features.shape), behind, np.float32)
            features[0, 0, : 2 * fold * length] = 0  # a position is filled up with silence
            features[0, 0, :frames] = clip
            found.append(np.asarray(module(Media(features, np.int32([[length]])))[0])[0, 0, :length])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=2e-6)
    assert np.ptp(found[0]) > 0.5


@pytest.mark.parametrize(
    ("frames", "fold", "positions"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (16, 2, 4), (17, 2, 5), (3000, 1, 1500)]
)
def test_positions_of_a_recording(frames, fold, positions):
    assert audio(30.0, fold).length(frames) == positions


def test_positions_do_not_exceed_the_bound():
    for fold in range(1, 6):
        adapter = audio(0.17, fold)
        assert adapter.length(adapter.features.shape[0]) == adapter.positions
        assert [adapter.length(n) for n in range(1, 18)] == sorted(adapter.length(n) for n in range(1, 18))


@pytest.mark.parametrize("position", [NoPosition(), Learned(64), Rope()], ids=["default", "learned", "rope"])
def test_a_tower_knows_where_a_patch_lies(position):
    """By default a learned vector a patch; another encoding where one is asked for."""
    adapter = ADAPTERS["image"].replace(tower=TOWER.replace(position=position))
    module = jax.jit(built(adapter))
    equal = np.ones((1, 1, 8, 8, 1), np.float32)
    out = np.asarray(module(Media(equal, np.int32([[4]])))[0])[0, 0]
    # Equal patches at different places differ by what is added for the place; a rotation of equal values shows nothing.
    assert (np.ptp(out, axis=0).max() < 1e-5) == isinstance(position, Rope)
    halves = np.concatenate([equal[:, :, :4], -equal[:, :, 4:]], axis=2)
    there, back = (np.asarray(module(Media(x, np.int32([[4]])))[0])[0, 0] for x in (halves, halves[:, :, ::-1]))
    assert np.abs(there - back[[2, 3, 0, 1]]).max() > 1e-3, "upside down is not the same patches in another order"


def test_a_tower_turns_by_row_and_column():
    """A transposed picture, with the halves of each head that turn by row and by column exchanged, is the same."""
    assert ImageAdapter(ImageFeatures(8, 12), patch=4).grid == (1, 2, 3) and ADAPTERS["audio"].grid == (4, 1, 1)
    spec = TOWER.replace(position=Rope2D())
    lying, standing = (Tower(spec, rngs=nnx.Rngs(0), dtype="float32", grid=grid) for grid in ((1, 2, 3), (1, 3, 2)))
    for tower in (lying, standing):
        for projection in (tower.blocks.attention.query, tower.blocks.attention.key):
            kernel = np.random.default_rng(2).normal(size=(1, 8, 2, 4)).astype(np.float32)
            if tower is standing:
                kernel = kernel[..., [1, 0, 3, 2]]  # a head has a pair for the row, channels 0 and 2, and one more
            projection.kernel[...] = jnp.asarray(kernel.reshape(1, 8, 8))
    x_BTD, length_B = np.float32(RNG.normal(size=(1, 6, 8))), np.int32([6])
    order = np.arange(6).reshape(2, 3).T.ravel()
    expected_BTD = lying(x_BTD, length_B)[0][:, order]
    np.testing.assert_allclose(standing(x_BTD[:, order], length_B)[0], expected_BTD, atol=2e-6)
    assert np.abs(lying(x_BTD[:, order], length_B)[0] - expected_BTD).max() > 1e-2


def test_a_position_table_that_is_too_short_is_an_error():
    module = built(ADAPTERS["image"].replace(tower=TOWER.replace(position=Learned(3))))
    media = Media(np.ones((1, 1, 8, 8, 1), np.float32), np.int32([[4]]))
    with pytest.raises(SpecError, match="tower.position has 3 positions, but an item fills 4: raise its length to 4"):
        module(media)


def test_adapters_say_what_does_not_fit():
    with pytest.raises(
        SpecError, match="ImageAdapter.patch is 5: it must be a divisor of the image's height and width, 8 x 8"
    ):
        ImageAdapter(ImageFeatures(8, 8), patch=5)
    with pytest.raises(SpecError, match="AudioAdapter.fold is 0: it must be at least 1"):
        AudioAdapter(fold=0)
    with pytest.raises(SpecError, match="items is 0: it must be at least 1"):
        ImageAdapter(items=0)


def test_devices_exchange_embeddings_in_the_compute_dtype_and_sum_gradients_in_float32():
    sizes = tuple(2 if name in ("fsdp", "tensor") else 1 for name in sharding.AXES)
    mesh = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))

    graphdef, state = nnx.split(TextEmbedding(32, 16, rngs=nnx.Rngs(0), dtype="bfloat16"))

    def loss(state):
        return jnp.sum(nnx.merge(graphdef, state)(jnp.zeros((4, 6), jnp.int32)).astype(jnp.float32))

    with sharding.use_layout(sharding.MeshLayout(mesh, sharding.MeshSpec(data=1, fsdp=2, tensor=2))):
        lines = list(equations(jax.grad(loss), state))
    dtypes = {line.primitive.name: line.invars[0].aval.dtype.name for line in lines if line.invars}
    assert dtypes["all_gather"] == "bfloat16" and dtypes["reduce_scatter"] == "float32"
