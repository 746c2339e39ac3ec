"""What failed is not tried again, or not yet; what heals is."""

from __future__ import annotations

import pytest

from adapter_router.engine.refusals import Refusals
from adapter_router.errors import AdapterFailed, AdapterRejected, AdapterUnavailable, InternalError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_refusal_stands_for_good() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    refusals.failed("x", AdapterRejected.because(["too large", "no head"]))
    clock.now += 1e9
    for for_good in (False, True):
        with pytest.raises(AdapterRejected) as caught:
            refusals.check("x", for_good=for_good)
        assert caught.value.problems == ("too large", "no head")
    refusals.check("y")


@pytest.mark.parametrize("error", [AdapterUnavailable("gone"), AdapterFailed("changed", "model"), InternalError("?")])
def test_what_may_heal_is_tried_again_ever_later(error: AdapterUnavailable) -> None:
    clock = Clock()
    refusals = Refusals(clock)
    for wait_s in (1, 2, 4, 8, 16, 30, 30):
        refusals.check("x")
        refusals.failed("x", error)
        clock.now += wait_s - 0.001
        with pytest.raises(type(error), match=str(error).replace("?", r"\?")) as caught:
            refusals.check("x")
        assert caught.value is not error and caught.value.param == error.param
        refusals.check("x", for_good=True)
        clock.now += 0.001
    refusals.check("x")


def test_what_loads_after_all_is_forgiven() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    for _ in range(3):
        refusals.failed("x", AdapterUnavailable("gone"))
    refusals.succeeded("x")
    refusals.check("x")
    refusals.failed("x", AdapterUnavailable("gone"))
    clock.now += 1.0
    refusals.check("x")


def test_memory_is_bounded() -> None:
    refusals = Refusals(remembered=10)
    for number in range(1000):
        refusals.failed(number, AdapterRejected.because(["bad"]))
    assert len(refusals._failures) == 10
    refusals.check(989)
    with pytest.raises(AdapterRejected):
        refusals.check(999)
