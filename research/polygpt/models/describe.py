"""Size and cost of a model: exact parameter counts by part, and FLOPs by formula."""

import dataclasses
from collections.abc import Iterable
from math import prod

from polygpt.models import low_rank
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.models.prefix import ADDED, score_flops
from polygpt.parameters import paths


@dataclasses.dataclass(frozen=True)
class Part:
    """One line of the table.

    Attributes:
        name: the common path prefix of the parameters.
        parameters: exact count.
        active: number of parameters used per position; smaller than `parameters` in a mixture of experts.
        flops: FLOPs of one forward pass (a multiply-add counts as two): per text token in the decoder, per item in an
            adapter.
        unit: the unit of `flops`, "token" or "item".
    """

    name: str
    parameters: int
    active: int
    flops: int
    unit: str


@dataclasses.dataclass(frozen=True)
class Description:
    """All parts of a model, in reading order."""

    parts: tuple[Part, ...]
    vocabulary: int
    seq_len: int

    @property
    def parameters(self) -> int:
        """Exact parameter count of the whole model."""
        return sum(part.parameters for part in self.parts)

    @property
    def active(self) -> int:
        """Number of parameters used per position."""
        return sum(part.active for part in self.parts)

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per text token: forward, and twice as much backward."""
        return 3 * sum(part.flops for part in self.parts if part.unit == "token")

    def to_json(self) -> dict:
        """The table as JSON data."""
        return {
            "parameters": self.parameters,
            "active": self.active,
            "flops_per_token": self.flops_per_token,
            "vocabulary": self.vocabulary,
            "seq_len": self.seq_len,
            "parts": [dataclasses.asdict(part) for part in self.parts],
        }


def scores(stack: DecoderSpec, seq_len: int) -> int:
    """Attention FLOPs of a stack per position of a row, excluding projections."""
    if stack.mask == "bidirectional":
        return round(stack.score_flops(seq_len))
    return round(stack.causal_score_flops(seq_len))


def _scored(spec: ModelSpec, vocabulary: int) -> dict[str, int]:
    """`prefix.score_flops` of a model."""
    plain = bind(spec.replace(low_rank=None), vocabulary)
    return score_flops(plain.module(plain.abstract()))


def describe(spec: ModelSpec, vocabulary: int, seq_len: int) -> Description:
    """Counts the parameters and FLOPs of a model without allocating anything.

    A matrix of n parameters costs 2 n FLOPs per position; experts that a position did not choose cost nothing. Scores
    and weighted values cost 2 d FLOPs each per head and visible key: (seq_len + 1) / 2 keys on average in the causal
    decoder and in cross-attention, all positions of a row in an encoder, of an item in a tower (Kaplan et al.,
    2001.08361, table 1, without masked keys). Norms, biases, activations and table lookups are not counted. Low-rank
    updates of linear maps and prefixes count as training computes them; updates of other matrices are merged once a
    pass, and that frozen matrices need no gradient is not subtracted. An encoder-decoder computes both stacks at every
    position, of which its source needs one and the rest the other.

    Args:
        spec: the model.
        vocabulary: V.
        seq_len: T, the row length for which to count the decoder's attention.
    """
    adapted = paths(bind(spec, vocabulary).traits)
    updates = {name: own.shape for name, own in adapted.items() if low_rank.matrix_of(name)}
    prefixes = {name: own.shape for name, own in adapted.items() if ADDED.search(name)}
    scored = _scored(spec, vocabulary) if prefixes else {}
    spec = spec.replace(low_rank=None, prefix=None)
    traits = {path: own for path, own in paths(bind(spec, vocabulary).traits).items() if own.trained}
    shapes = {path: own.shape for path, own in traits.items()}

    def count(prefix: str) -> int:
        return sum(prod(shape) for path, shape in shapes.items() if path.startswith(prefix))

    def kernels(prefix: str) -> int:
        return sum(prod(own.shape) for path, own in traits.items() if path.startswith(prefix) and own.linear)

    decoder = spec.decoder
    head = 2 * decoder.width * vocabulary

    def part(name: str, flops: int, unit: str, idle: int = 0) -> Part:
        return Part(name, count(f"{name}/"), count(f"{name}/") - idle, flops, unit)

    parts = [part("text", head if decoder.tied else 0, "token")]
    for name, adapter in spec.adapters.items():
        prefix, applied, idle = f"adapters/{name}/", adapter.applications, adapter.idle
        inner = {path.removeprefix(prefix).split("/")[0] for path in shapes if path.startswith(prefix)}
        matrices = sum(
            2 * (kernels(f"{prefix}{own}/") - idle.get(own, 0)) * applied.get(own, adapter.positions) for own in inner
        )
        shared = 2 * kernels("connector/") * adapter.positions
        flops = matrices + shared + round(adapter.score_flops)
        parts.append(part(f"adapters/{name}", flops, "item", sum(idle.values())))
    if spec.connector:
        parts.append(part("connector", 0, "item"))  # its FLOPs are included in the items of each adapter
    if spec.adapters:
        parts.append(part("modality", 0, "token"))
    for name, stack in spec.stacks().items():
        matrices = 2 * (kernels(f"{name}/") - stack.idle())
        parts.append(part(name, matrices + scores(stack, seq_len), "token", stack.idle()))
    if not decoder.tied:
        parts.append(part("head", head, "token"))
    for name in spec.heads:
        parts.append(part(f"heads/{name}", 2 * kernels(f"heads/{name}/"), "token"))
    counted = {part.name.partition("/")[0] for part in parts}
    for name in sorted({path.partition("/")[0] for path in shapes} - counted):  # what a model of another kind adds
        size = sum(prod(shape) for path, shape in shapes.items() if path.partition("/")[0] == name)
        parts.append(Part(name, size, size, 2 * kernels(f"{name}/"), "token"))
    lines = [(low_rank.matrix_of(name), prod(shape), name) for name, shape in updates.items()]
    applied = {name for matrix, _, name in lines if adapted[matrix].updatable and not name.endswith("/magnitude")}
    given = [(matrix, size, 2 * size if name in applied else 0) for matrix, size, name in lines]
    parts += _added(low_rank.KEY, given, spec)
    given = [(name.rpartition("/prefix/")[0], prod(shape), 0) for name, shape in prefixes.items()]
    parts += _added("prefix", [*given, *((name, 0, flops) for name, flops in scored.items())], spec)
    return Description(tuple(parts), vocabulary, seq_len)


def _added(kind: str, given: Iterable[tuple[str, int, int]], spec: ModelSpec) -> list[Part]:
    """The parts of what adapts a model: one for text tokens, and one for the items of each adapter.

    Args:
        kind: the name of the first part.
        given: of what is added, the name of its matrix or layer, numbers, and FLOPs for one position.
        spec: the model.
    """
    sizes, costs = dict.fromkeys(("", *spec.adapters), 0), dict.fromkeys(("", *spec.adapters), 0)
    for name, size, flops in given:
        root, owner, inner, *_ = [*name.split("/"), "", ""]
        sizes[owner if root == "adapters" else ""] += size
        if root == "adapters":
            adapter = spec.adapters[owner]
            costs[owner] += flops * adapter.applications.get(inner, adapter.positions)
        elif root == "connector":  # computed for the items of each adapter
            for one, adapter in spec.adapters.items():
                costs[one] += flops * adapter.positions
        else:
            costs[""] += flops
    names = {where: f"{kind}/adapters/{where}" if where else kind for where in sizes if sizes[where] or costs[where]}
    return [
        Part(name, sizes[where], sizes[where], costs[where], "item" if where else "token")
        for where, name in names.items()
    ]
