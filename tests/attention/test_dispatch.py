"""The choice of a backend: by platform and size, and in words where one refuses."""

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from problems import NAMES, assert_agrees, problem

from polygpt import sharding, topology
from polygpt.attention import prefix
from polygpt.attention.contract import Context, Dims
from polygpt.attention.kernels import dispatch, reference
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import DECODER, ENCODER, Causal, SameSegment, Sinks, Window
from polygpt.attention.meta import Meta
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.off_by_one import SoftmaxOffByOne
from polygpt.attention.scores import SoftCap
from polygpt.errors import SpecError

WHOLE = SameSegment() & Causal()


def shapes(T: int, S: int | None = None, B: int = 2, d: int = 64, dtype=jnp.bfloat16) -> Operands:
    S = T if S is None else S
    query, key = (Meta(*[jax.ShapeDtypeStruct((B, n), jnp.int32)] * 5) for n in (T, S))
    return Operands(*(jax.ShapeDtypeStruct((B, 2, n, d), dtype) for n in (T, S, S)), query, key)


@pytest.mark.parametrize(
    ("platform", "rule", "operands", "chosen"),
    [
        ("cpu", Rule(DECODER), shapes(511), "reference"),
        ("cpu", Rule(DECODER), shapes(512), "chunked"),
        ("cpu", Rule(DECODER), shapes(1, 8192), "reference"),
        ("cpu", Rule(DECODER), shapes(16, 8192), "chunked"),
        ("tpu", Rule(WHOLE), shapes(384), "reference"),
        ("tpu", Rule(WHOLE), shapes(2048), "library"),
        ("tpu", Rule(WHOLE, SoftCap(3.0)), shapes(2048), "library"),
        ("tpu", Rule(DECODER), shapes(2048), "flex"),
        ("tpu", Rule(ENCODER), shapes(1024), "library"),
        ("tpu", Rule(ENCODER, across=True), shapes(1024), "flex"),
        ("tpu", Rule(WHOLE), shapes(16, 2048), "flex"),
        ("tpu", Rule(DECODER), shapes(1, 2048), "reference"),
        ("gpu", Rule(DECODER), shapes(2048), "library"),
        ("gpu", Rule(DECODER), shapes(2048, dtype=jnp.float32), "chunked"),
        ("gpu", Rule(DECODER, SoftCap(3.0)), shapes(2048), "chunked"),
        ("gpu", Rule(DECODER), shapes(32768, B=1), "library"),
        ("gpu", Rule(DECODER & Window(512)), shapes(32768, B=1), "library"),
        ("gpu", Rule(DECODER & (Window(512) | Sinks(4))), shapes(16384), "library"),
        ("gpu", Rule(DECODER & (Window(512) | Sinks(4))), shapes(32768, B=1), "chunked"),
        ("gpu", Rule(DECODER), shapes(16384, 65536, B=1), "chunked"),
        ("gpu", Rule(DECODER, staged=True), shapes(32768, B=1), "chunked"),
        ("gpu", Rule(DECODER, lse=True), shapes(2048), "chunked"),
        ("tpu", Rule(WHOLE, lse=True), shapes(2048), "flex"),
    ],
)
def test_the_automatic_choice(platform, rule, operands, chosen):
    with dispatch.compiling_for(platform):
        assert dispatch.choose(rule, operands) == chosen


def test_the_platform_is_that_of_the_innermost_context():
    assert dispatch.platform() == "cpu"
    with dispatch.compiling_for("tpu"):
        with dispatch.compiling_for("gpu"):
            assert dispatch.platform() == "gpu"
        assert dispatch.platform() == "tpu"
    assert dispatch.platform() == "cpu"


def test_a_backend_that_refuses_is_replaced_with_one_line_in_the_log(caplog):
    dispatch.warn_fallback.cache_clear()
    rule, operands = Rule(DECODER, SoftCap(3.0)), shapes(32)
    line = (
        "attention: reference instead of library: SoftCap cannot be written as a bias, "
        "which jax.nn.dot_product_attention requires"
    )
    with caplog.at_level(logging.INFO, dispatch.__name__):
        for _ in range(3):
            assert dispatch.choose(rule, operands, "library") == "reference"
        assert [record.getMessage() for record in caplog.records] == [line]
        assert dispatch.choose(rule, shapes(2048), "library") == "chunked"
        assert dispatch.choose(rule, shapes(2048), "library") == "chunked"
    assert [record.getMessage() for record in caplog.records] == [line, line.replace("reference", "chunked")]


def test_no_word_is_said_of_what_was_not_asked_for(caplog):
    with caplog.at_level(logging.DEBUG), dispatch.compiling_for("tpu"):
        assert dispatch.choose(Rule(DECODER), shapes(2048)) == "flex"  # library refuses
        assert dispatch.choose(Rule(DECODER), shapes(2048), "flex") == "flex"
    assert not caplog.records


def test_strict_makes_a_refusal_an_error():
    rule, operands = problem("sigmoid")
    expected = (
        "attention.backend is 'library' and strict is set, but it cannot compute this: "
        "jax.nn.dot_product_attention has no sigmoid normalizer"
    )
    with pytest.raises(SpecError) as error:
        dispatch.attend(rule, operands, "library", strict=True)
    assert str(error.value) == expected
    assert dispatch.choose(*problem("packed"), "chunked", strict=True) == "chunked"


def test_strict_reaches_the_layer():
    from flax import nnx

    spec = MultiHead(2, scores=(SoftCap(2.0),), backend="library", strict=True)
    meta = Meta(*[jnp.ones((1, 4), jnp.int32)] * 5)
    module = spec.build(Dims(8), nnx.Rngs(0))
    with pytest.raises(SpecError, match="cannot be written as a bias"):
        module(jnp.zeros((1, 4, 8)), Context(meta, meta, DECODER))


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_a_backend_refuses_in_one_line_or_not_at_all(backend):
    """That those which do not refuse are equal to the reference is tested in each backend's own file."""
    for platform in ("cpu", "tpu", "gpu"):
        for name in NAMES:
            with dispatch.compiling_for(platform):
                reason = dispatch._module(backend).refuses(*problem(name))
            assert reason is None or ("\n" not in reason and 20 < len(reason) < 160), reason
            if backend in ("reference", "chunked"):
                assert reason is None


def test_every_backend_is_described_and_can_be_asked_for():
    about = dispatch.describe()
    assert list(about) == ["auto", *dispatch.BACKENDS] and all(about.values())
    for backend in about:
        MultiHead(2, backend=backend)


def test_on_a_tpu_the_library_is_said_to_refuse_decoders_and_does():
    about = dispatch.describe()
    assert "not decoders, whose mask has spans" in about["library"]
    assert "flex if that does not apply, as for decoders" in about["auto"]
    with dispatch.compiling_for("tpu"):
        with pytest.raises(SpecError, match="'library' and strict is set, .* the mask looks at spans"):
            dispatch.choose(Rule(DECODER), shapes(2048), "library", strict=True)
        assert dispatch.choose(Rule(DECODER), shapes(2048)) == "flex"


def test_what_uses_the_sum_of_scores_asks_for_it_and_scores_are_computed_once(monkeypatch):
    from flax import nnx

    asked, scored, masked_scores = [], [], reference.masked_scores
    monkeypatch.setattr(dispatch, "choose", lambda rule, *_: asked.append(rule.lse) or "reference")
    monkeypatch.setattr(reference, "masked_scores", lambda *given: scored.append(1) or masked_scores(*given))
    meta = Meta(*[jnp.ones((1, 4), jnp.int32)] * 5)
    for spec in (MultiHead(2), SoftmaxOffByOne(2)):
        module = spec.build(Dims(8), nnx.Rngs(0))
        module(jnp.zeros((1, 4, 8)), Context(meta, meta, DECODER))
        module.weights(jnp.zeros((1, 4, 8)), Context(meta, meta, DECODER))
    prefix.attach(module, 2, (), None, jax.random.key(0))
    module(jnp.zeros((1, 4, 8)), Context(meta, meta, DECODER))
    assert asked == [False, True, True] and len(scored) == 5


# --- several devices --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_over_two_devices_change_nothing():
    """Values as in float64, gradients as on one device; those of terms a head, which both devices add to, too."""
    script = Path(__file__).with_name("rows_on_two_devices.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"packed": [], "table": ["second.table"], "slopes": ["slope"], "gates": []}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'polygpt[tpu]'")
@pytest.mark.parametrize("backend", ["library", "flex"])
def test_kernels_compile_for_rows_over_several_tpus(backend):
    layout = sharding.make_layout(sharding.MeshSpec(), topology.devices("v5e:2x2"))
    rows = layout.sharding(("batch",), (8,))
    operands = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), shapes(1024, B=8))

    def loss(operands):
        return jnp.sum(dispatch.attend(Rule(WHOLE), operands, backend, strict=True)[0].astype(jnp.float32))

    def compiled():
        function = jax.jit(jax.grad(loss, allow_int=True))
        return topology.compiled(function.lower(operands)).as_text()

    with dispatch.compiling_for("tpu"):
        with pytest.raises(NotImplementedError, match="cannot be automatically partitioned"):
            compiled()
        with sharding.use_layout(layout):
            text = compiled()
    assert "tpu_custom_call" in text and "all-gather" not in text, "each device computes its own rows"


@pytest.mark.parametrize("backend", ["chunked", "flex"])
def test_blocks_may_be_made_small_enough_for_a_short_row_to_have_several(backend):
    rule, operands = problem("plain")
    assert dispatch.block() is None
    with dispatch.in_blocks_of(8):
        assert_agrees(lambda rule, operands: dispatch.attend(rule, operands, backend, strict=True), rule, operands)
        jaxpr = str(jax.make_jaxpr(lambda operands: dispatch.attend(rule, operands, backend))(operands))
    whole = str(jax.make_jaxpr(lambda operands: dispatch.attend(rule, operands, backend))(operands))
    assert jaxpr != whole
