"""`polygpt attention show` and `bench`: whose fields are set, what the figures mean, what a picture leaves out."""

import dataclasses
import json

import pytest

from polygpt.attention.block_sparse import BlockSparse
from polygpt.attention.masks import DECODER
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.retention import Retention
from polygpt.cli import attention_bench, variant
from polygpt.cli.main import main
from polygpt.lab import bench, drawing, probe
from polygpt.lab.subject import seen_by

OWN = """import dataclasses
import jax
import jax.numpy as jnp
import polygpt.api as pg
from polygpt.attention.kernels import reference
from polygpt.attention.multi_head import MultiHeadModule

@dataclasses.dataclass(frozen=True)
class Best(pg.MultiHead):
    block: int = 4
    "How many keys a query takes."
    layout: str = "dense"
    "A name that `show` has for something else."

    def build(self, dims, rngs):
        return BestModule(self, dims, rngs)

class BestModule(MultiHeadModule):
    def attend(self, rule, operands):
        weights = self.weigh(rule, operands)
        return reference.weighted_values(weights, operands.value_BKSe), jnp.zeros(weights.shape[:3])

    def weigh(self, rule, operands):
        score, visible = reference.masked_scores(rule, operands)
        least = jax.lax.top_k(score, self.spec.block)[0][..., -1:]
        return reference.normalized(rule, jnp.where(score >= least, score, reference.LOWEST), visible)

@dataclasses.dataclass(frozen=True)
class Boastful(pg.MultiHead):
    def score_flops(self, width, keys):
        return 1.0 * keys
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def run(capsys, *words):
    assert main(["attention", *words, "--json"]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_a_field_called_block_is_the_variants_own(own, capsys):
    words = ["show", "polygpt.attention.block_sparse:BlockSparse", "--around", "0", "--shared", "0", "--layout", "16"]
    found, err = run(capsys, *words, "--block", "2", "--block-size", "4")
    assert found["seen"] == 8 * 3, "eight blocks of two positions, causal"
    assert found["blocks"]["map"] == {"empty": 12, "partial": 4, "full": 0}, "of four positions each"
    assert "is an option" not in err


def test_a_field_with_the_name_of_an_option_is_told_and_can_be_set(own, capsys):
    found, err = run(capsys, "show", "own.py:Best", "--layout", "8", "--spec.layout", "sparse", "--spec.block", "8")
    assert found["positions"] == 8 and "--spec.layout sets the field of Best" in err
    assert "sparse" in str(found["picture"])
    assert main(["attention", "show", "own.py:Best", "--spec.nothing", "1"]) == 2
    assert "neither an option nor a field of Best" in capsys.readouterr().err


def test_what_is_selected_from_data_is_told(own, capsys):
    found, _ = run(capsys, "show", "own.py:Best", "--layout", "32")
    assert "depends on data" in found["remark"] and "upper bound" in found["remark"]
    found, _ = run(capsys, "show", "own.py:Best", "--layout", "4")
    assert found["remark"] is None, "all keys of so short a row are taken"


def test_a_declared_upper_bound_is_told_for_any_row():
    @dataclasses.dataclass(frozen=True)
    class Declared(MultiHead):
        """Says of itself that inputs decide."""

        mask_is_bound = True

    spec = Declared()
    assert "an upper bound (mask_is_bound)" in probe.remark(spec, seen_by(spec), drawing.read_row("4"))


@pytest.mark.parametrize("spec", [MultiHead(), BlockSparse(block=4)])
def test_a_mask_that_says_all_has_no_remark(spec):
    row = drawing.read_row("6 image:4 8 | 9 pad:2")
    assert probe.remark(spec, seen_by(spec), row) is None


def test_what_has_no_mask_and_what_cannot_be_built_are_told(tmp_path):
    row = drawing.read_row("6 image:4 8")
    assert "has no mask" in probe.remark(Retention(), seen_by(Retention()), row)
    odd = MultiHead(head_width=3)  # rotary positions need even heads
    assert "not probed" in probe.remark(odd, seen_by(odd), row)
    assert "1,024" in probe.remark(MultiHead(), DECODER, drawing.read_row("1025"))


def test_the_share_without_influence_is_that_of_the_pairs_shown(own):
    from polygpt.spec import load_class

    row = drawing.read_row("24")
    share = probe.silent(load_class("own.py:Best")(heads=1, block=1), DECODER, row)
    shown = 24 * 23 / 2
    assert (shown - 23) / shown <= share < 1, "one key for each of 23 queries, which may be the query itself"


def test_the_benchmark_sets_fields_of_both_and_says_where_they_differ(own, capsys):
    other = "polygpt.attention.multi_head:MultiHead"
    words = ["bench", other, "--heads", "4", "--kv_heads", "1", "--against", other, "--against.heads", "2"]
    found, _ = run(capsys, *words, "--lengths", "16", "--model_width", "64")
    assert found["remarks"] == [
        "MultiHead and MultiHead (against) differ in heads: 4 and 2",
        "MultiHead and MultiHead (against) differ in kv_heads: 1 and None",
    ]
    one, rival = (
        {cost["kind"]: cost for cost in found["costs"] if cost["variant"] == name}
        for name in ("MultiHead", "MultiHead (against)")
    )
    assert one["decode"]["gflops"] == pytest.approx(1e-9 * (2 * 64 * (64 + 16 + 16 + 64) + 4 * 64 * 16))
    assert rival["decode"]["gflops"] == pytest.approx(1e-9 * (2 * 4 * 64 * 64 + 4 * 64 * 16))
    assert one["decode"]["moved"] < rival["decode"]["moved"], "a quarter of the keys and values"
    for cost in found["costs"]:
        assert cost["fastest"] <= cost["seconds"] <= cost["slowest"]
        assert cost["whole"] and cost["counted"] == pytest.approx(cost["gflops"], rel=0.4)
    assert main(["attention", "bench", other, "--against.heads", "2"]) == 2
    assert "--against.heads" in capsys.readouterr().err


@pytest.mark.slow
def test_the_signs_in_the_table_of_the_benchmark_are_explained(own, capsys):
    other = "polygpt.attention.multi_head:MultiHead"
    words = [other, "--backend", "chunked", "--lengths", "16", "--model_width", "16"]
    assert main(["attention", "bench", *words, "--against", other]) == 0
    table, _, legend = capsys.readouterr().out.partition("\n+: or more")
    assert "+" in table and "relative speed" in table and "relative speed: that of MultiHead is 1" in legend


def test_a_formula_that_the_compiled_program_refutes_is_told(own, capsys):
    found, _ = run(capsys, "bench", "own.py:Boastful", "--lengths", "256", "--model_width", "64")
    assert any("Boastful: score_flops() " in remark and "check the formula" in remark for remark in found["remarks"])
    decode = next(cost for cost in found["costs"] if cost["kind"] == "decode")
    assert decode["counted"] == pytest.approx(1e-9 * (2 * 4 * 64 * 64 + 4 * 64 * 256), rel=0.2)


def test_pictures_of_other_fields_and_sizes_have_other_names():
    words = attention_bench.parser("polygpt attention bench", "measures")
    given = [["--window", "4"], ["--window", "2"], ["--window", "2", "--lengths", "8,16"], ["--spec.window", "2"]]
    read = [words.read(["polygpt.attention.sliding:SlidingWindow", *some]) for some in given]
    names = [variant.picture([arguments.variant, arguments.against], arguments, "bench") for arguments in read]
    assert len(set(names)) == 3 and names[1] == names[3] == "runs/SlidingWindow-window-2-bench.png"
    far = words.read(["own.py:Best", "--fields", "x" * 300])
    assert len(variant.picture(["own.py:Best"], far, "bench")) < 140


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 "), (131, "131 "), (655_360, "655 k"), (999_960, "1 M"), (1.0742e9, "1.07 G")]
)
def test_flops_keep_three_digits(count, text):
    assert bench.flops_text(count) == text


def test_a_loop_makes_the_compiled_count_a_lower_bound(own):
    spec = MultiHead(backend="chunked")
    (forward,), _, (decode,) = bench.compare({"chunked": spec}, (16,), 16, 1, "float32")
    assert not forward.whole and not decode.whole


def test_properties_whose_names_have_commas_can_be_chosen(capsys):
    only = "causality,packed in any order, long rows, nothing"
    assert main(["attention", "check", "polygpt.attention.multi_head:MultiHead", "--only", only]) == 2
    assert "--only nothing: no such property" in capsys.readouterr().err
