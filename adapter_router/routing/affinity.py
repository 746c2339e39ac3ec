"""Where an adapter's rows go: resident first, under a load bound, on rendezvous homes. Pure: no clock, no I/O.

Hashing alone overloads a hot adapter's home; bounded hashing alone spills too eagerly; residency first, with a bound
and a price on each new copy, keeps both the tail and the loads low. A load in flight counts as a copy that is coming:
rows of a cold adapter arrive in bunches, and sent apart they would each pay for a load of their own.

What takes more than a part of one replica's time has a right to as many homes as keep each below that, which it uses
where its replicas are busier than the others. Copies up to there cost what they cost; others must pay for themselves
several times, and those that are left over when demand has gone are passed over, so that their replicas evict them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from adapter_router.config import RoutingConfig
from adapter_router.routing.fleet import Fleet
from adapter_router.routing.replica_state import ReplicaState

_NEW_HOMES = 2  # where a new copy may go
_FEW = 16  # copies, homes: so many are looked at one by one
_FEWEST = 4  # least loaded of all, where there is nothing to choose between the others
_BUSY = 0.1  # part of a replica's time that one adapter may take before it has a right to a second home
_EVENLY = 2  # usual backlogs that a replica's whole fair share beyond its own counts as
_ELSEWHERE = 8  # load times: what the second home of an adapter that is nowhere must be sooner by


@dataclass(frozen=True)
class Wanted:
    """``rows`` rows of one adapter; None is the bare base, which is resident everywhere.

    ``num_bytes``: what the adapter holds on a device, 0 if unknown; a larger one costs more to load. ``rate``: rows a
    second that are asked of it on this router just now.
    """

    digest: str | None
    rows: int
    num_bytes: int = 0
    rate: float = 0.0


def choose(wanted: Wanted, fleet: Fleet, config: RoutingConfig, avoid: Collection[str] = ()) -> ReplicaState | None:
    """The replica for these rows, of those that may get any, and none of ``avoid`` while another lives.

    None where there is no replica at all.

    Candidates are the replicas that hold the adapter or are loading it, and the first two of its homes among the
    others. One that would hold more than its share, ``(1 + load_slack) * mean`` for its weight, and ``max_batch_rows``
    is passed over. The rest are priced in seconds until the rows run: the backlog, and the usual one twice for each
    fair share of rows that the replica got of late beyond its own; plus a load's time where the adapter is on its way,
    however much of it is over; plus for a new copy the loads before it and its own, for its size. An adapter that is
    nowhere goes to its second home only where that is sooner by eight loads, or as many as there are replicas: what
    moves to and fro among many is forgotten, and few see all adapters anyway.

    ``rate * row_s / 0.1`` copies, rounded up, are the adapter's by right, with all routers' rows: small parts can be
    shared evenly. Up to there, and while all its replicas got more than ``1 + load_slack`` fair shares, a new one costs
    no more than that. Else its own load counts ``copy_penalty`` times, and so does the time of a whole batch, by which
    backlogs differ all the time, over the rows that will have used the copy a second from now: what is hot may be
    copied for a small gain, what is hardly asked for may not. Copies beyond cost a batch's time more than those on the
    first homes, and fade. Equal prices go by home order, so that routers which do not talk agree.

    Nobody is looked at who need not be: 16 homes and 16 copies at most, whatever the size of the fleet.
    """
    if wanted.digest is None:
        open_to_all = _without(fleet.least_loaded(_FEWEST + len(avoid)), avoid)
        chosen = min(open_to_all, key=lambda state: state.backlog_s, default=None)
    else:
        chosen = _cheapest(wanted.digest, wanted, fleet, config, avoid)
    if chosen is None:
        chosen = _any(fleet, avoid)
    if chosen is not None and not (chosen.holds(wanted.digest) or wanted.digest in chosen.loading):
        fleet.expect_load(wanted.num_bytes)
    return chosen


def copies_by_right(rate: float, row_s: float) -> int:
    """How many copies keep each of their replicas busy with the adapter for a tenth of its time at most."""
    return max(1, math.ceil(rate * row_s / _BUSY))


def _cheapest(
    digest: str, wanted: Wanted, fleet: Fleet, config: RoutingConfig, avoid: Collection[str]
) -> ReplicaState | None:
    """None where every candidate has its share."""
    num_copies = len(fleet.copies(digest))
    homes = _without(fleet.homes(digest, min(num_copies + _FEWEST, _FEW)), avoid)
    homes = homes or _without(fleet.homes(digest, _FEW), avoid)
    if not homes:
        return None
    rate = wanted.rate * fleet.routers
    by_right = copies_by_right(rate, homes[0].row_s)
    if num_copies <= _FEW:
        copies = _without(fleet.copies(digest), avoid)
        copies.sort(key=lambda state: homes.index(state) if state in homes else _FEW)
        others = [state for state in homes if state not in copies][:_NEW_HOMES]
        num_copies = len(copies)
        left_over = copies[by_right:]
    else:
        copies, others = (_without(found, avoid) for found in fleet.spread(digest, max(by_right, _FEW), _FEWEST))
        left_over = []
    batch_s = config.max_batch_rows * homes[0].row_s
    mean = fleet.mean_rows(wanted.rows)
    usual = _EVENLY * min(mean, config.max_batch_rows)
    share = (1 + config.load_slack) * mean

    resident = any(digest in state.resident for state in copies)
    relief = resident and min(map(fleet.busyness, copies)) > 1 + config.load_slack

    def price(state: ReplicaState) -> float:
        seconds = state.backlog_s + usual * state.row_s * (fleet.busyness(state) - 1)
        if state in left_over:
            seconds += batch_s
        if digest in state.resident:
            return seconds
        own = fleet.load_s(state, wanted.num_bytes)
        if digest in state.loading:
            return seconds + own
        nth = others.index(state)
        if not num_copies:
            own *= 1 + min(_ELSEWHERE, len(fleet.states())) * nth
        elif not relief or num_copies + nth >= by_right:
            own = config.copy_penalty * own + batch_s / (1 + rate)
        return seconds + len(state.loading) * state.load_s + own

    roomy = [s for s in (*copies, *others) if s.rows + wanted.rows <= share * s.weight + config.max_batch_rows]
    return min(roomy, key=price, default=None)


def _without(states: Iterable[ReplicaState], avoid: Collection[str]) -> list[ReplicaState]:
    return [state for state in states if state.choosable and state.replica not in avoid]


def _any(fleet: Fleet, avoid: Collection[str]) -> ReplicaState | None:
    """The least loaded, with or without a copy: of those that may get rows, else of those that live, else of all."""
    candidates = _without(fleet.least_loaded(1 + len(avoid)), avoid)
    candidates = candidates or [state for state in fleet.states() if state.replica not in avoid] or [*fleet.states()]
    return min(candidates, key=lambda state: state.rows / state.weight, default=None)
