"""Activations inside a model, by the name of their site: which there are, and what takes them out of a forward pass.

A site is a stack of blocks and a name: "residual", the output of each block, or what blocks pass through
`Context.record`: "attention" and "mlp", the output of each branch, before dropout and a norm after it. The stack is
named by its path in the model: sites of the decoder have no prefix, those of an adapter's tower begin with
"adapters/image/". The site "media/image", [B, N, P, D], has the embeddings of media as they enter the row. Nothing is
computed, kept or compiled differently for sites that are not asked for.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.errors import SpecError
from polygpt.spec import nearest

RESIDUAL_STREAM = "residual"
"""The name of the output of each block."""
NAMES = (RESIDUAL_STREAM, "attention", "mlp")
"""What the blocks of this package have; others may record more."""
MEDIA = "media/"
"""What the sites of embeddings of media begin with."""
MAIN = "decoder"
"""The stack whose sites have no prefix."""


@dataclasses.dataclass(eq=False)
class Recorder:
    """Takes what is wanted from one call of a block: part of the pure function that the call is.

    Attributes:
        wanted: names.
        found: activations by name, of those wanted.
        offered: all names that the block has recorded.
    """

    wanted: Sequence[str]
    found: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    offered: list[str] = dataclasses.field(default_factory=list)

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        """Takes the value if it is wanted; returns the value that the block is to use."""
        if name in self.offered:
            raise SpecError(f"a block records {name!r} twice: give each activation a name of its own")
        self.offered.append(name)
        if name in self.wanted:
            self.found[name] = value
        return value


@dataclasses.dataclass(eq=False)
class Capture:
    """What is captured from one stack in one forward pass.

    Attributes:
        prefix: of its sites, such as "adapters/image/".
        wanted: names without the prefix.
        found: by site, [L, ...]: the activations of all blocks.
    """

    prefix: str
    wanted: Sequence[str]
    found: dict[str, jax.Array]

    def of_block(self, recorder: Recorder, block: Any) -> dict[str, jax.Array]:
        """What was recorded in the call of a block. Raises SpecError if something wanted is missing."""
        for name in self.wanted:
            if name not in recorder.found:
                known = [self.prefix + other for other in recorder.offered]
                raise SpecError(
                    f"no site {self.prefix + name!r}: {type(block).__name__} does not record it; "
                    f"{nearest(self.prefix + name, known)}"
                )
        return recorder.found

    def refuse(self, stages: int) -> NoReturn:
        """Raises SpecError: each pipeline stage has only its own blocks."""
        raise SpecError(f"train.mesh.stage is {stages}: it must be 1 to capture {self.wanted[0]!r} inside the blocks")

    def keep(self, outputs: Sequence[dict[str, jax.Array]], scanned: bool) -> None:
        """Joins what the blocks gave: one value for each block or, if scanned, a stack for each block of the pattern.

        Raises:
            SpecError: if the stack has no blocks, runs for the second time, or its blocks record different shapes.
        """
        for name in self.wanted:
            site = self.prefix + name
            if not outputs:
                raise SpecError(f"no site {site!r}: its stack has no blocks")
            if site in self.found:
                raise SpecError(f"{site!r} is computed twice in a forward pass: only stacks that run once have sites")
            values = [output[name] for output in outputs]
            if len({value.shape for value in values}) > 1:
                raise SpecError(f"{site!r} has not the same shape in all blocks: name it differently in each kind")
            stacked = jnp.stack(values, axis=int(scanned))
            self.found[site] = stacked.reshape(-1, *values[0].shape[1:]) if scanned else stacked


@contextlib.contextmanager
def capturing(module: nnx.Module, sites: Sequence[str]) -> Iterator[dict[str, jax.Array]]:
    """Within it, one forward pass of a model's module fills the activations of these sites, by site, [L, ...].

    The module must belong to this pass alone, as `parameters.merged` makes it. Stacks must run outside of
    transformations of JAX that a module applies itself.

    Raises:
        SpecError: for a site that does not exist, with the nearest names, or one that the pass did not compute.
    """
    stacks = {_prefix(path): stack for path, stack in nnx.iter_modules(module) if hasattr(stack, "capture")}
    found: dict[str, jax.Array] = {}
    wanted: dict[str, list[str]] = {}
    for site in dict.fromkeys(sites):
        prefix, slash, name = site.rpartition("/")
        if prefix + slash not in stacks:
            known = [other + name for other in stacks for name in (stacks[other].names if other == MEDIA else NAMES)]
            raise SpecError(f"no site {site!r}: {nearest(site, known)}")
        if prefix + slash == MEDIA and name not in stacks[MEDIA].names:
            raise SpecError(f"no site {site!r}: {nearest(site, [MEDIA + other for other in stacks[MEDIA].names])}")
        wanted.setdefault(prefix + slash, []).append(name)
    try:
        for prefix, names in wanted.items():
            stacks[prefix].capture = Capture(prefix, names, found)
        yield found
    finally:
        for prefix in wanted:
            stacks[prefix].capture = None
    if missing := next((site for site in sites if site not in found), None):
        raise SpecError(f"{missing!r} is not computed: the batch has no media that its stack reads")


def _prefix(path: Sequence[Any]) -> str:
    """What the sites of the stack at a path of the module begin with."""
    parts = [str(part) for part in path]
    if not parts:
        return MEDIA  # the model itself
    parts = parts[:-1] if len(parts) > 1 and parts[-1] == "tower" else parts
    return "" if parts == [MAIN] else "".join(f"{part}/" for part in parts)
