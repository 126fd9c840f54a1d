"""Generated answers as labels: exact match, accuracy and macro-F1."""

import dataclasses
from typing import ClassVar

from polygpt.evaluation.metric import Measure, Metric, normalize


@dataclasses.dataclass(frozen=True)
class Classification(Metric):
    """`exact_match`: the share of answers equal to the truth, character by character. `accuracy`: the share equal
    apart from case, punctuation and space. `f1`: macro-F1, the unweighted mean over the labels that occur in the truth.
    """

    measures: ClassVar = (
        Measure("accuracy", "higher", share=True),
        Measure("exact_match", "higher", share=True, brief=False),
        Measure("f1", "higher", "F1", share=True, brief=False),
    )

    def __call__(self, predictions, truths):
        from sklearn.metrics import accuracy_score, f1_score  # local import: takes as long as importing JAX

        exact = sum(prediction == truth for prediction, truth in zip(predictions, truths, strict=True))
        predictions, truths = [normalize(text) for text in predictions], [normalize(text) for text in truths]
        f1 = f1_score(truths, predictions, labels=sorted(set(truths)), average="macro", zero_division=0)
        return {
            "exact_match": exact / len(truths),
            "accuracy": float(accuracy_score(truths, predictions)),
            "f1": float(f1),
        }
