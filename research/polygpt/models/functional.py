"""The functional core: a model as a static description, a pytree of parameters, and pure functions of both."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt import parameters, sharding
from polygpt.blocks.capture import capturing
from polygpt.errors import SpecError
from polygpt.models.initial import initialised
from polygpt.models.multimodal import ModelSpec, MultimodalModel
from polygpt.models.prefix import adapted
from polygpt.nn.losses import Losses
from polygpt.objectives import blocked
from polygpt.objectives.base import TokenScores, scores_and_best
from polygpt.objectives.blocked import Head
from polygpt.optim import mup
from polygpt.overrides import replaced
from polygpt.parameters import paths, tree_of
from polygpt.sequence import Batch
from polygpt.spec import to_json

Params = dict[str, Any]
"""Nested dicts of float32 arrays, and of constants of any dtype if a module has other variables than `nnx.Param`.
Joined by "/", keys look like `decoder/blocks/attention/query/kernel`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """A model's outputs for a batch.

    Attributes:
        logits_BTV: float32, unnormalised log-probabilities of the next token.
        hidden_BTD: the decoder's normalised output, in the compute dtype.
        losses: losses of routed layers by name, summed over real positions, see `nn/losses.py`. Objectives read them.
    """

    logits_BTV: jax.Array
    hidden_BTD: jax.Array
    losses: Losses = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model without its parameters. All methods are pure and can be compiled.

    Attributes:
        spec: its specification.
        vocabulary: V, the number of token ids.
        graphdef: the static part of the Flax NNX module.
        traits: static properties of every parameter, a tree of `Traits`.
        layout: the layout that its methods apply by themselves, see `on`; None leaves sharding to the caller.
    """

    spec: ModelSpec
    vocabulary: int
    graphdef: Any
    traits: Params
    layout: sharding.MeshLayout | None = None
    _changed: dict[str, "Model"] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def positions(self) -> dict[str, int]:
        """P of every adapter, in the order that numbers the modalities."""
        return self.spec.positions()

    def on(self, layout: sharding.MeshLayout | None) -> "Model":
        """This model with its own layout, so that evaluation and generation need not handle sharding."""
        return self if layout is None else dataclasses.replace(self, layout=layout)

    def changed(self, changes: Mapping[str, Any]) -> "Model":
        """The model with some fields of `spec` changed, by dotted name, for the same parameters.

        The same changes return the same object, so that compiled programs are reused.

        Raises:
            SpecError: if a field does not exist, a value is invalid, or the parameters would change.
        """
        spec = replaced(self.spec, changes)
        key = json.dumps(to_json(spec))
        if key not in self._changed:
            made = bind(spec, self.vocabulary).on(self.layout)
            _require_same(paths(self.abstract()), paths(made.abstract()))
            self._changed[key] = made
        return self._changed[key]

    def replicated(self, tree: Any) -> Any:
        """Replicates traced arrays, so that the host can read them."""
        return tree if self.layout is None else jax.lax.with_sharding_constraint(tree, self.layout.replicated())

    @functools.cached_property
    def growth(self) -> Any:
        """Growth of each parameter relative to muP's base model, a tree of `Growth`; None without muP."""
        if self.spec.mup is None:
            return None
        return mup.growth(self.traits, bind(self.spec.base(), self.vocabulary).traits)

    def init(self, key: jax.Array) -> Params:
        """Initial parameters."""

        def scaled(parameter, growth):
            return parameter if growth.initial == 1 else parameter * growth.initial

        def initial(key):
            params = self._initial(key)
            return params if self.growth is None else jax.tree.map(scaled, params, self.growth)

        return jax.jit(initial)(key)

    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters, without allocating them."""
        return jax.eval_shape(lambda: self._initial(jax.random.key(0)))

    def axes(self) -> Params:
        """Logical axis names of every parameter, which decide its sharding; a tree of tuples."""
        return jax.tree.map(lambda traits: traits.axes, self.traits)

    def apply(self, params: Params, batch: Batch, key: jax.Array | None = None) -> Outputs:
        """All predictions for a batch. A key enables training behaviour: dropout and expert capacities."""
        hidden_BTD, losses = self.hidden(params, batch, key)
        return Outputs(self.logits(params, hidden_BTD), hidden_BTD, losses)

    def hidden(
        self, params: Params, batch: Batch, key: jax.Array | None = None, capture: Sequence[str] = ()
    ) -> tuple[jax.Array, Losses] | tuple[jax.Array, Losses, dict[str, jax.Array]]:
        """The decoder's normalised output [B, T, D], and the losses of routed layers. The key is as in `apply`.

        With `capture`, also activations inside the model by site, such as "residual", [L, B, T, D], or
        "adapters/image/attention": see `blocks/capture.py`.

        Raises:
            SpecError: for a site that the model does not have or the pass does not compute.
        """
        if key is not None and self.spec.drop_connect:
            given = paths(self.merged.traits), jax.random.fold_in(key, 2)  # the module splits the key in two
            params = self.spec.drop_connect.dropped(self.merge(params), *given)
        else:
            params = self._applied(params)
        with self._split(), parameters.merged(self.graphdef, _state(params)) as module:
            if not capture:
                return module.hidden(batch, key=key)[::2]
            with capturing(module, capture) as found:
                hidden_BTD, _, losses = module.hidden(batch, key=key)
            return hidden_BTD, losses, found

    def logits(self, params: Params, hidden_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V], unnormalised log-probabilities of the next token."""
        with self._split(), self._merged(params) as module:
            return module.logits(hidden_BTD)

    def head(self, params: Params, name: str, hidden_BTD: jax.Array, batch: Batch) -> jax.Array:
        """The outputs of a head of `spec.heads` for the hidden vectors of a batch, float32 [B, T, K].

        Raises:
            SpecError: if there is no head of that name.
        """
        with self._split(), self._merged(params) as module:
            return module.head_of(name)(hidden_BTD, batch)

    def head_scalars(self, params: Params, name: str) -> dict[str, jax.Array]:
        """The learned numbers of a head, see `heads.base.HeadModule.scalars`."""
        with self._merged(params) as module:
            return module.head_of(name).scalars()

    def output_head(self, params: Params) -> Head:
        """The output head, for losses that compute logits in blocks."""
        with self._merged(params) as module:
            return module.output_head()

    def token_scores(self, params: Params, batch: Batch) -> tuple[TokenScores, jax.Array]:
        """The scores of the targets [B, T], without means, and the most likely tokens, int32 [B, T].

        Computed in blocks of positions if `spec.logits_block` says so. Has no gradient then.
        """
        outputs = self.apply(params, batch)
        with self._split():
            block = blocked.block_size(self.spec.logits_block, *batch.shape, self.vocabulary, self.spec.decoder.width)
            if block is not None:
                return blocked.token_scores(outputs.hidden_BTD, self.output_head(params), batch.target_BT, block)
        return scores_and_best(outputs.logits_BTV, batch.target_BT)

    @functools.cached_property
    def merged(self) -> "Model":
        """The model without low-rank updates, for the parameters that `merge` returns; without updates, itself."""
        if self.spec.low_rank is None:
            return self
        return bind(self.spec.replace(low_rank=None), self.vocabulary).on(self.layout)

    def merge(self, params: Params) -> Params:
        """The parameters of `merged`, with all updates added to their matrices."""
        return params if self.spec.low_rank is None else self.spec.low_rank.merged(params)

    def unstacked(self, params: Params) -> Params:
        """The parameters of `merged` with those of each layer in arrays of their own, for many calls of `decode`: it
        would copy them out of stacked arrays at every call. Takes as much memory as the layers again if these are
        scanned."""
        params = self.merge(params)
        return parameters.unstacked(params, "decoder/blocks/") if self.spec.decoder.scan else params

    def module(self, params: Params) -> MultimodalModel:
        """The module with these parameters, to call its parts one by one; works under the transformations of JAX."""
        return nnx.merge(self.graphdef, _state(self.merge(params)))

    def init_cache(self, batch_size: int, size: int) -> Any:
        """An empty cache for `batch_size` rows of at most `size` positions."""
        return self.spec.init_cache(batch_size, size)

    def decode(
        self, params: Params, batch: Batch, cache: Any, last_B: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Appends a batch of T positions to the cache; returns float32 logits [B, T, V] and the new cache.

        To prefill, pass a whole prompt and an empty cache. With `last_B`, int32, logits are [B, 1, V], for that one
        position of each row: all logits of a long prompt may not fit into memory. A bidirectional span must lie within
        one call, because positions of an earlier call cannot see later ones.

        `batch.media` may omit modalities that do not occur in the batch. The caller must not exceed the cache's size:
        positions beyond it overwrite the last ones without an error, and predictions are wrong from there on.
        """
        with self._split(), self._merged(params) as module:
            hidden_BTD, cache, _ = module.hidden(batch, cache)
            if last_B is not None:
                hidden_BTD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
            return module.logits(hidden_BTD), cache

    def attention(self, params: Params, batch: Batch, chosen_R: jax.Array | None = None) -> dict[int, jax.Array]:
        """Attention weights of the chosen positions by decoder block, float32 [B, H, R, T].

        Computed exactly, whatever backend the model uses; `chosen_R=None` selects all positions. Blocks whose attention
        has no weights are left out.
        """
        with self._split(), self._merged(params) as module:
            return self.replicated(module.weights(batch, chosen_R))

    def _split(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.layout is None else sharding.use_layout(self.layout)

    def _merged(self, params: Params) -> contextlib.AbstractContextManager[MultimodalModel]:
        return parameters.merged(self.graphdef, _state(self._applied(params)))

    def _applied(self, params: Params) -> Params:
        """The parameters of the module: as in `merge`, or matrices that apply their updates by themselves."""
        if self.spec.low_rank is None:
            return params
        return self.spec.low_rank.applied(params, paths(self.traits))

    def _initial(self, key: jax.Array) -> Params:
        params = _pure(nnx.state(_built(self.spec, self.vocabulary, key)))
        if self.spec.initial:
            given = paths(self.merged.traits), jax.random.fold_in(key, 2), self.spec.decoder.depth
            params = initialised(self.spec.initial, params, *given)
        if self.spec.low_rank is None:
            return params
        given = jax.random.fold_in(key, 1), paths(self.merged.traits)
        return params | self.spec.low_rank.initial(*given)


def bind(spec: ModelSpec, vocabulary: int) -> Model:
    """The functional form of a model with `vocabulary` token ids, without allocating anything.

    Raises:
        SpecError: for a module that holds the state of a random stream: see `parameters.traits`.
    """
    module = nnx.eval_shape(lambda: _built(spec, vocabulary, jax.random.key(0)))
    traits = parameters.traits(module)  # completes the metadata, which are part of the graph
    traits = _pure(traits)
    if spec.drop_connect is not None:
        spec.drop_connect.names(paths(traits))
    adapting = [one.traits(paths(traits)) for one in (spec.low_rank, spec.prefix) if one is not None]
    if adapting:
        traits = tree_of(adapted(*adapting))
    return Model(spec, vocabulary, nnx.graphdef(module), traits)


def _built(spec: ModelSpec, vocabulary: int, key: jax.Array) -> MultimodalModel:
    """The module, with its prefixes."""
    module = spec.build(vocabulary, nnx.Rngs(key))
    if spec.prefix is not None:
        spec.prefix.attach(module, jax.random.fold_in(key, 3))
    return module


def _require_same(trained: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
    """Raises SpecError that names the first parameter whose shape differs."""
    if difference := parameters.changed_shape(trained, changed):
        name, was, now = difference
        raise SpecError(
            f"the parameter {name} is {was} in the trained model and {now} in the changed one: only change fields that "
            "keep the names and shapes of all parameters"
        )


def _pure(state: nnx.State) -> Params:
    """NNX state as nested dicts with string keys (NNX uses integers for list items)."""

    def tidy(tree):
        return {str(key): tidy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree

    return tidy(nnx.to_pure_dict(state))


def _state(params: Params) -> nnx.State:
    def untidy(tree):
        if not isinstance(tree, dict):
            return tree
        return {int(key) if key.isdigit() else key: untidy(value) for key, value in tree.items()}

    return nnx.State(untidy(params))
