"""Configurations of an experiment that compute the same result: mesh, remat, microbatches and layout."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from polygpt.blocks.pipeline import Schedule
from polygpt.errors import SpecError
from polygpt.scale.plan.target import Target
from polygpt.sharding import AXES, MeshSpec, row_multiple
from polygpt.training.experiment import Experiment

REMAT = ("none", "dots", "full")
"""Remat policies, from the fastest to the most memory-saving."""
TENSOR = 16
"""Maximum degree of tensor parallelism. Beyond it, communication dominates."""
STAGES = 16
"""Maximum number of pipeline stages. More stages mean a larger bubble."""
MICROBATCHES = (1, 2, 4, 8)
"""Pipeline microbatches per stage. More of them shrink the bubble, but each microbatch is smaller."""
REPEATS = (1, 2)
"""How often a microbatch passes through all stages (circular pipeline)."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One configuration.

    Attributes:
        mesh: the mesh; its rules contain the layout.
        schedule: pipeline schedule; None for a single stage.
        remat: remat policy of the decoder.
        towers: remat policy of media towers; None if there are no towers.
        microbatches: number of microbatches for gradient accumulation.
        batch_size: global batch size.
    """

    mesh: MeshSpec
    schedule: Schedule | None
    remat: str
    towers: str | None
    microbatches: int
    batch_size: int

    def apply(self, experiment: Experiment) -> Experiment:
        """The experiment with this configuration."""
        model = experiment.model
        adapters = dict(model.adapters)
        for name, adapter in adapters.items():
            if hasattr(adapter, "tower"):
                adapters[name] = adapter.replace(tower=adapter.tower.replace(remat=self.towers))
        return experiment.replace(
            model=model.replace(decoder=model.decoder.replace(remat=self.remat), adapters=adapters),
            train=experiment.train.replace(parallel="sharded", mesh=self.piped),
            optim=experiment.optim.replace(accumulate=self.microbatches),
            data=experiment.data.replace(batch_size=self.batch_size),
        )

    @property
    def piped(self) -> MeshSpec:
        """The mesh spec including the pipeline schedule."""
        if self.schedule is None:
            return self.mesh
        return self.mesh.replace(microbatches=self.schedule.microbatches, repeats=self.schedule.repeats)

    def overrides(self, experiment: Experiment) -> dict[str, str]:
        """Command-line overrides that give the experiment this configuration, without values that are already set."""
        mesh, before = self.piped, experiment.train.mesh
        found = {}
        if experiment.train.parallel != "sharded":
            found["train.parallel"] = "sharded"
        for field in (*AXES, "context"):
            if getattr(mesh, field) != getattr(before, field):
                found[f"train.mesh.{field}"] = str(getattr(mesh, field))
        if self.schedule:
            if mesh.microbatches != (before.microbatches or before.stage):
                found["train.mesh.microbatches"] = str(mesh.microbatches)
            if mesh.repeats != before.repeats:
                found["train.mesh.repeats"] = str(mesh.repeats)
        if mesh.rules["features"] != before.rules["features"]:
            listed = ", ".join(f'"{axis}"' for axis in mesh.rules["features"])
            found["train.mesh.rules.features"] = f"[{listed}]"
        if self.remat != experiment.model.decoder.remat:
            found["model.decoder.remat"] = self.remat
        for name, adapter in experiment.model.adapters.items():
            if hasattr(adapter, "tower") and adapter.tower.remat != self.towers:
                found[f"model.adapters.{name}.tower.remat"] = self.towers
        if self.microbatches != experiment.optim.accumulate:
            found["optim.accumulate"] = str(self.microbatches)
        if self.batch_size != experiment.data.batch_size:
            found["data.batch_size"] = str(self.batch_size)
        return found

    def summary(self) -> str:
        """A short description: "fsdp 64, tensor 4 | remat full | towers full | accumulate 4 | 256 rows"."""
        words = [", ".join(f"{a} {n}" for a in AXES if (n := getattr(self.mesh, a)) != 1) or "one device"]
        if self.schedule:
            rounds = f", {self.schedule.repeats} rounds" if self.schedule.repeats > 1 else ""
            words[0] += f" (pipeline of {self.schedule.microbatches} microbatches{rounds})"
        if self.mesh.sequence > 1:
            words[0] += f" ({self.mesh.context})"
        if self.mesh.rules["features"]:
            words[0] += ", features over " + "+".join(self.mesh.rules["features"])
        words.append(f"remat {self.remat}")
        words += [f"towers {self.towers}"] if self.towers else []
        words += [f"accumulate {self.microbatches}"] if self.microbatches > 1 else []
        return " | ".join([*words, f"{self.batch_size} rows"])


def current(experiment: Experiment, devices: int, mesh: Mapping[str, int] | None = None) -> Candidate:
    """The configuration of the experiment itself.

    Args:
        experiment: the experiment.
        devices: number of devices.
        mesh: resolved axis sizes; None for those of `train.mesh` if the experiment is sharded, else {"data": devices}.
    """
    towers = [adapter.tower.remat for adapter in experiment.model.adapters.values() if hasattr(adapter, "tower")]
    spec, remat = experiment.train.mesh, experiment.model.decoder.remat
    if mesh is None:
        mesh = spec.sizes(devices) if experiment.train.parallel == "sharded" else {"data": devices}
    spec = spec.replace(**dict.fromkeys(AXES, 1) | mesh)
    least = next((remat for remat in REMAT if remat in towers), None)
    schedule = Schedule(spec.stage, spec.repeats, spec.microbatches or spec.stage) if spec.stage > 1 else None
    return Candidate(spec, schedule, remat, least, experiment.optim.accumulate, experiment.data.batch_size)


def candidates(experiment: Experiment, target: Target) -> Iterator[Candidate]:
    """All valid combinations of mesh, layout, pipeline schedule, remat and microbatches, at the same batch size."""
    now, rows, seq_len = current(experiment, target.count), experiment.data.batch_size, experiment.data.layout.seq_len
    decoder = experiment.model.decoder
    heads, kv_heads = (getattr(decoder.attention, name, None) for name in ("heads", "kv_heads"))
    heads = math.gcd(heads or 1, kv_heads or heads or 1)
    experts = math.gcd(*(layer.mlp.experts for layer in decoder.period() if hasattr(layer.mlp, "experts"))) or 1
    kinds = list(itertools.product(REMAT, ("none", "full") if now.towers else (None,)))  # towers are small: skip "dots"
    for mesh in _meshes(now.mesh, target.count, _stages(experiment, target.count), heads, seq_len, experts):
        for schedule in _schedules(experiment, now, mesh.stage):
            each, left = divmod(rows, _row_multiple(mesh, schedule))
            if left:
                continue
            for parts in _divisors(each):
                if parts & (parts - 1):
                    continue  # powers of two only
                for remat, towers in kinds:
                    yield Candidate(mesh, schedule, remat, towers, parts, rows)


def _stages(experiment: Experiment, devices: int) -> list[int]:
    """Numbers of pipeline stages that the depths of the stacks and the experiment's sharding rules allow."""
    stacks, rules = experiment.model.stacks().values(), experiment.train.mesh.rules
    if not all(stack.scan for stack in stacks) or rules["stages"] != ("stage",) or "stage" not in rules["layers"]:
        return [max(experiment.train.mesh.stage, 1)]
    each = math.gcd(*(stack.depth // len(stack.period()) for stack in stacks))  # patterns of blocks
    return [stage for stage in _divisors(devices) if stage <= STAGES and each and each % stage == 0]


def _schedules(experiment: Experiment, now: Candidate, stages: int) -> Iterator[Schedule | None]:
    if stages == 1:
        yield None
        return
    patterns = [stack.depth // len(stack.period()) for stack in experiment.model.stacks().values()]
    own = [now.schedule] if now.schedule and now.schedule.stages == stages else []
    usual = [Schedule(stages, repeats, stages * cut) for repeats in REPEATS for cut in MICROBATCHES]
    for schedule in dict.fromkeys([*own, *usual]):
        if all(depth % (stages * schedule.repeats) == 0 for depth in patterns):
            yield schedule


def _row_multiple(mesh: MeshSpec, schedule: Schedule | None) -> int:
    """The number that the rows per step must be a multiple of."""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    return row_multiple(mesh.rules, sizes, schedule.microbatches if schedule else 1)


def _meshes(
    now: MeshSpec, devices: int, stages: Sequence[int], heads: int, seq_len: int, experts: int
) -> Iterator[MeshSpec]:
    for stage, tensor in itertools.product(stages, _divisors(devices)):
        if tensor > TENSOR or heads % tensor or devices % (stage * tensor):
            continue
        within = devices // stage // tensor
        for sequence in _divisors(within):
            if seq_len % sequence or (sequence > 1 and seq_len // sequence < 512):
                continue
            for expert in _divisors(within // sequence):
                if experts % expert:
                    continue
                for fsdp in _divisors(within // sequence // expert):
                    data = within // sequence // expert // fsdp
                    sizes = dict(zip(AXES, (stage, data, fsdp, expert, sequence, tensor), strict=True))
                    contexts = ("gather", "ring") if sequence > 1 else (now.context,)
                    layouts = ((), ("tensor",)) if tensor > 1 else ((),)
                    for context, features in itertools.product(contexts, layouts):
                        try:
                            rules = dict(now.rules) | {"features": features}
                            yield now.replace(**sizes, context=context, rules=rules)
                        except SpecError:
                            continue  # the experiment's own rules use that axis for something else


def smaller(now: Candidate) -> dict[tuple[str, ...], list[Candidate]]:
    """Configurations that need less memory, grouped by the settings that they change, smallest change first.

    The settings are mesh (a larger or smaller fsdp axis, or a larger tensor axis), remat and microbatches, alone and
    combined, and a smaller batch size alone.
    """
    mesh = now.mesh
    remats = [dataclasses.replace(now, remat=remat) for remat in REMAT[REMAT.index(now.remat) :]]
    if now.towers is not None:
        remats += [
            dataclasses.replace(candidate, towers=REMAT[-1]) for candidate in remats if candidate.towers != REMAT[-1]
        ]
    meshes = [mesh]
    for by in (2, 4, 8):
        for taken, given in (("data", "fsdp"), ("fsdp", "data"), ("fsdp", "tensor"), ("data", "tensor")):
            if getattr(mesh, taken) % by == 0 and (given != "tensor" or mesh.tensor * by <= TENSOR):
                sizes = {taken: getattr(mesh, taken) // by, given: getattr(mesh, given) * by}
                meshes.append(mesh.replace(**sizes))
    each = now.batch_size // (_row_multiple(mesh, now.schedule) * now.microbatches)
    halves = [by for by in (2, 4, 8, 16, 32, 64) if each % by == 0]
    found: dict[tuple[str, ...], list[Candidate]] = {}
    for chosen, remat, by in itertools.product(meshes, remats, [1, *halves]):
        candidate = dataclasses.replace(remat, mesh=chosen, microbatches=now.microbatches * by)
        same = {
            "mesh": chosen == mesh,
            "remat": (candidate.remat, candidate.towers) == (now.remat, now.towers),
            "microbatches": by == 1,
        }
        if kinds := tuple(kind for kind, unchanged in same.items() if not unchanged):
            found.setdefault(kinds, []).append(candidate)
    found["batch_size",] = [dataclasses.replace(now, batch_size=now.batch_size // by) for by in halves]
    return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
