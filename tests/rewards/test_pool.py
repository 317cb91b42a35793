"""The pool: every submitted batch is answered once, whatever a reward does, and no number comes of a failure."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fopd_jax.exits import RETRY, explain
from fopd_jax.rewards import lanes
from fopd_jax.rewards import pool as module
from fopd_jax.rewards.pool import LEAST, Pool, Ticket, TooManyFailures
from fopd_jax.rewards.reward import Metadata, Reward, Scores, all_failed, collect

ROOT, WAIT_S = Path(__file__).parents[2], 30.0


def first_pixels(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    return collect([(float(image[0, 0, 0]), {"prompt": prompt}) for image, prompt in zip(images, prompts, strict=True)])


def reward(name: str = "one", runs: Any = "host", score: Callable[..., Any] = first_pixels, **more: Any) -> Reward:
    return Reward(name, score, (None, None), runs, **more)


def batch(*values: int) -> tuple[np.ndarray, list[str], list[dict[str, Any]]]:
    """Images that say by themselves what they are to score."""
    images = np.zeros((len(values), 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = values
    return images, [f"prompt {value}" for value in values], [{}] * len(values)


class Gate:
    """A reward that says when it is entered and goes on when it is told."""

    def __init__(self) -> None:
        self.entered, self.go_on, self.order = threading.Semaphore(0), threading.Semaphore(0), []

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        self.order.append(int(images[0, 0, 0, 0]))
        self.entered.release()
        assert self.go_on.acquire(timeout=WAIT_S)
        return first_pixels(images, prompts, metadata)


def test_every_batch_gets_its_own_scores_of_every_reward():
    rewards = {runs: reward(runs, runs) for runs in ("host", "remote", "device")}
    with Pool(rewards, most_failed=0.0, outstanding=5) as pool:
        tickets = [pool.submit(*batch(i, i + 1)) for i in range(5)]
        for i in reversed(range(5)):
            found = tickets[i].result()
            assert list(found) == ["host", "remote", "device"]
            for scores in found.values():
                np.testing.assert_array_equal(scores.values, [i, i + 1])
                assert [each["prompt"] for each in scores.details] == [f"prompt {i}", f"prompt {i + 1}"]


def test_a_batch_may_ask_some_of_the_rewards_or_none():
    with Pool({"one": reward(), "two": reward("two")}, most_failed=0.0, outstanding=1) as pool:
        assert list(pool.submit(*batch(1), names=["two"]).result()) == ["two"]
        assert pool.submit(*batch(1), names=[]).result() == {}
        assert list(pool.submit(*batch(1)).result()) == ["one", "two"]


def test_host_and_remote_run_in_the_background_and_the_device_in_the_callers_thread():
    threads: dict[str, threading.Thread] = {}

    def remember(name: str) -> Callable[..., Scores]:
        def score(*arguments: Any) -> Scores:
            threads[name] = threading.current_thread()
            return first_pixels(*arguments)

        return score

    with Pool(
        {runs: reward(runs, runs, remember(runs)) for runs in ("device", "host", "remote")}, most_failed=0.0
    ) as pool:
        ticket = pool.submit(*batch(1))
        assert threads["device"] is threading.current_thread()  # already done
        ticket.result()
    assert len(set(threads.values())) == 3
    assert all(threads[name].daemon for name in ("host", "remote"))


def test_a_reward_takes_one_batch_at_a_time_in_order_and_others_run_beside_it():
    slow, other = Gate(), Gate()
    with Pool({"slow": reward("slow", score=slow), "other": reward("other", "remote", other)}, most_failed=0.0) as pool:
        tickets = [pool.submit(*batch(i)) for i in (1, 2)]
        assert slow.entered.acquire(timeout=WAIT_S)
        assert other.entered.acquire(timeout=WAIT_S)  # beside it
        assert pool.statistics() == {"rewards/slow/queue": 2.0, "rewards/other/queue": 2.0}
        assert slow.order == [1]
        for gate in (slow, other):
            gate.go_on.release(2)
        assert [ticket.result()["slow"].values[0] for ticket in tickets] == [1.0, 2.0]
        assert slow.order == other.order == [1, 2]


def test_a_remote_reward_may_take_several_batches_at_once():
    gate, host = Gate(), Gate()
    rewards = {"gate": reward("gate", "remote", gate), "host": reward("host", "host", host)}
    with Pool(rewards, most_failed=0.0, workers=2) as pool:
        tickets = [pool.submit(*batch(i)) for i in (1, 2)]
        assert gate.entered.acquire(timeout=WAIT_S)
        assert gate.entered.acquire(timeout=WAIT_S)
        assert host.entered.acquire(timeout=WAIT_S)
        assert host.order == [1]
        for each in (gate, host):
            each.go_on.release(2)
        assert [ticket.result()["gate"].values[0] for ticket in tickets] == [1.0, 2.0]


def test_submit_waits_for_room():
    gate, third = Gate(), threading.Event()
    with Pool({"gate": reward("gate", score=gate)}, most_failed=0.0, outstanding=2) as pool:
        tickets = [pool.submit(*batch(i)) for i in (1, 2)]

        def more() -> None:
            tickets.append(pool.submit(*batch(3)))
            third.set()

        thread = threading.Thread(target=more)
        thread.start()
        assert not third.wait(0.2)  # it cannot have room: two batches are not scored
        gate.go_on.release(3)
        assert third.wait(WAIT_S)  # though nobody has collected the first
        thread.join()
        assert [ticket.result()["gate"].values[0] for ticket in tickets] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("runs", ["host", "device"])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda *_: {}["target"], "KeyError: 'target'"),
        (
            lambda images, *_: first_pixels(images[1:], ["a"], []),
            "ValueError: found 1 scores, expected those of 2 images",
        ),
        (lambda *_: None, "TypeError: found a NoneType, expected Scores"),
        (lambda *_: [1.0, 2.0], "TypeError: found a list, expected Scores"),
    ],
)
def test_a_bug_is_a_failure_with_its_reason_told_once(
    answer: Callable[..., Any], reason: str, runs: str, capsys: pytest.CaptureFixture[str]
):
    with Pool({"bad": reward("bad", runs, answer), "good": reward("good")}, most_failed=1.0) as pool:
        for _ in range(3):
            found = pool.submit(*batch(1, 2)).result()
            assert found["bad"].failed.all()
            assert [each["error"] for each in found["bad"].details] == [reason] * 2
            np.testing.assert_array_equal(found["good"].values, [1, 2])
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"warning: rewards.bad: {reason} (")
    assert ".py:" in told


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_without_an_answer_is_a_failure():
    def leave(*_: Any) -> Scores:
        raise SystemExit

    with Pool({"one": reward(score=leave)}, most_failed=1.0) as pool:
        scores = pool.submit(*batch(1)).result()["one"]
    assert scores.details[0]["error"] == "the reward ended its thread"


def test_a_reward_that_hangs_fails_and_is_replaced(capsys: pytest.CaptureFixture[str]):
    gate = Gate()

    def score(images: np.ndarray, *rest: Any) -> Scores:
        return gate(images, *rest) if images[0, 0, 0, 0] == 1 else first_pixels(images, *rest)

    with Pool({"one": reward(score=score)}, most_failed=1.0, limit=0.2) as pool:
        hung, fine = pool.submit(*batch(1)), pool.submit(*batch(2))
        assert hung.result()["one"].details[0]["error"] == "TimeoutError: no answer within 0.2 s"
        assert fine.result()["one"].values[0] == 2.0
        gate.go_on.release()  # what it says at last changes nothing
        assert hung.result()["one"].failed.all()
    assert (
        "warning: rewards.one: TimeoutError: no answer within 0.2 s; its thread is left behind"
        in capsys.readouterr().err
    )


def test_who_asks_need_not_wait():
    gate = Gate()
    with Pool({"slow": reward("slow", score=gate), "fast": reward("fast")}, most_failed=1.0) as pool:
        first, second = pool.submit(*batch(1)), pool.submit(*batch(2))
        assert gate.entered.acquire(timeout=WAIT_S)
        found = first.result(timeout=0.2)
        assert found["slow"].details[0]["error"] == "TimeoutError: no answer within 0.2 s"
        gate.go_on.release(2)  # the reward is slow, not hung: its next batch comes after this one
        assert second.result()["slow"].values[0] == 2.0
        assert gate.order == [1, 2]
        assert first.result() is found


# ---- failures are counted


def fails_for(values: set[int], reason: str = "ConnectError: refused") -> Callable[..., Scores]:
    def score(images: np.ndarray, *_: Any) -> Scores:
        return collect([OSError(reason) if image[0, 0, 0] in values else (1.0, {}) for image in images])

    return score


def test_too_many_failures_end_it_with_one_line():
    def score(images: np.ndarray, *_: Any) -> Scores:
        return all_failed(len(images), "ConnectError: refused" if images[0, 0, 0, 0] else "HTTP 500")

    with Pool({"ocr": reward("ocr", score=score)}, most_failed=0.2) as pool:
        pool.submit(*batch(*[0] * (LEAST - 1))).result()  # too few to judge
        ticket = pool.submit(*batch(1, 1))
        with pytest.raises(TooManyFailures) as caught:
            ticket.result()
        assert ticket.result()["ocr"].failed.all()  # for whoever has to agree with others first
    fault = explain(caught.value)
    assert fault is not None
    assert fault.status == RETRY
    assert fault.message == (
        "error: rewards.ocr: 100% of its last 65 scores failed (65 of 65 in all), most often: HTTP 500 (63 times); "
        "ConnectError: refused (2 times); at most 20% may fail"
    )


@pytest.mark.parametrize(("allowed", "ends"), [(0.25, False), (0.24, True), (1.0, False)])
def test_the_share_is_that_of_single_scores(allowed: float, ends: bool):
    with Pool({"one": reward(score=fails_for({7}))}, most_failed=allowed) as pool:
        ticket = pool.submit(*batch(*[7, 0, 0, 0] * (LEAST // 4)))
        if ends:
            with pytest.raises(TooManyFailures, match="25% of its last 64"):
                ticket.result()
        else:
            assert ticket.result()["one"].failed.sum() == LEAST // 4


def test_the_recent_scores_count_not_those_of_long_ago():
    """A server that fails after a good day ends the run as soon as at its start; one that recovered does not."""
    with Pool({"one": reward(score=fails_for({7}))}, most_failed=0.5, window=LEAST) as pool:
        for _ in range(20):
            pool.submit(*batch(*[0] * LEAST)).result()
        with pytest.raises(TooManyFailures, match=r"52% of its last 64 scores failed \(33 of 1313 in all\)"):
            pool.submit(*batch(*[7] * 33)).result()
        pool.submit(*batch(*[0] * LEAST)).result()


def test_failures_of_one_reward_are_not_those_of_another():
    rewards = {"bad": reward("bad", score=fails_for({0})), "good": reward("good")}
    with Pool(rewards, most_failed=0.1) as pool:
        pool.submit(*batch(*[0] * LEAST), names=["good"]).result()
        with pytest.raises(TooManyFailures, match=r"^rewards\.bad: 100%"):
            pool.submit(*batch(*[0] * LEAST)).result()


def test_all_rewards_are_counted_even_if_the_first_ends_it():
    rewards = {"bad": reward("bad", score=fails_for({0})), "other": reward("other", score=fails_for({0, 1}))}
    with Pool(rewards, most_failed=0.6) as pool:
        with pytest.raises(TooManyFailures, match=r"^rewards\.bad: 100%"):
            pool.submit(*batch(*[0] * LEAST)).result()
        with pytest.raises(TooManyFailures, match=r"^rewards\.other: 100% .* \(128 of 128 in all\)"):
            pool.submit(*batch(*[1] * LEAST)).result()


def test_statistics_are_those_since_the_last_call(monkeypatch: pytest.MonkeyPatch):
    clock = iter(float(at) for at in range(100))  # every look at the clock is a second later
    monkeypatch.setattr(lanes, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    pool = Pool({"one": reward(runs="device", score=fails_for({7}))}, most_failed=1.0)
    assert pool.statistics() == {"rewards/one/queue": 0.0}
    for values in ((1, 2, 7), (1, 7, 7)):
        pool.submit(*batch(*values)).result()
    assert pool.statistics() == {
        "rewards/one/queue": 0.0, "rewards/one/latency": 1.0, "rewards/one/per_second": 3.0, "rewards/one/failed": 0.5,
    }  # fmt: skip
    assert pool.statistics() == {"rewards/one/queue": 0.0}


def test_every_ticket_is_answered_whatever_comes_together():
    """Rewards that are slow, raise, hang and leave, several threads that submit, and an end in the middle."""
    rng, stuck = np.random.default_rng(0), threading.Event()

    def moody(images: np.ndarray, *rest: Any) -> Scores:
        mood = int(images[0, 0, 0, 0]) % 10
        if mood == 0:
            raise OSError("refused")
        if mood == 1:
            stuck.wait(0.05)  # beyond the limit
        if mood == 2:
            time.sleep(0.002)
        return first_pixels(images, *rest)

    rewards = {name: reward(name, runs, moody) for name, runs in (("a", "host"), ("b", "remote"), ("c", "device"))}
    pool = Pool(rewards, most_failed=1.0, workers=3, outstanding=4, limit=0.02)
    tickets: list[tuple[list[int], Ticket]] = []

    def submit(seed: int) -> None:
        mine = np.random.default_rng(seed)
        for _ in range(40):
            values = mine.integers(2, 250, mine.integers(1, 4)).tolist()
            try:
                tickets.append((values, pool.submit(*batch(*values))))
            except RuntimeError:  # the end
                return

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in rng.integers(0, 1000, 3)]
    for thread in threads:
        thread.start()
    while len(tickets) < 60:
        time.sleep(0.001)
    pool.close()
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads)
    for values, ticket in tickets:
        for scores in ticket.result(timeout=WAIT_S).values():
            assert scores.failed.all() or scores.values.tolist() == values
            assert values[0] % 10 or scores.failed.all()
    stuck.set()


# ---- the end


def test_closing_gives_up_what_has_not_begun_and_waits_for_the_rest():
    gate, closed = Gate(), threading.Event()
    pool = Pool({"gate": reward("gate", score=gate)}, most_failed=1.0)
    running, waiting = pool.submit(*batch(1)), pool.submit(*batch(2))
    assert gate.entered.acquire(timeout=WAIT_S)
    closing = threading.Thread(target=lambda: (pool.close(), closed.set()))
    closing.start()
    assert waiting.result()["gate"].details[0]["error"] == "the pool of rewards is closed"
    assert not closed.is_set()
    gate.go_on.release()
    assert running.result()["gate"].values[0] == 1.0
    closing.join(WAIT_S)
    assert closed.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "reward-gate"]
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(*batch(3))
    pool.close()


def test_closing_does_not_wait_for_what_hangs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CLOSING_S", 0.2)
    gate = Gate()
    pool = Pool({"gate": reward("gate", score=gate)}, most_failed=1.0)
    ticket = pool.submit(*batch(1))
    assert gate.entered.acquire(timeout=WAIT_S)
    pool.close()
    assert ticket.result()["gate"].details[0]["error"] == "the pool of rewards is closed"
    gate.go_on.release()


def test_who_waits_for_room_is_told_of_the_end():
    gate, errors = Gate(), []
    pool = Pool({"gate": reward("gate", score=gate)}, most_failed=1.0, outstanding=1)
    pool.submit(*batch(1))
    assert gate.entered.acquire(timeout=WAIT_S)

    def more() -> None:
        try:
            pool.submit(*batch(2))
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=more)
    thread.start()
    closing = threading.Thread(target=pool.close)
    closing.start()
    while not pool._closed.is_set():
        pass
    gate.go_on.release()
    thread.join(WAIT_S)
    closing.join(WAIT_S)
    assert errors == ["the pool of rewards is closed"]
    assert gate.order == [1]


def test_a_program_ends_though_a_reward_hangs():
    """Python waits for no thread of the pool, closed or not."""
    program = (
        "import threading, numpy as np\n"
        "from fopd_jax.rewards.pool import Pool\n"
        "from fopd_jax.rewards.reward import Reward\n"
        "entered = threading.Event()\n"
        "def score(*_):\n"
        "    entered.set()\n"
        "    threading.Event().wait()\n"
        "pool = Pool({'one': Reward('one', score, (None, None), 'host')}, most_failed=1.0)\n"
        "ticket = pool.submit(np.zeros((1, 2, 2, 3), np.uint8), [''], [{}])\n"
        "assert entered.wait(30)\n"
        "print('done')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"most_failed": 1.5}, "most_failed: found 1.5, expected a share from 0 to 1"),
        ({"limit": 0.0}, "limit: found 0.0, expected seconds above 0"),
        ({"workers": 0}, "workers: found 0, expected at least 1"),
        ({"window": 10}, "window: found 10, expected at least 64"),
        ({"outstanding": 0}, "outstanding: found 0, expected at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        Pool({}, **{"most_failed": 0.1, **arguments})


def test_batches_that_do_not_fit_are_refused():
    with Pool({"one": reward()}, most_failed=0.1, outstanding=1) as pool:
        for _ in range(2):  # and take no room
            with pytest.raises(ValueError, match="2 images, 1 prompts, 2 metadata"):
                pool.submit(np.zeros((2, 2, 2, 3), np.uint8), ["a"], [{}, {}])
            with pytest.raises(ValueError, match=r"found \['two'\], expected some of one"):
                pool.submit(*batch(1), names=["two"])
