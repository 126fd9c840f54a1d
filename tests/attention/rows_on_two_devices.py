"""Attends with the rows of a batch on two CPU devices, and prints the terms a head that each problem had.

Run as a process of its own: the number of devices is set once a process.
"""

import functools
import json

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")

from problems import assert_agrees, problem  # noqa: E402

from polygpt import sharding  # noqa: E402
from polygpt.attention.kernels import dispatch  # noqa: E402

LAYOUT = sharding.make_layout(sharding.MeshSpec(), jax.devices())


@functools.cache
def split(backend: str):
    """`attend` with its rows over both devices."""

    def attend(rule, operands):
        with sharding.use_layout(LAYOUT):
            return dispatch.attend(rule, operands, backend, strict=True)

    return attend


def compared(name: str) -> list[str]:
    """Raises where the results of two devices are others; the names of terms a head, whose gradients are compared."""
    rule, operands = problem(name)
    for backend in ("reference", "chunked") if name == "table" else ("reference",):
        assert_agrees(split(backend), rule, operands)
    y_BHTe, _ = jax.jit(split("reference"), static_argnums=0)(rule, operands)
    assert [shard.data.shape[0] for shard in y_BHTe.addressable_shards] == [1, 1], "a row on each device"
    return sorted(operands.terms.head)


if __name__ == "__main__":
    assert len(jax.devices()) == 2
    print(json.dumps({name: compared(name) for name in ("packed", "table", "slopes", "gates")}))
