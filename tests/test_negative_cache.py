"""What failed is not tried again, or not yet; what heals is."""

from __future__ import annotations

import gc
import weakref

import pytest

from adapter_router.engine.refusals import Refusals
from adapter_router.errors import AdapterFailed, AdapterRejected, AdapterUnavailable, InternalError

X = ("x", "as asked for")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_refusal_stands_for_good() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    refusals.failed(X, AdapterRejected.because(["too large", "no head"]))
    clock.now += 1e9
    refusals.arrived("x")
    with pytest.raises(AdapterRejected) as caught:
        refusals.check(X)
    assert caught.value.problems == ("too large", "no head")
    refusals.check(("x", "other"))


@pytest.mark.parametrize("error", [AdapterUnavailable("gone"), AdapterFailed("changed", "model"), InternalError("?")])
def test_what_may_heal_is_tried_again_ever_later(error: AdapterUnavailable) -> None:
    clock = Clock()
    refusals = Refusals(clock)
    for wait_s in (1, 2, 4, 8, 16, 30, 30):
        refusals.check(X)
        refusals.failed(X, error)
        clock.now += wait_s - 0.001
        with pytest.raises(type(error), match=str(error).replace("?", r"\?")) as caught:
            refusals.check(X)
        assert caught.value is not error and caught.value.param == error.param
        clock.now += 0.001
    refusals.check(X)


def test_what_loads_after_all_is_forgiven() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    for _ in range(3):
        refusals.failed(X, AdapterUnavailable("gone"))
    refusals.arrived("y")
    with pytest.raises(AdapterUnavailable):
        refusals.check(X)
    refusals.arrived("x")
    refusals.check(X)
    refusals.failed(X, AdapterUnavailable("gone"))
    clock.now += 1.0
    refusals.check(X)


def test_memory_is_bounded() -> None:
    refusals = Refusals(remembered=10)
    for number in range(1000):
        refusals.failed((str(number), None), AdapterRejected.because(["bad"]))
    assert len(refusals._failures) == 10
    refusals.check(("989", None))
    with pytest.raises(AdapterRejected):
        refusals.check(("999", None))


def test_an_error_that_is_remembered_keeps_no_files_in_memory() -> None:
    """Its traceback would: through the frames that were reading them."""

    class Files:
        pass

    seen: list[weakref.ref[Files]] = []

    def read() -> None:
        files = Files()
        seen.append(weakref.ref(files))
        raise AdapterRejected.because(["bad"])

    refusals = Refusals()
    try:
        read()
    except AdapterRejected as error:
        refusals.failed(X, error)
    gc.collect()
    assert seen[0]() is None
    with pytest.raises(AdapterRejected, match="bad"):
        refusals.check(X)
