from fopd_jax.rewards.served.breaker import Breaker


def test_it_opens_after_failures_in_a_row_and_closes_by_a_success():
    breaker = Breaker(after=3, rest=1.0)
    for now in (0.0, 1.0):
        breaker.fail(now)
    breaker.succeed()
    for now in (2.0, 3.0):
        breaker.fail(now)
        assert breaker.state(now) == "closed"
    breaker.fail(4.0)
    assert [breaker.state(now) for now in (4.0, 4.9, 5.0, 100.0)] == ["open", "open", "half-open", "half-open"]
    breaker.succeed()
    assert breaker.state(4.5) == "closed"


def test_a_probe_that_fails_opens_it_for_twice_as_long_up_to_a_limit():
    breaker, now, rests = Breaker(after=1, rest=1.0, longest=30.0), 0.0, []
    for _ in range(8):
        breaker.fail(now)
        assert breaker.until is not None
        rests.append(breaker.until - now)
        now = breaker.until
    assert rests == [1, 2, 4, 8, 16, 30, 30, 30]


def test_failures_while_it_is_open_tell_nothing_new():
    breaker = Breaker(after=1, rest=1.0)
    breaker.fail(0.0)
    for _ in range(100):
        breaker.fail(0.5)
    assert breaker.until == 1.0


def test_a_server_that_is_down_for_ever_is_no_overflow():
    breaker = Breaker(after=1)
    breaker.failures = 10**6
    breaker.fail(0.0)
    assert breaker.until == 30.0
