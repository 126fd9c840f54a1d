"""What a specification of attention refuses, in every variant, and what it says of itself."""

import pytest

from polygpt.attention.biases import ALiBi
from polygpt.attention.multi_head import MultiHead
from polygpt.errors import SpecError
from polygpt.lab import catalogue
from polygpt.nn.positions import Learned, NoPosition, Position, Rope, Sinusoidal
from polygpt.spec import field_help

EVERY = pytest.mark.parametrize("cls", catalogue.variants(), ids=lambda cls: cls.__name__)


@EVERY
@pytest.mark.parametrize("position", [Learned(), Sinusoidal()], ids=lambda position: type(position).__name__)
def test_an_encoding_that_a_layer_would_not_see_is_refused(cls, position):
    with pytest.raises(SpecError, match=f"{cls.__name__}.position is {type(position).__name__}.* set on the stack"):
        cls(position=position)
    assert cls(position=Rope()).position == Rope()


def test_which_encodings_add_to_embeddings():
    adds = {spec: spec.adds() for spec in (Learned(), Sinusoidal(), Rope(), NoPosition(), ALiBi(), Position())}
    assert [spec for spec, so in adds.items() if so] == [Learned(), Sinusoidal()]


@EVERY
@pytest.mark.parametrize("width", [0, -8])
def test_heads_have_a_width(cls, width):
    with pytest.raises(SpecError, match=f"{cls.__name__}.head_width is {width}: it must be null or at least 1"):
        cls(head_width=width)


def test_the_width_of_a_head_is_that_which_is_given():
    assert MultiHead(4, head_width=3).width_of_head(32) == 3 and MultiHead(4).width_of_head(32) == 8
    with pytest.raises(SpecError, match="a divisor of the model width"):
        MultiHead(5).width_of_head(32)


def test_the_norm_of_queries_and_keys_is_that_of_its_source():
    assert "2302.05442" in field_help(MultiHead)["qk_norm"], "not the L2 norm and learned scale of 2010.04245"
