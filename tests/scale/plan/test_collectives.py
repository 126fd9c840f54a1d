"""Exchanges of compiled programs, by lines that the TPU compiler wrote (libtpu 0.0.42; what is not read is cut off)."""

from polygpt.scale.plan import collectives, hlo

ADD = """\
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""

# The step of 1m on a v5e:2x2 (mesh: fsdp 4). All of these exchanges have channel 1, for they were made when others were
# combined; the gather of the embeddings stands in three fusions, which begin it, go on with it, and wait for it.
CHANNEL = (
    ADD
    + """
%fused_computation.1749 (param_0.5780: f32[258,32]) -> (f32[258,32], f32[258,128]) {
  %param_0.5780 = f32[258,32]{0,1:T(8,128)S(1)} parameter(0)
  %all-gather.773 = f32[258,128]{0,1:T(8,128)} all-gather(%param_0.5780), channel_id=1, replica_groups={{0,1,2,3}}, \
dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="35"}
  ROOT %custom-call.227 = (f32[258,32]{0,1:T(8,128)S(1)}, f32[258,128]{0,1:T(8,128)S(1)}) custom-call(\
%all-gather.773), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (param_0.5785: f32[258,32]) -> f32[258,128] {
  %param_0.5785 = f32[258,32]{0,1:T(8,128)S(1)} parameter(0)
  ROOT %all-gather.775 = f32[258,128]{0,1:T(8,128)S(1)} all-gather(%param_0.5785), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="35"}
}

%fused_computation.1751 (param_0.5788: f32[258,32]) -> f32[258,128] {
  %param_0.5788 = f32[258,32]{0,1:T(8,128)S(1)} parameter(0)
  %all-gather.777 = f32[258,128]{0,1:T(8,128)} all-gather(%param_0.5788), channel_id=1, replica_groups={{0,1,2,3}}, \
dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="35"}
  ROOT %custom-call.228 = f32[258,128]{0,1:T(8,128)S(1)} custom-call(%all-gather.777), \
custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.30 (input_0.3: f32[256,128], input_7: f32[258,128]) -> (f32[64,128], f32[258,32]) {
  %input_0.3 = f32[256,128]{1,0:T(8,128)S(1)} parameter(0)
  %input_7 = f32[258,128]{0,1:T(8,128)S(1)} parameter(1)
  %all-reduce.224 = (f32[256,128]{1,0:T(8,128)}, f32[258,128]{0,1:T(8,128)}) all-reduce(%input_0.3, %input_7), \
channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %get-tuple-element.8593 = f32[256,128]{1,0:T(8,128)} get-tuple-element(%all-reduce.224), index=0
  %partition-id.85 = u32[] partition-id()
  %constant.3389 = u32[] constant(64)
  %multiply.587 = u32[]{:T(128)} multiply(%partition-id.85, %constant.3389)
  %constant.3390 = u32[] constant(0)
  %dynamic-slice.800 = f32[64,128]{1,0:T(8,128)S(1)} dynamic-slice(%get-tuple-element.8593, %multiply.587, \
%constant.3390), dynamic_slice_sizes={64,128}
  %get-tuple-element.8600 = f32[258,128]{0,1:T(8,128)} get-tuple-element(%all-reduce.224), index=1
  %dynamic-slice.807 = f32[258,32]{0,1:T(8,128)S(1)} dynamic-slice(%get-tuple-element.8600, %constant.3390, \
%multiply.587), dynamic_slice_sizes={258,32}
  ROOT %tuple.292 = (f32[64,128]{1,0:T(8,128)S(1)}, f32[258,32]{0,1:T(8,128)S(1)}) tuple(%dynamic-slice.800, \
%dynamic-slice.807)
}

ENTRY %main (a: f32[258,32], b: f32[258,128], c: f32[256,128]) -> f32[258,32] {
  %a = f32[258,32]{0,1:T(8,128)} parameter(0)
  %b = f32[258,128]{0,1:T(8,128)} parameter(1)
  %c = f32[256,128]{1,0:T(8,128)} parameter(2)
  %fusion.1749 = (f32[258,32]{0,1}, f32[258,128]{0,1}) fusion(%a), kind=kCustom, calls=%fused_computation.1749
  %fusion.1750 = f32[258,128]{0,1} fusion(%a), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.1751 = f32[258,128]{0,1} fusion(%a), kind=kCustom, calls=%fused_computation.1751
  %fusion.30 = (f32[64,128]{1,0}, f32[258,32]{0,1}) fusion(%c, %b), kind=kCustom, calls=%all-reduce-scatter.30
  ROOT %reduce_scatter.7 = f32[258,32]{0,1:T(8,128)S(1)} reduce-scatter(%b), channel_id=1, \
replica_groups={{0,1,2,3}}, use_global_device_ids=true, dimensions={1}, to_apply=%add
}
"""
)


def found(text: str, **mesh: int) -> list[tuple]:
    """(kind, bytes of the whole array, executions) of each."""
    read = collectives.collectives(hlo.parse(text), mesh)
    return sorted((one.kind, one.payload, one.times) for one in read)


def test_exchanges_of_one_channel_are_all_counted_and_what_stands_in_a_chain_once():
    embeddings, positions = 258 * 128 * 4, 256 * 128 * 4
    assert found(CHANNEL, fsdp=4) == [
        ("all-gather", embeddings, 1),
        ("reduce-scatter", embeddings, 1),
        ("reduce-scatter", positions + embeddings, 1),  # two arrays, of which each device keeps its part
    ]
    read = collectives.collectives(hlo.parse(CHANNEL), {"fsdp": 4})
    assert sum(one.sent for one in read) == 3 / 4 * (3 * embeddings + positions)
    assert {one.kind: one.hidden for one in read} == {"all-gather": True, "reduce-scatter": False}


# 150m on a v5e:4x4: a gather is begun in the loop over microbatches, and goes on within that over a tower's blocks.
CHAIN = """\
%fused_computation.3444 (param_0.11787: bf16[48,768]) -> (bf16[48,768], bf16[768,768]) {
  %param_0.11787 = bf16[48,768]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.148 = bf16[768,768]{1,0:T(8,128)(2,1)} all-gather(%param_0.11787), channel_id=437, \
replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="2"}
  ROOT %custom-call.712 = (bf16[48,768]{1,0:T(8,128)(2,1)}, bf16[768,768]{1,0:T(8,128)(2,1)}) custom-call(\
%all-gather.148), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (param_0.11791: bf16[48,768]) -> bf16[768,768] {
  %param_0.11791 = bf16[48,768]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.150 = bf16[768,768]{1,0:T(8,128)(2,1)} all-gather(%param_0.11791), channel_id=437, \
replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="2"}
}

%block (p: bf16[48,768]) -> bf16[48,768] {
  %p = bf16[48,768]{1,0} parameter(0)
  %fusion.2 = bf16[768,768]{1,0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %q = bf16[48,768]{1,0} copy(%p)
}

%microbatch (p: bf16[48,768]) -> bf16[48,768] {
  %p = bf16[48,768]{1,0} parameter(0)
  %fusion.1 = (bf16[48,768]{1,0}, bf16[768,768]{1,0}) fusion(%p), kind=kCustom, calls=%fused_computation.3444
  ROOT %while.1546 = bf16[48,768]{1,0} while(%p), condition=%go, body=%block, \
backend_config={"known_trip_count":{"n":"12"}}
}

%go (p: bf16[48,768]) -> pred[] {
  %p = bf16[48,768]{1,0} parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: bf16[48,768]) -> bf16[48,768] {
  %x = bf16[48,768]{1,0} parameter(0)
  ROOT %while.1540 = bf16[48,768]{1,0} while(%x), condition=%go, body=%microbatch, \
backend_config={"known_trip_count":{"n":"4"}}
}
"""


def test_an_exchange_that_goes_on_within_a_loop_is_made_once():
    assert found(CHAIN, fsdp=16) == [("all-gather", 768 * 768 * 2, 4)]


# 7b on a v5p:4x4x8: the whole sum leaves the exchange, and another fusion cuts it. The compiler names the algorithm of
# this one as an all-reduce's ("RotatedPincerEmitter"), of those above as "AllReduceScatterFusion".
WHOLE = (
    ADD
    + """
%fused_computation.158 (param_0: bf16[4096,11008], param_1: u32[]) -> f32[32,11008] {
  %param_0 = bf16[4096,11008]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = u32[]{:T(128)} parameter(1)
  %constant.1 = u32[]{:T(128)} constant(0)
  %dynamic-slice.9 = bf16[32,11008]{1,0} dynamic-slice(%param_0, %param_1, %constant.1), dynamic_slice_sizes={32,11008}
  ROOT %convert.3 = f32[32,11008]{1,0:T(8,128)} convert(%dynamic-slice.9)
}

ENTRY %main (g: bf16[4096,11008], i: u32[]) -> f32[32,11008] {
  %g = bf16[4096,11008]{1,0} parameter(0)
  %i = u32[] parameter(1)
  %all-reduce.478 = bf16[4096,11008]{1,0:T(8,128)(2,1)} all-reduce(%g), channel_id=54, \
replica_groups=mesh['axis_0'=128,'axis_1'=1] {'axis_0'}, use_global_device_ids=true, to_apply=%add
  ROOT %bitcast_fusion.78 = f32[32,11008]{1,0} fusion(%all-reduce.478, %i), kind=kLoop, calls=%fused_computation.158
}
"""
)


def test_a_sum_that_is_only_cut_later_is_sent_whole():
    assert found(WHOLE, fsdp=128) == [("all-reduce", 4096 * 11008 * 2, 1)]


# 10m on a v5e:2x4: shards of 48 columns of 320 are shifted by one device, in a line and in both directions of a ring.
PERMUTES = """\
ENTRY %main (x: f32[258,48]) -> f32[258,48] {
  %x = f32[258,48]{0,1} parameter(0)
  %collective-permute-start.14 = (f32[258,48]{0,1:T(8,128)S(1)}, f32[258,48]{0,1:T(8,128)S(1)}, u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, \
source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7}}
  %collective-permute-done.14 = f32[258,48]{0,1:T(8,128)S(1)} collective-permute-done(%collective-permute-start.14)
  %collective-permute-start.16 = (f32[258,48]{0,1:T(8,128)S(1)}, f32[258,48]{0,1:T(8,128)S(1)}, u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, \
source_target_pairs={{1,0},{2,1},{3,2},{4,3},{5,4},{6,5},{7,6}}
  ROOT %collective-permute-done.16 = f32[258,48]{0,1:T(8,128)} collective-permute-done(%collective-permute-start.16)
}
"""


def test_permutes_of_one_channel_keep_their_directions():
    assert found(PERMUTES, fsdp=8) == [("collective-permute", 258 * 48 * 4, 1)] * 2
    one, other = collectives.collectives(hlo.parse(PERMUTES), {"fsdp": 8})
    assert one.pairs == tuple((b, a) for a, b in other.pairs) and len(one.pairs) == 7
    assert one.axes == other.axes == ("fsdp",)


BRANCHES = """\
%gathered (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %g = f32[8,512]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={1}
  ROOT %s = f32[8,128]{1,0} slice(%g), slice={[0:8], [128:256]}
}

%same (p: f32[8,128]) -> f32[8,128] {
  ROOT %p = f32[8,128]{1,0} parameter(0)
}

ENTRY %main (x: f32[8,128], rare: BRANCH[]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %rare = BRANCH[] parameter(1)
  ROOT %either = f32[8,128]{1,0} conditional(%rare, %x, %x), COMPUTATIONS
}
"""


def test_of_a_conditional_one_branch_runs_and_the_least_counts():
    named = "true_computation=%gathered, false_computation=%same"
    for kind, computations in (("pred", named), ("s32", "branch_computations={%same, %gathered}")):
        text = BRANCHES.replace("BRANCH", kind).replace("COMPUTATIONS", computations)
        names = [run.instruction.name for run in hlo.parse(text).executed()]
        assert names == ["x", "rare", "either", "p"]
