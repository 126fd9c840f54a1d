"""Numbers that heads predict: mean absolute and root mean square error."""

import dataclasses
from typing import Literal

import numpy as np

from polygpt.evaluation.head_metric import HeadMetric
from polygpt.evaluation.metric import Measure


@dataclasses.dataclass(frozen=True)
class LabelError(HeadMetric):
    """`<label>_mae` and `<label>_rmse` over all known numbers of a label. Further outputs of the head are not used."""

    outputs: Literal["numbers", "logarithms"] = "numbers"
    """What the head predicts: the numbers, or their logarithms, as after training with the Poisson loss."""

    @property
    def measures(self) -> tuple[Measure, ...]:
        mae = Measure(f"{self.named}_mae", "lower", f"{self.named} MAE", needs="likelihood")
        return mae, Measure(f"{self.named}_rmse", "lower", f"{self.named} RMSE", brief=False, needs="likelihood")

    def __call__(self, outputs_NK, label_Nn):
        predicted_Nn = outputs_NK[:, : label_Nn.shape[1]].astype(np.float64)
        if self.outputs == "logarithms":
            predicted_Nn = np.exp(predicted_Nn)
        error = (predicted_Nn - label_Nn)[~np.isnan(label_Nn)]
        values = float(np.abs(error).mean()), float(np.sqrt((error**2).mean()))
        return dict(zip((one.name for one in self.measures), values, strict=True))
