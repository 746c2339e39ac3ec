"""The slot table against a brute-force model: every operation, in any order, keeps its books and its promises."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapter_router.engine.slots import SlotTable

BUDGET = 100


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
        leased = sum(size for _, size, leases in self.order if leases)
        victims = self.table.room_for(num_bytes, is_mix=is_mix)
        if leased + num_bytes > BUDGET:
            assert victims is None
            return
        assert victims is not None
        assert victims == [name for name, _ in idle[: len(victims)]], (
            "the least recently used first, mixes before all for a mix"
        )
        used = sum(size for _, size, _ in self.order)
        needed = [sum(size for _, size in idle[:n]) for n in range(len(idle) + 1)]
        assert len(victims) == next(n for n, freed in enumerate(needed) if used - freed + num_bytes <= BUDGET)
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


TestSlotTable = SlotTableMachine.TestCase
TestSlotTable.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
