"""A text GPT in PyTorch: GPT-2's form, with fused attention, as text_step.py and gpu.py compare with."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """A pre-norm block of width D with H heads."""

    def __init__(self, D: int, H: int):
        super().__init__()
        self.heads = H
        self.attention_norm, self.mlp_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.output = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(self.attention_norm(x)).chunk(3, -1)
        heads = [part.view(B, T, self.heads, -1).transpose(1, 2) for part in qkv]
        y = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.output(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class GPT(nn.Module):
    """Tokens [B, T] to logits [B, T, V]: learned positions, biases, a tied head."""

    def __init__(self, depth: int, width: int, heads: int, length: int, vocabulary: int):
        super().__init__()
        self.text, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.text(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return self.norm(self.blocks(x)) @ self.text.weight.T
