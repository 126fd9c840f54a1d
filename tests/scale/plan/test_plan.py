"""Plans of a tiny model on a slice of each TPU generation, beside those that are committed; a search; the command."""

import importlib.metadata
import importlib.util
import json
import math
import time
from pathlib import Path

import jax
import pytest
import tiny

from polygpt.blocks.cross import CrossSequential
from polygpt.blocks.pipeline import Schedule
from polygpt.cli.main import main
from polygpt.errors import UserError
from polygpt.models.encoder_decoder import EncoderDecoder
from polygpt.overrides import override
from polygpt.scale.plan import chips, compilation, search
from polygpt.scale.plan.candidates import candidates, current, smaller
from polygpt.scale.plan.check import TOLERANCE, compare
from polygpt.scale.plan.compilation import Built
from polygpt.scale.plan.facts import facts, mesh_facts
from polygpt.scale.plan.memory import Memory
from polygpt.scale.plan.pictures import draw_plan
from polygpt.scale.plan.plan import plan
from polygpt.scale.plan.prediction import predict
from polygpt.scale.plan.tables import headline, markdown, searched, tables
from polygpt.scale.plan.target import Target, target
from polygpt.sharding import AXES, MeshSpec

HERE = Path(__file__).parent
PLANS = HERE.parents[2] / "experiments" / "plans"
SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture
def hasty():
    """Lets the compiler spend less time on what it makes; not for a tpu7x, at whose collectives it then fails."""
    yield lambda: jax.config.update("jax_exec_time_optimization_effort", -1.0)
    jax.config.update("jax_exec_time_optimization_effort", 0.0)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
def test_a_tiny_model_takes_no_more_than_it_did(name, hasty):
    if not name.startswith("tpu7x"):
        hasty()
    made = plan(tiny.experiment(), target(name))
    assert made.memory.fits and not made.warnings
    assert {kernel.partition(".")[0] for kernel in made.kernels} >= {"flex_forward", "flex_backward_query"}
    kinds = {(one.collective.kind, one.collective.axes) for one in made.collectives}
    assert ("all-reduce", ("tensor",)) in kinds and ("all-gather", ("fsdp",)) in kinds
    assert 0 < made.roofline.ceiling < 1 and made.roofline.executed > made.roofline.useful
    print(f'"{name}": {{"memory": {made.memory.total}, "sent": {made.sent}}}')
    committed = json.loads((HERE / "tiny.json").read_text())
    if committed["libtpu"] != importlib.metadata.version("libtpu"):
        pytest.skip("committed by another compiler, which has other figures")
    then = committed["plans"][name]
    assert made.memory.total <= (1 + TOLERANCE) * then["memory"]
    assert made.sent <= (1 + TOLERANCE) * then["sent"]


@needs_libtpu
@pytest.mark.slow
def test_a_pipeline_is_predicted_as_well_as_a_mesh_without(hasty):
    """What stages compute in their bubble, to 5 %: the same share of the compiled FLOPs is foreseen with them as
    without. What they keep for the backward pass, and send, within a factor of two."""
    hasty()
    here, base = target("v5e:2x4"), tiny.experiment()
    decoder = base.model.decoder.replace(depth=8, remat="dots")
    base = base.replace(data=base.data.replace(batch_size=64), model=base.model.replace(decoder=decoder))
    meshes = (
        MeshSpec(data=1, fsdp=8),
        MeshSpec(data=1, fsdp=2, stage=4, microbatches=8),
        MeshSpec(data=1, fsdp=4, stage=2, microbatches=8, repeats=2),
    )
    shares = []
    for mesh in meshes:
        experiment = base.replace(train=base.train.replace(mesh=mesh))
        known = facts(experiment, here)
        foreseen, made = predict(experiment, known, here, mesh_facts(mesh, known)), plan(experiment, here)
        pairs = {
            name: (getattr(foreseen.roofline, name), getattr(made.roofline, name)) for name in ("links", "in_turn")
        }
        pairs |= {"temporaries": (foreseen.temporaries, made.memory.temporaries)}
        ratios = {name: guess / real for name, (guess, real) in pairs.items()}
        shares.append(foreseen.roofline.executed / made.roofline.executed)
        print(f"stage {mesh.stage}, repeats {mesh.repeats}: {ratios}, FLOPs {shares[-1]:.3f}")
        # Without stages all that is sent are matrices, so small here that they are padded to twice their size.
        held = ratios if mesh.stage > 1 else {"temporaries": ratios["temporaries"]}
        assert all(0.5 < ratio < 2 for ratio in held.values())
    assert 0.8 < shares[0] < 1 and shares[1:] == pytest.approx([shares[0]] * 2, rel=0.05)


def committed_plans() -> list:
    """Each with its marker: the smallest preset compiles in seconds, a large one in minutes."""
    found = []
    for path in sorted(PLANS.glob("*/*.json")):
        marker = pytest.mark.slow if path.parent.name == "1m" else pytest.mark.plans
        found.append(pytest.param(path, marks=marker, id=str(path.relative_to(PLANS))))
    return found


@needs_libtpu
@pytest.mark.parametrize("path", committed_plans())
def test_a_preset_takes_no_more_than_its_committed_plan(path, monkeypatch):
    if json.loads(path.read_text())["versions"]["libtpu"] != importlib.metadata.version("libtpu"):
        pytest.skip("committed by another compiler, which has other figures")
    monkeypatch.chdir(PLANS.parents[1])
    compared = compare(path)
    assert not compared.regressions, compared


@needs_libtpu
def test_a_search_compiles_the_most_promising_and_learns(monkeypatch):
    """Here what is compiled takes half as long again as predicted, and without remat does not fit at all."""
    compiled = []

    def pretended(experiment, on, limit):
        (way,) = (way for way in ways if way.candidate.apply(experiment) == experiment)
        compiled.append(way.candidate)
        if way.candidate.remat == "none":
            return {"memory": None, "exhausted": {"temporaries": 2 * on.usable}, "roofline": None}
        roofline = {name: 1.5 * value for name, value in vars(way.prediction.roofline).items()}
        roofline |= {"step": 1.5 * way.prediction.roofline.step, "serial": 1.5 * way.prediction.roofline.serial}
        parts = dict.fromkeys(("parameters", "optimizer", "batch", "padding", "output", "program"), 0.0)
        memory = parts | {"temporaries": 1e6, "total": 1e6, "usable": on.usable, "fits": True}
        return {"memory": memory, "roofline": roofline | {"mfu_ceiling": 0.1}}

    chosen, on = tiny.experiment(), target("v5e:2x2")
    ways = []
    real = search._predicted
    monkeypatch.setattr(search, "_predicted", lambda *arguments: ways.extend(real(*arguments)) or ways)
    monkeypatch.setattr(search, "plan_in_subprocess", pretended)
    found = search.search(chosen, on, 60, lambda line: None, at_once=1)
    assert found.best is not None and found.best.candidate.remat != "none"
    assert len(compiled) < len(found.trials) and len(set(map(repr, compiled))) == len(compiled)
    assert all(found.rank(found.best) <= found.rank(way) for way in found.compiled if way.fits)


@needs_libtpu
@pytest.mark.parametrize(
    "parallel, mesh",
    [("sharded", {"data": 8}), ("auto", {"data": 2, "fsdp": 4}), ("pmap", {"data": 8}), ("single", {})],
)
def test_of_a_program_that_does_not_fit_the_nearest_changes_are_ways_to_run(monkeypatch, parallel, mesh):
    """However it ran: three sets of changes, the smallest first, each of which this very slice can run."""
    on, spec = target("v5e:2x4"), MeshSpec(**mesh) if parallel == "sharded" else MeshSpec()
    chosen = tiny.experiment()
    chosen = chosen.replace(
        data=chosen.data.replace(batch_size=64), train=chosen.train.replace(parallel=parallel, mesh=spec)
    )
    monkeypatch.setattr(search, "plan_in_subprocess", lambda experiment, on, limit: {
        "memory": dict.fromkeys(("temporaries", "padding", "output", "program", "total"), 1e6) | {"fits": True},
        "roofline": None,
    })  # fmt: skip
    data = {"memory": None, "exhausted": {"temporaries": 2 * on.usable}, "roofline": None, "settings": {"mesh": mesh}}
    answers = search.nearest(chosen, on, data, 60, lambda line: None)
    assert len(answers) == 3 and [len(one["change"]) for one in answers] == sorted(
        len(one["change"]) for one in answers
    )
    assert len({tuple(one["change"]) for one in answers}) == 3 and all(one["compiled"] for one in answers)
    for one in answers:
        made = override(chosen, one["overrides"])
        assert made != chosen and compilation.prepare(made, on).parallel.layout.mesh.size == 8


@needs_libtpu
def test_logits_take_the_memory_of_a_block():
    chosen, on = tiny.experiment(), target("v5e:2x2")
    known, here = facts(chosen, on), mesh_facts(current(chosen, 4).mesh, facts(chosen, on))
    positions = chosen.data.batch_size * chosen.data.layout.seq_len / here.layout.size("batch")
    made = [chosen.replace(model=chosen.model.replace(logits_block=block)) for block in (None, 4, 10**6, "auto")]
    whole, some, more, automatic = (predict(one, known, on, here) for one in made)
    assert some.head == whole.head * 4 / positions and more.head == whole.head == automatic.head
    assert some.roofline.memory == whole.roofline.memory


@needs_libtpu
def test_devices_wait_for_the_one_with_the_most_attention():
    chosen, on = tiny.experiment(), target("v5e:2x2")
    chosen = chosen.replace(data=chosen.data.replace(layout=chosen.data.layout.replace(seq_len=1024)))
    known = facts(chosen, on)

    def predicted(order):
        mesh = MeshSpec(data=1, sequence=4, order=order)
        return predict(chosen.replace(train=chosen.train.replace(mesh=mesh)), known, on, mesh_facts(mesh, known))

    even, uneven = predicted("zigzag"), predicted("contiguous")
    assert even.causal_share == pytest.approx(1.0) and uneven.causal_share == pytest.approx(7 / 4, rel=1e-3)
    (scores,) = (line.forward for line in known.flops.lines if line.name == "decoder, attention")
    more = (uneven.causal_share - 1) * 4.7 * scores / 4  # forward 1; backward 7 products for 2
    assert uneven.roofline.executed - even.roofline.executed == pytest.approx(more, rel=1e-3)


@needs_libtpu
def test_the_next_of_tens_of_thousands_of_ways_is_found_in_seconds():
    """All are looked at once for it, and not once for each: that would take hours here."""
    chosen, on = tiny.experiment(), target("v5e:2x2")
    known, now = facts(chosen, on), current(chosen, 4)
    prediction = predict(chosen, known, on, mesh_facts(now.mesh, known))
    found = search.SearchResult(chosen, on, [search.Trial(now, prediction) for _ in range(30_000)])
    parts = dict.fromkeys(("temporaries", "padding", "output", "program", "total"), 1e6)
    roofline = vars(prediction.roofline) | {"step": 9.0, "serial": 9.0}
    found.trials[0].data = {"memory": parts | {"fits": True}, "roofline": roofline}
    begun = time.process_time()
    assert found.next() is found.trials[1]
    assert time.process_time() - begun < 10


@needs_libtpu
def test_ways_to_run_divide_the_devices_and_their_overrides_make_them():
    chosen, on = tiny.experiment(), target("v5e:2x2")
    ways = list(candidates(chosen, on))
    for way in [*ways, *(way for some in smaller(current(chosen, 4)).values() for way in some)]:
        assert math.prod(getattr(way.mesh, axis) for axis in AXES) == 4
        assert override(chosen, way.overrides(chosen)) == way.apply(chosen)
    assert {way.remat for way in ways} == {"none", "dots", "full"} and {way.mesh.tensor for way in ways} == {1, 2}
    # Its two blocks make a pipeline of two stages, without rounds, whose microbatches divide the rows.
    piped = [way for way in ways if way.schedule]
    assert {(way.mesh.stage, way.schedule.stages, way.schedule.repeats) for way in piped} == {(2, 2, 1)}
    assert {way.schedule.microbatches for way in piped} == {2, 4, 8}
    for way in piped[::7]:
        made = compilation.prepare(way.apply(chosen), on)  # which checks rows, blocks and heads
        assert Schedule.of(made.parallel.layout) == way.schedule
    assert piped[0].overrides(piped[0].apply(chosen)) == {}
    unscanned = override(chosen, {"model.decoder.scan": "false"})
    assert all(way.mesh.stage == 1 for way in candidates(unscanned, on))


@needs_libtpu
def test_an_encoder_is_planned_like_the_decoder():
    chosen, on = tiny.experiment(), target("v5e:2x2")
    data = chosen.data.replace(layout=chosen.data.layout.replace(prompt_span="bidirectional"))
    encoder = chosen.model.decoder.replace(depth=3, mask="bidirectional")
    model = EncoderDecoder(chosen.model.decoder.replace(block=CrossSequential()), encoder=encoder, dtype="bfloat16")
    chosen = chosen.replace(data=data, model=model)
    assert all(way.mesh.stage == 1 for way in candidates(chosen, on)), "no stages divide two blocks and three"
    known, mesh = facts(chosen, on), current(chosen, 4).mesh
    both = predict(chosen, known, on, mesh_facts(mesh, known))
    chosen = chosen.replace(model=model.replace(encoder=encoder.replace(depth=6)))
    known_deeper = facts(chosen, on)
    deeper = predict(chosen, known_deeper, on, mesh_facts(mesh, known_deeper))
    lines, more = ({line.name: line.forward for line in own.flops.lines} for own in (known, known_deeper))
    doubled = {"encoder, matrices", "encoder, attention"}
    assert {name for name in lines if more[name] == 2 * lines[name]} == doubled
    assert both.activations < deeper.activations < 2 * both.activations and both.state < deeper.state


def test_the_command_prints_writes_and_says_what_is_not_known(tmp_path, capsys):
    changes = {"train.mesh.tensor": "1", "data.layout.seq_len": "32", "model.decoder.width": "32"}
    words = ["plan", str(HERE / "tiny.py"), "--on", "cpu:1", "--output", str(tmp_path), "--json"]
    assert main([*words, *(f"--{name}={value}" for name, value in changes.items())]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["memory"]["fits"] and data["roofline"] is None and "not published" in data["estimated"]
    assert data["changes"] == changes and data["settings"]["mesh"] == {}
    assert json.loads((tmp_path / "plan.json").read_text())["flops"] == data["flops"]
    assert headline(data) in (tmp_path / "plan.md").read_text() and (tmp_path / "plan.png").stat().st_size > 10_000
    assert markdown(data).count("\n## ") >= 2


def test_on_a_cpu_no_times_are_given_and_no_column_is_nameless(monkeypatch):
    on = target("cpu:8")
    memory = Memory(2**20, 2**20, 2**20, 0, 2**20, 0, 0, on.usable)
    built = Built(STAND_IN, memory, None, 1.0, {"data": 1, "fsdp": 8}, None, 258, [None] * 8)
    monkeypatch.setattr(compilation, "build", lambda experiment, target: built)
    monkeypatch.setattr(Target, "prepare", lambda self: None)
    data = json.loads(json.dumps(plan(tiny.experiment(), on).to_json()))
    found = {table.title: table for table in tables(data)}
    (exchanges,) = (table for title, table in found.items() if title.startswith("Collectives"))
    assert "GB sent" in exchanges.columns and "ms" not in exchanges.columns
    assert all(len(row) == len(table.columns) for table in found.values() for row in table.rows)
    assert all(column for table in found.values() for column in table.columns)


@pytest.mark.parametrize(("text", "share"), [(None, 0.75), ("0.92", 0.92), ("1", 1.0)])
def test_a_gpu_has_the_memory_that_jax_reserves_there(monkeypatch, text, share):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    if text:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", text)
    assert target("h100:8").usable == share * 80e9 and f"{share:.0%} of a GPU" in target("h100:8").estimated
    assert target("v5e:2x2").usable == 15.75 * 2**30


@pytest.mark.parametrize("text", ["0", "1.5", "most"])
def test_a_share_of_memory_that_is_none_is_an_error(monkeypatch, text):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", text)
    with pytest.raises(UserError, match="XLA_PYTHON_CLIENT_MEM_FRACTION is '.*': it must be a number above 0"):
        target("h100:8")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--on", "v9:2x2"], "unknown chip"),
        (["--on", "v5e:3x3"], "accepted for v5e are"),
        (["--on", "cpu:1", "--budget", "0"], "must be positive"),
        (["--on", "cpu:1", "--search"], "--search ranks by time, which --on cpu:1"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(words, said, capsys):
    assert main(["plan", str(HERE / "tiny.py"), *words]) == 2
    assert said in capsys.readouterr().err


STAND_IN = """\
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (a: f32[1000,1000], b: f32[1000,1000]) -> f32[1000,1000] {
  %a = f32[1000,1000]{1,0} parameter(0)
  %b = f32[1000,1000]{1,0} parameter(1)
  %dot = f32[1000,1000]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = f32[1000,1000]{1,0} all-reduce(%dot), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, \
use_global_device_ids=true, to_apply=%add
}
"""


def test_of_a_gpu_nothing_is_said_that_rests_on_the_bytes_of_a_cpus_program(monkeypatch, tmp_path):
    for name in chips.FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    on = target("h100:8")
    memory = Memory(2**30, 2**31, 2**20, 0, 2**32, 0, 0, on.usable)
    mesh = {"data": 1, "fsdp": 8}
    built = Built(STAND_IN, memory, None, 1.0, mesh, None, 258, [None] * 8)
    monkeypatch.setattr(compilation, "build", lambda experiment, target: built)
    monkeypatch.setattr(Target, "prepare", lambda self: None)
    chosen = tiny.experiment()
    data = json.loads(json.dumps(plan(chosen, on).to_json()))
    useful = data["flops"]["useful"] / 8 / 989.4e12
    assert data["roofline"] is None and data["stand_in"]["useful"] == pytest.approx(useful)
    assert data["stand_in"]["links"] == pytest.approx(2 * 7 / 8 * 4e6 / 450e9)
    text = markdown(data)
    assert not any(words in text for words in ("HBM", "bound by", "MFU ceiling", "async", "compiled program"))
    assert "parameters and optimizer state need 3.00 GiB; estimated total 7.00 GiB of 55.88 GiB" in text
    assert "no roofline and no ceiling of the MFU" in text and "| all-reduce | fsdp (8) | 1 |" in text
    assert "activations, gradients and other temporaries (CPU program)" in text
    draw_plan(data, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_search_for_gpus_has_no_ceilings_and_says_that_times_are_predicted():
    found = search.SearchResult(tiny.experiment(), target("h100:8"), [])
    table = searched(found)
    assert "MFU ceiling" not in table.columns and "predicted, also of compiled candidates" in table.notes[0]
    assert "MFU ceiling" in searched(search.SearchResult(tiny.experiment(), target("v5e:2x2"), [])).columns
