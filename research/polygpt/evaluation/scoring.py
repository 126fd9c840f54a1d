"""Computes the log-probabilities of the training data under a model, which `data/scores.py` reads in training."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt import sharding
from polygpt.data.example import Example
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.loader import DataSpec, Task, open_task, require_data
from polygpt.data.packing import Packer, Row
from polygpt.data.scores import Manifest, digest, layout_fields, scored
from polygpt.data.scores_writer import ScoresWriter
from polygpt.data.sources.base import example_at
from polygpt.data.spans import aligned
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.errors import BadRecord, SpecError, UserError
from polygpt.models.functional import Model
from polygpt.objectives.base import require_hidden_targets
from polygpt.parameters import paths
from polygpt.sequence import Batch
from polygpt.sharding import MeshSpec


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model that scores data.

    Attributes:
        model: the bound model.
        params: its parameters.
        tokenizer: its tokenizer.
        origin: where its parameters come from, for messages.
        seq_len: number of positions per row; None for that of the data. Its rows may be longer than those of the data,
            with another tokenizer or other adapters.
    """

    model: Model
    params: Any
    tokenizer: Tokenizer
    origin: str
    seq_len: int | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of the parameters."""
        found = hashlib.blake2b(digest_size=16)
        for name, parameter in sorted(paths(self.params).items()):
            found.update(name.encode())
            found.update(np.ascontiguousarray(jax.device_get(parameter)).tobytes())
        return found.hexdigest()

    def on_all_devices(self) -> "Scorer":
        """The same on all devices, which share the rows; unchanged if the model is on several already."""
        if self.model.layout is not None or jax.device_count() == 1:
            return self
        layout = sharding.make_layout(MeshSpec(), jax.devices())
        params = jax.device_put(self.params, layout.replicated())
        return dataclasses.replace(self, model=self.model.on(layout), params=params)


def write_scores(
    scorer: Scorer,
    data: DataSpec,
    tokenizer: Tokenizer,
    adapters: Mapping[str, Any],
    folder: str,
    *,
    top: int = 0,
    batch_size: int = 16,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, int]:
    """Scores every example of the training data; resumes what an earlier call has left unfinished.

    Args:
        scorer: the model.
        data: the training data of the model that will read the scores.
        tokenizer: its tokenizer. If that of the scorer is another one, scores are of spans of bytes: see `spans.py`.
        adapters: its adapters. The scorer may have others, such as for larger pictures.
        folder: where to write.
        top: number of likely tokens per position.
        batch_size: rows per batch, rounded up to a multiple of the devices that share them.
        progress: called with the task, the examples done and their total.

    Returns:
        Numbers of examples, of unusable records, of scored tokens and of bytes in the folder.

    Raises:
        UserError: if the data cannot be opened or change in every epoch, the model cannot score their rows, the folder
            has something else, or likely tokens of another tokenizer are asked for. BadRecord for an unusable record,
            unless the data skip them.
    """
    same = scorer.tokenizer.fingerprint == tokenizer.fingerprint
    if top and not same:
        raise UserError(
            f"{scorer.origin} has another tokenizer, whose likely tokens are not those of the data: set --top to 0, "
            "and distil spans of bytes with SpanDistillation"
        )
    if not 0 <= top <= tokenizer.vocabulary:
        raise UserError(f"--top is {top}: it must be from 0 to the number of ids, {tokenizer.vocabulary:,}")
    require_data(data.replace(scores={"of the model": folder}), adapters, data.batch_size)
    _require_readable(scorer, data.layout)
    examples = {name: open_task(name, task) for name, task in data.tasks.items()}
    counts = {name: len(some) for name, some in examples.items()}
    given = tokenizer.fingerprint, tokenizer.vocabulary, not same, top, layout_fields(data.layout), counts
    writer = ScoresWriter(folder, Manifest(scorer.origin, scorer.fingerprint, *given))
    shares = 1 if scorer.model.layout is None else scorer.model.layout.size("batch")
    rows = -(-batch_size // shares) * shares
    reader = _Reader(scorer, data, tokenizer, adapters, same, writer.manifest.record, rows)
    for name, number in writer.missing():
        chosen = writer.manifest.examples(name, number)
        writer.write(name, number, reader.shard(name, examples[name], chosen, progress))
    writer.finish()
    return writer.counts()


def _require_readable(scorer: Scorer, layout: LayoutSpec) -> None:
    """Raises UserError unless the model predicts the targets of these rows. Its rows may be shorter or longer."""
    spec = scorer.model.spec
    try:
        require_hidden_targets(spec)
        spec.check_reading(layout.replace(seq_len=spec.limit() or layout.seq_len))
    except SpecError as error:
        raise UserError(f"{scorer.origin} cannot score these data: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Lays out examples for both models, packs those of the scorer into batches, and runs it."""

    scorer: Scorer
    data: DataSpec
    tokenizer: Tokenizer
    adapters: Mapping[str, Any]
    same: bool
    record: np.dtype
    batch_size: int

    @functools.cached_property
    def layout(self) -> LayoutSpec:
        """The layout of the scorer's rows."""
        seq_len = self.scorer.seq_len or self.data.layout.seq_len
        limit = self.scorer.model.spec.limit()
        return self.data.layout.replace(seq_len=seq_len if limit is None else min(seq_len, limit))

    @functools.cached_property
    def alike(self) -> bool:
        """Whether both models read the same rows."""
        return self.same and self.scorer.model.spec.adapters == self.adapters and self.layout == self.data.layout

    def shard(
        self, name: str, examples: Sequence[Example], chosen: range, progress: Callable[[str, int, int], None]
    ) -> list[tuple[int, np.ndarray] | None]:
        """Digest and records of each chosen example; None for an unusable one."""
        found: list[tuple[int, np.ndarray] | None] = [None] * len(chosen)
        packer, waiting = self._packer(), {}
        for place, i in enumerate(chosen):
            try:
                example = example_at(examples, i)
                own, theirs = self._rows(example, self.data.tasks[name])
            except BadRecord:
                if self.data.on_bad_record == "raise":
                    raise
                continue
            if not packer.add(theirs):
                self._run(packer, waiting, found)
                progress(name, i, len(examples))
                packer, waiting = self._packer(), {}
                packer.add(theirs)
            waiting[id(theirs)] = place, example, own
        self._run(packer, waiting, found)
        progress(name, chosen.stop, len(examples))
        return found

    def _rows(self, example: Example, task: Task) -> tuple[Row, Row]:
        as_task = {"prompt_weight": task.prompt_weight, "paired": task.paired}
        own = lay_out(example, self.data.layout, self.tokenizer, self.adapters, **as_task)
        if self.alike:
            return own, own
        return own, lay_out(example, self.layout, self.scorer.tokenizer, self.scorer.model.spec.adapters, **as_task)

    def _packer(self) -> Packer:
        adapters = self.scorer.model.spec.adapters
        return Packer(self.batch_size, self.layout.seq_len, adapters, self.layout.packing)

    def _run(self, packer: Packer, waiting: dict, found: list) -> None:
        if not waiting:
            return
        top = self.record["ids"].shape[0] if "ids" in self.record.names else 0
        log_p_BT, *likely = jax.device_get(_scores(self.scorer.model, self.scorer.params, packer.batch(), top))
        for b, packed in enumerate(packer.rows):
            begin = 0
            for row in packed:
                here = slice(begin, begin + len(row))
                begin += len(row)
                place, example, own = waiting[id(row)]
                records = np.zeros(scored(own).sum(), self.record)
                if self.same:
                    where = scored(row)
                    records["log_p"] = log_p_BT[b, here][where]
                    for field, array in zip(("ids", "top"), likely, strict=False):
                        records[field] = array[b, here][where]
                else:
                    given = own, self.tokenizer, row, self.scorer.tokenizer, log_p_BT[b, here], example.place
                    try:
                        records["log_p"] = aligned(*given)
                    except BadRecord:
                        if self.data.on_bad_record == "raise":
                            raise
                        continue
                found[place] = digest(example, own), records


@functools.partial(jax.jit, static_argnames=("model", "top"))
def _scores(model: Model, params: Any, batch: Batch, top: int):
    """Log-probabilities of the targets, float32 [B, T]; with `top` also int32 [B, T, k] and float32 [B, T, k].

    As many logits as those of one row exist at a time: of some positions C of every row, so that devices share them.
    """
    hidden_BTD, *_ = model.hidden(params, batch)
    B, T = batch.shape
    size = -(-T // B)
    spare = -T % size

    def of_block(given):
        x_BCD, target_BC = given
        log_p_BCV = jax.nn.log_softmax(model.logits(params, x_BCD).astype(jnp.float32))
        log_p_BC = jnp.take_along_axis(log_p_BCV, target_BC[..., None], axis=-1)[..., 0]
        if not top:
            return (log_p_BC,)
        values_BCk, ids_BCk = jax.lax.top_k(log_p_BCV, top)
        return log_p_BC, ids_BCk, values_BCk

    def split(x_BT):
        x_BT = jnp.pad(x_BT, [(0, 0), (0, spare), *[(0, 0)] * (x_BT.ndim - 2)])
        return jnp.moveaxis(x_BT.reshape(B, -1, size, *x_BT.shape[2:]), 1, 0)

    def joined(x_NBC):
        return jnp.moveaxis(x_NBC, 0, 1).reshape(B, T + spare, *x_NBC.shape[3:])[:, :T]

    found = jax.lax.map(of_block, (split(hidden_BTD), split(jnp.asarray(batch.target_BT))))
    return model.replicated(jax.tree.map(joined, found))
