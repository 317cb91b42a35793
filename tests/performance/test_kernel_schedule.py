"""Static schedules: a real one, trimmed to its scalar instructions and branches, and all that can be wrong with one."""

from pathlib import Path

import pytest

from fopd_jax.performance.kernel_schedule import Loop, find_dumps, read_schedule

# A product of [2048, 256] and [256, 384] in 4 x 3 blocks of 512 x 128, each in a loop of 4 parts of 128 rows; v6e,
# libtpu 0.0.42.1. 153 bundles; the grid's loop is 0x6 to 0x92 and its delay slots, the inner one 0x3e to 0x77 and its.
KNOWN = (Path(__file__).parent / "known_kernel_bundles.txt").read_text()
OUTSIDE, BODY, INNER = 6 + 2, 0x96 - 0x6 + 1, 0x7B - 0x3E + 1


def _cycles(steps: int, trips: int) -> int:
    return OUTSIDE + steps * (BODY + (trips - 1) * INNER)


def _with(text: str, *pairs: tuple[str, str]) -> str:
    """The text with each first part, which stands there, replaced."""
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


def test_a_kernel_counts_its_loops():
    found = read_schedule(KNOWN, "known")
    assert found.bundles == 153
    assert found.loops == (Loop(0x6, 0x96, 12), Loop(0x3E, 0x7B, 4))
    assert found.cycles == _cycles(12, 4) == 3980


@pytest.mark.parametrize(("rows", "trips"), [(1, 1), (2, 4), (4, 32), (64, 7)])
def test_the_count_scales_with_the_grid_and_with_the_inner_loop(rows: int, trips: int):
    """The grid's loop is pipelined: it turns twice more than the grid has steps."""
    text = _with(
        KNOWN,
        ("%s15_s18, 14 /* loop exit", f"%s15_s18, {3 * rows + 2} /* loop exit"),
        ("(4, 3)", f"({rows}, 3)"),
        ("%s355_s23, 4 /* loop exit", f"%s355_s23, {trips} /* loop exit"),
    )
    assert read_schedule(text, "known").cycles == _cycles(3 * rows, trips)


@pytest.mark.parametrize(("start", "step", "end", "trips"), [(0, 2, 8, 4), (3, 1, 8, 5), (0, 3, 8, 3)])
def test_a_loop_may_start_and_step_as_it_likes(start: int, step: int, end: int, trips: int):
    text = _with(
        KNOWN,
        ("%s1561_s23 = smov (!%p308_p2), 0", f"%s1561_s23 = smov (!%p308_p2), {start}"),
        ("sadd.s32 1, %s1357_s23", f"sadd.s32 {step}, %s1357_s23"),
        ("%s355_s23, 4 /* loop exit", f"%s355_s23, {end} /* loop exit"),
    )
    assert read_schedule(text, "known").cycles == _cycles(12, trips)


def test_two_cores_share_a_grid():
    """Each turns for half of it, at the same time."""
    assert read_schedule(_with(KNOWN, ("s18, 14 /* loop", "s18, 8 /* loop")), "known").cycles == _cycles(6, 4)


@pytest.mark.parametrize(
    ("counter", "phi", "other"),
    [
        ("%s355_s23", "%s1357_s23", "%s1333_s13"),
        ("%s15_s18", "%s1353_s18", "%s1333_s13"),
    ],  # of the inner loop, the grid's
)
def test_a_counter_may_be_spilled(counter: str, phi: str, other: str):
    spilled = f"%s900_s1 = sld [smem:[#allocation9_spill]] ;;  %901 = sst [smem:[#allocation9_spill]] {phi}"
    text = _with(KNOWN, (f"{counter} = sadd.s32 1, {phi}", f"{spilled} ;;  {counter} = sadd.s32 1, %s900_s1"))
    assert read_schedule(text, "known").cycles == _cycles(12, 4)
    stored = f"%902 = sst [smem:[#allocation9_spill]] {other} ;;  %s60_s23 = sadd.s32"
    with pytest.raises(ValueError, match="not a constant of the schedule"):
        read_schedule(_with(text, ("%s60_s23 = sadd.s32", stored)), "known")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%s355_s23, 4 /* loop exit", "%s355_s23, %s77_s1 /* loop exit"),  # its bound is not known
        ("%s1561_s23 = smov (!%p308_p2), 0", "%s1561_s23 = sld (!%p308_p2), 0"),  # where it starts
        ("%s355_s23 = sadd.s32 1, %s1357_s23", "%s355_s23 = sadd.s32 %s77_s1, %s1357_s23"),  # its step
    ],
)
def test_a_loop_whose_trips_are_not_told_is_refused_by_name(old: str, new: str):
    with pytest.raises(ValueError, match=r"^kernel attention\.1: the loop at bundle 0x3e turns a number of times"):
        read_schedule(_with(KNOWN, (old, new)), "attention.1")


def test_a_loop_without_a_known_test_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^kernel norm: the loop at bundle 0x3e has no exit test"):
        read_schedule(_with(KNOWN, ("4 /* loop exit test */", "4")), "norm")


def test_a_grid_that_the_loop_does_not_run_is_refused():
    with pytest.raises(ValueError, match=r"^kernel known: the loop at bundle 0x6 turns 12 times, but its grid has 20"):
        read_schedule(_with(KNOWN, ("(4, 3)", "(4, 5)")), "known")


def test_a_text_without_bundles_is_refused():
    with pytest.raises(ValueError, match="kernel known: found no bundles"):
        read_schedule("nothing", "known")


def test_the_newest_dump_of_a_name_is_found(tmp_path: Path):
    for name in ("1-norm.1-71-final_bundles.txt", "20-norm.1-01-final_bundles.txt", "3-norm.12-71-final_bundles.txt",
                 "30-norm.1-70-schedule-analysis_final_bundles.txt", "TLP.txt"):  # fmt: skip
        (tmp_path / name).touch()
    found = find_dumps(tmp_path, ["norm.1", "norm.2"])
    assert found == {"norm.1": tmp_path / "20-norm.1-01-final_bundles.txt"}
