"""What the command line makes of warnings, and of results that there are none of."""

import logging

from polygpt.cli.output import quiet
from polygpt.cli.results import print_results


def test_a_warning_is_one_line_as_all_others(capsys, caplog):
    with quiet():
        logging.getLogger("polygpt.training.checkpoint").warning("checkpoint %s is\npassed over", 7)
        logging.getLogger("polygpt.training.checkpoint").info("barrier")
    assert capsys.readouterr().err == "polygpt: checkpoint 7 is passed over\n"
    logging.getLogger("polygpt.training").warning("after it")  # as a program says that uses the library
    assert capsys.readouterr().err == "" and "after it" in caplog.text and "passed over" not in caplog.text


def test_without_held_out_tasks_that_is_said_and_no_empty_table_drawn(capsys):
    print_results({"step": 1200, "tasks": {}, "modality_gain": {}})
    assert capsys.readouterr().out == "step 1,200: the experiment has no held-out tasks, so nothing was measured\n"
