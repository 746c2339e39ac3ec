"""Room for one dequantised weight at a time.

A weight that lives for one product would otherwise be allocated anew at every call. On the CPU the heap keeps such
pieces once they are freed, and small allocations between them keep it from using them again: a process grows to many
times its base. Whoever reads weights one after the other says so with ``one_at_a_time``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_Buffers = dict[tuple[str, torch.dtype], torch.Tensor]


class _Thread(threading.local):
    """``buffers`` None: weights read by this thread are its own for good."""

    def __init__(self) -> None:
        self.buffers: _Buffers | None = None


_thread = _Thread()
# Handed back after each use: there are as many as threads that read at once, not as threads there are.
_idle: deque[_Buffers] = deque()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Inside, a quantised weight on the CPU is valid until this thread reads the next one, and not afterwards."""
    if _thread.buffers is not None:
        yield
        return
    try:
        _thread.buffers = _idle.pop()
    except IndexError:
        _thread.buffers = {}
    try:
        yield
    finally:
        _idle.append(_thread.buffers)
        _thread.buffers = None


def room_for(use: str, shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of ``shape`` and ``dtype`` beside ``like``, contents undefined: lent, where this thread may lend."""
    buffers = _thread.buffers
    if buffers is None or like.device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=like.device)
    count = torch.Size(shape).numel()
    buffer = buffers.get((use, dtype))
    if buffer is None or len(buffer) < count:
        with torch.inference_mode(False):  # it is written to inside and outside of that mode
            buffer = buffers[use, dtype] = torch.empty(count, dtype=dtype)
    return buffer[:count].view(shape)
