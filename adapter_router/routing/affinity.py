"""Where an adapter's rows go: resident first, under a load bound, on rendezvous homes. Pure: no clock, no I/O.

Hashing alone overloads a hot adapter's home; bounded hashing alone spills too eagerly; residency first, with a bound
and a price on each new copy, keeps both the tail and the loads low. A load in flight counts as a copy that is coming:
rows of a cold adapter arrive in bunches, and sent apart they would each pay for a load of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from adapter_router.config import RoutingConfig
from adapter_router.routing.fleet import ReplicaState

_NEW_HOMES = 2


def choose(
    digest: str | None, num_rows: int, states: Sequence[ReplicaState], config: RoutingConfig, rate: float = 0.0
) -> ReplicaState:
    """The replica for ``num_rows`` rows of one adapter; ``states`` is not empty and holds the load so far.

    ``rate``: of the adapter, in rows a second.

    Candidates are the replicas that hold the adapter or are loading it, and the first two rendezvous homes among the
    others. One that already holds more than ``(1 + load_slack) * mean + max_batch_rows`` rows is passed over. The rest
    are priced in seconds until the rows run: the backlog; plus a load's time where the adapter is on its way, however
    much of it is over; plus for a new copy the loads before it and its own. Where a copy is there or coming its own
    counts ``copy_penalty`` times, and so does the time of a whole batch, by which backlogs differ all the time, over
    the rows that will have used the copy a second from now: what is hot may be copied for a small gain, what is hardly
    asked for may not. Equal prices go by rendezvous order, so that routers which do not talk agree.
    """
    homes = sorted(states, key=lambda state: -_weight(digest or "", state.replica))
    copies = [state for state in homes if state.holds(digest) or digest in state.loading]
    others = [state for state in homes if not (state.holds(digest) or digest in state.loading)]
    candidates = [*copies, *others[:_NEW_HOMES]]
    mean = (sum(state.rows for state in states) + num_rows) / len(states)
    bound = (1 + config.load_slack) * mean + config.max_batch_rows
    open_candidates = [state for state in candidates if state.rows + num_rows <= bound]
    if not open_candidates:
        return min(homes, key=lambda state: state.rows)

    def price(state: ReplicaState) -> float:
        if state.holds(digest):
            return state.backlog_s
        if digest in state.loading:
            return state.backlog_s + state.load_s
        if not copies:
            return state.backlog_s + (len(state.loading) + 1) * state.load_s
        own = config.copy_penalty * state.load_s + config.max_batch_rows * state.row_s / (1 + rate)
        return state.backlog_s + len(state.loading) * state.load_s + own

    return min(open_candidates, key=price)


@lru_cache(maxsize=1 << 16)
def _weight(digest: str, replica: str) -> int:
    """Rendezvous (highest random weight) hashing, Thaler and Ravishankar 1998."""
    return int.from_bytes(hashlib.blake2b(f"{digest}|{replica}".encode(), digest_size=8).digest(), "big")
