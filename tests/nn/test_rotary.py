"""Rotary encodings beyond the plain one: stretched, of a part of the channels, of grids, of several modalities."""

import math

import numpy as np
import pytest

from polygpt.errors import SpecError
from polygpt.nn.positions import MRope, Rope, Rope2D
from polygpt.nn.rotary import NTK, LinearScaling, YaRN
from polygpt.overrides import override
from polygpt.sequence import coordinates
from polygpt.spec import from_json, to_json

RNG = np.random.default_rng(0)
POSITION = np.int32([[0, 1, 2, 9, 40], [3, 3, 0, 100, 7]])
# Of text, a picture of 2 x 3 patches and text: as in Qwen2-VL (2409.12191), figure 3.
MIXED = np.int32([[0] * 3, [1] * 3, *(coordinates((1, 2, 3)) + 2), [5] * 3, [6] * 3])[None]


def vectors(positions: int, d: int) -> np.ndarray:
    return RNG.normal(size=(1, 2, positions, d)).astype(np.float32)


def turned(x, angle_BTf, factor=1.0):
    """In complex numbers of 128 bits: channel i and i + f are one."""
    f = angle_BTf.shape[-1]
    pairs = np.complex128(x[..., :f]) + 1j * x[..., f : 2 * f]
    pairs = factor * pairs * np.exp(1j * angle_BTf)[:, None]
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * f :]], -1)


def yarn(base, d, factor, length, fast, slow):
    """Frequencies in float64, pair by pair, with the ramp between the pairs that turn `fast` and `slow` times."""
    low, high = (d * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base)) for times in (fast, slow))
    low, high = max(math.floor(low), 0), min(math.ceil(high), d - 1)
    found = []
    for i in range(d // 2):
        frequency = base ** (-2 * i / d)
        interpolated = min(max((i - low) / (high - low), 0), 1)
        found.append(frequency * (1 - interpolated) + frequency / factor * interpolated)
    return np.array(found)


d = 16
PLAIN = 1e4 ** (-np.arange(0, d, 2) / d)
STRETCHED = {
    "linear": (LinearScaling(4.0), PLAIN / 4, 1),
    "ntk": (NTK(4.0), (1e4 * 4 ** (d / (d - 2))) ** (-np.arange(0, d, 2) / d), 1),
    "yarn": (YaRN(8.0, 512, 16.0, 2.0), yarn(1e4, d, 8.0, 512, 16.0, 2.0), 0.1 * math.log(8) + 1),
}


@pytest.mark.parametrize("name", STRETCHED)
def test_a_stretched_encoding_equals_float64(name):
    scaling, frequency, factor = STRETCHED[name]
    x = vectors(5, d)
    angle = POSITION[:1, :, None] * frequency
    # The angle is rounded at a relative 2^-24 or so: beside 40 radians that is 5e-6 of an absolute error.
    got = Rope(scaling=scaling).rotate(x, POSITION[:1])
    np.testing.assert_allclose(got, turned(x, angle, factor), rtol=0, atol=3e-5)
    assert np.abs(got - Rope().rotate(x, POSITION[:1])).max() > 0.1


@pytest.mark.parametrize(
    "scaling, kind, fields",
    [
        (LinearScaling(2.5), "linear", {}),
        (YaRN(4.0, 2048), "yarn", {"original_max_position_embeddings": 2048}),
        (
            YaRN(16.0, 512, 20.0, 2.0),
            "yarn",
            {"original_max_position_embeddings": 512, "beta_fast": 20.0, "beta_slow": 2.0},
        ),
    ],
    ids=["linear", "yarn", "yarn with bounds"],
)
@pytest.mark.parametrize("head", [8, 64])
@pytest.mark.parity
def test_frequencies_equal_those_of_transformers(scaling, kind, fields, head):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": kind, "rope_theta": 5e4, "factor": scaling.factor, **fields}
    config = transformers.LlamaConfig(
        hidden_size=2 * head, num_attention_heads=2, max_position_embeddings=8192, rope_parameters=rope
    )
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    np.testing.assert_allclose(scaling.frequencies(5e4, head // 2), expected.numpy(), rtol=1e-5)
    assert scaling.temperature() == pytest.approx(factor, abs=1e-7)


def test_ntk_leaves_the_fastest_pair_and_interpolates_the_slowest():
    plain, stretched = Rope().frequencies(8), Rope(scaling=NTK(4.0)).frequencies(8)
    assert stretched[0] == plain[0]
    assert float(stretched[-1] * 4) == pytest.approx(float(plain[-1]), rel=1e-6)


def test_a_part_of_the_channels_turns():
    x = vectors(5, 16)
    got = np.asarray(Rope(fraction=0.25).rotate(x, POSITION[:1]))
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(got[..., :4], Rope().rotate(x[..., :4], POSITION[:1]))


def test_rows_and_columns_turn_a_half_each():
    x, place = vectors(6, 8), coordinates((1, 2, 3))[None]
    frequency = 100.0 ** (-np.arange(2) / 2)
    angle = np.concatenate([place[..., 1:2] * frequency, place[..., 2:] * frequency], -1)
    got = Rope2D(base=100.0).rotate(x, POSITION[:1], place)
    np.testing.assert_allclose(got, turned(x, angle), rtol=0, atol=3e-6)


def test_scores_of_a_grid_depend_on_the_differences_of_row_and_column():
    query, key = vectors(1, 8), vectors(1, 8)

    def score(*places):
        position = np.int32([[0]])
        turned = [
            Rope2D().rotate(x, position, np.int32([[[0, *p]]])) for x, p in zip((query, key), places, strict=True)
        ]
        return float((turned[0] * turned[1]).sum())

    here = score((5, 3), (2, 7))
    assert score((25, 13), (22, 17)) == pytest.approx(here, abs=1e-4)
    for other in [((5, 3), (3, 7)), ((5, 3), (2, 6)), ((3, 5), (7, 2))]:
        assert abs(score(*other) - here) > 1e-2


@pytest.mark.parity
def test_a_grid_equals_the_vision_tower_of_qwen2_vl():
    pytest.importorskip("transformers")
    import torch
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    x, place = vectors(6, 16), coordinates((1, 2, 3))
    frequency = 1 / 1e4 ** (torch.arange(0, 8, 2, dtype=torch.float) / 8)
    angle = torch.cat([torch.tensor(place[:, 1:2]) * frequency, torch.tensor(place[:, 2:]) * frequency], -1)
    emb = torch.cat([angle, angle], -1)
    flat = torch.tensor(x[0].transpose(1, 0, 2))  # [T, H, d]
    expected, _ = apply_rotary_pos_emb_vision(flat, flat, emb.cos(), emb.sin())
    got = Rope2D().rotate(x, POSITION[:1], place[None])
    np.testing.assert_allclose(got[0], expected.numpy().transpose(1, 0, 2), rtol=0, atol=2e-6)


@pytest.mark.parametrize("width", [2, 4, 6, 8, 10, 64, 128])
def test_text_sees_plain_rotation(width):
    """With the default sections, at any even width, with coordinates and without, to the bit."""
    x = vectors(5, width)
    plain = Rope().rotate(x, POSITION[:1])
    alike = np.repeat(POSITION[:1, :, None], 3, axis=-1)
    for scaling in (None, YaRN()):
        plain = Rope(scaling=scaling).rotate(x, POSITION[:1])
        np.testing.assert_array_equal(MRope(scaling=scaling).rotate(x, POSITION[:1]), plain)
        np.testing.assert_array_equal(MRope(scaling=scaling).rotate(x, POSITION[:1] + 5, alike), plain)


@pytest.mark.parity
@pytest.mark.parametrize("width, sections", [(128, (16, 24, 24)), (128, None), (12, (1, 2, 3))])
def test_mixed_text_and_pictures_equal_qwen2_vl(width, sections):
    pytest.importorskip("transformers")
    import torch
    from transformers import Qwen2VLTextConfig
    from transformers.models.qwen2_vl import modeling_qwen2_vl as theirs

    x = vectors(MIXED.shape[1], width)
    published = list(sections or (16, 24, 24))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": published}
    config = Qwen2VLTextConfig(hidden_size=2 * width, num_attention_heads=2, rope_parameters=rope)
    rotary, torch_x = theirs.Qwen2VLRotaryEmbedding(config), torch.tensor(x)
    cos, sin = rotary(torch_x, torch.tensor(MIXED).permute(2, 0, 1))
    expected, _ = theirs.apply_rotary_pos_emb(torch_x, torch_x, cos, sin)
    got = MRope(base=1e6, sections=sections).rotate(x, POSITION[:1], MIXED)
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=3e-6)


def test_each_section_turns_by_its_axis():
    x, place = vectors(1, 16), np.int32([[[2, 3, 5]]])
    angle = np.array([2, 3, 3, 3, 5, 5, 5, 5]) * PLAIN
    got = MRope(sections=(1, 3, 4)).rotate(x, POSITION[:1, :1], place)
    np.testing.assert_allclose(got, turned(x, angle[None, None]), rtol=0, atol=3e-6)


def test_what_does_not_fit_is_named():
    x = vectors(5, 6)
    with pytest.raises(SpecError, match=r"MRope.sections is \(1, 1, 2\): it must be null or sum to 3"):
        MRope(sections=(1, 1, 2)).rotate(x, POSITION[:1])
    with pytest.raises(SpecError, match="a multiple of 4 channels per head, not 6: change heads, head_width or"):
        Rope2D().rotate(x, POSITION[:1])
    with pytest.raises(SpecError, match="Rope.fraction is 0.1: it must be large enough to rotate two of 6"):
        Rope(fraction=0.1).rotate(x, POSITION[:1])
    for make in (lambda: Rope(fraction=0.0), lambda: NTK(0.5), lambda: YaRN(beta_slow=40.0), lambda: YaRN(4.0, 0)):
        with pytest.raises(SpecError, match="it must be"):
            make()


def test_a_command_line_stretches_an_encoding():
    changes = {"scaling": "polygpt.nn.rotary:YaRN", "scaling.original_length": "256", "scaling.factor": "2"}
    found = override(MRope(), changes | {"sections": "[1, 2, 3]"})
    assert found == MRope(sections=(1, 2, 3), scaling=YaRN(2.0, 256))
    assert from_json(to_json(found)) == found
