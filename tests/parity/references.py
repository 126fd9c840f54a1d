"""Weight maps from the modules of transformers, on random weights, to the parameters of our models."""

import numpy as np

from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.stack import StackSpec
from polygpt.nn.mlp import MLP
from polygpt.nn.norms import LayerNorm

TOLERANCE = 1e-4
"""What float32 results may differ by."""


def compare(got, expected, where: str):
    """Within the tolerance, and of a size beside which the tolerance is small."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape and expected.std() > 0.1, where
    error = np.abs(got - expected).max()
    print(f"{where}: largest error {error:.1e}, standard deviation {expected.std():.2f}")
    assert error < TOLERANCE, where


def randomise(module, seed: int = 0):
    """Draws every weight of a torch module anew, biases and norms included, and sets it to evaluation."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            centre = (
                1.0 if weight.ndim == 1 and "norm" in name.lower().replace("ln_", "norm") and "weight" in name else 0.0
            )
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15 + centre)
    return module.eval()


def array(tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float32)


def linear(module) -> dict:
    """torch's Linear keeps [outputs, inputs]."""
    return {"kernel": array(module.weight).T} | ({} if module.bias is None else {"bias": array(module.bias)})


def conv1d(module, outputs: slice = slice(None)) -> dict:
    """GPT-2's Conv1D keeps [inputs, outputs]; `outputs` takes a part."""
    return {"kernel": array(module.weight)[:, outputs], "bias": array(module.bias)[outputs]}


def norm(module) -> dict:
    """LayerNorm, or an RMSNorm without a bias."""
    bias = getattr(module, "bias", None)
    return {"scale": array(module.weight)} | ({} if bias is None else {"bias": array(bias)})


def encoder_block(layer, attention_norm: str, mlp_norm: str, output: str, mlp) -> dict:
    """A pre-norm encoder block of Whisper or SigLIP."""
    attention = layer.self_attn
    return {
        "attention_norm": norm(getattr(layer, attention_norm)),
        "attention": {
            "query": linear(attention.q_proj),
            "key": linear(attention.k_proj),
            "value": linear(attention.v_proj),
            "output": linear(getattr(attention, output)),
        },
        "mlp_norm": norm(getattr(layer, mlp_norm)),
        "mlp": {"up": linear(mlp.fc1), "down": linear(mlp.fc2)},
    }


def listed(blocks) -> dict:
    """Blocks of a model that is not scanned."""
    return {str(i): block for i, block in enumerate(blocks)}


def encoder(width: int, depth: int, heads: int, activation: str, epsilon: float, **fields) -> StackSpec:
    """A tower as in the reference encoders, unrolled so that each layer can be looked at."""
    attention = MultiHead(heads, bias=True, key_bias=fields.pop("key_bias", None))
    return StackSpec(width, depth, attention, MLP(activation=activation), LayerNorm(epsilon), scan=False, **fields)
