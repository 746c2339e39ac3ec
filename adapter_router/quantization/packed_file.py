"""``quantized.safetensors`` in a base's directory: its quantised weights as they are packed.

    {path}.weight.codes, {path}.weight.scales        paths inside the backbone, as all task classes call them
    metadata: {"format": "pt", "bits": "{\\"encoder.layer.0.attention.self.query\\": 4, …}"}

The directory's ``model.safetensors`` holds the same weights dequantised, so that it is an ordinary base for everyone
else; here both are compared when the base is read, and must be the same to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adapter_router.quantization.schemes import Packed, missing_library, stored_shapes, unpack
from adapter_router.quantization.scratch import one_at_a_time

FILE = "quantized.safetensors"
_WIDTHS = (2, 3, 4, 8)


def write_packed(path: Path, packed: Mapping[str, Packed]) -> None:
    """Write quantised weights, by module."""
    tensors = {}
    for module, weight in packed.items():
        tensors[f"{module}.weight.codes"] = weight.codes
        tensors[f"{module}.weight.scales"] = weight.scales
    bits = {module: weight.bits for module, weight in packed.items()}
    save_file(tensors, path, metadata={"format": "pt", "bits": json.dumps(bits)})


class PackedFile:
    """Reads one weight at a time. Every fault of the file is a ValueError that names it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            opened: Any = safe_open(path, framework="pt")
            self._file = opened
            self.bits = self._parse(opened.metadata() or {})
        except (SafetensorError, OSError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error
        if problems := missing_library(set(self.bits.values())):
            raise ValueError(f"{path}: {'; '.join(problems)}")

    def read(self, module: str, weight: torch.Tensor) -> Packed:
        """The packed form of ``weight`` (out, in), which the checkpoint holds dequantised."""
        bits, shape = self.bits[module], (weight.shape[0], weight.shape[1])
        try:
            codes, scales = (self._file.get_tensor(f"{module}.weight.{part}") for part in ("codes", "scales"))
        except SafetensorError as error:
            raise ValueError(f"{self._path}: {error}") from error
        expected = stored_shapes(bits, shape)
        kind = torch.int8 if bits == 8 else torch.uint8
        if (tuple(codes.shape), tuple(scales.shape)) != expected or (codes.dtype, scales.dtype) != (
            kind,
            torch.float32,
        ):
            raise ValueError(f"{self._path}: {module} is not a weight of {list(shape)} at {bits} bits")
        packed = Packed(bits, shape, codes, scales)
        with one_at_a_time():
            same = torch.equal(unpack(packed, weight.dtype), weight)
        if not same:
            raise ValueError(
                f"{self._path}: {module} differs from the checkpoint beside it; write the base again with "
                f"adapter-router quantize, or remove {FILE}"
            )
        return packed

    def _parse(self, metadata: Mapping[str, str]) -> dict[str, int]:
        bits = json.loads(metadata.get("bits", "null"))
        if not isinstance(bits, dict) or not bits or not all(width in _WIDTHS for width in bits.values()):
            raise ValueError(f"{self._path}: its metadata do not give each module 2, 3, 4 or 8 bits")
        return bits
