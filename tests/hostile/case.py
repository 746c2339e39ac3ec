"""One hostile or broken adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.hostile.spoil import Spoil

ROOM_BYTES = 64 << 20
"""``adapter_memory_bytes`` of every engine here."""


@dataclass(frozen=True)
class Case:
    """``spoil`` is what happens to a copy of the good adapter ``of``; each of ``says`` is part of some problem.

    ``on``: the base it is brought to, the adapter's own if empty. ``options``: of ``load_adapter``.
    """

    name: str
    spoil: Spoil
    says: tuple[str, ...]
    of: str = "plain"
    on: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def untouched(_: object) -> None:
    """The adapter as it is: it is only in the wrong place."""
