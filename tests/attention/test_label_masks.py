"""Masks that read labels of positions: in the cache, in the lab, in a model, and in generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SameSpeaker, problem

from polygpt.attention.kernels import dispatch, flex
from polygpt.attention.masks import DECODER, Mask, Window
from polygpt.attention.multi_head import MultiHead
from polygpt.data.example import Text
from polygpt.data.labels import Label
from polygpt.data.layout import LayoutSpec, prompt_batch
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.errors import SpecError
from polygpt.generation.generate import generate
from polygpt.generation.sampling import Sampling
from polygpt.lab.check import check
from polygpt.lab.drawing import matrix, read_row
from polygpt.lab.subject import Subject
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class BySpeaker(MultiHead):
    """Attention within a few positions, to those of one speaker."""

    window: int = 5
    """How far it sees."""

    def mask(self, mask):
        return mask & Window(self.window) & SameSpeaker()


SPEAKERS = {"speaker": Label(classes=3)}
TOKENIZER = Bytes().build()


@pytest.fixture(scope="module")
def model():
    spec = ModelSpec(DecoderSpec(width=16, depth=2, attention=BySpeaker(heads=2)))
    bound = bind(spec, TOKENIZER.vocabulary)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.5, x.shape)), bound.abstract())
    return bound, params


def spoken(*parts) -> Batch:
    """One row of texts, each with its speaker or None."""
    texts = [Text(text, labels={} if speaker is None else {"speaker": speaker}) for text, speaker in parts]
    return prompt_batch([texts], LayoutSpec(64, labels=SPEAKERS), TOKENIZER, {})


@pytest.mark.parametrize("ring", [False, True])
def test_with_a_cache_as_without(ring):
    subject = Subject(BySpeaker(heads=2))
    rows = subject.rows.ragged
    np.testing.assert_allclose(subject.cached_BTD(rows, ring), subject.y_BTD(rows), atol=1e-5)
    blind = Subject(MultiHead(heads=2, scores=())).form.dims
    assert jax.tree.leaves(BySpeaker(heads=2).init_cache(blind, 2, 64))[0].shape[2] == 5, "a ring of the window"


@pytest.mark.slow
def test_the_lab_finds_nothing_wrong_with_it():
    _, findings = check(BySpeaker(heads=2))
    assert [f"{one.name}: {one.error} {one.note}" for one in findings if one.passed is False] == []
    assert sum(one.passed is True for one in findings) > 25


def test_the_picture_shows_made_up_labels():
    row = read_row("7 pad:1", labels=["speaker"])
    seen = matrix(DECODER & SameSpeaker(), row)
    speaker = np.arange(7) % 2
    np.testing.assert_array_equal(seen[:7, :7], np.tril(speaker[:, None] == speaker[None]))


def test_a_backend_gets_the_labels_that_the_mask_reads():
    rule, operands = problem("labels")
    extra = {"mood": operands.query.position, **operands.query.extra}
    query = dataclasses.replace(operands.query, extra=extra)
    more = dataclasses.replace(operands, query=query, key=query)
    for backend in ("reference", "chunked", "flex"):
        found, usual = (dispatch.attend(rule, one, backend, strict=True) for one in (more, operands))
        np.testing.assert_array_equal(found[0], usual[0])
    none = dataclasses.replace(operands, key=dataclasses.replace(operands.key, extra={"speakers": query.position}))
    with pytest.raises(
        SpecError, match="a mask reads the label 'speaker', which these positions do not have.*speakers"
    ):
        dispatch.attend(rule, none)


def test_the_fused_kernel_takes_three_labels():
    @dataclasses.dataclass(frozen=True)
    class Many(Mask):
        names: tuple[str, ...]

        def labels(self):
            return frozenset(self.names)

    rule, operands = problem("labels")
    assert flex.refuses(dataclasses.replace(rule, mask=Many(("a", "b", "c"))), operands) is None
    said = flex.refuses(dataclasses.replace(rule, mask=Many(("a", "b", "c", "d"))), operands)
    assert said == "the mask reads 4 labels, but its kernel supports at most 3"


def test_positions_of_a_model_see_those_of_their_speaker(model):
    model, params = model
    batch = spoken(("ab", 0), ("cd", 1), ("ef", None), ("gh", 0))

    def influence(t):
        def at(noise_BTD):
            module = model.module(params)
            x_BTD, _ = module.embed(batch)
            return module.decoder(x_BTD + noise_BTD, batch)[0][0, t].sum()

        return np.abs(jax.grad(at)(jnp.zeros((*batch.shape, 16)))).sum(axis=(0, 2)) > 0

    assert influence(8).tolist() == [False] * 5 + [True] * 4, "e and f have no speaker, and g and h see them"
    assert influence(6).tolist() == [False] * 5 + [True, True] + [False] * 2, "bos is too far away"
    assert influence(4).tolist() == [True, False, False, True, True] + [False] * 4, "bos has no speaker either"


def test_a_written_token_has_the_speaker_before_it(model):
    model, params = model
    parts = ("ab", 0), ("cd", 1), ("ef", 0)
    texts = [Text(text, labels={"speaker": speaker}) for text, speaker in parts]
    layout, greedy = LayoutSpec(64, labels=SPEAKERS), Sampling(temperature=0.0, max_tokens=6)
    [answer] = generate(model, params, TOKENIZER, [texts], layout, greedy)
    tokens = [*spoken(*parts).tokens_BT[0], *answer.tokens]
    speakers = [np.nan, 0, 0, 1, 1, 0, 0] + [0] * len(answer.tokens)
    whole = spoken(("x" * (len(tokens) - 1), 0)).replace(
        tokens_BT=np.asarray([tokens], np.int32), extra={"speaker": np.float32([speakers])}
    )
    best_T = np.asarray(model.apply(params, whole).logits_BTV[0, 6:-1]).argmax(axis=-1)
    assert best_T.tolist() == list(answer.tokens)


def test_labels_that_are_not_whole_numbers_are_refused():
    spec = ModelSpec(DecoderSpec(width=16, depth=1, attention=BySpeaker(heads=2)))
    spec.check_with(LayoutSpec(64, labels=SPEAKERS))
    for labels in ({}, {"speaker": Label()}, {"speaker": Label((2,), classes=3)}):
        with pytest.raises(SpecError, match="labels is .*'speaker', which a mask of model.decoder reads, has classes"):
            spec.check_with(LayoutSpec(64, labels=labels))
