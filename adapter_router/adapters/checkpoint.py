"""``adapter_model.safetensors`` -> tensors by name, from bytes already in memory, with everything checked first."""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from typing import Any, TypeGuard

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from adapter_router.adapters.keys import listed
from adapter_router.adapters.strict_json import parse_object

_FILE = "adapter_model.safetensors"
_MAX_HEADER_BYTES = 4 << 20
_MAX_TENSORS = 32_768
_MAX_AXES = 8
_MAX_AXIS = 1 << 40
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_EXPONENTS: dict[str, Any] = {"F32": np.uint32(0x7F800000), "F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}
_CHUNK = 1 << 20  # numbers looked at at once: the check costs no memory of the tensor's size


def read_tensors(raw: bytes) -> tuple[dict[str, torch.Tensor] | None, list[str]]:
    """Tensors in their file's dtype, and every problem of the file; None where the file cannot be read at all."""
    header, problems = _read_header(raw)
    if header is None:
        return None, problems
    damaged = [name for name, entry in header.items() if not _is_sound(entry)]
    if damaged:
        return None, [*problems, f"{_FILE} is damaged: {listed(damaged)}: shape, dtype and place do not agree"]
    problems += _dtype_problems(header)
    try:
        tensors = load(raw)
    except (SafetensorError, KeyError, ValueError) as error:
        return None, [*problems, f"{_FILE} is damaged: {error}"]
    if problems or not _all_finite(raw, header):
        broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    else:
        broken = []
    if broken:
        problems.append(f"{listed(broken)} hold{'s' * (len(broken) == 1)} NaN or infinite values")
    return tensors, problems


def _all_finite(raw: bytes, header: dict[str, Any]) -> bool:
    """Whether no number is NaN or infinite, seen at once; False also where that cannot be seen.

    A number is neither unless all bits of its exponent are set.
    """
    dtypes = {entry["dtype"] for entry in header.values()}
    if len(dtypes) != 1:
        return False
    exponent, start = _EXPONENTS[dtypes.pop()], 8 + struct.unpack("<Q", raw[:8])[0]
    if start == len(raw):
        return True
    numbers = np.frombuffer(raw, exponent.dtype, offset=start)
    starts = range(0, len(numbers), _CHUNK)
    return not any(((numbers[start : start + _CHUNK] & exponent) == exponent).any() for start in starts)


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        return True  # refused for its dtype
    flat = tensor.flatten()
    return all(bool(flat[start : start + _CHUNK].isfinite().all()) for start in range(0, len(flat), _CHUNK))


def _read_header(raw: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    """The JSON header: 8 bytes of little-endian length, then that many bytes."""
    if len(raw) < 8:
        return None, [f"{_FILE} is damaged: {len(raw)} bytes is no header"]
    (length,) = struct.unpack("<Q", raw[:8])
    if length > _MAX_HEADER_BYTES:
        return None, [f"{_FILE} has a header of {length} bytes, the limit is {_MAX_HEADER_BYTES}"]
    header, problems = parse_object(raw[8 : 8 + length], f"{_FILE} is damaged: its header")
    if header is None:
        return None, problems
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(entries) > _MAX_TENSORS:
        return None, [f"{_FILE} has {len(entries)} tensors, the limit is {_MAX_TENSORS}"]
    return entries, problems


def _is_sound(entry: Any) -> bool:
    """Whether an entry is what safetensors writes; of dtypes that are not served only the form is looked at."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not (_are_sizes(shape, _MAX_AXES) and _are_sizes(place, 2) and len(place) == 2):
        return False
    size = _BYTES.get(entry["dtype"])
    return size is None or place[1] - place[0] == math.prod(shape) * size


def _are_sizes(values: Any, most: int) -> TypeGuard[list[int]]:
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= _MAX_AXIS for v in values)


def _dtype_problems(entries: dict[str, Any]) -> list[str]:
    """Names by the dtype that is not served."""
    names = defaultdict(list)
    for name, entry in entries.items():
        if entry["dtype"] not in _BYTES:
            names[entry["dtype"]].append(name)
    served = ", ".join(sorted(_BYTES))
    return [
        f"{listed(found)} {'has' if len(found) == 1 else 'have'} dtype {dtype}, served are {served}"
        for dtype, found in names.items()
    ]
