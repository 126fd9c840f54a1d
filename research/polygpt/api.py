"""The names used most in experiment files: `import polygpt.api as pg`.

`train`, `open_run`, `save_adapter` and `evaluate_run` are imported on first use, so that experiment files do not import
packages that only running experiments need (Orbax, scikit-learn).

Nothing imports this file; import all other names from the modules that define them.
"""

import importlib

from polygpt.ablation.budget import Budget
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation, Paper
from polygpt.ablation.variants import chain, grid, product, zipped
from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.base import Adapter, Connector, SharedConnector
from polygpt.adapters.image import ImageAdapter
from polygpt.attention.biases import ALiBi, T5Bias
from polygpt.attention.contract import Attention
from polygpt.attention.masks import Mask, Window
from polygpt.attention.multi_head import MultiHead, MultiHeadModule
from polygpt.attention.scores import Score, Terms
from polygpt.blocks.cross import CrossSequential
from polygpt.blocks.stack import StackSpec
from polygpt.data.augment import Noise, RandomResizedCrop, RandomShift, SpecAugment, Speed
from polygpt.data.example import Example, Medium, Text
from polygpt.data.labels import Label
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.data.sources.base import Source
from polygpt.data.sources.corpus import Corpus
from polygpt.data.sources.embedded import Embedded
from polygpt.data.sources.folder import MediaFolder
from polygpt.data.sources.next_sentence import NextSentence
from polygpt.data.sources.text_files import TextFiles
from polygpt.data.sources.tfds import TfdsSource
from polygpt.data.sources.transformed import Transformed
from polygpt.data.tokenizers.bpe import BPE
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.data.tokenizers.special_tokens import SpecialTokens
from polygpt.data.transforms.base import Transform
from polygpt.data.transforms.fill_in_the_middle import FillInTheMiddle
from polygpt.data.transforms.prefix_lm import PrefixLM
from polygpt.data.transforms.span_corruption import SpanCorruption
from polygpt.data.transforms.ul2 import UL2
from polygpt.errors import BadRecord, UserError
from polygpt.evaluation.classification import Classification
from polygpt.evaluation.label_accuracy import LabelAccuracy
from polygpt.evaluation.label_error import LabelError
from polygpt.evaluation.retrieval import Retrieval
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.evaluation.transcription import Transcription
from polygpt.generation.sampling import Sampling
from polygpt.heads.base import Head
from polygpt.heads.linear import LinearHead
from polygpt.heads.projection import ProjectionHead
from polygpt.init.base import Random
from polygpt.init.from_run import FromRun
from polygpt.init.reference import Reference
from polygpt.models.decoder import DecoderSpec
from polygpt.models.encoder_decoder import EncoderDecoder
from polygpt.models.multimodal import ModelSpec
from polygpt.models.presets import preset
from polygpt.nn.experts import MixtureOfExperts
from polygpt.nn.linear import Linear
from polygpt.nn.mlp import MLP, GatedMLP
from polygpt.nn.norms import LayerNorm, RMSNorm
from polygpt.nn.positions import Learned, MRope, NoPosition, Position, Rope, Rope2D, Sinusoidal
from polygpt.objectives.base import BatchObjective, Objective, TokenObjective
from polygpt.objectives.classification import LabelClassification
from polygpt.objectives.distillation import Distillation
from polygpt.objectives.dpo import DPO
from polygpt.objectives.info_nce import InfoNCE
from polygpt.objectives.load_balance import LoadBalance
from polygpt.objectives.masked_lm import MaskedLM, MaskTokens
from polygpt.objectives.multi_label import MultiLabel
from polygpt.objectives.next_token import NextToken
from polygpt.objectives.preference_margin import PreferenceAccuracy, PreferenceMargin
from polygpt.objectives.regression import Regression
from polygpt.objectives.router_z import RouterZLoss
from polygpt.objectives.siglip import SigLIP
from polygpt.objectives.view import View
from polygpt.objectives.z_loss import ZLoss
from polygpt.optim.groups import Group
from polygpt.optim.mup import MuP
from polygpt.optim.optim import Optim
from polygpt.optim.optimizers import SGD, Adafactor, AdamW, Lion, Muon
from polygpt.optim.schedules import SGDR, WSD, Constant, WarmupCosine, WarmupExponential, WarmupLinear
from polygpt.runtime.checkpoint import CheckpointSpec
from polygpt.runtime.processes import ProcessesSpec
from polygpt.runtime.watchdog import WatchdogSpec
from polygpt.sharding import MeshSpec
from polygpt.training.experiment import Experiment, TrainSpec
from polygpt.training.phase import Phase
from polygpt.training.spikes import SpikeSpec

RUNNING = {
    "train": "polygpt.training.loop",
    "open_run": "polygpt.training.run",
    "save_adapter": "polygpt.training.adapter",
    "evaluate_run": "polygpt.report.finish",
}
"""The module that defines each function."""


def __getattr__(name: str):
    if name in RUNNING:
        return getattr(importlib.import_module(RUNNING[name]), name)
    raise AttributeError(f"module 'polygpt.api' has no attribute {name!r}")


__all__ = [
    "ALiBi",
    "Ablation",
    "Adafactor",
    "AdamW",
    "Adapter",
    "Attention",
    "AudioAdapter",
    "BPE",
    "BadRecord",
    "BatchObjective",
    "Budget",
    "Bytes",
    "CheckpointSpec",
    "Claim",
    "Classification",
    "Connector",
    "Constant",
    "Corpus",
    "CrossSequential",
    "DPO",
    "DataSpec",
    "DecoderSpec",
    "Distillation",
    "Embedded",
    "EncoderDecoder",
    "EvalTask",
    "EvaluationSpec",
    "Example",
    "Experiment",
    "FillInTheMiddle",
    "FromRun",
    "GatedMLP",
    "Group",
    "Head",
    "ImageAdapter",
    "ImageFeatures",
    "InfoNCE",
    "Label",
    "LabelAccuracy",
    "LabelClassification",
    "LabelError",
    "LayerNorm",
    "LayoutSpec",
    "Learned",
    "Linear",
    "LinearHead",
    "Lion",
    "LoadBalance",
    "LogMel",
    "MLP",
    "MRope",
    "Mask",
    "MaskTokens",
    "MaskedLM",
    "MediaFolder",
    "Medium",
    "MeshSpec",
    "MixtureOfExperts",
    "ModelSpec",
    "MuP",
    "MultiHead",
    "MultiHeadModule",
    "MultiLabel",
    "Muon",
    "NextSentence",
    "NextToken",
    "NoPosition",
    "Noise",
    "Objective",
    "Optim",
    "Paper",
    "Phase",
    "Position",
    "PreferenceAccuracy",
    "PreferenceMargin",
    "PrefixLM",
    "ProcessesSpec",
    "ProjectionHead",
    "RMSNorm",
    "Random",
    "RandomResizedCrop",
    "RandomShift",
    "Reference",
    "Regression",
    "Retrieval",
    "Rope",
    "Rope2D",
    "RouterZLoss",
    "SGD",
    "SGDR",
    "Sampling",
    "Score",
    "SharedConnector",
    "SigLIP",
    "Sinusoidal",
    "Source",
    "SpanCorruption",
    "SpecAugment",
    "SpecialTokens",
    "Speed",
    "SpikeSpec",
    "StackSpec",
    "T5Bias",
    "Task",
    "Terms",
    "Text",
    "TextFiles",
    "TfdsSource",
    "TokenObjective",
    "TrainSpec",
    "Transcription",
    "Transform",
    "Transformed",
    "UL2",
    "UserError",
    "View",
    "WSD",
    "WarmupCosine",
    "WarmupExponential",
    "WarmupLinear",
    "WatchdogSpec",
    "Window",
    "ZLoss",
    "chain",
    "grid",
    "preset",
    "product",
    "zipped",
]
