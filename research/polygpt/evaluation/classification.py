"""Generated answers as labels: exact match, accuracy and macro-F1."""

import dataclasses

from sklearn.metrics import accuracy_score, f1_score

from polygpt.evaluation.metric import Metric, normalize


@dataclasses.dataclass(frozen=True)
class Classification(Metric):
    """`exact_match`: the share of answers equal to the truth character for character. `accuracy`: the share equal but
    for case, punctuation and space. `f1`: the unweighted mean of the F1 of every label that occurs in the truth.
    """

    def __call__(self, predictions, truths):
        exact = sum(prediction == truth for prediction, truth in zip(predictions, truths, strict=True))
        predictions, truths = [normalize(text) for text in predictions], [normalize(text) for text in truths]
        f1 = f1_score(truths, predictions, labels=sorted(set(truths)), average="macro", zero_division=0)
        return {
            "exact_match": exact / len(truths),
            "accuracy": float(accuracy_score(truths, predictions)),
            "f1": float(f1),
        }
