"""The reader of programs compiled for GPUs, on a module with every spelling seen from that compiler, trimmed."""

import textwrap
from typing import Any

import pytest

from fopd_jax.performance.gpu_kernels import Kernel, kernels
from fopd_jax.performance.gpu_report import LARGE, attention_neighbours, describe_gpu, gpu_fields
from fopd_jax.performance.topology import GPUS

TRIPS = 9
MODULE = textwrap.dedent("""\
    HloModule jit_step, is_scheduled=true

    %product (a: bf16[1024,512], b: bf16[1,512,256]) -> bf16[1024,256] {
      %a = bf16[1024,512]{1,0} parameter(0)
      %b = bf16[1,512,256]{2,1,0} parameter(1)
      %c = bf16[512,256]{1,0} bitcast(%b)
      ROOT %dot.1 = bf16[1024,256]{1,0} dot(%a, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    }

    %layers_slice (d: bf16[10,512,256], e: s32[]) -> bf16[1,512,256] {
      %d = bf16[10,512,256]{2,1,0} parameter(0)
      %e = s32[] parameter(1)
      %zero = s32[] constant(0)
      %dynamic-slice.1 = bf16[1,512,256]{2,1,0} dynamic-slice(%d, %e, %zero, %zero), dynamic_slice_sizes={1,512,256}
      ROOT %copy.1 = bf16[1,512,256]{2,1,0} copy(%dynamic-slice.1)
    }

    %norm (f: bf16[1024,512]) -> bf16[1024,512] {
      %f = bf16[1024,512]{1,0} parameter(0)
      %g = f32[1024,512]{1,0} convert(%f)
      %h = f32[1024,512]{1,0} multiply(%g, %g)
      ROOT %i = bf16[1024,512]{1,0} convert(%h)
    }

    %add (j: f32[], k: f32[]) -> f32[] {
      %j = f32[] parameter(0)
      %k = f32[] parameter(1)
      ROOT %l = f32[] add(%j, %k)
    }

    %sums (m: bf16[1024,512], n: f32[]) -> (f32[1024], f32[1024,512]) {
      %m = bf16[1024,512]{1,0} parameter(0)
      %n = f32[] parameter(1)
      %o = f32[1024,512]{1,0} convert(%m)
      %p = f32[1024]{0} reduce(%o, %n), dimensions={1}, to_apply=%add
      ROOT %q = (f32[1024]{0}, f32[1024,512]{1,0}) tuple(%p, %o)
    }

    %joined (r: bf16[2,512,8,64], s: bf16[2,511,8,64]) -> bf16[2,1024,8,64] {
      %r = bf16[2,512,8,64]{3,2,1,0} parameter(0)
      %s = bf16[2,511,8,64]{3,2,1,0} parameter(1)
      %t = bf16[2,1023,8,64]{3,2,1,0} concatenate(%r, %s), dimensions={1}
      %u = bf16[] constant(0)
      ROOT %pad.1 = bf16[2,1024,8,64]{3,2,1,0} pad(%t, %u), padding=0_0x0_1x0_0x0_0
    }

    %stacked (v: bf16[9,1024,512], w: bf16[1024,512], x: s32[]) -> bf16[9,1024,512] {
      %v = bf16[9,1024,512]{2,1,0} parameter(0)
      %w = bf16[1024,512]{1,0} parameter(1)
      %x = s32[] parameter(2)
      %y = bf16[1,1024,512]{2,1,0} bitcast(%w)
      %z = s32[] constant(0)
      ROOT %dynamic-update-slice.1 = bf16[9,1024,512]{2,1,0} dynamic-update-slice(%v, %y, %x, %z, %z)
    }

    %body (state: (s32[], bf16[10,512,256], bf16[1024,512], bf16[9,1024,512])) -> (s32[], bf16[10,512,256], bf16[1024,512], bf16[9,1024,512]) {
      %state = (s32[], bf16[10,512,256]{2,1,0}, bf16[1024,512]{1,0}, bf16[9,1024,512]{2,1,0}) parameter(0)
      %i.1 = s32[] get-tuple-element(%state), index=0
      %weights = bf16[10,512,256]{2,1,0} get-tuple-element(%state), index=1
      %rows = bf16[1024,512]{1,0} get-tuple-element(%state), index=2
      %kept = bf16[9,1024,512]{2,1,0} get-tuple-element(%state), index=3
      %layer = bf16[1,512,256]{2,1,0} fusion(%weights, %i.1), kind=kCustom, calls=%layers_slice, backend_config={"operation_queue_id":"0","fusion_backend_config":{"kind":"__custom_fusion","custom_fusion_config":{"name":"dynamic_slice_fusion"}}}
      %normed = bf16[1024,512]{1,0} fusion(%rows), kind=kCustom, calls=%norm, metadata={op_name="jit(step)/layer_norm"}, backend_config={"fusion_backend_config":{"kind":"__triton","block_level_fusion_config":{}}}
      %gemm = bf16[1024,256]{1,0} fusion(%normed, %layer), kind=kCustom, calls=%product, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
      %cublas = (bf16[1024,512]{1,0}, s8[4194304]{0}) custom-call(%gemm, %layer), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":[]},"epilogue":"BIAS_GELU"}}
      %kept.1 = bf16[9,1024,512]{2,1,0} fusion(%kept, %normed, %i.1), kind=kLoop, calls=%stacked
      ROOT %next = (s32[], bf16[10,512,256]{2,1,0}, bf16[1024,512]{1,0}, bf16[9,1024,512]{2,1,0}) tuple(%i.1, %weights, %normed, %kept.1)
    }

    %condition (q.1: (s32[], bf16[10,512,256], bf16[1024,512], bf16[9,1024,512])) -> pred[] {
      %q.1 = (s32[], bf16[10,512,256]{2,1,0}, bf16[1024,512]{1,0}, bf16[9,1024,512]{2,1,0}) parameter(0)
      ROOT %less = pred[] constant(true)
    }

    ENTRY %main (image: bf16[2,512,8,64], text: bf16[2,511,8,64], x.1: bf16[1024,512], init: (s32[], bf16[10,512,256], bf16[1024,512], bf16[9,1024,512])) -> bf16[2,1024,512] {
      %image = bf16[2,512,8,64]{3,2,1,0} parameter(0)
      %text = bf16[2,511,8,64]{3,2,1,0} parameter(1)
      %x.1 = bf16[1024,512]{1,0} parameter(2)
      %init = (s32[], bf16[10,512,256]{2,1,0}, bf16[1024,512]{1,0}, bf16[9,1024,512]{2,1,0}) parameter(3)
      %loop = (s32[], bf16[10,512,256]{2,1,0}, bf16[1024,512]{1,0}, bf16[9,1024,512]{2,1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"9"}}
      %zeros = f32[] constant(0)
      %input_reduce_fusion = (f32[1024]{0}, f32[1024,512]{1,0}) fusion(%x.1, %zeros), kind=kInput, calls=%sums, metadata={op_name="jit(step)/loss/sum"}
      %queries = bf16[2,1024,8,64]{3,2,1,0} fusion(%image, %text), kind=kLoop, calls=%joined
      %flash = (bf16[2,8,1024,64]{3,1,2,0}, u8[0]{0}) custom-call(%queries, %queries, %queries), custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[2,1024,8,64]{3,2,1,0}}, backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "8", "1024", "1024"], "tuple_shapes": []}}}
      %attended = bf16[2,8,1024,64]{3,1,2,0} get-tuple-element(%flash), index=0
      %turned = bf16[2,1024,8,64]{3,2,1,0} bitcast(%attended)
      %gradient = (bf16[2,8,1024,64]{3,1,2,0}, u8[0]{0}) custom-call(%queries, %queries, %queries, %turned), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "8", "1024", "1024"]}}}
      %all-reduce-start = f32[1024]{0} all-reduce-start(%zeros), replica_groups={}, to_apply=%add
      %all-reduce-done = f32[1024]{0} all-reduce-done(%all-reduce-start)
      %sort = (s32[8]{0}, s8[64]{0}) custom-call(%zeros), custom_call_target="__cub$DeviceRadixSort"
      ROOT %copy.9 = bf16[2,1024,512]{2,1,0} copy(%turned)
    }
    """)  # noqa: E501 - instructions are lines
H100 = GPUS["NVIDIA H100 80GB HBM3"]


@pytest.fixture(scope="module")
def found() -> dict[str, Kernel]:
    return {each.name: each for each in kernels(MODULE)}


def test_kernels_are_told_by_what_they_compute(found: dict[str, Kernel]):
    """Loops and tuples are none; a slice with its copy moves, whatever the compiler calls it."""
    assert {name: each.kind for name, each in found.items()} == {
        "layer": "movement", "normed": "triton", "gemm": "matrix product", "cublas": "matrix product",
        "kept.1": "movement", "input_reduce_fusion": "reduction", "queries": "movement", "flash": "attention",
        "gradient": "attention", "all-reduce-start": "collective", "sort": "library", "copy.9": "movement",
    }  # fmt: skip
    assert {found[name].detail for name in ("layer", "normed", "gemm", "queries")} == {
        "__custom_fusion", "__triton", "__triton_nested_gemm_fusion", "loop",
    }  # fmt: skip


def test_loops_are_multiplied_out(found: dict[str, Kernel]):
    inside = {"layer", "normed", "gemm", "cublas", "kept.1"}
    assert {name for name, each in found.items() if each.launches == TRIPS} == inside
    assert all(each.launches == 1 for name, each in found.items() if name not in inside)


def test_slices_are_read_and_written_in_part(found: dict[str, Kernel]):
    """One layer's weights of ten are read; one layer's rows of nine are written, and none of the nine read."""
    weights, rows, index = 2 * 512 * 256, 2 * 1024 * 512, 4
    assert (found["layer"].read, found["layer"].written) == (weights + index, weights)
    assert (found["kept.1"].read, found["kept.1"].written) == (rows + index, rows)
    assert (found["gemm"].read, found["gemm"].written) == (rows + weights, 2 * 1024 * 256)


def test_products_and_attention_have_their_flops(found: dict[str, Kernel]):
    assert found["gemm"].flops == found["cublas"].flops == 2 * 1024 * 512 * 256
    assert found["cublas"].written == 2 * 1024 * 512  # without the library's scratch
    scores = 2 * 8 * 1024 * 1024
    assert found["flash"].flops == 2 * 2 * scores * 64
    assert found["gradient"].flops == 5 * 2 * scores * 64
    assert found["normed"].flops == 0


def test_float32_results_are_counted_alone(found: dict[str, Kernel]):
    """Inside of a fusion they cost no memory."""
    assert found["input_reduce_fusion"].float32 == 4 * 1024 + 4 * 1024 * 512
    assert found["normed"].float32 == 0
    assert gpu_fields(list(found.values()), H100)["float32"] == {
        "count": 1, "launches": 1, "bytes": 4 * 1024 + 4 * 1024 * 512,
        "largest": [{
            "op_name": "jit(step)/loss/sum", "kind": "reduction", "bytes": 4 * 1024 + 4 * 1024 * 512, "launches": 1
        }],
    }  # fmt: skip


def test_moves_around_attention_are_each_counted_once(found: dict[str, Kernel]):
    """The joined and padded queries feed two calls three times; what is written is copied once, through a bitcast."""
    around = attention_neighbours(found.values())
    assert (around["calls"], around["launches"]) == (2, 2)
    assert around["moves_before"] == {"count": 1, "bytes": found["queries"].bytes}
    assert around["moves_after"] == {"count": 1, "bytes": found["copy.9"].bytes}
    assert found["copy.9"].bytes == 2 * 2 * 2 * 1024 * 512 >= LARGE


def test_a_launch_takes_as_long_as_what_bounds_it(found: dict[str, Kernel]):
    assert found["gemm"].seconds(1.0, 1e12) == found["gemm"].flops
    assert found["gemm"].seconds(1e30, 1.0) == found["gemm"].bytes
    fields = gpu_fields(list(found.values()), H100)
    assert fields["datasheet_seconds"] == pytest.approx(sum(row["datasheet_seconds"] for row in fields["kernels"]))
    (product,) = [row for row in fields["kernels"] if row["kind"] == "matrix product"]
    assert (product["count"], product["launches"]) == (2, 2 * TRIPS)


def test_the_report_names_library_calls_and_what_it_is_not(found: dict[str, Kernel]):
    fields: dict[str, Any] = gpu_fields(list(found.values()), H100)
    assert [(row["target"], row["count"], row["launches"]) for row in fields["custom_calls"]] == [
        ("__cub$DeviceRadixSort", 1, 1), ("__cublas$lt$matmul BIAS_GELU", 1, TRIPS), ("__cudnn$fmhaSoftmax", 1, 1),
        ("__cudnn$fmhaSoftmaxBackward", 1, 1),
    ]  # fmt: skip
    text = describe_gpu(fields)
    for expected in ("no cycles, nothing autotuned", "not checked", "movement", "around 2 attentions", "__triton 1"):
        assert expected in text


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="found no entry computation"):
        kernels("HloModule empty")
