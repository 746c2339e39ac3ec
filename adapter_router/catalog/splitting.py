"""Which of several versions a row gets."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence

from adapter_router.types import AdapterVersion


def choose(name: str, choices: Sequence[tuple[AdapterVersion, int]], key: str | None) -> AdapterVersion:
    """The version of ``name`` for rows with ``key``, each with a chance of its weight's share; None: a draw.

    Weighted rendezvous hashing: every version has a score of its own for the key, exponentially distributed with its
    weight as the rate, and the lowest wins. So a version whose weight grows only ever wins keys, one whose weight falls
    only loses them, and no other key moves, however many versions there are.
    """
    if len(choices) == 1:
        return choices[0][0]
    if key is None:
        return random.choices([version for version, _ in choices], [weight for _, weight in choices])[0]
    return min(choices, key=lambda choice: -math.log(_uniform(name, key, choice[0])) / choice[1])[0]


def _uniform(name: str, key: str, version: AdapterVersion) -> float:
    """In (0, 1], the same everywhere."""
    parts = [name, key, version.adapter, version.digest, version.base, version.task, *version.labels]
    hashed = hashlib.blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(hashed, "big") + 1) / 2**64
