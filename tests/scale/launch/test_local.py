"""`polygpt launch local`: processes find their places, are heard and end together; scripts stand in for the command."""

import os
import signal
import sys
import threading
import time

import pytest

from polygpt.cli.main import main
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
DEAF = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: print('heard', flush=True)); time.sleep(60)"


def launch(code, words, count, folder, grace=0.2, devices=1):
    return local.run(words, count, devices, folder, grace, [sys.executable, "-c", code])


def test_each_process_knows_its_place_and_writes_its_log(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    outcome = launch(PLACE, ["train", "x.py"], 2, tmp_path / "logs", devices=2)
    assert outcome == local.Outcome((0, 0), None, False)
    told = [(tmp_path / "logs" / f"p{rank}.log").read_text().splitlines() for rank in range(2)]
    for rank, (head, line) in enumerate(told):
        assert head.startswith("--- ") and head.endswith(": train x.py")
        here, count, coordinator, devices, gpus, *words = line.removeprefix(f"[p{rank}] ").split(maxsplit=5)
        assert (here, count, devices, gpus) == (str(rank), "2", "2", ("4,5", "6,7")[rank])
        assert words == ["['train', 'x.py']"] and coordinator.startswith("127.0.0.1:")
        assert coordinator in told[0][1]
    assert capfd.readouterr().out == told[0][1].removeprefix("[p0] ") + "\n"  # process 0 alone is heard here


@pytest.mark.parametrize(("how", "text"), [(9, "was killed by SIGKILL"), (2, "ended with code 2")])
def test_one_that_fails_is_named_and_the_others_are_ended(tmp_path, capfd, how, text):
    begun = time.monotonic()
    outcome = launch(ONE_ENDS, ["1", str(how)], 3, tmp_path)
    assert time.monotonic() - begun < 20
    assert outcome.cause == f"process 1 {text}" and outcome.codes[1] in (-9, 2) and all(outcome.codes)
    said = capfd.readouterr().err
    assert f"process 1 {text}: the others have 0 s to end" in said
    assert "[p1] polygpt: process 1 says why" in said and "SIGTERM to process 0, 2" in said


def test_one_that_does_not_listen_is_killed_in_the_end(tmp_path, capfd):
    code = f"import os, sys\nif os.environ['POLYGPT_PROCESS'] == '1': sys.exit(3)\n{DEAF}"
    outcome = launch(code, [], 2, tmp_path)
    assert outcome.codes == (-9, 3) and outcome.cause == "process 1 ended with code 3"
    assert "SIGKILL to process 0" in capfd.readouterr().err


def test_a_signal_is_passed_on(tmp_path, capfd):
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); print(1); time.sleep(60)"

    def stop():
        while not (tmp_path / "p1.log").exists() or b"[p1] 1" not in (tmp_path / "p1.log").read_bytes():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    outcome = launch(code, [], 2, tmp_path, grace=20)
    assert outcome.codes == (1, 1) and outcome.ours and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-n", "2"], "nothing follows the --"),
        (["-n", "2", "--", "evaluate", "runs/x"], "'evaluate' follows the --"),
        (["--", "train", "x.py"], "required: -n"),
        (["-n", "0", "--", "train", "x.py"], "'0' is no number from 1 on"),
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
