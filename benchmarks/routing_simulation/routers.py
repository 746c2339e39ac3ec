"""Who decides where a row goes: ours, with what replies have told, and the peers' rules, with the truth.

Peers see each queue and each cache as it is just now, and all their routers are one; so they do better than they would.
"""

from __future__ import annotations

import bisect
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from adapter_router.config import RoutingConfig
from adapter_router.errors import InternalError
from adapter_router.routing.affinity import Wanted, choose
from adapter_router.routing.demand import Demand
from adapter_router.routing.fleet import Fleet
from adapter_router.routing.homes import Homes
from adapter_router.routing.replica_state import Member
from adapter_router.types import ReplicaLoad, ResidencyChange, ShardReply
from benchmarks.routing_simulation.replicas import Replica, Row, Truth
from benchmarks.routing_simulation.setting import Setting

_ERROR = InternalError("")  # what is answered is nobody's concern here
_FADE_S = 0.5
_FULL = 64  # rows at a replica of Ray's, above which it refuses more: two batches
_VNODES = 100
_HALF_LIFE_S = 5.0


class Router(Protocol):
    """One rule. ``replicas`` are the living ones by index; rows carry what the rule needs to know of them."""

    def sync(self, replicas: Mapping[int, Replica]) -> None:
        """These live."""

    def pick(self, row: Row, now: float) -> int:
        """The replica for the row, which is sent there at once."""

    def answered(
        self, replica: Replica, rows: Sequence[Row], news: ResidencyChange, load: ReplicaLoad, row_s: float
    ) -> None:
        """A reply has come."""

    def lost(self, rows: Sequence[Row]) -> None:
        """Their replica died; each is going to be picked for again."""

    def home(self, adapter: str) -> int | None:
        """Where it would be loaded if nothing was held anywhere; None where chance decides."""


class Ours:
    """The product's ``choose`` and what it needs; each router has one of its own."""

    def __init__(self, setting: Setting) -> None:
        self._config = RoutingConfig(max_batch_rows=setting.batch_rows)
        self._fleet = Fleet()
        self._demand = Demand()
        self._faded = 0.0
        self._setting = setting
        self._index: dict[str, int] = {}

    def sync(self, replicas: Mapping[int, Replica]) -> None:
        self._index = {replica.name: index for index, replica in replicas.items()}
        came, _ = self._fleet.sync(Member(replica.name, f"rank {index}") for index, replica in replicas.items())
        for state in came:
            state.load_s = self._setting.load_s
            state.row_s = self._setting.row_s
            self._fleet.admit(state)
        self._idle = Fleet()
        self._idle.sync(Member(replica.name, f"rank {index}") for index, replica in replicas.items())

    def pick(self, row: Row, now: float) -> int:
        if now - self._faded > _FADE_S:
            self._fleet.fade(now - self._faded)
            self._faded = now
        self._demand.note(row.adapter, 1.0, now)
        state = choose(Wanted(row.adapter, 1, 1, self._demand.rate(row.adapter, now)), self._fleet, self._config)
        assert state is not None
        row.state, row.cold = state, None if state.holds(row.adapter) else row.adapter
        self._fleet.assigned(state, 1)
        self._fleet.sent(state, 1, row.cold)
        return self._index[state.replica]

    def answered(
        self, replica: Replica, rows: Sequence[Row], news: ResidencyChange, load: ReplicaLoad, row_s: float
    ) -> None:
        self._fleet.observe(ShardReply(replica.name, [_ERROR] * len(rows), news, load), row_s)
        self.lost(rows)

    def lost(self, rows: Sequence[Row]) -> None:
        for row in rows:
            assert row.state is not None
            self._fleet.returned(row.state, 1, row.cold)

    def home(self, adapter: str) -> int | None:
        state = choose(Wanted(adapter, 1), self._idle, self._config)
        return self._index[state.replica] if state else None


class _Peer:
    """What the peers' rules have in common: they see the truth, and need no replies."""

    def __init__(self, setting: Setting, truth: Truth) -> None:
        self._setting = setting
        self._truth = truth
        self._rng = random.Random(0)
        self._living: list[int] = []

    def sync(self, replicas: Mapping[int, Replica]) -> None:
        self._living = sorted(replicas)

    def pick(self, row: Row, now: float) -> int:
        raise NotImplementedError

    def answered(
        self, replica: Replica, rows: Sequence[Row], news: ResidencyChange, load: ReplicaLoad, row_s: float
    ) -> None:
        """No news to them."""

    def lost(self, rows: Sequence[Row]) -> None:
        """Nothing to be put right."""

    def home(self, adapter: str) -> int | None:  # noqa: ARG002
        return None

    def _less_busy(self, among: Sequence[int]) -> int:
        """Of two that chance chooses."""
        two = self._rng.sample(among, 2) if len(among) > 1 else among
        return min(two, key=lambda index: float(self._truth.rows[index]))


class PowerOfTwo(_Peer):
    """Ray Serve's default: of two random replicas the less busy one."""

    def pick(self, row: Row, now: float) -> int:  # noqa: ARG002
        return self._less_busy(self._living)


class Multiplexed(_Peer):
    """``@serve.multiplexed``: who holds the model or loads it, until all of these are full; then who has room."""

    def pick(self, row: Row, now: float) -> int:  # noqa: ARG002
        holders = self._truth.held[row.adapter] | self._truth.coming[row.adapter]
        takers = [index for index in sorted(holders) if self._truth.rows[index] < _FULL]
        if takers:
            return self._less_busy(takers)
        roomy = [index for index in self._living if self._truth.room[index]]
        return self._less_busy(roomy or self._living)


class ConsistentHash(_Peer):
    """A ring on which every replica stands a hundred times; an adapter's is the next."""

    def sync(self, replicas: Mapping[int, Replica]) -> None:
        self._ring = sorted((_hash(f"{index} {number}"), index) for index in replicas for number in range(_VNODES))

    def pick(self, row: Row, now: float) -> int:  # noqa: ARG002
        return self.home(row.adapter)

    def home(self, adapter: str) -> int:
        return self._ring[bisect.bisect(self._ring, (_hash(adapter), -1)) % len(self._ring)][1]


class LoraAffinity(_Peer):
    """The Gateway API inference extension's scorer, 1.0 held, 0.8 room, 0.6 coming, else 0, beside its queue scorer.

    The highest sum wins, of equals a random one; both weigh the same.
    """

    def pick(self, row: Row, now: float) -> int:  # noqa: ARG002
        rows = self._truth.rows
        most = float(rows[np.isfinite(rows)].max())
        least = float(rows.min())
        scores = (most - rows) / (most - least) if most > least else np.where(np.isfinite(rows), 1.0, -np.inf)
        affinity = 0.8 * self._truth.room
        coming = [index for index in self._truth.coming[row.adapter] if not self._truth.room[index]]
        affinity[coming] = 0.6
        affinity[[*self._truth.held[row.adapter]]] = 1.0
        scores = scores + affinity
        best = np.flatnonzero(scores >= scores.max() - 1e-12)
        return int(best[self._rng.randrange(len(best))])


class Dynamo(_Peer):
    """Rendezvous hashing; an adapter has slots in proportion to its part of the requests, at least one.

    Of its replicas the least busy one gets the row.
    """

    def __init__(self, setting: Setting, truth: Truth) -> None:
        super().__init__(setting, truth)
        self._homes = Homes()
        self._demand = Demand(_HALF_LIFE_S)
        self._indexes: dict[str, int] = {}

    def sync(self, replicas: Mapping[int, Replica]) -> None:
        super().sync(replicas)
        self._indexes = {f"worker {index}": index for index in replicas}
        self._homes.sync(dict.fromkeys(self._indexes, 1.0))

    def pick(self, row: Row, now: float) -> int:
        self._demand.note(row.adapter, 1.0, now)
        part = self._demand.rate(row.adapter, now) / self._setting.rate
        count = min(max(1, round(part * self._setting.slots * len(self._living))), len(self._living))
        homes = [self._indexes[name] for name in self._homes.of(row.adapter, count)]
        return min(homes, key=lambda index: float(self._truth.rows[index]))

    def home(self, adapter: str) -> int:
        return self._indexes[self._homes.of(adapter, 1)[0]]


PEERS: dict[str, type[_Peer]] = {
    "ray pow-2": PowerOfTwo,
    "ray multiplexed": Multiplexed,
    "consistent hash": ConsistentHash,
    "gaie": LoraAffinity,
    "dynamo hrw": Dynamo,
}


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
