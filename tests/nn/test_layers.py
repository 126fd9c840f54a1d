"""Norms, linear maps, feed-forward layers and convolutions against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from polygpt.errors import SpecError
from polygpt.nn.convolution import TimeConvolution
from polygpt.nn.dropout import dropout
from polygpt.nn.linear import Linear
from polygpt.nn.mlp import MLP, GatedMLP, activate
from polygpt.nn.norms import LayerNorm, RMSNorm

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(2, 3, 8)) * 3 + 1)


def randomised(module):
    """The module with every parameter drawn anew: no zeros and ones that hide a mistake."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), x.dtype), state))


def wide(param):
    return np.asarray(param[...], np.float64)


def close(got, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=1e-5, atol=atol)


def test_rms_norm():
    norm = randomised(RMSNorm(epsilon=0.1).build(8))
    close(norm(X), X / np.sqrt((X.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.1) * wide(norm.scale))


def test_layer_norm():
    norm = randomised(LayerNorm(epsilon=0.1).build(8))
    x = X.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    close(norm(X), centred / np.sqrt(x.var(-1, keepdims=True) + 0.1) * wide(norm.scale) + wide(norm.bias))


@pytest.mark.parametrize("spec", [RMSNorm(), LayerNorm()], ids=["rms", "layer"])
def test_norms_compute_in_float32_and_stay_finite_on_zeros(spec):
    norm = spec.build(8)
    assert norm(jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16
    large = jnp.full((1, 8), 1e4, jnp.bfloat16) * (jnp.arange(8) - 3)[None].astype(jnp.bfloat16)
    assert np.isfinite(np.asarray(norm(large * large), np.float32)).all(), "squares of 1e9 fit float32 alone"
    zeros = jnp.zeros((2, 8))
    assert (norm(zeros) == 0).all()
    assert np.isfinite(jax.grad(lambda x: jnp.sum(jnp.sin(norm(x))))(zeros)).all()


def test_linear_is_an_affine_map_of_the_last_axis():
    linear = randomised(Linear(8, 5, rngs=nnx.Rngs(0), bias=True, dtype="float32"))
    close(linear(X), X.astype(np.float64) @ wide(linear.kernel) + wide(linear.bias))
    close(linear(X[0, 0]), X[0, 0].astype(np.float64) @ wide(linear.kernel) + wide(linear.bias))
    assert Linear(8, 5, rngs=nnx.Rngs(0), bias=False, dtype="float32").bias is None


def test_linear_starts_at_a_spread_of_one_over_the_root_of_its_inputs():
    kernel = Linear(256, 256, rngs=nnx.Rngs(0), bias=True, dtype="float32", scale=0.5).kernel[...]
    assert abs(float(kernel.std()) * 16 / 0.5 - 1) < 0.02 and abs(float(kernel.mean())) < 1e-3


def test_linear_computes_in_its_dtype_and_can_keep_the_sums():
    linear = Linear(8, 5, rngs=nnx.Rngs(0), bias=False, dtype="bfloat16")
    assert linear(X).dtype == jnp.bfloat16 and linear.kernel[...].dtype == jnp.float32
    sums = linear(X, output_dtype="float32")
    half = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (X, linear.kernel[...])]
    assert sums.dtype == jnp.float32
    close(sums, half[0] @ half[1])


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    close(activate(name, X), ACTIVATIONS[name](X.astype(np.float64)))


def test_mlp():
    mlp = randomised(MLP(factor=2, activation="relu").build(8, rngs=nnx.Rngs(0), dtype="float32", output_scale=1))
    hidden = np.maximum(X @ wide(mlp.up.kernel) + wide(mlp.up.bias), 0)
    close(mlp(X), hidden @ wide(mlp.down.kernel) + wide(mlp.down.bias), 2e-4)
    assert mlp.up.kernel[...].shape == (8, 16)


@pytest.mark.parametrize("gate", ["silu", "gelu", "relu", "sigmoid", "identity"])
def test_gated_mlp(gate):
    spec = GatedMLP(factor=2, multiple=1, activation=gate)
    mlp = randomised(spec.build(8, rngs=nnx.Rngs(0), dtype="float32", output_scale=1))
    hidden = ACTIVATIONS[gate](X @ wide(mlp.gate.kernel)) * (X @ wide(mlp.up.kernel))
    close(mlp(X), hidden @ wide(mlp.down.kernel), 1e-3)
    assert mlp.gate.bias is None


def test_the_gated_hidden_width_costs_what_the_ungated_one_does():
    assert GatedMLP().hidden_width(768) == 2048 and MLP().hidden_width(768) == 3072
    assert GatedMLP(multiple=256).hidden_width(4096) == 11008  # Llama 7B
    with pytest.raises(SpecError, match=r"GatedMLP.factor is 0.0: it must be above 0"):
        GatedMLP(factor=0)


@pytest.mark.parametrize(("frames", "stride"), [(7, 1), (7, 2), (8, 2)])
def test_a_time_convolution_is_a_sum_over_neighbours(frames, stride):
    layer = randomised(TimeConvolution(3, 4, size=3, stride=stride, rngs=nnx.Rngs(0), dtype="float32"))
    x = np.float32(RNG.normal(size=(2, frames, 3)))
    kernel, bias = wide(layer.linear.kernel).reshape(3, 3, 4), wide(layer.linear.bias)
    expected = np.tile(bias, (2, -(-frames // stride), 1))
    for t, i in np.ndindex(expected.shape[1], 3):
        if 0 <= t * stride + i - 1 < frames:
            expected[:, t] += x[:, t * stride + i - 1] @ kernel[i]
    close(layer(x), expected)


def test_dropout_keeps_the_mean_and_drops_the_share_it_is_told():
    x = jnp.ones((100, 100))
    dropped = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 0.02
    assert dropout(x, 0.25, None) is x and dropout(x, 0.0, jax.random.key(0)) is x
