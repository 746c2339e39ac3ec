"""The peers' routing where it is not Ray's own code, and what both places say of an adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from adapter_router.types import AdapterVersion

_LOAD_FACTOR = 1.25
_SLACK = 2


def rendezvous(adapter: str, replicas: Iterable[str]) -> list[str]:
    """``replicas`` in the order in which ``adapter`` prefers them: highest random weight first."""
    return sorted(replicas, key=lambda replica: hashlib.blake2b(f"{adapter}|{replica}".encode()).digest(), reverse=True)


def bounded_rendezvous(adapter: str, in_flight: Mapping[str, int]) -> str:
    """The preferred replica that has no more than 1.25 times its share of the requests in flight, and two."""
    bound = _LOAD_FACTOR * (sum(in_flight.values()) + 1) / len(in_flight) + _SLACK
    order = rendezvous(adapter, in_flight)
    return next((replica for replica in order if in_flight[replica] < bound), order[0])


def version(adapter: str) -> AdapterVersion:
    """An adapter's only version; its digest is its name."""
    return AdapterVersion(adapter, adapter, None, "text-classification", ("",), "softmax")
