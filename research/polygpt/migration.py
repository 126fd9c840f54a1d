"""Data of older versions: what has moved, been renamed or been added since, in one table.

Configurations carry a schema number (`SCHEMA`; those without one have number 1). `migrate` brings them up to date
before they are read. Whoever moves a specification, or renames or adds a field, adds a line here and raises `SCHEMA`.
"""

from collections.abc import Mapping
from typing import Any

from polygpt.errors import UserError

SCHEMA = 2
"""The schema that this version writes."""

MOVED = {
    "polygpt.training.checkpoint:CheckpointSpec": "polygpt.runtime.checkpoint:CheckpointSpec",
    "polygpt.training.processes:ProcessesSpec": "polygpt.runtime.processes:ProcessesSpec",
    "polygpt.training.watchdog:WatchdogSpec": "polygpt.runtime.watchdog:WatchdogSpec",
}
"""Names of classes in schema 1, and where these classes are today."""

ADDED: dict[str, dict[str, Any]] = {
    "polygpt.data.sources.folder:MediaFolder": {
        "text_placeholders": True,  # a tag in an answer was a placeholder
        "follow_links": False,
        "ignore": [],
    },
}
"""By class, as it is called today: fields that schema 1 lacks, with the value that does what was done then."""


def schema_of(data: Any, where: str) -> int:
    """The schema number of JSON data read from `where`. Raises UserError if a newer version of polygpt wrote it."""
    schema = data.get("schema", 1) if isinstance(data, Mapping) else 1
    if not isinstance(schema, int) or schema > SCHEMA:
        raise UserError(f"{where} has schema {schema!r} and this version reads up to {SCHEMA}: update polygpt")
    return schema


def migrate(data: Any, where: str) -> Any:
    """The JSON data of a configuration without its schema number, as this version would have written it.

    Raises:
        UserError: if a newer version wrote it.
    """
    schema = schema_of(data, where)
    if isinstance(data, Mapping):
        data = {name: item for name, item in data.items() if name != "schema"}
    return _second(data) if schema < 2 else data


def _second(data: Any) -> Any:
    if isinstance(data, list):
        return [_second(item) for item in data]
    if not isinstance(data, Mapping):
        return data
    changed = {name: _second(item) for name, item in data.items()}
    if isinstance(name := data.get("class"), str):
        changed["class"] = MOVED.get(name, name)
        changed = {**ADDED.get(changed["class"], {}), **changed}
    return changed
