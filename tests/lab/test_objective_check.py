"""`polygpt objective check`: each mistake is found and called by its name, and what is right passes."""

import json
from pathlib import Path

import pytest

from polygpt.cli.main import main
from polygpt.lab.objective import check as lab
from polygpt.objectives.next_token import NextToken
from polygpt.spec import load_class

SLOW = pytest.mark.slow
OWN = str(Path(__file__).with_name("wrong_objectives.py"))
UNUSUAL = str(Path(__file__).with_name("unusual_objectives.py"))
QUICK = [
    "nothing without weight",
    "twice the weights, same mean",
    "linear in the weights",
    "finite without any weight",
    "rows add up",
    "packed = alone",
    "finite without media",
    "finite if certain",
    "JSON round trip",
]
"""What takes one compiled program."""
LEAK, VIEW, APART = "targets unseen", "view hides targets", "view keeps examples apart"
ALONE, STEPS = "view of a row alone", "views differ between steps"
NOTHING, TWICE, LINEAR = "nothing without weight", "twice the weights, same mean", "linear in the weights"
PADDING, MICRO, SLOPES = "padding without effect", "microbatches = one batch", "gradient = finite differences"
MISTAKES = {
    "ReadsNextVector": {LEAK},
    "ReadsShifted": {LEAK},
    "ReadsWithoutGradient": {LEAK, SLOPES},
    "ReadsNextResidual": {LEAK},
    "ForgetsShift": {LEAK},
    "UnweightedAndUnshifted": {LEAK},
    "UnweightedAndAhead": {LEAK},
    "UnweightedShiftedPass": {LEAK},
    "PartUnweighted": {LEAK, TWICE},
    "MasksNothing": {LEAK, VIEW},
    "MaskTells": {VIEW},
    "UnweightedMaskTells": {VIEW},
    "ViewCrosses": {APART},
    "ViewFromHost": {ALONE},
    "ViewByPlace": {ALONE},
    "ViewOfOneStep": {STEPS},
    "WeighsPadding": {lab.BUILDS},
    "MeanForSum": {TWICE, LINEAR, "rows add up", "finite without any weight", MICRO},
    "MeanOfMeans": {LINEAR, "rows add up", "finite without any weight", MICRO},
    "IgnoresWeights": {NOTHING},
    "WeightOfOutputs": {LINEAR, "rows add up", "finite without any weight", MICRO},
    "NotANumberTimesZero": {PADDING},
    "WhereAfterwards": {PADDING},
    "NoWeightNoNumber": {"finite without any weight"},
    "CrossesExamples": {"packed = alone"},
    "ComparesMicrobatch": {LINEAR, TWICE, "rows add up", "packed = alone", MICRO},
    "EmbedsByMean": {TWICE, LINEAR, "packed = alone", MICRO},
    "LogOfProbability": {"finite if certain"},
    "Overflows": {"finite if certain"},
    "SumsInComputeType": {"bfloat16 near float32"},
    "InHalf": {lab.BUILDS},
    "WrongGradient": {SLOPES},
    "RandomTotal": {"same every time"},
    "CountsPositions": {"in blocks = all logits"},
    "HoldsFunction": {"JSON round trip"},
    "Crashes": {lab.BUILDS},
}
"""Which properties, of the quick ones and those named here, an objective of `wrong_objectives.py` fails."""
FAST = ("IgnoresWeights", "InHalf")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=SLOW) for name in MISTAKES])
def test_a_mistake_is_called_by_its_name(name):
    chosen = [one for one in lab.PROPERTIES if one in {*QUICK, *MISTAKES[name]}]
    findings = lab.check(load_class(f"{OWN}:{name}")(), chosen)
    for one in findings:
        print(f"{one.name:32} {one.result:5} {one.error} {one.bound} {one.note}")
    assert {one.name for one in findings if one.passed is False} == MISTAKES[name]


@pytest.mark.parametrize("chosen", [QUICK, pytest.param(tuple(lab.PROPERTIES), marks=SLOW)], ids=["quick", "all"])
def test_the_cross_entropy_passes(chosen):
    findings = lab.check(NextToken(0.1), chosen)
    assert [one for one in findings if one.passed is False] == []
    absent = {one.name for one in findings if one.passed is None}
    assert absent <= {VIEW, APART, ALONE, STEPS}


UNLIKE = {
    "AfterNext": set(),
    "Unlikelihood": set(),
    "SmallVectors": {LEAK, LINEAR},
    "MasksEveryThird": {STEPS},
    "FromAverage": {LEAK},
    "Spread": {LEAK, LINEAR, "rows add up"},
    "HalfHead": {LEAK, LINEAR, NOTHING},
}
"""Which properties do not apply to an objective of `unusual_objectives.py`, of those that do to the cross entropy."""


@SLOW
@pytest.mark.parametrize("name", UNLIKE)
def test_an_unusual_objective_passes(name, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    findings = lab.check(load_class(f"{UNUSUAL}:{name}").small(), [one for one in lab.PROPERTIES if one != lab.DEVICES])
    for one in findings:
        print(f"{one.name:32} {one.result:5} {one.error} {one.bound} {one.note}")
    assert [one.name for one in findings if one.passed is False] == []
    of_views = set() if name == "MasksEveryThird" else {VIEW, APART, ALONE, STEPS}
    assert {one.name for one in findings if one.passed is None} - {"in blocks = all logits"} == UNLIKE[name] | of_views


@SLOW
def test_what_is_wrong_on_several_devices_alone_is_found():
    (finding,) = lab.check(load_class(f"{OWN}:ComparesMicrobatch")(), [lab.DEVICES])
    assert finding.passed is False and "with" in finding.note


def test_the_verb_prints_a_table_and_takes_json(capsys):
    name = json.dumps({"class": "polygpt.objectives.next_token:NextToken", "label_smoothing": 0.1})
    assert main(["objective", "check", name, "--label_smoothing", "0.2", "--only", f"{TWICE},JSON round trip"]) == 0
    out = capsys.readouterr().out
    assert "pass" in out and "2 properties hold, 0 fail, 0 do not apply" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["polygpt.objectives.view:View"], "is not an objective: it must derive from polygpt.api.Objective"),
        (["polygpt.objectives.next_token:NextTokn"], "did you mean NextToken"),
        (["polygpt.objectives.next_token:NextToken", "--label_smoothing", "2"], "at least 0 and below 1"),
        (
            ["polygpt.objectives.next_token:NextToken", "--only", "linear in weights"],
            "did you mean linear in the weights",
        ),
        (['{"class": "polygpt.objectives.next_token:NextToken"}'], "NextToken lacks label_smoothing"),
        (['{"class": '], "the JSON is not valid"),
        (["nowhere.json"], "nowhere.json: cannot be read"),
        ([f"{OWN}:Undeclared"], "reads the model 'teacher'"),
    ],
)
def test_a_wrong_word_is_an_error_of_one_line(capsys, words, expected):
    assert main(["objective", "check", *words]) == 2
    *progress, last = capsys.readouterr().err.splitlines()
    assert expected in last and all(line.startswith("checking") for line in progress)


def test_a_field_without_a_default_is_told(tmp_path, capsys):
    text = "import dataclasses\nimport polygpt.api as pg\n\n@dataclasses.dataclass(frozen=True)\n"
    text += "class Mine(pg.Objective):\n"
    (tmp_path / "mine.py").write_text(f"{text}    rate: float\n")
    assert main(["objective", "check", f"{tmp_path}/mine.py:Mine"]) == 2
    assert "add defaults for rate, or a classmethod small()" in capsys.readouterr().err
    (tmp_path / "bare.py").write_text(f"{text}    rate: float = 1.0\n")
    assert main(["objective", "check", f"{tmp_path}/bare.py:Mine"]) == 2
    assert "fails builds and runs: NotImplementedError: Mine defines no total" in capsys.readouterr().err


def test_the_list_names_every_objective_once(capsys):
    assert main(["objective", "list", "--json"]) == 0
    found = {one["spec"]: one for one in json.loads(capsys.readouterr().out)["objectives"]}
    assert len(found) >= 17
    assert found["polygpt.objectives.masked_lm:MaskedLM"]["view"] == "MaskTokens"
    assert found["polygpt.objectives.distillation:Distillation"]["needs"] == "the model 'teacher'"
    assert not [
        name for name in found if name.endswith((":LabelObjective", ":PreferenceObjective", ":RoutingObjective"))
    ]
    assert all(10 < len(one["about"]) and "\n" not in one["about"] for one in found.values())
