"""What the router knows of each replica: what it holds, how busy it is, how fast. Fed by every reply.

Nothing here grows with the number of replicas but a few numpy operations: who holds an adapter is an index, rows are a
running total, and how full each replica is stands in an array.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from adapter_router.routing.copies import Copies
from adapter_router.routing.homes import Homes
from adapter_router.routing.portions import Portions
from adapter_router.routing.replica_state import Member, ReplicaState
from adapter_router.types import ShardReply

_SMOOTHING = 0.2  # weight of the newest observation in the running means
_SLOWLY = 0.01  # the same where a single one says little
_ENOUGH = 100.0  # rows, before they say anything of who gets how many
_MOST_COST = 4.0  # an adapter counts as at most so many usual ones, or so small a part


class Fleet:
    """The replicas of one base model. Used from one event loop only."""

    def __init__(self) -> None:
        self._members: tuple[Member, ...] = ()
        self._states: dict[str, ReplicaState] = {}
        self._by_home: dict[str, ReplicaState] = {}
        self._homes = Homes()
        self._copies: Copies[ReplicaState] = Copies()
        self._placed: list[ReplicaState] = []
        self._fullness = np.empty(0)  # rows for a weight of 1, by place; infinite where nothing may go
        self._total_rows = 0
        self._choosable_rows = 0
        self._choosable_weight = 0.0
        self._usual_bytes = 0.0
        self._portions = Portions()
        self._mine = self._everybodys = 1.0  # rows at a replica as a reply finds them, of this router and of all

    def sync(self, members: Iterable[Member]) -> tuple[list[ReplicaState], list[ReplicaState]]:
        """Make ``members`` the living ones: who has come, and who has gone.

        What is known of those that stay is kept. Of two that share a home, the later has it.
        """
        members = tuple(members)
        if members == self._members:
            return [], []
        self._members = members
        living = {member.replica: member for member in members}
        gone = [state for replica, state in self._states.items() if replica not in living]
        came = [ReplicaState(m.replica, m.home, m.weight) for m in living.values() if m.replica not in self._states]
        for state in gone:
            self._forget(state)
            self._portions.forget(state.replica)
        known = {state.replica: state for state in (*self._states.values(), *came)}
        self._states = {replica: known[replica] for replica in living}
        for replica, state in self._states.items():
            state.home, state.weight = living[replica].home, living[replica].weight
        self._by_home = {state.home: state for state in self._states.values()}
        self._homes.sync({home: state.weight for home, state in self._by_home.items()})
        self._placed = sorted(self._states.values(), key=lambda state: (state.home, state.replica))
        for place, state in enumerate(self._placed):
            state.place = place
        self._copies.moved(len(self._placed))
        self._reopen()
        return came, gone

    def get(self, replica: str) -> ReplicaState | None:
        """A living replica by its name."""
        return self._states.get(replica)

    def states(self) -> Collection[ReplicaState]:
        """The living replicas."""
        return self._states.values()

    def copies(self, digest: str) -> Collection[ReplicaState]:
        """Those that hold the adapter or are loading it."""
        return self._copies.of(digest)

    def homes(self, digest: str, count: int) -> list[ReplicaState]:
        """The first ``count`` homes of the adapter, best first, whether they may get rows or not."""
        return [self._by_home[home] for home in self._homes.of(digest, count)]

    @property
    def total_rows(self) -> int:
        """Rows of all living replicas."""
        return self._total_rows

    @property
    def routers(self) -> float:
        """All routers' rows over this one's, as replies find them: how many there are, if all are alike."""
        return self._everybodys / self._mine if self._mine > 0.01 else 1.0

    def mean_rows(self, more: int) -> float:
        """Rows for a weight of 1, on those that may get rows, when ``more`` have been added."""
        return (self._choosable_rows + more) / self._choosable_weight

    def busyness(self, state: ReplicaState) -> float:
        """What this router gave it of late, for its weight, over the mean: 1 for who got its fair share."""
        if self._portions.total < _ENOUGH:
            return 1.0
        return self._portions.of(state.replica) * self._choosable_weight / state.weight

    def least_loaded(self, count: int) -> list[ReplicaState]:
        """The ``count`` choosable replicas with the fewest rows for their weight, fewest first."""
        return self._least(np.arange(len(self._placed)), count)

    def spread(self, digest: str, wanted: int, count: int) -> tuple[list[ReplicaState], list[ReplicaState]]:
        """Of an adapter with very many copies: the ``count`` least loaded of the ``wanted`` copies that come first by
        home order, and the first two homes that have none.
        """
        ranked, held = self._copies.ranked(digest, self._rank)
        return self._least(ranked[held][:wanted], count), [self._placed[place] for place in ranked[~held][:2]]

    def load_s(self, state: ReplicaState, num_bytes: int) -> float:
        """Seconds that a load of so many bytes takes there, by what a load takes it on average."""
        if not (num_bytes and self._usual_bytes):
            return state.load_s
        return state.load_s * min(max(num_bytes / self._usual_bytes, 1 / _MOST_COST), _MOST_COST)

    def assigned(self, state: ReplicaState, rows: int) -> None:
        """So many more rows wait here to be sent to ``state``; fewer, where negative."""
        state.queued += rows
        self._count(state, rows)
        if rows > 0 and state.place >= 0:
            self._portions.add(state.replica, rows, len(self._placed))

    def sent(self, state: ReplicaState, rows: int, cold: str | None) -> None:
        """A call of that many queued rows left for it; ``cold`` is the adapter it waits for there, if any."""
        state.queued -= rows
        state.in_flight += rows
        if cold is None:
            state.warm_calls += 1
        else:
            self.expect(state, cold)

    def returned(self, state: ReplicaState, rows: int, cold: str | None) -> None:
        """The call came back, or was lost."""
        state.in_flight -= rows
        self._count(state, -rows)
        if cold is None:
            state.warm_calls -= 1
        else:
            self.expect_no_more(state, cold)

    def expect(self, state: ReplicaState, digest: str) -> None:
        """``state`` is loading the adapter, or is going to: others that ask for it come to no second one."""
        state.loading[digest] += 1
        if state.place >= 0:
            self._copies.add(digest, state)

    def expect_no_more(self, state: ReplicaState, digest: str) -> None:
        """That load is over, or will not be: one less of those that were expected."""
        state.loading[digest] -= 1
        if not state.loading[digest]:
            del state.loading[digest]
            if digest not in state.resident:
                self._copies.discard(digest, state)

    def observe(self, reply: ShardReply, row_s: float | None) -> None:
        """A reply's news, before its rows are ``returned``; ``row_s`` None where it says nothing of a row's time."""
        state = self._states.get(reply.replica)
        if state is None:
            return
        before = state.resident.copy() if reply.residency.complete else state.resident & reply.residency.removed
        state.learn(reply.residency)
        for digest in before - state.resident - state.loading.keys():
            self._copies.discard(digest, state)
        for digest in reply.residency.added & state.resident:
            self._copies.add(digest, state)
        state.load_s = reply.load.load_s
        if row_s is not None:
            state.row_s += _SMOOTHING * (row_s - state.row_s)
        mine = max(0, state.in_flight - len(reply.outcomes))
        others = max(0, reply.load.rows - mine)
        self._mine += _SLOWLY * (mine - self._mine)
        self._everybodys += _SLOWLY * (mine + others - self._everybodys)
        state.others, more = others, others - state.others
        self._count(state, more)

    def fade(self, seconds: float) -> None:
        """So much time has gone by: rows of other routers count half after a second in which nothing was heard."""
        for state in [state for state in self._placed if state.others]:
            less = max(1, state.others - int(state.others * 0.5**seconds))
            state.others -= less
            self._count(state, -less)

    def loaded(self, replica: str, digest: str) -> None:
        """``replica`` has loaded ``digest`` just now."""
        if (state := self._states.get(replica)) is not None:
            state.resident.add(digest)
            self._copies.add(digest, state)

    def expect_load(self, num_bytes: int) -> None:
        """An adapter of so many bytes, 0 if unknown, is going to be loaded: what is usual follows."""
        if num_bytes:
            self._usual_bytes += (_SMOOTHING if self._usual_bytes else 1.0) * (num_bytes - self._usual_bytes)

    def admit(self, state: ReplicaState) -> None:
        """It may get rows from now on."""
        state.admitted = True
        self._reopen()

    def set_suspect(self, state: ReplicaState, suspect: bool) -> None:
        """Whether it has stopped answering: it gets no rows while others can."""
        state.suspect = suspect
        self._reopen()

    def _reopen(self) -> None:
        """Who may get rows: those that are admitted and not suspect; if there are none, all."""
        chosen = [state for state in self._placed if state.admitted and not state.suspect] or self._placed
        for state in self._placed:
            state.choosable = False
        for state in chosen:
            state.choosable = True
        self._choosable_weight = sum(state.weight for state in chosen)
        self._choosable_rows = sum(state.rows for state in chosen)
        self._total_rows = sum(state.rows for state in self._placed)
        self._fullness = np.array([s.rows / s.weight if s.choosable else np.inf for s in self._placed])

    def _count(self, state: ReplicaState, more: int) -> None:
        if state.place < 0:
            return
        self._total_rows += more
        if state.choosable:
            self._choosable_rows += more
            self._fullness[state.place] = state.rows / state.weight

    def _least(self, places: np.ndarray, count: int) -> list[ReplicaState]:
        fullness = self._fullness[places]
        if count < len(places):
            best = np.argpartition(fullness, count)[:count]
            best = best[np.lexsort((best, fullness[best]))]
        else:
            best = np.argsort(fullness, kind="stable")
        return [self._placed[place] for place in places[best] if self._placed[place].choosable]

    def _rank(self, digest: str) -> np.ndarray:
        """All places in home order."""
        first = [state.place for state in self.homes(digest, len(self._by_home))]
        homeless = [state.place for state in self._placed if self._by_home[state.home] is not state]
        return np.array([*first, *homeless], dtype=np.intp)

    def _forget(self, state: ReplicaState) -> None:
        for digest in state.resident | state.loading.keys():
            self._copies.discard(digest, state)
        state.place, state.choosable = -1, False
