"""Evaluation results as tables on the terminal."""

from collections.abc import Mapping

from polygpt.cli.output import figure, print_table
from polygpt.evaluation.evaluate import cut_answers
from polygpt.evaluation.likelihood import COUNTS
from polygpt.evaluation.metric import Measure


def print_results(results: Mapping, measures: Mapping[str, Measure]) -> None:
    """Prints the results of `evaluate`: a row per task, a row per modality gain, a line per failed task.

    To fit a terminal, measures that are not `brief` appear only in evaluation.json and the report.

    Args:
        results: what `evaluate_run` returned.
        measures: `EvaluationSpec.measures()`; other values follow under their own names.
    """
    tasks = results["tasks"]
    if not tasks:
        print(f"step {results['step']:,}: the experiment has no held-out tasks, so nothing was measured")
        return
    found = {name for figures in tasks.values() for name in figures}
    columns = [name for name, one in measures.items() if name in found and one.brief]
    columns += sorted(found.difference(measures, COUNTS)) + [name for name in COUNTS if name in found]
    rows = [[task, *(figure(figures.get(name)) for name in columns)] for task, figures in tasks.items()]
    heads = [measures[name].title if name in measures else name.replace("_", " ") for name in columns]
    print_table(f"Held out, step {results['step']:,}", ["task", *heads], rows)
    gains = results.get("modality_gain") or {}
    if gains:
        rows = [
            [name, f"{gain['gain']:+.3f}", f"{gain['low']:+.3f} to {gain['high']:+.3f}"] for name, gain in gains.items()
        ]
        columns = ["task/modality", "gain (nats per token)", "95 % interval"]
        print_table("Modality gain: loss with media shuffled minus with the true media", columns, rows)
    for line in cut_answers(tasks):
        print(line)
    for task, fault in results.get("faults", {}).items():
        print(f"{task} was not measured in full: {fault}")


def failed(results: Mapping) -> dict[str, str]:
    """{"fault": one line} if some tasks could not be measured, otherwise {}; a verb merges it into its result."""
    faults = results.get("faults", {})
    return {"fault": f"not measured in full: {', '.join(faults)}: see the results"} if faults else {}
