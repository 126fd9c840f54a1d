"""Routing of positions to experts, and the auxiliary losses that keep it balanced.

Axis letters: E experts, k choices per position, M modalities with reserved experts.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.nn.losses import Losses


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The experts chosen for each position.

    Attributes:
        expert_BTk: int32, the chosen experts, the likeliest first; E (out of range) at padding.
        weight_BTk: float32, the factor on each expert's output; 0 at padding.
    """

    expert_BTk: jax.Array
    weight_BTk: jax.Array


class Router(nnx.Module):
    """A linear map to expert logits, in float32 whatever the model's dtype: Switch (2101.03961), section 2.4."""

    def __init__(self, width: int, experts: int, *, rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), (width, experts)) * width**-0.5
        self.kernel = nnx.Param(kernel, axes=("width", None))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, E]."""
        highest = jax.lax.Precision.HIGHEST  # reduced matmul precision on accelerators could change choices
        return jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), self.kernel[...], precision=highest)


def allowed(groups: tuple[int, ...], experts: int) -> jax.Array:
    """bool [M, E], the experts that each modality may choose: reserved groups in order, then those open to all."""
    expert_E, rows, start = jnp.arange(experts), [], 0
    for size in groups or (0,):
        own_E = (expert_E >= start) & (expert_E < start + size)
        rows.append(own_E | (expert_E >= sum(groups)))
        start += size
    return jnp.stack(rows)


def likeliest(logits_BTE: jax.Array, k: int) -> jax.Array:
    """int32 [B, T, k]: the experts with the largest logits, the largest first.

    Uses repeated argmax because XLA does not partition `top_k`: it would all-gather the logits of all positions.
    """
    left_BTE, found = jax.lax.stop_gradient(logits_BTE), []
    for _ in range(k):
        found.append(jnp.argmax(left_BTE, axis=-1).astype(jnp.int32))
        here_BTE = found[-1][..., None] == jnp.arange(logits_BTE.shape[-1], dtype=jnp.int32)[None, None]
        left_BTE = jnp.where(here_BTE, -jnp.inf, left_BTE)
    return jnp.stack(found, axis=-1)


def route(
    logits_BTE: jax.Array,
    real_BT: jax.Array,
    modality_BT: jax.Array,
    *,
    top_k: int,
    normalize: bool,
    groups: tuple[int, ...],
    balance: Literal["row", "batch"],
) -> tuple[Routing, Losses]:
    """Chooses experts for every position and computes the losses `load_balance` and `router_z`.

    Load balance: E sum_e f_e P_e, where f_e is the fraction of choices that fall on expert e and P_e its mean
    probability: Fedus et al., Switch (2101.03961), eq. 4 to 6; 1 if all experts are used equally. f and P are averaged
    over each row, like the groups of GShard (2006.16668, algorithm 1), or over all rows; with `groups`, over the
    positions of each modality, E being the number of experts that it may choose.

    Router z: (logsumexp of the logits)^2, Zoph et al., ST-MoE (2202.08906), eq. 5.

    Like all losses of layers, both are sums over the real positions.
    """
    E = logits_BTE.shape[-1]
    allowed_ME = allowed(groups, E)
    member_BTM = real_BT[..., None]
    if groups:
        modality_BT = jnp.clip(modality_BT, 0, len(groups) - 1)  # padding has none
        logits_BTE = jnp.where(allowed_ME[modality_BT], logits_BTE, -jnp.inf)
        member_BTM = member_BTM & (modality_BT[..., None] == jnp.arange(len(groups))[None, None])
    probability_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    expert_BTk = likeliest(logits_BTE, top_k)
    is_chosen_BTkE = expert_BTk[..., None] == jnp.arange(E, dtype=jnp.int32)[None, None, None]
    weight_BTk = jnp.sum(jnp.where(is_chosen_BTkE, probability_BTE[:, :, None], 0.0), axis=-1)
    if normalize:
        weight_BTk = weight_BTk / jnp.sum(weight_BTk, axis=-1, keepdims=True)
    real_BT1 = real_BT[..., None]
    routing = Routing(jnp.where(real_BT1, expert_BTk, E), jnp.where(real_BT1, weight_BTk, 0.0))

    chosen_BTE = jnp.sum(is_chosen_BTkE, axis=2, dtype=jnp.float32)
    member_BTM = member_BTM.astype(jnp.float32)
    positions_BM = jnp.sum(member_BTM, axis=1)
    chosen_BME = jnp.einsum("btm,bte->bme", member_BTM, chosen_BTE)
    probability_BME = jnp.einsum("btm,bte->bme", member_BTM, probability_BTE)
    if balance == "batch":
        sums = (positions_BM, chosen_BME, probability_BME)
        positions_BM, chosen_BME, probability_BME = (jnp.sum(x, axis=0, keepdims=True) for x in sums)
    experts_M = jnp.sum(allowed_ME, axis=-1, dtype=jnp.float32)
    # n E f P, with f = chosen / (k n) and P = probability / n.
    balance_BM = jnp.sum(chosen_BME * probability_BME, axis=-1) * experts_M[None] / jnp.maximum(top_k * positions_BM, 1)
    z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
    return routing, {"load_balance": jnp.sum(balance_BM), "router_z": jnp.sum(jnp.where(real_BT, z_BT, 0.0))}
