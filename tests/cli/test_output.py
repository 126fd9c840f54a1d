"""What the command line makes of warnings, and of results that there are none of."""

import logging

from polygpt.cli.output import quiet, show_table
from polygpt.cli.results import print_results
from polygpt.markup import Table


def test_a_warning_is_one_line_as_all_others(capsys, caplog):
    with quiet():
        logging.getLogger("polygpt.runtime.checkpoint").warning("skipping\ncheckpoint %s", 7)
        logging.getLogger("polygpt.runtime.checkpoint").info("barrier")
    assert capsys.readouterr().err == "polygpt: skipping checkpoint 7\n"
    logging.getLogger("polygpt.training").warning("after it")  # as a program says that uses the library
    assert capsys.readouterr().err == "" and "after it" in caplog.text and "skipping" not in caplog.text


def test_without_held_out_tasks_that_is_said_and_no_empty_table_drawn(capsys):
    print_results({"step": 1200, "tasks": {}, "modality_gain": {}}, {})
    assert capsys.readouterr().out == "step 1,200: the experiment has no held-out tasks, so nothing was measured\n"


def test_long_claims_and_sentences_take_several_lines_and_leave_room_for_figures(capsys):
    row = ["mean(a, over=rate) < " * 6, "a long sentence that says it " * 6, "held", "0.225 ± 0.050"]
    show_table(Table("Claims", ["claim", "in words", "verdict", "estimate"], [row], code={0}, prose={1, 2}))
    printed = capsys.readouterr().out
    assert "held" in printed and "0.225 ± 0.050" in printed and "…" not in printed
    assert printed.count("sentence") == 6 and printed.count("over=rate") == 6
