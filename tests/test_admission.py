"""Who may queue, who is told to come back, and when."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_router.config import RoutingConfig
from adapter_router.errors import AdapterRouterError, InvalidRequest, Overloaded
from adapter_router.routing.admission import Admission
from adapter_router.routing.drain import Drain


def admission(rows: int = 100, tokens: int = 10_000, **weights: float) -> Admission:
    return Admission(RoutingConfig(max_queued_rows=rows, max_queued_tokens=tokens, tenant_weights=weights))


def asked(some: Admission, tenant: str = "t", rows: int = 1, tokens: int = 1, now: float = 0.0) -> bool:
    """Whether a call was let in."""
    if some.refusal(tenant, rows, tokens, math.inf, now) is not None:
        return False
    some.entered(tenant, rows, tokens)
    return True


def overloaded(error: AdapterRouterError | None) -> Overloaded:
    assert isinstance(error, Overloaded)
    return error


def drained(some: Admission, rate: int, seconds: float, start: float = 0.0, tenant: str = "t") -> float:
    """``rate`` rows of 10 tokens leave a second, one at a time. Returns the time at the end."""
    count = round(rate * seconds)
    for number in range(1, count + 1):
        some.left(tenant, 1, 10, start + number / rate, served=True)
    return start + seconds


def test_a_lone_tenant_fills_half_and_a_newcomer_always_finds_room() -> None:
    some = admission()
    shares = []
    for number in range(8):
        shares.append(0)
        while asked(some, f"tenant-{number}"):
            shares[-1] += 1
    assert shares[:4] == [50, 25, 12, 6] and min(shares) >= 1


def test_when_others_come_who_holds_more_than_its_share_gets_no_more() -> None:
    some = admission()
    for _ in range(50):
        assert asked(some, "early")
    for _ in range(25):
        assert asked(some, "late")
    for _ in range(5):
        some.left("early", 1, 1, 0.0, served=True)
    assert not asked(some, "early") and asked(some, "late")


def test_a_weight_of_two_fills_two_thirds() -> None:
    some = admission(rows=90, heavy=2.0)
    count = 0
    while asked(some, "heavy"):
        count += 1
    assert count == 60


def test_tokens_are_limited_as_rows_are() -> None:
    some = admission(rows=100, tokens=1000)
    assert asked(some, tokens=499) and asked(some, tokens=1)
    error = overloaded(some.refusal("t", 1, 1, 60.0, 0.0))
    assert "tokens" in error.message and "'t'" in error.message and "500" in error.message


def test_a_single_row_of_who_has_none_may_take_all_that_is_left() -> None:
    assert asked(admission(rows=1), rows=1)
    some = admission(tokens=1000)
    assert asked(some, tokens=1000)
    assert "1000 tokens are waiting, at most 1000 may" in overloaded(some.refusal("new", 1, 1, 60.0, 0.0)).message


def test_what_the_queue_could_never_hold_is_not_worth_another_try() -> None:
    some = admission(rows=100, tokens=1000)
    assert some.refusal("t", 50, 50, 60.0, 0.0) is None
    for rows, tokens, limit in ((51, 51, "at most 50"), (2, 501, "at most 500"), (1, 1001, "at most 1000")):
        error = some.refusal("t", rows, tokens, 60.0, 0.0)
        assert isinstance(error, InvalidRequest) and not error.retryable and limit in error.message


def test_nothing_is_refused_for_its_wait_before_a_rate_is_known() -> None:
    some = admission()
    for _ in range(50):
        assert asked(some, tokens=100)
    assert some.refusal("new", 1, 1, 0.001, 0.0) is None
    assert overloaded(some.refusal("t", 1, 1, 60.0, 0.0)).retry_after_s == 1.0


def test_rows_that_would_be_late_are_refused_at_once() -> None:
    some = admission(rows=10_000, tokens=100_000)
    for _ in range(4000):
        assert asked(some, tokens=10)
    now = drained(some, rate=100, seconds=10)
    assert some.refusal("t", 1, 10, 60.0, now) is None, "3000 rows, 100 a second: 30 s"
    error = overloaded(some.refusal("t", 1, 10, 20.0, now))
    assert "30.0 s" in error.message and "timeout of 20 s" in error.message and "30000 tokens" in error.message
    assert error.retry_after_s == pytest.approx(14, abs=0.5), "the wait may take 0.8 of the time"


def test_the_wait_of_who_has_little_queued_is_its_own() -> None:
    some = admission(rows=10_000, tokens=100_000)
    for _ in range(4000):
        assert asked(some, tokens=10)
    now = drained(some, rate=100, seconds=10)
    assert some.refusal("t", 1, 10, 5.0, now) is not None
    assert some.refusal("light", 1, 10, 5.0, now) is None


@pytest.mark.parametrize(
    ("others", "wait_s"), [([1000, 1000], 30), ([5], 10), ([5, 5, 5, 5], 10)], ids=["equals", "one small", "four small"]
)
def test_the_wait_is_over_when_all_is_served_or_its_share_has_been_enough(others: list[int], wait_s: float) -> None:
    some = admission(rows=10_000, tokens=100_000)
    for _ in range(2000):
        assert asked(some, tokens=10)
    for number, rows in enumerate(others):
        assert asked(some, f"other-{number}", rows=rows, tokens=10 * rows)
    now = drained(some, rate=100, seconds=10)
    assert some.refusal("t", 1, 10, 1.1 * wait_s / 0.8, now) is None
    assert some.refusal("t", 1, 10, 0.9 * wait_s / 0.8, now) is not None


def test_retry_after_is_when_there_is_room_again() -> None:
    some = admission(rows=10_000, tokens=10_000_000)
    while asked(some, tokens=10):
        pass
    now = drained(some, rate=100, seconds=10)
    while asked(some, tokens=10, now=now):
        pass
    error = overloaded(some.refusal("t", 1000, 10_000, math.inf, now))
    assert 9.5 < error.retry_after_s < 10.5, "1000 rows, 100 a second"
    now = drained(some, rate=100, seconds=error.retry_after_s + 0.2, start=now)
    assert asked(some, rows=1000, tokens=10_000, now=now)
    assert overloaded(some.refusal("t", 4000, 40_000, math.inf, now)).retry_after_s <= 60.0


def test_a_queue_that_is_empty_refuses_nothing_for_its_wait() -> None:
    some = admission(rows=10_000, tokens=100_000)
    for _ in range(1100):
        assert asked(some, tokens=10)
    now = drained(some, rate=100, seconds=11)
    assert some.refusal("t", 100, 1000, 0.01, now) is None


def test_little_traffic_says_nothing_of_how_fast_replicas_are() -> None:
    """One row a second comes and goes; then many at once."""
    some = admission(rows=10_000, tokens=100_000)
    for second in range(100):
        assert asked(some, tokens=10, now=float(second))
        some.left("t", 1, 10, second + 0.05, served=True)
    for _ in range(1000):
        assert asked(some, tokens=10, now=100.0)
    assert some.refusal("t", 1, 10, 60.0, 100.0) is None


def test_a_rate_is_forgotten_after_a_minute() -> None:
    drain = Drain()
    for number in range(200):
        drain.left(1, 10, 10_000, number / 100, served=True)
    assert drain.rates(2.0) == pytest.approx((100, 1000), rel=0.02)
    assert drain.rates(61.0) is not None and drain.rates(63.0) is None


def test_a_rate_follows_what_replicas_do_under_load_and_ignores_what_they_do_without() -> None:
    drain = Drain()
    for number in range(500):
        drain.left(1, 10, 10_000, number / 100, served=True)
    for number in range(500):
        drain.left(1, 10, 10, 5 + number / 10, served=True)
    assert drain.rates(56.0) == pytest.approx((100, 1000), rel=0.02), "slow because little was asked for"
    for number in range(2000):
        drain.left(1, 10, 10_000, 56 + number / 20, served=True)
    assert drain.rates(156.0) == pytest.approx((20, 200), rel=0.05), "slow though much waits"


def test_rows_that_give_up_are_not_served_ones() -> None:
    drain = Drain()
    for number in range(400):
        drain.left(1, 10, 10_000, number / 100, served=number % 4 == 0)
    assert drain.rates(4.0) == pytest.approx((25, 250), rel=0.05)


def test_batches_that_end_together_count_once_each() -> None:
    """32 rows every half second, reported one by one."""
    drain = Drain()
    for number in range(20):
        for _ in range(32):
            drain.left(1, 10, 10_000, number / 2, served=True)
    assert drain.rates(10.0) == pytest.approx((64, 640), rel=0.15)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 5), st.integers(1, 300)), max_size=150), st.integers()
)
def test_counters_come_back_to_nothing_and_limits_hold(calls: list[tuple[str, int, int]], seed: int) -> None:
    some = admission(rows=60, tokens=3000, b=0.1, c=7.0)
    draws = random.Random(seed)
    inside: list[tuple[str, int, int]] = []
    for now, (tenant, rows, tokens) in enumerate(calls):
        if asked(some, tenant, rows, tokens, float(now)):
            inside.append((tenant, rows, tokens))
        if inside and draws.random() < 0.4:
            some.left(*inside.pop(draws.randrange(len(inside))), now=float(now), served=draws.random() < 0.5)
        assert sum(rows for _, rows, _ in inside) == some._total.rows <= 60
        assert sum(tokens for _, _, tokens in inside) == some._total.tokens <= 3000
        assert set(some._tenants) == {tenant for tenant, _, _ in inside}
    for call in inside:
        some.left(*call, now=float(len(calls)), served=True)
    assert some._total.rows == some._total.tokens == some._weights == 0 and not some._tenants
