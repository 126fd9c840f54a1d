"""One of two processes that share checkpoints: a file that the second one verifies is damaged. Argument: the folder."""

import json
import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 2)

import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from polygpt.runtime import manifest  # noqa: E402
from polygpt.runtime.checkpoint import Checkpoints, CheckpointSpec  # noqa: E402
from polygpt.runtime.processes import ProcessesSpec, broadcast, together  # noqa: E402
from polygpt.training.state import State  # noqa: E402


def state(step):
    """`step` and, split over the devices of both processes, 8 x 4 numbers from 100 * step on."""
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())

    def make(numbers, place):
        return jax.make_array_from_callback(numbers.shape, place, lambda index: numbers[index])

    zero = make(np.int32(0), whole)
    params = {"w": make(np.arange(32, dtype=np.float32).reshape(8, 4) + 100 * step, split)}
    return State(make(np.int32(step), whole), params, (), None, zero, zero)


def harm(place):
    """Changes a file of the second process's share."""
    name = sorted(manifest.read(place).files)[1::2][-1]
    content = bytearray((place / name).read_bytes())
    content[0] ^= 1
    (place / name).write_bytes(content)
    return name


def main(folder):
    checkpoints = Checkpoints(folder, CheckpointSpec(keep=3), "lower")
    for step in (1, 2):
        checkpoints.save(state(step), metric=None, finite=True, data={"of": step})
    checkpoints.wait()
    checkpoints.close()
    # The first process seals after Orbax's last barrier: the second may be here before.
    named = broadcast("harm", harm(folder / "2") if jax.process_index() == 0 else "")
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
    again = Checkpoints(folder, CheckpointSpec(keep=3), "lower")
    found, data = again.restore(target)
    expected = state(int(found.step))
    equal = [
        np.array_equal(ours.data, theirs.data)
        for ours, theirs in zip(
            found.params["w"].addressable_shards, expected.params["w"].addressable_shards, strict=True
        )
    ]
    again.save(state(2), metric=0.5, finite=True, data={"of": 2})
    again.wait()
    again.close()
    broadcast("end", "")
    print(json.dumps({"from": data["of"], "equal": all(equal), "harmed": named, "steps": again.finite_steps()}))


if __name__ == "__main__":
    with together(ProcessesSpec(initialization_timeout=120, barrier_timeout=60)):
        main(Path(sys.argv[1]).absolute())
