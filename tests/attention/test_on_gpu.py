"""Attention on a GPU, if there is one: JAX_PLATFORMS=cuda pytest tests/attention/test_on_gpu.py -s"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import answers, cotangents, floats, rows_of, with_floats

from polygpt.attention.kernels import cudnn, dispatch, reference
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import DECODER, ENCODER, Window

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")
T = 2048
ROWS = {"whole": [[T], [T]], "padded": [[T - 500], [7]], "packed": [[900, 1000], [T]], "an empty row": [[], [T]]}


def operands_of(lengths, spans: bool, length: int = T) -> Operands:
    rng, meta = np.random.default_rng(0), rows_of(lengths, length)
    if spans:
        meta.span[:, 500:600] = 1
    arrays = (jnp.asarray(rng.normal(size=(2, n, length, 64)), jnp.bfloat16) for n in (4, 2, 2))
    query, key, value = arrays
    meta = jax.tree.map(jnp.asarray, meta)
    return Operands(query / 8, key, value, meta, meta)


@pytest.mark.parametrize("mask", [DECODER, DECODER & Window(300), ENCODER], ids=str)
@pytest.mark.parametrize("spans", [False, True])
def test_every_way_of_cudnn_gives_what_the_reference_does(mask, spans):
    def attend(rule, operands):
        return dispatch.attend(rule, operands, "library", strict=True)

    for name, lengths in ROWS.items():
        operands = operands_of(lengths, spans)
        dy_BHTe, dlse_BHT = cotangents(operands)
        (y_BHTe, _), got = answers(attend, Rule(mask), operands, dy_BHTe, 0 * dlse_BHT)
        whole = with_floats(operands, jax.tree.map(lambda x: x.astype(jnp.float32), floats(operands)))
        with jax.default_matmul_precision("float32"):
            (wanted_BHTe, _), wanted = answers(reference.attend, Rule(mask), whole, dy_BHTe, 0 * dlse_BHT)
        for a, b in zip(jax.tree.leaves((y_BHTe, got)), jax.tree.leaves((wanted_BHTe, wanted)), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert np.linalg.norm(a - b) < 2**-6 * np.linalg.norm(b) + 1e-6, name


def test_the_fused_form_is_faster_than_the_mask_as_an_array():
    """Prints milliseconds of values and gradients at T 8192."""
    operands, rule = operands_of([[8192], [8192]], False, 8192), Rule(DECODER)
    ways = {
        "fused": lambda operands: cudnn.fused(cudnn.form_of(DECODER), operands),
        "in steps": lambda operands: cudnn.in_steps(rule, operands),
        "dense": lambda operands: cudnn.dense(rule, operands),
        "chosen": lambda operands: cudnn.attend(rule, operands),
        "chunked": lambda operands: cudnn.in_blocks(rule, operands),
    }
    taken = {}
    for name, way in ways.items():
        step = jax.jit(jax.grad(lambda o, way=way: jnp.sum(way(o).astype(jnp.float32)), allow_int=True))
        jax.block_until_ready(step(operands))
        begin = time.perf_counter()
        jax.block_until_ready([step(operands) for _ in range(10)])
        taken[name] = (time.perf_counter() - begin) * 100
    print({name: round(ms, 2) for name, ms in taken.items()})
    assert taken["fused"] < taken["dense"] and taken["chosen"] < taken["dense"]
