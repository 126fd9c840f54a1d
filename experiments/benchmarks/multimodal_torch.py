"""The quickstart's model written in PyTorch, as one would write it there, with the weights of polygpt's.

Convolutions and linear layers are PyTorch's own, queries, keys and values are one product, attention is
`scaled_dot_product_attention` with a mask, AdamW is fused. Shapes are static, as in polygpt: a row has room for six
pictures and six recordings.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

AUDIO, IMAGE = 2, 1
"""Numbers of the modalities in the quickstart's rows."""


class Block(nn.Module):
    """A pre-norm block: attention and a feed-forward layer."""

    def __init__(self, width: int, heads: int, hidden: int, gated: bool):
        super().__init__()
        norm = (lambda: nn.RMSNorm(width, eps=1e-6)) if gated else (lambda: nn.LayerNorm(width))
        self.width, self.heads, self.gated = width, heads, gated
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.qkv, self.output = nn.Linear(width, 3 * width, bias=not gated), nn.Linear(width, width, bias=not gated)
        self.up = nn.Linear(width, hidden * (2 if gated else 1), bias=not gated)
        self.down = nn.Linear(hidden, width, bias=not gated)

    def forward(self, x, mask, turn=None):
        B, T, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, T, 3, self.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        if turn is not None:
            q, k = turn(q), turn(k)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.output(y.transpose(1, 2).reshape(B, T, self.width))
        h = self.up(self.mlp_norm(x))
        if self.gated:
            gate, h = h.chunk(2, -1)
            h = functional.silu(gate) * h
        else:
            h = functional.gelu(h, approximate="tanh")
        return x + self.down(h)


class Image(nn.Module):
    """Patches, position vectors, one block, a projection."""

    def __init__(self, width: int, outputs: int, patch: int, positions: int):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros(positions, width))
        self.block, self.norm = Block(width, 4, 4 * width, gated=False), nn.LayerNorm(width)
        self.connector = nn.Linear(width, outputs)

    def forward(self, features, length):
        B, N, H, W, C = features.shape
        pixels = torch.where((length > 0)[..., None, None, None], features, 0.0).view(B * N, H, W, C)
        x = self.patch(pixels.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2) + self.position
        return self.connector(self.norm(self.block(x, None))).view(B, -1, self.connector.out_features)


class Audio(nn.Module):
    """Two convolutions, sinusoidal positions, one block, two positions folded into one, a projection."""

    def __init__(self, mels: int, width: int, outputs: int, fold: int, positions: int):
        super().__init__()
        self.fold, self.inner = fold, fold * positions
        self.first = nn.Conv1d(mels, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, stride=2, padding=1)
        frequency = 10000.0 ** (-torch.arange(width // 2) / (width // 2 - 1))
        angle = torch.arange(self.inner)[:, None] * frequency
        self.register_buffer("position", torch.cat([angle.sin(), angle.cos()], -1))
        self.block, self.norm = Block(width, 4, 4 * width, gated=False), nn.LayerNorm(width)
        self.connector = nn.Linear(fold * width, outputs)

    def forward(self, features, length):
        B, N, frames, M = features.shape
        inner = length.reshape(-1, 1) * self.fold
        mel = functional.pad(features.view(B * N, frames, M), (0, 0, 0, 2 * self.inner - frames))
        mel = torch.where((torch.arange(2 * self.inner) < 2 * inner)[..., None], mel, 0.0)
        x = functional.gelu(self.second(functional.gelu(self.first(mel.transpose(1, 2)))))
        real = torch.arange(self.inner) < inner
        mask = (real[:, :, None] == real[:, None, :])[:, None]
        x = self.norm(self.block(x.transpose(1, 2) + self.position, mask))
        return self.connector(x.reshape(B * N, self.inner // self.fold, -1)).view(B, -1, self.connector.out_features)


class Quickstart(nn.Module):
    """The whole model: rows of text, pictures and recordings to logits."""

    def __init__(self, spec, vocabulary: int):
        super().__init__()
        decoder, image, audio = spec.decoder, spec.adapters["image"], spec.adapters["audio"]
        width, heads = decoder.width, decoder.attention.heads
        self.text = nn.Embedding(vocabulary, width)
        self.image = Image(image.tower.width, width, image.patch, image.positions)
        self.audio = Audio(audio.features.shape[-1], audio.tower.width, width, audio.fold, audio.positions)
        self.modality = nn.ParameterDict({name: torch.zeros(width) for name in ("image", "audio")})
        hidden = decoder.mlp.hidden_width(width)
        self.blocks = nn.ModuleList([Block(width, heads, hidden, gated=True) for _ in range(decoder.depth)])
        self.norm = nn.RMSNorm(width, eps=1e-6)
        d = width // heads
        self.register_buffer("frequency", 10000.0 ** (-torch.arange(d // 2) / (d // 2)))

    def forward(self, row):
        modality = row["modality"][..., None]
        x = torch.where(modality == 0, self.text(row["tokens"]), 0.0)
        for number, name, adapter in ((IMAGE, "image", self.image), (AUDIO, "audio", self.audio)):
            media = adapter(row[name], row[f"{name}_length"]) + self.modality[name]
            slot = torch.where(row["modality"] == number, row["slot"], 0)
            placed = media.gather(1, slot[..., None].expand(-1, -1, media.shape[-1]))
            x = torch.where(modality == number, placed, x)
        segment, span = row["segment"], row["span"]
        index = torch.arange(x.shape[1])
        same_span = (span[:, :, None] == span[:, None, :]) & (span > 0)[:, :, None]
        mask = (segment[:, :, None] == segment[:, None, :]) & ((index[:, None] >= index) | same_span)
        angle = row["position"][:, None, :, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()

        def turn(part):
            low, high = part.chunk(2, -1)
            return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

        for block in self.blocks:
            x = block(x, mask[:, None], turn)
        return self.norm(x) @ self.text.weight.T


def row_of(batch) -> dict:
    """A batch of the loader as tensors by name."""
    names = ("tokens", "modality", "slot", "position", "segment", "span", "target", "weight")
    arrays = {name: np.asarray(getattr(batch, f"{name}_BT")) for name in names}
    for name, media in batch.media.items():
        arrays |= {name: np.asarray(media.features), f"{name}_length": np.asarray(media.length_BN)}
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    return {name: one if one.is_floating_point() else one.long() for name, one in tensors.items()}


def fill(model: Quickstart, weights: dict[str, np.ndarray]) -> None:
    """Copies the parameters of polygpt's model, by their paths; every one is used once."""
    left = dict(weights)

    def take(*paths: str) -> torch.Tensor:
        parts = [left.pop(path) for path in paths]
        return torch.from_numpy(np.concatenate([part.T if part.ndim == 2 else part for part in parts]).copy())

    def linear(to, *paths: str) -> None:
        to.weight.copy_(take(*(f"{path}/kernel" for path in paths)).view_as(to.weight))
        if to.bias is not None:
            to.bias.copy_(take(*(f"{path}/bias" for path in paths)))

    def norm(to, path: str) -> None:
        to.weight.copy_(take(f"{path}/scale"))
        if isinstance(to, nn.LayerNorm):
            to.bias.copy_(take(f"{path}/bias"))

    def block(to: Block, path: str) -> None:
        norm(to.attention_norm, f"{path}/attention_norm")
        norm(to.mlp_norm, f"{path}/mlp_norm")
        linear(to.qkv, *(f"{path}/attention/{name}" for name in ("query", "key", "value")))
        linear(to.output, f"{path}/attention/output")
        linear(to.up, *(f"{path}/mlp/{name}" for name in (("gate", "up") if to.gated else ("up",))))
        linear(to.down, f"{path}/mlp/down")

    def convolution(to, path: str, order: tuple[int, ...]) -> None:
        """A kernel whose inputs are pixels or frames outermost, channels innermost."""
        outputs, inputs, *size = to.weight.shape
        to.weight.copy_(take(f"{path}/kernel").view(outputs, *size, inputs).permute(*order))
        to.bias.copy_(take(f"{path}/bias"))

    with torch.no_grad():
        model.text.weight.copy_(torch.from_numpy(left.pop("text/table").copy()))
        for name, parameter in model.modality.items():
            parameter.copy_(take(f"modality/{name}"))
        for i, one in enumerate(model.blocks):
            block(one, f"decoder/blocks/{i}")
        norm(model.norm, "decoder/norm")
        convolution(model.image.patch, "adapters/image/patch", (0, 3, 1, 2))
        convolution(model.audio.first, "adapters/audio/first/linear", (0, 2, 1))
        convolution(model.audio.second, "adapters/audio/second/linear", (0, 2, 1))
        model.image.position.copy_(torch.from_numpy(left.pop("adapters/image/tower/position/table").copy()))
        for name, tower in (("image", model.image), ("audio", model.audio)):
            block(tower.block, f"adapters/{name}/tower/blocks/0")
            norm(tower.norm, f"adapters/{name}/tower/norm")
            linear(tower.connector, f"adapters/{name}/connector/output")
    if left:
        raise RuntimeError(f"parameters without a counterpart in PyTorch: {', '.join(left)}")


def stepper(model: Quickstart, optim, rows: list[dict], compiled: bool):
    """A function that trains on the next row and returns (loss, gradient norm)."""
    matrices = [one for name, one in model.named_parameters() if one.ndim >= 2 and decays(name)]
    others = [one for name, one in model.named_parameters() if not (one.ndim >= 2 and decays(name))]
    adam = optim.optimizer
    groups = [{"params": matrices, "weight_decay": adam.weight_decay}, {"params": others, "weight_decay": 0.0}]
    options = {"betas": (adam.beta1, adam.beta2), "eps": adam.epsilon, "fused": True}
    optimizer = torch.optim.AdamW(groups, 1e-3, **options)
    forward = torch.compile(model) if compiled else model
    done = 0

    def step() -> tuple[float, float]:
        nonlocal done
        row = rows[done % len(rows)]
        done += 1
        optimizer.zero_grad(set_to_none=True)
        logits = forward(row)
        losses = functional.cross_entropy(logits.flatten(0, 1), row["target"].flatten(), reduction="none")
        loss = (losses * row["weight"].flatten()).sum() / row["weight"].sum()
        loss.backward()
        length = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
        return loss.item(), length.item()

    return step


def decays(name: str) -> bool:
    """Whether a matrix has weight decay: embeddings and tables have none."""
    return not name.startswith(("text.", "image.position"))
