"""Metrics of ablations, searches and comparisons: held-out tasks, the training loss, costs of a run."""

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from polygpt.data.example import Text
from polygpt.data.layout import prompt_batch
from polygpt.evaluation.metric import Measure
from polygpt.generation import decoding
from polygpt.generation.sampling import GREEDY
from polygpt.models.functional import bind
from polygpt.training.experiment import Experiment

TRAINING_LOSS = "train/loss"
"""The mean of the last tenth of the training losses."""
CACHE, DECODING = "cost/cache_bytes", "cost/decode_seconds"
MEASURES = {
    TRAINING_LOSS: Measure("loss", "lower", unit="nats per token", needs="likelihood"),
    "cost/parameters": Measure("parameters", "lower", needs="likelihood"),
    "cost/flops": Measure("flops", "lower", "FLOPs", "of the whole run", needs="likelihood"),
    "cost/seconds": Measure("seconds", "lower", unit="s of wall time", needs="likelihood"),
    CACHE: Measure("cache_bytes", "lower", unit="bytes per row", needs="likelihood"),
    DECODING: Measure("decode_seconds", "lower", unit="s per token", needs="likelihood"),
}
"""Metrics that belong to no held-out task. `cost/cache_bytes`: size of the decoding cache for one row of training
length. `cost/decode_seconds`: time per token for greedily generating the second half of such a row."""
REPEATS = 5
"""Number of decoding-time measurements; the median counts."""


def measure(experiment: Experiment, metric: str) -> Measure:
    """Describes a metric of the experiment's runs.

    Raises:
        SpecError: the experiment does not measure it.
    """
    if metric in MEASURES:
        return MEASURES[metric]
    return experiment.evaluation.measure(metric, answers=experiment.train.evaluate == "full")


def figures(record: Mapping[str, Any]) -> dict[str, float | None]:
    """All metrics and costs of a run, from its line of results."""
    cost = {f"cost/{name}": record[name] for name in ("parameters", "flops", "seconds") if name in record}
    return {**cost, **record["metrics"]}


def lacks(record: Mapping[str, Any], metrics: Sequence[str]) -> bool:
    """Whether a line of results lacks a requested cost, because it was written before the request."""
    return any(metric.startswith("cost/") and metric not in figures(record) for metric in metrics)


def cache_bytes(experiment: Experiment) -> int:
    """Size of the decoding cache for one row of training length. Allocates nothing."""
    model = bind(experiment.model, experiment.tokenizer.build().vocabulary)
    shapes = jax.eval_shape(functools.partial(model.init_cache, 1, experiment.data.layout.seq_len))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def decode_seconds(experiment: Experiment) -> float:
    """Time per token for generating the rest of a row of training length after a prompt of about half its length.

    One row, greedy, on the default device, with initial parameters: their values do not change the time.
    """
    tokenizer, layout = experiment.tokenizer.build(), experiment.data.layout
    model = bind(experiment.model, tokenizer.vocabulary)
    params = jax.jit(lambda key: model.unstacked(model.init(key)))(jax.random.key(experiment.seed))
    model = model.merged
    prompt = [Text("a " * (layout.seq_len // 4))]
    batch = prompt_batch([prompt], layout, tokenizer, experiment.model.adapters, ["the prompt"])
    size = max(1, layout.seq_len - int((batch.segment_BT > 0).sum()))
    choice, never, limit_B = GREEDY.choice(), np.int32(-1), np.full(1, size, np.int32)
    first = np.uint32(0), np.zeros(1, np.int32), limit_B
    seconds = []
    for _ in range(1 + REPEATS):  # the first compiles
        state = decoding.prefill(model, choice, size, params, batch, never, *first)
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state = decoding.decode(model, choice, params, state, never, np.int32(size))
        jax.block_until_ready(state.tokens_BS)
        seconds.append((time.perf_counter() - begin) / max(1, size - 1))
    return statistics.median(seconds[1:])
