"""`polygpt launch local`: processes find their places, are heard and end together; scripts stand in for the command."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from polygpt.cli.main import main
from polygpt.errors import UserError
from polygpt.scale.launch import local

PLACE = """
import os, sys
print(os.environ["POLYGPT_PROCESS"], os.environ["POLYGPT_PROCESSES"], os.environ["POLYGPT_COORDINATOR"],
      os.environ["JAX_NUM_CPU_DEVICES"], os.environ["CUDA_VISIBLE_DEVICES"], sys.argv[1:])
"""
ONE_ENDS = """
import os, signal, sys, time
if os.environ["POLYGPT_PROCESS"] == sys.argv[1]:
    print("polygpt: process", sys.argv[1], "says why", file=sys.stderr, flush=True)
    os.kill(os.getpid(), int(sys.argv[2])) if int(sys.argv[2]) != 2 else sys.exit(2)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
time.sleep(60)
"""
LEAVES_WORD = """
import os, pathlib, signal, sys, time
def end(*_):
    pathlib.Path("ended " + os.environ["POLYGPT_PROCESS"]).write_text("")
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
print("x" * 100000, flush=True)  # more than a pipe takes
pathlib.Path("ready " + os.environ["POLYGPT_PROCESS"]).write_text("")
time.sleep(60)
"""
LAUNCHER = f"""
import pathlib, sys
from polygpt.scale.launch import local
sys.exit(local.run([], 2, 1, pathlib.Path("logs"), 20, [sys.executable, "-c", {LEAVES_WORD!r}]).exit_codes != (1, 1))
"""
DEAF = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: print('heard', flush=True)); time.sleep(60)"


def launch(code, words, count, folder, grace=0.2, devices=1):
    return local.run(words, count, devices, folder, grace, [sys.executable, "-c", code])


def test_each_process_knows_its_place_and_writes_its_log(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    outcome = launch(PLACE, ["train", "x.py"], 2, tmp_path / "logs", devices=2)
    assert outcome == local.LaunchResult((0, 0), None, False)
    told = [(tmp_path / "logs" / f"p{rank}.log").read_text().splitlines() for rank in range(2)]
    for rank, (head, line) in enumerate(told):
        assert head.startswith("--- ") and head.endswith(": train x.py")
        here, count, coordinator, devices, gpus, *words = line.removeprefix(f"[p{rank}] ").split(maxsplit=5)
        assert (here, count, devices, gpus) == (str(rank), "2", "2", ("4,5", "6,7")[rank])
        assert words == ["['train', 'x.py']"] and coordinator.startswith("127.0.0.1:")
        assert coordinator in told[0][1]
    assert capfd.readouterr().out == told[0][1].removeprefix("[p0] ") + "\n"  # process 0 alone is heard here


@pytest.mark.parametrize(("how", "text"), [(9, "was killed by SIGKILL"), (2, "exited with code 2")])
def test_one_that_fails_is_named_and_the_others_are_ended(tmp_path, capfd, how, text):
    begun = time.monotonic()
    outcome = launch(ONE_ENDS, ["1", str(how)], 3, tmp_path)
    assert time.monotonic() - begun < 20
    assert outcome.cause == f"process 1 {text}" and outcome.exit_codes[1] in (-9, 2) and all(outcome.exit_codes)
    said = capfd.readouterr().err
    assert (f"process 1 {text}: the others have 0 s to exit" in said) == (
        how == 9
    )  # the user's fault it has said itself
    assert "[p1] polygpt: process 1 says why" in said and "SIGTERM to process 0, 2" in said


SAME_FAULT = """
import os, sys, time
rank = int(os.environ["POLYGPT_PROCESS"])
print("polygpt: ", "process 1: " if rank == 2 else "", "train.mesh.tensor 3: choose 2", sep="", file=sys.stderr)
print("polygpt: of", rank, "alone", os.environ["POLYGPT_GRACE"], file=sys.stderr)
time.sleep(0.5)
sys.exit(2)
"""


def test_what_all_processes_say_is_heard_once(tmp_path, capfd):
    assert launch(SAME_FAULT, [], 3, tmp_path, grace=7).exit_codes == (2, 2, 2)
    lines = capfd.readouterr().err.splitlines()
    (fault,) = (line for line in lines if line.endswith("train.mesh.tensor 3: choose 2"))
    assert fault.removeprefix("[p1] ") == "polygpt: train.mesh.tensor 3: choose 2" and len(lines) == 4
    assert all("tensor 3: choose 2" in (tmp_path / f"p{rank}.log").read_text() for rank in range(3))
    assert {"polygpt: of 0 alone 7", "[p1] polygpt: of 1 alone 7", "[p2] polygpt: of 2 alone 7"} < set(lines)


HEARS = """
import os, signal, sys, time
rank = int(os.environ["POLYGPT_PROCESS"])
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(7 if open(int(os.environ["POLYGPT_REPORTS"])).readline() == "1 -9 was killed by SIGKILL\\n" else 8)
"""


def test_survivors_are_told_at_once_who_died(tmp_path):
    begun = time.monotonic()
    outcome = launch(HEARS, [], 3, tmp_path, grace=60)
    assert outcome.exit_codes == (7, -9, 7) and outcome.cause == "process 1 was killed by SIGKILL"
    assert time.monotonic() - begun < 30  # neither waits for the grace period to pass


ONE_STOPS_FIRST = """
import os, select, signal, sys, time
rank = int(os.environ["POLYGPT_PROCESS"])
def end(*_):
    if rank == 1:
        sys.exit(1)
    sys.exit(8 if select.select([int(os.environ["POLYGPT_REPORTS"])], [], [], 0.3)[0] else 1)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


def test_processes_that_were_asked_to_stop_are_not_reported(tmp_path):
    stop_when_ready(tmp_path)
    assert launch(ONE_STOPS_FIRST, [], 2, tmp_path, grace=20).exit_codes == (1, 1)


def test_one_that_does_not_listen_is_killed_in_the_end(tmp_path, capfd):
    code = f"""
import os, pathlib, signal, sys, time
ready = pathlib.Path({str(tmp_path / "ready")!r})
while os.environ["POLYGPT_PROCESS"] == "1":  # fails once the other has stopped listening
    if ready.exists():
        sys.exit(3)
    time.sleep(0.01)
signal.signal(signal.SIGTERM, lambda *_: None)
ready.touch()
time.sleep(60)
"""
    outcome = launch(code, [], 2, tmp_path)
    assert outcome.exit_codes == (-9, 3) and outcome.cause == "process 1 exited with code 3"
    assert "SIGKILL to process 0" in capfd.readouterr().err


def stop_when_ready(folder):
    """Sends SIGTERM to this process once two processes have logged "ready"."""

    def is_ready(rank: int) -> bool:
        log = folder / f"p{rank}.log"
        return log.exists() and b"ready" in log.read_bytes()

    def stop():
        while not (is_ready(0) and is_ready(1)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()


def test_a_signal_is_passed_on(tmp_path, capfd):
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); "
    code += "print('ready'); time.sleep(60)"
    stop_when_ready(tmp_path)
    outcome = launch(code, [], 2, tmp_path, grace=20)
    assert outcome.exit_codes == (1, 1) and outcome.stopped and capfd.readouterr().err == ""


def launcher(folder, before=None):
    """A launcher of two processes that wait; gives it when they do."""
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=folder, stdout=subprocess.PIPE, preexec_fn=before)
    process.stdout.close()  # as the terminal does that is closed
    wait_for(folder / "ready 0", folder / "ready 1")
    return process


def wait_for(*paths):
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a signal")
def test_a_launcher_that_is_killed_leaves_no_process_behind(tmp_path):
    process = launcher(tmp_path)
    process.kill()
    process.wait()
    wait_for(tmp_path / "ended 0", tmp_path / "ended 1")


def test_a_launcher_whose_terminal_is_closed_lets_the_processes_save(tmp_path):
    process = launcher(tmp_path, lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 0
    wait_for(tmp_path / "ended 0", tmp_path / "ended 1")


def test_nohup_is_respected(tmp_path):
    process = launcher(tmp_path, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None and not (tmp_path / "ended 0").exists()
    process.terminate()
    assert process.wait(20) == 0


def test_if_one_cannot_be_started_the_others_are_ended(tmp_path, monkeypatch):
    popen, started = subprocess.Popen, []

    def scarce(*words, **more):
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(popen(*words, **more))
        return started[0]

    monkeypatch.setattr(local.subprocess, "Popen", scarce)
    with pytest.raises(UserError, match="process 1 cannot be started: Resource temporarily unavailable"):
        launch("import time; time.sleep(60)", [], 2, tmp_path)
    assert started[0].wait(10) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["0,1", "2,3"]),
        ("4,5,6,7", ["4,5", "6,7"]),
        ("", ["", ""]),
        ("-1", ["", ""]),
        ("GPU-a,GPU-b,1,0,-1,2", 0),
    ],
)
def test_visible_gpus_are_divided(monkeypatch, given, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert [local.gpus(rank, 2, 2) for rank in range(2)] == (expected or ["GPU-a,GPU-b", "1,0"])


def test_gpus_that_are_not_there_are_not_given(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(UserError, match="4 processes with 1 GPUs each need 4, but CUDA_VISIBLE_DEVICES is '2,3'"):
        launch(PLACE, [], 4, tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert local.gpus(3, 4, 1) == ""


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-n", "2"], "nothing follows the --"),
        (["-n", "2", "--", "evaluate", "runs/x"], "'evaluate' follows the --"),
        (["--", "train", "x.py"], "required: -n"),
        (["-n", "0", "--", "train", "x.py"], "'0' is not a positive integer"),
        (["-n", "2", "--proceses", "3", "--", "train", "x.py"], "did you mean --processes"),
        (["-n", "2", "--", "train", "missing.py"], "missing.py"),
    ],
)
def test_faults_are_told_in_one_line(capsys, words, text):
    assert main(["launch", "local", *words]) == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1


def test_logs_that_cannot_be_written_are_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["launch", "local", "-n", "2", "--logs", str(tmp_path / "file" / "logs"), "--", "train", "x.py"]) == 2
    assert "choose another --logs" in capsys.readouterr().err
