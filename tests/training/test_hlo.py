"""The reading of an optimised GPU program."""

import dataclasses

import pytest

from vit_jax.training import hlo
from vit_jax.training.cards import CARDS

PROGRAM = """HloModule jit_step, is_scheduled=true

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused_norm (p0: bf16[8,4], p1: bf16[100,4], p2: s32[8,1]) -> f32[8] {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %p1 = bf16[100,4]{1,0} parameter(1)
  %p2 = s32[8,1]{1,0} parameter(2)
  %gather.1 = bf16[8,4]{1,0} gather(%p1, %p2), offset_dims={1}, slice_sizes={1,4}
  %multiply.1 = bf16[8,4]{1,0} multiply(%p0, %gather.1)
  %convert.1 = f32[8,4]{1,0} convert(%multiply.1)
  %exponential.1 = f32[8,4]{1,0} exponential(%convert.1)
  %constant.1 = f32[] constant(0)
  ROOT %reduce.1 = f32[8]{0} reduce(%exponential.1, %constant.1), dimensions={1}, to_apply=%region_0.1
}

%triton (q0: bf16[8,4], q1: bf16[4,16]) -> f32[8,16] {
  %q0 = bf16[8,4]{1,0} parameter(0)
  %q1 = bf16[4,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,16]{1,0} dot(%q0, %q1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %copy.1 = f32[8,4]{1,0} copy(%x)
  ROOT %tuple.1 = (s32[], f32[8,4]{1,0}) tuple(%t, %copy.1)
}

%gathered (g: bf16[4]) -> bf16[8] {
  %g = bf16[4]{0} parameter(0)
  ROOT %all-gather.1 = bf16[8]{0} all-gather(%g), dimensions={0}, metadata={op_name="jit(step)/gather"}
}

ENTRY %main (i0: bf16[8,4], i1: bf16[100,4], i2: s32[8,1], i3: bf16[4,16]) -> f32[8] {
  %i0 = bf16[8,4]{1,0} parameter(0)
  %i1 = bf16[100,4]{1,0} parameter(1)
  %i2 = s32[8,1]{1,0} parameter(2)
  %i3 = bf16[4,16]{1,0} parameter(3)
  %all-reduce-start.1 = bf16[8,4]{1,0} all-reduce-start(%i0), to_apply=%region_0.1
  %fusion.1 = f32[8]{0} fusion(%i0, %i1, %i2), kind=kInput, calls=%fused_norm, metadata={op_name="jit(step)/norm"}
  %gemm.1 = (bf16[8,16]{1,0}, s8[4194304]{0}) custom-call(%i0, %i3), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(step)/dense"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %all-reduce-done.1 = bf16[8,4]{1,0} all-reduce-done(%all-reduce-start.1)
  %fusion.2 = f32[8,16]{1,0} fusion(%i0, %i3), kind=kCustom, calls=%triton
  %while.1 = (s32[], f32[8,4]{1,0}) while(%t0), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %q = bf16[2,6,3,8]{3,2,1,0} bitcast(%i0)
  %fmha.1 = (bf16[2,3,6,8]{3,1,2,0}, f32[2,3,6]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax"
  %fmha.2 = (bf16[2,3,6,8]{3,1,2,0}, u8[64]{0}) custom-call(%q, %q, %q, %fmha.1), \
custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %image = bf16[2,8,8,3]{3,2,1,0} bitcast(%i0)
  %kernel = bf16[5,4,4,3]{3,2,1,0} bitcast(%i0)
  %conv.1 = (bf16[2,2,2,5]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), window={size=4x4 stride=4x4}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %gather-start = ((bf16[4]{0}), bf16[8]{0}) async-start(%i0), calls=%gathered
  %gather-done = bf16[8]{0} async-done(%gather-start)
  ROOT %copy.2 = f32[8]{0} copy(%fusion.1)
}
"""


@pytest.fixture(scope="module")
def kernels():
    return {kernel.name: kernel for kernel in hlo.kernels(hlo.parse(PROGRAM))}


def test_every_kernel_is_found_once(kernels):
    names = ["all-reduce-start.1", "fusion.1", "gemm.1", "fusion.2", "copy.1", "fmha.1", "fmha.2", "conv.1", "gather-start"]
    assert list(kernels) == [*names, "copy.2"]
    assert {name: kernel.kind for name, kernel in kernels.items() if kernel.flops} == {
        "gemm.1": "product", "fusion.2": "product", "fmha.1": "attention", "fmha.2": "attention", "conv.1": "convolution",
    }  # fmt: skip
    assert kernels["copy.1"].times == 5 and kernels["fusion.1"].scope == "jit(step)/norm"


def test_fusion_reads_only_what_it_gathers(kernels):
    fusion = kernels["fusion.1"]
    assert fusion.bytes == 8 * 4 * 2 + 8 * 4 * 2 + 8 * 4 + 8 * 4
    assert (fusion.elementwise, fusion.transcendental) == (3 * 32, 32)


def test_products_are_counted_by_their_sizes(kernels):
    assert kernels["gemm.1"].flops == kernels["fusion.2"].flops == 2 * 8 * 4 * 16
    assert kernels["gemm.1"].bytes == (8 * 4 + 4 * 16 + 8 * 16) * 2  # the workspace is no traffic
    assert kernels["fmha.1"].flops == 2 * (2 * 2 * 3 * 6 * 6 * 8) and kernels["fmha.2"].flops == 2.5 * kernels["fmha.1"].flops
    assert kernels["conv.1"].flops == 2 * (2 * 2 * 2 * 5) * 16 * 3


def test_collectives_have_sizes_types_and_company():
    reduce, gather = hlo.collectives(hlo.parse(PROGRAM))
    assert dataclasses.astuple(reduce) == ("all-reduce", 64, ("bf16",), True, 2, "")
    assert dataclasses.astuple(gather) == ("all-gather", 16, ("bf16",), True, 0, "jit(step)/gather")


def test_time_is_that_of_the_tightest_limit():
    card = CARDS["h100"]
    one = hlo.Kernel("k", "product", "", "", 2, bytes=1e9, flops=1e12, type="bf16")
    assert one.seconds(card) == pytest.approx(2 * 1e12 / (0.66 * 989e12))
    assert dataclasses.replace(one, flops=1e9).seconds(card) == pytest.approx(2 * 1e9 / (0.9 * 3.35232e12))
    assert dataclasses.replace(one, type="f32").seconds(card) > 10 * one.seconds(card)
    assert dataclasses.replace(one, elementwise=1e12).seconds(card) == pytest.approx(2 * 1e12 / (132 * 128 * 1.98e9))
    assert dataclasses.replace(one, transcendental=1e12).seconds(card) == pytest.approx(2 * 1e12 / (132 * 16 * 1.98e9))
