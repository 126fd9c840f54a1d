"""Templates for new variants, written by `polygpt attention new`."""

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
    """Decreases scores linearly with the distance between query and key."""

    rate: float = 0.1
    """Decrease per position."""

    def __call__(self, score, query, key, terms):
        return score - self.rate * abs(query.position - key.position)


@dataclasses.dataclass(frozen=True)
class {name}(pg.MultiHead):
    """Multi-head attention to the last positions that favours near ones."""

    window: int = 16
    """Number of positions that a query sees, including itself."""
    rate: float = 0.1
    """Decrease of scores per position."""

    def mask(self, mask):
        # For your own mask, derive from pg.Mask and define __call__(query, key). If its reach() bounds how far back it
        # looks, the cache becomes a ring buffer.
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
    """Multi-head attention with an output gated by its input."""

    gate_bias: bool = True
    """Whether the gate has a bias."""

    def build(self, dims, rngs):
        return {name}Module(self, dims, rngs)


class {name}Module(pg.MultiHeadModule):
    """Override `queries`, `keys` or `values`, called as `(x_BTD, context)`, or `mixed`; the rest is inherited, with all
    backends and caches. Vectors at padding may be zero: a norm needs an epsilon.
    """

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
    """S_t = a S_(t-1) + k_t v_t^T, y_t = norm(S_t^T q_t), with one learned decay a per head."""

    kept: float = 0.5
    """Initial decay a of the first head, the fraction kept per position. Each further head loses half as much."""

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
        self.kept_H = nnx.Param(jnp.log1p(-lost_H) - jnp.log(lost_H))  # its sigmoid is 1 - lost

    def log_decay(self, x_BTD):
        B, T, _ = x_BTD.shape
        log_H = jax.nn.log_sigmoid(self.kept_H[...])
        return jnp.broadcast_to(log_H[None, :, None, None], (B, self.spec.heads, T, 1))
'''

KINDS = {"mask": SOFTMAX, "module": MODULE, "recurrent": RECURRENT}
"""A mask and a score modification; a custom module around the inherited kernels; a state with a custom decay."""


WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])")
"""Word boundaries in class names: V2|Gate, Own|HEADS, but H2O."""


def write(name: str, kind: str, folder: Path) -> tuple[Path, str]:
    """Writes the file of a variant `name` (a class name such as "NearFirst"); returns its path and the class.

    Raises:
        UserError: if the name is not a class name or is used otherwise in the file, or if the file exists or cannot be
            written.
    """
    if not re.match("[A-Z]", name) or not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(f"attention new: {name!r} is not a class name: begin with a capital letter, as in NearFirst")
    if re.search(rf"^class {name}\(|^from .* import .*\b{name}\b", KINDS[kind], re.MULTILINE):
        raise UserError(f"attention new: the file already uses the name {name}: choose another one")
    words = WORDS.sub("_", name).lower()
    path = folder / f"{words}.py"
    text = KINDS[kind].format(title=words.replace("_", " ").capitalize(), file=path.name, name=name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(text)
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.is_dir():
            raise UserError(f"attention new: {path} already exists: choose another name, or remove it") from None
        raise UserError(f"attention new: {path} cannot be written: {error.strerror}") from None
    return path, name
