"""Which adapters are asked for again and again just now, and the memory they would take together."""

from __future__ import annotations

_GENERATION_S = 15.0


class WorkingSet:
    """Adapters asked for at least twice in the last 15 to 30 s: what is asked for once no memory can help.

    Denning's working set (1968) of two generations, so that every question costs the same however many there are.
    """

    def __init__(self, generation_s: float = _GENERATION_S) -> None:
        self._generation_s = generation_s
        self._began = 0.0
        self._seen: dict[str, int] = {}
        self._again: dict[str, int] = {}
        self._seen_before: dict[str, int] = {}
        self._again_before: dict[str, int] = {}
        self._num_bytes = 0

    def note(self, digest: str, num_bytes: int, now: float) -> None:
        """One more request for an adapter that holds so much on a device."""
        self._turn(now)
        if digest in self._again:
            return
        if digest in self._seen or digest in self._seen_before or digest in self._again_before:
            self._again[digest] = num_bytes
            if digest not in self._again_before:
                self._num_bytes += num_bytes
        self._seen[digest] = num_bytes

    def num_bytes(self, now: float) -> int:
        """Of all of them together."""
        self._turn(now)
        return self._num_bytes

    def num_adapters(self, now: float) -> int:
        """How many they are."""
        self._turn(now)
        return len(self._again.keys() | self._again_before.keys())

    def _turn(self, now: float) -> None:
        """Begin a new generation when it is time; of the one before the last nothing is left."""
        generations = int((now - self._began) // self._generation_s)
        if generations < 1:
            return
        self._began += generations * self._generation_s
        self._seen_before, self._again_before = (self._seen, self._again) if generations == 1 else ({}, {})
        self._seen, self._again = {}, {}
        self._num_bytes = sum(self._again_before.values())
