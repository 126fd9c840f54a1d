"""What objectives see of a model: forward passes over a batch, each computed when it is first read."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax

from polygpt.errors import SpecError
from polygpt.objectives.blocked import Block, Head, block_size
from polygpt.parameters import paths
from polygpt.sequence import Batch
from polygpt.spec import nearest


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """A forward pass. Objectives that read the same pass share it.

    Args:
        model: has the pure functions `hidden`, `logits`, `output_head`, `head` and `head_scalars` of
            `models.functional.Model`.
        params: the model's parameters.
        batch: what the model reads.
        key: enables dropout; None for evaluation behaviour.
        others: models that are not trained, and their parameters, by name; see `other`.
        logits_block: number of positions whose logits exist at a time, see `positions.py`; None for all, "auto" for as
            many as `blocked.AUTOMATIC` allows.
        trainable: a tree of bools with the structure of the parameters; None if all are trained.
        captures: sites of activations that the passes of each model keep, see `captured`; OWN is the trained one.
    """

    model: Any
    params: Any
    batch: Batch
    key: jax.Array | None = None
    others: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    logits_block: Block = None
    trainable: Any = None
    captures: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    _passes: dict = dataclasses.field(default_factory=dict, init=False, repr=False)
    _values: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def _hidden(self):
        given = self.params, self.batch, self.key
        sites = self.captures.get(OWN, ())
        return self.model.hidden(*given, capture=tuple(sites)) if sites else self.model.hidden(*given)

    @property
    def hidden_BTD(self) -> jax.Array:
        """The decoder's normalised output, in the compute dtype."""
        return self._hidden[0]

    @property
    def losses(self) -> Mapping[str, jax.Array]:
        """Losses of routed layers by name, summed over real positions, see `nn/losses.py`."""
        return self._hidden[1]

    @functools.cached_property
    def logits_BTV(self) -> jax.Array:
        """float32, unnormalised log-probabilities of the next token. Takes B T V floats of memory."""
        return self.model.logits(self.params, self.hidden_BTD)

    @functools.cached_property
    def output_head(self) -> Head:
        """What `logits_BTV` multiplies with, to compute the logits of some positions only."""
        return self.model.output_head(self.params)

    @functools.cached_property
    def block(self) -> int | None:
        """`logits_block` for this batch: a number of positions, or None if all logits may exist at a time."""
        if self.logits_block != "auto":
            return self.logits_block
        head = self.output_head
        return block_size("auto", *self.batch.shape, head.vocabulary, head.width)

    @property
    def trained(self) -> dict[str, jax.Array]:
        """The parameters that are trained, by name, for penalties on them."""
        names = paths(self.params)
        trained = dict.fromkeys(names, True) if self.trainable is None else paths(self.trainable)
        return {name: parameter for name, parameter in names.items() if trained[name]}

    def with_hidden(self, hidden_BTD: jax.Array) -> "Forward":
        """This pass with other hidden vectors, from which the same output head computes the logits."""
        found = dataclasses.replace(self)
        vars(found)["_hidden"] = hidden_BTD, *self._hidden[1:]
        return found

    def captured(self, site: str) -> jax.Array:
        """Activations inside the model, in the compute dtype: "residual", "attention" or "mlp", [L, B, T, D], of all
        blocks of the decoder; "media/image", [B, N, P, D], the embeddings of media; others in `blocks/capture.py`.

        Raises:
            SpecError: if the objective does not name the site in `Objective.captures`, or the model lacks it.
        """
        sites = self.captures.get(OWN, ())
        if site not in sites:
            near = nearest(site, sites) if sites else "it names none"
            raise SpecError(f"an objective reads the site {site!r}, which its property `captures` lacks: {near}")
        return self._hidden[2][site]

    def head(self, name: str, vectors_BTD: jax.Array | None = None, pooled: Batch | None = None) -> jax.Array:
        """The outputs of a head of `model.heads`, float32 [B, T, K]: of `hidden_BTD`, or of other vectors, such as
        captured ones, pooled over the segments of `pooled` or of the batch. Raises SpecError if there is no such head.
        """
        if vectors_BTD is not None:
            return self.model.head(self.params, name, vectors_BTD, self.batch if pooled is None else pooled)
        return self.once(("head", name), lambda: self.model.head(self.params, name, self.hidden_BTD, self.batch))

    def head_scalars(self, name: str) -> Mapping[str, jax.Array]:
        """The learned numbers of a head, such as the `scale` of a projection: float32 scalars by name."""
        return self.model.head_scalars(self.params, name)

    def repeat(self, number: int) -> "Forward":
        """Another pass over the same batch with other dropout; the same number gives the same pass. 0 is this one."""
        if number == 0:
            return self
        key = None if self.key is None else jax.random.fold_in(jax.random.fold_in(self.key, REPEATED), number)
        return self._pass(("repeat", number), key=key)

    def over(self, batch: Batch) -> "Forward":
        """The pass over another batch with the same dropout key; the same object gives the same pass."""
        return self if batch is self.batch else self._pass(("over", id(batch)), batch=batch)

    def other(self, name: str) -> "Forward":
        """The pass of a model that is not trained over the same batch: without gradient and dropout.

        Args:
            name: of an experiment's `references`, or "average" for the moving average of the parameters.

        Raises:
            SpecError: if there is no such model.
        """
        if name not in self.others:
            raise SpecError(f"an objective reads the model {name!r}: {missing(name, self.others)}")
        model, params = self.others[name]
        captures = {OWN: self.captures.get(name, ())}
        params = jax.lax.stop_gradient(params)
        return self._pass(("other", name), model=model, params=params, key=None, captures=captures)

    def once(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, computed when an objective first asks this pass for `name`."""
        if name not in self._values:
            self._values[name] = compute()
        return self._values[name]

    def _pass(self, name, **changes) -> "Forward":
        if name not in self._passes:
            self._passes[name] = dataclasses.replace(self, **changes)
        return self._passes[name]


REPEATED = 2
"""Distinguishes the keys of further passes from the parts into which a pass splits its own."""
OWN = ""
"""The name of the trained model among those whose activations are captured."""
AVERAGE = "average"
"""The name of the moving average of the trained parameters among the models of `Forward.other`."""


def missing(name: str, there) -> str:
    """What to do about a model that an objective reads and an experiment lacks."""
    if name == AVERAGE:
        return "set optim.ema"
    named = [other for other in there if other != AVERAGE]
    return f"add it to references, which has {', '.join(named) or 'none'}"
