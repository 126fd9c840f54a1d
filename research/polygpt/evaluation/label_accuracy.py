"""Classes that heads predict: accuracy and macro-F1."""

import dataclasses

import numpy as np

from polygpt.evaluation.head_metric import HeadMetric
from polygpt.evaluation.metric import Measure


@dataclasses.dataclass(frozen=True)
class LabelAccuracy(HeadMetric):
    """`<label>_accuracy` and `<label>_f1` of the class with the largest output, or of all numbers of a multi-label.

    F1 is the unweighted mean over the classes that occur in the truth. A number of a multi-label is predicted as 1
    if its output is positive; accuracy is the share of known numbers that are right.
    """

    @property
    def measures(self) -> tuple[Measure, ...]:
        names = f"{self.named}_accuracy", f"{self.named}_f1"
        accuracy = Measure(names[0], "higher", share=True, needs="likelihood")
        return accuracy, Measure(names[1], "higher", f"{self.named} F1", share=True, brief=False, needs="likelihood")

    def __call__(self, outputs_NK, label_Nn):
        from sklearn.metrics import f1_score  # local import: takes as long as importing JAX

        if outputs_NK.shape == label_Nn.shape:
            known = ~np.isnan(label_Nn)
            right = (outputs_NK > 0) == (label_Nn > 0.5)
            columns = [(label_Nn[rows, k] > 0.5, outputs_NK[rows, k] > 0) for k, rows in enumerate(known.T)]
            scores = [f1_score(*column, zero_division=0) for column in columns if column[0].any()]
            accuracy, f1 = right[known].mean(), np.mean(scores) if scores else 0.0
        else:
            truth, best = label_Nn[:, 0].astype(int), outputs_NK.argmax(axis=-1)
            accuracy = (truth == best).mean()
            f1 = f1_score(truth, best, labels=np.unique(truth), average="macro", zero_division=0)
        return dict(zip((one.name for one in self.measures), (float(accuracy), float(f1)), strict=True))
