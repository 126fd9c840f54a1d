"""Each verb on a real run: what it prints, what it writes, what its JSON holds."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from own_experiment import write_experiment
from polygpt.cli.generate import printable
from polygpt.evaluation import evaluate
from polygpt.generation import generate as generation
from polygpt.spec import field_help
from polygpt.training import loop, phases
from polygpt.training.experiment import TrainSpec
from polygpt.training.program import assemble

pytestmark = pytest.mark.usefixtures("compiled_once")
POLYGPT = str(Path(sys.executable).with_name("polygpt"))


def test_train_evaluates_and_reports(trained):
    assert trained.code == 0
    assert trained.out.count("\n") == 1, "one JSON object and nothing else"
    done = json.loads(trained.out)
    assert done["step"] == 3 and done["tasks"]["own"]["n"] == 7
    assert set(done["modality_gain"]) == {"own/image", "own/audio"}
    assert all({"gain", "low", "high"} <= set(gain) for gain in done["modality_gain"].values())
    assert Path(done["workdir"]) == Path("runs/own") and (trained.run / "report.html").stat().st_size > 10_000
    assert json.loads((trained.run / "evaluation.json").read_text())["tasks"] == done["tasks"]
    assert "Held out, step 3" in trained.err and "report: runs/own/report.html" in trained.err
    assert trained.err.split("try next:")[1].count("polygpt ") == 3
    assert "Traceback" not in trained.err and "Warning" not in trained.err


def test_train_again_goes_on_where_it_was(trained, polygpt, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    words = ["train", trained.file, "--workdir", run, "--train.steps=4", "--no-report", "--json"]
    code, out, err = polygpt(*words)
    assert code == 0, err
    assert json.loads(out) == {"step": 4, "workdir": str(run)}
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in steps if step > 3] == [4]


def test_a_finished_run_is_neither_trained_nor_evaluated_again(trained, polygpt, tmp_path, monkeypatch):
    run = shutil.copytree(trained.run, tmp_path / "run")
    monkeypatch.setattr(evaluate, "score", None)
    code, out, err = polygpt("train", trained.file, "--workdir", run, "--json")
    assert code == 0, err
    assert json.loads(out)["tasks"] == json.loads(trained.out)["tasks"]
    assert "finished at step 3: polygpt evaluate" in err


def test_an_interrupted_run_is_code_1_so_that_nothing_follows_it(trained, polygpt, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_, **__: loop.TrainResult(2, finished=False, skipped={}))
    code, out, err = polygpt("train", trained.file, "--workdir", tmp_path / "run", "--json")
    assert (code, err) == (1, "polygpt: interrupted at step 2, saved: the same command resumes\n")
    assert json.loads(out)["step"] == 2 and "interrupted at step 2" in json.loads(out)["interrupted"]


def test_sigterm_during_the_start_ends_with_one_line_and_code_1(tmp_path):
    file = tmp_path / "starts.py"
    file.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    done = subprocess.run([POLYGPT, "train", file], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and re.fullmatch(r"polygpt: interrupted by SIGTERM: .*resumes\n", done.stderr)
    assert os.listdir(tmp_path) == ["starts.py"]


def test_sigterm_before_the_first_step_ends_without_waiting_for_data(trained, polygpt, tmp_path, monkeypatch):
    started = []

    def assembled(*given, **named):
        started.append(os.kill(os.getpid(), signal.SIGTERM))
        return assemble(*given, **named)

    monkeypatch.setattr(phases, "assemble", assembled)
    code, _, err = polygpt("train", trained.file, "--workdir", tmp_path / "run", "--no-report")
    assert code == 1 and err.endswith("polygpt: interrupted before the first step: the same command resumes\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and "Traceback" not in err


def test_a_signal_ends_the_last_evaluation_and_the_same_command_goes_on(trained, polygpt, tmp_path, monkeypatch):
    run = shutil.copytree(trained.run, tmp_path / "run")
    (run / "evaluation.json").unlink()
    batches, real = [], evaluate.score

    def score(*given):
        batches.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(evaluate, "score", score)
    words = ["train", trained.file, "--workdir", run, "--json"]
    code, out, err = polygpt(*words)
    assert (code, len(batches)) == (1, 1) and "SIGTERM: stopping after this evaluation batch\n" in err
    assert err.endswith("polygpt: interrupted in the final evaluation, all steps are saved: the same command resumes\n")
    assert not (run / "evaluation.json").exists()
    monkeypatch.undo()
    monkeypatch.chdir(trained.file.parent)
    assert polygpt(*words)[0] == 0 and (run / "evaluation.json").exists()


def test_train_refuses_another_experiment_in_the_same_folder(trained, polygpt):
    before = (trained.run / "config.json").read_bytes()
    code, out, err = polygpt("train", trained.file, "--workdir", trained.run, "--seed", "5")
    assert (code, out) == (2, "") and "seed is 0 there, 5 here" in err.splitlines()[-1]
    assert (trained.run / "config.json").read_bytes() == before


def test_train_help_lists_every_field_with_overrides(trained, polygpt):
    code, out, _ = polygpt("train", trained.file, "--help", "--model.decoder.width", "32")
    assert code == 0
    for name, value in [("train.steps", "3"), ("model.decoder.width", "32"), ("data.tasks.own.weight", "1.0")]:
        assert re.search(rf"^  --{re.escape(name)} {value}$", out, re.M), name
    assert re.search(r"--objectives\.next_token\.1 1\.0$", out, re.M)
    assert " ".join(field_help(TrainSpec)["steps"].split()) in " ".join(out.split()), "what the field's docstring says"
    assert re.search(r"'interleaved',\s+'prefix'", out)
    assert "every field that can be set" in " ".join(polygpt("train", "--help")[1].lower().split())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\n", "no function experiment()"),
        ("def experiment():\n    return 3\n", r"experiment\(\) returned int: it must return an Experiment"),
        ("def experiment(:\n", "line 1: SyntaxError"),
        ("import nowhere_at_all\n", "line 1: ModuleNotFoundError"),
        (
            "def experiment():\n    rows = 'eight'\n    return rows + 8\n",
            'line 3: TypeError: can only concatenate str (not "int") to str',
        ),
        ("def experiment(rows):\n    return rows\n", "TypeError: experiment() missing 1 required positional argument"),
    ],
)
def test_a_file_that_makes_no_experiment(polygpt, tmp_path, source, expected):
    file = tmp_path / "faulty.py"
    file.write_text(source)
    code, out, err = polygpt("train", file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(expected if "\\" in expected else re.escape(expected), err) and str(file) in err


@pytest.mark.slow
def test_evaluate_prints_one_json_object_as_a_process(trained):
    words = [POLYGPT, "evaluate", str(trained.run), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"] == json.loads(trained.out)["tasks"], "evaluation repeats itself"
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr


def test_evaluate_prints_tables(trained, polygpt):
    code, out, _ = polygpt("evaluate", trained.run, "--checkpoint", "latest")
    assert code == 0
    assert re.search(r"own +\d+\.\d{3}", out) and re.search(r"own/image +[+-]\d\.\d{3}", out)


def test_a_trained_run_is_evaluated_with_other_settings(trained, polygpt, tmp_path):
    """And `train` does not take the results for those that its experiment asks for."""
    run = shutil.copytree(trained.run, tmp_path / "run")
    words = ["--evaluation.tasks.own.limit", "3", "--evaluation.tasks.own.generate=false", "--json"]
    code, out, err = polygpt("evaluate", run, *words)
    assert code == 0, err
    found = json.loads((run / "evaluation.json").read_text())
    assert json.loads(out) == found and found["overrides"]["evaluation.tasks.own.limit"] == "3"
    assert found["tasks"]["own"]["n"] == 3 and "accuracy" not in found["tasks"]["own"]
    code, out, _ = polygpt("train", trained.file, "--workdir", run, "--json")
    assert code == 0 and json.loads(out)["tasks"] == json.loads(trained.out)["tasks"]
    assert "overrides" not in json.loads((run / "evaluation.json").read_text())


def test_what_a_run_was_trained_by_cannot_be_changed_to_evaluate_it(trained, polygpt):
    before = (trained.run / "evaluation.json").read_bytes()
    code, _, err = polygpt("evaluate", trained.run, "--train.steps", "7")
    assert code == 2 and "--train.steps cannot change" in err
    code, _, err = polygpt("evaluate", trained.run, "--evaluation.tasks.own.limt", "7")
    assert code == 2 and "did you mean limit" in err
    assert (trained.run / "evaluation.json").read_bytes() == before
    code, out, _ = polygpt("evaluate", trained.run, "--help")
    assert code == 0 and "--evaluation.tasks.own.limit" in out and "--data.layout" in out and "--train" not in out


def test_one_bad_task_leaves_the_others_results_and_is_code_2(trained, polygpt, tmp_path):
    run, bad = shutil.copytree(trained.run, tmp_path / "run"), tmp_path / "bad"
    bad.mkdir()
    (bad / "metadata.jsonl").write_text('{"text": "nothing to see"}\n')
    config = json.loads((run / "config.json").read_text())
    tasks = config["evaluation"]["tasks"]
    tasks["bad"] = tasks["own"] | {"source": tasks["own"]["source"] | {"path": str(bad)}}
    (run / "config.json").write_text(json.dumps(config))
    code, out, err = polygpt("evaluate", run)
    assert code == 2 and "not measured in full: bad" in err and "metadata.jsonl" in out and "has no prompt" in out
    found = json.loads((run / "evaluation.json").read_text())
    assert found["tasks"]["own"] == json.loads(trained.out)["tasks"]["own"] and list(found["faults"]) == ["bad"]
    code, out, err = polygpt("evaluate", run, "--evaluation.tasks.bad.generate", "false", "--json")
    assert code == 0 and set(json.loads(out)["tasks"]) == {"own", "bad"}, err


def test_generate_reads_the_parts_in_their_order(trained, polygpt):
    data = trained.file.parent / "data"
    words = ["--text", "it ", "--image", data / "red.png", "--text=is ", "--audio", data / "400.wav", "--json"]
    code, out, err = polygpt("generate", trained.run, *words, "--temperature", "0", "--max_tokens", "5")
    assert code == 0, err
    done = json.loads(out)
    kinds = [next(iter(part)) for part in done["prompt"]]
    assert kinds == ["text", "image", "text", "audio"] and done["prompt"][2] == {"text": "is "}
    assert done["tokens"] <= 5 and done["finish"] in ("eos", "length") and done["step"] == 3
    code, out, _ = polygpt("generate", trained.run, *words[:-1], "--temperature", "0", "--max_tokens", "5")
    assert code == 0 and out == printable(done["text"]) + "\n", "streamed, the same text"


def test_control_characters_are_printed_as_escapes_and_kept_in_json(trained, polygpt, monkeypatch):
    written = "a\tb\n\x1b[2J\x07\r\x9bé\ufffd"
    monkeypatch.setattr(generation, "_read", lambda *_: generation.Generated(written, (), "eos"))
    words = ["generate", trained.run, "--text", "a", "--max_tokens", "4"]
    assert polygpt(*words)[1] == "a\tb\n\\x1b[2J\\x07\\r\\x9bé\ufffd\n"
    assert json.loads(polygpt(*words, "--json")[1])["text"] == written


def test_a_medium_is_named_by_its_adapter(trained, polygpt):
    data, few = trained.file.parent / "data", ["--temperature", "0", "--max_tokens", "3", "--json"]
    written = {}
    for kind, words in {
        "image": ("--image", data / "red.png"),
        "medium": ("--medium", f"image={data / 'red.png'}"),
    }.items():
        code, out, err = polygpt("generate", trained.run, *words, *few)
        assert code == 0, err
        written[kind] = json.loads(out)
    assert written["image"]["text"] == written["medium"]["text"]
    assert written["medium"]["prompt"] == [{"medium": f"image={data / 'red.png'}"}]
    code, _, err = polygpt("generate", trained.run, "--medium", f"point={data / 'red.png'}", *few)
    assert code == 2 and "no such adapter" in err and "'point'" in err and "image" in err


def test_generate_interactively(trained, polygpt, monkeypatch):
    red = trained.file.parent / "data" / "red.png"
    typed = f"/image {red}\n\n/nonsense\n/image nowhere.png\nhello\n/text a\n/clear\n/go\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    code, out, err = polygpt("generate", trained.run, "--interactive", "--temperature", "0", "--max_tokens", "4")
    assert code == 0
    assert err.count("add an image") == 2, "help at the start and after an unknown command"
    assert "nowhere.png: no such file" in err and "empty" in err
    assert out.count("\n") >= 2


def test_generate_refuses_what_the_model_cannot_take(trained, polygpt):
    data = trained.file.parent / "data"
    code, out, err = polygpt("generate", trained.run, "--image", data / "red.png", "--image", data / "blue.png")
    assert (code, out) == (2, "") and "the model takes 1 of image" in err and err.count("\n") == 1
    code, _, err = polygpt("generate", trained.run, "--audio", data / "red.png")
    assert code == 2 and err.count("\n") == 1 and "prompt 0" in err
    code, out, err = polygpt("generate", trained.run, "--text", "a", "--suffix", "c")
    assert (code, out) == (2, "") and "was not trained to fill in the middle" in err and err.count("\n") == 1


def test_report_is_written_where_asked(trained, polygpt, tmp_path):
    code, out, _ = polygpt("report", trained.run, "--output", tmp_path / "new" / "page.html", "--json")
    assert code == 0 and json.loads(out) == {"step": 3, "report": str(tmp_path / "new" / "page.html")}
    page = (tmp_path / "new" / "page.html").read_text()
    assert page.count("<article") == 6 and page.count("<audio") >= 2 and "data-attention" in page
    assert [place.name for place in (tmp_path / "new").iterdir()] == ["page.html"]


def test_a_run_that_was_never_evaluated_has_a_report(trained, polygpt, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    (run / "evaluation.json").unlink()
    (run / "timing.jsonl").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    code, _, _ = polygpt("report", run)
    assert code == 0
    page = (run / "report.html").read_text()
    assert "was not evaluated, there are no held-out results" in page and "Training loss" in page
    assert 'id="results"' not in page and 'id="samples"' in page


def test_data_show_prints_and_draws_rows(trained, polygpt, tmp_path):
    words = ["data", "show", trained.file, "--rows", "2", "--picture", tmp_path / "rows.png"]
    code, out, _ = polygpt(*words, "--all")
    assert code == 0 and "<bos>" in out and "row 0:" in out and "row 1:" in out and "…" not in out
    _, short, _ = polygpt(*words)
    assert "<bos>" in short and "row 1:" not in short and short.count("\n") < 50 < out.count("\n") and "--all" in short
    words[4] = "1"
    assert Image.open(tmp_path / "rows.png").width > 500
    code, out, err = polygpt(*words, "--json", "--data.layout.packing", "false")
    (row,) = json.loads(out)["rows"]
    assert code == 0 and row["examples"] == 1 and sum(row["media"].values()) == 1
    assert row["text"].endswith(("it is", "hertz")) and "<bos>" in err
    assert polygpt("data", "show", trained.file, "--rows", "0")[0] == 2


def test_data_check_lists_what_is_wrong(polygpt, tmp_path):
    file = write_experiment(tmp_path)
    code, out, _ = polygpt("data", "check", file, "--json")
    assert code == 0 and json.loads(out)["tasks"]["own"]["records"] == 7 and json.loads(out)["fault"] is None
    longer = json.loads(polygpt("data", "check", file, "--evaluation.tasks.own.seq_len", "96", "--json")[1])
    assert list(longer["tasks"]) == ["own", "evaluation/own"] and longer["fault"] is None
    assert "accept all 7 records" in polygpt("data", "check", file)[1]
    short = json.loads(polygpt("data", "check", file, "--evaluation.tasks.own.seq_len", "2", "--json")[1])
    assert short["tasks"]["own"]["bad"] == {} and short["tasks"]["evaluation/own"]["bad"] == {"too long": 7}
    (tmp_path / "data" / "red.png").write_bytes(b"not a picture")
    (tmp_path / "data" / "400.wav").unlink()
    code, out, err = polygpt("data", "check", file, "--json")
    found = json.loads(out)["tasks"]["own"]
    assert code == 2 and found["bad"] == {"unknown image format": 1, "missing file": 1}
    named = re.compile(r"metadata\.jsonl, line 1: \S+/red\.png: unknown image format")
    assert any(named.search(fault) for fault in found["faults"]), "record and file are named"
    assert err.endswith("polygpt: data check: 2 of 7 records are unusable\n")
    assert list(json.loads(out)["tasks"]) == ["own"], "held-out data that are the training data are walked once"


def with_phases(*changes) -> tuple[str, str]:
    """An override that adds phases."""
    made = [
        {"class": "polygpt.training.phase:Phase", "start": start, "changes": change}
        for start, change in enumerate(changes, start=1)
    ]
    return "--train.phases", json.dumps(made)


def test_data_check_and_show_read_every_phase(polygpt, tmp_path):
    file = write_experiment(tmp_path)
    rate, length = {"optim.schedule.peak_lr": 1e-3}, {"data.layout.seq_len": 2}
    code, out, err = polygpt("data", "check", file, *with_phases(rate, length, {"data.batch_size": 8}), "--json")
    found = json.loads(out)
    assert list(found["tasks"]) == ["own", "own, phase 2"], "a phase that leaves the rows alone is not walked again"
    assert found["tasks"]["own"]["bad"] == {} and found["tasks"]["own, phase 2"]["bad"] == {"too long": 7}
    assert code == 2 and "7 of 14 records are unusable" in err
    words = shlex.split(found["commands"]["100%"])
    assert "--train.phases.1.changes.data.layout.seq_len" in words and "--data.layout.seq_len" not in words
    code, out, _ = polygpt("data", "check", *words[2:], "--json")
    assert code == 0 and json.loads(out)["tasks"]["own, phase 2"]["bad"] == {}

    (tmp_path / "two").mkdir()
    two = write_experiment(tmp_path / "two")
    with two.open("a") as more:
        more.write(
            "\n\ndef experiment(own=experiment):\n    one = own()\n"
            "    tasks = {**one.data.tasks, 'late': one.data.tasks['own'].replace(weight=1e-9)}\n"
            "    return one.replace(data=one.data.replace(tasks=tasks))\n"
        )
    waiting = {"data.tasks.late.weight": 1.0, "data.tasks.own.weight": 1e-9, "data.layout.seq_len": 48}
    out = polygpt("data", "check", two, *with_phases(waiting), "--json")[1]
    assert list(json.loads(out)["tasks"]) == ["own", "late, phase 1"], "a task is checked where it is read"

    show = ["data", "show", file, "--picture", tmp_path / "rows.png", *with_phases({"data.layout.seq_len": 48})]
    assert json.loads(polygpt(*show, "--json")[1])["length"] == 64
    code, out, err = polygpt(*show, "--phase", "1", "--json")
    assert code == 0 and json.loads(out)["length"] == 48 and "phase 1 of 0 to 1: train.phases.0 (after step 1)" in err
    code, _, err = polygpt(*show, "--phase", "2")
    assert code == 2 and err.endswith("data show: --phase is 2: this run has the phases 0 to 1\n")


def test_data_check_ends_with_settings_that_take_the_records(polygpt, tmp_path):
    file = write_experiment(tmp_path)
    metadata = tmp_path / "data" / "metadata.jsonl"
    long = json.dumps({"file_names": ["red.png"] * 3, "text": "red " * 50}) + "\n"
    metadata.write_text(metadata.read_text() * 4 + long)
    (tmp_path / "data" / "spare.png").write_bytes(b"no record names it")
    code, out, _ = polygpt("data", "check", file, "--data.batch_size", "4")
    assert code == 2 and "present settings accept all" not in out and "image" in out and "spare.png" in out
    *_, most, everything = out.splitlines()
    assert "95%" in most and "--data.on_bad_record skip --evaluation.on_bad_record skip" in most
    words = shlex.split(everything)
    assert words[:4] == ["100%", "polygpt", "train", str(file)] and "skip" not in words
    code, out, _ = polygpt("data", "check", *words[3:], "--json")
    found = json.loads(out)
    assert code == 0 and found["tasks"]["own"]["bad"] == {} and found["tasks"]["own"]["media"]["image"] == 19
    assert shlex.split(found["commands"]["100%"])[2:] == words[3:], "and ask for nothing more"


def test_model_show_counts_an_experiment_and_a_preset(trained, polygpt):
    code, out, _ = polygpt("model", "show", trained.file, "--json")
    counted = json.loads(out)
    assert code == 0 and counted["vocabulary"] == 258 and counted["seq_len"] == 64
    assert counted["parameters"] == sum(part["parameters"] for part in counted["parts"])
    deeper = json.loads(polygpt("model", "show", trained.file, "--model.decoder.depth", "3", "--json")[1])
    assert deeper["parameters"] > counted["parameters"]
    code, out, _ = polygpt("model", "show", "1m", "--seq-len", "128")
    assert code == 0 and "sequence length 128" in out and re.search(r"all +[\d,]{7,}", out)


def test_tokenizer_train_writes_a_tokenizer(polygpt, tmp_path):
    (tmp_path / "a.txt").write_text("the cat and the hat and the bat " * 50)
    out = tmp_path / "bpe.json"
    code, printed, _ = polygpt("tokenizer", "train", tmp_path / "*.txt", "--vocabulary", "300", "--out", out, "--json")
    from polygpt.data.tokenizers.bpe import BPE

    done = json.loads(printed)
    assert code == 0 and done["vocabulary"] == BPE(str(out)).build().vocabulary <= 300
    code, _, err = polygpt("tokenizer", "train", tmp_path / "a.txt", "--vocabulary", "5", "--out", tmp_path / "b.json")
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "b.json").exists()


def test_a_reader_that_leaves_early_is_no_error_message():
    command = f"{POLYGPT} --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ})
    assert done.stdout.startswith("usage:") and done.stderr == ""


def test_doctor_ends_well_unless_something_needed_is_broken(polygpt, monkeypatch):
    from polygpt.runtime import doctor

    missing = doctor.Check("extra gpu", "note", "not installed", "pip install -e '.[gpu]'")
    broken = doctor.Check("cache folder", "broken", "/c: Permission denied", "set POLYGPT_CACHE")
    found = [(missing, {"extra": "gpu", "installed": False}), (doctor.Check("Python", "ok", "3.11"), {"cores": 2})]
    monkeypatch.setattr(doctor, "examine", lambda: iter(found))
    code, out, err = polygpt("doctor")
    assert (code, err) == (0, "") and "pip install -e '.[gpu]'" in out and out.count("\n") == 3
    found.append((broken, {"cache": "/c"}))
    code, out, err = polygpt("doctor", "--json")
    done = json.loads(out)
    assert code == 1 and not done["ok"] and done["extras"] == {"gpu": False} and done["cores"] == 2
    assert [check["status"] for check in done["checks"]] == ["note", "ok", "broken"]
    assert "broken: cache folder" in err.splitlines()[-1] and "set POLYGPT_CACHE" in err
