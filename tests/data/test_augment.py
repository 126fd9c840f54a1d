"""Augmentations: what they change, what they leave, and that they draw from the given generator alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygpt.data.augment import Noise, RandomResizedCrop, RandomShift, SpecAugment, Speed
from polygpt.errors import SpecError
from polygpt.spec import from_json, to_json

ALL = [RandomResizedCrop(), RandomShift(), Speed(), Noise(), SpecAugment()]


def medium(augment, seed=0):
    rng = np.random.default_rng(seed)
    if augment.modality == "image":
        picture = rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)
        return picture.astype(np.float32) if augment.stage == "features" else picture
    if augment.stage == "features":
        return rng.standard_normal((150, 80)).astype(np.float32)
    return rng.standard_normal(4000).astype(np.float32)


@pytest.mark.parametrize("augment", ALL, ids=lambda a: type(a).__name__)
def test_the_generator_decides_and_the_input_stays(augment):
    array = medium(augment)
    before = array.copy()
    np.random.seed(0)
    first = augment(array, np.random.default_rng(5))
    np.random.seed(1)
    np.testing.assert_array_equal(augment(array, np.random.default_rng(5)), first)
    others = [augment(array, np.random.default_rng(seed)) for seed in range(6, 10)]
    assert any(other.shape != first.shape or (other != first).any() for other in others)
    np.testing.assert_array_equal(array, before)
    assert not np.shares_memory(first, array)
    assert first.dtype == array.dtype and first.ndim == array.ndim
    assert from_json(to_json(augment)) == augment


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_pictures_of_every_size_keep_it(h, w, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    for augment in (RandomResizedCrop(), RandomShift(0.5)):
        changed = augment(picture, np.random.default_rng(seed))
        assert changed.shape == picture.shape and changed.dtype == np.uint8


def test_a_crop_of_everything_is_the_picture():
    picture = medium(RandomResizedCrop())
    crop = RandomResizedCrop(area=(1, 1), aspect=(1, 1))
    np.testing.assert_array_equal(crop(picture, np.random.default_rng(0)), picture)


def test_a_crop_shows_a_part_of_the_picture_enlarged():
    ramp = np.broadcast_to(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], (100, 100, 3))
    for seed in range(20):
        crop = RandomResizedCrop(area=(0.25, 0.25), aspect=(1, 1))(ramp, np.random.default_rng(seed)).astype(int)
        assert crop[0, -1, 0] - crop[0, 0, 0] == pytest.approx(100, abs=6)  # half of the ramp


def test_a_crop_keeps_the_area_and_the_aspect_asked_for():
    ramps = np.arange(0, 200, 2, dtype=np.uint8)
    picture = np.stack([*np.broadcast_arrays(ramps[None, :], ramps[:, None]), np.zeros((100, 100), np.uint8)], axis=-1)
    for area, aspect, width, height in (
        (0.25, 4, 100, 25),
        (0.25, 1 / 4, 25, 100),
        (0.5, 2, 100, 50),
        (0.16, 1, 40, 40),
    ):
        crop = RandomResizedCrop(area=(area, area), aspect=(aspect, aspect))
        for seed in range(5):
            part = crop(picture, np.random.default_rng(seed)).astype(int)
            assert np.ptp(part[..., 0]) == pytest.approx(2 * width, abs=6), (area, aspect)
            assert np.ptp(part[..., 1]) == pytest.approx(2 * height, abs=6), (area, aspect)


def test_a_shift_moves_every_pixel_alike_and_continues_the_border():
    picture = medium(RandomShift())
    padded = np.pad(picture, ((3, 3), (2, 2), (0, 0)), mode="edge")
    windows = [padded[y : y + 12, x : x + 9] for y in range(7) for x in range(5)]
    seen = set()
    for seed in range(60):
        shifted = RandomShift(0.25)(picture, np.random.default_rng(seed))
        matches = [i for i, window in enumerate(windows) if (window == shifted).all()]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) > 20


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_speed_changes_duration_and_pitch(factor):
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    changed = Speed((factor, factor))(tone, np.random.default_rng(0))
    assert len(changed) == pytest.approx(16_000 / factor, abs=1)
    peak = np.abs(np.fft.rfft(changed)).argmax() * 16_000 / len(changed)
    assert peak == pytest.approx(1000 * factor, rel=1e-2)


@pytest.mark.parametrize("snr", [0.0, 20.0])
def test_noise_has_its_ratio(snr):
    tone = np.sin(np.arange(100_000) / 10).astype(np.float32)
    noise = Noise((snr, snr))(tone, np.random.default_rng(0)) - tone
    assert 10 * np.log10(np.mean(tone**2) / np.mean(noise**2)) == pytest.approx(snr, abs=0.1)
    np.testing.assert_array_equal(Noise()(np.zeros(100, np.float32), np.random.default_rng(0)), 0)


@given(frames=st.integers(1, 300), mels=st.integers(1, 90), seed=st.integers(0, 1000))
def test_specaugment_masks_bands_and_stretches_within_their_bounds(frames, mels, seed):
    features = np.random.default_rng(seed).standard_normal((frames, mels)).astype(np.float32)
    augment = SpecAugment(frequency_masks=1, frequency_width=7, time_masks=1, time_width=40, time_share=0.5)
    changed = augment(features, np.random.default_rng(seed))
    masked = changed != features
    assert (changed[masked] == features.mean()).all()
    columns, rows = masked.all(axis=0), masked.all(axis=1)
    if columns.all() or rows.all():  # so small that the bands cover everything
        return
    assert columns.sum() <= 7 and rows.sum() <= min(40, frames // 2)
    np.testing.assert_array_equal(masked, columns[None, :] | rows[:, None])
    for line in (columns, rows):
        assert np.abs(np.diff(line.astype(int), prepend=0, append=0)).sum() in (0, 2)  # one stretch at most


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: RandomResizedCrop(area=(0.0, 1.0)), "RandomResizedCrop.area"),
        (lambda: RandomResizedCrop(aspect=(2.0, 1.0)), "RandomResizedCrop.aspect"),
        (lambda: RandomShift(1.0), "RandomShift.share"),
        (lambda: Speed((0.0, 1.0)), "Speed.factor"),
        (lambda: Noise((3.0, 1.0)), "Noise.snr"),
        (lambda: SpecAugment(time_masks=-1), "SpecAugment.time_masks"),
        (lambda: SpecAugment(time_share=1.5), "SpecAugment.time_share"),
    ],
)
def test_fields_out_of_bounds_are_named(make, name):
    with pytest.raises(SpecError, match=name):
        make()
