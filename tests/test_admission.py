"""Who may queue, who is told to come back, and when."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_router.config import RoutingConfig
from adapter_router.errors import AdapterRouterError, InvalidRequest, Overloaded
from adapter_router.routing.admission import Admission, Backlog


def admission(rows: int = 100, tokens: int = 10_000, **weights: float) -> Admission:
    return Admission(RoutingConfig(max_queued_rows=rows, max_queued_tokens=tokens, tenant_weights=weights))


IDLE = Backlog()


def asked(some: Admission, tenant: str = "t", rows: int = 1, tokens: int = 1) -> bool:
    """Whether a call was let in."""
    if some.refusal(tenant, rows, tokens, math.inf, IDLE) is not None:
        return False
    some.entered(tenant, rows, tokens)
    return True


def overloaded(error: AdapterRouterError | None) -> Overloaded:
    assert isinstance(error, Overloaded)
    return error


def backlog(some: Admission, tokens_s: float | None = 1000.0) -> Backlog:
    """As it is while all that is queued can run, and no replica is free."""
    return Backlog(some._total.tokens, tokens_s)


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
        some.left("early", 1, 1)
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
    error = overloaded(some.refusal("t", 1, 1, 60.0, IDLE))
    assert "tokens" in error.message and "'t'" in error.message and "500" in error.message


def test_a_single_row_of_who_has_none_may_take_all_that_is_left() -> None:
    assert asked(admission(rows=1), rows=1)
    some = admission(tokens=1000)
    assert asked(some, tokens=1000)
    assert "1000 tokens are waiting, at most 1000 may" in overloaded(some.refusal("new", 1, 1, 60.0, IDLE)).message


def test_what_the_queue_could_never_hold_is_not_worth_another_try() -> None:
    some = admission(rows=100, tokens=1000)
    assert some.refusal("t", 50, 50, 60.0, IDLE) is None
    for rows, tokens, limit in ((51, 51, "at most 50"), (2, 501, "at most 500"), (1, 1001, "at most 1000")):
        error = some.refusal("t", rows, tokens, 60.0, IDLE)
        assert isinstance(error, InvalidRequest) and not error.retryable and limit in error.message


def test_nothing_is_refused_for_its_wait_before_a_pace_is_known() -> None:
    some = admission()
    for _ in range(50):
        assert asked(some, tokens=100)
    assert some.refusal("new", 1, 1, 0.001, backlog(some, None)) is None
    assert overloaded(some.refusal("t", 1, 1, 60.0, backlog(some, None))).retry_after_s == 1.0


def test_rows_that_would_be_late_are_refused_at_once() -> None:
    some = admission(rows=10_000, tokens=100_000)
    for _ in range(3000):
        assert asked(some, tokens=10)
    assert some.refusal("t", 1, 10, 60.0, backlog(some)) is None, "30,000 tokens, 1000 a second: 30 s"
    error = overloaded(some.refusal("t", 1, 10, 20.0, backlog(some)))
    assert "30.0 s" in error.message and "timeout of 20 s" in error.message and "30000 tokens" in error.message
    assert error.retry_after_s == pytest.approx(14, abs=0.5), "the wait may take 0.8 of the time"


def test_while_a_replica_is_free_nobody_is_refused_for_the_wait() -> None:
    """Rows that wait for loads, or on their way: however many they are, they are not ahead of anybody."""
    some = admission(rows=10_000, tokens=100_000)
    for _ in range(3000):
        assert asked(some, tokens=10)
    assert some.refusal("t", 1, 10, 0.01, Backlog(0, 1000.0)) is None


def test_the_wait_of_who_has_little_queued_is_its_own() -> None:
    some = admission(rows=10_000, tokens=100_000)
    for _ in range(3000):
        assert asked(some, tokens=10)
    assert some.refusal("t", 1, 10, 5.0, backlog(some)) is not None
    assert some.refusal("light", 1, 10, 5.0, backlog(some)) is None


@pytest.mark.parametrize(
    ("others", "wait_s"), [([1000, 1000], 30), ([5], 10), ([5, 5, 5, 5], 10)], ids=["equals", "one small", "four small"]
)
def test_the_wait_is_over_when_all_is_served_or_its_share_has_been_enough(others: list[int], wait_s: float) -> None:
    some = admission(rows=10_000, tokens=100_000)
    for _ in range(1000):
        assert asked(some, tokens=10)
    for number, rows in enumerate(others):
        assert asked(some, f"other-{number}", rows=rows, tokens=10 * rows)
    assert some.refusal("t", 1, 10, 1.1 * wait_s / 0.8, backlog(some)) is None
    assert some.refusal("t", 1, 10, 0.9 * wait_s / 0.8, backlog(some)) is not None


def test_retry_after_is_when_there_is_room_again() -> None:
    some = admission(rows=10_000, tokens=10_000_000)
    while asked(some, tokens=10):
        pass
    error = overloaded(some.refusal("t", 1000, 10_000, math.inf, backlog(some)))
    assert 9.5 < error.retry_after_s < 10.5, "1000 rows, 100 a second"
    some.left("t", 1020, 10_200)  # what that time is enough for
    assert asked(some, rows=1000, tokens=10_000)
    assert overloaded(some.refusal("t", 4000, 40_000, math.inf, backlog(some))).retry_after_s <= 60.0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 5), st.integers(1, 300)), max_size=150), st.integers()
)
def test_counters_come_back_to_nothing_and_limits_hold(calls: list[tuple[str, int, int]], seed: int) -> None:
    some = admission(rows=60, tokens=3000, b=0.1, c=7.0)
    draws = random.Random(seed)
    inside: list[tuple[str, int, int]] = []
    for tenant, rows, tokens in calls:
        if asked(some, tenant, rows, tokens):
            inside.append((tenant, rows, tokens))
        if inside and draws.random() < 0.4:
            some.left(*inside.pop(draws.randrange(len(inside))))
        assert sum(rows for _, rows, _ in inside) == some._total.rows <= 60
        assert sum(tokens for _, _, tokens in inside) == some._total.tokens <= 3000
        assert set(some._tenants) == {tenant for tenant, _, _ in inside}
    for call in inside:
        some.left(*call)
    assert some._total.rows == some._total.tokens == some._weights == 0 and not some._tenants
