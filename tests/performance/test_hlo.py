"""The reader of compiled programs, on a module that holds every spelling seen from the CPU's and the TPU's compiler."""

import math
import re
import textwrap

import jax
import jax.numpy as jnp
import pytest

from fopd_jax.performance.hlo import Collective, collectives, estimated_cycles

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
MODULE = textwrap.dedent("""\
    HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

    %add (x: f32[], y: f32[]) -> f32[] {
      %x = f32[]{:T(128)} parameter(0)
      %y = f32[]{:T(128)} parameter(1)
      ROOT %sum = f32[]{:T(128)} add(%x, %y)
    }

    %inner_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
      %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(4,128)(2,1)S(1)}) parameter(0)
      %i = s32[]{:T(128)} get-tuple-element(%p), index=0
      %part = bf16[4,8]{1,0:T(4,128)(2,1)S(1)} get-tuple-element(%p), index=1
      %reduce-scatter.1 = bf16[2,8]{1,0:T(4,128)(2,1)} reduce-scatter(%part), channel_id=3, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}, to_apply=%add, metadata={op_name="jit(step)/while/body/transpose(jvp(student))/dot_general" stack_frame_id=1}
      ROOT %next = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%i, %part)
    }

    %inner_condition (q: (s32[], bf16[4,8])) -> pred[] {
      %q = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
      %bound = s32[]{:T(128)} constant(5)
      %j = s32[]{:T(128)} get-tuple-element(%q), index=0
      ROOT %less = pred[]{:T(512)} compare(%j, %bound), direction=LT
    }

    %fused (a: f32[4]) -> f32[8] {
      %a = f32[4]{0} parameter(0)
      ROOT %all-gather.9 = f32[8]{0} all-gather(%a), channel_id=7, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
    }

    %outer_body (r: (s32[], bf16[4,8], f32[4])) -> (s32[], bf16[4,8], f32[4]) {
      %r = (s32[], bf16[4,8]{1,0}, /*index=2*/f32[4]{0}) parameter(0)
      %state = (s32[], bf16[4,8]{1,0}) copy(%r)
      %loop = (s32[], bf16[4,8]{1,0}) while(%state), condition=%inner_condition, body=%inner_body, metadata={op_name="inner"}
      %f = f32[4]{0} get-tuple-element(%r), index=2
      %fusion.1 = f32[8]{0} fusion(%f), kind=kCustom, calls=%fused
      %fusion.2 = f32[8]{0} fusion(%f), kind=kCustom, calls=%fused
      ROOT %out = (s32[], bf16[4,8]{1,0}, f32[4]{0}) tuple(%state, %loop, %f)
    }

    %outer_condition (s: (s32[], bf16[4,8], f32[4])) -> pred[] {
      ROOT %s = pred[] parameter(0)
    }

    %endless_condition (t: (s32[], f32[4])) -> pred[] {
      %limit = s32[] get-tuple-element(%t), index=0
      ROOT %until = pred[] compare(%limit, %limit), direction=NE
    }

    %endless_body (u: (s32[], f32[4])) -> (s32[], f32[4]) {
      %u = (s32[], f32[4]{0}) parameter(0)
      %v = f32[4]{0} get-tuple-element(%u), index=1
      %collective-permute-start.1 = (f32[4]{0:S(1)}, f32[4]{0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%v), channel_id=8, source_target_pairs={{0,4},{1,5},{2,6},{3,7}}
      %collective-permute-done.1 = f32[4]{0:S(1)} collective-permute-done(%collective-permute-start.1)
      ROOT %w = (s32[], f32[4]{0}) tuple(%u, %collective-permute-done.1)
    }

    ENTRY %main_spmd (arg: f32[4,6], flags: s32[16]) -> f32[4,6] {
      %arg = f32[4,6]{1,0} parameter(0)
      %flags = s32[16]{0} parameter(1)
      %init = (s32[], bf16[4,8]{1,0}, f32[4]{0}) custom-call(%arg), custom_call_target="init"
      %timesteps = (s32[], bf16[4,8]{1,0}, f32[4]{0}) while(%init), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"9"},"flag":[]}
      %begin = (s32[], f32[4]{0}) custom-call(%arg), custom_call_target="begin"
      %endless = (s32[], f32[4]{0}) while(%begin), condition=%endless_condition, body=%endless_body
      %all-reduce.1 = (f32[4,6]{1,0}, s32[16]{0}) all-reduce(%arg, /*index=1*/%flags), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_1'}, to_apply=%add
      %all-reduce.2 = s32[16]{0} all-reduce(%flags), channel_id=2, replica_groups={}, to_apply=%add
      %all-gather-start.1 = ((f32[4,6]{1,0}, s32[16]{0}), (f32[16,6]{1,0}, s32[64]{0})) all-gather-start(%arg, %flags), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}
      %all-gather-done.1 = (f32[16,6]{1,0}, s32[64]{0}) all-gather-done(%all-gather-start.1)
      ROOT %result = f32[4,6]{1,0} get-tuple-element(%all-reduce.1), index=0
    }
    """)  # noqa: E501 - instructions are lines


def _find(name: str) -> Collective:
    (found,) = [each for each in collectives(MODULE) if each.name == name]
    return found


def test_every_collective_is_found_once():
    """Also one that is asynchronous and spread over two fusions, of which the channel says that it is the same."""
    assert [each.name for each in collectives(MODULE)] == [
        "reduce-scatter.1", "all-gather.9", "collective-permute-start.1", "all-reduce.1", "all-reduce.2",
        "all-gather-start.1",
    ]  # fmt: skip


def test_loops_are_counted_through_all_that_they_call():
    assert {each.name: (each.depth, each.executions) for each in collectives(MODULE)} == {
        "reduce-scatter.1": (2, 45),  # 9 known trips, and 5 by the bound that the inner loop counts to
        "all-gather.9": (1, 9),  # in a fusion
        "collective-permute-start.1": (1, None),  # in a loop of unknown length
        "all-reduce.1": (0, 1),
        "all-reduce.2": (0, 1),
        "all-gather-start.1": (0, 1),
    }


def test_bytes_are_the_whole_message():
    assert {each.name: each.bytes for each in collectives(MODULE)} == {
        "reduce-scatter.1": 2 * 4 * 8,  # what goes in
        "all-gather.9": 4 * 8,  # what comes out
        "collective-permute-start.1": 4 * 4,
        "all-reduce.1": 4 * (4 * 6 + 16),
        "all-reduce.2": 4 * 16,
        "all-gather-start.1": 4 * (16 * 6 + 64),  # without the operands that its type repeats
    }


def test_groups_are_read_in_every_spelling():
    assert {each.name: each.axes(MESH) for each in collectives(MODULE)} == {
        "reduce-scatter.1": ("fsdp",),  # tiles of a transposed range
        "all-gather.9": ("tensor",),  # listed
        "collective-permute-start.1": ("data",),  # pairs
        "all-reduce.1": ("data", "fsdp"),  # axes of a mesh
        "all-reduce.2": ("data", "fsdp", "tensor"),  # none named: all
        "all-gather-start.1": ("fsdp", "tensor"),  # tiles of a range
    }


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("mesh['a'=2,'b'=4] {'a'}", ("data",)),
        ("mesh['a'=2,'b'=4] {'b'}", ("fsdp", "tensor")),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("tensor",)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data", "fsdp")),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("data",)),
        ("in a way that is not known", ("unknown",)),
    ],
)
def test_meshes_may_be_reordered(spelled: str, expected: tuple[str, ...]):
    (found,) = [each for each in collectives(re.sub(r"mesh\[.*?\] \{[^}]*\}", spelled, MODULE)) if each.bytes == 160]
    assert found.axes(MESH) == expected


def test_what_an_instruction_is_made_from_is_kept():
    assert "transpose(jvp(student))" in _find("reduce-scatter.1").op_name
    assert _find("reduce-scatter.1").floating
    assert not _find("all-reduce.2").floating


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="found no entry computation"):
        collectives("nothing")


def test_a_program_of_this_compiler_is_read():
    """One device has nothing to exchange, but the loop around the body is there to be walked."""

    def scanned(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, None, length=7)[0]

    text = jax.jit(scanned).lower(jnp.ones((4, 4))).compile().as_text() or ""
    assert collectives(text) == []
    loop = r"  fake = f32[4,4]{1,0} all-reduce(%{0}), channel_id=1, replica_groups={{0}}, to_apply=%x"
    body = re.findall(r"body=%?([\w.\-]+)", text)[0]
    header = next(line for line in text.splitlines() if re.match(rf"%?{re.escape(body)} \(", line))
    (found,) = collectives(text.replace(header, f"{header}\n{loop}"))
    assert (found.depth, found.executions) == (1, 7)
    assert math.prod((4, 4)) * 4 >= found.bytes


def test_estimated_cycles_are_multiplied_by_the_loops_around_them():
    def told(text: str, after: str, cycles: int) -> str:
        assert text.count(after) == 1
        return text.replace(after, f'{after}, backend_config={{"flags":[],"estimated_cycles":"{cycles}","bounds":[]}}')

    assert estimated_cycles(MODULE) == 0
    once = told(MODULE, "all-reduce(%flags), channel_id=2", 100)
    assert estimated_cycles(told(once, "reduce-scatter(%part), channel_id=3", 7)) == 100 + 7 * 9 * 5
