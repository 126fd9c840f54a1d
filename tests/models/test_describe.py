"""Parameter counts and FLOPs against formulas written down from the papers, not from the code."""

import numpy as np
import pytest

from batches import ADAPTERS, tiny
from polygpt.attention.multi_head import MultiHead
from polygpt.errors import SpecError
from polygpt.models.decoder import DecoderSpec
from polygpt.models.describe import describe
from polygpt.models.functional import bind
from polygpt.models.low_rank import LowRank
from polygpt.models.multimodal import ModelSpec
from polygpt.models.prefix import PrefixTuning
from polygpt.models.presets import PRESETS, preset
from polygpt.nn.mlp import MLP
from polygpt.nn.norms import LayerNorm
from polygpt.nn.positions import Learned
from polygpt.parameters import paths


def encoder(width, depth):
    """A pre-norm ViT: four matrices and an MLP of four times the width, biases, two norms a block, one at the end."""
    return depth * (4 * width**2 + 8 * width**2 + 9 * width + 4 * width) + 2 * width


def mlp_connector(inputs, width):
    return inputs * width + width + width * width + width


def count(p) -> int:
    """The parameters of a preset, from its figures alone."""
    head = p.width // p.heads
    multiple = 256 if p.width >= 1024 else 8
    hidden = int(np.ceil(np.floor(p.width * 8 / 3) / multiple)) * multiple
    block = 2 * p.width**2 + 2 * p.width * p.kv_heads * head + 3 * p.width * hidden + 2 * p.width
    text = p.vocabulary * p.width
    decoder = p.depth * block + p.width
    if p.width >= 2048:  # a head of its own
        decoder += text
    if p.tower is None:
        return text + decoder
    width, depth, _ = p.tower
    patches = (p.pixels // p.patch) ** 2
    image = 3 * p.patch**2 * width + width + patches * width + encoder(width, depth) + mlp_connector(width, p.width)
    convolutions = 3 * 80 * width + width + 3 * width * width + width
    no_key_bias = depth * width
    audio = convolutions + encoder(width, depth) - no_key_bias + mlp_connector(width * p.fold, p.width)
    return text + decoder + image + audio + 2 * p.width


EXACT = {
    "1m": 1_140_416,
    "10m": 11_855_488,
    "150m": 149_624_448,
    "400m": 418_505_216,
    "1b": 1_122_796_800,
    "3b": 3_291_187_584,
    "7b": 7_025_081_088,
    "32b": 32_541_064_192,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_exactly_the_parameters_that_the_formula_gives(name):
    p = preset(name)
    described = describe(p.model(), p.vocabulary, 1024)
    assert described.parameters == count(p) == EXACT[name]
    assert described.parameters == sum(part.parameters for part in described.parts)
    size = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert 0.7 < described.parameters / size < 1.5, "the name rounds the size"


def test_an_unknown_preset_is_named_with_its_neighbours():
    with pytest.raises(SpecError, match="no preset '15m': did you mean"):
        preset("15m")


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_has_as_many_parameters_as_its_authors_counted(tied):
    """Radford et al. 2019: 124,439,808, as every implementation of the smallest GPT-2 with the tied head."""
    attention = MultiHead(12, bias=True)
    decoder = DecoderSpec(768, 12, attention, MLP(), LayerNorm(), Learned(1024), tied=tied)
    expected = 124_439_808 + (0 if tied else 50_257 * 768)
    assert describe(ModelSpec(decoder), 50_257, 1024).parameters == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_flops_of_a_text_token(tied, kv_heads):
    """Forward and backward are three times 2 FLOPs a weight of each matrix, and 4 D a key of each layer."""
    L, D, H, V, T = 3, 64, 4, 101, 32
    K, d, F = kv_heads or H, D // H, 176
    spec = ModelSpec(DecoderSpec(D, L, MultiHead(H, kv_heads), tied=tied))
    matrices = L * (2 * D * H * d + 2 * D * K * d + 3 * D * F) + D * V
    keys = np.mean([t + 1 for t in range(T)])
    expected = 3 * (2 * matrices + L * 4 * H * d * keys)
    assert describe(spec, V, T).flops_per_token == expected


def test_low_rank_updates_cost_what_training_computes():
    """Two thin matrices for each position of a linear map; others are merged once a pass."""
    spec, r, w, D = tiny(tied=False), 2, 8, 16
    parts = ("decoder/.*query", "adapters/image/(patch|tower)", "adapters/audio/connector/output")
    low_rank = LowRank("|".join(f"{part}.*kernel" for part in parts), rank=r)
    whole, tuned = (describe(made, 31, 16) for made in (spec, spec.replace(low_rank=low_rank)))
    added = {part.name: part for part in tuned.parts[len(whole.parts) :]}
    assert tuned.parts[: len(whole.parts)] == whole.parts
    assert tuned.parameters - whole.parameters == sum(part.parameters for part in added.values())
    assert added["low_rank"].flops == 2 * added["low_rank"].parameters == 2 * 2 * r * (D + D)
    assert tuned.flops_per_token - whole.flops_per_token == 3 * added["low_rank"].flops
    block = 4 * (w + w) + 2 * (w + 4 * w)
    assert added["low_rank/adapters/image"].flops == 2 * 4 * r * (16 + w + block)
    assert added["low_rank/adapters/audio"].flops == 2 * 4 * r * (D + D)
    table = describe(spec.replace(low_rank=LowRank("head/kernel|experts", rank=r)), 31, 16).parts[-1]
    assert (table.name, table.flops) == ("low_rank", 2 * r * (D + 31))


def test_prefixes_cost_their_scores_and_values():
    spec, P = tiny(), 3
    whole, tuned = (
        describe(made, 31, 16) for made in (spec, spec.replace(prefix=PrefixTuning(length=P, pattern="attention")))
    )
    added = {part.name: part.flops for part in tuned.parts[len(whole.parts) :]}
    assert added == {
        "prefix": 2 * 4 * P * 16,
        "prefix/adapters/image": 4 * 4 * P * 8,
        "prefix/adapters/audio": 8 * 4 * P * 8,
    }


def test_flops_of_media_items():
    """Of the towers of the test models: every matrix times the places that it is applied to."""
    parts = {part.name: part for part in describe(tiny(), 31, 16).parts}
    w, D, patches, places, frames = 8, 16, 4, 8, 16
    block = 4 * w * w + 2 * 4 * w * w
    image = 2 * patches * (16 * w + block + w * D) + patches * 4 * w * patches
    audio = (
        2 * (frames * 3 * 8 * w + places * 3 * w * w + places * block + places // 2 * 2 * w * D)
        + places * 4 * w * places
    )
    assert (parts["adapters/image"].flops, parts["adapters/audio"].flops) == (image, audio)
    assert parts["adapters/image"].unit == "item" and parts["decoder"].unit == "token"


def test_paths_and_shapes_read_like_the_model():
    shapes = {path: leaf.shape for path, leaf in paths(bind(tiny(), 31).abstract()).items()}
    assert {path: shapes[path] for path in shapes if path.startswith("decoder/")} == {
        "decoder/blocks/attention/key/kernel": (2, 16, 8),
        "decoder/blocks/attention/output/kernel": (2, 16, 16),
        "decoder/blocks/attention/query/kernel": (2, 16, 16),
        "decoder/blocks/attention/value/kernel": (2, 16, 8),
        "decoder/blocks/attention_norm/scale": (2, 16),
        "decoder/blocks/mlp/down/kernel": (2, 48, 16),
        "decoder/blocks/mlp/gate/kernel": (2, 16, 48),
        "decoder/blocks/mlp/up/kernel": (2, 16, 48),
        "decoder/blocks/mlp_norm/scale": (2, 16),
        "decoder/norm/scale": (16,),
    }
    assert shapes["text/table"] == (31, 16) and shapes["modality/image"] == (16,)
    assert shapes["adapters/image/patch/kernel"] == (16, 8)
    assert shapes["adapters/image/tower/position/table"] == (ADAPTERS["image"].positions, 8)
    assert shapes["adapters/audio/connector/output/kernel"] == (16, 16), "two positions of the tower folded into one"
    assert "head/kernel" not in shapes


def test_a_free_head_and_listed_blocks_have_paths_too():
    shapes = {path: leaf.shape for path, leaf in paths(bind(tiny(tied=False, scan=False), 31).abstract()).items()}
    assert shapes["head/kernel"] == (16, 31)
    assert shapes["decoder/blocks/1/attention/query/kernel"] == (16, 16)
    assert not any(path.startswith("decoder/blocks/attention") for path in shapes)
