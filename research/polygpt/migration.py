"""Migration of data from older versions: moved, renamed and added names in one table.

Configurations carry a schema number (`SCHEMA`; those without one have number 1). `migrate` brings them up to date
before they are read. When you move a specification, or rename or add a field, add an entry here and raise `SCHEMA`.
The keys of ablation results are computed with the former names of fields, so that results outlive a rename.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from polygpt.errors import UserError

SCHEMA = 5
"""The schema that this version writes."""

MOVED = {
    "polygpt.training.checkpoint:CheckpointSpec": "polygpt.runtime.checkpoint:CheckpointSpec",
    "polygpt.training.processes:ProcessesSpec": "polygpt.runtime.processes:ProcessesSpec",
    "polygpt.training.watchdog:WatchdogSpec": "polygpt.runtime.watchdog:WatchdogSpec",
}
"""Names of classes in schema 1, and their current names."""

STACK = {"block": {"class": "polygpt.blocks.block:Sequential"}, "drop_path": 0.0}
"""Fields of stacks that schema 4 lacks."""

ADDED: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "polygpt.data.sources.folder:MediaFolder": {
            "text_placeholders": True,  # a tag in an answer was a placeholder
            "follow_links": False,
            "ignore": [],
        },
    },
    2: {
        "polygpt.optim.optim:Optim": {"schedule_steps": None, "rewarm": None},
        "polygpt.runtime.checkpoint:CheckpointSpec": {"every_minutes": None},
    },
    3: {
        "polygpt.training.experiment:Experiment": {"init": {"class": "polygpt.init.base:Random"}},
        "polygpt.models.multimodal:ModelSpec": {"logits_block": None, "low_rank": None},
    },
    4: {
        "polygpt.training.experiment:Experiment": {"references": {}},
        "polygpt.models.multimodal:ModelSpec": {"initial": [], "drop_connect": None, "heads": {}, "prefix": None},
        "polygpt.blocks.stack:StackSpec": STACK,
        "polygpt.models.decoder:DecoderSpec": {**STACK, "mask": "spans", "embedding_noise": 0.0},
        "polygpt.data.layout:LayoutSpec": {"labels": {}, "pairs": False},
        "polygpt.evaluation.spec:EvalTask": {"heads": []},
        "polygpt.data.sources.folder:MediaFolder": {"labels": {}},
        "polygpt.data.sources.embedded:Embedded": {"labels": False},
        "polygpt.data.sources.tfds:TfdsSource": {"labels": []},
        "polygpt.data.loader:Task": {"transform": [], "paired": True},
        "polygpt.data.loader:DataSpec": {"scores": {}},
        "polygpt.training.experiment:TrainSpec": {"phases": [], "plateau": None},
        "polygpt.optim.groups:Group": {"layers": None, "layer_decay": None},
        "polygpt.init.from_run:FromRun": {"adapter": None},
        "polygpt.sharding:MeshSpec": {"order": "contiguous", "reduce_dtype": "compute"},
    },
}
"""By schema and current class name: fields that the schema lacks, with the value that keeps the old behaviour."""

RENAMED: dict[str, dict[str, str]] = {
    "polygpt.ablation.tune:Search": {"knobs": "dimensions"},
    "polygpt.data.layout:LayoutSpec": {"length": "seq_len"},
    "polygpt.data.loader:DataSpec": {"rows": "batch_size"},
    "polygpt.evaluation.spec:EvalTask": {"length": "seq_len"},
    "polygpt.evaluation.spec:EvaluationSpec": {"rows": "batch_size"},
    **{
        f"polygpt.optim.schedules:{name}": {"peak": "peak_lr"}
        for name in ("Constant", "Decaying", "WarmupCosine", "WarmupLinear", "WarmupExponential", "WSD", "SGDR")
    },
    "polygpt.optim.schedules:Schedule": {"peak": "peak_lr"},
}
"""By current class name: field names in schema 2, and their current names. Subclasses inherit them."""

BATCHES = {"feeder": "data_shard", "feeders": "data_shards", "division": "resharding"}
"""Keys of the training data's state in a checkpoint: in schema 2, and now."""


NO_DECAY = (
    r"(^|/)(\w+_)?(bias|scale|table|alpha|sink|A_log|D|u|v|vectors|before|after)$|norm/\w+$|(^|/)(embed|position)\w*(/\w+)?$"
    r"|^modality/"
)
"""The default of `optim.no_decay` in schema 2. For the modules of this package, metadata
of parameters now say the same, and the default is null."""


def new_names(class_names: Iterable[str]) -> dict[str, str]:
    """Former and current field names of a class, given the names of the class and its bases."""
    return {old: new for name in class_names for old, new in RENAMED.get(name, {}).items()}


def batches_state(data: Any) -> Any:
    """The training data's state in a checkpoint, with current keys."""
    if isinstance(data, Mapping):
        return {BATCHES.get(name, name): batches_state(item) for name, item in data.items()}
    return [batches_state(item) for item in data] if isinstance(data, (list, tuple)) else data


def schema_of(data: Any, where: str) -> int:
    """The schema number of JSON data read from `where`. Raises UserError if a newer version of polygpt wrote it."""
    schema = data.get("schema", 1) if isinstance(data, Mapping) else 1
    if not isinstance(schema, int) or schema > SCHEMA:
        raise UserError(f"{where} has schema {schema!r} and this version reads up to {SCHEMA}: update polygpt")
    return schema


def migrate(data: Any, where: str) -> Any:
    """The JSON data of a configuration, migrated to this version, without its schema number.

    Raises:
        UserError: if a newer version wrote it.
    """
    schema = schema_of(data, where)
    if isinstance(data, Mapping):
        data = {name: item for name, item in data.items() if name != "schema"}
    return data if schema == SCHEMA else _current(data, schema, _is_shipped(data))


def _is_shipped(data: Any) -> bool:
    """Whether all classes are of this package. Parameters of others may have names that NO_DECAY matches."""
    if isinstance(data, Mapping):
        own = str(data.get("class", "polygpt.")).startswith("polygpt.")
        return own and all(map(_is_shipped, data.values()))
    return not isinstance(data, list) or all(map(_is_shipped, data))


def _current(data: Any, schema: int, shipped: bool) -> Any:
    if isinstance(data, list):
        return [_current(item, schema, shipped) for item in data]
    if not isinstance(data, Mapping):
        return data
    changed = {name: _current(item, schema, shipped) for name, item in data.items()}
    if not isinstance(name := data.get("class"), str):
        return changed
    if schema < 2:
        name = changed["class"] = MOVED.get(name, name)
    for former, added in ADDED.items():
        if schema <= former:
            changed = {**added.get(name, {}), **changed}
    names = RENAMED.get(name, {})
    changed = {names.get(field, field): item for field, item in changed.items()}
    if shipped and changed.get("no_decay") == NO_DECAY:
        changed["no_decay"] = None
    if name == "polygpt.sharding:MeshSpec":  # an axis of its rules was renamed
        changed["rules"] = {"batch" if axis == "rows" else axis: item for axis, item in changed["rules"].items()}
    return changed
