"""Evaluation results as tables on the terminal."""

from collections.abc import Mapping

from polygpt.cli.output import figure, print_table


def print_results(results: Mapping) -> None:
    """Prints what `evaluate` gives: a row for each task, a row for each modality gain."""
    tasks = results["tasks"]
    columns = list(dict.fromkeys(name for measures in tasks.values() for name in measures))
    columns.sort(key=lambda name: name == "n")  # the number of examples last
    rows = [[task, *(figure(measures.get(name)) for name in columns)] for task, measures in tasks.items()]
    print_table(f"Held out, step {results['step']:,}", ["task", *(name.replace("_", " ") for name in columns)], rows)
    gains = results.get("modality_gain") or {}
    if gains:
        rows = [
            [name, f"{gain['gain']:+.3f}", f"{gain['low']:+.3f} to {gain['high']:+.3f}"] for name, gain in gains.items()
        ]
        columns = ["task/modality", "gain (nats a token)", "95 % interval"]
        print_table("Modality gain: loss with media shuffled minus with the true media", columns, rows)
