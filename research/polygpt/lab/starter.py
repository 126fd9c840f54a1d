"""Starting files for a new variant: what `polygpt attention new` writes."""

import keyword
import re
from pathlib import Path

from polygpt.errors import UserError

SOFTMAX = '''"""{title}: say in a line what it does, and name the paper.

    polygpt attention check {file}:{name}
    polygpt train EXPERIMENT.py --model.decoder.attention {file}:{name}
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
        # A mask of your own is a pg.Mask with __call__(query, key); its reach() says how far back it looks at most, and
        # makes the cache a ring.
        return mask & pg.Window(self.window)

    def score(self, score):
        return super().score(score).then(Decay(self.rate))
'''

MODULE = '''"""{title}: say in a line what it does, and name the paper.

    polygpt attention check {file}:{name}
    polygpt train EXPERIMENT.py --model.decoder.attention {file}:{name}
"""

import dataclasses

import jax
from flax import nnx

import polygpt.api as pg


@dataclasses.dataclass(frozen=True)
class {name}(pg.MultiHead):
    """Multi-head attention whose result is gated by its input."""

    gate_bias: bool = True
    """Whether the gate has a bias."""

    def build(self, dims, rngs):
        return {name}Module(self, dims, rngs)


class {name}Module(pg.MultiHeadModule):
    """Override `queries`, `keys`, `values` or `mixed`; the rest is inherited, every backend and cache included."""

    def __init__(self, spec, dims, rngs: nnx.Rngs):
        super().__init__(spec, dims, rngs)
        self.gate = pg.Linear(dims.width, dims.width, rngs=rngs, bias=spec.gate_bias, dtype=dims.dtype)

    def mixed(self, y_BHTe, lse_BHT, x_BTD, context):
        return super().mixed(y_BHTe, lse_BHT, x_BTD, context) * jax.nn.sigmoid(self.gate(x_BTD))
'''

RECURRENT = '''"""{title}: say in a line what it does, and name the paper.

    polygpt attention check {file}:{name}
    polygpt train EXPERIMENT.py --model.decoder.attention {file}:{name}
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.recurrent import Recurrent, RecurrentModule


@dataclasses.dataclass(frozen=True)
class {name}(Recurrent):
    """S_t = a S_(t-1) + k_t v_t^T, y_t = norm(S_t^T q_t), with an a of its own for each head, which is learned."""

    kept: float = 0.5
    """Where a of the first head starts: how much is left after a position. Each further head loses half as much."""

    def validate(self):
        super().validate()
        self.require(0 < self.kept < 1, "kept", "between 0 and 1")

    def build(self, dims, rngs):
        return {name}Module(self, dims, rngs)


class {name}Module(RecurrentModule):
    """Override `log_decay`, `placed` (queries and keys) or `recur`; packing, padding and the cache are inherited."""

    def __init__(self, spec, dims, rngs: nnx.Rngs):
        super().__init__(spec, dims, rngs)
        lost_H = (1 - spec.kept) * 2.0 ** -jnp.arange(spec.heads, dtype=jnp.float32)
        self.kept_H = nnx.Param(jnp.log1p(-lost_H) - jnp.log(lost_H))  # the sigmoid of this is 1 - lost

    def log_decay(self, x_BTD):
        B, T, _ = x_BTD.shape
        log_H = jax.nn.log_sigmoid(self.kept_H[...])
        return jnp.broadcast_to(log_H[None, :, None, None], (B, self.spec.heads, T, 1))
'''

KINDS = {"mask": SOFTMAX, "module": MODULE, "recurrent": RECURRENT}
"""A mask and a score modification; a module of its own around the inherited kernels; a state with its own decay."""


WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])")
"""Where a word of a class name ends and the next begins: V2|Gate, Own|HEADS, but H2O."""


def write(name: str, kind: str, folder: Path) -> tuple[Path, str]:
    """Writes the file of a variant `name` (a class name, as "NearFirst") and returns its path and the class.

    Raises:
        UserError: if the name is no class name or one that the file has for something else, if the file is there
            already, or if it cannot be written.
    """
    if not re.match("[A-Z]", name) or not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(f"attention new: {name!r} is no class name: begin with a capital letter, as in NearFirst")
    if re.search(rf"^class {name}\(|^from .* import .*\b{name}\b", KINDS[kind], re.MULTILINE):
        raise UserError(f"attention new: the file has a {name} of its own: choose another name")
    words = WORDS.sub("_", name).lower()
    path = folder / f"{words}.py"
    text = KINDS[kind].format(title=words.replace("_", " ").capitalize(), file=path.name, name=name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(text)
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.is_dir():
            raise UserError(f"attention new: {path} exists already: choose another name, or remove it") from None
        raise UserError(f"attention new: {path} cannot be written: {error.strerror}") from None
    return path, name
