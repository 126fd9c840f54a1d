"""Generate text from prompts of text and media.

Prompts are processed in batches, padded to a power of two in rows and positions, so that few programs are compiled. The
generated text depends on the prompt, the seed and the prompt's index, never on the rest of its batch.
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
"""Number of tokens between checks for a stop string."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """A generated text.

    Attributes:
        text: the text, without the stop string that ended it.
        tokens: the generated token ids, excluding the end token but including those of the stop string.
        finish: why the text ended: "eos" by the end token, "stop" by a stop string, "length" for lack of room;
            "unfinished" while generation is still running.
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
    """Generates a continuation of each prompt.

    Args:
        model: the bound model.
        params: its parameters.
        tokenizer: the tokenizer that the model was trained with.
        prompts: texts and media in reading order.
        layout: the row layout used in training; prompt and continuation share `layout.seq_len` positions.
        sampling: how to choose tokens and when to stop.
        batch_size: number of prompts to process at a time.
        indices: the prompts' indices, which determine their random keys; 0, 1, ... by default.
        proceed: called before each batch; an exception that it raises ends generation.

    Raises:
        UserError: for a prompt that is empty, too long, or has media that the model does not read; names its index.
    """
    indices = range(len(prompts)) if indices is None else indices
    rows = bucket(min(batch_size, len(prompts)), 1)
    every = STOP_EVERY if sampling.stop else None
    model, params = model.merged, decoding.prepared(model, params)
    results = []
    for start in range(0, len(prompts), rows):
        proceed()
        some = slice(start, start + rows)
        *_, last = _generate(model, params, tokenizer, prompts[some], layout, sampling, indices[some], rows, every)
        results += last
    return results


def stream(
    model, params, tokenizer, prompt: Prompt, layout: LayoutSpec, sampling: Sampling, *, every: int = 4, index: int = 0
) -> Iterator[str]:
    """Yields the continuation of one prompt in pieces, `every` tokens at a time; joined, they equal `generate`'s text.

    A piece is yielded only once later tokens cannot change it: it ends neither within a character nor with the
    beginning of a stop string.
    """
    model, params = model.merged, decoding.prepared(model, params)
    sent = 0
    for (partial,) in _generate(model, params, tokenizer, [prompt], layout, sampling, [index], 1, every):
        text = partial.text if partial.finish != "unfinished" else _stable_prefix(partial.text, sampling.stop)
        if len(text) > sent:
            yield text[sent:]
            sent = len(text)


def _generate(model, params, tokenizer, prompts, layout, sampling, indices, rows, every) -> Iterator[list[Generated]]:
    """Yields the texts so far of all prompts, every `every` tokens or, if None, once; the last ones are final."""
    places = [f"prompt {index}" for index in indices]
    for prompt, place in zip(prompts, places, strict=True):
        if not any(isinstance(part, Medium) or part.text for part in prompt):
            raise UserError(f"{place}: empty prompt: add a text or a medium")
    batch = prompt_batch(prompts, layout, tokenizer, model.spec.adapters, places)
    bound = _bound(model, layout)
    length_B = (batch.segment_BT > 0).sum(axis=1)
    for length, place in zip(length_B, places, strict=True):
        if length >= bound:
            raise UserError(f"{place}: fills all {bound} positions of the model: leave room for an answer")
    room_B = np.minimum(sampling.max_tokens or bound, bound - length_B)
    size = bucket(int(room_B.max()), 16)
    batch = pad(batch, rows, min(bucket(int(length_B.max()), 16), bound), model.spec.labels())
    limit_B = np.zeros(rows, np.int32)
    limit_B[: len(prompts)] = room_B
    index_B = np.zeros(rows, np.int32)
    index_B[: len(prompts)] = indices

    choice, eos, used = sampling.choice(), np.int32(tokenizer.eos), np.int32(tokenizer.used)
    seed = np.uint32(sampling.seed)
    state = decoding.prefill(model, choice, size, params, batch, eos, seed, index_B, limit_B, used)
    results = [Generated("", (), "unfinished") for _ in prompts]
    until = 0
    while any(result.finish == "unfinished" for result in results):
        until = min(until + (every or size), size)
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
    """Decodes generated ids and cuts at the first stop string; the first `read` ids are known to contain none."""
    ended = len(ids) > 0 and ids[-1] == tokenizer.eos
    ids = [int(i) for i in (ids[:-1] if ended else ids)]
    text = tokenizer.decode(ids)
    if any(stop in text for stop in sampling.stop):
        for n in range(read + 1, len(ids) + 1):  # cut at the first token that completes one, independent of `every`
            text = tokenizer.decode(ids[:n])
            cuts = [text.index(stop) for stop in sampling.stop if stop in text]
            if cuts:
                return Generated(text[: min(cuts)], tuple(ids[:n]), "stop")
    return Generated(text, tuple(ids), "eos" if ended else "length" if done else "unfinished")


def _stable_prefix(text: str, stops: Sequence[str]) -> str:
    """The part of an unfinished text that further tokens cannot change."""
    text = text.rstrip("\ufffd")  # the bytes of an incomplete character
    for n in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return text[:-n]
    return text


def _bound(model, layout: LayoutSpec) -> int:
    """The maximum number of positions of a prompt and its continuation together."""
    limit = model.spec.limit()
    return layout.seq_len if limit is None else min(layout.seq_len, limit)
