"""Generated transcripts: word and character error rates."""

import dataclasses
from typing import ClassVar

import jiwer

from polygpt.evaluation.metric import Measure, Metric, normalize


@dataclasses.dataclass(frozen=True)
class Transcription(Metric):
    """`wer` and `cer`: substituted, deleted and inserted words or characters, relative to the number in the truth.

    Pooled over the task, so utterances are weighted by length. Both may exceed 1. With an empty transcript all words
    count as deleted, with an empty truth all count as inserted; if all truths are empty, the divisor is 1.
    """

    measures: ClassVar = (Measure("wer", "lower", "WER"), Measure("cer", "lower", "CER"))

    normalized: bool = True
    """Whether to ignore case, punctuation and surplus space."""

    def __call__(self, predictions, truths):
        if self.normalized:
            predictions, truths = [normalize(text) for text in predictions], [normalize(text) for text in truths]
        predictions, truths = list(predictions), list(truths)
        return {
            "wer": _rate(jiwer.process_words(truths, predictions)),
            "cer": _rate(jiwer.process_characters(truths, predictions)),
        }


def _rate(output) -> float:
    errors = output.substitutions + output.deletions + output.insertions
    return errors / max(output.hits + output.substitutions + output.deletions, 1)
