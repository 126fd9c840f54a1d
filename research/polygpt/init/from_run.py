"""Parameters of another run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from polygpt.errors import UserError
from polygpt.init.base import Source, Weights
from polygpt.migration import migrate
from polygpt.runtime import manifest
from polygpt.runtime.checkpoint import best
from polygpt.runtime.manifest import Damaged, Record


@dataclasses.dataclass(frozen=True)
class FromRun(Weights):
    """The parameters of a run folder, or their moving average if the run kept one."""

    path: str = dataclasses.field(kw_only=True)
    """The run folder."""
    checkpoint: int | Literal["best", "latest"] | None = None
    """Step of the checkpoint, the best one by the run's metric, or the latest; null for the run's train.use."""

    def open(self) -> Source:
        config = self._config()
        record = self._chosen(config)
        place = Path(self.path).absolute() / "checkpoints" / str(record.step)
        item = "params" if config.get("optim", {}).get("ema") is None else "ema"
        try:
            manifest.verify(place, (item,))
        except Damaged as damage:
            raise UserError(f"init.path: {place} is damaged: {damage}: set init.checkpoint to another step") from None
        from polygpt.runtime import stored  # local import: Orbax takes a second to import

        return _Checkpoint(
            f"{self.path}, step {record.step}", stored.shapes(place, item), config["tokenizer"], place, item
        )

    def _config(self) -> Mapping[str, Any]:
        """The configuration of the run, as JSON: its classes need not be importable."""
        path = Path(self.path) / "config.json"
        try:
            config = migrate(json.loads(path.read_text(encoding="utf-8")), str(path))
            if {"tokenizer", "train", "optim"} <= config.keys():
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
        use = self.checkpoint or config["train"].get("use", "best")
        if isinstance(use, int):
            steps = {record.step: record for record in found}
            if use not in steps:
                there = ", ".join(map(str, steps))
                raise UserError(f"init.checkpoint is {use}, but {self.path} has the checkpoints {there}")
            return steps[use]
        return (best(found, config["train"].get("better", "lower")) if use == "best" else None) or found[-1]


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """A `Source`: an item of a checkpoint."""

    origin: str
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    tokenizer: Any
    place: Path
    item: str

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]:
        from polygpt.runtime import stored

        return stored.read_some(self.place, self.item, wanted)
