"""What may be sent a second time: a part of what was sent first."""

from __future__ import annotations

from adapter_router.routing.retry_budget import RetryBudget


def test_a_tenth_of_the_rows_may_be_sent_again() -> None:
    budget = RetryBudget(0.1, reserve=20, per_second=0)
    assert budget.take(20, 0.0), "what a replica held when it died, before any row was answered"
    again = 0
    for _ in range(10_000):
        budget.earn(1)
        again += budget.take(1, 0.0)
    assert 990 <= again <= 1000


def test_saved_up_budget_is_bounded() -> None:
    budget = RetryBudget(0.1, reserve=20, per_second=0)
    budget.earn(1_000_000)
    assert not budget.take(21, 0.0) and budget.take(20, 0.0) and not budget.take(1, 0.0)


def test_time_fills_it_when_no_rows_come() -> None:
    budget = RetryBudget(0.1, reserve=20, per_second=10)
    assert budget.take(20, 5.0)
    assert not budget.take(6, 5.5) and budget.take(5, 5.5)
