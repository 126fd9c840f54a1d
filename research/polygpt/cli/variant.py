"""An attention variant named on the command line, `MODULE:SPEC` or `FILE.py:SPEC`, with its fields overridden."""

import re
import zlib
from argparse import Namespace
from collections.abc import Sequence

from polygpt.cli.named import OWN, Kind

HELP = (
    "the variant, package.module:Class or FILE.py:CLASS; --NAME VALUE sets a field, --spec.NAME VALUE a field whose "
    "name is also an option"
)
"""Help text of the argument that names a variant."""


def _base() -> type:
    from polygpt.attention.contract import Attention

    return Attention


KIND = Kind("an attention variant", _base, "polygpt.api.Attention or MultiHead")
load, fields = KIND.load, KIND.fields


def picture(names: Sequence[str | None], arguments: Namespace, kind: str) -> str:
    """Default path of a picture, named after the classes, the changed fields and the options given."""
    words = [name.rpartition(":")[2] for name in names if name]
    words += [f"{name.removeprefix(OWN)}-{text}" for name, text in arguments.changes.items()]
    options = [name for name in sorted(arguments.given) if name not in ("--json", "--debug", "--against", "--picture")]
    words += [f"{name[2:]}-{getattr(arguments, name[2:].replace('-', '_'))}" for name in options]
    text = re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join([*words, kind]))
    return f"runs/{text if len(text) <= 120 else f'{text[:100]}-{zlib.crc32(text.encode()):08x}-{kind}'}.png"
