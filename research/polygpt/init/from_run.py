"""Parameters of another run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from polygpt.errors import UserError
from polygpt.init.adapted import adapted, whole
from polygpt.init.base import Source, Weights
from polygpt.migration import migrate
from polygpt.models.adapter_file import AdapterFile, merged_from
from polygpt.models.low_rank import LowRank, matrix_of
from polygpt.models.multimodal import ModelSpec
from polygpt.overrides import replaced
from polygpt.parameters import paths, tree_of
from polygpt.runtime import manifest, processes
from polygpt.runtime.checkpoint import choose
from polygpt.runtime.manifest import Record
from polygpt.spec import from_json


@dataclasses.dataclass(frozen=True)
class FromRun(Weights):
    """The parameters of a run folder, or their moving average if the run kept one. Low-rank updates are merged."""

    path: str = dataclasses.field(kw_only=True)
    """The run folder."""
    checkpoint: int | Literal["best", "latest"] | None = None
    """Step of the checkpoint, the best one by the run's metric, or the latest; null for the run's train.use."""
    adapter: str | None = None
    """A file of `polygpt adapter save`, of an adapter that was trained on that checkpoint; null for none."""

    def open(self) -> Source:
        config = self._config()
        step = processes.broadcast("init.checkpoint", str(self._chosen(config).step))  # the source may still train
        place = Path(self.path).absolute() / "checkpoints" / step
        item = "params" if config["optim"].get("ema") is None else "ema"
        if fault := manifest.verified_by_all(place, (item,)):
            raise UserError(f"init.path: {place} is damaged: {fault}: set init.checkpoint to another step")
        from polygpt.runtime import stored  # local import: Orbax takes a second to import

        shapes = stored.shapes(place, item)
        updates = {name: shape for name, shape in shapes.items() if matrix_of(name)}
        own = {name: shape for name, shape in shapes.items() if name not in updates}
        added = from_json(config["model"]["low_rank"]) if updates else None
        base = _Checkpoint(f"{self.path}, step {step}", own, config["tokenizer"], place, item, added, updates)
        return base if self.adapter is None else adapted(base, self.adapter)

    def model(self) -> ModelSpec:
        if self.adapter is not None:
            return from_json(AdapterFile.read(Path(self.adapter)).model)
        config = self._config()
        found, step = from_json(config["model"]), self._chosen(config).step
        for phase in config["train"].get("phases", ()):  # that of the checkpoint, as training had it
            own = {name: value for name, value in phase["changes"].items() if name.startswith("model.")}
            if own and phase["start"] < step:
                found = replaced(found, {name.removeprefix("model."): from_json(value) for name, value in own.items()})
        return found

    def _config(self) -> Mapping[str, Any]:
        """The configuration of the run, as JSON: its classes need not be importable."""
        path = Path(self.path) / "config.json"
        try:
            config = migrate(json.loads(path.read_text(encoding="utf-8")), str(path))
            if {"tokenizer", "train", "optim", "model"} <= config.keys():
                return config
        except FileNotFoundError:
            raise UserError(f"init.path: {self.path} is not a run folder: it has no config.json") from None
        except (OSError, ValueError, AttributeError):
            pass
        raise UserError(f"init.path: {path} does not describe an experiment: name the folder of a training run")

    def _chosen(self, config: Mapping[str, Any]) -> Record:
        found = [record for record in manifest.records(Path(self.path) / "checkpoints") if record.finite]
        if not found:
            raise UserError(f"init.path: {self.path} has no complete checkpoint: resume it with polygpt train")
        use = config["train"].get("use", "best") if self.checkpoint is None else self.checkpoint
        if isinstance(use, int):
            steps = {record.step: record for record in found}
            if use not in steps:
                there = ", ".join(map(str, steps))
                raise UserError(f"init.checkpoint is {use}, but {self.path} has the checkpoints {there}")
            return steps[use]
        return choose(found, use, config["train"].get("better", "lower"))


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """A `Source`: an item of a checkpoint, with low-rank updates merged into their matrices.

    Attributes:
        place: folder of the checkpoint.
        item: the item.
        added: the low-rank updates of the run's model, or None.
        updates: shape and dtype of each of their parameters, by name.
        merged_from: what the matrices that have been read were merged from, see `adapter_file.merged_from`.
    """

    origin: str
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    tokenizer: Any
    place: Path
    item: str
    added: LowRank | None
    updates: Mapping[str, jax.ShapeDtypeStruct]
    merged_from: dict[str, int] = dataclasses.field(default_factory=dict)

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]:
        from polygpt.runtime import stored

        def replicated(shape, like):
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=whole(like.sharding))

        updates = {
            name: replicated(shape, wanted[matrix_of(name)])
            for name, shape in self.updates.items()
            if matrix_of(name) in wanted
        }
        found = stored.read_some(self.place, self.item, {**wanted, **updates})
        if not updates:
            return found
        self.merged_from.update(merged_from(tree_of(found), self.added, {}))
        places = tree_of({name: like.sharding for name, like in wanted.items()})
        return paths(jax.jit(self.added.merged, out_shardings=places)(tree_of(found)))
