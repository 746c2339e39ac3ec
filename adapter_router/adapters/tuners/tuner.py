"""What every PEFT method must say about itself to be served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from adapter_router.adapters.adapter_config import AdapterConfig
from adapter_router.adapters.base_spec import Shape, TargetSpec
from adapter_router.adapters.delta import ModuleDelta


@dataclass(frozen=True)
class Factors:
    """``b @ a``, of (rank, in) and (out, rank); ``uncertainty``: relative error of the product, as far as known."""

    a: torch.Tensor
    b: torch.Tensor
    uncertainty: float = 0.0


class Weights(Protocol):
    """The pristine base, read-only."""

    def weight(self, path: str) -> torch.Tensor:
        """Weight of the module ``path``, float32: (out, in) of a linear layer whatever its storage."""

    def bias(self, path: str) -> torch.Tensor | None:
        """Bias of the module ``path``, float32 (out,)."""

    def largest(self, path: str, rank: int) -> Factors:
        """The ``rank`` largest singular components of a linear layer's weight."""

    def smallest(self, path: str, rank: int) -> Factors:
        """The ``rank`` smallest singular components."""

    def column_basis(self, path: str, rank: int) -> Factors:
        """``Q Q^T W`` with Q an orthonormal basis of the first ``rank`` columns of W; ``b`` is Q."""


@dataclass(frozen=True, eq=False)
class Target:
    """One module that an adapter of one configuration changes.

    ``path`` is the adapter's own name of it, which its patterns match; ``base_path`` is the base's.
    """

    path: str
    base_path: str
    spec: TargetSpec
    config: AdapterConfig


@dataclass(frozen=True)
class Tuner:
    """One PEFT method.

    ``served``: configuration fields with an effect that we reproduce; ``harmless``: fields without effect on a loaded
    adapter. Any other field that is set is refused by name.
    ``kinds``: the kinds of modules (``TargetSpec.kind``) the method may act on.
    ``roles``: what follows a module's path in a tensor's name -> the tensor's role (``lora_A.weight`` -> ``a``).
    ``config_problems``: what is wrong with the method's own fields (a JSON object as in the file).
    ``shapes``: expected shape of each role at a target, given the shapes that are there; a role not in the answer is
    not allowed. Roles in the answer must be present.
    ``delta``: the formula; never fails once ``shapes`` hold, except with ValueError for an ill-posed weight.
    ``shared``: tensors that belong to no module, by full name after ``base_model.`` (VeRA's projections).
    """

    served: frozenset[str]
    harmless: frozenset[str]
    kinds: frozenset[str]
    roles: Mapping[str, str]
    config_problems: Callable[[Mapping[str, Any]], list[str]]
    shapes: Callable[[Target, Mapping[str, Shape]], dict[str, Shape]]
    delta: Callable[[Target, Mapping[str, torch.Tensor], Weights], ModuleDelta]
    shared: frozenset[str] = frozenset()
