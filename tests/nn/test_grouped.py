"""Rows times the matrices of their groups, against a loop in float64: in blocks, as on CPUs, and as on accelerators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.nn import grouped
from polygpt.nn.grouped import grouped_matmul

N, D, F = 40, 6, 5
RNG = np.random.default_rng(0)
X_ND, Y_NF = np.float32(RNG.normal(size=(N, D))), np.float32(RNG.normal(size=(N, F)))
KERNEL_EDF = np.float32(RNG.normal(size=(4, D, F)))
SIZES = {
    "even": [10, 10, 10, 10],
    "some left over": [3, 0, 17, 9],
    "one has all": [0, 40, 0, 0],
    "none": [0, 0, 0, 0],
    "whole blocks": [8, 16, 8, 8],
}


def loop(sizes):
    """(product, gradients towards x and the kernels) for the cotangent Y."""
    y, towards_x, towards_kernel = np.zeros((N, F)), np.zeros((N, D)), np.zeros((4, D, F))
    start = 0
    for e, size in enumerate(sizes):
        for n in range(start, start + size):
            y[n] = np.float64(X_ND[n]) @ KERNEL_EDF[e]
            towards_x[n] = np.float64(KERNEL_EDF[e]) @ Y_NF[n]
            towards_kernel[e] += np.outer(np.float64(X_ND[n]), Y_NF[n])
        start += size
    return y, towards_x, towards_kernel


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_each_group_has_its_matrix(sizes):
    @jax.jit
    def run(sizes_E):
        y_NF, back = jax.vjp(lambda x, kernel: grouped_matmul(x, kernel, sizes_E), X_ND, KERNEL_EDF)
        return y_NF, *back(Y_NF)

    for got, expected in zip(run(np.int32(sizes)), loop(sizes), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_accelerators_compute_the_same():
    """The other branch, which no CPU takes: its rows behind the last group are masked, whatever they hold."""
    sizes_E = np.int32(SIZES["some left over"])
    y, _, towards_kernel = loop(sizes_E)
    product = jax.lax.ragged_dot(X_ND, KERNEL_EDF, sizes_E)
    np.testing.assert_allclose(grouped._grouped_rows(product, sizes_E), y, rtol=0, atol=2e-5)
    rows = (grouped._grouped_rows(x, sizes_E) for x in (jnp.asarray(X_ND), jnp.asarray(Y_NF)))
    np.testing.assert_allclose(grouped._outer(*rows, sizes_E), towards_kernel, rtol=0, atol=2e-5)
    text = jax.export.export(jax.jit(grouped_matmul), platforms=["tpu"])(X_ND, KERNEL_EDF, sizes_E).mlir_module()
    assert "ragged_dot" in text and "while" not in text
