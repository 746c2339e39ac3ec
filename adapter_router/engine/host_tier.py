"""Adapters in host memory, ready to be put on the device without reading, checking or converting them again."""

from __future__ import annotations

from collections.abc import Callable

from adapter_router.engine.resident import ResidentAdapter
from adapter_router.engine.slots import SlotTable


class HostTier:
    """What is not on the device and worth most, by digest, under a byte budget. Not thread-safe."""

    def __init__(self, budget_bytes: int, worth: Callable[[str], float]) -> None:
        self.slots = SlotTable(budget_bytes, worth)
        self._worth = worth
        self._adapters: dict[str, ResidentAdapter] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def get(self, digest: str) -> ResidentAdapter | None:
        """The adapter, if it is here."""
        return self._adapters.get(digest)

    def offer(
        self,
        adapter: ResidentAdapter,
        move: Callable[[ResidentAdapter], ResidentAdapter] | None = None,
        *,
        into_free_room: bool = False,
    ) -> list[str]:
        """Keep ``adapter`` if it is worth more than what it drives out; digests that went, perhaps its own.

        ``move`` brings it to host memory, if it is kept. ``into_free_room``: nobody is driven out.
        """
        if adapter.digest in self._adapters:
            return []
        is_mix = bool(adapter.parts)
        victims = self.slots.room_for(adapter.num_bytes, is_mix=is_mix, below=self._worth(adapter.digest))
        if victims is None or (victims and into_free_room):
            return [adapter.digest]
        kept = adapter if move is None else move(adapter)
        for victim in victims:
            self.take(victim)
        self.slots.add(adapter.digest, adapter.num_bytes, is_mix=is_mix)
        self._adapters[adapter.digest] = kept
        return victims

    def take(self, digest: str) -> ResidentAdapter | None:
        """Remove an adapter, and return it if it was here."""
        if digest in self._adapters:
            self.slots.remove(digest)
        return self._adapters.pop(digest, None)

    def digests(self) -> list[str]:
        """All that is here."""
        return list(self._adapters)

    def with_part(self, digest: str) -> list[str]:
        """Mixes here that ``digest`` is a part of."""
        return [known for known, adapter in self._adapters.items() if digest in adapter.parts]
