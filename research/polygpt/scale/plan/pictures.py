"""Charts of a plan: memory per device, the time bounds of a step, and the candidates of a search."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from polygpt.scale.plan.search import SearchResult

PARTS = ("parameters", "optimizer", "batch", "padding", "temporaries", "output", "program")
COLOURS = ("#3566a8", "#7ba3d0", "#8a8f98", "#c4c8ce", "#d98a3d", "#a05a9c", "#5b8f5b")


def draw_plan(data: Mapping, path: Path) -> None:
    """Draws the memory per device by part, and the lower bounds on the step time."""
    memory, roofline = data["memory"], data["roofline"]
    times = roofline or data.get("stand_in")
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = 0.0
    for name, colour in zip(PARTS, COLOURS, strict=True):
        width = memory[name] / 2**30
        left.barh([0], [width], left=at, color=colour, label=f"{name} {width:.2f}")
        at += width
    left.axvline(memory["usable"] / 2**30, color="#b03030", label=f"usable {memory['usable'] / 2**30:.2f}")
    left.set(title="memory per device, GiB", yticks=[], xlim=(0, 1.08 * max(at, memory["usable"] / 2**30)))
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    if times:
        names = {"compute": "compute", "memory": "HBM", "links": "interconnect", "network": "network"}
        if not roofline:
            names = {"useful": "useful FLOPs", "links": "interconnect (estimate)", "network": "network (estimate)"}
        shown = [(text, times[name]) for name, text in names.items() if times[name] or name != "network"]
        bound = roofline and max(seconds for _, seconds in shown)  # estimates have no bound to highlight
        colours = ["#b03030" if seconds == bound else "#7ba3d0" for _, seconds in shown]
        right.barh([name for name, _ in shown], [seconds for _, seconds in shown], color=colours)
        right.invert_yaxis()
        ceiling = roofline and f"lower bounds on the step time, s; MFU ceiling {roofline['mfu_ceiling']:.1%}"
        right.set(title=ceiling or "step time at published peak rates, s")
    else:
        right.set_axis_off()
    figure.savefig(path, dpi=150)


def draw_search(found: SearchResult, path: Path) -> None:
    """Draws step time against memory for all candidates, predicted and compiled, with the Pareto front."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    predicted = [trial for trial in found.trials if not trial.fits and not (trial.data and "memory" in trial.data)]
    usable = found.target.usable / 2**30
    for piped, color, what in ((False, "#b8bdc6", "predicted"), (True, "#e0c9a6", "predicted, pipelined")):
        some = [trial for trial in predicted if (trial.candidate.schedule is not None) == piped]
        if some:
            x, y = [found.memory(trial) / 2**30 for trial in some], [found.rank(trial) for trial in some]
            axes.scatter(x, y, s=6, color=color, zorder=1 - piped, label=f"{what} ({len(some)})")
    fits = [trial for trial in found.trials if trial.fits]
    x, y = [found.memory(trial) / 2**30 for trial in fits], [found.rank(trial) for trial in fits]
    axes.scatter(x, y, s=36, color="#3566a8", label=f"compiled, fits ({len(fits)})", zorder=3)
    front, least = [], float("inf")
    for a, b in sorted(zip(x, y, strict=True)):
        if b < least:
            front.append((a, b))
            least = b
    if front:
        axes.step(*zip(*front, strict=True), where="post", color="#3566a8", linewidth=1, label="Pareto front")
    if best := found.best:
        axes.annotate(
            best.candidate.summary().replace(" | ", "\n"), (found.memory(best) / 2**30, found.rank(best)),
            xytext=(12, 12), textcoords="offset points", fontsize=7, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip
        axes.set_ylim(0, 4 * found.rank(best))
    axes.axvline(usable, color="#b03030", label=f"usable {usable:.2f} GiB")
    axes.set(xlabel="memory per device, GiB", ylabel="step time, s", xlim=(0, 2 * usable))
    axes.set_title(f"{found.experiment.name} on {found.target.name}: candidates")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
