"""The sequence layout: scattering media and checking batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.errors import UserError
from polygpt.sequence import Batch, Media, check, coordinates, scatter_media

P = 3  # positions an item fills at most


def batch() -> Batch:
    """Two rows of six positions: text, a picture of two positions, text, padding; and text alone."""
    modality = np.array([[0, 1, 1, 0, -1, -1], [0, 0, 0, 0, 0, -1]], np.int8)
    segment = np.where(modality < 0, 0, 1).astype(np.int32)
    zeros = np.zeros((2, 6), np.int32)
    slot = zeros.copy()
    slot[0, 1:3] = [P, P + 1]  # the row's second item
    weight = np.zeros((2, 6), np.float32)
    weight[0, 2] = 1
    return Batch(
        tokens_BT=np.where(modality == 0, 5, 0).astype(np.int32),
        modality_BT=modality,
        slot_BT=slot,
        position_BT=np.tile(np.arange(6, dtype=np.int32), (2, 1)),
        segment_BT=segment,
        span_BT=zeros,
        target_BT=zeros,
        weight_BT=weight,
        media={"image": Media(np.zeros((2, 2, 4), np.float32), np.array([[0, 2], [0, 0]], np.int32))},
        coordinate_BT3=np.tile(np.arange(6, dtype=np.int32)[:, None], (2, 1, 3)),
    )


def test_scatter_puts_each_embedding_at_its_slot():
    B, T, N, D = 2, 6, 2, 4
    text_BTD = jnp.full((B, T, D), -1.0)
    image_BNPD = jnp.arange(B * N * P * D, dtype=jnp.float32).reshape(B, N, P, D)
    x_BTD = scatter_media(text_BTD, batch(), {"image": image_BNPD})
    np.testing.assert_array_equal(x_BTD[0, 1:3], image_BNPD[0, 1, :2])
    assert (x_BTD[0, [0, 3]] == -1).all() and (x_BTD[1, :5] == -1).all()
    assert (x_BTD[0, 4:] == 0).all() and (x_BTD[1, 5] == 0).all(), "padding is zero"


def test_unused_media_reach_neither_values_nor_gradients():
    def total(media_BNPD):
        return scatter_media(jnp.ones((2, 6, 4)), batch(), {"image": media_BNPD}).sum()

    garbage = np.full((2, 2, P, 4), np.nan, np.float32)
    garbage[0, 1, :2] = 1
    value, gradient = jax.value_and_grad(total)(jnp.asarray(garbage))
    assert value == 2 * 4 + 2 * 4 + 5 * 4
    expected = np.zeros_like(garbage)
    expected[0, 1, :2] = 1
    np.testing.assert_array_equal(gradient, expected)


def test_media_know_which_items_are_used():
    np.testing.assert_array_equal(batch().media["image"].valid_BN, [[False, True], [False, False]])
    assert batch().shape == (2, 6)


def test_a_batch_is_a_pytree():
    doubled = jax.tree.map(lambda leaf: leaf * 2, batch())
    assert isinstance(doubled, Batch) and doubled.weight_BT[0, 2] == 2


def test_coordinates_of_a_grid():
    """A film of two pictures of two rows and three columns; a sequence in time advances in all three, like text."""
    film = [(time, row, column) for time in range(2) for row in range(2) for column in range(3)]
    np.testing.assert_array_equal(coordinates((2, 2, 3)), film)
    np.testing.assert_array_equal(coordinates((4, 1, 1)), [[i] * 3 for i in range(4)])
    assert coordinates((1, 1, 5)).tolist() == [[0, 0, i] for i in range(5)]


def at(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("name", "index", "value", "words"),
    [
        ("tokens_BT", (1, 3), 6, r"row 1, position 3: a token outside \[0, 6\)"),
        ("tokens_BT", (0, 0), -1, r"row 0, position 0: a token outside"),
        ("target_BT", (1, 0), 99, "row 1, position 0: a target outside"),
        ("modality_BT", (1, 0), 2, "a modality that no adapter has"),
        ("segment_BT", (1, 0), 0, "padding and segment 0 do not coincide"),
        ("weight_BT", (0, 5), 0.5, "row 0, position 5: a loss weight on padding"),
        ("slot_BT", (0, 1), 2 * P, "a slot outside the 2 items of image"),
        ("slot_BT", (0, 1), 0, "a slot beyond the length of its image item"),
        ("slot_BT", (0, 2), P + 2, "a slot beyond the length"),
    ],
)
def test_check_names_the_row_the_position_and_the_fault(name, index, value, words):
    faulty = batch().replace(**{name: at(getattr(batch(), name), index, value)})
    with pytest.raises(UserError, match=words):
        check(faulty, vocabulary=6, positions={"image": P})


def test_check_compares_shapes_lengths_and_adapters():
    good = batch()
    with pytest.raises(UserError, match=r"span_BT has shape \(2, 5\)"):
        check(good.replace(span_BT=good.span_BT[:, :5]), 6, {"image": P})
    with pytest.raises(UserError, match=r"coordinate_BT3 has shape \(2, 6, 2\), but must have \(2, 6, 3\)"):
        check(good.replace(coordinate_BT3=good.coordinate_BT3[..., :2]), 6, {"image": P})
    check(good.replace(coordinate_BT3=None), 6, {"image": P})
    with pytest.raises(UserError, match=r"media are \['image'\], but the model's adapters are \['audio'\]"):
        check(good, 6, {"audio": P})
    long = Media(good.media["image"].features, np.array([[0, P + 1], [0, 0]], np.int32))
    with pytest.raises(UserError, match="an item of image has length 4"):
        check(good.replace(media={"image": long}), 6, {"image": P})


@pytest.mark.parametrize(
    ("segment", "position", "words"),
    [
        ([1, 1, 2, 2, 1, 0], [0, 1, 0, 1, 2, 0], "position 4: a segment that continues after another"),
        ([1, 1, 1, 2, 2, 0], [0, 1, 3, 0, 1, 0], "position 2: a position id that does not count from 0"),
        ([1, 1, 1, 2, 2, 0], [0, 1, 2, 3, 4, 0], "position 3: a position id that does not"),
        ([2, 2, 2, 3, 3, 0], [1, 2, 3, 0, 1, 0], "position 0: a position id that does not"),
    ],
)
def test_check_counts_the_positions_of_each_example(segment, position, words):
    sound = dict.fromkeys(("tokens_BT", "slot_BT", "span_BT", "target_BT"), np.zeros((1, 6), np.int32))
    sound |= {"modality_BT": np.int8([[0, 0, 0, 0, 0, -1]]), "weight_BT": np.zeros((1, 6), np.float32), "media": {}}
    right = Batch(**sound, segment_BT=np.int32([[1, 1, 2, 2, 2, 0]]), position_BT=np.int32([[0, 1, 0, 1, 2, 9]]))
    check(right, 6, {})
    check(right.replace(segment_BT=np.int32([[3, 3, 5, 0, 5, 0]]), modality_BT=np.int8([[0, 0, 0, -1, 0, -1]]),
                        position_BT=np.int32([[0, 1, 0, 7, 1, 0]])), 6, {})  # fmt: skip
    with pytest.raises(UserError, match=words):
        check(right.replace(segment_BT=np.int32([segment]), position_BT=np.int32([position])), 6, {})
