"""FLOPs and bytes of fragments of programs that the TPU compiler made, beside what a hand counts."""

import re

import jax
import jax.numpy as jnp
import pytest

from polygpt.attention.kernels import dispatch, flex
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import DECODER, ENCODER
from polygpt.attention.meta import Meta
from polygpt.scale.plan import hlo, work


def traffic(entry: str, computations: str = "") -> float:
    """Bytes of a program of these lines."""
    return work.traffic(hlo.parse(f"{computations}\nENTRY %main (x: s32[]) -> s32[] {{\n{entry}\n}}\n"))


# --- loops

WINDOWED = """\
%body (p: (bf16[16,64], bf16[64,32], u32[])) -> (bf16[16,64], bf16[64,32], u32[]) {
  %p = (bf16[16,64]{1,0}, bf16[64,32]{1,0}, u32[]{:T(128)}) parameter(0)
  %x = bf16[16,64]{1,0} get-tuple-element(%p), index=0
  %w = bf16[64,32]{1,0} get-tuple-element(%p), index=1
  %n = u32[]{:T(128)} get-tuple-element(%p), index=2
  %one = bf16[16,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %other = bf16[16,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%n, %two), metadata={op_name="jit(split_step)/jvp()/dot_general"}
  ROOT %out = (bf16[16,64]{1,0}, bf16[64,32]{1,0}, u32[]{:T(128)}) tuple(%x, %w, %next)
}

%condition (p: (bf16[16,64], bf16[64,32], u32[])) -> pred[] {
  %end = u32[]{:T(128)} constant(4), metadata={op_name="jit(split_step)/jvp()/dot_general"}
  %p = (bf16[16,64]{1,0}, bf16[64,32]{1,0}, u32[]{:T(128)}) parameter(0)
  %n = u32[]{:T(128)} get-tuple-element(%p), index=2, metadata={op_name="jit(split_step)/jvp()/dot_general"}
  ROOT %less = pred[]{:T(512)} compare(%n, %end), direction=LT
}

ENTRY %main (x: bf16[16,64], w: bf16[64,32]) -> u32[] {
  %x = bf16[16,64]{1,0} parameter(0)
  %w = bf16[64,32]{1,0} parameter(1)
  %zero = u32[]{:T(128)} constant(0)
  %begin = (bf16[16,64]{1,0}, bf16[64,32]{1,0}, u32[]{:T(128)}) tuple(%x, %w, %zero)
  %loop = (bf16[16,64]{1,0}, bf16[64,32]{1,0}, u32[]{:T(128)}) while(%begin), condition=%condition, body=%body
  ROOT %last = u32[]{:T(128)} get-tuple-element(%loop), index=2
}
"""


def test_a_loop_that_counts_by_twos_runs_half_as_often():
    """The TPU compiler multiplies two shards a round while others are on their way: 4 shards are 2 rounds."""
    assert work.products(hlo.parse(WINDOWED)) == 4 * (2 * 16 * 64 * 32)
    fused = WINDOWED.replace("add(%n, %two)", "fusion(%n, %two), kind=kLoop, calls=%added")
    added = """\
%added (n: u32[], two: u32[]) -> u32[] {
  %n = u32[] parameter(0)
  %step = u32[] constant(2)
  ROOT %sum = u32[] add(%n, %step)
}
"""
    assert work.products(hlo.parse(f"{added}\n{fused}")) == 4 * (2 * 16 * 64 * 32)
    by_ones = WINDOWED.replace("constant(2)", "constant(1)")
    assert work.products(hlo.parse(by_ones)) == 8 * (2 * 16 * 64 * 32)


# --- bytes


def test_reserved_memory_is_not_written():
    reserved = (
        '  %custom-call.41 = f32[6,2,512,856]{2,1,3,0:T(2,128)} custom-call(), custom_call_target="AllocateBuffer", '
        'metadata={op_name="broadcast.114"}'
    )
    assert traffic(reserved) == 0


NESTED = """\
%fused_computation.25 (param_0.129: bf16[6,4,128,512], param_1.109: s32[]) -> bf16[4,128,512] {
  %param_0.129 = bf16[6,4,128,512]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.109 = s32[]{:T(128)S(6)} parameter(1)
  %constant.264 = s32[]{:T(128)} constant(0)
  %dynamic-slice.63 = bf16[1,4,128,512]{3,2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.129, %param_1.109, \
%constant.264, %constant.264, %constant.264), dynamic_slice_sizes={1,4,128,512}
  ROOT %bitcast.83 = bf16[4,128,512]{2,1,0:T(8,128)(2,1)} bitcast(%dynamic-slice.63)
}

%fused_computation.21 (param_0.130: bf16[512,1024], param_1.110: bf16[6,4,128,512], param_2.69: s32[]) -> \
bf16[4,128,1024] {
  %param_1.110 = bf16[6,4,128,512]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2.69 = s32[]{:T(128)S(6)} parameter(2)
  %fusion.23 = bf16[4,128,512]{2,1,0:T(8,128)(2,1)} fusion(%param_1.110, %param_2.69), kind=kLoop, \
calls=%fused_computation.25
  %param_0.130 = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %convolution.17 = bf16[4,128,1024]{2,1,0:T(8,128)(2,1)} convolution(%fusion.23, %param_0.130), window={size=1}, \
dim_labels=0bf_io->0bf
}
"""
STACK = """\
  %w = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %stack = bf16[6,4,128,512]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %n = s32[]{:T(128)S(6)} parameter(2)
"""


def test_of_a_stack_that_a_nested_fusion_cuts_the_cut_is_read():
    fusion = (
        "  ROOT %fusion.63 = bf16[4,128,1024]{2,1,0:T(8,128)(2,1)} fusion(%w, %stack, %n), kind=kOutput, "
        "calls=%fused_computation.21"
    )
    cut, w, y = 4 * 128 * 512 * 2, 512 * 1024 * 2, 4 * 128 * 1024 * 2
    assert traffic(STACK + fusion, NESTED) == cut + w + y


@pytest.mark.parametrize("also, read", [("", 0), ("%param_0", 6 * 128 * 256 * 2)])
def test_of_a_stack_that_a_nested_fusion_updates_the_update_is_written(also, read):
    """A stack that the fusion reduces besides (`also`) is read as a whole."""
    inner = """\
%inner (param_0: bf16[6,128,256], param_1: bf16[128,256], param_2: s32[]) -> bf16[6,128,256] {
  %param_0 = bf16[6,128,256]{2,1,0} parameter(0)
  %param_1 = bf16[128,256]{1,0} parameter(1)
  %param_2 = s32[]{:S(6)} parameter(2)
  %zero = s32[] constant(0)
  %bitcast = bf16[1,128,256]{2,1,0} bitcast(%param_1)
  ROOT %update = bf16[6,128,256]{2,1,0} dynamic-update-slice(%param_0, %bitcast, %param_2, %zero, %zero)
}
"""
    kept = f"%more = bf16[] reduce({also}, %none), to_apply=%add" if also else "%more = bf16[] constant(0)"
    outer = f"""
%outer (param_0: bf16[6,128,256], param_1: bf16[128,256], param_2: s32[]) -> (bf16[6,128,256], bf16[]) {{
  %param_0 = bf16[6,128,256]{{2,1,0}} parameter(0)
  %param_1 = bf16[128,256]{{1,0}} parameter(1)
  %param_2 = s32[]{{:S(6)}} parameter(2)
  %none = bf16[] constant(0)
  {kept}
  %fusion.2 = bf16[6,128,256]{{2,1,0}} fusion(%param_0, %param_1, %param_2), kind=kLoop, calls=%inner
  ROOT %tuple = (bf16[6,128,256]{{2,1,0}}, bf16[]{{:S(6)}}) tuple(%fusion.2, %more)
}}
"""
    entry = """\
  %stack = bf16[6,128,256]{2,1,0} parameter(0)
  %one = bf16[128,256]{1,0} parameter(1)
  %n = s32[]{:S(6)} parameter(2)
  ROOT %fusion = (bf16[6,128,256]{2,1,0}, bf16[]{:S(6)}) fusion(%stack, %one, %n), kind=kLoop, calls=%outer
"""
    one = 128 * 256 * 2
    assert traffic(entry, inner + outer) == one + one + read


def test_what_is_fetched_to_vmem_is_read():
    operand = "  %w = f32[2,1024,256]{2,1,0:T(8,128)} parameter(0)\n"
    start = (
        "  %slice-start.48 = ((f32[2,1024,256]{2,1,0:T(8,128)}), f32[1,1024,256]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
        "slice-start(%w), slice={[1:2], [0:1024], [0:256]}\n"
    )
    done = "  %slice-done.48 = f32[1,1024,256]{2,1,0:T(8,128)S(1)} slice-done(%slice-start.48)"
    cut = 1024 * 256 * 4
    assert traffic(operand + start + done) == cut
    assert traffic((operand + start + done).replace("(8,128)S(1)", "(8,128)")) == 2 * cut  # from HBM to HBM
    near = (operand + start + done).replace("f32[2,1024,256]{2,1,0:T(8,128)}", "f32[2,1024,256]{2,1,0:T(8,128)S(1)}")
    assert traffic(near) == 0


def test_an_exchange_that_begins_early_reads_and_writes_once():
    shape = "f32[48,320]{1,0:T(8,128)}"
    lines = (
        f"  %x = {shape} parameter(0)\n"
        f"  %collective-permute-start.7 = ({shape}, {shape}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) "
        "collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}\n"
        f"  %collective-permute-done.7 = {shape} collective-permute-done(%collective-permute-start.7)"
    )
    assert traffic(lines) == 2 * 48 * 320 * 4


def test_an_exchange_on_the_sparse_cores_passes_the_memory_as_well():
    called = """\
%called (param: bf16[1,1024,128]) -> bf16[1,1024,512] {
  %param = bf16[1,1024,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %all-gather.24 = bf16[1,1024,512]{2,1,0:T(16,128)(2,1)} all-gather(%param), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={2}
}
"""
    entry = """\
  %x = bf16[1,1024,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %start = ((bf16[1,1024,128]{2,1,0:T(16,128)(2,1)}), bf16[1,1024,512]{2,1,0:T(16,128)(2,1)}) call-start(%x), \
async_execution_thread="sparsecore", to_apply=%called
  ROOT %done = bf16[1,1024,512]{2,1,0:T(16,128)(2,1)} call-done(%start)
"""
    assert traffic(entry, called) == 1024 * 128 * 2 + 1024 * 512 * 2


# --- kernels


def kernels(mask, T: int) -> dict[str, float]:
    """FLOPs of the kernels that a TPU would be given for this mask, of B 2, H 4, K 2, d 64."""
    B, H, K, d = 2, 4, 2, 64
    meta = Meta(*[jax.ShapeDtypeStruct((B, T), jnp.int32)] * 5)
    arrays = [jax.ShapeDtypeStruct((B, heads, T, d), jnp.bfloat16) for heads in (H, K, K)]

    def loss(query, key, value, meta):
        y, _ = flex.attend(Rule(mask), Operands(query, key, value, meta, meta))
        return jnp.sum(y.astype(jnp.float32))

    with dispatch.compiling_for("tpu"):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays, meta)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    lines = [f"  %{name} = bf16[{B},{heads},{-(-T // 512) * 512},{d}]{{3,2,1,0}} parameter({i})"
             for i, (name, heads) in enumerate({"q": H, "k": K, "v": K}.items())]  # fmt: skip
    for body, name in re.findall(r'\\22body\\22: \\22([^\\]*)\\22.*?kernel_name = "(\w+)"', text):
        call = f'  %{name}.1 = bf16[{B},{H},{T},{d}] custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", '
        lines.append(f'{call}backend_config={{"custom_call_config":{{"body":"{body}"}}}}')
    return work.kernel_flops(hlo.parse("\n".join(["ENTRY %main (x: s32[]) -> s32[] {", *lines, "}"])))


def test_towers_and_decoders_that_run_the_same_kernels_are_told_apart():
    """1504 positions of audio are filled up to 3 blocks of 512; a decoder leaves out 3 of 9, a tower none."""
    one = 2 * 2 * 4 * 1536 * 1536 * 64
    whole = {"flex_forward": 2 * one, "flex_backward_query": 3 * one, "flex_backward_key": 4 * one}
    assert kernels(ENCODER, 1504) == whole
    assert kernels(DECODER, 1536) == {name: flops * 6 / 9 for name, flops in whole.items()}
