"""The slot table against a brute-force model: every operation, in any order, keeps its books and its promises."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapter_router.engine.slots import SlotTable

BUDGET = 100
SHARE = 50


class SlotTableMachine(RuleBasedStateMachine):
    """``order`` is the naive truth: (digest, bytes, leases), least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(BUDGET)
        self.order: list[tuple[str, int, int]] = []
        self.count = 0

    def _position(self, digest: str) -> int:
        return next(i for i, (name, _, _) in enumerate(self.order) if name == digest)

    @rule(num_bytes=st.integers(1, BUDGET), is_mix=st.booleans())
    def make_room_and_add(self, num_bytes: int, is_mix: bool) -> None:
        idle = [(name, size) for name, size, leases in self.order if leases == 0]
        if is_mix:
            idle = [slot for slot in idle if slot[0][0] == "m"] + [slot for slot in idle if slot[0][0] == "a"]
        used = sum(size for _, size, _ in self.order)
        mixes = sum(size for name, size, _ in self.order if name[0] == "m")
        victims = self.table.room_for(num_bytes, is_mix=is_mix)
        possible = (
            idle[:count]
            for count in range(len(idle) + 1)
            if used - sum(size for _, size in idle[:count]) + num_bytes <= BUDGET
            and (not is_mix or mixes - sum(size for name, size in idle[:count] if name[0] == "m") + num_bytes <= SHARE)
        )
        fewest = next(possible, None)
        if fewest is None or victims is None:
            assert fewest is victims
            return
        assert victims == [name for name, _ in fewest], "the least recently used first, mixes before all for a mix"
        for victim in victims:
            self.table.remove(victim)
            self.order.pop(self._position(victim))
        self.count += 1
        name = f"{'m' if is_mix else 'a'}{self.count}"
        self.table.add(name, num_bytes, is_mix=is_mix)
        self.order.append((name, num_bytes, 0))

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        name, size, leases = data.draw(st.sampled_from(self.order))
        self.table.lease(name)
        self.order.pop(self._position(name))
        self.order.append((name, size, leases + 1))

    @precondition(lambda self: any(leases for _, _, leases in self.order))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name, size, leases = data.draw(st.sampled_from([slot for slot in self.order if slot[2]]))
        self.table.release(name)
        self.order[self._position(name)] = (name, size, leases - 1)

    @invariant()
    def books_balance(self) -> None:
        self.table.check_integrity()
        assert self.table.resident() == [name for name, _, _ in self.order]
        assert self.table.used_bytes == sum(size for _, size, _ in self.order)
        assert sum(size for name, size, _ in self.order if name[0] == "m") <= SHARE


TestSlotTable = SlotTableMachine.TestCase
TestSlotTable.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
