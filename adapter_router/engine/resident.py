"""One adapter on the device, ready for the grouped forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from adapter_router.adapters.validate import AdapterTensors, LoraPair


@dataclass(frozen=True)
class LoraFactors:
    """Device form of a LoraPair: ``a`` (in, rank), ``b`` (rank, out) with the scaling folded in; contiguous float32."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @classmethod
    def of(cls, pair: LoraPair, device: torch.device) -> LoraFactors:
        a = pair.a.to(device, torch.float32).t().contiguous()
        b = pair.b.to(device, torch.float32).t() * pair.scaling
        return cls(a, b.contiguous())


@dataclass(frozen=True)
class ResidentAdapter:
    """``lora`` and ``heads`` by the path of the base module they act on; a head is a whole module of this adapter."""

    digest: str
    lora: Mapping[str, LoraFactors]
    heads: Mapping[str, nn.Module]
    num_labels: int
    num_bytes: int
    max_rank: int


def device_bytes(tensors: AdapterTensors, head_dtype: torch.dtype) -> int:
    """Bytes the adapter will hold on the device."""
    lora = sum((pair.a.numel() + pair.b.numel()) * 4 for pair in tensors.pairs.values())
    heads = sum(t.numel() for module in tensors.saved.values() for t in module.values())
    return lora + heads * head_dtype.itemsize
