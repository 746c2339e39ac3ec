"""The merge of one module: factors of the result, and how far they are from the exact weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapter_router.adapters.base_spec import TargetSpec
from adapter_router.adapters.delta import ModuleDelta
from adapter_router.adapters.tuners.tuner import Weights
from adapter_router.merging.combination import Settings, combine
from adapter_router.merging.weight_change import WeightChange, as_in_peft, weight_change, weighted


@dataclass(frozen=True)
class Term:
    """One part's change of the module."""

    delta: ModuleDelta
    weight: float

    @property
    def is_low_rank(self) -> bool:
        """Whether the weight's change is just ``scaling * B A``."""
        return self.delta.a is not None and self.delta.gain is None and self.delta.dense is None


@dataclass(frozen=True)
class Layer:
    """One module to merge: ``terms`` of those parts that change its weight."""

    path: str
    spec: TargetSpec
    terms: Sequence[Term]


@dataclass(frozen=True)
class MergedLayer:
    """``a`` (rank, in) and ``b`` (out, rank), float32, kernels' axes as PEFT stores them; scaling 1.

    ``size``: Frobenius norm of the exact weighted sum; ``distance``: of the difference to it; ``summed``: the terms'
    own norms, by absolute weights, added up.
    """

    path: str
    a: torch.Tensor
    b: torch.Tensor
    size: float
    distance: float
    summed: float


def merge_layer(layer: Layer, settings: Settings, rank: int, weights: Weights) -> MergedLayer:
    """``rank``: the most that types which cut it may keep. Raises ValueError where numbers overflow."""
    changes = _changes(layer, weights)
    exact = weighted(changes, [term.weight for term in layer.terms])
    if not exact.is_finite():
        raise ValueError(f"{layer.path}: the weighted sum overflows")
    a, b = _factors(layer, exact, settings, rank, weights)
    a, b = a.float(), b.float()
    merged = WeightChange(a.double(), b.double())
    if not merged.is_finite():
        raise ValueError(f"{layer.path}: the merged factors overflow float32")
    return MergedLayer(
        layer.path,
        *_shaped(a, b, layer.spec),
        size=exact.norm(),
        distance=merged.minus(exact).norm(),
        summed=sum(abs(term.weight) * change.norm() for term, change in zip(layer.terms, changes, strict=True)),
    )


def _changes(layer: Layer, weights: Weights) -> list[WeightChange]:
    found = [weight_change(layer.path, term.delta, layer.spec, weights) for term in layer.terms]
    return [change for change in found if change is not None]


def _factors(
    layer: Layer, exact: WeightChange, settings: Settings, rank: int, weights: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """``exact``: the weighted sum in float64."""
    kind = settings.combination
    if kind.on == "factors":
        return _combined_factors(layer.terms, settings)
    if kind.on == "sum":
        assert exact.a is not None and exact.b is not None  # else cat is refused
        return exact.a, exact.b
    if not kind.drops:
        return exact.truncated(rank)
    matrices = [as_in_peft(_matrix(layer, term, weights), layer.spec) for term in layer.terms]
    merged = as_in_peft(combine(matrices, [term.weight for term in layer.terms], settings), layer.spec)
    if not bool(merged.isfinite().all()):
        raise ValueError(f"{layer.path}: the merged matrix overflows float32")
    return WeightChange(dense=merged.double()).truncated(rank)


def _combined_factors(terms: Sequence[Term], settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B apart. The root of weight and scaling goes to both, its sign to A alone: twice, it would be lost."""
    scales = [term.weight * term.delta.scaling for term in terms]
    roots = [abs(scale) ** 0.5 for scale in scales]
    signed = [root if scale >= 0 else -root for root, scale in zip(roots, scales, strict=True)]
    a = combine([_flat(term.delta.a) for term in terms], signed, settings)
    b = combine([_flat(term.delta.b) for term in terms], roots, settings)
    return a, b


def _flat(tensor: torch.Tensor | None) -> torch.Tensor:
    """A or B as a matrix, float32."""
    assert tensor is not None
    return tensor.float().flatten(1)


def _matrix(layer: Layer, term: Term, weights: Weights) -> torch.Tensor:
    """A part's change of the weight, (out, in), float32; a low rank in float32 throughout, as in PEFT."""
    if term.is_low_rank:
        return (_flat(term.delta.b) @ _flat(term.delta.a)) * term.delta.scaling
    change = weight_change(layer.path, term.delta, layer.spec, weights)
    assert change is not None
    return change.matrix().float()


def _shaped(a: torch.Tensor, b: torch.Tensor, spec: TargetSpec) -> tuple[torch.Tensor, torch.Tensor]:
    if spec.kind != "conv":
        return a.contiguous(), b.contiguous()
    ones = (1,) * len(spec.kernel)
    return a.reshape(-1, spec.in_features, *spec.kernel), b.reshape(spec.out_features, -1, *ones)
