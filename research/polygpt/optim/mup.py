"""muP, the maximal update parametrization: what is tuned on a narrow model holds for a wide one.

Yang et al., Tensor Programs V (2203.03466). Learning rate, schedule, weight decay and initial sizes are those of a base
model; every parameter is scaled by how much wider it is here. At the base's own width all factors are 1. With m_in and
m_out the growth of a parameter's fan in and fan out, the paper's table 3 for Adam, in which every entry of an update
has the size of the learning rate, is:

    kind    what grows      such as                                      initial values       learning rate
    hidden  both            queries, values, MLPs, connectors            as 1 / sqrt(fan in)  1 / m_in
    output  the fan in      an untied head, routers, low-rank maps       / sqrt(m_in)         1 / m_in
    input   the fan out     embeddings, patches, biases, norms, gates    as in the base       1
    fixed   neither                                                      as in the base       1

Initial values of hidden kernels shrink with the fan in by themselves (`nn/linear.py`); those of an output fall as 1/fan
in altogether. Two things are the model's own: scores of attention are divided by the width d of a head, and no more by
its root, as sqrt(d of the base) / d (definition 4.1 and appendix B.1); logits of a tied head are divided by the growth
of the model width, as in the paper's table 8, and its table of embeddings starts as the base's.

Weight decay, which all optimizers here multiply by the learning rate, is divided by the factor of the rate: so their
product, and the time over which a parameter forgets, is that of the base. This is what the authors' code does
(`MuAdam` of github.com/microsoft/mup), and what transfer needs: Wang and Aitchison (2405.13698), Kosson et al.
(2510.19093). The bound of the gradient's norm is left as it is, and so is Adam's epsilon: it has to be small beside
gradients, which fall as 1/m.

Other optimizers: see `Growth`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import jax

from polygpt.errors import SpecError
from polygpt.overrides import replaced
from polygpt.parameters import Traits, name_of
from polygpt.spec import Spec

Model = TypeVar("Model", bound=Spec)


@dataclasses.dataclass(frozen=True)
class MuP(Spec):
    """Maximal update parametrization beside a base model, on which learning rate and weight decay were tuned."""

    base: Mapping[str, int | float]
    """What makes the base model of this one: its widths by their names, {"decoder.width": 64}. Heads may be fewer too
    or narrower, but depth, experts and positions are the same."""

    def base_of(self, model: Model) -> Model:
        """The base model of `model`, itself without muP. Raises SpecError for a name that it does not have."""
        try:
            return replaced(model.replace(mup=None), self.base)
        except SpecError as error:
            raise SpecError(f"model.mup.base: {str(error).removeprefix('--')}") from None

    def about(self) -> str:
        """A line that names the base."""
        return "muP, beside the base model of " + ", ".join(f"{name} {value}" for name, value in self.base.items())


@dataclasses.dataclass(frozen=True)
class Growth:
    """How much wider a parameter is than in the base model, and the factors on learning rates that follow.

    All make the same of an update: it changes what comes out by as much as in the base, neither more nor vanishingly
    little. Its spectral norm is then as sqrt(fan out / fan in): Yang, Simon and Bernstein (2310.17813), condition 1.

    Attributes:
        fans: fan in and fan out. Vectors, and tables of which rows are looked up, have a fan in of 1.
        base: those of the base model.
        shrunk: how much smaller its initial values are than in the base by its own initialiser, if it should not be.
    """

    fans: tuple[int, int]
    base: tuple[int, int]
    shrunk: float = 1.0

    @property
    def inputs(self) -> float:
        """m_in."""
        return self.fans[0] / self.base[0]

    @property
    def outputs(self) -> float:
        """m_out."""
        return self.fans[1] / self.base[1]

    @property
    def kind(self) -> Literal["hidden", "output", "input", "fixed"]:
        """Which of its sides grow."""
        if self.inputs == 1:
            return "fixed" if self.outputs == 1 else "input"
        return "output" if self.outputs == 1 else "hidden"

    @property
    def initial(self) -> float:
        """Factor on initial values, beside the 1 / sqrt(fan in) of a kernel."""
        return self.inputs**-0.5 if self.kind == "output" else 1 / self.shrunk

    @property
    def entrywise(self) -> float:
        """On the rate of optimizers whose updates have entries of one size: Adam, Lion, Adafactor. Table 3, "Adam"."""
        return 1 / self.inputs

    @property
    def gradient(self) -> float:
        """On the rate of optimizers whose updates are as large as gradients are. Table 3, "SGD"."""
        return self.outputs / self.inputs

    @property
    def orthogonal(self) -> float:
        """On the rate where updates are orthogonal matrices times sqrt(max(fan in, fan out)), as those of `Muon` are.

        2310.17813: that is their spectral norm, and sqrt(fan out / fan in) is wanted.
        """
        return math.sqrt(self.gradient * max(self.base) / max(self.fans))


def growth(traits: Any, base: Any) -> Any:
    """The `Growth` of each parameter, in a tree like `traits`. Constants do not grow.

    A parameter called "kernel" is [..., fan in, fan out], as everywhere; others act entry by entry, or are looked up.

    Args:
        traits: `Model.traits`.
        base: those of the base model.

    Raises:
        SpecError: where the two differ in more than widths.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(traits)
    others, base_structure = jax.tree_util.tree_flatten_with_path(base)
    if structure != base_structure:
        own, other = ({name_of(path) for path, _ in found} for found in (leaves, others))
        raise SpecError(f"model.mup.base: {min(own ^ other)} is in one of the models alone: only widths may differ")
    return structure.unflatten(
        [_growth(name_of(path), own, other) for (path, own), (_, other) in zip(leaves, others, strict=True)]
    )


def _growth(name: str, own: Traits, of_base: Traits) -> Growth:
    if not own.trained:
        return Growth((1, 1), (1, 1))
    shape, base = own.shape, of_base.shape
    wider = [i for i, (size, other) in enumerate(zip(shape, base, strict=True)) if size != other]
    fault = f"model.mup.base: {name} is {shape}, and {base} in the base model"
    if name.endswith("kernel"):
        if any(i < len(shape) - 2 for i in wider):
            raise SpecError(f"{fault}: only widths may differ")
        return Growth(shape[-2:], base[-2:])
    if len(wider) > 1:
        raise SpecError(f"{fault}: muP has no rule for two axes that grow, except of a kernel [..., fan in, fan out]")
    shrunk = own.std / of_base.std if own.std else 1.0
    return Growth(*(((1, shape[wider[0]]), (1, base[wider[0]])) if wider else ((1, 1), (1, 1))), shrunk)
