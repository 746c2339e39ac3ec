"""The slot table against a brute-force model: every operation, in any order, keeps its books and its promises."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapter_router.engine.slots import SlotTable

BUDGET = 100
SHARE = 50
PINNABLE = 80


@dataclass
class Held:
    """The naive truth of one slot."""

    name: str
    size: int
    leases: int = 0
    pinned: bool = False

    @property
    def is_mix(self) -> bool:
        return self.name.startswith("m")


class SlotTableMachine(RuleBasedStateMachine):
    """``order`` is the naive truth, least recently used first; worths change under the table's feet."""

    def __init__(self) -> None:
        super().__init__()
        self.worths: dict[str, float] = {}
        self.table = SlotTable(BUDGET, self.worths.__getitem__)
        self.order: list[Held] = []
        self.count = 0

    @rule(
        num_bytes=st.integers(1, BUDGET),
        is_mix=st.booleans(),
        worth=st.integers(0, 5),
        below=st.none() | st.integers(0, 6),
    )
    def make_room_and_add(self, num_bytes: int, is_mix: bool, worth: int, below: int | None) -> None:
        idle = [held for held in self.order if not (held.leases or held.pinned)]
        idle = [held for held in idle if below is None or self.worths[held.name] < below]
        idle.sort(key=lambda held: (is_mix and not held.is_mix, self.worths[held.name]))
        used = sum(held.size for held in self.order)
        mixes = sum(held.size for held in self.order if held.is_mix)
        victims = self.table.room_for(num_bytes, is_mix=is_mix, below=below)
        possible = (
            idle[:count]
            for count in range(len(idle) + 1)
            if used - sum(held.size for held in idle[:count]) + num_bytes <= BUDGET
            and (not is_mix or mixes - sum(held.size for held in idle[:count] if held.is_mix) + num_bytes <= SHARE)
        )
        fewest = next(possible, None)
        if fewest is None or victims is None:
            assert fewest is victims
            return
        assert victims == [held.name for held in fewest], "the least worth first, mixes before all for a mix"
        assert self.table.can_ever_fit(num_bytes, is_mix=is_mix)
        for held in fewest:
            self.table.remove(held.name)
            self.order.remove(held)
        self.count += 1
        name = f"{'m' if is_mix else 'a'}{self.count}"
        self.worths[name] = worth
        self.table.add(name, num_bytes, is_mix=is_mix)
        self.order.append(Held(name, num_bytes))

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.order))
        self.table.lease(held.name)
        held.leases += 1
        self.order.remove(held)
        self.order.append(held)

    @precondition(lambda self: any(held.leases for held in self.order))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from([held for held in self.order if held.leases]))
        self.table.release(held.name)
        held.leases -= 1

    @precondition(lambda self: self.order)
    @rule(data=st.data(), pinned=st.booleans())
    def pin_or_unpin(self, data: st.DataObject, pinned: bool) -> None:
        held = data.draw(st.sampled_from(self.order))
        if not pinned:
            self.table.unpin(held.name)
            held.pinned = False
            return
        others = sum(other.size for other in self.order if other.pinned and other is not held)
        fits = others + held.size <= PINNABLE
        assert self.table.pin(held.name) is (held.pinned or fits)
        held.pinned = held.pinned or fits

    @precondition(lambda self: self.order)
    @rule(data=st.data(), worth=st.integers(0, 5))
    def change_worth(self, data: st.DataObject, worth: int) -> None:
        self.worths[data.draw(st.sampled_from(self.order)).name] = worth

    @invariant()
    def books_balance(self) -> None:
        self.table.check_integrity()
        assert self.table.resident() == [held.name for held in self.order]
        assert [self.table.leases(held.name) for held in self.order] == [held.leases for held in self.order]
        assert [self.table.is_pinned(held.name) for held in self.order] == [held.pinned for held in self.order]
        assert self.table.used_bytes == sum(held.size for held in self.order)
        assert self.table.pinned_bytes == sum(held.size for held in self.order if held.pinned) <= PINNABLE
        assert sum(held.size for held in self.order if held.is_mix) <= SHARE


TestSlotTable = SlotTableMachine.TestCase
TestSlotTable.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


def test_without_worths_the_least_recently_used_goes() -> None:
    table = SlotTable(3)
    for name in "abc":
        table.add(name, 1)
    table.lease("a")
    table.release("a")
    assert table.room_for(2) == ["b", "c"]


@pytest.mark.parametrize(("num_bytes", "is_mix", "fits"), [(40, False, True), (41, False, False), (31, True, False)])
def test_pins_leave_room_for_the_others(num_bytes: int, is_mix: bool, fits: bool) -> None:
    table = SlotTable(BUDGET)
    table.add("a", 40)
    table.add("m", 20, is_mix=True)
    assert table.pin("a") and table.pin("m")
    assert table.can_ever_fit(num_bytes, is_mix=is_mix) is fits
    assert (table.room_for(num_bytes, is_mix=is_mix) is not None) is fits
