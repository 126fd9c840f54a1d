"""Properties of what the model reads: never the tokens that it is scored on, and never another example."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.lab.compiled import compiled
from polygpt.lab.measured import EPSILON, Measured, absent, difference
from polygpt.lab.objective import outputs, rows
from polygpt.lab.objective.subject import Subject
from polygpt.parameters import paths, tree_of
from polygpt.sequence import TEXT, Batch
from polygpt.training.randomness import VIEW, derive

TABLE = "text/table"
"""The parameter that embeds tokens. The model's head is another, so that tokens can be changed as inputs alone."""
COUNT = 4
"""Rows whose tokens are followed one by one."""
TOLERANCE = 1e-5
"""The change of a loss, relative to the largest of all positions, that counts as a dependence."""
PLACES = ("modality_BT", "slot_BT", "position_BT", "segment_BT", "span_BT")
READ_BY_MODEL = ("tokens_BT", *PLACES, "coordinate_BT3", "media")
"""The arrays of a batch that a model reads."""
CONFIDENCE = 4.0
"""Standard deviations by which the fraction of visible targets may exceed that which a view declares."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Rows in which every token occurs once, and a view of them.

    Attributes:
        batch, seen: the rows, and what the objective reads of them.
        id_N, other_N: the tokens, in the order of `Followed.place_N2`, and as many ids that occur nowhere.
    """

    batch: Batch
    seen: Batch
    id_N: np.ndarray
    other_N: np.ndarray


class Followed:
    """Follows every token of some rows wherever it goes.

    Attributes:
        place_N2: row and position of every token.
        usual, again: the rows with two choices of the tokens' ids, and views drawn from the same keys.
    """

    def __init__(self, subject: Subject):
        self.subject, self.key = subject, derive(0, 0, VIEW)
        self.models = subject.params, subject.others
        self.view = subject.loss().seen
        few = jax.tree.map(lambda x: np.array(x[:COUNT]), subject.batch)
        self.place_N2 = np.argwhere((few.modality_BT == TEXT) & (few.segment_BT > 0))
        ids = 1 + np.arange(2 * len(self.place_N2), dtype=np.int32).reshape(2, -1)
        self.usual, self.again = (self._labelled(few, *pair) for pair in (ids, ids[::-1]))

    def _labelled(self, few: Batch, id_N: np.ndarray, other_N: np.ndarray) -> Labelled:
        tokens_BT = few.tokens_BT.copy()
        tokens_BT[tuple(self.place_N2.T)] = id_N
        next_BT, segment_BT = (np.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens_BT, few.segment_BT))
        target_BT = np.where(segment_BT == few.segment_BT, next_BT, few.target_BT)
        batch = few.replace(tokens_BT=tokens_BT, target_BT=target_BT)
        (seen,) = compiled(self.view)(batch, self.key)
        return Labelled(batch, jax.device_get(seen), id_N, other_N)

    @functools.cached_property
    def by_position(self) -> Callable[[tuple, Batch], jax.Array]:
        """Gives the loss of each position, [T], summed over the rows; 0 where none is scored.

        The arguments are the parameters with those of the other models, and what the objective reads. The derivative
        by the loss weights is the loss, unless an objective has a gradient of its own: then positions take turns.
        """
        ways = self._by_derivative, self._by_turns
        derived_T, loss_T = (np.asarray(compiled(way)(self.models, self.usual.seen)) for way in ways)
        return ways[int(difference(derived_T, loss_T) > self.subject.bound)]

    def _by_derivative(self, models: tuple, seen: Batch) -> jax.Array:
        def total(weight_BT):
            return self.subject.pair(*models, seen.replace(weight_BT=weight_BT))[0]

        weight_BT = jnp.asarray(seen.weight_BT)
        return jnp.sum(jnp.where(weight_BT != 0, weight_BT * jax.grad(total)(weight_BT), 0), axis=0)

    def _by_turns(self, models: tuple, seen: Batch) -> jax.Array:
        def at(t):
            here = seen.replace(weight_BT=jnp.where(jnp.arange(rows.LENGTH) == t, seen.weight_BT, 0.0))
            return self.subject.pair(*models, here)[0]

        scored = np.flatnonzero((self.usual.seen.weight_BT != 0).any(axis=0))
        loss = jax.vmap(at)(scored)  # the forward pass does not depend on t and is computed once
        return jnp.zeros(rows.LENGTH).at[scored].set(loss)

    def _dependences(self, measured: Callable[[tuple, Batch], Any], given: Labelled) -> tuple[Any, tuple[Any, Any]]:
        """What `measured(models, seen)` gives, and what it gives, for every token, with another one in its place.

        (usual, (as an input, apart from it)), the last two with a leading axis N.
        """
        vector_D = np.float32(np.random.default_rng(5).normal(0, 2, rows.WIDTH))

        def embedded(tree, change):
            named = paths(tree)
            return tree_of({**named, TABLE: change(named[TABLE])}) if TABLE in named else tree

        def at(models, seen, change):
            params, others = models
            others = {name: embedded(own, change) for name, own in others.items()}
            return measured((embedded(params, change), others), seen)

        def of_token(models, seen, token, other):
            swapped = jnp.array([other, token])

            def renamed(ids):
                return jnp.where(ids == token, other, jnp.where(ids == other, token, ids))

            # As an input, the token gets another vector; apart from that it gets another id whose vector is its own.
            read = at(models, seen, lambda table_VD: table_VD.at[token].set(vector_D))
            apart = seen.replace(tokens_BT=renamed(seen.tokens_BT), target_BT=renamed(seen.target_BT))
            both = jnp.array([token, other])
            scored = at(models, apart, lambda table_VD: table_VD.at[both].set(table_VD[swapped]))
            return read, scored

        def measure(models, seen, tokens):
            return measured(models, seen), jax.lax.map(lambda pair: of_token(models, seen, *pair), tokens)

        if measured not in self._programs:
            self._programs[measured] = compiled(measure)
        return jax.device_get(self._programs[measured](self.models, given.seen, (given.id_N, given.other_N)))

    def leaks(self, given: Labelled) -> tuple[np.ndarray, np.ndarray]:
        """bool [N, T]: whether the loss at t reads token n, on which it is scored; and whether it is scored on it."""
        parts = [self._weighted_leaks] if self.subject.reads_weights else []
        parts += [self._unweighted_leaks] if self.subject.scores_without_weights else []
        nothing_NT = np.zeros((len(given.id_N), rows.LENGTH), bool)
        leaks, owed = zip((nothing_NT, nothing_NT), *(part(given) for part in parts), strict=True)
        return np.any(leaks, axis=0), np.any(owed, axis=0)

    def _weighted_leaks(self, given: Labelled) -> tuple[np.ndarray, np.ndarray]:
        usual_T, (read_NT, scored_NT) = self._dependences(self.by_position, given)
        owed_NT = _changed(scored_NT, usual_T)
        earlier_NT = owed_NT & self._earlier(given)
        if earlier_NT.any():
            owed_NT &= ~earlier_NT | self._of_outputs(given)[2].any(axis=1)
        return _changed(read_NT, usual_T) & owed_NT, owed_NT

    def _unweighted_leaks(self, given: Labelled) -> tuple[np.ndarray, np.ndarray]:
        """As `leaks`, for what is scored whatever the weights are, and for vectors instead of losses of positions."""
        read_NKT, owed_NKT = self._unweighted(given)
        return (read_NKT & owed_NKT).any(axis=1), owed_NKT.any(axis=1)

    def _unweighted(self, given: Labelled) -> tuple[np.ndarray, np.ndarray]:
        """bool [N, K, T]: whether the vector of pass k at t reads token n; and whether it must not, because t is scored
        on the token whatever the weights are."""
        without = given.seen.replace(weight_BT=np.zeros_like(given.seen.weight_BT))
        read_NKT, scored_NKT, rewarded_NKT = self._of_outputs(dataclasses.replace(given, seen=without))
        return read_NKT, scored_NKT & (rewarded_NKT | ~self._earlier(given)[:, None])

    def _of_outputs(self, given: Labelled) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """bool [N, K, T]: whether the vector of pass k at t of the token's row reads token n; whether it is scored on
        it; and whether the loss falls the likelier token n is. K is 0 if the objective reads no vectors."""
        if self._vectors is None:
            return (np.zeros((len(given.id_N), 0, rows.LENGTH), bool),) * 3
        usual, (read, apart) = self._dependences(self._vectors, given)
        head = jax.device_get(self.subject.model.output_head(self.subject.params))
        weight_VD = head.weight if head.axes[0] == "vocabulary" else head.weight.T
        found = []
        for n, row in enumerate(self.place_N2[:, 0]):
            hidden_KTD, slope_KTD = (x[:, row] for x in usual)
            other_KTD, towards_D = apart[1][n, :, row], weight_VD[given.id_N[n]] - weight_VD[given.other_N[n]]
            reads_KT, scored_KT = outputs.read(read[0][n, :, row], hidden_KTD), outputs.scored(other_KTD, slope_KTD)
            found.append((reads_KT, scored_KT, scored_KT & outputs.rewarded(other_KTD, slope_KTD, towards_D)))
        return tuple(map(np.stack, zip(*found, strict=True)))

    @functools.cached_property
    def _vectors(self) -> Callable[[tuple, Batch], tuple] | None:
        return outputs.vectors(self.subject, self.usual.seen)

    @functools.cached_property
    def _programs(self) -> dict[Callable, Callable]:
        return {}

    @functools.cached_property
    def view_dependences(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(moved_NT, chosen_N, apart_N) when token n of the data is another one, and the view is drawn again.

        `moved_NT` says whether the loss at t changes with what the model then reads, its targets being kept; `chosen_N`
        whether other positions are scored; `apart_N` whether the view changes in more than one example.
        """
        usual_T, (loss_NT, chosen_N, apart_N) = self._redrawn(self.by_position)
        return _changed(loss_NT, usual_T), chosen_N, apart_N

    def told(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(moved_NT, owed_NT, chosen_N) as in `view_dependences`; what is owed must not move: t is scored on n."""
        moved_NT, chosen_N, _ = self.view_dependences
        seen, row_N = self.usual.seen, self.place_N2[:, 0]
        owed_NT = (seen.weight_BT != 0)[row_N] & (seen.target_BT[row_N] == self.usual.id_N[:, None])
        owed_NT &= self.subject.reads_weights
        if self.subject.scores_without_weights and self._vectors is not None:
            (usual_KBTD, _), ((vectors_NKBTD, _), *_) = self._redrawn(self._vectors)
            pairs = (outputs.read(vectors_NKBTD[n, :, row], usual_KBTD[:, row]) for n, row in enumerate(row_N))
            scored_NKT = self._unweighted(self.usual)[1]
            moved_NT = (moved_NT & owed_NT) | (np.stack(list(pairs)) & scored_NKT).any(axis=1)
            owed_NT |= scored_NKT.any(axis=1)
        return moved_NT, owed_NT, chosen_N

    def _redrawn(self, measured: Callable[[tuple, Batch], Any]) -> tuple[Any, tuple[Any, np.ndarray, np.ndarray]]:
        """What `measured(models, seen)` gives, and what it gives with the view of data in which a token is another one,
        with a leading axis N; beside it `chosen_N` and `apart_N` of `view_dependences`."""

        def of_token(models, batch, usual, place, other):
            before = jnp.maximum(place[1] - 1, 0)
            follows = (place[1] > 0) & (batch.segment_BT[place[0], before] == batch.segment_BT[place[0], place[1]])
            target = jnp.where(follows, other, batch.target_BT[place[0], before])
            changed = batch.replace(
                tokens_BT=batch.tokens_BT.at[place[0], place[1]].set(other),
                target_BT=batch.target_BT.at[place[0], before].set(target),
            )
            (seen,) = self.view(changed, self.key)
            read = usual.replace(**{name: getattr(seen, name) for name in READ_BY_MODEL})
            found = measured(models, read)
            differs_BT = (seen.tokens_BT != usual.tokens_BT) | (seen.weight_BT != usual.weight_BT)
            for name in (*PLACES, "target_BT"):
                differs_BT |= getattr(seen, name) != getattr(usual, name)
            segment_BT = batch.segment_BT + rows.LENGTH * jnp.arange(COUNT)[:, None]
            low, high = jnp.min(jnp.where(differs_BT, segment_BT, 10**6)), jnp.max(jnp.where(differs_BT, segment_BT, 0))
            return found, jnp.any(seen.weight_BT != usual.weight_BT), (high > low) & jnp.any(differs_BT)

        @compiled
        def measure(models, batch, usual, tokens):
            return measured(models, usual), jax.lax.map(lambda pair: of_token(models, batch, usual, *pair), tokens)

        here = self.usual
        return jax.device_get(measure(self.models, here.batch, here.seen, (self.place_N2, here.other_N)))

    def _earlier(self, given: Labelled) -> np.ndarray:
        """bool [N, T]: whether token n stands at t or before and is no target of t.

        Unlikelihood (1908.04319) punishes such tokens; what rewards them has forgotten to shift the targets.
        """
        earlier_NT = np.zeros((len(given.id_N), rows.LENGTH), bool)
        for n, row in enumerate(self.place_N2[:, 0]):
            stands_T = np.cumsum(given.seen.tokens_BT[row] == given.id_N[n]) > 0
            earlier_NT[n] = stands_T & (given.seen.target_BT[row] != given.id_N[n])
        return earlier_NT


def _changed(loss_NT: np.ndarray, usual_T: np.ndarray) -> np.ndarray:
    change_NT = np.abs(loss_NT - usual_T)
    return ~(change_NT <= TOLERANCE * (np.abs(usual_T).max(initial=0.0) + EPSILON))


@functools.lru_cache(maxsize=1)
def followed(subject: Subject) -> Followed:
    """The followed rows of a subject."""
    return Followed(subject)


def unseen(subject: Subject) -> Measured:
    """No loss depends on the token that it is scored on as an input, in any pass of any model."""
    here = followed(subject)
    leaks_NT, owed_NT = here.leaks(here.usual)
    if not owed_NT.any():
        return absent("no position is scored on a token of the rows")
    if leaks_NT.any():  # an id drawn at random may happen to be that of a token, but not with both choices of ids
        leaks_NT &= here.leaks(here.again)[0]
    return _share(subject, here, leaks_NT, owed_NT, "as inputs")


def hidden_by_view(subject: Subject) -> Measured:
    """The view gives nothing away: with another token in the data, what the model reads to predict it is the same."""
    if subject.objective.view is None:
        return absent("it reads the rows of the data")
    here = followed(subject)
    moved_NT, owed_NT, chosen_N = here.told()
    if not owed_NT.any():
        return absent("no position is scored on a token of the rows")
    owed_NT &= ~chosen_N[:, None]  # a view that chooses positions by tokens: other positions are scored then
    if not owed_NT.any():
        return absent("which positions are scored depends on each of their tokens")
    return _share(subject, here, moved_NT & owed_NT, owed_NT, "in the view")


def examples_apart(subject: Subject) -> Measured:
    """A token of one example changes the view of no other example."""
    if subject.objective.view is None:
        return absent("it reads the rows of the data")
    here = followed(subject)
    apart_N = here.view_dependences[2]
    if not apart_N.any():
        return Measured(0.0, 0.0)
    row, place = here.place_N2[np.flatnonzero(apart_N)[0]]
    return Measured(float(apart_N.sum()), 0.0, f"the token at row {row}, position {place} changes several examples")


def _share(subject: Subject, here: Followed, leaks_NT, owed_NT, where: str) -> Measured:
    """The fraction of the scored tokens that the model reads, against that which the view declares."""
    count, error = int(owed_NT.sum()), float(leaks_NT.sum() / owed_NT.sum())
    shown = 0.0 if subject.objective.view is None else subject.objective.view.shown
    bound = min(1.0, shown + CONFIDENCE * np.sqrt(shown * (1 - shown) / count))
    if error <= bound:
        return Measured(error, bound, f"{count} tokens; the view leaves some in place" if shown else f"{count} tokens")
    n, t = np.argwhere(leaks_NT)[0]
    row, place = here.place_N2[n]
    note = f"the loss at row {row}, position {t} reads its target, the token of position {place}, {where}"
    remedy = "; if that is intended, say so in View.shown" if subject.objective.view is not None else ""
    return Measured(error, bound, note + remedy)
