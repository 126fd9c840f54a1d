"""What arithmetic foresees of exchanges: a block's as often as it is computed, the rest of the model's once a pass."""

import importlib.util
from collections import Counter

import pytest
import tiny

from polygpt.scale.plan.facts import DECODER, facts, mesh_facts
from polygpt.scale.plan.predicted_collectives import block_work, predicted_collectives
from polygpt.scale.plan.target import target
from polygpt.sharding import MeshSpec

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
POSITIONS, BYTES = 4096.0, 2


@pytest.fixture(scope="module")
def known():
    base = tiny.experiment()
    deep = base.replace(model=base.model.replace(decoder=base.model.decoder.replace(depth=8)))
    return deep, facts(deep, target("v5e:2x4"))


def foreseen(known, **mesh):
    """The facts of the mesh, the work of a device's blocks, and bytes of collectives by (kind, axes)."""
    experiment, found = known
    here = mesh_facts(MeshSpec(data=1, **mesh), found)
    work = block_work(POSITIONS, 8, here.layout, here.schedule)
    sums = Counter()
    for one in predicted_collectives(experiment, found, here, POSITIONS, work, BYTES):
        sums[one.kind, one.axes] += one.payload * one.times
    return here, work, sums


def test_without_stages_all_parameters_are_gathered_twice_and_scattered_once(known):
    here, work, sums = foreseen(known, fsdp=8)
    assert (work.blocks, work.executions, work.positions) == (8, 8, POSITIONS)
    assert sums["all-gather", ("fsdp",)] == pytest.approx(2 * here.gathered * BYTES)
    assert sums["reduce-scatter", ("fsdp",)] == pytest.approx(here.gathered * BYTES)
    assert set(sums) == {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))}


@pytest.mark.parametrize("microbatches, repeats", [(4, 1), (8, 1), (8, 2)])
def test_with_stages_a_block_is_gathered_for_every_microbatch_and_the_rest_is_not(known, microbatches, repeats):
    here, work, sums = foreseen(known, fsdp=2, stage=4, microbatches=microbatches, repeats=repeats)
    iterations = microbatches * repeats + 3
    assert (work.blocks, work.executions) == (2, iterations * 2 / repeats)
    assert work.positions == 4 * POSITIONS / microbatches  # devices of all stages share a microbatch
    block = here.blocks[DECODER].matrices
    rest = here.gathered - 2 * block
    assert 0 < rest < here.gathered
    assert sums["all-gather", ("fsdp",)] == pytest.approx(2 * BYTES * (work.executions * block + rest))
    message = work.positions * 256 * BYTES
    assert sums["collective-permute", ("stage",)] == pytest.approx(3 * iterations * message)
    assert (("all-to-all", ("stage",)) in sums) == (repeats > 1)
