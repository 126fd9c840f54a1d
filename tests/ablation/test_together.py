"""All seeds in one program: equal to runs of their own, each by itself, and to the bit the same after a kill."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_runs import TEXT, Poisoned, experiment

from polygpt.ablation import memory, seeds
from polygpt.ablation.budget import costs
from polygpt.ablation.engines.base import Task
from polygpt.ablation.engines.worker import work
from polygpt.attention.sliding import SlidingWindow
from polygpt.data.loader import train_batches
from polygpt.evaluation import likelihood
from polygpt.evaluation.spec import EvalTask
from polygpt.runtime import manifest
from polygpt.training.experiment import Experiment
from polygpt.training.program import Program
from polygpt.training.spikes import SpikeSpec

pytestmark = pytest.mark.usefixtures("compiled_once")

SEEDS = (0, 3, 1000)
LONGER = EvalTask(TEXT.replace(bytes=80), limit=8, seq_len=96)
TASKS = {
    "text": EvalTask(TEXT, limit=8),
    "at_96": LONGER,
    "near": LONGER.replace(model={"decoder.attention": SlidingWindow(heads=2, window=4)}, last=20),
}
MADE = experiment(evaluation__tasks=TASKS)
VARYING = ("seconds", "how", "made")


def task(folder, made: Experiment, seeds=SEEDS) -> Task:
    return Task("tiny", tuple(made.replace(seed=seed) for seed in seeds), folder)


def run(folder, made: Experiment, seeds=SEEDS, callback=lambda progress: None) -> list[dict]:
    return json.loads(work(task(folder, made, seeds).to_json(), callback))


def lasting(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in VARYING} for record in records]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    told, folder = [], tmp_path_factory.mktemp("grouped")
    likelihood.token_scores.clear_cache()
    found = run(folder, MADE, callback=told.append)
    return SimpleNamespace(records=found, told=told, folder=folder, evaluations=likelihood.token_scores._cache_size())


def assert_near(one: dict, other: dict):
    """Two records of one run are equal to rounding."""
    for name in ("seed", "parameters", "flops", "tokens", "steps", "diverged"):
        assert one[name] == other[name], name
    assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-5)
    for curve in ("curve", "evaluations"):
        assert one[curve].keys() == other[curve].keys()
        for name, values in one[curve].items():
            np.testing.assert_allclose(values, other[curve][name], rtol=2e-5)  # curves are written with six digits


@pytest.mark.parametrize("index", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_seed_in_the_group_is_its_run_alone(grouped, tmp_path, index):
    records = grouped.records
    alone = seeds.alone(MADE.replace(seed=SEEDS[index]), tmp_path / "run")
    assert_near(records[index], alone)
    assert records[index]["how"] == "3 seeds in one program" and alone["how"] == "a run of its own"


def test_a_record_says_what_was_measured(grouped):
    records, told = grouped.records, grouped.told
    first = records[0]
    assert [record["seed"] for record in records] == list(SEEDS)
    assert first["curve"]["step"] == list(range(1, 13)) and first["evaluations"]["step"] == [5, 10, 12]
    assert first["metrics"]["train/loss"] == pytest.approx(first["curve"]["loss"][-1], rel=1e-5)
    assert first["metrics"]["text/loss"] == first["evaluations"]["text/loss"][-1] < first["evaluations"]["text/loss"][0]
    assert (first["steps"], first["tokens"], first["diverged"]) == (12, 12 * 4 * 48, False)
    losses = {tuple(record["curve"]["loss"]) for record in records}
    assert len(losses) == 3, "each seed has a run of its own"
    assert [(progress.step, progress.steps, progress.seeds) for progress in told] == [
        (n, 12, SEEDS) for n in range(1, 13)
    ]
    np.testing.assert_allclose([progress.losses[0] for progress in told], first["curve"]["loss"], rtol=1e-5)


def test_what_is_done_is_not_done_again(grouped):
    assert run(grouped.folder, MADE, callback=pytest.fail) == grouped.records


def test_evaluation_is_compiled_once_per_task_for_all_seeds(grouped):
    assert grouped.evaluations == len(TASKS)


def test_tasks_under_other_conditions_have_losses_of_their_own(grouped):
    names = [f"{task}/loss" for task in TASKS]
    assert len({record["metrics"][name] for record in grouped.records for name in names}) == len(names) * len(SEEDS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(ValueError, marks=pytest.mark.slow)])
def test_stopped_at_any_step_and_begun_again_it_gives_the_same_numbers(grouped, tmp_path, monkeypatch, error):
    monkeypatch.setattr(seeds, "EVERY_MINUTES", 1e-9)
    seen = []

    def stop(progress):
        seen.append(progress.step)
        if progress.step == 8:
            time.sleep(0.1)
            raise error

    with pytest.raises(error):
        run(tmp_path, MADE, callback=stop)
    monkeypatch.undo()
    again = []
    assert lasting(run(tmp_path, MADE, callback=lambda progress: again.append(progress.step))) == lasting(
        grouped.records
    )
    assert 1 < again[0] <= 8 and again[-1] == 12, "it went on from where it was"


@pytest.mark.parametrize("name", [manifest.NAME, "params"])
def test_checkpoints_that_cannot_be_read_are_made_anew(grouped, tmp_path, caplog, name):
    """Without a manifest they are incomplete; without parameters they are damaged."""
    folder = shutil.copytree(grouped.folder, tmp_path / "again")
    (folder / "seeds-0-1000" / seeds.RECORDS).unlink()
    for damaged in folder.glob(f"seeds-0-1000/checkpoints/*/{name}"):
        shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink()
    told = []
    assert lasting(run(folder, MADE, callback=lambda progress: told.append(progress.step))) == lasting(grouped.records)
    assert told == list(range(1, 13))
    assert "resuming" not in caplog.text and ("restarting training" in caplog.text) == (name == "params")


def test_a_signal_saves_and_the_same_task_goes_on(grouped, tmp_path):
    def interrupt(progress):
        if progress.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="saved"):
        run(tmp_path, MADE, callback=interrupt)
    again = []
    assert lasting(run(tmp_path, MADE, callback=lambda progress: again.append(progress.step))) == lasting(
        grouped.records
    )
    assert again[0] >= 7


@pytest.mark.slow
def test_a_seed_that_diverges_leaves_the_others_as_they_are(tmp_path):
    made = experiment(train__max_nonfinite=1, optim__accumulate=1)
    stream = train_batches(made.data, made.tokenizer.build(), {}, seed=3)
    poison = [int(next(stream).tokens_BT.sum()) for _ in range(7)][-1]
    poisoned = made.replace(objectives={"next_token": (Poisoned(sum=poison), 1.0)})
    first, ill, last = run(tmp_path / "together", poisoned)
    assert (ill["diverged"], ill["steps"], ill["curve"]["step"][-1], ill["curve"]["loss"][-1]) == (True, 7, 7, None)
    assert ill["evaluations"]["step"] == [5] and "text/loss" not in ill["metrics"]
    for well in (first, last):
        assert not well["diverged"] and well["steps"] == 12 and well["evaluations"]["step"] == [5, 10, 12]
    assert_near(last, seeds.alone(poisoned.replace(seed=1000), tmp_path / "1000"))
    alone = seeds.alone(poisoned.replace(seed=3), tmp_path / "3")
    assert (alone["diverged"], alone["steps"]) == (True, 7)
    np.testing.assert_allclose(alone["curve"]["loss"][:6], ill["curve"]["loss"][:6], rtol=1e-5)


@pytest.mark.slow
def test_all_that_diverge_end_at_once(tmp_path):
    told = []
    wild = experiment(optim__schedule__peak_lr=1e30, optim__clip=None, train__max_nonfinite=3, train__steps=40)
    records = run(tmp_path, wild, (0, 1), callback=lambda progress: told.append(progress.step))
    assert all(record["diverged"] for record in records) and told[-1] < 20


@pytest.mark.slow
def test_seeds_that_do_not_fit_together_are_trained_in_groups(grouped, tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "most", lambda experiment: 2)
    found = run(tmp_path, MADE)
    assert [record["how"] for record in found] == ["2 seeds in one program"] * 2 + ["1 seed in one program"]
    for one, other in zip(found, grouped.records, strict=True):
        assert_near(one, other)


@pytest.mark.slow
def test_a_group_that_exhausts_the_memory_is_halved_without_its_state(grouped, tmp_path, monkeypatch, request):
    """The error comes from the first step, when the state of all seeds is on the device."""
    real, held = Program.step.func, []
    gc.collect()
    request.addfinalizer(gc.enable)
    gc.disable()  # memory must be free at once

    def step(program):
        def exhausted(state, batch):
            held.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(state))
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

        if len(program.seeds) > 2:
            return exhausted
        assert held and not any(leaf() is not None for leaf in held), "the state that did not fit is still there"
        return real(program)

    monkeypatch.setattr(Program, "step", property(step))
    found = run(tmp_path, MADE)
    assert [record["how"] for record in found] == ["2 seeds in one program"] * 2 + ["1 seed in one program"]
    for one, other in zip(found, grouped.records, strict=True):
        assert_near(one, other)


def test_the_memory_decides_how_many(monkeypatch):
    made = experiment()
    state = 3 * 4 * 16 * 258  # Adam's moments and the moving average beside the parameters, of the table alone
    monkeypatch.setattr(memory.automatic, "memory_of_all", lambda: 2**34)
    assert memory.most(made) > 1000
    monkeypatch.setattr(memory.automatic, "memory_of_all", lambda: state)
    assert memory.most(made) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"train__parallel": "sharded"}, "train.parallel is 'sharded'"),
        ({"train__patience": 2}, "train.patience ends"),
        ({"train__spikes": SpikeSpec()}, None),
        ({"train__spikes": SpikeSpec(action="rewind")}, "rewind independently"),
    ],
)
def test_what_cannot_be_trained_together_has_a_reason(changes, reason):
    found = seeds.reason_against(experiment(**changes))
    assert found is None if reason is None else reason in found


def test_of_several_devices_one_trains_all_seeds_where_they_fit(monkeypatch):
    monkeypatch.setattr(seeds.jax, "device_count", lambda: 8)
    assert seeds.reason_against(experiment()) is None
    monkeypatch.setattr(memory.automatic, "memory_of_all", lambda: 100)
    assert "more than one device's memory" in seeds.reason_against(experiment())


KILLED = """
import sys, time
from polygpt.ablation import seeds
from polygpt.ablation.engines import worker
from polygpt.ablation.engines.base import Task
seeds.EVERY_MINUTES = 1 / 300
text = sys.stdin.read()
note = worker._Notes(Task.from_json(text))
def slowly(progress):
    note(progress)
    time.sleep(0.02)
print(worker.work(text, slowly))
"""


@pytest.mark.slow
def test_killed_twice_and_begun_again_equals_never_killed_to_the_bit(tmp_path):
    made = experiment(train__steps=150, train__evaluate_every=40)
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}

    def start(name):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED], stdin=-1, stdout=-1, stderr=-1, text=True, env=os.environ | paths
        )
        process.stdin.write(task(tmp_path / name, made).to_json())
        process.stdin.close()
        process.stdin = None
        return process

    def finish(process):
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        return lasting(json.loads(output)), errors

    whole, _ = finish(start("whole"))
    checkpoints = tmp_path / "killed" / "seeds-0-1000" / "checkpoints"
    for least in (10, 60):
        process, deadline = start("killed"), time.monotonic() + 300
        while (progress := task(tmp_path / "killed", made).progress()) is None or progress.step < least:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert manifest.records(checkpoints)
    found, errors = finish(start("killed"))
    assert found == whole
    assert "resuming at step" in errors


@pytest.mark.slow
def test_together_takes_less_time_than_one_after_the_other(tmp_path, capsys):
    """Measured by the processor's time, which does not count what else the machine is at."""
    made = experiment(train__steps=200, train__evaluate_every=None, data__batch_size=8)
    five = range(5)

    def times(function):
        """Of the whole, and of all steps but the first ten."""
        begin, marks = time.process_time(), {}
        function(lambda progress: marks.setdefault((progress.seeds, progress.step), time.process_time()))
        steps = sum(marks[some, 200] - marks[some, 10] for some, step in marks if step == 200)
        return time.process_time() - begin, steps

    jax.config.update("jax_enable_compilation_cache", False)
    try:
        whole, steps = times(lambda callback: run(tmp_path / "together", made, five, callback))
        apart = [
            times(lambda callback, seed=seed: seeds.alone(made.replace(seed=seed), tmp_path / str(seed), callback))
            for seed in five
        ]
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    apart_whole, apart_steps = (sum(times) for times in zip(*apart, strict=True))
    with capsys.disabled():
        print(
            f"\n5 seeds, together: apart: with compilation {whole:.1f} s : {apart_whole:.1f} s = "
            f"{whole / apart_whole:.2f}, steps alone {steps:.2f} s : {apart_steps:.2f} s = {steps / apart_steps:.2f}"
        )
    assert whole < 0.8 * apart_whole


@pytest.mark.parametrize(("dtype", "bytes_per"), [("float32", 2), ("bfloat16", 1)])
@pytest.mark.parametrize("count", [1, 3])
def test_as_many_seeds_are_trained_together_as_fit_by_the_estimate(monkeypatch, dtype, bytes_per, count):
    """Korthikanti et al., eq. 1: a layer keeps T B D (34 + 5 H T / D) bytes at 16 bits; D 64, H 2, T 48, B 4 / 2."""
    made = experiment(model__decoder__width=64, model__decoder__depth=3, model__dtype=dtype)
    layers = 3 * 48 * 2 * (34 * 64 + 5 * 2 * 48) * bytes_per
    logits = 48 * 2 * 3 * 4 * made.tokenizer.build().vocabulary
    parameters = costs(made).parameters * 4
    state = 4 * parameters  # parameters, two moments and the moving average
    each = state + 2 * parameters + layers + logits

    def fitted(share):
        monkeypatch.setattr(memory.automatic, "memory_of_all", lambda: share * each / memory.automatic.SPLIT)
        return memory.most(made)

    assert fitted(count + 0.02) == count and fitted(count - 0.02) == max(1, count - 1)
