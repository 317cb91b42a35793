"""What people see: whole lines where there is no terminal, bars where there is one, and how often."""

import io
import itertools
import sys

import pytest

from fopd_jax import console
from fopd_jax.console import Track, progress, say, spell_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _clock(monkeypatch: pytest.MonkeyPatch, terminal: bool = False) -> tuple[list[float], io.StringIO]:
    """A time to set, and what stderr gets."""
    now, stream = [0.0], Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return now, stream


def _steps(monkeypatch: pytest.MonkeyPatch, seconds: float, count: int, *, at_once: bool) -> list[int]:
    """Which steps of so many seconds each are told by a line."""
    now, stream = _clock(monkeypatch)
    track = Track("step", count, at_once=at_once, clock=lambda: now[0])
    for step in range(1, count + 1):
        now[0] += seconds
        track.to(step, "loss 0.5")
    track.close()
    lines = stream.getvalue().splitlines()
    assert all(line == f"step {line.split('/')[0][5:]}/{count} loss 0.5" for line in lines)
    return [int(line.split("/")[0][5:]) for line in lines]


def test_lines_come_soon_then_ever_more_rarely_and_at_the_end(monkeypatch: pytest.MonkeyPatch):
    assert _steps(monkeypatch, 1.0, 25, at_once=True) == [1, 11, 21, 25]
    long = _steps(monkeypatch, 1.0, 20_000, at_once=True)
    gaps = [b - a for a, b in itertools.pairwise(long)]
    assert set(gaps[:5]) == {10}
    assert set(gaps[-50:-1]) == {60}
    assert gaps[:-1] == sorted(gaps[:-1])
    assert _steps(monkeypatch, 300.0, 4, at_once=True) == [1, 2, 3, 4]  # slow steps are all told


def test_what_is_short_says_nothing_unless_it_is_training(monkeypatch: pytest.MonkeyPatch):
    assert _steps(monkeypatch, 0.1, 30, at_once=False) == []
    assert _steps(monkeypatch, 0.1, 30, at_once=True) == [1, 30]
    assert _steps(monkeypatch, 1.0, 8, at_once=False) == [5, 8]


@pytest.mark.parametrize("terminal", [False, True])
def test_carriage_returns_are_for_terminals_alone(monkeypatch: pytest.MonkeyPatch, terminal: bool):
    now, stream = _clock(monkeypatch, terminal)
    monkeypatch.setattr(console, "_BAR_AFTER_S", 0.0)
    with progress("read", 3, "files", clock=lambda: now[0]) as count:
        for _ in range(3):
            now[0] += 30
            count(1)
    assert ("\r" in stream.getvalue()) == terminal
    assert "3/3" in stream.getvalue()
    assert stream.getvalue().endswith("\n")


def test_a_terminal_of_no_size_is_shown_a_bar_too(monkeypatch: pytest.MonkeyPatch):
    _, stream = _clock(monkeypatch, terminal=True)
    monkeypatch.setattr(stream, "fileno", lambda: 2)
    monkeypatch.setattr("os.get_terminal_size", lambda *_: (0, 0))
    track = Track("step", 2, at_once=True)
    track.to(2, "loss 0.25")
    track.close()
    assert "step: 100%|" in stream.getvalue()
    assert "| 2/2 [00:00, loss 0.25]" in stream.getvalue()


def test_the_first_part_is_left_out_of_the_rate(monkeypatch: pytest.MonkeyPatch):
    """It takes 100 s, the others 10 s a unit."""
    now, stream = _clock(monkeypatch)
    with progress("evaluation", 8, "images", clock=lambda: now[0]) as count:
        now[0] += 100
        count(4)
        now[0] += 20
        count(2)
    assert stream.getvalue().splitlines() == ["evaluation 4/8", "evaluation 6/8 images/s 0.1 ETA 00:20"]


def test_bytes_are_told_in_units_that_can_be_read(monkeypatch: pytest.MonkeyPatch):
    now, stream = _clock(monkeypatch)
    with progress("read transformer", 4 << 30, sized=True, clock=lambda: now[0]) as count:
        for _ in range(4):
            now[0] += 60
            count(1 << 30)
    assert stream.getvalue().splitlines()[1] == "read transformer 2.00GB/4.00GB 17.1MB/s ETA 02:00"


def test_lines_of_text_do_not_break_a_bar(monkeypatch: pytest.MonkeyPatch):
    """On a terminal both streams are one."""
    _, stream = _clock(monkeypatch, terminal=True)
    monkeypatch.setattr(sys, "stdout", stream)
    track = Track("step", 2, at_once=True)
    track.to(1)
    say("scores")
    track.close()
    before = stream.getvalue().partition("scores\n")[0]
    assert before.endswith("\r")  # at the beginning of a line, which has been cleared
    assert not before.rstrip("\r").rpartition("\r")[2].strip()


def test_one_process_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(console, "speaks", lambda: False)
    say("scores")
    track = Track("step", 2, at_once=True)
    track.to(2)
    track.close()
    assert capsys.readouterr() == ("", "")


SPELLED = [(0.0, "00:00"), (83.6, "01:24"), (7200.0, "2:00:00"), (90061.0, "1 d 1:01:01")]


@pytest.mark.parametrize(("seconds", "words"), SPELLED)
def test_times_are_spelled(seconds: float, words: str):
    assert spell_seconds(seconds) == words


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("name", "n", "what"), ("a", "1,000", ""), ("longest", "7", "it is")]
    assert console.align(rows, right={1}) == "name         n  what\na        1,000\nlongest      7  it is"
    assert console.align([("a", "b"), ("cc", "d")]) == "a   b\ncc  d"
