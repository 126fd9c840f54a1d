"""The command line itself: help, exit codes, one-line errors, JSON alone on stdout."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from polygpt import spec
from polygpt.cli import main as cli
from polygpt.cli import output
from polygpt.errors import UserError


def test_help_names_every_verb_and_teaches(polygpt):
    for words in ((), ("--help",), ("-h",)):
        code, out, err = polygpt(*words)
        assert code == 0 and err == ""
        assert all(re.search(rf"^  {verb} ", out, re.M) for verb in cli.VERBS)
        assert out.count("polygpt train") >= 3


@pytest.mark.parametrize(
    ("verb", "word"), [("attention check", "MODULE:SPEC"), ("train", "FILE"), ("model show", "FILE|PRESET")]
)
def test_help_without_a_file_says_how_to_list_the_fields(polygpt, verb, word):
    assert f"polygpt {verb} {word} --help" in polygpt(*verb.split(), "--help")[1]


def test_brackets_and_colons_of_a_table_are_text(capsys):
    output.print_table("of [tpu] :smile:", ["[bold]"], [["pip install 'polygpt[tpu]'"]])
    out = capsys.readouterr().out
    assert "of [tpu] :smile:" in out and "[bold]" in out and "polygpt[tpu]" in out


@pytest.mark.parametrize("words", [["--help"], ["train", "nowhere.py"], ["train", "LICENSE"], ["train", "broken.py"]])
def test_help_and_mistakes_are_instant_because_nothing_heavy_is_imported(words, tmp_path):
    (tmp_path / "LICENSE").write_text("")
    (tmp_path / "broken.py").write_text("def experiment(:\n")
    script = (
        f"import sys; from polygpt.cli.main import main; assert main({words}) == {0 if words == ['--help'] else 2};"
        "heavy = {'jax', 'numpy', 'flax', 'rich', 'PIL'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=tmp_path)


def test_an_experiment_imports_no_library_that_only_training_evaluation_or_pictures_need():
    script = (
        "import sys, polygpt.api; heavy = {'sklearn', 'pandas', 'scipy.stats', 'scipy.optimize', 'scipy.special',"
        "'grain', 'orbax.checkpoint', 'matplotlib', 'tensorboardX', 'tensorflow_datasets', 'optuna', 'ray', 'torch'}"
        "& set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_an_example(polygpt, verb):
    code, out, err = polygpt(*verb.split(), "--help")
    assert code == 0 and err == ""
    assert f"usage: polygpt {verb}" in out and "examples:" in out
    assert "--json" in out and "--debug" in out


ROOT = Path(__file__).parents[2]
MODULES = {verb: importlib.import_module(path) for verb, (path, _) in cli.VERBS.items()}
LINES = [line.strip() for texts in (cli, *MODULES.values()) for line in texts.EXAMPLES.splitlines()]
FILE = "experiments/quickstart.py"
OWN = {
    r"(?<=objective check )\w+\.py:\w+": "polygpt.objectives.next_token:NextToken",
    r"\b\w+\.py:\w+": "polygpt.attention.multi_head:MultiHead",  # a variant as `attention new` writes it
    r"(?<=check )\w+\.py": FILE,
}
"""What stands for the reader's own files, as patterns, and files that are here."""


def runnable(line: str) -> str:
    """An example with files that are here and without what is said beside it."""
    for pattern, instead in OWN.items():
        line = re.sub(pattern, instead, line)
    return re.sub(r" {2,}\S.*", "", line)


EXAMPLES = sorted({runnable(line) for line in LINES if line.startswith("polygpt ") and "--help" not in line})


@pytest.fixture(scope="module")
def quickstart_run(tmp_path_factory):
    """A run folder with nothing but the quickstart's configuration."""
    folder = tmp_path_factory.mktemp("quickstart")
    experiment = spec.load_file(ROOT / "experiments/quickstart.py").experiment()
    (folder / "config.json").write_text(json.dumps(spec.to_json(experiment)))
    return folder


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_fields_that_examples_set_exist(line, monkeypatch, quickstart_run):
    monkeypatch.chdir(ROOT)
    argv = shlex.split(line)[1:]
    verb = max((verb for verb in cli.VERBS if argv[: len(verb.split())] == verb.split()), key=len)
    parser = MODULES[verb].parser(f"polygpt {verb}", "about")
    words = argv[len(verb.split()) :]
    arguments = parser.read(words)
    if parser.fields is not None:
        first = str(quickstart_run) if words[0] == "runs/quickstart" else words[0]
        assert parser.fields(first, arguments.changes, arguments.options) is not None
    else:
        assert arguments.changes == {}


def test_there_are_examples_that_set_fields():
    assert sum("quickstart.py --" in line for line in EXAMPLES) >= 3
    assert (
        sum(
            f"{verb} polygpt.attention.multi_head:MultiHead --" in line
            for line in EXAMPLES
            for verb in ("bench", "show")
        )
        >= 2
    )


def test_a_group_lists_its_verbs(polygpt):
    code, out, _ = polygpt("data", "--help")
    assert code == 0 and "data show" in out and "data check" in out and "train" not in out
    assert polygpt("--version")[1].startswith("polygpt 0.")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "no verb 'trian': did you mean train"),
        (["data"], "data alone is not a verb: write data show, data check, data score, data fetch"),
        (["attention"], "write attention list, attention check, attention bench, attention show, attention new"),
        (["data", "shwo", "x"], "no verb 'data shwo': did you mean data show"),
        (["--foo"], "no verb '--foo'"),
        (["train"], "train: the following arguments are required: FILE: see polygpt train --help"),
        (["train", "a.py", "b.py"], "train: unexpected argument 'b.py': see polygpt train --help"),
        (["train", "nowhere.py"], "no file .*nowhere.py"),
        (["train", "a.py", "--train.steps"], "train: --train.steps needs a value"),
        (["train", "a.py", "--workdri"], "train: --workdri needs a value or is not an option: did you mean --workdir"),
        (["evaluate", "x", "--jsn"], "evaluate: --jsn needs a value or is not an option: did you mean --json"),
        (["report", "x", "--jsn"], "report: no option --jsn: did you mean --json"),
        (["evaluate", "x", "--checkpoint", "first"], "argument --checkpoint: invalid choice: 'first'"),
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["report", "nowhere"], "nowhere is not a run folder"),
        (["generate", "x"], "generate: empty prompt"),
        (["generate", "x", "--medium", "digit.png"], "--medium digit.png: write NAME=FILE"),
        (["generate", "x", "--medium", "point=nowhere"], "--medium point=nowhere: no such file"),
        (["generate", "x", "--interactive", "--json"], "cannot be combined"),
        (["generate", "x", "--image", "nowhere.png"], "--image nowhere.png: no such file"),
        (["generate", "x", "--text", "a", "--temprature", "1"], "did you mean --temperature"),
        (["generate", "x", "--text", "a", "--top_p", "2"], "Sampling.top_p is 2.0: it must be above 0"),
        (["model", "show", "8b"], "no preset '8b': did you mean .*7b"),
        (["model", "show", "1m", "--seq-len", "0"], "--seq-len is 0: it must be positive"),
        (["model", "show", "1m", "--seq-len", "many"], "invalid int value: 'many'"),
        (
            ["model", "show", "1m", "--decoder.dpth", "2"],
            "DecoderSpec has no field 'dpth': did you mean depth",
        ),
        (
            ["model", "show", "1m", "--seq-lem", "2"],
            "--seq-lem: neither an option nor a field of ModelSpec: .*--seq-len",
        ),
        (["tokenizer", "train", "none.txt", "--out", "x.json"], "no text file 'none.txt'"),
        (["tokenizer", "train", "a.txt", "--out", "."], "is a folder: name a file"),
    ],
)
def test_the_users_mistakes_are_one_line_with_code_2(polygpt, words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = polygpt(*words)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"polygpt: .*{expected}.*\n", err), err
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_other_errors_are_code_1_with_a_traceback_only_where_asked(polygpt, monkeypatch):
    def fail(argv):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert polygpt("train") == (1, "", "polygpt: RuntimeError: out of luck (run with --debug for the traceback)\n")
    code, _, err = polygpt("train", "--debug")
    assert code == 1 and "Traceback" in err and err.count("luck") >= 2


def test_an_interrupt_is_no_traceback(polygpt, monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupt)
    assert polygpt("train") == (1, "", "polygpt: interrupted\n")


def test_a_users_mistake_shows_its_traceback_with_debug(polygpt, monkeypatch):
    def fail(argv):
        raise UserError("no such thing")

    monkeypatch.setattr(cli, "_dispatch", fail)
    code, _, err = polygpt("train", "--debug")
    assert code == 2 and "Traceback" in err and err.endswith("polygpt: no such thing\n")


def test_json_is_alone_on_stdout_whoever_else_writes_there(capfd):
    with output.json_alone(True) as write:
        print("progress")
        os.write(1, b"from a library\n")
        subprocess.run(["echo", "from a child"], check=True)
        write({"loss": np.float32(0.5), "n": np.int64(3), "bad": float("nan"), "place": Path("a/b"), "all": (1, None)})
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"loss": 0.5, "n": 3, "bad": None, "place": "a/b", "all": [1, None]}
    assert captured.out.count("\n") == 1
    assert all(word in captured.err for word in ("progress", "from a library", "from a child"))


def test_without_json_stdout_is_left_alone(capfd):
    with output.json_alone(False) as write:
        print("a table")
        write({"loss": 1})
    assert capfd.readouterr().out == "a table\n"


def test_stdout_is_given_back_after_an_error(capfd):
    with pytest.raises(UserError), output.json_alone(True):
        raise UserError("x")
    print("afterwards")
    assert capfd.readouterr().out == "afterwards\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (1234.5, "1,234"), (7, "7"), (12345, "12,345"), (float("nan"), "–"), (None, "–")],
)
def test_figures_in_tables(value, text):
    assert output.figure(value) == text
