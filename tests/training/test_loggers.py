"""Sinks: files that can be cut and continued, and a terminal that is none."""

import json

import pytest
from tensorboardX.proto import event_pb2

from polygpt.training.loggers import JsonLines, Terminal, truncate
from polygpt.training.tensorboard import TensorBoard

RESULTS = {"tasks": {"sum": {"loss": 0.5, "accuracy": 0.9}}, "modality_gain": {}, "metric": 0.5}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_hold_metrics_apart_from_times(tmp_path):
    logger = JsonLines(tmp_path, 0)
    logger.metrics(10, {"loss": 1.5, "gradient_norm": float("nan")})
    logger.timing(10, {"seconds": 0.1})
    logger.evaluation(20, RESULTS)
    logger.flush()
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 10, "loss": 1.5, "gradient_norm": None},
        {"step": 20, "evaluation": RESULTS["tasks"], "modality_gain": {}, "metric": 0.5},
    ]
    assert read(tmp_path / "timing.jsonl") == [{"step": 10, "seconds": 0.1}]
    logger.close()


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 1, "loss": 0}', b"\x00\x00\n", b"7\n", b""])
def test_lines_after_the_step_and_torn_lines_are_removed(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n' + torn)
    truncate(path, 1)
    assert path.read_bytes() == b'{"step": 1, "loss": 2}\n'
    logger = JsonLines(tmp_path, 1)
    logger.metrics(2, {"loss": 1})
    logger.close()
    assert path.read_bytes() == b'{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n'


def test_tensorboard_gets_every_number_by_name(tmp_path):
    logger = TensorBoard(tmp_path, 0)
    logger.metrics(10, {"loss": 1.5})
    logger.timing(10, {"seconds": 0.25})
    logger.evaluation(20, RESULTS)
    logger.close()
    (file,) = (tmp_path / "tensorboard").glob("events*")
    assert scalars_in(file.read_bytes()) == {
        ("train/loss", 10): 1.5,
        ("timing/seconds", 10): 0.25,
        ("evaluation/tasks/sum/loss", 20): 0.5,
        ("evaluation/tasks/sum/accuracy", 20): pytest.approx(0.9),
        ("evaluation/metric", 20): 0.5,
    }


def test_on_a_full_disk_tensorboard_does_not_wait_forever(tmp_path):
    logger = TensorBoard(tmp_path, 0)
    logger._writer._py_recordio_writer._writer = open("/dev/full", "wb")
    with pytest.raises(OSError, match="No space left"):
        for step in range(1000):
            logger.metrics(step, {f"loss/{i}": 1.0 for i in range(10)})
    with pytest.raises(OSError, match="No space left"):
        logger.flush()


def test_a_rewind_takes_back_what_was_told_of_later_steps(tmp_path, capsys):
    loggers = [JsonLines(tmp_path, 0), TensorBoard(tmp_path, 0), Terminal(0, 100)]
    for logger in loggers:
        for step in (10, 20, 30):
            logger.metrics(step, {"loss": 1.0})
            logger.timing(step, {"seconds": 0.1, "tokens_per_second": 1.0, "input_wait": 0.0})
        logger.rewind(20, 33)
        logger.metrics(30, {"loss": 2.0})
        logger.close()
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 1.0},
        {"step": 21, "rewound_from": 33},
        {"step": 30, "loss": 2.0},
    ]
    assert [line["step"] for line in read(tmp_path / "timing.jsonl")] == [10, 20]
    assert "step 33: loss spike; back to step 20" in capsys.readouterr().err
    JsonLines(tmp_path, 20).close()
    assert len(read(tmp_path / "metrics.jsonl")) == 2, "a restart from step 20 comes to the rewind again"


def scalars_in(data):
    """{(tag, step): value} of an event file: records of length (8 bytes), its checksum (4), data, checksum (4)."""
    found = {}
    while data:
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    return found


def test_without_a_terminal_progress_is_a_line_now_and_then_on_stderr(capsys):
    logger = Terminal(0, 100, seconds=3600)
    logger.step(1, 2.0)
    logger.timing(10, {"tokens_per_second": 12345.6, "input_wait": 0.031, "seconds": 0.1})
    for step in range(2, 101):
        logger.step(step, 1.0)
    logger.evaluation(100, RESULTS)
    logger.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 1/100  loss 2.0000",
        "step 100/100  loss 1.0000  12,346 tokens/s  input wait 3%  0:00 left",
        "step 100, held-out loss: sum 0.5000",
    ]


def test_a_task_without_texts_shows_what_else_was_measured(capsys):
    tasks = {"text": {"loss": 0.5, "n": 2}, "kinds": {"kind_f1": 0.25, "kind_accuracy": 0.75, "n": 3}}
    Terminal(0, 100, seconds=3600).evaluation(100, {"tasks": tasks})
    expected = "held-out kind_accuracy: kinds 0.7500; held-out kind_f1: kinds 0.2500; held-out loss: text 0.5000"
    assert capsys.readouterr().err == f"step 100, {expected}\n"


def test_on_a_terminal_progress_is_a_bar_on_stderr(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    logger = Terminal(0, 10)
    logger.step(5, 2.0)
    logger.step(10, 1.0)
    logger.close()
    out, err = capsys.readouterr()
    assert out == "" and "10/10" in err and "loss 1.0000" in err


def test_the_terminal_says_that_the_step_is_compiled_and_how_long_it_took(tmp_path, capsys):
    loggers = [JsonLines(tmp_path, 0), TensorBoard(tmp_path, 0), Terminal(0, 100)]
    for logger in loggers:
        logger.compiling(1, None)
        logger.compiling(1, 12.34)
        logger.close()
    assert capsys.readouterr().err.splitlines() == ["compiling the step ...", "compiled in 12.3 s"]
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "timing.jsonl").read_text() == ""
