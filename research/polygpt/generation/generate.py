"""Generation: prompts of texts and media in, texts out.

Prompts are read `rows` at a time, padded to the next power of two in rows and positions, so that few programs are
compiled. A prompt's text depends on the prompt, the seed and the prompt's number, never on what else is in its batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from polygpt.data.example import Medium, Text
from polygpt.data.layout import LayoutSpec, prompt_batch
from polygpt.errors import UserError
from polygpt.generation import decoding
from polygpt.generation.padding import bucket, pad
from polygpt.generation.sampling import Sampling

Prompt = Sequence[Text | Medium]
"""Texts and media in reading order."""
STOP_EVERY = 16
"""Tokens between two looks for a stop string."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """What the model wrote.

    Attributes:
        text: the text, without the stop string that ended it.
        tokens: its token ids: without the end token, with those that complete the stop string.
        finish: "eos" the model ended the text, "stop" a stop string did, "length" there was no room for more, and
            "unfinished" while it is still being written.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Literal["eos", "stop", "length", "unfinished"]


def generate(
    model,
    params,
    tokenizer,
    prompts: Sequence[Prompt],
    layout: LayoutSpec,
    sampling: Sampling,
    *,
    batch_size: int = 32,
    indices: Sequence[int] | None = None,
    proceed: Callable[[], None] = lambda: None,
) -> list[Generated]:
    """The model's continuation of each prompt.

    Args:
        model: the bound model.
        params: its parameters.
        tokenizer: the tokenizer it was trained with.
        prompts: texts and media in reading order.
        layout: how rows were made in training; prompt and text together have at most `layout.seq_len` positions.
        sampling: how tokens are chosen and when to stop.
        rows: how many prompts are read at a time.
        indices: the prompts' numbers, by which each has its own randomness; 0, 1, ... by default.
        proceed: called before so many prompts are read; what it raises ends it all.

    Raises:
        UserError: for a prompt that is empty, too long, or has media that the model does not read, naming its number.
    """
    indices = range(len(prompts)) if indices is None else indices
    rows = bucket(min(batch_size, len(prompts)), 1)
    every = STOP_EVERY if sampling.stop else sampling.max_tokens
    results = []
    for start in range(0, len(prompts), rows):
        proceed()
        some = slice(start, start + rows)
        *_, last = _written(model, params, tokenizer, prompts[some], layout, sampling, indices[some], rows, every)
        results += last
    return results


def stream(
    model, params, tokenizer, prompt: Prompt, layout: LayoutSpec, sampling: Sampling, *, every: int = 4, index: int = 0
) -> Iterator[str]:
    """The continuation of one prompt in pieces, `every` tokens at a time; joined they are the text of `generate`.

    A piece is given out when nothing that follows can change it: no half character, no beginning of a stop string.
    """
    given = 0
    for (written,) in _written(model, params, tokenizer, [prompt], layout, sampling, [index], 1, every):
        text = written.text if written.finish != "unfinished" else _settled(written.text, sampling.stop)
        if len(text) > given:
            yield text[given:]
            given = len(text)


def _written(model, params, tokenizer, prompts, layout, sampling, indices, rows, every) -> Iterator[list[Generated]]:
    """What is written of each prompt, after every `every` tokens; the last is final."""
    places = [f"prompt {index}" for index in indices]
    for prompt, place in zip(prompts, places, strict=True):
        if not any(isinstance(part, Medium) or part.text for part in prompt):
            raise UserError(f"{place}: is empty: give it a text or a medium")
    batch = prompt_batch(prompts, layout, tokenizer, model.spec.adapters, places)
    bound = _bound(model, layout)
    length_B = (batch.segment_BT > 0).sum(axis=1)
    for length, place in zip(length_B, places, strict=True):
        if length >= bound:
            raise UserError(f"{place}: fills all of the model's {bound} positions: leave room for an answer")
    size = bucket(min(sampling.max_tokens, bound), 16)
    batch = pad(batch, rows, min(bucket(int(length_B.max()), 16), bound))
    limit_B = np.zeros(rows, np.int32)
    limit_B[: len(prompts)] = np.minimum(sampling.max_tokens, bound - length_B)
    index_B = np.zeros(rows, np.int32)
    index_B[: len(prompts)] = indices

    choice, eos, used = sampling.choice(), np.int32(tokenizer.eos), np.int32(tokenizer.used)
    seed = np.uint32(sampling.seed)
    state = decoding.prefill(model, choice, size, params, batch, eos, seed, index_B, limit_B, used)
    results = [Generated("", (), "unfinished") for _ in prompts]
    until = 0
    while any(result.finish == "unfinished" for result in results):
        until = min(until + every, size)
        state = decoding.decode(model, choice, params, state, eos, np.int32(until), used)
        tokens_BS, count_B, done_B = map(np.asarray, (state.tokens_BS, state.count_B, state.done_B))
        for b, result in enumerate(results):
            if result.finish == "unfinished":
                results[b] = _read(tokens_BS[b, : count_B[b]], bool(done_B[b]), len(result.tokens), tokenizer, sampling)
        stopped_B = np.ones(rows, bool)
        stopped_B[: len(results)] = [result.finish != "unfinished" for result in results]
        state = dataclasses.replace(state, done_B=stopped_B)
        yield results


def _read(ids, done: bool, read: int, tokenizer, sampling: Sampling) -> Generated:
    """The text of generated ids, of which the first `read` are known to hold no stop string."""
    ended = len(ids) > 0 and ids[-1] == tokenizer.eos
    ids = [int(i) for i in (ids[:-1] if ended else ids)]
    text = tokenizer.decode(ids)
    if any(stop in text for stop in sampling.stop):
        for n in range(read + 1, len(ids) + 1):  # at the first token that completes one, however many come at a time
            text = tokenizer.decode(ids[:n])
            cuts = [text.index(stop) for stop in sampling.stop if stop in text]
            if cuts:
                return Generated(text[: min(cuts)], tuple(ids[:n]), "stop")
    return Generated(text, tuple(ids), "eos" if ended else "length" if done else "unfinished")


def _settled(text: str, stops: Sequence[str]) -> str:
    """The part of a text under way that more tokens cannot change."""
    text = text.rstrip("\ufffd")  # bytes of a character that is not complete yet
    for n in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return text[:-n]
    return text


def _bound(model, layout: LayoutSpec) -> int:
    """How many positions a prompt and its continuation have at most."""
    limit = model.spec.decoder.position.limit()
    return layout.seq_len if limit is None else min(layout.seq_len, limit)
