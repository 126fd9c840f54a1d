"""Plans a step for eight CPU devices, runs it, and prints as JSON what was planned and what the system measured.

Measured without asking the compiler: the state and the batch by the buffers that the devices hold, what lives within a
step by how much the resident memory of this process grows while it runs, at the most (Linux: VmHWM).
"""

import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np

from polygpt import topology
from polygpt.attention.multi_head import MultiHead
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.embedded import Embedded
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import WarmupCosine
from polygpt.scale.plan import compilation
from polygpt.scale.plan.target import target
from polygpt.sharding import MeshSpec
from polygpt.training.experiment import Experiment, TrainSpec


def experiment(remat: str, **mesh: int) -> Experiment:
    """A text model of some millions of parameters: large enough for the noise of the system to be small."""
    return Experiment(
        name="measured",
        data=DataSpec(
            {"text": Task(Embedded("text"))}, LayoutSpec(seq_len=256), batch_size=64 if remat == "none" else 192
        ),
        optim=Optim(WarmupCosine(peak_lr=1e-3, warmup=10)),
        train=TrainSpec(steps=10, parallel="sharded", mesh=MeshSpec(**mesh)),
        model=ModelSpec(DecoderSpec(256, 4, MultiHead(heads=4), remat=remat)),
    )


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at the most since `forget_peak`."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def measure(chosen: Experiment) -> dict[str, float]:
    """Bytes of a device, planned and measured."""
    on = target("cpu:8")
    on.prepare()
    planned, traced = compilation.build(chosen, on).memory, compilation.lower(chosen, on)
    runs, shapes, step = traced.program, traced.batch, topology.compiled(traced.lowered)
    state = runs.parallel.create(runs.initial)
    batch = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), shapes)
    jax.block_until_ready((state, batch))
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves((state, batch)):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes

    state, _ = step(state, batch)  # the first call also allocates what stays: threads, their scratch space
    jax.block_until_ready(state)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = resident("VmRSS")
    state, metrics = step(state, batch)
    jax.block_until_ready(state)
    grown = (resident("VmHWM") - before) / on.count
    assert np.isfinite(float(metrics["loss"]))
    return {
        "planned state and batch": planned.parameters + planned.optimizer + planned.batch + planned.padding,
        "measured state and batch": max(held.values()),
        "planned temporaries": planned.temporaries + planned.output,
        "measured temporaries": grown,
    }


if __name__ == "__main__":
    remat, *axes = sys.argv[1:]
    sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes)}
    print(json.dumps(measure(experiment(remat, data=1, **sizes))))
