"""What every replica here is like, and what it counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

REPLICAS = 2
SLOTS = 4  # of one replica
LOAD_S = 0.05
RUN_S = 0.005


@dataclass
class Tally:
    """Of one replica: rows, and loads by adapter."""

    rows: int = 0
    loads: Counter[str] = field(default_factory=Counter)
