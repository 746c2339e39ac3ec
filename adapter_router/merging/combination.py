"""The ways to merge: pure formulas on tensors of one shape, and the table of types.

With ``t_i`` the parts' tensors and ``w_i`` their weights, element by element:

    linear            m = sum_i w_i t_i                                 task arithmetic, arXiv:2212.04089
    magnitude_prune   m = sum_i w_i trim(t_i)                           trim: the largest |t|, ``density`` of them
    dare_linear       m = sum_i w_i drop(t_i)                           arXiv:2311.03099; drop: kept with probability
                                                                        ``density`` and divided by it, else 0
    ties              m = sum_{i in agree} w_i trim(t_i) / |agree|      arXiv:2306.01708; agree: the parts whose sign is
    dare_ties         m = sum_{i in agree} w_i drop(t_i) / |agree|      the elected one

The sign is elected without the weights: that of sum_i t_i ("total") or of sum_i sign(t_i) ("frequency"), + for 0.

A type without ``_svd`` takes A and B apart, with ``w_A = sign(w s) sqrt|w s|`` and ``w_B = sqrt|w s|``. Even ``linear``
is then no weighted sum of the adapters: (sum_i u_i B_i)(sum_j v_j A_j) has a cross term for each pair i, j.
A type with ``_svd`` takes ``s B A`` and cuts the merged matrix to a rank. ``svd`` is ``linear`` on those: the exact
sum, cut. ``cat`` puts the ranks side by side: the exact sum.

The arithmetic is PEFT's (0.21.2), float32 and draws of random numbers included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

MergeType = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
SignMethod = Literal["total", "frequency"]
SIGN_METHODS: tuple[SignMethod, ...] = get_args(SignMethod)


@dataclass(frozen=True)
class Combination:
    """One type: what it is applied to, what it drops first ("" for nothing), whether the parts elect a sign."""

    on: Literal["sum", "factors", "delta"]
    drops: Literal["", "smallest", "random"] = ""
    elects: bool = False

    @property
    def cuts_rank(self) -> bool:
        """Whether the result is a matrix that must be cut to a rank."""
        return self.on == "delta"


COMBINATIONS: Mapping[MergeType, Combination] = {
    "linear": Combination("factors"),
    "cat": Combination("sum"),
    "svd": Combination("delta"),
    "ties": Combination("factors", "smallest", elects=True),
    "ties_svd": Combination("delta", "smallest", elects=True),
    "dare_linear": Combination("factors", "random"),
    "dare_ties": Combination("factors", "random", elects=True),
    "dare_linear_svd": Combination("delta", "random"),
    "dare_ties_svd": Combination("delta", "random", elects=True),
    "magnitude_prune": Combination("factors", "smallest"),
    "magnitude_prune_svd": Combination("delta", "smallest"),
}


@dataclass(frozen=True)
class Settings:
    """``density``: share of entries kept, in (0, 1]. ``generator``: where random drops draw from."""

    combination: Combination
    density: float
    sign: SignMethod
    generator: torch.Generator


def combine(tensors: Sequence[torch.Tensor], weights: Sequence[float], settings: Settings) -> torch.Tensor:
    """One tensor of the shape that all ``tensors`` have, by the formulas above, in their dtype."""
    kept = torch.stack([_thinned(tensor, settings) for tensor in tensors])
    factors = torch.tensor(weights, dtype=kept.dtype).reshape(-1, *(1,) * (kept.dim() - 1))
    if not settings.combination.elects:
        return (kept * factors).sum(dim=0)
    agree = kept.sign() == _elected_sign(kept, settings.sign)
    return (kept * factors * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def _thinned(tensor: torch.Tensor, settings: Settings) -> torch.Tensor:
    if settings.combination.drops == "" or settings.density == 1:
        return tensor
    if settings.combination.drops == "smallest":
        return _trimmed(tensor, settings.density)
    kept = torch.bernoulli(torch.full_like(tensor, settings.density), generator=settings.generator)
    return tensor * kept / settings.density


def _trimmed(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Zeros in place of all but the largest; among equals, those that ``topk`` happens to take."""
    largest = tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices
    kept = torch.zeros(tensor.numel(), dtype=tensor.dtype)
    kept[largest] = 1
    return tensor * kept.reshape(tensor.shape)


def _elected_sign(stacked: torch.Tensor, method: SignMethod) -> torch.Tensor:
    """+1 or -1 for each entry of ``stacked`` (parts, …)."""
    votes = stacked if method == "total" else stacked.sign()
    return torch.where(votes.sum(dim=0) >= 0, 1, -1)
