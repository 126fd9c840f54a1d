"""A stack of transformer blocks, used by the decoder and the media towers."""

import contextlib
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from polygpt import sharding
from polygpt.attention.contract import Attention, Context, Dims, causal_mean
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.block import BlockSpec, Layer, NormPlacement, Parts, Sequential
from polygpt.blocks.capture import RESIDUAL_STREAM, Capture, Recorder
from polygpt.blocks.pipeline import Schedule, pipeline, with_rows
from polygpt.errors import SpecError
from polygpt.nn.losses import Losses, add
from polygpt.nn.mlp import MLP, FeedForward
from polygpt.nn.norms import LayerNorm, Norm
from polygpt.nn.positions import NoPosition, Position
from polygpt.nn.remat import INPUT, KEPT
from polygpt.parameters import merged, number_layers, of_layer, stack
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class StackSpec(Spec):
    """A stack of blocks in a repeating pattern, followed by a final norm if they are pre-norm."""

    width: int = 128
    """D, the model width."""
    depth: int = 4
    """L, the number of blocks."""
    attention: Attention = MultiHead()
    """The attention variant of the blocks."""
    mlp: FeedForward = MLP()
    """The feed-forward layer of every block."""
    norm: Norm = LayerNorm()
    """The normalisation of each residual branch and, with pre-norm, after the last block."""
    position: Position = NoPosition()
    """The position encoding."""
    dropout: float = 0.0
    """Probability of dropping an element of the embeddings and of each residual branch, in training."""
    scan: bool = True
    """Compile one pattern of blocks and scan it over stacked parameters: compiles faster, but trains slower on CPU.
    Generation unrolls the blocks either way."""
    remat: Literal["none", "dots", "full"] = "none"
    """What to recompute in the backward pass: nothing; all but matrix products with parameters and the result of
    attention; or everything inside a block."""
    pattern: tuple[Attention | Layer | None, ...] = ()
    """Successive blocks, repeated to the depth, such as [null, null, null, "FILE:CLASS"]. null is the block set here;
    an attention variant, or a Layer (polygpt.blocks.block:Layer), changes parts of it."""
    norm_placement: NormPlacement = "pre"
    """pre is x + f(norm(x)) for each residual branch f, post is norm(x + f(x)). Post-norm stacks usually need a
    learning-rate warm-up, and have no norm after the last block (2002.04745)."""
    block: BlockSpec = Sequential()
    """How attention and the feed-forward layer of a block are joined."""
    drop_path: float = 0.0
    """Probability in training that a row skips the last block; that of earlier blocks is lower, in proportion to their
    number: stochastic depth (1603.09382), section 3."""

    def validate(self):
        self.require(self.width >= 1, "width", "at least 1")
        self.require(self.depth >= 0, "depth", "at least 0")
        self.require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1")
        self.require(0 <= self.drop_path < 1, "drop_path", "at least 0 and below 1")
        for layer in self.period():
            names = " or ".join(map(repr, layer.block.norm_placements))
            fits = self.norm_placement in layer.block.norm_placements
            self.require(fits, "norm_placement", f"{names} with {type(layer.block).__name__} blocks")
        short = len(self.pattern) <= max(self.depth, 1)
        self.require(short, "depth", f"at least the pattern's length, {len(self.pattern)}")
        whole = self.depth % len(self.period()) == 0
        self.require(
            whole or not self.scan,
            "depth",
            f"a multiple of the pattern's length, {len(self.pattern)} (or set scan to false)",
        )

    def period(self) -> tuple[Layer, ...]:
        """The repeating sequence of blocks; no field of a layer is None."""
        whole = Layer(self.attention, self.mlp, self.norm, self.block)

        def resolved(item):
            given = {"attention": item} if isinstance(item, Attention) else vars(item or Layer())
            return whole.replace(**{name: value for name, value in given.items() if value is not None})

        return tuple(map(resolved, self.pattern)) or (whole,)

    def layers(self) -> tuple[Layer, ...]:
        """Each of the L blocks."""
        period = self.period()
        return tuple(period[layer % len(period)] for layer in range(self.depth))

    def variants(self) -> tuple[Attention, ...]:
        """The attention variant of each of the L blocks."""
        return tuple(layer.attention for layer in self.layers())

    def labels(self) -> tuple[str, ...]:
        """Names of the labels that masks of its blocks read, see `Mask.labels`, in order."""
        return tuple(sorted(frozenset().union(*(variant.labels() for variant in self.variants()))))

    def mup_scaled(self, base: "StackSpec") -> "StackSpec":
        """The stack with its attention scaled by muP relative to the `base` stack: see `Attention.mup_scaled`."""

        def at(item, of_base):
            if isinstance(item, Layer):
                attention, block = (at(getattr(item, name), getattr(of_base, name)) for name in ("attention", "block"))
                return item.replace(attention=attention, block=block)
            return item and item.mup_scaled(self.width, of_base, base.width)

        pattern = tuple(at(*pair) for pair in zip(self.pattern, base.pattern, strict=True))
        attention, block = at(self.attention, base.attention), at(self.block, base.block)
        return self.replace(attention=attention, block=block, pattern=pattern)

    def dims(self, dtype: str) -> Dims:
        """The dimensions that attention variants need.

        Pre-norm output kernels are initialised with a factor 1/sqrt(N), because the residual stream sums N branches,
        usually 2 L: GPT-2, section 2.3. Post-norm blocks normalise each sum and need no factor.
        """
        branches = sum(layer.block.branches for layer in self.layers())
        scale = max(branches, 2) ** -0.5 if self.norm_placement == "pre" else 1.0
        return Dims(self.width, dtype, self.position, output_scale=scale)

    def score_flops(self, keys: float) -> float:
        """Attention FLOPs of all blocks, excluding projections, for one position that sees `keys` keys."""
        return sum(layer.block.score_flops(layer.attention, self.width, keys) for layer in self.layers())

    def causal_score_flops(self, length: int) -> float:
        """Mean `score_flops` over the positions of a row, the t-th seeing t keys, or fewer by the variant."""
        return causal_mean(self.score_flops, length)

    def idle(self) -> int:
        """Feed-forward kernel elements that a given position does not use, over all blocks."""
        return sum(layer.mlp.idle(self.width) for layer in self.layers())

    def init_cache(self, batch_size: int, size: int, dtype: str, source: int = 0) -> tuple:
        """Empty caches for `size` positions, and `source` positions of an encoder: one per block, also if scanned."""
        dims = self.dims(dtype)
        return tuple(layer.block.init_cache(layer.attention, dims, batch_size, size, source) for layer in self.layers())


class Stack(nnx.Module):
    """The module of a `StackSpec`.

    Parameters: `blocks/attention/...` [L, ...] if scanned; `blocks/0/...`, `blocks/1/...` if not. Scanned with a
    p-block pattern: `blocks/0/...` to `blocks/<p - 1>/...`, each [L / p, ...]. Pre-norm stacks have `norm/...` too.
    """

    pipelined: ClassVar[bool] = False
    """Whether to run the blocks in pipeline stages if the layout has any (`pipeline.py`); not with caches."""
    capture: Capture | None = None
    """What `capturing` takes from the next call; not with caches."""
    name: ClassVar[str] = "decoder"
    """The field of the model that describes it, for messages."""

    def __init__(self, spec: StackSpec, *, rngs: nnx.Rngs, dtype: str):
        self.spec, self.dtype = spec, dtype
        dims, period = spec.dims(dtype), spec.period()

        def block(layer):
            parts = Parts(layer.attention, layer.mlp, layer.norm, spec.norm_placement, spec.dropout, dims)
            return lambda key: layer.block.build(parts, nnx.Rngs(key))

        keys = jax.random.split(rngs.params(), max(spec.depth, 1))
        layers = "layers" if self.pipelined else None
        if spec.depth == 0:
            self.blocks = None
        elif not spec.scan:
            self.blocks = nnx.List([block(layer)(key) for layer, key in zip(spec.layers(), keys, strict=True)])
        elif len(period) == 1:
            self.blocks = stack(block(period[0]), keys, layers)
        else:
            p = len(period)
            self.blocks = nnx.List([stack(block(layer), keys[i::p], layers) for i, layer in enumerate(period)])
        held = [] if self.blocks is None else list(self.blocks) if isinstance(self.blocks, nnx.List) else [self.blocks]
        for first, one in enumerate(held):
            number_layers(one, range(first, spec.depth, len(held)), spec.depth)
        self.norm = spec.norm.build(spec.width) if spec.norm_placement == "pre" else None

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any, Losses]:
        """[B, T, D] -> (normalised [B, T, D], cache, summed losses of the blocks)."""
        context = dataclasses.replace(context, inputs_BTD=x_BTD)
        x_BTD = x_BTD.astype(self.dtype)

        def call(block, x_BTD, layer, cache, context=context):
            own = None if key is None else jax.random.fold_in(key, layer)
            return self._with_drop_path(block(x_BTD, context, cache, own), x_BTD, layer, own)

        def captured(block, x_BTD, layer, cache):
            recorder = Recorder(self.capture.wanted)
            x_BTD, _, losses = call(block, x_BTD, layer, cache, dataclasses.replace(context, recorder=recorder))
            return recorder(RESIDUAL_STREAM, x_BTD), self.capture.of_block(recorder, block), losses

        losses = {}
        if self.blocks is None:
            outputs = ()
        elif self.pipelined and cache is None and (layout := sharding.active()) and (schedule := Schedule.of(layout)):
            x_BTD, losses = self.in_stages(x_BTD, context, key, schedule)
        elif self.capture is not None and cache is None:
            x_BTD, outputs, losses = self._over_blocks(captured, x_BTD, None)
        else:
            x_BTD, cache, losses = self._over_blocks(call, x_BTD, cache)
        if self.capture is not None and cache is None:
            self.capture.keep(outputs, self.spec.scan)
        return x_BTD if self.norm is None else self.norm(x_BTD), cache, losses

    def in_stages(
        self, x_BTD: jax.Array, context: Context, key: jax.Array | None, schedule: Schedule
    ) -> tuple[jax.Array, Losses]:
        """[B, T, D] -> ([B, T, D], summed losses of the blocks): the blocks as a pipeline, without the final norm.

        Dropout differs by block and microbatch.

        Raises:
            SpecError: if the blocks are not scanned, or depth or rows do not divide evenly.
        """
        if not self.spec.scan:
            must = f"model.{self.name}.scan must be true, pipeline stages need stacked blocks"
            raise SpecError(f"train.mesh.stage is {schedule.stages}: {must}")
        if self.capture is not None:
            self.capture.refuse(schedule.stages)
        batch_size = x_BTD.shape[0]
        # Training batches divide evenly; an evaluation batch may have any number of rows and is padded.
        x_BTD, context = with_rows((x_BTD, context), -batch_size % schedule.microbatches)
        schedule.check(self.spec.depth, len(self.spec.period()), x_BTD.shape[0], self.name)
        graphdefs, params = self._split()

        def body(params, x_bTD, period, context, microbatch):
            def call(block, x_bTD, layer, cache):
                own = None if key is None else jax.random.fold_in(jax.random.fold_in(key, layer), microbatch)
                return self._with_drop_path(block(x_bTD, context, cache, own), x_bTD, layer, own)

            x_bTD, _, losses = self._over_period(call, graphdefs, params, x_bTD, period)
            return x_bTD, losses

        policy = KEPT[self.spec.remat] if schedule.repeats > 1 else None
        y_BTD, losses = pipeline(body, params, x_BTD, context, schedule, policy)
        return y_BTD[:batch_size], losses

    def _with_drop_path(self, output, x_BTD, layer, key):
        """The output of a block, or its input for the rows that skip it: Huang et al. (1603.09382), eqs. 2 and 4.

        What the block adds is scaled by 1 / (1 - rate) in training, where the paper scales it by 1 - rate afterwards.
        """
        if key is None or self.spec.drop_path == 0:
            return output
        rate = self.spec.drop_path * (layer + 1) / self.spec.depth
        y_BTD, *rest = output
        kept_B11 = jax.random.bernoulli(jax.random.fold_in(key, 2), 1 - rate, (x_BTD.shape[0], 1, 1))
        return (jnp.where(kept_B11, x_BTD + ((y_BTD - x_BTD) / (1 - rate)).astype(x_BTD.dtype), x_BTD), *rest)

    def weights(self, x_BTD: jax.Array, context: Context, chosen_R: jax.Array | None = None) -> dict[int, jax.Array]:
        """Attention weights of the chosen queries by block, float32 [B, H, R, T]; `chosen_R=None` selects all queries.

        Blocks whose attention has no weights are left out.
        """
        context = dataclasses.replace(context, inputs_BTD=x_BTD)

        def call(block, x_BTD, layer, cache):
            able = hasattr(getattr(block, "attention", None), "weights") and hasattr(block, "weights")
            found = block.weights(x_BTD, context, chosen_R) if able else None
            return block(x_BTD, context)[0], found, {}

        if self.blocks is None:
            return {}
        _, outputs, _ = self._over_blocks(call, x_BTD.astype(self.dtype), None)
        if self.spec.scan:  # one stacked output per block of the pattern
            outputs = [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(self._times) for found in outputs]
        return {layer: found for layer, found in enumerate(outputs) if found is not None}

    @property
    def _times(self) -> int:
        return self.spec.depth // len(self.spec.period())

    def _over_blocks(self, call, x_BTD, caches):
        """Threads x through `call(block, x, layer, cache of the layer) -> (x, output, losses)` for every block.

        Returns x, the outputs and the summed losses. There is one output per block; without caches, if scanned, one per
        block of the pattern, stacked.
        """
        # With caches not in a scan: taking those of a block, or its parameters, out of stacked arrays would copy them.
        if caches is not None or not self.spec.scan:
            outputs, losses = [], {}
            for layer in range(self.spec.depth):
                with self._block(layer, x_BTD) as block:
                    x_BTD, output, own = self._remat(call, block)(x_BTD, layer, caches and caches[layer])
                outputs.append(output)
                losses = add(losses, own)
            return x_BTD, tuple(outputs), losses
        graphdefs, params = self._split()

        def body(x_BTD, inputs):
            params, time = inputs
            x_BTD, outputs, losses = self._over_period(call, graphdefs, params, x_BTD, time)
            return x_BTD, (outputs, losses)

        x_BTD, (outputs, losses_T) = jax.lax.scan(body, x_BTD, (params, jnp.arange(self._times)))
        return x_BTD, outputs, {name: jnp.sum(loss_T) for name, loss_T in losses_T.items()}

    def _split(self):
        """The static part and the stacked parameters of each block of the pattern."""
        blocks = self.blocks if len(self.spec.period()) > 1 else [self.blocks]
        return tuple(zip(*[nnx.split(block) for block in blocks], strict=True))

    def _block(self, layer, x_BTD):
        """A context: the block with that number, whose input is x."""
        if not self.spec.scan:
            return contextlib.nullcontext(self.blocks[layer])
        graphdefs, params = self._split()
        time, i = divmod(layer, len(graphdefs))
        own = of_layer(params[i], time)
        if sharding.active() is not None:
            # The compiler would gather the parts of all layers before a loop over tokens, and each device hold them.
            own, _ = jax.lax.optimization_barrier((own, x_BTD))
        return merged(graphdefs[i], own)

    def _over_period(self, call, graphdefs, params, x_BTD, time):
        """`_over_blocks` for one repetition of the pattern, the `time`-th, without caches."""
        outputs, losses = [], {}
        for i, graphdef in enumerate(graphdefs):
            layer = time * len(graphdefs) + i
            with merged(graphdef, params[i]) as block:
                x_BTD, output, own = self._remat(call, block)(x_BTD, layer, None)
            outputs.append(output)
            losses = add(losses, own)
        return x_BTD, tuple(outputs), losses

    def _remat(self, call, block):
        if self.spec.remat == "none":
            return lambda *arguments: call(block, *arguments)
        graphdef, params = nnx.split(block)

        def pure(params, *arguments):
            with merged(graphdef, params) as block:
                return call(block, *arguments)

        checkpointed = jax.checkpoint(pure, policy=KEPT[self.spec.remat], prevent_cse=not self.spec.scan)
        return lambda x_BTD, *arguments: checkpointed(params, checkpoint_name(x_BTD, INPUT), *arguments)
