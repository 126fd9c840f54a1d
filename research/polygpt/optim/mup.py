"""muP, the maximal update parametrization: hyperparameters tuned on a narrow model transfer to a wide one.

Yang et al., Tensor Programs V (2203.03466). Learning rate, schedule, weight decay and initial scale are those of a base
model; factors for each parameter follow from how much wider it is than in the base. At the base width all factors are
1. Let m_in and m_out be the growth of a parameter's fan in and fan out. Table 3 of the paper for Adam, whose updates
have entries of the size of the learning rate, reads:

    kind    what grows      such as                                      initial values       learning rate
    hidden  both            queries, values, MLPs, connectors            as 1 / sqrt(fan in)  1 / m_in
    output  the fan in      an untied head, routers, low-rank maps       / sqrt(m_in)         1 / m_in
    input   the fan out     embeddings, patches, biases, norms, gates    as in the base       1
    fixed   neither                                                      as in the base       1

Initial values of hidden kernels already shrink with the fan in (`nn/linear.py`); those of output kernels shrink as
1/fan in overall. The model itself changes in two ways. Attention scores are scaled by sqrt(d_base) / d, with d the head
width, instead of 1 / sqrt(d) (definition 4.1 and appendix B.1). Logits of a tied head are divided by the growth of the
model width, as in the paper's table 8, and its embedding table is initialised like the base's.

Weight decay, which all optimizers here multiply by the learning rate, is divided by the learning-rate factor, so that
their product, and hence the time scale of decay, equals the base's. The authors' code does the same (`MuAdam` of
github.com/microsoft/mup), and transfer requires it: Wang and Aitchison (2405.13698), Kosson et al. (2510.19093).
Gradient clipping and Adam's epsilon are unchanged; epsilon must be small relative to gradients, which shrink as 1/m.

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
    """Maximal update parametrization relative to a base model, on which learning rate and weight decay were tuned."""

    base: Mapping[str, int | float]
    """Fields that turn this model into the base model: its widths by name, such as {"decoder.width": 64}. The base may
    also have fewer or narrower heads, but must have the same depth, experts and positions."""

    def base_of(self, model: Model) -> Model:
        """The base model of `model`, without muP. Raises SpecError for a field that the model does not have."""
        try:
            return replaced(model.replace(mup=None), self.base)
        except SpecError as error:
            raise SpecError(f"model.mup.base: {str(error).removeprefix('--')}") from None

    def summary(self) -> str:
        """A one-line description."""
        return "muP, relative to a base model with " + ", ".join(f"{name} {value}" for name, value in self.base.items())


@dataclasses.dataclass(frozen=True)
class Growth:
    """How much wider a parameter is than in the base model, and the resulting factors on the learning rate.

    The factors keep the effect of an update on the layer's output independent of width: the spectral norm of the update
    scales as sqrt(fan out / fan in). Yang, Simon and Bernstein (2310.17813), condition 1.

    Attributes:
        fans: fan in and fan out. Vectors and lookup tables have a fan in of 1.
        base: fan in and fan out in the base model.
        shrunk: ratio of the initial standard deviation to the base's, to be undone for parameters other than kernels.
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
        """Which of its two fans grow."""
        if self.inputs == 1:
            return "fixed" if self.outputs == 1 else "input"
        return "output" if self.outputs == 1 else "hidden"

    @property
    def initial(self) -> float:
        """Factor on initial values, in addition to the 1 / sqrt(fan in) of a kernel."""
        return self.inputs**-0.5 if self.kind == "output" else 1 / self.shrunk

    @property
    def entrywise(self) -> float:
        """Learning-rate factor if updates have entries of fixed size: Adam, Lion, Adafactor. Table 3, "Adam"."""
        return 1 / self.inputs

    @property
    def gradient(self) -> float:
        """Learning-rate factor if updates are proportional to gradients. Table 3, "SGD"."""
        return self.outputs / self.inputs

    @property
    def orthogonal(self) -> float:
        """Learning-rate factor if updates are orthogonal matrices times sqrt(max(fan in, fan out)), as for `Muon`.

        Their spectral norm is sqrt(max(fan in, fan out)); it should scale as sqrt(fan out / fan in) (2310.17813).
        """
        return math.sqrt(self.gradient * max(self.base) / max(self.fans))


def growth(traits: Any, base: Any) -> Any:
    """The `Growth` of each parameter, in a tree like `traits`. Constants do not grow.

    Parameters whose `Traits.linear` is set are [..., fan in, fan out]; others act elementwise or are lookup tables.

    Args:
        traits: `Model.traits`.
        base: `Model.traits` of the base model.

    Raises:
        SpecError: if the two models differ in more than widths.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(traits)
    others, base_structure = jax.tree_util.tree_flatten_with_path(base)
    if structure != base_structure:
        own, other = ({name_of(path) for path, _ in found} for found in (leaves, others))
        raise SpecError(f"model.mup.base: only one of the models has {min(own ^ other)}: only widths may differ")
    return structure.unflatten(
        [_growth(name_of(path), own, other) for (path, own), (_, other) in zip(leaves, others, strict=True)]
    )


def _growth(name: str, own: Traits, of_base: Traits) -> Growth:
    if not own.trained:
        return Growth((1, 1), (1, 1))
    shape, base = own.shape, of_base.shape
    wider = [i for i, (size, other) in enumerate(zip(shape, base, strict=True)) if size != other]
    fault = f"model.mup.base: {name} has shape {shape}, and {base} in the base model"
    if own.linear:
        if any(i < len(shape) - 2 for i in wider):
            raise SpecError(f"{fault}: only widths may differ")
        return Growth(shape[-2:], base[-2:])
    if len(wider) > 1:
        raise SpecError(f"{fault}: only a linear map [..., fan in, fan out] may grow in two axes under muP")
    shrunk = own.std / of_base.std if own.std else 1.0
    return Growth(*(((1, shape[wider[0]]), (1, base[wider[0]])) if wider else ((1, 1), (1, 1))), shrunk)
