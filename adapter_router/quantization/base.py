"""Quantising a base as it is read: by configuration, or as the base's own file says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from transformers import PretrainedConfig, PreTrainedModel

from adapter_router.config import QuantizationConfig
from adapter_router.quantization.bits import KEPT_BITS, choose_bits
from adapter_router.quantization.packed_file import FILE, PackedFile
from adapter_router.quantization.schemes import Packed, pack
from adapter_router.quantization.weights import attach, matrix_of, quantizable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DEVICES = ("cpu", "cuda")


class WeightSource(Protocol):
    """Where packed weights come from."""

    def choose(self, paths: Mapping[str, str]) -> dict[str, int]:
        """Bits by path inside the backbone; ``paths``: from those to the names that patterns are matched against."""

    def packed(self, path: str, weight: torch.Tensor, bits: int) -> Packed:
        """The packed form of ``weight`` (out, in)."""

    def check(self) -> None:
        """Raises ValueError for what has been of no use when all of the backbone has been read."""


class ByConfig:
    """Quantised here and now."""

    def __init__(self, config: QuantizationConfig) -> None:
        self._config = config
        self._unused = list(config.bits_pattern)
        self._names: list[str] = []

    def choose(self, paths: Mapping[str, str]) -> dict[str, int]:
        chosen, used = choose_bits(self._config, paths.values())
        # Heads know backbones of different extent: what one of them lacks may be another's.
        self._unused = [key for key in self._unused if key not in used]
        self._names += chosen
        return {path: chosen[name] for path, name in paths.items()}

    def packed(self, path: str, weight: torch.Tensor, bits: int) -> Packed:
        try:
            return pack(weight, bits)
        except ValueError as error:
            raise ValueError(f"quantization: {path}: {error}") from error

    def check(self) -> None:
        if not self._names:
            raise ValueError("quantization: the base has no linear layer that could be quantised")
        if self._unused:
            modules = f"{len(set(self._names))} modules, e.g. {self._names[0]}"
            faults = [f"bits_pattern {key!r:.80} matches none of {modules}" for key in self._unused]
            raise ValueError("quantization: " + "; ".join(faults))


class ByFile:
    """Quantised when the base was written."""

    def __init__(self, file: PackedFile) -> None:
        self._file = file
        self._found = False

    def choose(self, paths: Mapping[str, str]) -> dict[str, int]:
        chosen = {path: self._file.bits[path] for path in paths if path in self._file.bits}
        self._found |= bool(chosen)
        return chosen

    def packed(self, path: str, weight: torch.Tensor, bits: int) -> Packed:  # noqa: ARG002 - the file knows
        return self._file.read(path, weight)

    def check(self) -> None:
        if not self._found:
            raise ValueError(f"{FILE} holds no weight of this base")


def weight_source(
    source: str, base: PretrainedConfig, device: torch.device, config: QuantizationConfig | None, dtype: str = "auto"
) -> WeightSource | None:
    """Where the packed weights of the base in ``source`` come from; None for a base that is not to be quantised.

    Raises ValueError for combinations that are not served.
    """
    file = Path(source) / FILE
    if config is None and not file.is_file():
        return None
    problems = []
    if device.type not in _DEVICES:
        problems.append(f"runs on {' and '.join(_DEVICES)}, not on {device.type}")
    if getattr(base, "quantization_config", None):
        problems.append("the checkpoint is quantised already, in a format of its own")
    if file.is_file() and dtype != "auto" and base.dtype not in (None, getattr(torch, dtype)):
        problems.append(f"the base is quantised, and made for {base.dtype}: leave dtype at auto, not {dtype}")
    if config is not None and file.is_file():
        problems.append(f"the base is quantised already: leave it out, {FILE} says how")
    if problems:
        raise ValueError("quantization: " + "; ".join(problems))
    return ByFile(PackedFile(file)) if config is None else ByConfig(config)


def quantize_model(
    model: PreTrainedModel, backbone_path: str, untrained: frozenset[str], source: WeightSource, *, has_head: bool
) -> dict[str, int]:
    """Quantise ``model``'s backbone in place, one weight after the other; the bits of each module that was.

    Modules are named as in the model of the base's own task, which patterns are matched against. Raises ValueError.
    """
    modules = quantizable(model, backbone_path, untrained, has_head=has_head)
    prefix = backbone_path or ("" if has_head else model.base_model_prefix)
    names = {path: f"{prefix}.{path}" if prefix else path for path in modules}
    bits = {path: width for path, width in source.choose(names).items() if width != KEPT_BITS}
    for path, width in bits.items():
        weight = matrix_of(modules[path])
        if weight.dtype not in DTYPES:
            raise ValueError(f"quantization: {names[path]} is {weight.dtype}, served are float32, float16 and bfloat16")
        attach(modules[path], source.packed(path, weight, width))
    return {names[path]: width for path, width in bits.items()}
