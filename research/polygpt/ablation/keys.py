"""Keys: what a run is known by, so that no run is made twice.

The key depends on the experiment with its seed, on VERSION and on the code of classes that lie outside the package. It
does not depend on the contents of data files, on modules that such a class imports, or on the library's own source,
which every line of results names beside the key (`provenance.py`).
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
from polygpt.training.workdir import drop_same_mathematics

FORMER_CLASSES: dict[str, str] = {}
"""By "module:Class": where a class that moved was before, under which keys still know it."""
VERSION = "0.1.0"
"""The version of polygpt whose defaults still mean what they meant. Raise it when you change what a default does: it
changes all keys."""


def key(experiment: Experiment) -> str:
    """What a run is known by: a SHA-256 over its configuration, VERSION and the code of other classes.

    The name is not in it, nor what changes no result (`workdir.SAME_MATHEMATICS`), nor where files of code lie. Of a
    file of code everything counts except comments, the module docstring, and the functions `ablation` and `experiment`.
    Fields at their defaults are left out, so that results outlive a field that is added: at its default it does what
    was done without it. Results outlive a rename that `migration.RENAMED` or FORMER_CLASSES lists.
    """
    return key_of(configured(experiment), experiment.seed)


def key_of(configured: str, seed: int) -> str:
    """The key of a run with the seed, given what `configured` says of its experiment."""
    return hashlib.sha256(f"{configured}/{seed}".encode()).hexdigest()


def configured(experiment: Experiment) -> str:
    """All that the key of a run depends on but the seed, as text."""
    data = _given(experiment.replace(seed=0, name="any"))
    drop_same_mathematics(data)
    sources = {
        f"{file.name}:{cls.__qualname__}": code_hash(file) for cls in user_classes(experiment) if (file := file_of(cls))
    }
    return json.dumps([data, VERSION, sorted(sources.items())], sort_keys=True)


def _given(value: Any) -> Any:
    """JSON data as of `spec.to_json`, of fields that are not at their defaults; a file's class without the folder."""
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
