"""Held-out samples for a report: the model's answers, the truth, and attention maps.

Axis letters: L layers, W words of the answer, P positions of a media item, T positions of the row, H heads.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from polygpt.data.example import Example, Medium, Text
from polygpt.data.layout import lay_out
from polygpt.data.packing import collate
from polygpt.errors import BadRecord, UserError
from polygpt.evaluation.metric import normalize
from polygpt.generation.generate import generate
from polygpt.report import media
from polygpt.report.content import Item, Sample, Word

CUT = 160
"""Approximate length, in characters, of both prompt and truth when a text without prompt is split."""
QUERIES = 32
"""The number of predictions with weights is padded to a multiple of this."""
LARGEST = 2**30
"""Size of the attention weights of the longest answer, in bytes, above which there are no maps."""


def gather(run, per_task: int = 6) -> tuple[dict[str, tuple[Sample, ...]], tuple[str, ...]]:
    """Samples of every held-out task that is evaluated under training conditions.

    Args:
        run: an opened run.
        per_task: maximum number per task.

    Returns:
        The samples by task, and notes on what is missing.
    """
    attend, notes = _attention(run)
    samples = {}
    for name, task in run.experiment.evaluation.tasks.items():
        if not task.as_trained:
            continue
        layout, sampling = run.experiment.data.layout, run.experiment.evaluation.sampling
        try:
            examples = choose(task.source.open(), run, per_task)
            prompts = [example.prompt for example in examples]
            written = generate(run.model, run.params, run.tokenizer, prompts, layout, sampling)
        except UserError as error:  # for example, the data are on another machine
            notes = (*notes, f"No samples of {name}: {error}")
            continue
        if not examples:
            notes = (*notes, f"{name}: no held-out example can be shown")
            continue
        samples[name] = tuple(
            sample(run, example, answer.text, task.generate, attend)
            for example, answer in zip(examples, written, strict=True)
        )
    return samples, notes


def choose(source: Sequence[Example], run, count: int) -> list[Example]:
    """Up to `count` usable examples with a prompt, deterministic; a text without a prompt is split if possible."""
    chosen = []
    order = np.random.default_rng(run.experiment.evaluation.seed).permutation(len(source))
    for i in order[: 20 * count]:
        try:
            example = cut(source[int(i)])
            lay_out(example, _layout(run), run.tokenizer, run.model.spec.adapters)
        except BadRecord:
            continue
        if example.answer and any(isinstance(part, Medium) or part.text for part in example.prompt):
            chosen.append(example)
        if len(chosen) == count:
            break
    return chosen


def _layout(run):
    """How single answers are laid out, also by a run that was trained on pairs."""
    return run.experiment.data.layout.replace(pairs=False)


def cut(example: Example) -> Example:
    """Splits an example that begins with a target text into a prompt and its continuation; returns others unchanged."""
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
    """The sample for an example and the model's answer. `judged`: whether answers are right or wrong."""
    right = normalize(answer) == normalize(example.answer) if judged else None
    spoken = mark(answer, example.answer) if judged else tuple(Word(word) for word in answer.split())
    maps = attend(example, answer) if spoken else {}
    prompt, numbers = [], dict.fromkeys(run.model.spec.adapters, 0)
    for part in example.prompt:
        if isinstance(part, Text):
            prompt.append(part.text)
        else:
            place = part.modality, numbers[part.modality]
            weights = {kind: found[place] for kind, found in maps.items() if place in found}
            prompt.append(item(part, run.model.spec.adapters[part.modality], weights))
            numbers[part.modality] += 1
    return Sample(tuple(prompt), spoken, example.answer.strip(), right, example.place)


def mark(answer: str, truth: str) -> tuple[Word, ...]:
    """The words of an answer, each right if it is in the longest common subsequence with the truth."""
    said, true = answer.split(), truth.split()
    matcher = difflib.SequenceMatcher(None, [normalize(w) for w in said], [normalize(w) for w in true], autojunk=False)
    right = {i for block in matcher.get_matching_blocks() for i in range(block.a, block.a + block.size)}
    return tuple(Word(word, i in right) for i, word in enumerate(said))


def item(part: Medium, adapter, attention: Mapping[str, np.ndarray] | None = None) -> Item:
    """A media item as a picture, with audio if it has any."""
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
        attention=attention or {},
    )


def _attention(run):
    """A function (example, answer) -> the result of `maps` by kind of attention, and notes if it is unavailable."""
    layout, adapters, decoder = _layout(run), run.model.spec.adapters, run.model.spec.decoder

    @jax.jit
    def heads_averaged(params, batch, chosen_R):
        averaged = {}
        for number, weights_BHRT in run.model.attention(params, batch, chosen_R).items():
            layer = decoder.period()[number % len(decoder.period())]
            for kind, heads in layer.block.kinds_of_weights(layer.attention).items():
                averaged.setdefault(kind, {})[number] = weights_BHRT[0, heads].mean(axis=0)
        return averaged

    def attend(example: Example, answer: str) -> dict:
        written = Example((*example.prompt, Text(answer)), example.place)
        try:
            row = lay_out(written, layout, run.tokenizer, adapters)
        except BadRecord:  # the answer fills the row
            return {}
        batch = collate([row], layout.seq_len, adapters)
        predicted = predictions(batch)
        chosen_R = np.zeros(_rounded(len(predicted)), np.int32)
        if size * len(chosen_R) // QUERIES > LARGEST:
            return {}
        chosen_R[: len(predicted)] = predicted
        found = heads_averaged(run.params, batch, chosen_R)
        nothing_RT = np.full((len(chosen_R), layout.seq_len), np.nan, np.float32)
        given = batch, answer, run.tokenizer, {name: adapter.positions for name, adapter in adapters.items()}
        by_kind = {
            kind: np.stack([layers.get(layer, nothing_RT) for layer in range(decoder.depth)])
            for kind, layers in found.items()
        }
        return {kind: maps(weights_LRT, *given) for kind, weights_LRT in by_kind.items()}

    def without(*notes: str):
        return (lambda example, answer: {}), notes

    if not adapters:
        return without()
    empty = collate([None], layout.seq_len, adapters)
    shapes = jax.eval_shape(run.model.attention, run.model.abstract(), empty, np.zeros(QUERIES, np.int32))
    if not shapes:
        return without("No attention maps: this attention has no weights.")
    size = 4 * sum(math.prod(leaf.shape) for leaf in shapes.values())
    if size > LARGEST:
        return without(f"No attention maps: the weights of {QUERIES} tokens would take {size / 2**30:.0f} GiB.")
    if len(shapes) < decoder.depth:
        shown = ", ".join(str(layer + 1) for layer in sorted(shapes))
        return attend, (f"Attention maps show blocks {shown}: the others have no attention weights.",)
    return attend, ()


def _rounded(predictions: int) -> int:
    """Rounds up, so that few programs are compiled."""
    return -(-predictions // QUERIES) * QUERIES


def predictions(batch) -> np.ndarray:
    """Positions in a single row whose next token is a target: the answer's tokens and the end."""
    return np.flatnonzero(np.asarray(batch.weight_BT[0]) > 0)


def maps(weights_LRT: np.ndarray, batch, answer: str, tokenizer, positions: Mapping[str, int]) -> dict:
    """Attention from each word of the answer to each media item, given a row's attention.

    Args:
        weights_LRT: weights [L, prediction, key], averaged over heads; rows beyond the predictions are ignored. NaN in
            layers without weights.
        batch: a batch with only this row.
        answer: the answer.
        tokenizer: the tokenizer.
        positions: P by adapter, in the model's order.

    Returns:
        {(modality, item index): [L, W, filled positions]}; empty if a word shares its token with another.
    """
    tokens = [int(token) for token in np.asarray(batch.target_BT[0])[predictions(batch)]]
    words = words_of_tokens(tokens, answer, tokenizer)
    queries = [[r for r, word in enumerate(words) if word == w] for w in range(len(answer.split()))]
    if not all(queries):
        return {}
    found = {}
    modality, slot = np.asarray(batch.modality_BT[0]), np.asarray(batch.slot_BT[0])
    for number, (name, P) in enumerate(positions.items(), start=1):
        for n in np.unique(slot[modality == number] // P):
            keys = np.flatnonzero((modality == number) & (slot // P == n))
            seen = [weights_LRT[:, query][:, :, keys].mean(axis=1) for query in queries]
            found[name, int(n)] = np.stack(seen, axis=1)
    return found


def words_of_tokens(tokens: Sequence[int], text: str, tokenizer) -> list[int | None]:
    """For each token, the index of the word with its last character; None for spaces and the end."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    numbers = []
    for i, token in enumerate(tokens):
        last = len(tokenizer.decode(tokens[: i + 1])) - 1
        inside = token != tokenizer.eos
        numbers.append(next((w for w, (a, b) in enumerate(spans) if inside and a <= last < b), None))
    return numbers
