"""Prefix tuning: fine-tune a model by training keys and values in front of the sequence; all else is frozen."""

import dataclasses
import math
import re
import zlib
from collections.abc import Iterator, Mapping

import jax
from flax import nnx

from polygpt.attention import prefix
from polygpt.blocks.stack import Stack
from polygpt.errors import SpecError
from polygpt.parameters import Traits, number_layers
from polygpt.spec import Spec, check_pattern

ADDED = re.compile(r"/prefix/(key|value)$")
"""Matches the names of the added parameters: "decoder/blocks/attention/prefix/key"."""


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Spec):
    """Trains P keys and values of each attention layer that every position sees: Li & Liang, 2101.00190, section 4.

    All other parameters are frozen, except those in `also` and those that `model.low_rank` trains. Keys begin random
    and values at 0, so that at first a prefix only takes weight from the sequence.
    """

    length: int = 16
    """P, the number of keys and values."""
    pattern: str = "^decoder/"
    """Regular expression, searched in the names of attention layers: "decoder/blocks/attention", with the number of the
    block, "decoder/blocks/3/attention", if blocks are not scanned."""
    also: str | None = None
    """Regular expression: further parameters to train in full; null for none."""

    def validate(self):
        check_pattern(self, "pattern")
        check_pattern(self, "also")
        self.require(self.length >= 1, "length", "at least 1")

    def attach(self, model: nnx.Module, key: jax.Array) -> None:
        """Adds the keys and values to a module.

        Raises:
            SpecError: if `pattern` matches no attention layer, or one that has no softmax over keys.
        """
        layers = list(_layers(model))
        found = [layer for layer in layers if re.search(self.pattern, layer[0])]
        if not found:
            like = layers[0][0] if layers else "missing: the model has none"
            raise SpecError(f"model.prefix.pattern {self.pattern!r} matches no attention layer: names are like {like}")
        for name, module, times, axis in found:
            if reason := prefix.refusal(module):
                raise SpecError(
                    f"model.prefix.pattern {self.pattern!r} matches {name}, and {type(module.spec).__name__} {reason}: "
                    "match other layers only"
                )
            numbered = [one.get_metadata() for _, one in nnx.iter_graph(module) if isinstance(one, nnx.Variable)]
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            prefix.attach(module, self.length, times, axis, own)
            number_layers(module.prefix, numbered[0]["layers"], numbered[0]["depth"])

    def traits(self, traits: Mapping[str, Traits]) -> dict[str, Traits]:
        """The traits of a model with prefixes, by name; only prefixes and `also` are trained.

        Raises:
            SpecError: if `also` matches no parameter.
        """
        if self.also is not None and not any(re.search(self.also, name) for name in traits):
            raise SpecError(
                f"model.prefix.also {self.also!r} matches no parameter: names are like {next(iter(traits))}"
            )

        def trained(name: str) -> bool:
            return bool(ADDED.search(name)) or self.also is not None and bool(re.search(self.also, name))

        return {name: dataclasses.replace(own, trained=own.trained and trained(name)) for name, own in traits.items()}


def adapted(*traits: Mapping[str, Traits]) -> dict[str, Traits]:
    """The traits of a model with several kinds of adapters, given those with each: what any of them trains."""
    trained = {name for some in traits for name, own in some.items() if own.trained}
    every = {name: own for some in traits for name, own in some.items()}
    return {name: dataclasses.replace(own, trained=name in trained) for name, own in every.items()}


def score_flops(model: nnx.Module) -> dict[str, int]:
    """FLOPs of the scores of prefixes and of their weighted values, for one position, by name of the attention
    layer."""
    found = {}
    for name, layer, times, _ in _layers(model):
        if getattr(layer, "prefix", None) is not None:
            spec, width, length = layer.spec, layer.dims.width, layer.prefix.key.shape[-2]
            both = spec.width_of_query(width) + spec.width_of_head(width)
            found[name] = math.prod(times) * 2 * length * spec.heads * both
    return found


def _layers(model: nnx.Module) -> Iterator[tuple[str, nnx.Module, tuple[int, ...], str | None]]:
    """(name, module, shape and name of the axis of layers) of each attention layer in the stacks of a model."""
    for path, stack in nnx.iter_graph(model):
        if isinstance(stack, Stack) and stack.blocks is not None:
            times = (stack.spec.depth // len(stack.spec.period()),) if stack.spec.scan else ()
            for inner, module in nnx.iter_graph(stack.blocks):
                if isinstance(module, prefix.LAYERS):
                    name = "/".join(map(str, (*path, "blocks", *inner)))
                    yield name, module, times, "layers" if stack.pipelined else None
