"""Ways to run an experiment that give the same result: meshes, remat, microbatches, layouts."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from polygpt.errors import SpecError
from polygpt.scale.plan.target import Target
from polygpt.sharding import MeshSpec
from polygpt.training.experiment import Experiment

REMAT = ("none", "dots", "full")
"""From the fastest to the smallest."""
TENSOR = 16
"""Devices over which heads and hidden widths are split at most: more of them mostly wait for each other."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run.

    Attributes:
        mesh: the mesh, with the layout in its rules.
        remat: of the decoder.
        towers: of media towers; None where there are none.
        microbatches: parts of a batch that are taken one at a time.
        rows: of the global batch.
    """

    mesh: MeshSpec
    remat: str
    towers: str | None
    microbatches: int
    rows: int

    def apply(self, experiment: Experiment) -> Experiment:
        """The experiment, run so."""
        model = experiment.model
        adapters = dict(model.adapters)
        for name, adapter in adapters.items():
            if hasattr(adapter, "tower"):
                adapters[name] = adapter.replace(tower=adapter.tower.replace(remat=self.towers))
        return experiment.replace(
            model=model.replace(decoder=model.decoder.replace(remat=self.remat), adapters=adapters),
            train=experiment.train.replace(parallel="sharded", mesh=self.mesh),
            optim=experiment.optim.replace(accumulate=self.microbatches),
            data=experiment.data.replace(rows=self.rows),
        )

    def overrides(self, experiment: Experiment) -> dict[str, str]:
        """The command-line words that make the experiment run so: only what differs."""
        mesh, before = self.mesh, experiment.train.mesh
        found = {}
        if experiment.train.parallel != "sharded":
            found["train.parallel"] = "sharded"
        for axis in ("stage", "data", "fsdp", "expert", "sequence", "tensor", "context"):
            if getattr(mesh, axis) != getattr(before, axis):
                found[f"train.mesh.{axis}"] = str(getattr(mesh, axis))
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
        if self.rows != experiment.data.rows:
            found["data.rows"] = str(self.rows)
        return found

    def about(self) -> str:
        """In a few words: "fsdp 64, tensor 4 | remat full | towers full | 4 microbatches"."""
        axes = ("stage", "data", "fsdp", "expert", "sequence", "tensor")
        words = [", ".join(f"{a} {n}" for a in axes if (n := getattr(self.mesh, a)) != 1) or "one device"]
        if self.mesh.sequence > 1:
            words[0] += f" ({self.mesh.context})"
        if self.mesh.rules["features"]:
            words[0] += ", features over " + "+".join(self.mesh.rules["features"])
        words.append(f"remat {self.remat}")
        words += [f"towers {self.towers}"] if self.towers else []
        words += [f"{self.microbatches} microbatches"] if self.microbatches > 1 else []
        return " | ".join([*words, f"{self.rows} rows"])


def current(experiment: Experiment, devices: int) -> Candidate:
    """How the experiment runs as it stands."""
    towers = [adapter.tower.remat for adapter in experiment.model.adapters.values() if hasattr(adapter, "tower")]
    spec, remat = experiment.train.mesh, experiment.model.decoder.remat
    if experiment.train.parallel == "sharded":
        spec = spec.replace(**spec.sizes(devices))
    least = next((remat for remat in REMAT if remat in towers), None)
    return Candidate(spec, remat, least, experiment.optim.accumulate, experiment.data.rows)


def candidates(experiment: Experiment, target: Target) -> Iterator[Candidate]:
    """All that can be: factorisations of the devices, times remat, microbatches and layouts; rows stay as they are."""
    now, rows, length = current(experiment, target.count), experiment.data.rows, experiment.data.layout.length
    decoder = experiment.model.decoder
    heads, kv_heads = (getattr(decoder.attention, name, None) for name in ("heads", "kv_heads"))
    heads = math.gcd(heads or 1, kv_heads or heads or 1)
    experts = getattr(decoder.mlp, "experts", 1)
    for mesh in _meshes(now.mesh, target.count, heads, length, experts):
        across = mesh.data * mesh.fsdp * mesh.expert
        if rows % across:
            continue
        for parts in _divisors(rows // across):
            if parts & (parts - 1):
                continue  # powers of two alone
            for remat, towers in itertools.product(REMAT, REMAT if now.towers else (None,)):
                if towers == "dots":
                    continue  # towers are small beside a decoder: all or nothing
                yield Candidate(mesh, remat, towers, parts, rows)


def _meshes(now: MeshSpec, devices: int, heads: int, length: int, experts: int) -> Iterator[MeshSpec]:
    if now.stage > 1:
        devices //= now.stage  # a pipeline stays as it is
    for tensor in _divisors(devices):
        if tensor > TENSOR or heads % tensor:
            continue
        for sequence in _divisors(devices // tensor):
            if length % sequence or (sequence > 1 and length // sequence < 512):
                continue
            for expert in _divisors(devices // tensor // sequence):
                if experts % expert:
                    continue
                for fsdp in _divisors(devices // tensor // sequence // expert):
                    data = devices // tensor // sequence // expert // fsdp
                    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "sequence": sequence, "tensor": tensor}
                    contexts = ("gather", "ring") if sequence > 1 else (now.context,)
                    layouts = ((), ("tensor",)) if tensor > 1 else ((),)
                    for context, features in itertools.product(contexts, layouts):
                        try:
                            rules = dict(now.rules) | {"features": features}
                            yield now.replace(**sizes, context=context, rules=rules)
                        except SpecError:
                            continue  # the experiment's own table uses that axis otherwise


def smaller(now: Candidate) -> dict[tuple[str, ...], list[Candidate]]:
    """Ways to run that take less memory, by the kinds of change that they are made of, the nearest first.

    The kinds are the mesh (more of it over fsdp or tensor, or less where that divides better), remat and microbatches,
    alone and together, and, alone, fewer rows.
    """
    mesh = now.mesh
    remats = [dataclasses.replace(now, remat=remat) for remat in REMAT[REMAT.index(now.remat) :]]
    if now.towers is not None:
        remats += [dataclasses.replace(way, towers=REMAT[-1]) for way in remats if way.towers != REMAT[-1]]
    meshes = [mesh]
    for by in (2, 4, 8):
        for taken, given in (("data", "fsdp"), ("fsdp", "data"), ("fsdp", "tensor"), ("data", "tensor")):
            if getattr(mesh, taken) % by == 0 and (given != "tensor" or mesh.tensor * by <= TENSOR):
                sizes = {taken: getattr(mesh, taken) // by, given: getattr(mesh, given) * by}
                meshes.append(mesh.replace(**sizes))
    each = now.rows // (mesh.data * mesh.fsdp * mesh.expert * now.microbatches)
    halves = [by for by in (2, 4, 8, 16, 32, 64) if each % by == 0]
    found: dict[tuple[str, ...], list[Candidate]] = {}
    for chosen, remat, by in itertools.product(meshes, remats, [1, *halves]):
        way = dataclasses.replace(remat, mesh=chosen, microbatches=now.microbatches * by)
        same = {
            "mesh": chosen == mesh,
            "remat": (way.remat, way.towers) == (now.remat, now.towers),
            "microbatches": by == 1,
        }
        if kinds := tuple(kind for kind, unchanged in same.items() if not unchanged):
            found.setdefault(kinds, []).append(way)
    found["rows",] = [dataclasses.replace(now, rows=now.rows // by) for by in halves]
    return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
