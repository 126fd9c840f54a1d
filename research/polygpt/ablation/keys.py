"""Keys that identify runs, so that no run is repeated.

The key depends on the experiment with its seed, on VERSION and on the code of classes that lie outside the package. It
does not depend on the contents of data files, on modules that such a class imports, or on the library's own source,
which every line of results records separately (`provenance.py`).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from polygpt import spec
from polygpt.sources import code_hash, file_of, user_classes
from polygpt.spec import Spec
from polygpt.training.experiment import Experiment
from polygpt.training.workdir import drop_equivalent_settings

FORMER_CLASSES: dict[str, str] = {}
"""Former locations of moved classes, by "module:Class"; keys still use them."""
VERSION = "0.1.0"
"""The version of polygpt that last changed the behaviour of a default. Raise it when you change one; this changes all
keys."""


def key(experiment: Experiment) -> str:
    """The key of a run: a SHA-256 of its configuration, VERSION and the code of classes outside the package.

    Excludes the name, settings that do not change results (`workdir.EQUIVALENT_SETTINGS`), and paths of code files.
    Of a file of code everything counts except comments, the module docstring, and the functions `ablation` and
    `experiment`. Fields at their defaults are omitted, so results stay valid when a field is added whose default keeps
    the old behaviour. They also survive renames listed in `migration.RENAMED` or FORMER_CLASSES.
    """
    return key_of(configured(experiment), experiment.seed)


def key_of(configured: str, seed: int) -> str:
    """The key of a run with this seed, given `configured` of its experiment."""
    return hashlib.sha256(f"{configured}/{seed}".encode()).hexdigest()


def configured(experiment: Experiment) -> str:
    """Everything that the key depends on except the seed, as text."""
    data = _given(experiment.replace(seed=0, name="any"))
    drop_equivalent_settings(data)
    sources = {
        f"{file.name}:{cls.__qualname__}": code_hash(file) for cls in user_classes(experiment) if (file := file_of(cls))
    }
    return json.dumps([data, VERSION, sorted(sources.items())], sort_keys=True)


def _given(value: Any) -> Any:
    """Like `spec.to_json`, but without fields at their defaults and without the folder of user classes."""
    if isinstance(value, Spec):
        cls = spec.class_name(type(value))
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if not _is_default(value, f)}
        former = {new: old for old, new in spec.new_names(type(value)).items()}
        named = {former.get(name, name): _given(item) for name, item in fields.items()}
        return {"class": FORMER_CLASSES.get(cls, cls).rpartition(os.sep)[2], **named}
    if isinstance(value, Mapping):
        return {name: _given(item) for name, item in value.items()}
    return [_given(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_default(value: Spec, field: dataclasses.Field) -> bool:
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return made is not dataclasses.MISSING and getattr(value, field.name) == made
