"""The formula of FLOPs beside a count by hand and beside the compiled program; planned memory beside the measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from polygpt.attention.forgetting import Forgetting
from polygpt.attention.mamba2 import Mamba2
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.cross import CrossSequential
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.embedded import Embedded
from polygpt.models.decoder import DecoderSpec
from polygpt.models.encoder_decoder import EncoderDecoder
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.experts import MixtureOfExperts
from polygpt.nn.mlp import GatedMLP
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import WarmupCosine
from polygpt.scale.plan import compilation, hlo, memory, work
from polygpt.scale.plan.flops import FORMULA, causal_share, flops
from polygpt.scale.plan.target import target
from polygpt.sharding import MeshSpec
from polygpt.training.experiment import Experiment, TrainSpec

D, L, F, V, T, B = 16, 3, 24, 258, 32, 2
TOKENS = B * T
MATRICES = L * (4 * D * D + 3 * D * F)


GATED = GatedMLP(factor=F / D)


def experiment(mlp=GATED, remat="none") -> Experiment:
    """A text model of which everything can be counted by hand."""
    return Experiment(
        name="counted",
        data=DataSpec({"text": Task(Embedded("text"))}, LayoutSpec(seq_len=T), batch_size=B),
        optim=Optim(WarmupCosine(peak_lr=1e-3, warmup=10)),
        train=TrainSpec(steps=10),
        model=ModelSpec(DecoderSpec(D, L, MultiHead(heads=2), mlp, remat=remat)),
    )


def test_the_busiest_device_has_the_last_positions_unless_their_order_is_a_zigzag():
    """Of n devices in the order of the row, the last sees 2 n - 1 of n^2 squares of pairs, of which half count."""

    def share(seq_len=1024, sequence=4, order="auto", platform="cpu", **fields):
        base = experiment()
        layout, decoder = base.data.layout.replace(seq_len=seq_len), base.model.decoder.replace(**fields)
        made = base.replace(
            data=base.data.replace(layout=layout),
            model=base.model.replace(decoder=decoder),
            train=base.train.replace(parallel="sharded", mesh=MeshSpec(sequence=sequence, order=order)),
        )
        return causal_share(made, {"data": 2, "sequence": sequence}, platform)

    for n in (2, 4, 8):
        assert share(sequence=n) == share(sequence=n, order="zigzag", platform="tpu") == pytest.approx(1.0)
        assert share(sequence=n, platform="tpu") == share(sequence=n, order="contiguous")
        assert share(sequence=n, order="contiguous") == pytest.approx((2 * n - 1) / n, rel=1e-3)
    assert share(seq_len=256, order="contiguous") == share(sequence=1) == 1.0
    assert share(attention=Mamba2(heads=2)) == pytest.approx(1.0)
    assert share(pattern=(Forgetting(heads=2),)) == pytest.approx(7 / 4, rel=1e-3)


def test_the_formula_counts_what_a_hand_counts():
    counted = flops(experiment(remat="full"), V)
    attention = L * 4 * D * sum(range(1, T + 1)) * B  # position t sees t keys, itself among them
    assert counted.forward == 2 * MATRICES * TOKENS + attention + 2 * D * V * TOKENS
    assert counted.useful == 3 * counted.forward
    assert counted.again == 2 * MATRICES * TOKENS + attention
    assert "2 D V" in FORMULA and counted.to_json()["formula"] == FORMULA


def test_of_experts_those_count_that_a_position_goes_through():
    mixture = MixtureOfExperts(experts=8, top_k=2, factor=F / D)
    counted = flops(experiment(mixture), V)
    (matrices,) = (line for line in counted.lines if line.name == "decoder, matrices")
    assert matrices.each == 2 * L * (4 * D * D + 2 * 3 * D * F + D * 8)


def test_the_compiled_program_does_what_the_formula_says():
    built = compilation.build(experiment(), target("cpu:1"))
    products = work.products(hlo.parse(built.text))
    attention = L * 4 * D * T * TOKENS  # short rows: the whole matrix of scores, its upper half too
    assert products == 3 * (2 * MATRICES * TOKENS + attention + 2 * D * V * TOKENS)


def test_an_encoder_decoder_computes_both_stacks_at_every_position():
    decoder = DecoderSpec(D, L, MultiHead(heads=2), GATED, block=CrossSequential())
    layout = LayoutSpec(seq_len=T, prompt_span="bidirectional")
    data = experiment().data.replace(layout=layout)
    chosen = experiment().replace(model=EncoderDecoder(decoder), data=data)
    matrices = 2 * MATRICES + L * 4 * D * D
    counted = flops(chosen, V)
    visible = L * 4 * D * (T * T + 2 * sum(range(1, T + 1))) * B
    assert counted.forward == 2 * matrices * TOKENS + visible + 2 * D * V * TOKENS
    products = work.products(hlo.parse(compilation.build(chosen, target("cpu:1")).text))
    assert products == 3 * (2 * matrices * TOKENS + 3 * L * 4 * D * T * TOKENS + 2 * D * V * TOKENS)


def test_the_state_is_split_by_what_it_is_for():
    built = compilation.build(experiment(), target("cpu:1"))
    count = MATRICES + D * V + (2 * L + 1) * D
    assert built.memory.parameters == 4 * count
    assert built.memory.optimizer == pytest.approx(8 * count, abs=64)  # two moments, and the numbers of steps
    assert built.memory.fits and built.memory.total > 12 * count


@pytest.mark.parametrize(
    "text, temporaries, all, available",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (87.16G) exceeds "
         "available HBM (15.75G).", 87.16, None, 15.75),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.01G of "
         "15.75G hbm. Exceeded hbm capacity by 4.26G.", None, 20.01, 15.75),
        ("RESOURCE_EXHAUSTED: something else", None, None, None),
    ],
)  # fmt: skip
def test_the_compilers_figures_are_read(text, temporaries, all, available):
    found = memory.exhausted(jax.errors.JaxRuntimeError(text))
    gib = [None if x is None else pytest.approx(x * 2**30) for x in (temporaries, all, available)]
    assert [found.temporaries, found.all, found.available] == gib


def test_another_error_is_none_of_memory():
    assert memory.exhausted(jax.errors.JaxRuntimeError("INTERNAL: oh")) is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of resident memory")
@pytest.mark.parametrize("remat, mesh", [("none", ["fsdp=8"]), ("full", ["fsdp=4", "tensor=2"])])
@pytest.mark.slow
def test_planned_memory_is_what_is_measured(remat, mesh):
    script = Path(__file__).with_name("measured_memory.py")
    # Freed blocks of more than a megabyte go back to the system at once: what is resident is what is used.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, script, remat, *mesh], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["planned state and batch"] == found["measured state and batch"]
    planned, measured = (
        sum(found[f"{what} {of}"] for of in ("state and batch", "temporaries")) for what in ("planned", "measured")
    )
    print(f"{remat}, {' '.join(mesh)}: planned {planned / 1e6:.1f} MB a device, measured {measured / 1e6:.1f} MB")
    assert planned == pytest.approx(measured, rel=0.10)
