"""Span corruption: spans of a text are replaced by sentinels, and the model writes the spans."""

import dataclasses

import numpy as np

from polygpt.data.example import Example
from polygpt.data.transforms.base import Transform, Unit, at_weight, scored, token, units
from polygpt.errors import BadRecord


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Transform):
    """T5's objective. Raffel et al. (1910.10683), section 3.1.4 and Figure 2.

        Thank you for inviting me to your party last week.
        Thank you<0> me to your party<1> week.   <0> for inviting<1> last<2>

    `<0>` stands for `<extra_id_0>`. The second line is the row: the input without loss weights, then the target with
    those of the texts that its spans come from. With `LayoutSpec.prompt_span` "bidirectional" the input is visible in
    both directions, as it is to T5's encoder. Number and lengths of the spans are those of T5's code
    (`random_spans_noise_mask`), for each text with a loss weight. Other texts and media keep their place in the input.
    """

    density: float = 0.15
    """Share of the units to replace."""
    mean_span: float = 3.0
    """Mean length of a span in units."""
    unit: Unit = "word"
    """What is counted."""
    sentinels: int = 100
    """Number of sentinels in the vocabulary: spans of an example, and one."""

    def validate(self):
        self.require(0 < self.density < 1, "density", "in 0..1, without the bounds")
        self.require(self.mean_span >= 1, "mean_span", "at least 1")
        self.require(self.sentinels >= 2, "sentinels", "at least 2")

    @property
    def special(self) -> tuple[str, ...]:
        return tuple(f"<extra_id_{i}>" for i in range(self.sentinels))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        names, seen, target, weight = self.special, [], [], 0.0
        spans = 0
        for part in example.parts:
            some = units(part.text, self.unit) if scored(part) else []
            if not some:
                seen += at_weight([part], 0.0)
                continue
            weight, start = part.weight, 0
            for length, masked in self._lengths(len(some), rng):
                text, start = "".join(some[start : start + length]), start + length
                if masked:
                    name, spans = names[min(spans, len(names) - 1)], spans + 1
                    seen.append(token(name))
                    target += [token(name, weight), dataclasses.replace(part, text=text)]
                elif text:
                    seen.append(dataclasses.replace(part, text=text, weight=0.0))
        if not target:
            return example
        if spans >= len(names):
            detail = f"{spans + 1} sentinels are needed, SpanCorruption has {len(names)}: raise sentinels or mean_span"
            raise BadRecord("too many spans", example.place, detail)
        return dataclasses.replace(example, parts=(*seen, *target, token(names[spans], weight)))

    def _lengths(self, count: int, rng: np.random.Generator) -> list[tuple[int, bool]]:
        """Lengths of the stretches of a text of `count` units, and whether each is replaced, alternating.

        Spans are at least one unit apart. Unlike in T5's code, a text may begin with a span or end without one.
        """
        masked = max(1, min(count - 1, round(count * self.density)))
        spans = min(max(1, round(masked / self.mean_span)), count - masked + 1)
        kept = _composition(count - masked + 2, spans + 1, rng)
        kept[[0, -1]] -= 1
        lengths = np.zeros(2 * spans + 1, int)
        lengths[::2], lengths[1::2] = kept, _composition(masked, spans, rng)
        return [(int(length), i % 2 == 1) for i, length in enumerate(lengths)]


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`parts` lengths of at least 1 whose sum is `total`, each such sequence equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
