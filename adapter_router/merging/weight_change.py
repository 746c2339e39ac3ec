"""What an adapter changes at a module, as a change of the module's weight: low-rank, or a full matrix.

Always of (out, in): a convolution's input and kernel axes are one, an embedding's is (features, vocabulary).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapter_router.adapters.base_spec import TargetSpec
from adapter_router.adapters.convert import small_product
from adapter_router.adapters.delta import ModuleDelta
from adapter_router.adapters.tuners.tuner import Weights

_EXACT_ENTRIES = 1 << 24  # of larger matrices the singular values are found in float32, in half the time


@dataclass(frozen=True)
class WeightChange:
    """``b a`` of (out, rank) and (rank, in), float64; or ``dense`` (out, in), float64."""

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    dense: torch.Tensor | None = None

    def matrix(self) -> torch.Tensor:
        """(out, in), float64."""
        if self.dense is not None:
            return self.dense
        assert self.a is not None and self.b is not None
        return self.b @ self.a

    def norm(self) -> float:
        """Frobenius norm; of a low rank without the matrix."""
        if self.a is None or self.b is None:
            return float(self.matrix().norm())
        return float(small_product(self.b, self.a).norm())

    def minus(self, other: WeightChange) -> WeightChange:
        """The difference; of low rank where both are."""
        if self.a is None or self.b is None or other.a is None or other.b is None:
            return WeightChange(dense=self.matrix() - other.matrix())
        return WeightChange(torch.cat([self.a, other.a]), torch.cat([self.b, -other.b], dim=1))

    def is_finite(self) -> bool:
        """Whether all entries of what it is made of are numbers."""
        return all(bool(t.isfinite().all()) for t in (self.a, self.b, self.dense) if t is not None)

    def truncated(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest ``b a`` of ``rank`` or less (Eckart and Young): ``U S`` and ``V^T`` of the largest components.

        Where the change itself is of low rank, of the small matrix between the QR factors of its sides.
        """
        if self.a is None or self.b is None:
            dense = self.matrix()
            u, s, vh = torch.linalg.svd(
                dense if dense.numel() <= _EXACT_ENTRIES else dense.float(), full_matrices=False
            )
        else:
            left, right = torch.linalg.qr(self.b), torch.linalg.qr(self.a.t())
            u, s, vh = torch.linalg.svd(left.R @ right.R.t(), full_matrices=False)
            u, vh = left.Q @ u, vh @ right.Q.t()
        return vh[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous()


def weight_change(path: str, delta: ModuleDelta, spec: TargetSpec, weights: Weights) -> WeightChange | None:
    """``W' - W`` where ``W' = gain * (W + scaling * B A + D)`` (``ModuleDelta``); None where the weight stays."""
    if delta.dense is None and delta.gain is None:
        if delta.a is None or delta.b is None:
            return None
        return WeightChange(delta.a.double().flatten(1), delta.b.double().flatten(1) * delta.scaling)
    added = torch.zeros((), dtype=torch.float64)
    if delta.a is not None and delta.b is not None:
        added = delta.b.double().flatten(1) @ delta.a.double().flatten(1) * delta.scaling
    if delta.dense is not None:
        added = added + delta.dense.double().flatten(1)
    if delta.gain is None:
        return WeightChange(dense=added)
    own = weights.weight(path).double()
    own = own.t() if spec.kind == "embedding" else own.flatten(1)
    gain = delta.gain.double()[:, None]
    return WeightChange(dense=(gain - 1) * own + gain * added)


def weighted(changes: Sequence[WeightChange], factors: Sequence[float]) -> WeightChange:
    """``sum_i w_i dW_i``, float64: ranks side by side where all are low, a matrix where one is not."""
    pairs = list(zip(changes, factors, strict=True))
    sides = [(change.a, change.b * w) for change, w in pairs if change.a is not None and change.b is not None]
    if len(sides) == len(pairs):
        return WeightChange(torch.cat([a for a, _ in sides]), torch.cat([b for _, b in sides], dim=1))
    return WeightChange(dense=torch.stack([change.matrix() * w for change, w in pairs]).sum(dim=0))


def as_in_peft(matrix: torch.Tensor, spec: TargetSpec) -> torch.Tensor:
    """A matrix (out, in) as PEFT's ``get_delta_weight`` has it, or back: one seed must drop the same entries there."""
    return matrix.t() if spec.kind == "embedding" or spec.transposed else matrix


def total_norm(sizes: Sequence[float]) -> float:
    """Frobenius norm of several matrices together."""
    return math.sqrt(sum(size * size for size in sizes))
