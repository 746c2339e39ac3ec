"""Weights as people write them, ``{"v1": 90, "food@v2": 10}``, to versions of the catalog."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection

from adapter_router.catalog.addressing import Address, address_of
from adapter_router.catalog.lookup import adapters_named, versions_at
from adapter_router.errors import InvalidRequest

_MOST_TARGETS = 16
_MOST_WEIGHT = 1_000_000


def resolved(connection: Connection, own: str | None, weights: Mapping[str, int]) -> dict[int, int]:
    """Weights by version id. ``own``: the adapter that ``v2`` alone is of. Raises InvalidRequest with every problem."""
    problems = _weight_problems(weights)
    listed = dict(list(weights.items())[:_MOST_TARGETS])
    addresses = {text: address for text in listed if (address := _version_address(own, text)) is not None}
    known = adapters_named(connection, {address.adapter for address in addresses.values()})
    found = versions_at(connection, known, set(addresses.values()))
    meant: dict[int, int] = {}
    for text, weight in listed.items():
        version = found[addresses[text]] if text in addresses else _no_version(own, text)
        if isinstance(version, str):
            problems.append(version)
        elif version.id in meant:
            problems.append(f"{text!r:.100} is a version that is named twice")
        else:
            meant[version.id] = weight
    if problems:
        raise InvalidRequest("; ".join(problems), "weights", problems)
    return meant


def _weight_problems(weights: Mapping[str, int]) -> list[str]:
    problems = []
    if not 1 <= len(weights) <= _MOST_TARGETS:
        problems.append(f"there are {len(weights)} versions, must be 1 to {_MOST_TARGETS}")
    usable = [w for w in weights.values() if type(w) is int and 0 <= w <= _MOST_WEIGHT]
    problems += [
        f"the weight of {text!r:.100} is {weight!r:.40}, must be a whole number from 0 to {_MOST_WEIGHT}"
        for text, weight in list(weights.items())[:_MOST_TARGETS]
        if type(weight) is not int or not 0 <= weight <= _MOST_WEIGHT
    ]
    if usable and len(usable) == len(weights) and sum(usable) == 0:
        problems.append("all weights are 0")
    return problems


def _version_address(own: str | None, text: str) -> Address | None:
    address = address_of(text)
    if address is not None and address.is_version:
        return address
    return address_of(f"{own}@{text}") if own is not None else None


def _no_version(own: str | None, text: str) -> str:
    named = "v2, sha256:… or name@v2" if own is not None else "name@v2 or name@sha256:…"
    return f"{text!r:.100} is no version: it must be {named}"
