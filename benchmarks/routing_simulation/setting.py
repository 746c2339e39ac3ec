"""What is simulated: how large, how fast, how busy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A batch of ``r`` rows takes ``batch_s + r * row_s``; one adapter after the other is loaded, in ``load_s`` each.

    ``slots``: adapters a replica holds. ``hop_s``: from a replica to a router. ``busy``: rows that are asked for, of
    those that full batches could answer. ``rows``: of one trace, the first third of which is not counted.
    """

    replicas: int = 20
    adapters: int = 2000
    slots: int = 40
    routers: int = 3
    rows: int = 40_000
    busy: float = 0.7
    batch_rows: int = 32
    batch_s: float = 0.01
    row_s: float = 0.005
    load_s: float = 0.05
    hop_s: float = 0.002

    @property
    def capacity(self) -> float:
        """Rows a second that one replica answers in full batches."""
        return self.batch_rows / (self.batch_s + self.batch_rows * self.row_s)

    @property
    def rate(self) -> float:
        """Rows a second that all replicas together are asked for."""
        return self.busy * self.capacity * self.replicas
