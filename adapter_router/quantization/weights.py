"""Quantised weights inside a transformers model: packed tensors in place of the parameter, read as it was.

A module's ``weight`` is dequantised whenever anything reads it (``torch.nn.utils.parametrize``), so that linear layers,
transformers' ``Conv1D`` and whatever looks at a neighbour's weight need no code of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapter_router.quantization.schemes import Packed, unpack
from adapter_router.quantization.scratch import one_at_a_time, room_for

INNER = "parametrizations"  # what paths of a quantised weight's own parts contain
_PARTS = f".{INNER}.weight."


class QuantizedWeight(nn.Module):
    """Codes and scales -> the weight, in its own dtype and layout. It cannot be assigned."""

    def __init__(self, packed: Packed, dtype: torch.dtype, transposed: bool) -> None:
        super().__init__()
        self._bits = packed.bits
        self._shape = packed.shape
        self._dtype = dtype
        self._transposed = transposed
        self._given: Packed | None = packed

    def forward(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        weight = unpack(Packed(self._bits, self._shape, codes, scales), self._dtype)
        if not self._transposed:
            return weight
        # A view would be multiplied by another kernel than the checkpoint's own layout, with other roundings.
        turned = room_for("transposed", (self._shape[1], self._shape[0]), codes, self._dtype)
        return turned.copy_(weight.t())

    def right_inverse(self, _weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``register_parametrization`` stores: the tensors this was made with, once."""
        packed, self._given = self._given, None
        if packed is None:
            raise RuntimeError("a quantised weight is read-only")
        return packed.codes, packed.scales


def quantizable(
    model: PreTrainedModel, backbone_path: str, untrained: frozenset[str], *, has_head: bool
) -> dict[str, nn.Module]:
    """Linear layers of the backbone that may be quantised, by their paths inside it.

    Not those whose weight the checkpoint lacks (``untrained``, by the model's names) or another module shares, the
    output layer, the insides of ``nn.MultiheadAttention`` (it reads their weights in kernels of its own), and, in a
    model with a head but without a backbone of its own, its direct children.
    """
    backbone = model.get_submodule(backbone_path)
    inside = f"{backbone_path}." if backbone_path else ""
    modules = [module for module in model.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]
    sharers = Counter(id(module.weight) for module in modules)
    left_out = {id(model.get_output_embeddings())}
    for module in backbone.modules():
        if isinstance(module, nn.MultiheadAttention):
            left_out |= {id(part) for part in module.modules()}
    if has_head and not backbone_path:
        left_out |= {id(child) for child in model.children()}
    return {
        path: module
        for path, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and id(module) not in left_out
        and sharers[id(module.weight)] == 1
        and f"{inside}{path}.weight" not in untrained
    }


def matrix_of(module: nn.Module) -> torch.Tensor:
    """A linear layer's weight as (out, in), whatever its storage."""
    weight = _weight_of(module)
    return weight.t() if isinstance(module, Conv1D) else weight


def attach(module: nn.Module, packed: Packed) -> None:
    """Put ``packed`` in place of a linear layer's weight, which is freed."""
    weight = module.get_parameter("weight").requires_grad_(False)
    quantized = QuantizedWeight(packed, weight.dtype, isinstance(module, Conv1D))
    if type(module) in (nn.Linear, Conv1D):  # their products read this one weight and keep nothing of it
        module.forward = _reading_one_weight(module.forward)
    parametrize.register_parametrization(module, "weight", quantized, unsafe=True)


def _reading_one_weight(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        with one_at_a_time():
            return forward(*args, **kwargs)

    return run


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module in ``model`` whose weight is quantised, by path; not those with parametrizations of others."""
    parts = [path for path, part in model.named_modules(remove_duplicate=False) if isinstance(part, QuantizedWeight)]
    paths = [path.partition(_PARTS)[0] for path in parts]
    return {path: model.get_submodule(path) for path in paths}


def _weight_of(module: nn.Module) -> torch.Tensor:
    """Dequantised, where it is quantised."""
    return cast(torch.Tensor, module.weight)


class ServedTensors(Mapping[str, torch.Tensor]):
    """A model's tensors under the names of its full-precision architecture: quantised weights as they are served.

    A quantised weight is dequantised each time it is asked for, and only then.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """``tensors``: parameters, or the state, of ``model``."""
        quantized = quantized_modules(model)
        self.quantized = frozenset(quantized)
        self._kept = {name: tensor for name, tensor in tensors.items() if name.partition(_PARTS)[0] not in quantized}
        self._modules = {f"{path}.weight": module for path, module in quantized.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._modules:
            return _weight_of(self._modules[name]).detach()
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._kept
        yield from self._modules

    def __len__(self) -> int:
        return len(self._kept) + len(self._modules)
