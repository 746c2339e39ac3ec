"""Adapters between host memory and the device. On a CPU the two are one, and nothing is copied.

On CUDA copies have a stream of their own and host memory is pinned, so that a running forward is not held up; the
forward that needs a copy waits for it on the device, not on the host.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from adapter_router.engine.resident import ResidentAdapter

HOST = torch.device("cpu")


class Transfer:
    """Moves adapters that nobody uses just now. All calls are made under one lock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def to_host(self, adapter: ResidentAdapter) -> ResidentAdapter:
        """Its form in host memory; the device's is free once nobody holds ``adapter`` any more."""
        if self._stream is None:
            return adapter
        # Memory of this stream's own: it is not given to others before the copy has been made.
        with torch.cuda.stream(self._stream):
            return replace(adapter.mapped(_pinned_copy), arrived=None)

    def to_device(self, adapter: ResidentAdapter) -> ResidentAdapter:
        """Its form on the device; ``arrived`` there is when the copy has been made."""
        if self._stream is None:
            return adapter
        with torch.cuda.stream(self._stream):
            moved = adapter.mapped(lambda tensor: tensor.to(self._device, non_blocking=True))
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        return replace(moved, arrived=arrived)


def _pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_like(tensor, device=HOST, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
