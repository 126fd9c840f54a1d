"""Engines: all give the same records; what dies is run again, what fails says why, and nothing is left running."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deadly import Deadly

from polygpt.ablation.engines import children
from polygpt.ablation.engines import ray as ray_engine
from polygpt.ablation.engines.base import Failure, Progress, Task
from polygpt.ablation.engines.inline import Inline
from polygpt.ablation.engines.processes import Processes
from polygpt.ablation.engines.ray import Ray
from polygpt.ablation.engines.slurm import Slurm
from polygpt.attention.multi_head import MultiHead
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec
from polygpt.data.loader import Task as DataTask
from polygpt.data.sources.text_files import TextFiles
from polygpt.errors import SpecError, UserError
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import Constant
from polygpt.training.experiment import Experiment, TrainSpec

LICENSE = (str(Path(__file__).parents[2] / "LICENSE"),)
TEXT = TextFiles(LICENSE, unit="chunk", bytes=40)
OF_THE_RUN = ("seconds", "made")
"""What differs between two runs of one experiment."""


@pytest.fixture(autouse=True)
def found_by_workers(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))


def experiment(source=TEXT, width=16, steps=4):
    return Experiment(
        name="tiny",
        data=DataSpec(tasks={"text": DataTask(source)}, layout=LayoutSpec(seq_len=48), batch_size=2),
        model=ModelSpec(decoder=DecoderSpec(width=width, depth=1, attention=MultiHead(heads=2))),
        optim=Optim(Constant(1e-2)),
        evaluation=EvaluationSpec(tasks={"text": EvalTask(TEXT, limit=4)}, batch_size=4),
        train=TrainSpec(steps=steps, log_every=1),
    )


def task(folder, name, seeds=(0, 1), **settings):
    made = experiment(**settings)
    return Task(name, tuple(made.replace(seed=seed) for seed in seeds), folder / name)


def deadly(folder, **settings):
    folder.mkdir(parents=True)
    return Deadly(LICENSE, unit="chunk", bytes=40, marks=str(folder), **settings)


def finished_before(folder, name):
    """A task that a worker has done, but not told of: it reads the records and needs not train."""
    made = task(folder, name)
    (made.folder / "seeds-0-1").mkdir(parents=True)
    (made.folder / "seeds-0-1" / "records.json").write_text(json.dumps([{"of": name, "seed": s} for s in (0, 1)]))
    return made


def run(engine, tasks, callback=lambda progress: None):
    return {task.name: done for task, done in engine.run(tasks, callback)}


def of_any_run(records):
    assert isinstance(records, list), records
    return [{key: value for key, value in record.items() if key not in OF_THE_RUN} for record in records]


@pytest.fixture(scope="module")
def inline(tmp_path_factory):
    """The records of two points, by name, as made in this process."""
    folder = tmp_path_factory.mktemp("inline")
    done = run(Inline(), [task(folder, "narrow"), task(folder, "wide", width=32)])
    return {name: of_any_run(records) for name, records in done.items()}


@pytest.mark.slow
def test_inline_gives_records_in_the_order_of_the_seeds(inline):
    assert {name: [record["seed"] for record in records] for name, records in inline.items()} == {
        "narrow": [0, 1],
        "wide": [0, 1],
    }
    losses = [record["metrics"]["text/loss"] for records in inline.values() for record in records]
    assert len(set(losses)) == 4 and all(3 < loss < 5.5 for loss in losses)  # ln 260 is 5.6


@pytest.mark.parametrize(
    "engine",
    [Inline(), *(pytest.param(e, marks=pytest.mark.slow) for e in (Processes(workers=2), Slurm(cluster="local")))],
    ids=lambda e: type(e).__name__,
)
def test_what_was_done_before_is_not_done_again(tmp_path, engine):
    if isinstance(engine, Slurm):
        pytest.importorskip("submitit")
    tasks = [finished_before(tmp_path, name) for name in "abc"]
    assert run(engine, tasks) == {name: [{"of": name, "seed": s} for s in (0, 1)] for name in "abc"}
    assert run(engine, []) == {}


@pytest.mark.slow
def test_processes_train_as_inline_though_one_is_killed_and_one_fails(tmp_path, inline):
    told: list[Progress] = []
    missing = TextFiles((str(tmp_path / "gone.txt"),))
    tasks = [
        task(tmp_path, "gone", source=missing),
        task(tmp_path, "killed", source=deadly(tmp_path / "marks")),
        task(tmp_path, "narrow"),
        task(tmp_path, "wide", width=32),
    ]
    done = run(Processes(workers=2, retries=1), tasks, told.append)
    fault = done.pop("gone")
    assert isinstance(fault, Failure) and fault.final and "gone.txt" in fault.message and "\n" not in fault.message
    assert len(list((tmp_path / "marks").iterdir())) == 1
    assert of_any_run(done.pop("killed")) == inline["narrow"]  # the same text
    assert {name: of_any_run(records) for name, records in done.items()} == inline
    assert {(p.task, p.steps, p.seeds) for p in told} <= {(t.name, 4, t.seeds) for t in tasks} and told


@pytest.mark.slow
def test_a_task_whose_process_always_dies_is_given_up_and_the_others_are_not(tmp_path):
    tasks = [task(tmp_path, "dies", source=deadly(tmp_path / "marks", times=9)), finished_before(tmp_path, "other")]
    done = run(Processes(workers=1, retries=1), tasks)
    assert done["other"][1] == {"of": "other", "seed": 1}
    said = done["dies"]
    assert not said.final and said.message.startswith("its process was killed by SIGKILL") and "2 times" in said.message
    assert str(tmp_path / "dies" / "log.txt") in said.message and len(list((tmp_path / "marks").iterdir())) == 2


@pytest.mark.slow
def test_an_interruption_ends_all_processes_which_save_first(tmp_path):
    tasks = [task(tmp_path, name, seeds=(0,), steps=100_000) for name in "ab"]

    def callback(progress):
        if progress.step > 2 and len({path.parent.name for path in tmp_path.glob("*/progress.json")}) == 2:
            raise KeyboardInterrupt

    started = []
    start = children.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "start", lambda *given: started.append(start(*given)) or started[-1])
        with pytest.raises(KeyboardInterrupt):
            run(Processes(workers=2), tasks, callback)
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    saved = tmp_path.glob("*/seeds-0/checkpoints/*/manifest.json")
    assert {path.relative_to(tmp_path).parts[0] for path in saved} == {"a", "b"}


def test_children_that_do_not_end_are_killed():
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    process = children.start(["-c", deaf])
    assert process.stdout.readline() == "1\n"
    with children.terminated_on_exit([process], grace=0.3):
        pass
    assert process.returncode == -signal.SIGKILL


def test_children_divide_the_gpus(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in children.shares(2)] == ["3,5", "6,7"]
    assert children.shares(1) == [children.Share()]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    shares = children.shares(4)
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in shares] == ["3", "5", "3", "5"]
    assert {share.environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] for share in shares} == {"0.450"}


def test_without_gpus_children_divide_the_cores(monkeypatch):
    monkeypatch.setattr(children, "cores", lambda: (1, 4, 5, 6, 7))
    assert children.shares(1) == [children.Share()]
    assert [share.cores for share in children.shares(2)] == [(1, 4), (5, 6)]
    assert [share.cores for share in children.shares(6)] == [()] * 6


@pytest.mark.skipif(not children.cores(), reason="the system does not say on which cores a process may run")
def test_a_child_runs_on_its_cores_alone():
    core = children.cores()[-1]
    asked = "import os, sys; sys.stdin.readline(); print(os.sched_getaffinity(0))"
    process = children.start(["-c", asked], children.Share(cores=(core,)))
    with children.terminated_on_exit([process]):
        assert process.communicate("\n", timeout=60)[0] == f"{{{core}}}\n"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Processes(workers=0), "Processes.workers is 0"),
        (lambda: Slurm(minutes=0), "Slurm.minutes is 0"),
        (lambda: Ray(cpus=0), "Ray.cpus is 0"),
        (lambda: Ray(retries=-1), "Ray.retries is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, text):
    with pytest.raises(SpecError, match=text):
        make()


@pytest.mark.slow
def test_slurm_trains_as_inline_though_one_job_is_killed(tmp_path, inline):
    pytest.importorskip("submitit")
    tasks = [task(tmp_path, "narrow", source=deadly(tmp_path / "marks")), task(tmp_path, "wide", width=32)]
    done = run(Slurm(cluster="local", retries=1), tasks)
    assert len(list((tmp_path / "marks").iterdir())) == 1
    assert {name: of_any_run(records) for name, records in done.items()} == inline


@pytest.mark.slow
def test_slurm_says_which_job_failed_and_why_a_task_did(tmp_path):
    pytest.importorskip("submitit")
    missing = TextFiles((str(tmp_path / "gone.txt"),))
    dies = task(tmp_path, "dies", source=deadly(tmp_path / "marks", times=9))
    done = run(Slurm(cluster="local", retries=1), [dies, task(tmp_path, "gone", source=missing)])
    assert done["gone"].final and "gone.txt" in done["gone"].message
    assert re.match(
        r"its job failed, 2 times, last \d+: RuntimeError: .* .* with code -9: see .*/slurm$", done["dies"].message
    )
    assert not done["dies"].final and len(list((tmp_path / "marks").iterdir())) == 2


@pytest.mark.parametrize(
    ("engine", "module", "extra"), [(Slurm(cluster="local"), "submitit", "slurm"), (Ray(), "ray", "ray")]
)
def test_an_engine_that_is_not_installed_names_its_extra(tmp_path, monkeypatch, engine, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install -e '.\[{extra}\]'"):
        run(engine, [finished_before(tmp_path, "a")])


@pytest.fixture
def cluster(monkeypatch):
    """Ray on this machine with two workers."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_ray_trains_as_inline_though_workers_are_killed_in_the_midst(tmp_path, inline, cluster):
    tasks = [
        task(tmp_path, "narrow"),
        task(tmp_path, "wide", width=32, source=deadly(tmp_path / "marks", times=2)),
        finished_before(tmp_path, "before"),
    ]
    told: list[Progress] = []
    done = run(Ray(retries=2), tasks, told.append)
    assert done.pop("before")[0] == {"of": "before", "seed": 0}
    assert len(list((tmp_path / "marks").iterdir())) == 2
    assert {name: of_any_run(records) for name, records in done.items()} == inline
    assert {progress.task for progress in told} <= {"narrow", "wide"}


@pytest.mark.slow
def test_ray_goes_on_from_what_a_killed_worker_saved(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(ray_engine, "EVERY", 0.1)
    made = task(tmp_path, "long", seeds=(0,), steps=1_000_000)
    before, after = [], []

    def callback(progress):
        if after or before and progress.step != before[-1]:
            after.append(progress.step)
            if progress.step > before[-1]:
                raise KeyboardInterrupt
        elif list(made.folder.glob("seeds-0/checkpoints/*/manifest.json")):
            before.append(progress.step)
            kill_the_worker()

    with pytest.raises(KeyboardInterrupt):
        run(Ray(retries=1), [made], callback)
    assert before[-1] > 10 and min(after) > 10  # one that begins anew notes its first step


def kill_the_worker():
    """The process that Ray named after the function which it runs."""
    running = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if b"ray::answer" in path.read_bytes()]
    assert len(running) == 1
    os.kill(int(running[0].name), signal.SIGKILL)


@pytest.mark.slow
def test_ray_refuses_what_no_node_has(tmp_path, cluster):
    with pytest.raises(
        UserError, match=r"a task requests 64 CPUs and 0 GPUs, but no node has that many \(the largest: 2"
    ):
        run(Ray(cpus=64), [finished_before(tmp_path, "a")])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
def test_a_worker_ends_with_the_process_that_started_it():
    child = (
        "import time; from polygpt.ablation.engines.worker import end_with_parent as e; e(); print(); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-uc', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    assert _runs(pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
