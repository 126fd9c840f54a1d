"""Evaluates a model on every held-out task."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from polygpt.data.example import Example
from polygpt.data.layout import LayoutSpec, MediaCache, lay_out
from polygpt.data.packing import Packer
from polygpt.data.sources.base import example_at
from polygpt.errors import BadRecord, UserError
from polygpt.evaluation import conditions
from polygpt.evaluation.bootstrap import bootstrap_mean
from polygpt.evaluation.head_metric import measured
from polygpt.evaluation.likelihood import Likelihoods, predicts_text, score, summary
from polygpt.evaluation.modality_gain import modalities, shuffle
from polygpt.evaluation.preference import preference
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.generation.generate import generate
from polygpt.sequence import Batch

Progress = Callable[[str, int, int], None]
"""Called with a description ("fusion: loss"), the examples done, and the total."""


def evaluate(
    model,
    params,
    tokenizer,
    adapters: Mapping,
    layout: LayoutSpec,
    spec: EvaluationSpec,
    *,
    progress: Progress | None = None,
    proceed: Callable[[], None] = lambda: None,
    cache: MediaCache | None = None,
    faults: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Measures a model on held-out tasks. Deterministic.

    All batches have the shape [spec.batch_size, layout.seq_len], so the loss is compiled once for all tasks and calls,
    and once more for each other length or changed model.

    Args:
        model: the bound model.
        params: its parameters.
        tokenizer: the tokenizer used in training.
        adapters: the model's adapters, by modality.
        layout: how examples become rows.
        spec: the tasks and what to measure.
        progress: progress callback.
        proceed: called before each batch; an exception from it ends the evaluation.
        cache: cache of decoded media, to reuse it between calls; default: one for this call.
        faults: receives one line per task that could not be measured fully, by name, while the others are still
            measured. None: raise the first error, as also happens if no task can be measured.

    Returns:
        Plain numbers; losses are in nats:
        `{"tasks": {name: {"loss", "perplexity", "bits_per_byte", "token_accuracy", "n", and those of its metrics}},
        "modalities": {"text" | "image" | "audio" | "audio+image" ...: the first five, over all examples with exactly
        these media}, "modality_gain": {"task/modality": {"gain", "low", "high", "n"}}}`. "skipped" is the number of
        unusable records of a task, "cut" the number of answers that ran out of room. Tasks under other conditions than
        training, such as longer sequences, are not included in "modalities".

    Raises:
        UserError: a task has no usable example, or changes the shapes of parameters. BadRecord for an unusable example.
    """
    cache = MediaCache(512) if cache is None else cache
    progress = progress or (lambda *_: None)
    trained = _Reader(model, params, tokenizer, adapters, layout, spec.batch_size, cache, progress, proceed)
    tasks, gains, pooled = {}, {}, {}

    def measure(name: str, task: EvalTask) -> None:
        reader = trained.of(name, task)
        examples, scores, skipped = _read(name, task, spec, reader)
        tasks[name] = summary(scores) | ({"skipped": skipped} if skipped else {})
        for i, example in enumerate(examples if task.as_trained else ()):
            pooled.setdefault("+".join(sorted(modalities([example]))) or "text", []).append(scores[i : i + 1])
        pairs = [i for i, example in enumerate(examples) if example.rejected is not None]
        if pairs and predicts_text(reader.model.spec):
            tasks[name] |= _preference(name, [examples[i] for i in pairs], scores[pairs], spec, reader)
        if task.heads:
            tasks[name] |= _judge_heads(name, task, examples, reader)
        if task.generate:
            tasks[name] |= _judge(name, task, spec, examples, reader)
        for modality in modalities(examples) if spec.modality_gain else []:
            gain = _gain(f"{name}/{modality}", modality, spec, examples, scores, reader)
            if gain is not None:
                gains[f"{name}/{modality}"] = gain

    error = None
    for name, task in spec.tasks.items():
        try:
            measure(name, task)
        except Exception as raised:
            if faults is None:
                raise
            error = raised
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            faults[name] = " ".join(said.split())
    if error and not tasks:
        raise error
    by_media = {media: summary(Likelihoods.join(scores)) for media, scores in sorted(pooled.items())}
    return {"tasks": tasks, "modalities": by_media, "modality_gain": gains}


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Scores examples: packs them into batches of equal shape and runs the model."""

    model: Any
    params: Any
    tokenizer: Any
    adapters: Mapping
    layout: LayoutSpec
    batch_size: int
    cache: MediaCache
    progress: Progress
    proceed: Callable[[], None]
    last: int | None = None

    def of(self, name: str, task: EvalTask) -> "_Reader":
        """A reader for the conditions of a task."""
        model = conditions.model_of(name, task, self.model)
        adapters = model.spec.adapters if task.model else self.adapters
        layout = conditions.layout_of(task, self.layout)
        return dataclasses.replace(self, model=model, adapters=adapters, layout=layout, last=task.last)

    def __call__(self, what: str, examples: Sequence[Example], passes: Callable[[BadRecord], bool]):
        """Indices and scores of the usable examples; raises faults unless `passes` accepts them."""
        order, scores = [], []
        for indices, batch in self.batches(what, examples, passes):
            order += indices
            scores.append(score(self.model, self.params, batch, self.tokenizer.token_bytes, self.last))
        if not scores:
            return [], None
        return sorted(order), Likelihoods.join(scores)[np.argsort(order)]

    def batches(
        self, what: str, examples: Sequence[Example], passes: Callable[[BadRecord], bool]
    ) -> Iterator[tuple[list[int], Batch]]:
        """Batches of the usable examples, and their indices by row and segment."""
        packer, waiting = self._packer(), {}  # index of an example, by identity of its row
        for i, example in enumerate(examples):
            try:
                row = lay_out(example, self.layout, self.tokenizer, self.adapters, cache=self.cache)
            except BadRecord as error:
                if not passes(error):
                    raise
                continue
            if not packer.add(row):
                yield self._packed(packer, waiting)
                self.progress(what, i, len(examples))
                packer, waiting = self._packer(), {}
                packer.add(row)
            waiting[id(row)] = i
        if waiting:
            yield self._packed(packer, waiting)
        self.progress(what, len(examples), len(examples))

    def _packer(self) -> Packer:
        return Packer(self.batch_size, self.layout.seq_len, self.adapters, self.layout.packing)

    def _packed(self, packer: Packer, waiting: dict[int, int]) -> tuple[list[int], Batch]:
        self.proceed()
        return [waiting[id(row)] for packed in packer.rows for row in packed], packer.batch()


def _read(name: str, task: EvalTask, spec: EvaluationSpec, reader: _Reader) -> tuple[list[Example], Likelihoods, int]:
    """The usable examples of a task, their scores with their own media, and the number of unusable ones."""
    source, examples = task.source.open(), []
    chosen = np.random.default_rng(spec.seed).permutation(len(source))[: task.limit]
    for i in sorted(chosen):
        try:
            examples.append(example_at(source, int(i)))
        except BadRecord:
            if spec.on_bad_record == "raise":
                raise
    if not examples:
        raise UserError(f"evaluation task {name!r}: its source {type(task.source).__name__} has no usable example")
    indices, scores = reader(f"{name}: loss", examples, lambda error: spec.on_bad_record == "skip")
    if not indices:
        raise UserError(f"evaluation task {name!r}: none of its {len(chosen)} examples is usable")
    return [examples[i] for i in indices], scores, len(chosen) - len(indices)


def require_prompts(spec: EvaluationSpec) -> None:
    """Raises UserError, naming the task and the record, if answers are requested for a record without a prompt."""
    for name, task in spec.tasks.items():
        if not task.generate:
            continue
        source = task.source.open()
        for i in sorted(np.random.default_rng(spec.seed).permutation(len(source))[: task.limit]):
            with contextlib.suppress(BadRecord):  # reported when it is scored
                _require_prompt(name, source[int(i)])


def _require_prompt(name: str, example: Example) -> None:
    if not example.prompt:
        raise UserError(f"evaluation task {name!r}: {example.place} has no prompt to answer: set generate to false")


def _judge(name: str, task: EvalTask, spec: EvaluationSpec, examples: list[Example], reader: _Reader) -> dict:
    """The metrics of a task over the generated answers."""
    for example in examples:
        _require_prompt(name, example)
    reader.progress(f"{name}: answers", 0, len(examples))
    prompts = [example.prompt for example in examples]
    given = (reader.model, reader.params, reader.tokenizer, prompts, reader.layout, spec.sampling)
    written = generate(*given, batch_size=spec.batch_size, proceed=reader.proceed)
    answers, cut = [one.text for one in written], sum(one.finish == "length" for one in written)
    reader.progress(f"{name}: answers", len(examples), len(examples))
    truths = [example.answer for example in examples]
    figures = {key: value for metric in task.metrics for key, value in metric(answers, truths).items()}
    return figures | ({"cut": cut} if cut else {})


def _preference(name: str, examples: list[Example], scores: Likelihoods, spec: EvaluationSpec, reader: _Reader) -> dict:
    """The preference between the answers of pairs, given the scores of the preferred ones."""
    rejected = [example.with_rejected for example in examples]
    kept, others = reader(f"{name}: rejected answers", rejected, lambda error: spec.on_bad_record == "skip")
    return preference(scores[kept], others) if kept else {}


def _judge_heads(name: str, task: EvalTask, examples: list[Example], reader: _Reader) -> dict[str, float]:
    """The metrics of the outputs of heads. Raises UserError if no example has what one compares."""
    batches = (batch for _, batch in reader.batches(f"{name}: heads", examples, lambda error: False))
    figures = measured(reader.model, reader.params, batches, task.heads)
    for metric in task.heads:
        if not any(one.name in figures for one in metric.measures):
            raise UserError(f"evaluation task {name!r}: no example has {metric.needs}: change its heads")
    return figures


def cut_answers(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each task of `evaluate`'s whose answers were cut, which count as wrong: what to change."""
    return [
        f"{name}: {figures['cut']:,} of {figures['n']:,} answers were cut before they ended: raise "
        "evaluation.sampling.max_tokens (null takes all the room in a row), or the length of the rows"
        for name, figures in tasks.items()
        if figures.get("cut")
    ]


def _gain(
    what: str, modality: str, spec: EvaluationSpec, examples: list[Example], scores: Likelihoods, reader: _Reader
) -> dict[str, float | int] | None:
    """The modality gain and its interval; None without two examples whose media can be exchanged, or without texts."""
    if not scores.weight.all():
        return None
    indices, shuffled = shuffle(examples, modality, spec.seed)
    if not indices:
        return None
    # Another example's media may be longer: skip pairs that no longer fit into the row.
    kept, others = reader(f"{what} gain", shuffled, lambda error: error.reason == "too long")
    if not kept:
        return None
    difference = others.mean_loss - scores[[indices[k] for k in kept]].mean_loss
    gain, low, high = bootstrap_mean(difference, resamples=spec.resamples, seed=spec.seed)
    return {"gain": gain, "low": low, "high": high, "n": len(kept)}
