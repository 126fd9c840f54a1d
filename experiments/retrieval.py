"""Find the picture of a spoken digit: three modalities in one space of embeddings, learned by contrast (SigLIP).

    polygpt train experiments/retrieval.py

One decoder reads the picture of a digit, a recording of the same digit and its name, each alone, and a projection per
modality gives its embedding. Every modality is compared with both others over all examples of the batch.

Expected on 299 held-out pictures and voices after 500 steps, where any example of the same digit is a partner (chance:
10 %): the most similar is one in 97 % of cases from picture to name, 99 % from recording to name, 97 % from picture to
recording and 99 % back; from name to picture or recording always. It takes 100 s of CPU time (AMD EPYC, Zen 4).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.image import ImageAdapter
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.stack import StackSpec
from polygpt.data.augment import RandomShift, SpecAugment, Speed
from polygpt.data.example import Example
from polygpt.data.labels import Label
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.data.sources.base import Source
from polygpt.data.sources.embedded import NUMBERS, Embedded
from polygpt.evaluation.retrieval import Retrieval
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.heads.projection import ProjectionHead
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.objectives.siglip import SigLIP
from polygpt.optim.optim import Optim
from polygpt.optim.optimizers import AdamW
from polygpt.optim.schedules import WarmupCosine
from polygpt.training.experiment import Experiment, TrainSpec

PAIRS = {"image_text": (1, 0), "audio_text": (2, 0), "image_audio": (1, 2)}
"""The modalities that are compared: 0 is text, then the adapters in their order."""
MODALITIES = ("text", "image", "audio")


@dataclasses.dataclass(frozen=True)
class Triples(Source):
    """The picture of a digit, a recording of the same digit, and its name. Example `i` has picture `i`."""

    split: Literal["train", "test"] = "train"
    """The split."""

    def open(self) -> "TripleExamples":
        return TripleExamples(self.split)


class TripleExamples(Sequence[Example]):
    """Random access to the triples."""

    def __init__(self, split: str):
        self.split = split

    @functools.cached_property
    def _pictures(self):
        return Embedded("digits", self.split).open()

    @functools.cached_property
    def _recordings(self) -> dict[str, list]:
        """The recordings of each digit."""
        found = {name: [] for name in NUMBERS[:10]}
        for recording, _, answer in (example.parts for example in Embedded("speech", self.split).open()):
            found[answer.text].append(recording)
        return found

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, i: int) -> Example:
        picture, _, name = self._pictures[i].parts
        recordings = self._recordings[name.text]
        recording = recordings[i * 7919 % len(recordings)]  # a prime, so that neighbours have different voices
        return Example((picture, recording, name), f"triple {i} of {self.split}", {"number": NUMBERS.index(name.text)})


def experiment() -> Experiment:
    """The experiment."""
    tower = StackSpec(width=96, depth=1, attention=MultiHead(heads=4, bias=True), scan=False)
    heads = {name: ProjectionHead(64, pool="mean", temperature=0.1, bias=-10.0) for name in MODALITIES}
    model = ModelSpec(
        decoder=DecoderSpec(width=128, depth=2, attention=MultiHead(heads=4), scan=False),
        adapters={
            "image": ImageAdapter(ImageFeatures(32, 32), items=4, patch=16, tower=tower),
            "audio": AudioAdapter(
                LogMel(seconds=1.0, rate=8000, mels=40, window=256, hop=160), items=4, fold=2, tower=tower
            ),
        },
        heads=heads,
    )
    names = {pair: tuple(MODALITIES[number] for number in numbers) for pair, numbers in PAIRS.items()}
    objectives = {pair: (SigLIP(names[pair], numbers), 1.0) for pair, numbers in PAIRS.items()}
    metrics = tuple(Retrieval(names[pair], numbers, pair, (1,), "number") for pair, numbers in PAIRS.items())
    augment = (RandomShift(), Speed(), SpecAugment(frequency_masks=1, frequency_width=6, time_masks=1, time_width=5))
    layout = LayoutSpec(seq_len=128, labels={"number": Label(classes=10)})
    return Experiment(
        name="retrieval",
        model=model,
        data=DataSpec({"triples": Task(Triples(), augment=augment)}, layout, batch_size=12),
        objectives=objectives,
        optim=Optim(WarmupCosine(peak_lr=2e-3, warmup=50, final=0.02), AdamW(weight_decay=0.05, beta2=0.98)),
        train=TrainSpec(steps=500, log_every=10, evaluate_every=250, use="latest"),
        evaluation=EvaluationSpec(
            {"held_out": EvalTask(Triples("test"), heads=metrics)}, batch_size=12, modality_gain=False
        ),
    )
