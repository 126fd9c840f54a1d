"""Held-out samples for a report: what the model writes, beside the truth, and what it attended to meanwhile.

Axis letters: L layers, W words of the answer, P positions of a medium, T positions of the row, H heads.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from polygpt.data.example import Example, Medium, Text
from polygpt.data.layout import lay_out
from polygpt.data.packing import collate
from polygpt.errors import BadRecord, UserError
from polygpt.evaluation.metric import normalize
from polygpt.generation.generate import generate
from polygpt.report import media
from polygpt.report.content import Item, Sample, Word

CUT = 160
"""A text without prompt is cut after about so many characters into prompt and truth; the truth is about as long."""
LARGEST = 2**30
"""Bytes of attention weights of one row, above which no maps are made."""


def gather(run, per_task: int = 6) -> tuple[dict[str, tuple[Sample, ...]], tuple[str, ...]]:
    """Samples of every held-out task of a run.

    Args:
        run: an opened run.
        per_task: how many at most.

    Returns:
        The samples by task, and notes on what could not be made.
    """
    attend, notes = _attention(run)
    samples = {}
    for name, task in run.experiment.evaluation.tasks.items():
        layout, sampling = run.experiment.data.layout, run.experiment.evaluation.sampling
        try:
            examples = choose(task.source.open(), run, per_task)
            prompts = [example.prompt for example in examples]
            written = generate(run.model, run.params, run.tokenizer, prompts, layout, sampling)
        except UserError as error:  # the data of another machine, say
            notes = (*notes, f"No samples of {name}: {error}")
            continue
        if not examples:
            notes = (*notes, f"{name}: none of the held-out examples can be shown")
            continue
        samples[name] = tuple(
            sample(run, example, answer.text, task.generate, attend)
            for example, answer in zip(examples, written, strict=True)
        )
    return samples, notes


def choose(source: Sequence[Example], run, count: int) -> list[Example]:
    """Up to `count` usable examples with a prompt, the same at every call; a text without one is cut if it can be."""
    chosen = []
    order = np.random.default_rng(run.experiment.evaluation.seed).permutation(len(source))
    for i in order[: 20 * count]:
        try:
            example = cut(source[int(i)])
            lay_out(example, run.experiment.data.layout, run.tokenizer, run.model.spec.adapters)
        except BadRecord:
            continue
        if any(isinstance(part, Medium) or part.text for part in example.prompt):
            chosen.append(example)
        if len(chosen) == count:
            break
    return chosen


def cut(example: Example) -> Example:
    """An example that begins with a text to be predicted, as a prompt and its continuation; any other as it is."""
    if example.prompt or not example.answer:
        return example
    text = example.answer
    words = list(re.finditer(r"\S+\s*", text[: 2 * CUT]))
    half = min(len(text) // 2, CUT)
    at = next((word.start() for word in words if word.start() >= half), 0)
    if not at:
        return example
    end = words[-1].start() if len(text) > 2 * CUT and words[-1].start() > at else len(text)
    return Example((Text(text[:at], 0.0), Text(text[at:end])), example.place)


def sample(run, example: Example, answer: str, judged: bool, attend) -> Sample:
    """The sample of an example and the model's answer. `judged`: whether the answer is right or wrong."""
    right = normalize(answer) == normalize(example.answer) if judged else None
    spoken = mark(answer, example.answer) if judged else tuple(Word(word) for word in answer.split())
    maps = attend(example, answer) if spoken else {}
    prompt, numbers = [], dict.fromkeys(run.model.spec.adapters, 0)
    for part in example.prompt:
        if isinstance(part, Text):
            prompt.append(part.text)
        else:
            weights = maps.get((part.modality, numbers[part.modality]))
            prompt.append(item(part, run.model.spec.adapters[part.modality], weights))
            numbers[part.modality] += 1
    return Sample(tuple(prompt), spoken, example.answer.strip(), right, example.place)


def mark(answer: str, truth: str) -> tuple[Word, ...]:
    """The words of an answer, each right if the truth has it at that place (longest common subsequence)."""
    said, true = answer.split(), truth.split()
    matcher = difflib.SequenceMatcher(None, [normalize(w) for w in said], [normalize(w) for w in true], autojunk=False)
    right = {i for block in matcher.get_matching_blocks() for i in range(block.a, block.a + block.size)}
    return tuple(Word(word, i in right) for i, word in enumerate(said))


def item(part: Medium, adapter, attention_LWP: np.ndarray | None = None) -> Item:
    """A medium as a picture, and with its sound where it has one."""
    features = adapter.features
    raw = features.decode(part.source, part.modality)
    array, frames = features.extract(raw)
    picture = features.picture(array, frames)
    timeline = picture.ndim == 2
    recorded = raw.ndim == 1 and hasattr(features, "rate")
    return Item(
        modality=part.modality,
        png=media.png(picture),
        size=(picture.shape[1], picture.shape[0]),
        grid=media.grid(picture.shape, adapter.length(frames), timeline),
        wav=media.wav(raw, features.rate) if recorded else None,
        seconds=len(raw) / features.rate if recorded else None,
        attention_LWP=attention_LWP,
    )


def _attention(run):
    """A function (example, answer) -> {(modality, number of the item): attention_LWP}, and notes where it has none."""
    layout, adapters = run.experiment.data.layout, run.model.spec.adapters
    heads_averaged = jax.jit(lambda params, batch: run.model.attention(params, batch).mean(axis=(1, 2)))

    def attend(example: Example, answer: str) -> dict:
        written = Example((*example.prompt, Text(answer)), example.place)
        try:
            row = lay_out(written, layout, run.tokenizer, adapters)
        except BadRecord:  # the answer fills the row to its end
            return {}
        batch = collate([row], layout.length, adapters)
        weights_LTT = np.asarray(heads_averaged(run.params, batch))
        return maps(weights_LTT, batch, answer, run.tokenizer, {n: a.positions for n, a in adapters.items()})

    if not adapters:
        return (lambda example, answer: {}), ()
    spec = run.model.spec
    dims = spec.decoder.dims(spec.dtype)
    variant = nnx.eval_shape(lambda: spec.decoder.attention.build(dims, nnx.Rngs(0)))
    if spec.decoder.depth == 0 or not hasattr(variant, "weights"):
        return (lambda example, answer: {}), ("No attention maps: this attention has no weights to look at.",)
    empty = collate([None], layout.length, adapters)
    size = 4 * math.prod(jax.eval_shape(run.model.attention, run.params, empty).shape)
    if size > LARGEST:
        note = f"No attention maps: the weights of one row would take {size / 2**30:.0f} GiB."
        return (lambda example, answer: {}), (note,)
    return attend, ()


def maps(weights_LTT: np.ndarray, batch, answer: str, tokenizer, positions: Mapping[str, int]) -> dict:
    """From a row's attention to the attention that each word of the answer pays to each medium.

    Args:
        weights_LTT: weights [L, query, key], averaged over heads.
        batch: the row, alone in its batch; its predicted positions are the answer's tokens and the end.
        answer: the answer.
        tokenizer: decodes its tokens.
        positions: P by adapter, in the model's order.

    Returns:
        {(modality, number of the item): [L, W, filled positions]}; empty if a word has no token of its own.
    """
    predicted = np.flatnonzero(np.asarray(batch.weight_BT[0]) > 0)
    tokens = [int(token) for token in np.asarray(batch.target_BT[0])[predicted]]
    words = words_of_tokens(tokens, answer, tokenizer)
    queries = [[q for q, word in zip(predicted, words, strict=True) if word == w] for w in range(len(answer.split()))]
    if not all(queries):
        return {}
    found = {}
    modality, slot = np.asarray(batch.modality_BT[0]), np.asarray(batch.slot_BT[0])
    for number, (name, P) in enumerate(positions.items(), start=1):
        for n in np.unique(slot[modality == number] // P):
            keys = np.flatnonzero((modality == number) & (slot // P == n))
            seen = [weights_LTT[:, query][:, :, keys].mean(axis=1) for query in queries]
            found[name, int(n)] = np.stack(seen, axis=1)
    return found


def words_of_tokens(tokens: Sequence[int], text: str, tokenizer) -> list[int | None]:
    """For each token of a text the number of the word that its last character lies in; None for spaces and the end."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    numbers = []
    for i, token in enumerate(tokens):
        last = len(tokenizer.decode(tokens[: i + 1])) - 1
        inside = token != tokenizer.eos
        numbers.append(next((w for w, (a, b) in enumerate(spans) if inside and a <= last < b), None))
    return numbers
