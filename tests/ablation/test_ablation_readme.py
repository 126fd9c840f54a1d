"""The README of an ablation and the table of all: what they say, and when they are out of date."""

import dataclasses
from pathlib import Path

import pytest

from own_ablation import write_ablation, write_results
from polygpt.ablation import index, pictures, readme, results
from polygpt.ablation.beside import agreement, beside
from polygpt.ablation.charts import charts
from polygpt.ablation.study import load_ablation
from polygpt.errors import UserError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize("folder", sorted(path.parent for path in EXPERIMENTS.glob("ablations/*/experiment.py")))
def test_every_ablation_here_is_written_up_as_it_is(folder):
    assert readme.stale(folder) == [], "polygpt ablate writes them anew"


def test_the_table_of_ablations_here_is_as_they_are():
    assert all(mark in (EXPERIMENTS / "README.md").read_text() for mark in index.MARKS)
    assert not index.stale(EXPERIMENTS), "polygpt ablate writes it anew"


@pytest.fixture
def drawn(monkeypatch):
    """Charts that were drawn; drawing takes no time."""
    names = []

    def draw(chart):
        names.append(chart.name)
        return ".svg", f"<svg>{pictures.fingerprint(chart)}</svg>".encode()

    monkeypatch.setattr(readme, "draw", draw)
    return names


def test_a_readme_answers_first_and_then_says_how(made, drawn):
    folder = made()
    files = {path.name for path in readme.write(folder)}
    assert files == {"README.md", "table.tex", "variants.svg", "training_loss.svg", "held_out.svg"}
    text = (folder / "README.md").read_text()
    paragraphs = text.split("\n\n")
    assert paragraphs[1] == "# Width of a tiny model"
    assert paragraphs[2] == "**Question.** Is a wider model better, or a deeper one?"
    assert paragraphs[3].startswith("**Verdict.** 2 of 3 claims held: a wider model learns more;")
    assert paragraphs[4] == "**Cost.** 12 runs, 18 s of total wall time on cpu, 30 G FLOPs."
    assert paragraphs[5] == "**Command.** `polygpt ablate own`"
    assert "[arXiv:2002.05202](https://arxiv.org/abs/2002.05202), Table 1." in text
    assert "Evidence M: results from memory, not yet verified in the paper." in text
    assert "| wide | 1.944 | -0.046 | 2.00" in text, "the paper's figure, its difference, and ours beside it"
    assert "| `wide < base` | a wider model learns more | **held** |" in text
    assert all(f"]({name})" in text for name in files if name.endswith(".svg"))
    said = ["× 4 seeds", "the same order of data", "Steps: 4.", "as many steps as the base", "On cpu; 4 seeds in one"]
    assert all(words in text for words in [*said, "polygpt 0.0, code abcdef012345 (commit 0123456789ab), JAX 0.10."])
    assert r"\textbf{" in (folder / "table.tex").read_text() and r"deep\_2" in (folder / "table.tex").read_text()
    assert readme.stale(folder) == []


def test_the_order_of_the_papers_figures_is_compared_in_the_papers_direction(made, drawn):
    folder = made()
    frame = results.frame(load_ablation(folder / "experiment.py"), results.read(folder / "results.jsonl"))
    same = "For 1 of 1 pairs of variants, the better one by mean is the same as in the paper."
    assert beside(frame).notes == [same]
    readme.write(folder)
    assert same in (folder / "README.md").read_text()
    # Of accuracies the higher one is the better, though our losses are compared with them.
    paper = frame.ablation.paper.replace(unit="accuracy", better="higher")
    turned = dataclasses.replace(frame, ablation=frame.ablation.replace(paper=paper))
    assert beside(turned).notes == [same.replace("For 1", "For 0")]
    assert beside(turned).columns[1] == "paper (accuracy, higher is better)"
    assert charts(turned)[0].caption.endswith("the paper's figures (accuracy), higher is better.")


def test_ties_and_variants_of_one_alone_say_nothing_of_the_order():
    theirs = {"a": 1.0, "b": 1.0, "c": 2.0, "theirs": 0.0}
    assert agreement(theirs, {"a": 5.0, "b": 6.0, "c": 5.5, "ours": 1.0}) == (1, 2)
    assert agreement(theirs, {"a": 5.0, "b": 6.0, "c": 5.5, "ours": 1.0}, opposite=True) == (1, 2)
    assert agreement(theirs, {"a": 5.0, "b": 6.0, "c": 7.0}) == (2, 2)
    assert agreement(theirs, {"a": 5.0, "b": 6.0, "c": 7.0}, opposite=True) == (0, 2)
    assert agreement(theirs, {"a": 5.0, "c": 5.0}) == agreement(theirs, {"a": 5.0, "c": 5.0}, opposite=True) == (0, 1)


def test_tuning_is_told_and_counted(made, drawn):
    def loss(variant, at, seed):
        return 2.0 + (at["tuned"] - 0.01) ** 2 + seed % 1000 / 10

    folder = made("tuned=grid('optim.schedule.peak_lr', 1e-3, 1e-2),\ntuning_seeds=2,", loss)
    readme.write(folder)
    text = (folder / "README.md").read_text()
    assert "**Cost.** 24 runs (12 for tuning), 36 s of total wall time" in text
    assert "Every point is tuned over 0.001, 0.01, with 2 seeds for tuning only." in text
    assert "| base | 0.01, the highest tried |" in text


def test_many_rows_are_folded(made, drawn):
    rates = ", ".join(str(i / 1000) for i in range(1, 10))
    folder = made(
        f"over={{'rate': grid('optim.schedule.peak_lr', {rates})}},", lambda variant, at, seed: at["rate"] + seed
    )
    readme.write(folder)
    assert "<details><summary>27 rows</summary>" in (folder / "README.md").read_text()


def test_notes_survive_and_other_changes_are_told(made, drawn):
    folder = made()
    readme.write(folder)
    path = folder / "README.md"
    begin, end = readme.NOTES
    path.write_text(path.read_text().replace(f"{begin}\n\n{end}", f"{begin}\n\nBy hand: *why*.\n\n{end}"))
    assert readme.stale(folder) == [], "notes are nobody's but the author's"
    path.write_text(path.read_text().replace("polygpt ablate own", "polygpt ablate other"))
    assert readme.stale(folder) == [str(path)]
    readme.write(folder)
    assert "By hand: *why*." in path.read_text() and "`polygpt ablate own`" in path.read_text()


def test_results_that_changed_make_all_that_shows_them_stale(made, drawn):
    folder = made()
    readme.write(folder)
    write_results(folder / "experiment.py", lambda variant, at, seed: 3.0 + seed)  # the later line of a run counts
    stale = {Path(line).name for line in readme.stale(folder)}
    assert stale == {"README.md", "table.tex", "variants.svg"}, "curves did not change"


@pytest.mark.parametrize("name", ["table.tex", "variants.svg"])
def test_a_file_that_is_missing_is_told(made, drawn, name):
    folder = made()
    readme.write(folder)
    (folder / name).unlink()
    assert name.partition(".")[0] in readme.stale(folder)[-1]


def test_pictures_of_another_question_are_removed_and_others_are_kept(made, drawn):
    folder = made()
    readme.write(folder)
    (folder / "over_rate.svg").write_bytes((folder / "variants.svg").read_bytes())
    (folder / "photograph.png").write_bytes(b"\x89PNG of a whiteboard")
    assert readme.stale(folder) == [str(folder / "over_rate.svg")]
    readme.write(folder)
    assert not (folder / "over_rate.svg").exists() and (folder / "photograph.png").exists()
    assert readme.stale(folder) == []


def test_a_picture_of_the_same_content_may_have_other_bytes(made, drawn):
    folder = made()
    readme.write(folder)
    path = folder / "variants.svg"
    path.write_bytes(b"<!-- another version of Matplotlib -->" + path.read_bytes())
    assert readme.stale(folder) == []
    path.write_bytes(b"<svg>content 0123456789abcdef0123456789abcdef</svg>")
    assert readme.stale(folder) == [str(path)]


def test_a_readme_by_hand_is_not_overwritten(made, drawn):
    folder = made()
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(UserError, match="README.md was not written by polygpt ablate: move it away"):
        readme.write(folder)
    assert (folder / "README.md").read_text() == "# Mine\n" and not (folder / "table.tex").exists()


def test_an_ablation_that_was_never_run_is_not_stale(tmp_path):
    folder = write_ablation(tmp_path / "own").parent
    assert readme.stale(folder) == []
    readme.write(folder)
    assert "**Verdict.** Not run yet." in (folder / "README.md").read_text()


def test_a_file_elsewhere_has_a_folder_of_its_name(tmp_path):
    file = write_ablation(tmp_path, name="mine.py")
    assert readme.home(file) == tmp_path / "mine" and readme.source(tmp_path / "mine") == file
    assert readme.command(tmp_path / "mine") == "polygpt ablate mine.py"
    inside = tmp_path / "experiments" / "ablations" / "glu" / "experiment.py"
    assert readme.home(inside) == inside.parent and readme.source(inside.parent) == inside
    assert readme.command(inside.parent) == "polygpt ablate glu"


# --- the index --------------------------------------------------------------------------------------------------------


def test_the_table_of_ablations_is_kept_between_its_marks(made, drawn):
    folder = made()
    experiments = folder.parents[1]
    path = experiments / "README.md"
    write_ablation(folder.with_name("later"), "")
    assert index.write(experiments) is None and not index.stale(experiments), "no README there"
    path.write_text(f"# Experiments\n\n{index.MARKS[0]}\n{index.MARKS[1]}\n\nThe end.\n")
    readme.write(folder)
    assert index.stale(experiments) and index.write(experiments) == path and not index.stale(experiments)
    before, *rows, after = path.read_text().partition(index.MARKS[0])[2].partition(index.MARKS[1])[0].split("\n")
    assert rows[2] == "| [later](ablations/later) | Is a wider model better, or a deeper one? | not run yet | – | " + (
        "`polygpt ablate later` |"
    )
    assert rows[3].startswith("| [own](ablations/own) | Is a wider model better, or a deeper one? | 2 of 3 claims held")
    assert "18 s of total wall time" in rows[3] and len(rows) == 4
    assert path.read_text().startswith("# Experiments\n") and path.read_text().endswith("\n\nThe end.\n")


def test_a_mark_alone_is_an_error(made):
    experiments = made().parents[1]
    (experiments / "README.md").write_text(index.MARKS[0])
    with pytest.raises(UserError, match="one of them is missing"):
        index.write(experiments)
