"""Optimizers on Optax. Weight decay is decoupled and scaled by the learning rate in all of them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax

from polygpt.errors import SpecError
from polygpt.optim.mup import Growth
from polygpt.parameters import name_of
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Optimizer(Spec):
    """Base of all optimizers. A new one defines `build`."""

    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate. A group may say otherwise."""

    def validate(self):
        self.require(self.weight_decay >= 0, "weight_decay", "at least 0")

    def build(self, learning_rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
        """Turns gradients into updates to be added to the parameters."""
        raise NotImplementedError(f"{type(self).__name__} defines no build")

    def width_factor(self, name: str, growth: Growth) -> float:
        """Factor on the learning rate of the parameter of that path under muP (`mup.py`), one of `Growth`'s.

        Raises:
            SpecError: if there is none; an optimizer that derives from this class alone has to say its own.
        """
        raise SpecError(
            f"optim.optimizer: {type(self).__name__} has no rule for muP: define its width_factor, or set model.mup to "
            "null"
        )


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization (1711.05101), algorithm 2."""

    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the denominator."""

    def build(self, learning_rate, weight_decay):
        return optax.adamw(learning_rate, self.beta1, self.beta2, self.epsilon, weight_decay=weight_decay)

    def width_factor(self, name, growth):
        return growth.entrywise


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with momentum: SGDW of Loshchilov and Hutter 2019 (1711.05101), algorithm 1."""

    momentum: float = 0.9
    """Decay of the sum of gradients; 0 for none."""

    def build(self, learning_rate, weight_decay):
        return optax.chain(
            optax.trace(self.momentum) if self.momentum else optax.identity(),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )

    def width_factor(self, name, growth):
        return growth.gradient


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
    """Chen et al. 2023, Symbolic Discovery of Optimization Algorithms (2302.06675), algorithm 2.

    Takes a learning rate 3 to 10 times below AdamW's and a weight decay as many times above.
    """

    beta1: float = 0.9
    """Weight of the momentum in the update whose sign is taken."""
    beta2: float = 0.99
    """Decay of the momentum."""

    def build(self, learning_rate, weight_decay):
        return optax.lion(learning_rate, self.beta1, self.beta2, weight_decay=weight_decay)

    def width_factor(self, name, growth):
        return growth.entrywise


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
    """Shazeer and Stern 2018 (1804.04235), algorithm 4: second moments of matrices as row and column means.

    A stacked kernel [L, in, out] is factored over its two largest axes and clipped as one block.
    """

    decay: float = 0.8
    """Exponent of the second moment's decay, 1 - t ** -decay (section 7.2)."""
    clip: float = 1.0
    """Bound of the root mean square of a block's update, d in section 6."""
    relative: bool = False
    """Whether a block's update is scaled by the root mean square of its parameters (section 8)."""
    min_factored: int = 128
    """Smallest axis that is factored."""

    def build(self, learning_rate, weight_decay):
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=self.decay, min_dim_size_to_factor=self.min_factored),
            optax.clip_by_block_rms(self.clip),
            optax.scale_by_param_block_rms() if self.relative else optax.identity(),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )

    def width_factor(self, name, growth):
        if self.relative:  # its updates shrink with the parameters, which grow in their own way from there
            raise SpecError("Adafactor.relative is true: muP has no rule for that, set it to false")
        return growth.entrywise


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations for hidden matrices, AdamW for everything else.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers". Updates are scaled by `0.2 * sqrt(max(in, out))` so that
    their size is AdamW's and one learning rate serves both (Liu et al. 2025, 2502.16982, section 2.2). The last two
    axes of a kernel are the matrix; each index of the axes before them, such as scanned layers, is a matrix of its own.
    """

    matrices: str = r"^(?!head/)(?!.*convolve/).*kernel$"
    """Regular expression searched in the paths of parameters with two axes or more: those that Muon takes. A depthwise
    convolution is a filter per channel and no matrix: AdamW takes it."""
    momentum: float = 0.95
    """Decay of Muon's momentum; the Nesterov form is used."""
    iterations: int = 5
    """Newton-Schulz iterations."""
    beta1: float = 0.9
    """AdamW's."""
    beta2: float = 0.95
    """AdamW's."""
    epsilon: float = 1e-8
    """AdamW's."""

    def width_factor(self, name, growth):
        return growth.orthogonal if re.search(self.matrices, name) else growth.entrywise

    def build(self, learning_rate, weight_decay):
        def label(path, parameter) -> str:
            matrix = parameter.ndim >= 2 and re.search(self.matrices, name_of(path))
            return "muon" if matrix else "adamw"

        def last_two_axes(updates):
            return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates)

        muon = optax.chain(
            optax.contrib.scale_by_muon(
                beta=self.momentum, ns_steps=self.iterations, weight_dimension_numbers=last_two_axes
            ),
            optax.stateless_with_tree_map(lambda update, _: update * (0.2 * jnp.sqrt(max(update.shape[-2:])))),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )
        adamw = optax.adamw(learning_rate, self.beta1, self.beta2, self.epsilon, weight_decay=weight_decay)
        return optax.partition(
            {"muon": muon, "adamw": adamw}, lambda params: jax.tree_util.tree_map_with_path(label, params)
        )
