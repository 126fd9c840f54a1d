"""Labels in training: how a batch is split does not matter, nor what stands where there is no label."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import build, example, lively, tiny
from polygpt.attention.multi_head import MultiHead
from polygpt.data.labels import Label
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task, train_batches
from polygpt.data.sources.embedded import Embedded
from polygpt.evaluation.label_accuracy import LabelAccuracy
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.heads.linear import LinearHead
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.objectives.classification import LabelClassification
from polygpt.objectives.loss import Loss
from polygpt.objectives.next_token import NextToken
from polygpt.objectives.regression import Regression
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import Constant
from polygpt.scale.plan.compilation import abstract_batch
from polygpt.training import parallel
from polygpt.training.experiment import Experiment, TrainSpec
from polygpt.training.loggers import JsonLines
from polygpt.training.loop import train
from polygpt.training.run import open_run

T = 12
ROWS = [[example(6, seed=1), example(3, seed=2)], [example(9, seed=3)], [example(5, seed=4)], []]
HEADS = {"kind": LinearHead(3, pool="mean"), "size": LinearHead(2)}
OBJECTIVES = {
    "next": (NextToken(), 0.5),
    "kind": (LabelClassification("kind"), 1.0),
    "size": (Regression("size", loss="gaussian"), 0.2),
}
MODEL = bind(tiny(adapters={}).replace(heads=HEADS), 31)


def labelled(rows=ROWS):
    """Some tokens have a kind, the last of each example a size."""
    batch = build(rows, T, adapters={})
    rng = np.random.default_rng(0)
    real_BT = batch.segment_BT > 0
    last_BT = real_BT & (np.pad(batch.segment_BT, ((0, 0), (0, 1)))[:, 1:] != batch.segment_BT)
    kind_BT = np.where(real_BT, rng.choice([0, 1, 2, np.nan, np.nan], real_BT.shape), np.nan)
    size_BT = np.where(last_BT, batch.tokens_BT, np.nan)
    return batch.replace(extra={"kind": np.float32(kind_BT), "size": np.float32(size_BT)})


@pytest.fixture(scope="module")
def gradient():
    params = jax.tree.map(jnp.asarray, lively(MODEL))
    trainable = jax.tree.map(lambda _: True, params)

    def of(batch, accumulate=1):
        loss = Loss(MODEL, OBJECTIVES, trainable, accumulate)

        @jax.jit
        def run(params, batch):
            seen = loss.seen(batch, jax.random.key(0))
            return loss.gradient(params, {}, seen, loss.weights(seen), None)

        return run(params, batch)

    return of


def close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, theirs)


def test_microbatches_and_packing_do_not_change_the_gradient(gradient):
    batch = labelled()
    means, whole = gradient(batch)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(whole["heads"]))
    for accumulate in (2, 4):
        close(gradient(batch, accumulate), (means, whole))
    alone = build([[one] for row in ROWS for one in row], T, adapters={})
    pieces = [batch.extra[name][b, start:stop] for name in batch.extra for b, start, stop in SPANS]
    extra = {name: np.full(alone.shape, np.nan, np.float32) for name in batch.extra}
    for (name, row), piece in zip(((name, i) for name in extra for i in range(4)), pieces, strict=True):
        extra[name][row, : len(piece)] = piece
    close(gradient(alone.replace(extra=extra)), (means, whole))


SPANS = [(0, 0, 6), (0, 6, 9), (1, 0, 9), (2, 0, 5)]
"""(row, start, stop) of the examples of ROWS."""


def test_without_any_label_their_losses_and_gradients_are_zero(gradient):
    batch = labelled()
    means, found = gradient(batch.replace(extra=jax.tree.map(lambda x: np.full_like(x, np.nan), batch.extra)))
    assert means["kind"] == means["size"] == 0 and means["next"] > 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found["heads"]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


# --- a run ------------------------------------------------------------------------------------------------------------


def experiment() -> Experiment:
    train_, test = (Embedded("text", split, characters=12, labels=True) for split in ("train", "test"))
    layout = LayoutSpec(seq_len=32, labels={"corpus": Label(classes=2), "rare": Label((3,))})
    heads = {"corpus": LinearHead(2, pool="mean")}
    evaluated = EvalTask(test, limit=8, heads=(LabelAccuracy("corpus"),))
    return Experiment(
        "labels",
        DataSpec({"text": Task(train_)}, layout, batch_size=4),
        Optim(Constant(1e-2)),
        TrainSpec(steps=4, log_every=1, evaluate_every=2, metric="text/corpus_accuracy", better="higher"),
        ModelSpec(DecoderSpec(width=16, depth=0, attention=MultiHead(heads=2)), heads=heads),
        objectives={"corpus": (LabelClassification("corpus"), 1.0), "next": (NextToken(), 0.1)},
        evaluation=EvaluationSpec({"text": evaluated}, batch_size=8),
    )


def test_a_run_learns_labels_and_chooses_its_checkpoint_by_them(tmp_path):
    train(experiment(), tmp_path / "run", lambda workdir, step, _: [JsonLines(workdir, step)])
    run = open_run(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/corpus"] for line in lines if "loss/corpus" in line]
    assert len(losses) == 4 and all(0 < loss < 5 for loss in losses)
    measured = [line["evaluation"]["text"] for line in lines if "evaluation" in line]
    assert measured and all(0 <= one["corpus_accuracy"] <= 1 for one in measured)
    assert run.experiment == experiment()


def test_a_plan_has_the_shapes_of_the_batches():
    chosen = experiment()
    batch = next(train_batches(chosen.data, chosen.tokenizer.build(), {}, seed=0))
    runs = parallel.build("single", None)
    planned = abstract_batch(chosen, runs)
    shapes = [jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), one) for one in (batch, planned)]
    assert shapes[0] == shapes[1]
