"""Prompts in, texts out: stop strings, ends, bounds, streaming, errors, and how often anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_media import ADAPTERS, picture, recording

from polygpt.data.example import Medium, Text
from polygpt.data.layout import LayoutSpec
from polygpt.data.packing import collate
from polygpt.data.tokenizers.bytes import ByteTokenizer
from polygpt.errors import UserError
from polygpt.generation.generate import generate, stream
from polygpt.generation.padding import bucket, pad
from polygpt.generation.sampling import GREEDY, Sampling
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.positions import Learned
from polygpt.sequence import PADDING

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos
LAYOUT = LayoutSpec(seq_len=128)


class Script:
    """A stand-in with a script: the token after position p is script[p]. It notes what shapes it is traced with."""

    spec = ModelSpec(DecoderSpec(position=Learned(96)))

    def __init__(self, script):
        self.script, self.traced = tuple(script), []

    def init_cache(self, rows, size):
        return {"tokens": jnp.full((rows, size), -1), "cursor": jnp.int32(0)}

    def replicated(self, tree):
        return tree

    @property
    def merged(self):
        return self

    def unstacked(self, params):
        return params

    def decode(self, params, batch, cache, last_B=None):
        self.traced.append(batch.shape)
        script = jnp.asarray(self.script)
        tokens = jax.lax.dynamic_update_slice(cache["tokens"], batch.tokens_BT, (0, cache["cursor"]))
        position = batch.position_BT
        if last_B is not None:
            position = position[jnp.arange(len(last_B)), last_B][:, None]
        following = jnp.take(script, position, mode="clip")
        logits = jax.nn.one_hot(following, TOKENIZER.vocabulary) * params["scale"]
        return logits, {"tokens": tokens, "cursor": cache["cursor"] + batch.shape[1]}


def script(text, prompt=2, end=True):
    """Writes `text` after a prompt of `prompt` positions (bos and one letter)."""
    data = text if isinstance(text, bytes) else text.encode()
    return Script((0,) * (prompt - 1) + tuple(data) + (EOS,) * end + (ord("x"),) * 80)


PARAMS = {"scale": jnp.float32(9.0)}
PROMPT = [Text("p")]
LINES = script("one and two")


def write(model, sampling=GREEDY, prompts=(PROMPT,), **options):
    return generate(model, PARAMS, TOKENIZER, list(prompts), LAYOUT, sampling, **options)


def test_the_model_ends_the_text():
    (written,) = write(script("seven"))
    assert (written.text, written.finish) == ("seven", "eos")
    assert written.tokens == tuple(b"seven")


def test_max_tokens_end_the_text():
    (written,) = write(script("seven"), GREEDY.replace(max_tokens=3))
    assert (written.text, written.tokens, written.finish) == ("sev", tuple(b"sev"), "length")


def test_exactly_max_tokens_with_the_end_is_an_end():
    assert write(script("seven"), GREEDY.replace(max_tokens=6))[0].finish == "eos"
    assert write(script("seven"), GREEDY.replace(max_tokens=5))[0].finish == "length"


def test_by_default_a_text_may_be_as_long_as_the_row_has_room():
    text = "a text of more than sixty-four characters, all of which are written by default"
    for sampling in (GREEDY, GREEDY.replace(stop=("zzz",))):
        (written,) = write(script(text), sampling)
        assert (written.text, written.finish) == (text, "eos")


def test_an_empty_answer_is_allowed():
    (written,) = write(script(""))
    assert (written.text, written.tokens, written.finish) == ("", (), "eos")


@pytest.mark.parametrize(
    "stop, text, tokens",
    [
        (("and",), "one ", "one and"),
        ((" two", "e and"), "on", "one and"),
        (("o",), "", "o"),
        (("one and two",), "", "one and two"),
        (("and two", "nd"), "one a", "one and"),
        (("zzz",), "one and two", "one and two"),
    ],
)
@pytest.mark.parametrize("every", [1, 3, 16])
def test_the_text_ends_before_the_first_stop_string(stop, text, tokens, every, monkeypatch):
    monkeypatch.setattr("polygpt.generation.generate.STOP_EVERY", every)
    (written,) = write(LINES, GREEDY.replace(stop=stop))
    assert written.text == text
    assert bytes(written.tokens).decode() == tokens
    assert written.finish == ("eos" if stop == ("zzz",) else "stop")


def test_a_stop_string_ends_its_row_alone_and_early():
    model = script("ab" * 30)
    one, two = write(model, GREEDY.replace(stop=("ba",)), prompts=[PROMPT, [Text("pp")]])
    assert (one.text, two.text) == ("a", "")  # the second prompt is one position further into the script: "bab..."
    assert (one.finish, two.finish) == ("stop", "stop")


@pytest.mark.parametrize("every", [1, 2, 5, 64])
@pytest.mark.parametrize(
    "text, stop",
    [
        ("naïve – 數字 🙂 end", ()),
        ("one and two and", ("two",)),
        ("ab abc", ("abd", "bca")),
        (b"bad \xff\xe2 bytes\xe2", ()),
    ],
)
def test_streamed_pieces_join_to_the_text(text, stop, every):
    model, sampling = script(text), GREEDY.replace(stop=stop)
    pieces = list(stream(model, PARAMS, TOKENIZER, PROMPT, LAYOUT, sampling, every=every))
    (whole,) = write(model, sampling)
    assert "".join(pieces) == whole.text
    assert all(pieces)
    if every == 1 and not stop:
        assert len(pieces) > 5


def test_half_a_character_is_not_streamed():
    pieces = list(stream(script("é🙂!"), PARAMS, TOKENIZER, PROMPT, LAYOUT, GREEDY, every=1))
    assert pieces == ["é", "🙂", "!"]


def test_prompt_and_text_fill_the_bound_and_no_more():
    model = Script((ord("x"),) * 200)  # its 96 positions are fewer than the layout's 128
    long, short = write(model, GREEDY.replace(max_tokens=100), prompts=[[Text("a" * 80)], [Text("a")]])
    assert (len(long.tokens), long.finish) == (96 - 81, "length")
    assert (len(short.tokens), short.finish) == (96 - 2, "length")


class Ranked(Script):
    """Likes token 0 best, then 1, then 2, whatever it reads."""

    def decode(self, params, batch, cache, last_B=None):
        logits_BTV, cache = super().decode(params, batch, cache, last_B)
        return jnp.zeros_like(logits_BTV) + jnp.arange(logits_BTV.shape[-1], 0, -1)[None, None], cache


def test_the_repetition_penalty_minds_prompt_and_text():
    prompts = [[Text("\x01\x03")], [Text("\x00\x01\x02 more")]]
    one, two = write(Ranked(LINES.script), GREEDY.replace(repetition_penalty=1e6, max_tokens=4), prompts=prompts)
    assert (one.tokens, two.tokens) == ((0, 2, 4, 5), (3, 4, 5, 6))
    assert write(Ranked(LINES.script), GREEDY.replace(max_tokens=3))[0].tokens == (0, 0, 0)


class Rising(Script):
    """Likes every id a little less than the next, of a vocabulary that is rounded up to 2048."""

    def decode(self, params, batch, cache, last_B=None):
        logits_BTV, cache = super().decode(params, batch, cache, last_B)
        return jnp.broadcast_to(1e-4 * jnp.arange(2048)[None, None], (*logits_BTV.shape[:-1], 2048)), cache


RISING = Rising(LINES.script)


@pytest.mark.parametrize("more", [{}, {"top_k": 2000}, {"top_p": 0.999}, {"min_p": 0.5}, {"repetition_penalty": 0.5}])
def test_ids_that_only_round_the_vocabulary_up_are_never_chosen(more):
    tokenizer = ByteTokenizer().padded(2048)
    sampling = Sampling(max_tokens=64, **more)
    written = generate(RISING, PARAMS, tokenizer, [PROMPT] * 8, LAYOUT, sampling)
    tokens = {token for one in written for token in one.tokens}
    assert len(tokens) > 100 and max(tokens) < tokenizer.used == 258
    (greedy,) = generate(RISING, PARAMS, tokenizer, [PROMPT], LAYOUT, GREEDY)
    assert (greedy.tokens, greedy.finish) == ((), "eos"), "the last id that is used"


def test_nothing_is_compiled_twice():
    model = script("some words to write down")
    sampling = GREEDY.replace(max_tokens=20)
    write(model, sampling, prompts=[PROMPT] * 3)
    traced = list(model.traced)
    assert set(traced) == {(4, 16), (4, 1)}  # one program reads four rows of sixteen, one writes
    write(
        model,
        sampling.replace(seed=3, max_tokens=30, stop=("words",)),
        prompts=[PROMPT, [Text("other")], PROMPT, PROMPT],
    )
    assert model.traced == traced
    write(model, sampling, prompts=[PROMPT] * 11, batch_size=4)
    assert model.traced == traced


def test_many_prompts_are_read_some_at_a_time():
    model = Script(tuple(b"0123456789ABCDEF") + (EOS,) * 80)
    prompts = [[Text("p" * n)] for n in range(1, 12)]
    expected = ["0123456789ABCDEF"[n:] for n in range(1, 12)]
    assert [w.text for w in write(model, prompts=prompts, batch_size=4)] == expected
    assert [w.text for w in write(model, prompts=prompts, batch_size=32)] == expected


def test_no_prompts_give_no_texts():
    assert write(script(""), prompts=[]) == []


@pytest.mark.parametrize("prompt", [[], [Text("")], [Text(""), Text("")]])
def test_an_empty_prompt_is_an_error(prompt):
    with pytest.raises(UserError, match="^prompt 1: empty"):
        write(script("x"), prompts=[PROMPT, prompt])


@pytest.mark.parametrize("letters, message", [(95, "prompt 7: fills all 96 positions"), (200, "prompt 7: too long")])
def test_a_prompt_beyond_the_bound_is_an_error(letters, message):
    with pytest.raises(UserError, match=message):
        write(script("x"), prompts=[[Text("a" * letters)]], indices=[7])


def test_buckets_are_powers_of_two():
    assert [bucket(n, 1) for n in (1, 2, 3, 4, 5, 16, 17)] == [1, 2, 4, 4, 8, 16, 32]
    assert bucket(3, 16) == 16


def test_padding_keeps_what_is_used_and_no_more():
    batch = collate([None] * 3, 5, ADAPTERS)
    batch.media["image"].length_BN[1, :2] = 4
    batch.media["image"].features[:] = 7
    padded = pad(batch, 4, 8)
    assert padded.shape == (4, 8)
    assert (padded.modality_BT == PADDING).all() and (padded.segment_BT == 0).all()
    assert padded.media["image"].features.shape == (4, 2, 8, 8, 1)
    assert padded.media["image"].length_BN.tolist() == [[0, 0], [4, 4], [0, 0], [0, 0]]
    assert padded.media["audio"].length_BN.shape == (4, 1)


# The real model, with media.

PROMPTS = [
    [Text("see "), picture(0), Text(" hear "), recording(1, 1500), Text(" is ")],
    [recording(2, 900), Text("what do you hear")],
    [Text("only words and no medium")],
    [picture(3), picture(4), Text(" are like?")],
]
SAMPLED = Sampling(temperature=0.9, top_k=50, max_tokens=12, seed=4)


@pytest.fixture(scope="module")
def trained():
    model = bind(ModelSpec(decoder=DecoderSpec(width=16, depth=1), adapters=ADAPTERS), TOKENIZER.vocabulary)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), model.abstract())
    params["text"]["table"] *= 0.05  # so that what a position has seen outweighs its own token
    return model, params, TOKENIZER


@pytest.mark.parametrize("sampling", [GREEDY.replace(max_tokens=12), SAMPLED], ids=["greedy", "sampled"])
def test_a_ragged_batch_of_any_media_equals_each_prompt_alone(trained, sampling):
    together = generate(*trained, PROMPTS, LAYOUT, sampling)
    alone = [generate(*trained, [p], LAYOUT, sampling, indices=[i])[0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert len({written.tokens for written in together}) == len(PROMPTS)
    assert generate(*trained, PROMPTS[::-1], LAYOUT, sampling, indices=[3, 2, 1, 0]) == together[::-1]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([Medium("video", b"")], "prompt 0: the model has no such adapter"),
        ([picture(0)] * 4, "prompt 0: too many media: the model takes 3 of image"),
        ([Medium("image", b"no picture")], "prompt 0: "),
    ],
)
def test_media_that_the_model_cannot_read_are_an_error(trained, prompt, message):
    with pytest.raises(UserError, match=message):
        generate(*trained, [prompt], LAYOUT, GREEDY)
