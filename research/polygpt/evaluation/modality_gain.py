"""The modality gain: the increase in loss when one modality's media come from other examples.

The held-out loss with the media of one modality shuffled between examples, minus the loss with the true media, paired
by example. A model that ignores the modality has a gain of 0. Media of other modalities stay in place.
"""

from collections.abc import Sequence

import numpy as np

from polygpt.data.example import Example, Medium


def count(example: Example, modality: str) -> int:
    """Number of media items of a modality in an example."""
    return sum(isinstance(part, Medium) and part.modality == modality for part in example.parts)


def modalities(examples: Sequence[Example]) -> list[str]:
    """The modalities that occur, in order of first occurrence."""
    return list(dict.fromkeys(part.modality for e in examples for part in e.parts if isinstance(part, Medium)))


def shuffle(examples: Sequence[Example], modality: str, seed: int) -> tuple[list[int], list[Example]]:
    """Shuffles media between examples.

    Examples with the same number of items exchange all of them along a random cycle, so none keeps its own.

    Returns:
        The indices of the participating examples, and these examples with their new media. Examples without media, or
        without a partner, do not participate.
    """
    rng = np.random.default_rng(seed)
    groups: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(count(example, modality), []).append(i)
    exchanged = {}
    for n, members in groups.items():
        if n and len(members) > 1:
            order = rng.permutation(members)
            for taker, giver in zip(order, np.roll(order, 1), strict=True):
                exchanged[int(taker)] = _with_media(examples[taker], examples[giver], modality)
    indices = sorted(exchanged)
    return indices, [exchanged[i] for i in indices]


def _with_media(example: Example, other: Example, modality: str) -> Example:
    """`example` with its media of a modality replaced by those of `other`, in order."""
    media = (part for part in other.parts if isinstance(part, Medium) and part.modality == modality)
    return Example(
        tuple(next(media) if isinstance(p, Medium) and p.modality == modality else p for p in example.parts),
        f"{example.place} with the {modality} of {other.place}",
        example.labels,
        example.rejected,
    )
