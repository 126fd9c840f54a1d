"""The product with its own gradient, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.nn.affine import affine


@pytest.mark.parametrize("outputs", [3, 11], ids=["tall kernel", "wide kernel"])
@pytest.mark.parametrize("biased", [True, False])
def test_the_value_and_the_gradients_are_those_of_the_formula(outputs, biased):
    rng = np.random.default_rng(0)
    x_NI, kernel_IO, bias_O, dy_NO = (rng.normal(size=size) for size in ((9, 7), (7, outputs), outputs, (9, outputs)))
    given = [jnp.asarray(x, jnp.float32) for x in (x_NI, kernel_IO, bias_O)]
    y_NO, pull = jax.vjp(affine, *given[: 2 + biased], *[None] * (not biased))
    np.testing.assert_allclose(y_NO, x_NI @ kernel_IO + bias_O * biased, rtol=1e-5, atol=1e-5)
    wanted = dy_NO @ kernel_IO.T, x_NI.T @ dy_NO, dy_NO.sum(0)
    for got, want in zip(pull(jnp.asarray(dy_NO, jnp.float32))[: 2 + biased], wanted, strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_tall_kernel_is_computed_as_a_wide_one():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 48), (48, 16), (16,))]
    step = jax.jit(jax.grad(lambda x, kernel, bias: jnp.sum(affine(x, kernel, bias) ** 2), argnums=(1, 2)))
    program = step.lower(*shapes).compile().as_text()
    wide = "f32[16,48]{1,0} dot(", "f32[48,16]{0,1} dot("  # the same order of elements in memory
    assert any(one in program for one in wide) and "f32[48,16]{1,0} dot(" not in program
    assert "reduce-window" not in program


def test_several_models_at_once_have_the_gradients_of_each():
    rng = np.random.default_rng(1)
    x, kernel, bias = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 5, 6), (2, 6, 3), (2, 3)))
    gradient = jax.grad(lambda *given: jnp.sum(jnp.sin(affine(*given))), argnums=(0, 1, 2))
    together = jax.jit(jax.vmap(gradient))(x, kernel, bias)
    for seed in range(2):
        plain = jax.grad(lambda x, kernel, bias: jnp.sum(jnp.sin(x @ kernel + bias[None])), argnums=(0, 1, 2))
        for got, want in zip(together, plain(x[seed], kernel[seed], bias[seed]), strict=True):
            np.testing.assert_allclose(got[seed], want, rtol=1e-5, atol=1e-5)
