"""Specifications: checking, JSON and overrides."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import field
from typing import Literal

import pytest

from polygpt import spec
from polygpt.errors import SpecError
from polygpt.overrides import leaves, override
from polygpt.spec import Spec, counted


@dataclasses.dataclass(frozen=True)
class Norm(Spec):
    epsilon: float = 1e-6
    """Added to the variance."""


@dataclasses.dataclass(frozen=True)
class LayerNorm(Norm):
    bias: bool = True


@dataclasses.dataclass(frozen=True)
class Strict(Spec):
    size: int


@dataclasses.dataclass(frozen=True)
class Net(Spec):
    depth: int = 2
    """Number of layers,
    from the bottom."""
    name: str = "net"
    kind: Literal["wide", "deep"] = "deep"
    rate: float | None = None
    sizes: tuple[int, ...] = (1, 2)
    norm: Norm = Norm()
    norms: tuple[Norm, ...] = ()
    parts: Mapping[str, Norm] = field(default_factory=dict)
    weighted: Mapping[str, tuple[Norm, float]] = field(default_factory=dict)

    def validate(self):
        self.require(self.depth > 0, "depth", "positive")


def test_values_are_checked_against_their_annotations():
    assert Net(rate=1).rate == 1.0 and isinstance(Net(rate=1).rate, float)
    assert Net(sizes=[3, 4]).sizes == (3, 4)
    for wrong, words in [
        ({"depth": "4"}, "Net.depth is '4': it must be int"),
        ({"depth": True}, "Net.depth is True"),
        ({"depth": 0}, "Net.depth is 0: it must be positive"),
        ({"kind": "long"}, "Net.kind is 'long': it must be one of 'wide', 'deep'"),
        ({"rate": "x"}, "it must be float or null"),
        ({"sizes": (1, 2.5)}, r"Net.sizes\[1\] is 2.5"),
        ({"parts": {"a": 1}}, r"Net.parts\['a'\] is 1: it must be Norm"),
        ({"weighted": {"a": (Norm(),)}}, "it must hold 2 values"),
    ]:
        with pytest.raises(SpecError, match=words):
            Net(**wrong)


def test_json_round_trip_is_exact_and_names_classes():
    net = Net(norm=LayerNorm(bias=False), parts={"a": Norm(1e-3)}, norms=(LayerNorm(),), weighted={"w": (Norm(), 2)})
    data = json.loads(json.dumps(spec.to_json(net)))
    assert data["norm"]["class"].endswith(":LayerNorm")
    assert spec.from_json(data) == net


def test_json_is_read_strictly():
    data = spec.to_json(Net())
    with pytest.raises(SpecError, match=r"config.dept: Net has no field 'dept': did you mean depth\?"):
        spec.from_json({**data, "dept": 1})
    with pytest.raises(SpecError, match="Net lacks depth, kind"):
        spec.from_json({key: value for key, value in data.items() if key not in ("depth", "kind")})
    with pytest.raises(SpecError, match="config.norm.gain: Norm has no field .gain.: there are epsilon"):
        spec.from_json({**data, "norm": {**data["norm"], "gain": 1}})
    with pytest.raises(SpecError, match="cannot import 'no_such_module'"):
        spec.from_json({"class": "no_such_module:Net"})
    with pytest.raises(SpecError, match="has no 'Nett': did you mean Net"):
        spec.load_class(f"{__name__}:Nett")
    with pytest.raises(SpecError, match="not a specification"):
        spec.load_class("pathlib:Path")
    with pytest.raises(SpecError, match="is not a class name"):
        spec.load_class("Net")


def test_overrides_reach_every_kind_of_field():
    net = Net(parts={"a": Norm()}, norms=(Norm(), Norm()), weighted={"w": (Norm(), 1.0)})
    changed = override(
        net,
        {
            "depth": "4",
            "rate": "1e-3",
            "sizes": "[5,6,7]",
            "kind": "wide",
            "name": "12",
            "norm.epsilon": "2",
            "norms.1.epsilon": "0.5",
            "parts.a.epsilon": "0.25",
            "weighted.w.1": "3",
        },
    )
    assert (changed.depth, changed.rate, changed.sizes) == (4, 1e-3, (5, 6, 7))
    assert (changed.kind, changed.name) == ("wide", "12")
    assert (changed.norm.epsilon, changed.norms[1].epsilon, changed.parts["a"].epsilon) == (2.0, 0.5, 0.25)
    assert changed.norms[0].epsilon == 1e-6
    assert override(changed, {"rate": "none"}).rate is None
    assert net.depth == 2, "the original is unchanged"


def test_overriding_a_class_keeps_shared_fields():
    net = override(Net(), {"norm.epsilon": "0.5", "norm": f"{__name__}:LayerNorm", "norm.bias": "false"})
    assert net.norm == LayerNorm(epsilon=0.5, bias=False)
    with pytest.raises(SpecError, match="--norm: Strict needs more than its class"):
        override(Net(), {"norm": f"{__name__}:Strict"})


def test_overrides_that_need_each_other_come_in_any_order():
    @dataclasses.dataclass(frozen=True)
    class Range(Spec):
        low: int = 0
        high: int = 1

        def validate(self):
            self.require(self.low < self.high, "low", "below high")

    for changes in ({"low": "5", "high": "9"}, {"high": "9", "low": "5"}):
        assert override(Range(), changes) == Range(5, 9)
    with pytest.raises(SpecError, match=r"Range.low is 5: it must be below high"):
        override(Range(), {"low": "5", "high": "4"})


def test_wrong_overrides_name_the_nearest():
    net = Net(parts={"image": Norm()})
    for name, text, words in [
        ("dept", "1", "--dept: Net has no field 'dept': did you mean depth"),
        ("norm.epsilom", "1", "Norm has no field 'epsilom': did you mean epsilon"),
        ("norm_epsilon", "1", "Net has no field 'norm_epsilon': did you mean norm.epsilon"),
        ("parts.imago.epsilon", "1", "no entry 'imago': did you mean image"),
        ("depth.x", "1", "'x' is not inside 2"),
        ("depth", "four", "--depth is 'four': it must be int"),
        ("depth", "-1", "Net.depth is -1: it must be positive"),
        ("kind", "long", "one of 'wide', 'deep'"),
        ("norms.3.epsilon", "1", "'3' is not inside"),
        ("norm", "1", "--norm is '?1'?: it must be Norm"),
    ]:
        with pytest.raises(SpecError, match=words) as raised:
            override(net, {name: text})
        assert "\n" not in str(raised.value)


def test_leaves_are_what_override_takes_with_help():
    net = Net(parts={"a": LayerNorm()}, norms=(Norm(),))
    found = {name: (value, text) for name, _, value, text in leaves(net)}
    assert found["depth"] == (2, "Number of layers, from the bottom.")
    assert found["parts.a.epsilon"] == (1e-6, "Added to the variance.")
    assert found["parts.a.bias"][0] is True
    assert found["norms.0.epsilon"][0] == 1e-6
    assert "weighted" in found, "an empty mapping is listed as well"
    for name, (value, _) in found.items():
        if not isinstance(value, Spec):
            assert override(net, {name: json.dumps(spec.to_json(value))}) == net


def test_a_users_file_is_loaded_once_and_its_classes_travel(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\nfrom polygpt.spec import Spec\n\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(Spec):\n    size: int = 3\n    '''How big.'''\n"
    )
    module = spec.load_file(file)
    assert spec.load_file(file) is module
    data = spec.to_json(module.Mine(5))
    assert data == {"class": f"{file}:Mine", "size": 5}
    assert spec.from_json(data) == module.Mine(5)
    assert spec.field_help(module.Mine) == {"size": "How big."}


@pytest.mark.parametrize(
    ("source", "words"),
    [("x = 1\n1 / 0\n", "line 2: ZeroDivisionError"), ("x = 1\ny = = 2\n", "line 2: SyntaxError"), (None, "no file")],
)
def test_a_faulty_file_is_one_line_with_the_place(tmp_path, source, words):
    file = tmp_path / "faulty.py"
    if source:
        file.write_text(source)
    with pytest.raises(SpecError, match=words) as raised:
        spec.load_file(file)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)
    if source:  # a mended file is read anew
        file.write_text("x = 2\n")
        assert spec.load_file(file).x == 2


def test_what_is_no_python_file_is_told(tmp_path):
    text = tmp_path / "README.md"
    text.write_text("# no code\n")
    with pytest.raises(SpecError, match="README.md is not a Python file: name one"):
        spec.load_file(text)
    with pytest.raises(SpecError, match="is a folder: name a Python file in it"):
        spec.load_file(tmp_path)


def test_one_is_singular():
    assert [counted(n, "host") for n in (0, 1, 1000)] == ["0 hosts", "1 host", "1,000 hosts"]
    assert counted(2, "microbatch", "microbatches") == "2 microbatches"
