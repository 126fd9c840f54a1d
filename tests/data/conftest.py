"""Fixtures of the tests of data."""

import pytest
from small_data import ADAPTERS, SmallSource, flac, make_example, png

from polygpt.data.tokenizers.bytes import Bytes


@pytest.fixture(scope="session")
def small():
    """What `small_data` has, and a byte tokenizer."""

    class Small:
        adapters, tokenizer, source = ADAPTERS, Bytes().build(), SmallSource
        positions = {name: adapter.positions for name, adapter in ADAPTERS.items()}
        png, flac, example = staticmethod(png), staticmethod(flac), staticmethod(make_example)

    return Small
