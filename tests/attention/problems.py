"""Attention problems for the tests of backends, what their answers are, and the comparison.

    rule, operands = problem("packed", seed=0, dtype="float32")
    y_BHTe, lse_BHT = expected(rule, operands)          # float64, pair by pair; nothing of the library computes here
    assert_agrees(attend, rule, operands)               # values, and the gradients of everything

`NAMES` are the problems. Between them: heads of all three kinds, values wider than queries, packed examples, padding,
spans, rows of padding alone, queries at the end of their keys, keys in no order, masks, scores with every kind of term,
both normalizers. Lengths are no multiples of any block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from random_masks import PAIRS, arrays_of, sees

from polygpt.attention.kernels import reference
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import DECODER, ENCODER, Causal, Mask, SameSegment
from polygpt.attention.meta import Meta
from polygpt.attention.scores import Scale, Score, SoftCap, Terms, Then, lookup

B = 2


@dataclasses.dataclass(frozen=True)
class Near(Mask):
    """The key is fewer than `size` positions away, on either side: a mask of a user's own."""

    size: int = 4
    """How far."""

    def __call__(self, query, key):
        return abs(query.position - key.position) < self.size


@dataclasses.dataclass(frozen=True)
class SameSpeaker(Mask):
    """Both positions have one speaker, or the key has none: a mask of labels."""

    def labels(self):
        return frozenset({"speaker"})

    def __call__(self, query, key):
        return (query.extra["speaker"] == key.extra["speaker"]) | (key.extra["speaker"] < 0)


WITH_NEAR = {
    **PAIRS,
    Near: lambda m, q, k: q["position"] - m.size < k["position"] < q["position"] + m.size,
    SameSpeaker: lambda m, q, k: k["speaker"] in (q["speaker"], -1),
}
"""What each predicate of the problems says of one pair."""


@dataclasses.dataclass(frozen=True)
class Slopes(Score):
    """A slope a head: a term [H]."""

    def __call__(self, score, query, key, terms):
        return score - terms.head["slope"] * abs(query.position - key.position)


@dataclasses.dataclass(frozen=True)
class Table(Score):
    """A table of distances a head: a term [n, H]."""

    n: int = 4
    """Distances that it tells apart."""

    def __call__(self, score, query, key, terms):
        return score + lookup(terms.head["table"], jnp.minimum(abs(query.position - key.position), self.n - 1))


@dataclasses.dataclass(frozen=True)
class Gates(Score):
    """Terms of queries and keys, in a product and in a sum."""

    def __call__(self, score, query, key, terms):
        return score * (1 + jnp.tanh(terms.query["gate"])) + terms.query["gate"] * terms.key["gate"]


@dataclasses.dataclass(frozen=True)
class Together(Score):
    """Terms of pairs, in a product and in a sum, beside one of keys."""

    def __call__(self, score, query, key, terms):
        return score * (1 + jnp.tanh(terms.pair["both"])) + terms.pair["both"] * terms.key["gate"]


@dataclasses.dataclass(frozen=True)
class Case:
    """What a problem is made of; `layout` is a function giving (query, key) metadata."""

    layout: str
    mask: Mask = DECODER
    score: Score = Score()
    normalizer: str = "softmax"
    heads: tuple[int, int] = (4, 2)
    widths: tuple[int, int] = (4, 6)


CASES = {
    "plain": Case("plain", heads=(2, 2), widths=(4, 4)),
    "packed": Case("packed"),
    "spans": Case("spans", heads=(4, 1)),
    "empty": Case("empty"),
    "encoder": Case("packed", ENCODER, heads=(2, 1)),
    "cross": Case("cross", ENCODER),
    "decode": Case("decode"),
    "one_query": Case("one_query", heads=(4, 1)),
    "unordered": Case("unordered"),
    "window": Case("packed", DECODER & Near(4)),
    "far_or_first": Case("plain", SameSegment() & Causal() & (~Near(9) | Near(2))),
    "labels": Case("labels", DECODER & (SameSpeaker() | Near(2))),
    "capped": Case("packed", score=Scale(3.0).then(SoftCap(2.0)), heads=(2, 1)),
    "slopes": Case("decode", score=Slopes()),
    "table": Case("packed", score=SoftCap(2.0).then(Table())),
    "gates": Case("empty", score=Gates()),
    "sigmoid": Case("empty", DECODER & Near(7), normalizer="sigmoid"),
    "sigmoid_terms": Case("decode", score=Gates().then(Slopes()), normalizer="sigmoid", heads=(2, 1)),
}
NAMES = tuple(CASES)
WITH_PAIRS = {
    "pairs": Case("packed", score=Together()),
    "pairs_decode": Case("decode", score=Together().then(Slopes()), heads=(2, 1)),
    "pairs_sigmoid": Case("unordered", score=Scale(0.5).then(Together()), normalizer="sigmoid"),
}
"""Problems for the backends that take terms of pairs."""


def _meta(index, position, segment, span) -> Meta:
    arrays = [np.broadcast_to(np.asarray(x, np.int32), (B, np.shape(x)[-1])).copy() for x in (index, position, segment)]
    return Meta(*arrays, np.broadcast_to(np.asarray(span, np.int32), arrays[0].shape).copy(), np.zeros_like(arrays[0]))


def rows_of(lengths_of_rows, T: int) -> Meta:
    """Packed examples of these lengths, one list a row, and padding behind them."""
    position, segment = np.zeros((2, B, T), np.int32)
    for row, lengths in enumerate(lengths_of_rows):
        start = 0
        for number, length in enumerate(lengths):
            position[row, start : start + length] = np.arange(length)
            segment[row, start : start + length] = number + 1
            start += length
    return _meta(np.arange(T), position, segment, np.zeros(T))


def part_of(meta: Meta, chosen) -> Meta:
    return jax.tree.map(lambda x: x[:, chosen], meta)


def layout(name: str, rng: np.random.Generator) -> tuple[Meta, Meta]:
    """Metadata of queries and keys."""
    if name == "plain":
        meta = rows_of([[19], [19]], 19)
        return meta, meta
    if name == "packed":
        meta = rows_of([[7, 9, 3], [4, 11]], 19)
        return meta, meta
    if name == "labels":
        meta = rows_of([[7, 9, 3], [4, 11]], 19)
        meta = dataclasses.replace(meta, extra={"speaker": meta.position // 3 % 3 - 1})
        return meta, meta
    if name == "spans":
        meta = rows_of([[12, 5], [19]], 19)
        span = np.zeros((B, 19), np.int32)
        span[0, 2:6], span[0, 8:12], span[0, 12:14], span[1, 5:18] = 1, 2, 1, 1
        meta = dataclasses.replace(meta, span=span)
        return meta, meta
    if name == "empty":
        meta = rows_of([[13], []], 17)
        return meta, meta
    if name == "cross":
        return rows_of([[5, 4], [10]], 11), rows_of([[6, 9, 2], [3, 12]], 18)
    if name == "decode":
        meta = rows_of([[9, 14], [18]], 23)  # the second row's queries are padding for the most part
        return part_of(meta, slice(14, 23)), meta
    if name == "one_query":
        meta = rows_of([[21], [4, 17]], 21)
        return part_of(meta, slice(20, 21)), meta
    if name == "unordered":  # as in a ring: gaps, and no order
        meta = rows_of([[23], [11, 12]], 23)
        return part_of(meta, slice(12, 23)), part_of(meta, rng.permutation(23)[:17])
    raise KeyError(name)


def problem(name: str, seed: int = 0, dtype: str = "float32") -> tuple[Rule, Operands]:
    """One of `NAMES`."""
    rng = np.random.default_rng(seed)
    case = (CASES | WITH_PAIRS)[name]
    return made(case, *layout(case.layout, rng), rng, dtype)


def made(case: Case, query: Meta, key: Meta, rng, dtype: str = "float32") -> tuple[Rule, Operands]:
    """A problem of this kind for queries and keys of these metadata."""
    T, S, (H, K), (d, e) = query.index.shape[1], key.index.shape[1], case.heads, case.widths

    def normal(*shape, scale=1.0):
        return np.float32(rng.normal(size=shape) * scale)

    # Queries of the size that scaling by 1 / sqrt(d) gives, times 2: scores of some size.
    arrays = normal(B, H, T, d, scale=2 * d**-0.5), normal(B, K, S, d), normal(B, K, S, e)
    terms = {
        "head": {"slope": np.abs(normal(H, scale=0.3)), "table": normal(4, H)},
        "query": {"gate": normal(B, H, T)},
        "key": {"gate": normal(B, H, S)},
        "pair": {},
    }
    wanted = _wanted(case.score)
    if any(kind == "pair" for kind, _, _ in wanted):  # drawn last: the other problems' numbers stay
        terms["pair"]["both"] = normal(B, H, T, S)
    terms = Terms(
        *(
            {prefix + n: terms[kind][n] * np.float32(1.0) for k, prefix, n in wanted if k == kind}
            for kind in ("head", "query", "key", "pair")
        )
    )
    operands = Operands(*(jnp.asarray(x, dtype) for x in arrays), query, key, terms)
    return Rule(case.mask, case.score, case.normalizer), jax.tree.map(jnp.asarray, operands)


def _wanted(score: Score, prefix: str = "") -> list[tuple[str, str, str]]:
    """(kind, prefix, name) of the terms that a modification reads."""
    if isinstance(score, Then):
        return _wanted(score.first, prefix + "first.") + _wanted(score.second, prefix + "second.")
    names = {Slopes: [("head", "slope")], Table: [("head", "table")], Gates: [("query", "gate"), ("key", "gate")]}
    names[Together] = [("pair", "both"), ("key", "gate")]
    return [(kind, prefix, name) for kind, name in names.get(type(score), [])]


def modified(score: Score, s: float, q, k, term, prefix: str = "") -> float:
    """The score of one pair; `term(kind, name)` is a number, or a column of a table."""
    if isinstance(score, Then):
        s = modified(score.first, s, q, k, term, prefix + "first.")
        return modified(score.second, s, q, k, term, prefix + "second.")
    distance = abs(int(q["position"]) - int(k["position"]))
    if isinstance(score, Scale):
        return s * score.factor
    if isinstance(score, SoftCap):
        return score.cap * np.tanh(s / score.cap)
    if isinstance(score, Slopes):
        return s - term("head", prefix + "slope") * distance
    if isinstance(score, Table):
        return s + term("head", prefix + "table")[min(distance, score.n - 1)]
    if isinstance(score, Gates):
        gate = term("query", prefix + "gate")
        return s * (1 + np.tanh(gate)) + gate * term("key", prefix + "gate")
    if isinstance(score, Together):
        both = term("pair", prefix + "both")
        return s * (1 + np.tanh(both)) + both * term("key", prefix + "gate")
    assert type(score) is Score, score
    return s


def expected(rule: Rule, operands: Operands) -> tuple[np.ndarray, np.ndarray]:
    """(y_BHTe, lse_BHT) in float64, pair by pair; lse is -inf where nothing is seen."""
    query, key, value = (
        np.asarray(x, np.float64) for x in (operands.query_BHTd, operands.key_BKSd, operands.value_BKSe)
    )
    terms = jax.tree.map(lambda x: np.asarray(x, np.float64), vars(operands.terms))
    metas = [{name: np.asarray(x) for name, x in arrays_of(meta).items()} for meta in (operands.query, operands.key)]
    rows, H, T, _ = query.shape
    K, S, e = value.shape[1:]
    y, lse = np.zeros((rows, H, T, e)), np.zeros((rows, H, T))
    for b, t in np.ndindex(rows, T):
        q = {name: int(x[b, t]) for name, x in metas[0].items()}
        ks = [{name: int(x[b, s]) for name, x in metas[1].items()} for s in range(S)]
        seen = [s for s in range(S) if ks[s]["segment"] != 0 and sees(rule.mask, q, ks[s], WITH_NEAR)]
        for h in range(H):
            scores = []
            for s in seen:
                product = query[b, h, t] @ key[b, h // (H // K), s]
                places = {"head": (..., h), "query": (b, h, t), "key": (b, h, s), "pair": (b, h, t, s)}
                term = functools.partial(_term, terms, places)
                scores.append(modified(rule.score, product, q, ks[s], term))
            scores = np.asarray(scores)
            if rule.normalizer == "sigmoid":
                weights = 1 / (1 + np.exp(-scores))
            elif len(seen):
                lse[b, h, t] = np.log(np.sum(np.exp(scores - scores.max()))) + scores.max()
                weights = np.exp(scores - lse[b, h, t])
            else:
                lse[b, h, t], weights = -np.inf, scores
            y[b, h, t] = sum((w * value[b, h // (H // K), s] for w, s in zip(weights, seen, strict=True)), np.zeros(e))
    return y, lse


def _term(terms, places, kind: str, name: str):
    return terms[kind][name][places[kind]]


def cotangents(operands: Operands, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Random float32 ones of y and lse, those of queries that see nothing too."""
    rng = np.random.default_rng(seed)
    shape = operands.query_BHTd.shape[:3]
    return np.float32(rng.normal(size=(*shape, operands.value_BKSe.shape[3]))), np.float32(rng.normal(size=shape))


def floats(operands: Operands) -> dict:
    """What is differentiated."""
    return {
        "query": operands.query_BHTd,
        "key": operands.key_BKSd,
        "value": operands.value_BKSe,
        "terms": vars(operands.terms),
    }


def with_floats(operands: Operands, arrays: dict) -> Operands:
    """The same problem with other numbers."""
    return dataclasses.replace(
        operands,
        query_BHTd=arrays["query"],
        key_BKSd=arrays["key"],
        value_BKSe=arrays["value"],
        terms=Terms(**arrays["terms"]),
    )


@functools.partial(jax.jit, static_argnames=("attend", "rule"))
def answers(attend, rule: Rule, operands: Operands, y_cotangent, lse_cotangent):
    """((y, lse), gradients of `floats(operands)`)."""

    def total(arrays):
        y, lse = attend(rule, with_floats(operands, arrays))
        # Where nothing is seen lse is the lowest number there is: times a cotangent it would overflow the sum.
        usual = jnp.where(lse > reference.LOWEST / 2, lse, lse * 1e-30)
        return jnp.sum(y.astype(jnp.float32) * y_cotangent) + jnp.sum(usual * lse_cotangent), (y, lse)

    gradients, outputs = jax.grad(total, has_aux=True)(floats(operands))
    return outputs, gradients


def assert_agrees(attend, rule: Rule, operands: Operands, gradients: bool = True, tolerance: float = 1.0) -> None:
    """`attend` has the values of `expected` and the gradients of the reference, which `test_reference_kernel` checks.

    `tolerance` multiplies the bounds, for devices whose float32 products are rounded more coarsely. Problems in
    bfloat16 are compared with the float32 reference on the same numbers.
    """
    y, lse = expected(rule, operands)
    if gradients:
        (got_y, got_lse), got = answers(attend, rule, operands, *cotangents(operands))
    else:
        got_y, got_lse = jax.jit(attend, static_argnums=0)(rule, operands)
    assert got_y.dtype == operands.value_BKSe.dtype and got_lse.dtype == jnp.float32
    seen = np.isfinite(lse)
    # float32: scores of size 10 and sums of 20 products; rounding of 2^-24 each, most of them random in sign.
    # bfloat16: weights and results are rounded by 2^-9 of values of size 3 or so.
    half = operands.value_BKSe.dtype == jnp.bfloat16
    size = max(1.0, np.abs(y).max())
    np.testing.assert_allclose(
        np.asarray(got_y, np.float64), y, rtol=0, atol=tolerance * size * (2**-7 if half else 3e-6), err_msg="y"
    )
    got_lse = np.asarray(got_lse)
    np.testing.assert_allclose(got_lse[seen], lse[seen], rtol=0, atol=tolerance * 1e-5, err_msg="lse")
    assert np.isfinite(got_lse).all() and (got_lse[~seen] < -1e30).all(), "lse where nothing is seen"
    assert (np.asarray(got_y, np.float32)[~seen] == 0).all(), "y where nothing is seen"
    if not gradients:
        return
    upcast = with_floats(operands, jax.tree.map(lambda x: x.astype(jnp.float32), floats(operands)))
    _, want = answers(reference.attend, rule, upcast, *cotangents(operands))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # A gradient is a sum of up to 20 x 4 products, three deep.
        atol = tolerance * max(1.0, np.abs(b).max()) * (2**-6 if half else 6e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=f"gradient of {jax.tree_util.keystr(path)}")
    unseen = np.asarray(got["query"], np.float32)[~seen]
    assert (unseen == 0).all(), "gradient of a query that sees nothing"
