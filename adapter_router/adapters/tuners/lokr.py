"""LoKr: a Kronecker product (Yeh et al. 2023, arXiv:2309.14859).

``y = f(x) + s kron(w1, w2) x``, ``s = alpha / rank``; ``lokr_w1`` (out1, in1) and ``lokr_w2`` (out2, in2) with
``out = out1 out2`` and ``in = in1 in2``. Each may come as two factors, ``lokr_w1_a`` (out1, rank) and ``lokr_w1_b``
(rank, in1); the Kronecker product then has the Kronecker products of the factors as its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from adapter_router.adapters.base_spec import Shape
from adapter_router.adapters.delta import ModuleDelta
from adapter_router.adapters.tuners.tuner import Target, Tuner, Weights

_SEARCH = -1
_MAX_FACTOR = 1_000_000


def _config_problems(document: Mapping[str, Any]) -> list[str]:
    problems = []
    both = document.get("decompose_both", False)
    if type(both) is not bool:
        problems.append(f"decompose_both is {both!r:.80}, must be true or false")
    factor = document.get("decompose_factor", _SEARCH)
    if type(factor) is not int or not _SEARCH <= factor <= _MAX_FACTOR:
        problems.append(f"decompose_factor is {factor!r:.80}, must be an integer from {_SEARCH} to {_MAX_FACTOR}")
    return problems


def _split(features: int, factor: int) -> tuple[int, int]:
    """``factor`` and the rest where it divides; else the largest divisor up to it and the root, and the rest."""
    if factor > 0 and features % factor == 0:
        return factor, features // factor
    root = math.isqrt(features)
    most = root if factor == _SEARCH else min(factor, root)
    small = next((divisor for divisor in range(most, 1, -1) if features % divisor == 0), 1)
    return small, features // small


def _shapes(target: Target, _present: Mapping[str, Shape]) -> dict[str, Shape]:
    spec, document = target.spec, target.config.document
    if spec.transposed:  # PEFT has no LoKr for transformers' Conv1D
        return {}
    factor = document.get("decompose_factor", _SEARCH)
    factor = factor if type(factor) is int else _SEARCH
    out1, out2 = _split(spec.out_features, factor)
    in1, in2 = _split(spec.in_features, factor)
    rank = target.config.rank_of(target.path)
    factored1 = document.get("decompose_both", False) and rank < max(out1, in1) / 2
    factored2 = rank < max(out2, in2) / 2
    w1 = {"w1_a": (out1, rank), "w1_b": (rank, in1)} if factored1 else {"w1": (out1, in1)}
    w2 = {"w2_a": (out2, rank), "w2_b": (rank, in2)} if factored2 else {"w2": (out2, in2)}
    return {**w1, **w2}


def _factors(tensors: Mapping[str, torch.Tensor], role: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices whose product is ``role``, with as small an inner dimension as can be had for nothing."""
    if role not in tensors:
        return tensors[f"{role}_a"].float(), tensors[f"{role}_b"].float()
    full = tensors[role].float()
    rows, columns = full.shape
    return (torch.eye(rows), full) if rows < columns else (full, torch.eye(columns))


def _delta(target: Target, tensors: Mapping[str, torch.Tensor], _weights: Weights) -> ModuleDelta:
    spec = target.spec
    left1, right1 = _factors(tensors, "w1")
    left2, right2 = _factors(tensors, "w2")
    scaling = target.config.alpha_of(target.path) / target.config.rank_of(target.path)
    rank = left1.shape[1] * left2.shape[1]
    if rank * (spec.in_features + spec.out_features) >= spec.in_features * spec.out_features:
        return ModuleDelta(dense=torch.kron(left1 @ right1, left2 @ right2) * scaling)
    return ModuleDelta(torch.kron(right1, right2), torch.kron(left1, left2), scaling)


TUNER = Tuner(
    served=frozenset({"alpha", "alpha_pattern", "decompose_both", "decompose_factor", "r", "rank_pattern"}),
    # use_effective_conv2d changes convolutions only.
    harmless=frozenset(
        {"init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d"}
    ),
    kinds=frozenset({"linear"}),
    roles={f"lokr_{role}": role for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    config_problems=_config_problems,
    shapes=_shapes,
    delta=_delta,
)
