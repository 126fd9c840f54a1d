"""Evaluation results as tables on the terminal."""

from collections.abc import Mapping

from polygpt.cli.output import figure, print_table

HEADS = {
    "accuracy": "accuracy",
    "wer": "WER",
    "cer": "CER",
    "loss": "loss",
    "bits_per_byte": "bits/byte",
    "token_accuracy": "token accuracy",
    "n": "n",
}
"""Columns in their order; a user's own measures come before the last."""
LEFT_OUT = ("perplexity", "exact_match", "f1")
"""What follows from the others, or nearly: a terminal is narrow, and evaluation.json and the report have all."""


def print_results(results: Mapping) -> None:
    """Prints what `evaluate` gives: a row for each task, a row for each modality gain."""
    tasks = results["tasks"]
    if not tasks:
        print(f"step {results['step']:,}: the experiment has no held-out tasks, so nothing was measured")
        return
    found = {name for measures in tasks.values() for name in measures}.difference(LEFT_OUT)
    columns = [name for name in HEADS if name in found and name != "n"]
    columns += [*sorted(found.difference(HEADS)), *(["n"] if "n" in found else [])]
    rows = [[task, *(figure(measures.get(name)) for name in columns)] for task, measures in tasks.items()]
    heads = [HEADS.get(name, name.replace("_", " ")) for name in columns]
    print_table(f"Held out, step {results['step']:,}", ["task", *heads], rows)
    gains = results.get("modality_gain") or {}
    if gains:
        rows = [
            [name, f"{gain['gain']:+.3f}", f"{gain['low']:+.3f} to {gain['high']:+.3f}"] for name, gain in gains.items()
        ]
        columns = ["task/modality", "gain (nats a token)", "95 % interval"]
        print_table("Modality gain: loss with media shuffled minus with the true media", columns, rows)
