"""Overrides by dotted names: all at once, in any order, another class by its name."""

import dataclasses
from collections.abc import Mapping

import pytest

from polygpt.attention.multi_head import MultiHead
from polygpt.attention.sliding import SlidingWindow
from polygpt.blocks.stack import StackSpec
from polygpt.data.sources.embedded import Embedded
from polygpt.errors import SpecError
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.init.from_run import FromRun
from polygpt.init.reference import Reference
from polygpt.lab import catalogue
from polygpt.objectives.base import Objective
from polygpt.objectives.next_token import NextToken
from polygpt.objectives.z_loss import ZLoss
from polygpt.optim.mup import MuP
from polygpt.overrides import leaves, override, replaced
from polygpt.spec import Spec, class_name


@pytest.mark.parametrize("cls", catalogue.variants(), ids=lambda cls: cls.__name__)
def test_a_variant_named_is_the_variant_with_its_own_defaults(cls):
    """What is trained is what was checked."""
    assert override(StackSpec(), {"attention": class_name(cls)}).attention == cls()


def test_fields_that_were_set_stay_where_both_classes_have_them():
    stack = StackSpec(attention=MultiHead(8, kv_heads=2))
    found = override(
        stack, {"attention.window": "16", "attention": "polygpt.attention.sliding:SlidingWindow"}
    ).attention
    assert (type(found).__name__, found.heads, found.kv_heads, found.window) == ("SlidingWindow", 8, 2, 16)


def test_fields_that_fit_only_together_are_set_together():
    assert override(MultiHead(4, 2), {"heads": "9", "kv_heads": "3"}) == MultiHead(9, 3)
    three = StackSpec(depth=6, pattern=(None, None, MultiHead(1)))
    four = {
        "depth": "8",
        "pattern": '[null, null, null, "polygpt.attention.multi_head:MultiHead"]',
        "pattern.3.heads": "2",
    }
    assert override(three, four).variants()[3::4] == (MultiHead(2), MultiHead(2))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"attention.scores": '["polygpt.attention.masks:Window"]'}, "--attention.scores.0: Window needs more"),
        ({"pattern": '[null, "polygpt.nn.norms:RMSNorm"]'}, r"--pattern.1 is RMSNorm\(.*must be Attention or Layer"),
        ({"pattern": '["polygpt.nn.norms:NoSuch"]'}, "has no 'NoSuch'"),
        ({"pattern.0.heads": "2"}, "'0' is not inside"),
        ({"attention.kv_heads": "3"}, "kv_heads is 3: it must be a divisor of heads"),
        ({"attention": "polygpt.attention.sliding:SlidingWindow", "attention.windows": "3"}, "did you mean window"),
    ],
)
def test_what_does_not_fit_is_told_by_its_name(changes, fault):
    with pytest.raises(SpecError, match=fault):
        override(StackSpec(), changes)


def test_values_of_a_program_are_set_as_they_are():
    found = replaced(StackSpec(), {"attention": SlidingWindow(window=5), "attention.heads": 2, "depth": 3})
    assert found == StackSpec(attention=SlidingWindow(heads=2, window=5), depth=3)
    assert replaced(StackSpec(), {}) == StackSpec()


def test_a_mapping_takes_a_new_entry_of_the_right_type_alone():
    spec = EvaluationSpec({"text": EvalTask(Embedded("text"))})
    more = EvalTask(Embedded("digits"))
    found = replaced(spec, {"tasks.digits": more, "tasks.digits.limit": 7, "tasks.text.limit": 3})
    assert found.tasks == {"text": spec.tasks["text"].replace(limit=3), "digits": more.replace(limit=7)}
    with pytest.raises(SpecError, match="--tasks.digits is 7: it must be EvalTask"):
        replaced(spec, {"tasks.digits": 7})
    with pytest.raises(SpecError, match="--tasks.txt: no entry 'txt': did you mean text"):
        replaced(spec, {"tasks.txt.limit": 7})


@dataclasses.dataclass(frozen=True)
class Losses(Spec):
    losses: Mapping[str, tuple[Objective, float]] = dataclasses.field(default_factory=lambda: {"z": (ZLoss(), 1e-4)})


@dataclasses.dataclass(frozen=True)
class Read(Spec):
    models: Mapping[str, Reference] = dataclasses.field(default_factory=dict)


def test_classes_are_named_at_any_depth_of_json():
    named, built = '"polygpt.objectives.next_token:NextToken"', '{"class": "polygpt.objectives.z_loss:ZLoss"}'
    both = f'{{"next": [{named}, 1], "z": [{built}, 2]}}'
    assert override(Losses(), {"losses": both}).losses == {"next": (NextToken(), 1.0), "z": (ZLoss(), 2.0)}
    teacher = '{"teacher": {"class": "polygpt.init.reference:Reference", "init": INIT}}'
    teacher = teacher.replace("INIT", '{"class": "polygpt.init.from_run:FromRun", "path": "runs/a"}')
    assert override(Read(), {"models": teacher}).models == {"teacher": Reference(FromRun(path="runs/a"))}
    with pytest.raises(
        SpecError, match=r"--models\.teacher\.init\.paht: FromRun has no field 'paht': did you mean path"
    ):
        override(Read(), {"models": teacher.replace("path", "paht")})
    with pytest.raises(SpecError, match=r"--models\.teacher\.init: FromRun needs more than its class: .*'path'"):
        override(Read(), {"models": teacher.replace(', "path": "runs/a"', "")})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"losses": '{"z": ["polygpt.objectives.z_loss:ZLoss", "x"]}'}, r"--losses\['z'\]\[1\] is 'x'.* float"),
        ({"losses": "[1]"}, r"--losses is .*1.*mapping from names to \[Objective, float\]"),
        ({"losses.next.1": "2"}, r"no entry 'next': there are z; .*--losses '\{"),
    ],
)
def test_what_json_lacks_is_told_by_its_place(changes, fault):
    with pytest.raises(SpecError, match=fault):
        override(Losses(), changes)


def test_an_entry_of_a_mapping_may_have_dots_in_its_name():
    mup = MuP({"decoder.width": 32, "decoder.attention.heads": 2})
    assert override(mup, {"base.decoder.width": "16"}).base == {"decoder.width": 16, "decoder.attention.heads": 2}
    assert [name for name, *_ in leaves(mup)] == ["base.decoder.width", "base.decoder.attention.heads"]
    with pytest.raises(SpecError, match="--base.decoder: no entry 'decoder': did you mean decoder.width"):
        override(mup, {"base.decoder.widht": "16"})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"attention": "polygpt.attention.sliding:SlidingWindow"}, "--attention is 'polygpt.*it must be Attention"),
        ({"depth": "3"}, "--depth is '3': it must be int"),
        ({"attention.headz": 3}, "--attention.headz: MultiHead has no field 'headz': did you mean heads"),
    ],
)
def test_a_value_of_another_type_is_told_by_its_name(changes, fault):
    with pytest.raises(SpecError, match=fault):
        replaced(StackSpec(), changes)
