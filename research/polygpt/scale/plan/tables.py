"""Tables of a plan for the terminal and Markdown, made from its JSON data so that saved plans can be shown too."""

from collections.abc import Mapping, Sequence

from polygpt import markup
from polygpt.markup import Table
from polygpt.scale.plan.collectives import NETWORK
from polygpt.scale.plan.search import SearchResult
from polygpt.spec import counted


def tables(data: Mapping) -> list[Table]:
    """All tables of a plan."""
    found = [_memory(data), _flops(data)]
    found += [_collectives(data)] if data["collectives"] else []
    found += [_kernels(data)] if data["kernels"] else []
    found += [_roofline(data)] if data["roofline"] else []
    found += [_stand_in(data)] if data.get("stand_in") else []
    found += [_nearest(data)] if data.get("nearest") else []
    return found


def headline(data: Mapping) -> str:
    """The plan in one line."""
    memory, roofline = data["memory"], data["roofline"]
    where = data["on"] + (f" x {data['slices']}" if data["slices"] > 1 else "")
    if memory is None:
        said = data["exhausted"] or {}
        needed, there = said.get("temporaries") or said.get("all"), said.get("available")
        of = "temporaries need" if said.get("temporaries") else "it needs"
        figures = f": {of} {gib(needed)} and a device has {gib(there)}" if needed else ""
        return f"{data['experiment']} on {where}: does not fit{figures}"
    fits = "fits" if memory["fits"] else "DOES NOT FIT"
    if stand_in := data.get("stand_in"):
        state = f"parameters and optimizer state need {gib(memory['parameters'] + memory['optimizer'])}"
        estimate = f"estimated total {gib(memory['total'])} of {gib(memory['usable'])} per device (CPU program): {fits}"
        least = f"useful FLOPs alone take {seconds(stand_in['useful'])} per step at peak"
        return f"{data['experiment']} on {where}: {state}; {estimate}; {least}"
    text = f"{data['experiment']} on {where}: {fits}, {gib(memory['total'])} of {gib(memory['usable'])} per device"
    if roofline:
        text += f"; at least {seconds(roofline['step'])} per step of full rows, bound by {roofline['bound']}"
        text += f"; MFU ceiling {roofline['mfu_ceiling']:.1%}"
    return text


def summary_lines(data: Mapping) -> list[str]:
    """Lines on the configuration, the chip and links, the compiler, estimates and warnings."""
    settings = data["settings"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in settings["mesh"].items()) or "one device"
    words = [f"mesh {mesh}"]
    if settings.get("pipeline"):
        words += ["pipeline of {microbatches} microbatches in {repeats} rounds".format(**settings["pipeline"])]
    words += [f"remat {settings['remat']}"]
    words += [f"remat of towers {settings['towers']}"] if settings["towers"] else []
    words += [f"features split over {', '.join(settings['features'])}"] if settings["features"] else []
    words += [f"sequence parallelism by {settings['context']}"] if settings["context"] else []
    if share := settings.get("causal_share"):
        words += [f"the busiest device computes {share:.2f} times the mean of causal attention"]
    parts = counted(settings["microbatches"], "microbatch", "microbatches")
    words += [f"{settings['batch_size']} rows of {settings['seq_len']} in {parts}"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines = ["; ".join(words)]
    lines += [data["reason"]] if data["reason"] else []
    lines += [f"{data['chip']['title']}: {data['links']}", f"compiled in {data['compile_seconds']:.0f} s by {versions}"]
    lines += [f"estimated: {data['estimated']}"] if data["estimated"] else []
    return lines + [f"note: {warning}" for warning in data["warnings"]]


def markdown(data: Mapping, found: SearchResult | None = None, pictures: Sequence[str] = ()) -> str:
    """The Markdown document of a plan, with the search and pictures if given."""
    parts = [f"# {headline(data)}", "\n".join(f"- {line}" for line in summary_lines(data))]
    parts += [f"![{name.rpartition('.')[0]}]({name})" for name in pictures]
    shown = tables(data) + ([searched(found)] if found else [])
    for table in shown:
        parts += [f"## {table.title}", *([markup.markdown(table)] if table.rows else [])]
        parts += [f"```\n{note}\n```" for note in table.notes]
    return "\n\n".join(parts) + "\n"


def searched(found: SearchResult, shown: int = 12) -> Table:
    """The table of a search: compiled candidates, then the most promising others that are predicted to fit."""
    rows, same = [], f" | {found.experiment.data.batch_size} rows"
    ceilings = [] if found.target.has_stand_in else ["MFU ceiling"]
    others = [trial for trial in found.trials if trial.data is None and found.memory(trial) <= found.target.usable]
    for trial in [*found.compiled, *others][:shown]:
        roofline = trial.data and trial.data.get("roofline")
        ceiling = f"{roofline['mfu_ceiling']:.1%}" if roofline else ""
        what = "fits" if trial.fits else (trial.data.get("failed") or "does not fit") if trial.data else "predicted"
        figures = [gib(found.memory(trial)), seconds(found.rank(trial))] if trial.fits or not trial.data else ["", ""]
        rows.append([trial.candidate.summary().removesuffix(same), what[:60], *figures, *(ceiling for _ in ceilings)])
    compiled = sum(trial.data is not None for trial in found.trials)
    count = f"{len(found.trials)} candidates with {same[3:]}"
    title = f"Search: {count} predicted, {compiled} compiled, {found.seconds:.0f} s"
    note = "Candidates are ranked by time, the mean of the step times with full overlap and with no overlap."
    note += "" if ceilings else " Times are predicted, also of compiled candidates: their programs are for CPUs."
    return Table(title, ["candidate", "result", "memory", "time", *ceilings], rows, notes=[note])


def gib(count: float | None) -> str:
    """Bytes as GiB or MiB."""
    if count is None:
        return "?"
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def _memory(data: Mapping) -> Table:
    memory = data["memory"]
    if memory is None:
        return Table("Memory per device", ["compiler message"], [], notes=[data["exhausted"]["text"]])
    names = {
        "parameters": "parameters", "optimizer": "optimizer", "batch": "batch and other state",
        "padding": "tile padding of arguments", "temporaries": "activations, gradients and other temporaries",
        "output": "outputs", "program": "generated code", "total": "total", "usable": "usable",
    }  # fmt: skip
    if data.get("stand_in"):
        names |= {name: f"{names[name]} (CPU program)" for name in ("temporaries", "output", "program")}
        names["total"] = "total (estimate)"
    share = memory["usable"]
    rows = [[text, gib(memory[name]), f"{memory[name] / share:.1%}"] for name, text in names.items()]
    return Table("Memory per device", ["part", "size", "share of usable"], rows)


def _flops(data: Mapping) -> Table:
    flops, rows = data["flops"], []
    for line in flops["lines"]:
        units = f"{line['units']:,} {line['unit']}s"
        rows.append([line["name"], _count(line["each"]), units, _count(line["forward"])])
    rows.append(["forward", "", "", _count(flops["forward"])])
    rows.append(["useful (3 x forward)", "", "", _count(flops["useful"])])
    rows.append(["recompute (formula)", "", "", _count(flops["again"])])
    if roofline := data["roofline"]:
        executed = roofline["executed"] * data["devices"]
        rows.append(["compiled program, all devices", "", "", _count(executed)])
    return Table("FLOPs per step", ["part", "FLOPs per unit", "units", "FLOPs"], rows, notes=[flops["formula"]])


def _collectives(data: Mapping) -> Table:
    """Merges collectives of the same kind along the same axes; the JSON data has each of them."""
    hides = [] if data.get("stand_in") else ["async"]  # a CPU's are synchronous, a GPU's are unknown
    timed = ["ms"] if data["chip"]["link"] else []  # CPU devices have no published link bandwidth
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for one in data["collectives"]:
        along = "between slices" if one["kind"] == NETWORK else f"{'+'.join(one['axes']) or '?'} ({one['group']})"
        groups.setdefault((one["kind"], along), []).append(one)
    rows = []
    for (kind, axes), some in sorted(groups.items(), key=lambda item: -sum(one["seconds"] for one in item[1])):
        sent, seconds = (sum(one[name] for one in some) for name in ("sent_a_step", "seconds"))
        hidden = sum(one["sent_a_step"] for one in some if one["hidden"]) / sent
        times, largest = sum(one["times"] for one in some), max(some, key=lambda one: one["sent_a_step"])
        share = largest["sent_a_step"] / sent
        most = f"{largest['dtype']} {largest['payload'] / 1e6:,.1f} MB, {_short(largest['origin'])} ({share:.0%})"
        figures = [f"{times:,}", f"{sent / 1e9:,.3f}", *(f"{seconds * 1e3:,.2f}" for _ in timed)]
        figures += [f"{hidden:.0%}" for _ in hides]
        rows.append([kind, axes, *figures, most])
    seconds = sum(one["seconds"] for one in data["collectives"])
    total = ["total", "", "", f"{data['collective_bytes'] / 1e9:,.3f}", *(f"{seconds * 1e3:,.2f}" for _ in timed)]
    rows.append([*total, *("" for _ in hides), ""])
    columns = ["collective", "axes (devices)", "count", "GB sent", *timed, *hides, "largest array (share of GB)"]
    title = "Collectives per step and device" + ("" if hides else " (estimate from the CPU program)")
    return Table(title, columns, rows, prose=frozenset({len(columns) - 1}))


def _short(origin: str) -> str:
    return origin if len(origin) <= 28 else origin[:27] + "…"


def _kernels(data: Mapping) -> Table:
    rows = [[name, f"{one['times']:,}", _count(one["flops"])] for name, one in data["kernels"].items()]
    return Table("Fused kernels in the compiled program", ["kernel", "calls per step", "FLOPs"], rows)


def _roofline(data: Mapping) -> Table:
    roofline = data["roofline"]
    names = {"compute": "compute", "memory": "HBM", "links": "interconnect, busiest links"}
    names |= {"in_turn": "interconnect, one collective after another", "network": "network"}
    rows = [[text, seconds(roofline[name])] for name, text in names.items() if roofline[name] or name != "network"]
    rows += [["step, full overlap", seconds(roofline["step"])]]
    rows += [["step, no overlap", seconds(roofline["serial"])]]
    rows += [["MFU ceiling", f"{roofline['mfu_ceiling']:.1%}"]]
    rows += [["MFU, no overlap", f"{roofline['mfu_nothing_hidden']:.1%}"]]
    return Table(f"Roofline: bound by {roofline['bound']}", ["bound", "time or MFU"], rows, notes=[roofline["ceiling"]])


def _stand_in(data: Mapping) -> Table:
    found, rows = data["stand_in"], []
    names = {
        "useful": "useful FLOPs (formula)", "again": "recompute (formula)",
        "links": "interconnect, busiest links (estimate)",
        "in_turn": "interconnect, one collective after another (estimate)", "network": "network (estimate)",
    }  # fmt: skip
    rows = [[text, seconds(found[name])] for name, text in names.items() if found[name] or name != "network"]
    return Table("Step time at published peak rates", ["part", "time"], rows, notes=[found["note"]])


def _nearest(data: Mapping) -> Table:
    rows = []
    for change in data["nearest"]:
        words = " ".join(f"--{name} {value}" for name, value in change["overrides"].items())
        how = "compiled" if change["compiled"] else "predicted"
        rows.append([words, f"{gib(change['memory'])} of {gib(change['usable'])}", how])
    return Table("Smallest changes that fit", ["change", "memory", "basis"], rows)


def seconds(value: float) -> str:
    """Formats a time in seconds, or in milliseconds below one second."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def _count(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value:,.0f}"
