"""The mean over a row of what one position costs."""

import pytest

from polygpt.attention.contract import causal_mean


@pytest.mark.parametrize("length", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("window", [1, 7, 64, 5000])
def test_it_is_the_mean_of_all_positions(length, window):
    def flops(keys):
        return 5 + 3 * min(keys, window)

    want = sum(map(flops, range(1, length + 1))) / length
    assert causal_mean(flops, length) == pytest.approx(want, rel=1e-12)


def test_a_straight_line_is_looked_at_in_three_places():
    """So that the FLOPs of a long row take no time."""
    seen = []

    def flops(keys):
        seen.append(keys)
        return 2.0 * keys

    assert causal_mean(flops, 1 << 20) == (1 << 20) + 1
    assert sorted(set(seen)) == [1, 1 << 19, 1 << 20]
