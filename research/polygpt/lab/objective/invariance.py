"""Properties of sums: the loss does not depend on packing, padding, microbatches, seeds beside it or the process."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.errors import UserError
from polygpt.lab.compiled import compiled
from polygpt.lab.measured import Measured, absent
from polygpt.lab.objective import rows
from polygpt.lab.objective.subject import NAME, Subject, off_by
from polygpt.objectives.base import depends_on_scores_only
from polygpt.sequence import Media
from polygpt.spec import from_json, to_json
from polygpt.training.randomness import DROPOUT, VIEW, derive

PARTS = 4
"""Number of microbatches."""
BLOCK = 24
"""Positions whose logits exist at a time: less than two of every row."""
SEEDS = (3, 5)
"""Seeds that are trained together."""


def rows_add_up(subject: Subject) -> Measured:
    """Total and weight of all rows are the sums of those of their parts."""
    if subject.batch_wide:
        return absent("it compares rows")
    order = [(b, np.unique(x[x > 0]).tolist()) for b, x in enumerate(subject.batch.segment_BT)]
    parts = [subject.result(subject.taken(order[start::2])) for start in (0, 1)]
    none = subject.result(subject.taken([]))
    return Measured(subject.summed(*parts, none).off_by(subject.usual), subject.bound)


def packed_equals_alone(subject: Subject) -> Measured:
    """Examples give the same loss each in a row of its own, and packed in another order."""
    if subject.needs.whole_rows:
        return absent("it is a statistic of whole rows (Needs.whole_rows)")
    together = subject.needs.together
    for order in (rows.reordered, rows.alone):
        found = subject.result(subject.taken(order(subject.batch, together)))
        error = found.off_by(subject.usual)
        if not error <= subject.bound:
            place = "in rows of their own" if order is rows.alone else "in another order"
            return Measured(error, subject.bound, f"examples {place} give another loss: does it cross segment_BT?")
    return Measured(error, subject.bound)


def padding(subject: Subject) -> Measured:
    """What stands at padding and in unused items of media changes nothing, not even NaN."""
    seen = subject.seen
    padding_BT = np.asarray(seen.segment_BT) == 0
    rng = np.random.default_rng(4)

    def garbage(x):
        random = rng.integers(0, 256, x.shape).astype(x.dtype)
        return np.where(padding_BT, random, x)

    media = {}
    for name, one in seen.media.items():
        unused = np.asarray(one.length_BN) == 0
        shape = (*unused.shape, *[1] * (one.features.ndim - 2))
        media[name] = Media(np.where(unused.reshape(shape), np.float32(np.nan), one.features), one.length_BN)
    changed = seen.replace(media=media, **{name: garbage(getattr(seen, name)) for name in ("tokens_BT", "target_BT")})
    error = subject.result(changed).off_by(subject.usual)
    if not error <= subject.bound:
        return Measured(error, subject.bound, "tokens or targets at padding, or unused media, change the result")
    error = subject.measure(subject.noisy_at_padding, seen).off_by(subject.usual)
    note = (
        "" if error <= subject.bound else "vectors or logits at padding change it: weighted_logits, or jnp.where before"
    )
    return Measured(error, subject.bound, note)


def microbatches(subject: Subject) -> Measured:
    """The mean loss and its gradient over microbatches are those of one batch."""
    error = off_by(subject.mean(subject.loss(accumulate=PARTS), subject.batch), subject.usual.mean)
    note = "" if error <= subject.bound else "a part of the batch must give its part of the sum, and of the weight"
    return Measured(error, subject.bound, note)


def in_blocks(subject: Subject) -> Measured:
    """The loss computed from some positions' logits at a time (`model.logits_block`) is that from all logits."""
    loss = subject.loss(logits_block=BLOCK)
    if not depends_on_scores_only(subject.objective):

        def program(block):
            given = subject.params, subject.others, subject.seen
            return str(jax.make_jaxpr(lambda *given: subject.pair(*given, logits_block=block))(*given))

        if program(BLOCK) == program(None):
            return absent("it does not use per_token alone, nor positions.per_position")
    return Measured(off_by(subject.mean(loss, subject.batch), subject.usual.mean), subject.bound)


def seeds_together(subject: Subject) -> Measured:
    """Seeds trained in one program give the losses and gradients of each alone."""
    loss = subject.loss()
    params = [subject.parameters(seed) for seed in SEEDS]

    @compiled
    def together(params, seeds, others, batch):
        def one(params, seed):
            seen = loss.seen(batch, derive(seed, 0, VIEW))
            key = derive(seed, 0, DROPOUT)
            means, gradient = loss.gradient(params, others, seen, loss.weights(seen), key)
            return means[NAME], gradient

        return jax.vmap(one)(params, seeds)

    stacked = jax.tree.map(lambda *x: np.stack(x), *params)
    found = jax.device_get(together(stacked, jnp.array(SEEDS), subject.others, subject.batch))
    errors = []
    for i, seed in enumerate(SEEDS):
        (seen,) = jax.device_get(subject.view_program(subject.batch, derive(seed, 0, VIEW), 0))
        expected = subject.measure(subject.model, seen, params[i], derive(seed, 0, DROPOUT)).mean
        mean, gradient = jax.tree.map(lambda x, i=i: x[i], found)
        errors.append(off_by((float(mean), subject.trained(gradient)), expected))
    return Measured(float(np.max(errors)), subject.bound)


def same_every_time(subject: Subject) -> Measured:
    """A program that is traced again gives the same result."""
    arguments = subject.params, subject.others, subject.seen, derive(0, 0, DROPOUT)
    again = jax.device_get(subject.fresh(subject.model)(*arguments))
    error = again.off_by(subject.usual)
    note = "" if error <= subject.bound else "another process would give another loss: random numbers come from a view"
    return Measured(error, subject.bound, note)


def json_round_trip(subject: Subject) -> Measured:
    """The objective survives a JSON round trip."""
    try:
        read = from_json(json.loads(json.dumps(to_json(subject.objective))))
    except (UserError, TypeError) as error:
        return Measured(1.0, 0.0, " ".join(str(error).split()))
    return Measured(float(read != subject.objective), 0.0)


def view_of_rows(subject: Subject) -> Measured:
    """The view of a row depends on the seed, the step and the row's index alone, and so on no shard or microbatch."""
    if subject.objective.view is None:
        return absent("it reads the rows of the data")
    view = compiled(subject.loss().seen)
    whole = subject.seen

    def differs(first: int, count: int, trace=view) -> float:
        some = jax.tree.map(lambda x: x[first : first + count], subject.batch)
        (seen,) = jax.device_get(trace(some, derive(0, 0, VIEW), first))
        expected = jax.tree.map(lambda x: x[first : first + count], whole)
        pairs = zip(jax.tree.leaves(seen), jax.tree.leaves(expected), strict=True)
        return float(sum((np.asarray(a) != np.asarray(b)).sum() for a, b in pairs if a.dtype.kind in "ib"))

    if error := differs(0, rows.ROWS):
        return Measured(
            error, 0.0, "traced again, it is another one: draw from keys_B, with polygpt.objectives.view.uniform"
        )
    for first, count in ((2, 2), (3, 1)):
        if error := differs(first, count):
            which = f"rows {first} to {first + count - 1}"
            return Measured(error, 0.0, f"{which} have another view alone than in the batch")
    return Measured(0.0, 0.0)


def view_of_steps(subject: Subject) -> Measured:
    """A view that is drawn at random differs from step to step."""
    if subject.objective.view is None:
        return absent("it reads the rows of the data")
    text = str(jax.make_jaxpr(lambda batch, key: subject.loss().seen(batch, key))(subject.batch, jax.random.key(0)))
    first, *later = [jax.tree.leaves(subject.viewed(subject.batch, step)) for step in range(4)]
    pairs = [pair for leaves in later for pair in zip(leaves, first, strict=True)]
    same = all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)
    if same and "random_bits" not in text:
        return absent("it draws nothing at random")
    return Measured(float(same), 0.0, "it is the same at every step: draw from keys_B" if same else "")
