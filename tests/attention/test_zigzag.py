"""Zigzag order: what lies where, that it gives all devices the same work, and which decoders use it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import rows_of

from polygpt.attention import zigzag
from polygpt.attention.biases import ALiBi
from polygpt.attention.forgetting import Forgetting
from polygpt.attention.kernels import chunked, flex
from polygpt.attention.kernels.block_map import EMPTY, block_map
from polygpt.attention.kernels.dispatch import compiling_for
from polygpt.attention.kernels.problem import Rule
from polygpt.attention.mamba2 import Mamba2
from polygpt.attention.masks import DECODER
from polygpt.attention.multi_head import MultiHead, MultiHeadModule
from polygpt.attention.scores import ForgetGate, KeyGate
from polygpt.attention.sliding import SlidingWindow
from polygpt.errors import SpecError
from polygpt.lab import catalogue
from polygpt.models.decoder import DecoderSpec
from polygpt.nn.experts import MixtureOfExperts
from polygpt.sharding import MeshSpec

N, T = 4, 64


def positions() -> np.ndarray:
    """The positions of each of N devices, [N, T / N], by the definition: chunks i and 2 n - 1 - i."""
    chunks = np.arange(T).reshape(2 * N, -1)
    return np.stack([np.concatenate([chunks[i], chunks[2 * N - 1 - i]]) for i in range(N)])


def test_device_i_holds_chunks_i_and_2n_minus_1_minus_i():
    got_BT2 = zigzag.reordered(jnp.stack([jnp.arange(T), -jnp.arange(T)], axis=-1)[None], N)
    np.testing.assert_array_equal(got_BT2[0, :, 0], positions().ravel())
    np.testing.assert_array_equal(got_BT2[0, :, 1], -positions().ravel())


def test_every_device_visits_as_many_blocks_in_every_step_of_a_ring():
    """And in the order of the row the last visits seven times as many as the first."""
    run = T // (2 * N)
    meta = rows_of([[T]], T)

    def visits(held):
        parts = [jax.tree.map(lambda x, own=own: jnp.asarray(x[:, own]), meta) for own in held]
        return [
            [int((block_map(DECODER, query, parts[(i - step) % N], run, run) != EMPTY).sum()) for step in range(N)]
            for i, query in enumerate(parts)
        ]

    assert visits(positions()) == [[3, 2, 2, 2]] * N
    assert [sum(steps) for steps in visits(np.arange(T).reshape(N, -1))] == [3, 7, 11, 15]


@pytest.mark.parametrize("in_zigzag", [False, True])
@pytest.mark.parametrize("window", [T, 24])
def test_the_share_of_the_busiest_device_is_that_of_its_pairs(in_zigzag, window):
    place = np.arange(T)
    pairs_TS = (place[None] <= place[:, None]) & (place[:, None] - place[None] < window)
    held = positions() if in_zigzag else place.reshape(N, -1)
    work_N = [pairs_TS[own].sum() for own in held]
    got = zigzag.largest_share(lambda length: pairs_TS[:length].sum(), T, N, in_zigzag)
    assert got == pytest.approx(max(work_N) / np.mean(work_N), rel=1e-12)
    assert zigzag.largest_share(lambda length: 0.0, T, N, in_zigzag) == 1.0


def test_blocks_do_not_straddle_chunks():
    rule, run = Rule(DECODER), Rule(DECODER, run=256)
    shape = jax.ShapeDtypeStruct((1, 1, 1024, 64), jnp.float32)
    operands = dataclasses.make_dataclass("Shapes", ["query_BHTd", "key_BKSd"])(shape, shape)
    assert chunked.block_sizes(rule, operands) == (512, 512) and chunked.block_sizes(run, operands) == (256, 256)
    assert flex.default_block(rule, 1024) == 512 and flex.default_block(run, 1024) == 256


class Undeclared(MultiHead):
    """A variant with a module of its own that does not say whether it reads neighbours."""

    def build(self, dims, rngs):
        return MultiHeadModule(self, dims, rngs)


def test_what_reads_neighbours_or_does_not_say_needs_the_order_of_the_row():
    needing = {cls.__name__ for cls in catalogue.variants() if zigzag.needs_order(cls(heads=4))}
    linear = {cls.__name__ for cls in catalogue.variants() if cls.family == "linear"}
    assert needing == linear | {"Forgetting"}
    assert zigzag.needs_order(Undeclared()) and zigzag.needs_order(MultiHead(scores=(KeyGate(), ForgetGate())))
    assert not zigzag.needs_order(MultiHead(scores=(KeyGate(),), position=ALiBi()))
    assert zigzag.needs_order(MixtureOfExperts(capacity=1.0)) and not zigzag.needs_order(MixtureOfExperts())


def test_zigzag_is_chosen_where_it_evens_out_work():
    automatic, asked = MeshSpec(), MeshSpec(order="zigzag")

    def chosen(mesh=automatic, devices=4, seq_len=1024, **fields):
        return DecoderSpec(**fields).zigzag(mesh, devices, seq_len)

    assert chosen() and chosen(asked, seq_len=64) and chosen(position=ALiBi())
    assert not chosen(seq_len=256) and not chosen(seq_len=1028) and not chosen(asked, seq_len=1028)
    assert not chosen(devices=1) and not chosen(MeshSpec(order="contiguous")) and not chosen(mask="bidirectional")
    sliding = SlidingWindow(window=128)
    assert not chosen(attention=sliding) and chosen(asked, attention=sliding)
    assert chosen(pattern=(sliding, None)) and not chosen(pattern=(Mamba2(), None))
    assert not chosen(attention=Forgetting())
    with compiling_for("tpu"):
        assert not chosen() and chosen(asked)
    with pytest.raises(SpecError, match="train.mesh.order is 'zigzag', but Mamba2 reads .* to 'contiguous'"):
        chosen(asked, pattern=(Mamba2(), None))
