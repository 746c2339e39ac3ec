"""Room for one dequantised weight at a time.

A weight that lives for one product would otherwise be allocated anew at every call. On the CPU the heap keeps such
pieces once they are freed, and small allocations between them keep it from using them again: a process grows to many
times its base. Whoever reads weights one after the other says so with ``one_at_a_time``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Thread(threading.local):
    def __init__(self) -> None:
        self.lends = False
        self.buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}


_thread = _Thread()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Inside, a quantised weight on the CPU is valid until this thread reads the next one."""
    before, _thread.lends = _thread.lends, True
    try:
        yield
    finally:
        _thread.lends = before


def room_for(use: str, shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of ``shape`` and ``dtype`` beside ``like``, contents undefined: lent, where this thread may lend."""
    if not _thread.lends or like.device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=like.device)
    count = torch.Size(shape).numel()
    buffer = _thread.buffers.get((use, dtype))
    if buffer is None or len(buffer) < count:
        with torch.inference_mode(False):  # it is written to inside and outside of that mode
            buffer = _thread.buffers[use, dtype] = torch.empty(count, dtype=dtype)
    return buffer[:count].view(shape)
