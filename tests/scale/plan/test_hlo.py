"""Reading compiled programs: what runs how often, FLOPs beside XLA's own, exchanges in every notation of groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.scale.plan import collectives, hlo, work

MESH = {"data": 2, "fsdp": 4}


def program(function, *shapes):
    """The compiled program of a function of float32 arrays, and what it was read from."""
    compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    return hlo.parse(compiled.as_text()), compiled


def test_a_product_in_nested_loops_counts_as_often_as_it_runs():
    def step(w_LDD, x_BD):
        def outer(x_BD, _):
            return jax.lax.scan(lambda x_BD, w_DD: (jnp.tanh(x_BD @ w_DD), None), x_BD, w_LDD)

        return jax.lax.scan(outer, x_BD, length=5)

    read, _ = program(step, (3, 16, 16), (8, 16))
    assert read.unknown == ()
    assert work.products(read) == 5 * 3 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    "stride, padding, lhs, rhs, size",
    [((1,), "SAME", (1,), (1,), 3), ((2,), "VALID", (1,), (1,), 4), ((1,), [(2, 1)], (3,), (1,), 2),
     ((3,), [(1, 2)], (1,), (2,), 3)],
)  # fmt: skip
def test_a_convolution_counts_as_xla_counts_it(stride, padding, lhs, rhs, size):
    def convolve(x_BIT, w_OIS):
        return jax.lax.conv_general_dilated(x_BIT, w_OIS, stride, padding, lhs, rhs)

    read, compiled = program(convolve, (2, 3, 17), (5, 3, size))
    if not any(run.instruction.opcode == "convolution" for run in read.executed()):
        pytest.skip("this compiler has made a call of it")
    assert work.products(read) == compiled.cost_analysis()["flops"]


def test_traffic_is_what_is_read_and_written():
    read, _ = program(lambda x, y: jnp.tanh(x) + y[:4], (4, 1024), (64, 1024))
    assert work.traffic(read) == pytest.approx(3 * 4 * 1024 * 4)  # of y the cut alone


TEXT = """\
HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}}

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %p = (s32[], f32[8,128]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%p), index=1
  {inside}
  ROOT %out = (s32[], f32[8,128]{{1,0}}) tuple(%next, %x)
}}

%condition (p: (s32[], f32[8,128])) -> pred[] {{
  %p = (s32[], f32[8,128]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %end = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8,128]{{1,0}}) tuple(%zero, %x)
  %loop = (s32[], f32[8,128]{{1,0}}) while(%begin), condition=%condition, body=%body
  ROOT %last = f32[8,128]{{1,0}} get-tuple-element(%loop), index=1
}}
"""


def exchanges(inside: str, mesh=MESH) -> list[collectives.Collective]:
    """Those of a loop of seven rounds around an instruction."""
    return collectives.collectives(hlo.parse(TEXT.format(inside=inside)), mesh)


@pytest.mark.parametrize(
    "groups, axes, first",
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp",), (0, 1, 2, 3)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), (0, 4)),
        ("[2,4]<=[8]", ("fsdp",), (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", ("data",), (0, 4)),
        ("[1,8]<=[8]", ("data", "fsdp"), tuple(range(8))),
        ("mesh['a'=2,'b'=4] {'b'}", ("fsdp",), (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",), (0, 4)),
        ("{}", ("data", "fsdp"), tuple(range(8))),
    ],
)
def test_groups_are_read_in_every_notation(groups, axes, first):
    (one,) = exchanges(
        f"%g = f32[8,512] all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{1}}, "
        "use_global_device_ids=true"
    )
    assert one.axes == axes and one.group == first and one.times == 7
    n, own = len(first), 8 * 128 * 4
    assert one.payload == n * own and one.sent_per_step == 7 * (n - 1) * own


def test_each_kind_sends_what_its_formula_says():
    own, groups = 8 * 128 * 4, "replica_groups={{0,1,2,3},{4,5,6,7}}"

    def sent(text):
        (one,) = exchanges(text)
        return one.kind, one.sent

    assert sent(f"%r = f32[8,128] all-reduce(%x), {groups}, to_apply=%add") == ("all-reduce", 2 * own * 3 / 4)
    assert sent(f"%r = f32[2,128] reduce-scatter(%x), {groups}, to_apply=%add") == ("reduce-scatter", own * 3 / 4)
    assert sent(f"%r = f32[8,128] all-to-all(%x), {groups}") == ("all-to-all", own * 3 / 4)
    pairs = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    assert sent(f"%r = f32[8,128] collective-permute(%x), {pairs}") == ("collective-permute", own)


def test_beginning_and_end_of_an_asynchronous_exchange_are_one():
    found = exchanges(
        "%s = (f32[8,128], f32[8,512]) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}\n"
        "  %d = f32[8,512] all-gather-done(%s)"
    )
    assert [(one.times, one.hidden) for one in found] == [(7, True)]


def test_kernels_are_named_though_their_metadata_breaks_the_line():
    text = TEXT.format(
        inside='%flex_forward.3 = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"xprof":"{}"\n}}, metadata={op_name="jit(step)/pallas_call"}'
    )
    assert collectives.kernels(hlo.parse(text)) == {"flex_forward": 7}


def test_the_kernels_products_are_those_of_whole_blocks():
    heads = "bf16[2,4,1024,64]"
    lines = "\n  ".join(f"%{name} = {heads} broadcast(%i), dimensions={{}}" for name in "qkv")
    call = f'%flex_forward.1 = {heads} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call"'
    flops = work.kernel_flops(hlo.parse(TEXT.format(inside=f"{lines}\n  {call}")))
    scores = np.prod([2, 4, 1024, 1024, 64]) * 2 * 2
    assert flops == {"flex_forward": 7 * scores * 3 / 4}  # of 2 x 2 blocks of 512 one is above the diagonal
    uneven = work.kernel_flops(hlo.parse(TEXT.format(inside=f"{lines}\n  {call}")), causal_share=1.2)
    assert uneven == {"flex_forward": pytest.approx(7 * scores * 0.9)}
