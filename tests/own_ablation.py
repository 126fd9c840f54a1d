"""A user's own ablation, one file, as small as can be; and results for it that no training made."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polygpt.ablation import results
from polygpt.ablation.study import Ablation, Point, load_ablation, places

FILE = '''"""Width of a tiny model.

Wider and deeper, on the letters of a poem.
"""

from pathlib import Path

from polygpt.ablation.budget import Budget
from polygpt.ablation.claims import Claim
from polygpt.ablation.study import Ablation, Paper
from polygpt.ablation.variants import grid
from polygpt.attention.multi_head import MultiHead
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.text_files import TextFiles
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import WarmupCosine
from polygpt.training.experiment import Experiment, TrainSpec

TEXT = TextFiles((str(Path(__file__).parent / "poem.txt"),), unit="chunk", bytes=40)


def ablation() -> Ablation:
    return Ablation(
        question="Is a wider model better, or a deeper one?",
        base=Experiment(
            name="base",
            data=DataSpec({"text": Task(TEXT)}, LayoutSpec(seq_len=48), batch_size=2),
            model=ModelSpec(DecoderSpec(width=8, depth=1, attention=MultiHead(heads=2))),
            optim=Optim(WarmupCosine(1e-2)),
            evaluation=EvaluationSpec({"text": EvalTask(TEXT, limit=8)}, batch_size=4),
            train=TrainSpec(steps=4),
        ),
        variants={"base": {}, "wide": {"model.decoder.width": 16}, "deep_2": {"model.decoder.depth": 2}},
        paper=Paper(
            title="On <Width> & Depth",
            reference="2002.05202",
            where="Table 1",
            evidence="M",
            unit="log-perplexity",
            figures={"base": 1.99, "wide": 1.944},
        ),
        seeds=4,
'''
CLAIMS = """claims=(
    Claim("wide < base", "a wider model learns more"),
    Claim("deep_2 < base", "a deeper model learns more"),
    Claim("abs(deep_2 - base) < noise", "depth makes no difference"),
),"""
END = "    )\n"
POEM = "\n".join(f"line {n}: the sea has {n} waves and a {'grey' if n % 2 else 'green'} gull" for n in range(40))

CODE = {"core": "abcdef0123456789", "more": {"polygpt.attention.biases": "12345678"}}
"""Of all results that are made up."""

Loss = Callable[[str, Mapping[str, Any], int], float | None]
"""Of a variant at a point with a seed; None for a run that diverged."""


def write_ablation(folder: Path, more: str = CLAIMS, name: str = "experiment.py") -> Path:
    """The ablation's file with its data beside it; `more` are further arguments of `Ablation`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "poem.txt").write_text(POEM)
    file = folder / name
    file.write_text(FILE + "".join(f"        {line}\n" for line in more.splitlines()) + END)
    return file


def write_results(file: Path, loss: Loss, seeds: int | None = None) -> Path:
    """Lines as runs leave them, but with made-up figures, for all that an ablation asks for; the file of results."""
    ablation = load_ablation(file)
    path = file.with_name(results.RESULTS)
    for variant, at in places(ablation):
        for made in results.candidates(ablation, variant, at):
            results.append(path, [_line(ablation, made, s, "tuning", loss) for s in results.tuning_seeds(ablation)])
        chosen = results.choose(ablation, variant, at, {line["key"]: line for line in results.read(path)})
        numbers = range(ablation.seeds if seeds is None else seeds)
        results.append(path, [_line(ablation, chosen, seed, "comparison", loss) for seed in numbers])
    return path


def record(seed: int, value: float | None, metrics: Sequence[str] = ("text/loss",), **others: Any) -> dict[str, Any]:
    """What a run leaves; the first metric is `value`, each further one 0.1 more. None: it diverged half-way."""
    steps = [1, 2, 3, 4] if value is not None else [1, 2]
    curve = [5.0 - step / 2 + seed / 50 for step in steps]
    measured = {metric: None if value is None else value + i / 10 for i, metric in enumerate(dict.fromkeys(metrics))}
    return {
        "seed": seed,
        "metrics": {**measured, "train/loss": curve[-1]},
        "curve": {"step": steps, "loss": curve},
        "evaluations": {"step": steps[1:], metrics[0]: curve[1:]},
        "parameters": 3000,
        "flops": 2.5e9,
        "tokens": 96 * len(steps),
        "steps": len(steps),
        "seconds": 1.5,
        "diverged": value is None,
        "how": "4 seeds in one program",
        "made": {"polygpt": "0.0", "commit": "0123456789abcdef", "jax": "0.10", "device": "cpu", "code": CODE},
        **others,
    }


def _line(ablation: Ablation, made: Point, seed: int, stage: str, loss: Loss) -> dict[str, Any]:
    at = {**made.at, **({} if made.tuned is None else {"tuned": made.tuned})}
    left = record(seed, loss(made.variant, at, seed), ablation.metrics(), parameters=1000 * len(made.variant))
    return results.labelled({"key": results.key(made.experiment.replace(seed=seed)), **left}, made, stage)
