"""polygpt train FILE: train, evaluate, report."""

import contextlib
import itertools
import os
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from polygpt.cli import experiment
from polygpt.cli.arguments import Parser
from polygpt.cli.evaluate import add_code

EXAMPLES = """\
examples:
  polygpt train experiments/quickstart.py
  polygpt train experiments/quickstart.py --train.steps 200 --optim.schedule.peak_lr=1e-3
  polygpt train experiments/quickstart.py --help

The same command resumes a run that was stopped or killed. A run stopped by a signal exits with 1."""


NEXT = """\
try next:
  polygpt generate {workdir} --interactive
  polygpt data show {file}
  polygpt train {file} --model.decoder.attention polygpt.attention.sliding:SlidingWindow --workdir {workdir}-sliding"""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, experiment.fields)
    words.add_argument("file", metavar="FILE", help="a Python file with `def experiment() -> Experiment`")
    words.add_argument("--workdir", metavar="W", help="run folder (default: runs/<experiment name>)")
    words.add_argument("--no-report", action="store_true", help="only train; skip the final evaluation and report")
    add_code(words)
    return words


def run(arguments: Namespace) -> dict:
    """Trains; returns the results of `evaluate` and the paths of the run and its report."""
    with _sigterm_exits():
        return _run(arguments)


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Makes SIGTERM end the process with one line and code 1, wherever the run does not handle it to save first."""

    def leave(*_):
        os.write(2, b"polygpt: interrupted by SIGTERM: the same command resumes\n")
        os._exit(1)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: Namespace) -> dict:
    chosen = experiment.load(arguments.file, arguments.changes, arguments.options)

    from polygpt.runtime import processes

    with processes.together(
        chosen.train.processes
    ):  # includes evaluation and report: an error there must end all processes
        return _train(chosen, arguments)


def _train(chosen, arguments: Namespace) -> dict:
    from polygpt.runtime.goodput import process_begun
    from polygpt.training.loop import train

    workdir = Path(arguments.workdir or Path("runs") / chosen.name)
    outcome = train(chosen, workdir, begun=process_begun(), code=arguments.code)
    done = {"step": outcome.step, "workdir": workdir}
    if not outcome.finished:
        where = f"at step {outcome.step}, saved" if outcome.step else "before the first step"
        return done | {"interrupted": f"interrupted {where}: the same command resumes"}
    if arguments.no_report:
        print(f"step {outcome.step}, {workdir}")
        return done

    from polygpt.cli.results import failed, print_results  # late: evaluation and pictures need more packages
    from polygpt.report.finish import write_report
    from polygpt.training.run import open_run

    trained = open_run(workdir, spread=True, code=arguments.code)  # collective: all processes take part
    results = _known(trained) or _evaluated(trained)
    if results is None:
        return done | {
            "interrupted": "interrupted in the final evaluation, all steps are saved: the same command resumes"
        }
    report = write_report(trained)
    print_results(results, chosen.evaluation.measures())
    print(f"report: {report}")
    print(NEXT.format(file=arguments.file, workdir=workdir))
    return done | results | {"report": report} | failed(results)


def _known(trained) -> dict | None:
    """The results in the run folder, if they are for this checkpoint and for all current tasks."""
    from polygpt.report import gather
    from polygpt.report.finish import RESULTS

    found = gather.read_json(Path(trained.workdir) / RESULTS)
    tasks = set(trained.experiment.evaluation.tasks)
    if not isinstance(found, dict) or found.get("step") != int(trained.step) or set(found["tasks"]) != tasks:
        return None
    return None if found.get("faults") or found.get("overrides") else found


def _evaluated(trained) -> dict | None:
    """The results on the held-out tasks; None if a signal interrupted the evaluation."""
    import jax

    from polygpt.cli.progress import Progress
    from polygpt.report.finish import evaluate_run
    from polygpt.runtime.interruption import Interrupted, Interruption

    if (
        jax.process_count() > 1 and trained.model.layout is None
    ):  # each process evaluates on its own, so they cannot agree on where to stop
        with Progress() as progress:
            return evaluate_run(trained, progress)
    with Interruption("stopping after this evaluation batch") as interruption, Progress() as progress:
        batches = itertools.count()

        def proceed():
            if interruption.due(next(batches)):
                raise Interrupted

        try:
            return evaluate_run(trained, progress, proceed)
        except Interrupted:
            return None
