"""`polygpt launch slurm`: tasks find each other and are queued again; on submitit's own executor for one machine."""

import os
import re
import signal
import subprocess
import sys
from unittest import mock

import pytest

from polygpt.cli.main import main
from polygpt.errors import UserError
from polygpt.scale.launch import slurm

submitit = pytest.importorskip("submitit")

PLACE = """
import os, sys
print("at", *(os.environ["POLYGPT_" + name] for name in ("COORDINATOR", "PROCESSES", "PROCESS")), sys.argv[1:])
sys.exit(int(os.environ["POLYGPT_PROCESS"]) if "fail" in sys.argv else 0)
"""
SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(1)))
print("ready", flush=True)
time.sleep(60)
"""


PREEMPTED = f"""
import os, signal, sys
import submitit
from polygpt.scale.launch import slurm
task = slurm.Task(["train", "x.py"], [sys.executable, "-c", {SAVES!r}])
def handle(*_):  # as submitit's does, in the main thread
    again = task.checkpoint()
    print("queued again", again.function == slurm.Task(task.command, task.program), flush=True)
    os._exit(0)
signal.signal(signal.SIGUSR2, handle)
task()
"""


def submit(words, folder):
    task = slurm.Task(words, [sys.executable, "-c", PLACE])
    return slurm.submit(task, folder, "local", tasks=2, minutes=5, more={"cpus_per_task": 1})


def test_each_task_knows_its_place(tmp_path):
    job = submit(["train", "x.py"], tmp_path)
    assert job.results() == [0, 0]
    found = {}
    for rank in range(2):
        text = (tmp_path / f"{job.job_id}_{rank}_log.out").read_text()
        coordinator, count, number, words = re.search(r"^at (\S+) (\d) (\d) (.*)$", text, re.MULTILINE).groups()
        found[int(number)] = (coordinator, count, words)
    assert set(found) == {0, 1} and found[0] == found[1]
    host, port = found[0][0].rsplit(":", 1)
    assert host and 61440 <= int(port) < 65536 and found[0][1:] == ("2", "['train', 'x.py']")


def test_a_task_that_fails_is_a_job_that_failed(tmp_path):
    job = submit(["fail"], tmp_path)
    with pytest.raises(submitit.core.utils.UncompletedJobError, match="process 1 on .* ended with code 1"):
        job.results()


def test_before_its_time_is_up_the_run_saves_and_the_same_is_queued_again():
    here = os.environ | {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "7"}
    process = subprocess.Popen([sys.executable, "-c", PREEMPTED], env=here, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR2)  # while the task waits for its process
        assert process.communicate(timeout=20)[0] == "saved\nqueued again True\n" and process.returncode == 0
    finally:
        process.kill()


@pytest.mark.parametrize("name", ["gpus_per_node", "slurm_gpus_per_node"])
def test_tasks_of_a_node_divide_its_gpus(tmp_path, monkeypatch, capfd, name):
    submitted = []
    monkeypatch.setattr(submitit, "AutoExecutor", lambda *_, **__: mock.Mock(submit=submitted.append))
    task = slurm.Task([], [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"])
    slurm.submit(task, tmp_path, nodes=2, tasks=2, more={name: 4})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")  # as SLURM sets it on each node
    for rank in range(4):
        here = mock.Mock(hostnames=["a", "b"], job_id="7", num_tasks=4, num_nodes=2, global_rank=rank)
        here.local_rank = rank % 2
        monkeypatch.setattr(submitit, "JobEnvironment", lambda here=here: here)
        assert submitted[0]() == 0
    assert capfd.readouterr().out.split() == ["4,5", "6,7", "4,5", "6,7"]


def test_the_first_task_to_end_does_not_end_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")  # as where SLURM is
    made = slurm.executor(tmp_path, "slurm", "name", 2, 1, 5, {})
    assert "srun --unbuffered" in (text := made._executor._make_submission_file_text("command", "7"))
    assert "--kill-on-bad-exit=0" in text


def test_a_job_is_queued_again_however_often_its_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")  # as where SLURM is
    assert slurm.executor(tmp_path, "slurm", "name", 2, 1, 5, {})._executor.max_num_timeout >= 1000
    bounded = slurm.executor(tmp_path, "slurm", "name", 2, 1, 5, {"slurm_max_num_timeout": 3})
    assert bounded._executor.max_num_timeout == 3


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--set", "cpus", "--"], "--set cpus: write NAME=VALUE"),
        (["--"], "are you indeed on a slurm cluster?: submit from a login node, or try it here with --cluster local"),
        (
            ["--cluster", "local", "--nodes", "2", "--"],
            "the job was not submitted: LocalExecutor can use only one node. Use nodes=1: with --cluster local, leave",
        ),
        (["--cluster", "local", "--set", "local_nonsense=1", "--"], "the job was not submitted"),
        (["--tasks", "3", "--gpus", "8", "--"], "8 GPUs cannot be divided among 3 tasks of a node"),
        ([], "nothing follows the --"),
    ],
)
def test_faults_are_told_in_one_line(tmp_path, capsys, words, text):
    folder = ["--folder", str(tmp_path)]
    assert main(["launch", "slurm", *folder, *words, *(["train", "x.py"] if "--" in words else [])]) == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1


def test_without_submitit_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[slurm\]'"):
        slurm.submit(slurm.Task(["train", "x.py"]), tmp_path)


FAILED = """Job (task=1) failed during processing with trace:
----------------------
Traceback (most recent call last):
  File "slurm.py", line 55, in __call__
    raise RuntimeError(f"process {rank} on {host} ended with code {code}")
{error}
----------------------
You can check full logs with 'job.stderr(1)' and 'job.stdout(1)'or at paths:
  - 7_1_log.err"""


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (FAILED.replace("{error}", "RuntimeError: process 1 on b ended with code 9"), "RuntimeError: process 1 on b "),
        (FAILED.replace("{error}", "subprocess.TimeoutExpiredError: late"), "subprocess.TimeoutExpiredError: late"),
        ("Job 7 (task: 0) has not produced any output (state: NODE_FAIL)\n\nLook at stdout: 7", "Job 7 (task: 0) has"),
        ("", "RuntimeError"),
    ],
)
def test_why_a_job_failed_is_one_line_of_what_submitit_says(said, why):
    found = slurm.reason(RuntimeError(said))
    assert found.startswith(why) and "\n" not in found


def test_a_job_that_is_waited_for_and_fails_says_why(tmp_path, capsys, monkeypatch):
    error = submitit.core.utils.FailedJobError(FAILED.replace("{error}", "RuntimeError: process 1 on b ended: 9"))
    job = mock.Mock(job_id="7", _sub_jobs=[mock.Mock(exception=lambda: None), mock.Mock(exception=lambda: error)])
    monkeypatch.setattr(slurm, "submit", lambda *_: job)
    words = ["launch", "slurm", "--wait", "--folder", str(tmp_path), "--", "train", "x.py"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said == f"polygpt: job 7: RuntimeError: process 1 on b ended: 9: see {tmp_path}\n"
