"""A user's own experiment file with its data beside it, as small as can be."""

import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

FILE = '''"""Pictures with captions, recordings with transcripts."""

from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.image import ImageAdapter
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.stack import StackSpec
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.data.sources.folder import MediaFolder
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.generation.sampling import Sampling
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import WarmupCosine
from polygpt.training.experiment import Experiment, TrainSpec


def experiment():
    data = MediaFolder(__file__.replace("own.py", "data"))
    tower = StackSpec(width=16, depth=0)  # the report of a model with blocks there: report/test_samples.py
    image = ImageAdapter(features=ImageFeatures(8, 8), items=1, patch=4, tower=tower)
    audio = AudioAdapter(features=LogMel(seconds=0.5, rate=8000, mels=16), items=1, tower=tower)
    return Experiment(
        name="own",
        model=ModelSpec(DecoderSpec(width=16, depth=1, attention=MultiHead(heads=2)), {"image": image, "audio": audio}),
        data=DataSpec({"own": Task(data)}, LayoutSpec(seq_len=64), batch_size=2),
        optim=Optim(WarmupCosine(1e-2)),
        train=TrainSpec(steps=3, log_every=1),
        evaluation=EvaluationSpec(
            {"own": EvalTask(data, generate=True)}, batch_size=4, sampling=Sampling(temperature=0.0, max_tokens=8)
        ),
    )
'''


def write_data(folder: Path) -> None:
    """Four pictures with captions and three recordings with transcripts."""
    folder.mkdir()
    rows = []
    for colour in ("red", "green", "blue", "grey"):
        Image.new("RGB", (12, 9), colour).save(folder / f"{colour}.png")
        rows.append({"file_name": f"{colour}.png", "text": f"{colour} it is"})
    for pitch in (200, 400, 800):
        soundfile.write(folder / f"{pitch}.wav", np.sin(2 * np.pi * pitch * np.arange(3000) / 8000) / 3, 8000)
        rows.append({"file_name": f"{pitch}.wav", "text": f"{pitch} hertz"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_experiment(folder: Path) -> Path:
    """An experiment's file with its data beside it."""
    write_data(folder / "data")
    file = folder / "own.py"
    file.write_text(FILE)
    return file
