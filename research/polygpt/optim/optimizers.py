"""Optimizers built on Optax. All use decoupled weight decay, scaled by the learning rate."""

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
    """Decoupled weight decay, multiplied by the learning rate. A group may override it."""

    def validate(self):
        self.require(self.weight_decay >= 0, "weight_decay", "at least 0")

    def build(self, learning_rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
        """The transformation of gradients to additive updates."""
        raise NotImplementedError(f"{type(self).__name__} defines no build")

    def width_factor(self, name: str, growth: Growth) -> float:
        """Learning-rate factor of the parameter at path `name` under muP (`mup.py`), one of those of `Growth`.

        Raises:
            SpecError: by default; a new optimizer must define its own factor to support muP.
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
    """Decay of the sum of gradients; 0 disables momentum."""

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

    Use a learning rate 3 to 10 times lower than for AdamW, and a weight decay higher by the same factor.
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
    """Maximum root mean square of a block's update, d in section 6."""
    relative: bool = False
    """Whether to scale a block's update by the root mean square of its parameters (section 8)."""
    min_factored: int = 128
    """Minimum size of the axes that are factored."""

    def build(self, learning_rate, weight_decay):
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=self.decay, min_dim_size_to_factor=self.min_factored),
            optax.clip_by_block_rms(self.clip),
            optax.scale_by_param_block_rms() if self.relative else optax.identity(),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )

    def width_factor(self, name, growth):
        if self.relative:  # updates scale with the parameters, for which muP has no rule
            raise SpecError("Adafactor.relative is true: muP has no rule for it, set it to false")
        return growth.entrywise


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations for hidden matrices, AdamW for everything else.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers". Updates are scaled by `0.2 * sqrt(max(in, out))` to have
    the size of AdamW's, so that one learning rate serves both (Liu et al. 2025, 2502.16982, section 2.2). The last two
    axes of a kernel form the matrix; leading axes, such as that of scanned layers, are batch axes.
    """

    matrices: str = r"^(?!heads?/)(?!.*convolve/).*kernel$"
    """Regular expression of the paths that Muon optimises, if they have at least two axes. AdamW takes the rest,
    including depthwise convolutions, which are one filter per channel and no matrix."""
    momentum: float = 0.95
    """Decay of Muon's momentum, in Nesterov form."""
    iterations: int = 5
    """Number of Newton-Schulz iterations."""
    beta1: float = 0.9
    """beta1 of AdamW."""
    beta2: float = 0.95
    """beta2 of AdamW."""
    epsilon: float = 1e-8
    """epsilon of AdamW."""

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
