"""``adapter_model.safetensors`` -> tensors by name, from bytes already in memory, with caps checked before parsing."""

from __future__ import annotations

import json
import struct
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

_MAX_HEADER_BYTES = 8 << 20
_MAX_TENSORS = 32_768
_DTYPES = frozenset({"F32", "F16", "BF16"})


def read_tensors(raw: bytes) -> tuple[dict[str, torch.Tensor] | None, list[str]]:
    """Tensors in their file's dtype, and every problem of the file; None where the file cannot be read at all."""
    header, problems = _read_header(raw)
    if header is None:
        return None, problems
    problems = _dtype_problems(header)
    try:
        tensors = load(raw)
    except (SafetensorError, KeyError, ValueError) as error:
        return None, [*problems, f"adapter_model.safetensors is damaged: {error}"]
    checked = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.itemsize > 1}
    problems += [f"{name} holds NaN or infinite values" for name, t in checked.items() if not bool(t.isfinite().all())]
    return tensors, problems


def _read_header(raw: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    """The JSON header: 8 bytes of little-endian length, then that many bytes."""
    if len(raw) < 8:
        return None, [f"adapter_model.safetensors is damaged: {len(raw)} bytes is no header"]
    (length,) = struct.unpack("<Q", raw[:8])
    if length > _MAX_HEADER_BYTES:
        return None, [f"adapter_model.safetensors has a header of {length} bytes, the limit is {_MAX_HEADER_BYTES}"]
    try:
        header = json.loads(raw[8 : 8 + length])
    except (ValueError, RecursionError):
        return None, ["adapter_model.safetensors is damaged: its header is not JSON"]
    if not isinstance(header, dict):
        return None, ["adapter_model.safetensors is damaged: its header is not a JSON object"]
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(entries) > _MAX_TENSORS:
        return None, [f"adapter_model.safetensors has {len(entries)} tensors, the limit is {_MAX_TENSORS}"]
    return entries, []


def _dtype_problems(entries: dict[str, Any]) -> list[str]:
    return [
        f"{name} has dtype {entry.get('dtype')}, served are {', '.join(sorted(_DTYPES))}"
        for name, entry in entries.items()
        if isinstance(entry, dict) and entry.get("dtype") not in _DTYPES
    ]
