"""Position encodings: the formulas, and what they are for."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polygpt.errors import SpecError
from polygpt.nn.positions import Learned, NoPosition, Rope, Sinusoidal

POSITION = np.int32([[0, 1, 2, 9], [3, 3, 0, 100]])


def test_sinusoids():
    got = Sinusoidal(base=100.0).build(6, rngs=nnx.Rngs(0))(POSITION)
    frequency = np.array([1, 0.1, 0.01])  # from 1 to 1/base in equal ratios
    angle = POSITION[..., None] * frequency
    np.testing.assert_allclose(got, np.concatenate([np.sin(angle), np.cos(angle)], -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [2, 7])
def test_sinusoids_need_an_even_width(width):
    with pytest.raises(SpecError, match=f"Sinusoidal needs an even width of at least 4, not {width}: change the width"):
        Sinusoidal().build(width, rngs=nnx.Rngs(0))


def test_learned_positions_are_rows_of_a_table():
    module = Learned(101).build(4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module(POSITION), np.asarray(module.table[...])[POSITION])
    assert Learned(101).limit() == 101 and Rope().limit() is None


def test_rope_turns_pairs_of_channels():
    x = np.float32(np.random.default_rng(0).normal(size=(2, 3, 4, 6)))
    pairs = x[..., :3] + 1j * x[..., 3:]
    frequency = 10.0 ** (-np.arange(3) * 2 / 6)
    turned = pairs * np.exp(1j * POSITION[:, None, :, None] * frequency)
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(Rope(base=10.0).rotate(x, POSITION), expected, rtol=0, atol=5e-5)


def test_rope_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(1)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(q, k):
        turned = [Rope().rotate(x, np.int32([[p]])) for x, p in ((query, q), (key, k))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert abs(score(5, 2) - score(105, 102)) < 1e-4
    assert abs(score(5, 2) - score(2, 5)) > 1e-2


def test_rope_keeps_the_dtype_and_refuses_odd_heads():
    assert Rope().rotate(jnp.ones((1, 1, 4, 2), jnp.bfloat16), POSITION[:1]).dtype == jnp.bfloat16
    with pytest.raises(SpecError, match="Rope needs an even head width, not 3: change heads"):
        Rope().rotate(jnp.ones((1, 1, 4, 3)), POSITION[:1])


def test_an_encoding_acts_in_one_place():
    x = jnp.ones((1, 1, 4, 6))
    for spec in (NoPosition(), Learned(), Sinusoidal()):
        assert spec.rotate(x, POSITION[:1]) is x
    assert NoPosition().build(6, rngs=nnx.Rngs(0)) is None and Rope().build(6, rngs=nnx.Rngs(0)) is None
