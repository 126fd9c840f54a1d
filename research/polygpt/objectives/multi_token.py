"""Prediction of several tokens ahead."""

import dataclasses
import json

import jax
import jax.numpy as jnp

from polygpt.errors import SpecError
from polygpt.objectives.base import Objective, require_hidden_targets
from polygpt.objectives.needs import Needs
from polygpt.objectives.positions import log_probability, per_position
from polygpt.sequence import Batch
from polygpt.spec import nearest


@dataclasses.dataclass(frozen=True)
class MultiToken(Objective):
    """Cross entropy in nats of the tokens after the next one, each from a head of its own that all share the output
    matrix: Gloeckle et al. (2404.19737), section 2. Here a head is one of `model.heads`, such as a `LinearHead` of the
    decoder's width, and not another layer of the decoder. `NextToken` predicts the next token itself. The value is the
    mean over the heads, where the paper sums: multiply the paper's weight by the number of heads."""

    heads: tuple[str, ...]
    """Names in `model.heads`, the first for the token after the next one."""

    def validate(self):
        self.require(len(self.heads) > 0, "heads", "at least one head")

    @classmethod
    def small(cls) -> "MultiToken":
        return cls(("second", "third"))

    @property
    def needs(self) -> Needs:
        head = {"class": "polygpt.heads.linear:LinearHead", "outputs": 16, "pool": "last"}
        heads = json.dumps({name: head for name in self.heads})
        return Needs("heads of the decoder's width", {"decoder.width": "16", "heads": heads})

    def check_with(self, model, layout) -> None:
        require_hidden_targets(model)
        for name in self.heads:
            if name not in model.heads:
                there = nearest(name, model.heads) if model.heads else "there are none"
                raise SpecError(f"reads the head {name!r}, which is not in model.heads: {there}")
            if (outputs := model.heads[name].outputs) != model.decoder.width:
                raise SpecError(
                    f"model.heads.{name}.outputs is {outputs}: it must be the width of the decoder, "
                    f"{model.decoder.width}"
                )

    def total(self, outputs, batch: Batch) -> jax.Array:
        total = jnp.float32(0)
        for ahead, name in enumerate(self.heads, start=1):
            target_BT, weight_BT = _ahead(batch, ahead)
            used_BT = weight_BT != 0
            hidden_BTD = jnp.where(used_BT[..., None], outputs.head(name), 0)  # at padding it may be infinite
            passes = (outputs.with_hidden(hidden_BTD),)
            total -= jnp.sum(weight_BT * per_position(log_probability, passes, used_BT, target_BT))
        return total

    def weight(self, batch: Batch) -> jax.Array:
        return sum(jnp.sum(_ahead(batch, 1 + i)[1], dtype=jnp.float32) for i in range(len(self.heads)))


def _ahead(batch: Batch, count: int) -> tuple[jax.Array, jax.Array]:
    """Targets and loss weights of the position `count` further on in the same example; weights are 0 where none is."""

    def later(x_BT):
        return jnp.pad(x_BT, ((0, 0), (0, count)))[:, count:]

    here_BT = later(batch.segment_BT) == batch.segment_BT
    return later(batch.target_BT), jnp.where(here_BT, later(batch.weight_BT), 0)
