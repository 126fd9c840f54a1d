"""Starting files for a new variant: what `polygpt attention new` writes."""

import re
from pathlib import Path

from polygpt.errors import UserError

SOFTMAX = '''"""{title}: say in a line what it does, and name the paper.

    polygpt attention check {file}:{name}
    polygpt train experiments/quickstart.py --model.decoder.attention {file}:{name}
"""

import dataclasses

import polygpt.api as pg


@dataclasses.dataclass(frozen=True)
class Decay(pg.Score):
    """A score falls with the distance between query and key."""

    rate: float = 0.1
    """By how much a position."""

    def __call__(self, score, query, key, terms):
        return score - self.rate * abs(query.position - key.position)


@dataclasses.dataclass(frozen=True)
class {name}(pg.MultiHead):
    """Multi-head attention to the last positions, the nearer the more."""

    window: int = 16
    """How many positions a query sees, itself included."""
    rate: float = 0.1
    """By how much a score falls a position."""

    def mask(self, mask):
        return mask & pg.Window(self.window)

    def score(self, score):
        return super().score(score).then(Decay(self.rate))
'''

MODULE = '''"""{title}: say in a line what it does, and name the paper.

    polygpt attention check {file}:{name}
    polygpt train experiments/quickstart.py --model.decoder.attention {file}:{name}
"""

import dataclasses

import jax
from flax import nnx

import polygpt.api as pg
from polygpt.attention.multi_head import MultiHeadModule
from polygpt.nn.linear import Linear


@dataclasses.dataclass(frozen=True)
class {name}(pg.MultiHead):
    """Multi-head attention whose result is gated by its input."""

    gate_bias: bool = True
    """Whether the gate has a bias."""

    def build(self, dims, rngs):
        return {name}Module(self, dims, rngs)


class {name}Module(MultiHeadModule):
    """Override `queries`, `keys`, `values` or `mixed`; the rest is inherited, every backend and cache included."""

    def __init__(self, spec, dims, rngs: nnx.Rngs):
        super().__init__(spec, dims, rngs)
        self.gate = Linear(dims.width, dims.width, rngs=rngs, bias=spec.gate_bias, dtype=dims.dtype)

    def mixed(self, y_BHTe, lse_BHT, x_BTD):
        return super().mixed(y_BHTe, lse_BHT, x_BTD) * jax.nn.sigmoid(self.gate(x_BTD))
'''

KINDS = {"mask": SOFTMAX, "module": MODULE}
"""A mask and a score modification; a module of its own around the inherited kernels."""


def write(name: str, kind: str, folder: Path) -> tuple[Path, str]:
    """Writes the file of a variant `name` (a class name, as "NearFirst") and returns its path and the class.

    Raises:
        UserError: if the name is no class name, or the file is there already.
    """
    if not re.fullmatch(r"[A-Z]\w*", name):
        raise UserError(f"attention new: {name!r} is no class name: begin with a capital letter, as in NearFirst")
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9_]*", name)
    path = folder / ("_".join(words).lower() + ".py")
    if path.exists():
        raise UserError(f"attention new: {path} exists already: choose another name, or remove it")
    text = KINDS[kind].format(title=" ".join(words).capitalize(), file=path.name, name=name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path, name
