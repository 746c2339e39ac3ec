"""LoHa: the Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2021, arXiv:2108.06098).

``y = f(x) + s ((w1_a w1_b) * (w2_a w2_b)) x``, ``s = alpha / rank``; ``hada_w1_a``, ``hada_w2_a`` (out, rank),
``hada_w1_b``, ``hada_w2_b`` (rank, in). The product is itself of rank rank^2: its factors are the products of every
column of ``w1_a`` with every column of ``w2_a``, and of the rows of ``w1_b`` and ``w2_b`` likewise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adapter_router.adapters.base_spec import Shape
from adapter_router.adapters.delta import ModuleDelta
from adapter_router.adapters.tuners.tuner import Target, Tuner, Weights


def _shapes(target: Target, _present: Mapping[str, Shape]) -> dict[str, Shape]:
    spec = target.spec
    if spec.transposed:  # PEFT has no LoHa for transformers' Conv1D
        return {}
    rank = target.config.rank_of(target.path)
    left, right = (spec.out_features, rank), (rank, spec.in_features)
    return {"w1_a": left, "w1_b": right, "w2_a": left, "w2_b": right}


def _delta(target: Target, tensors: Mapping[str, torch.Tensor], _weights: Weights) -> ModuleDelta:
    spec = target.spec
    w1_a, w1_b, w2_a, w2_b = (tensors[role].float() for role in ("w1_a", "w1_b", "w2_a", "w2_b"))
    rank = target.config.rank_of(target.path)
    scaling = target.config.alpha_of(target.path) / rank
    if rank**2 * (spec.in_features + spec.out_features) >= spec.in_features * spec.out_features:
        return ModuleDelta(dense=(w1_a @ w1_b) * (w2_a @ w2_b) * scaling)
    a = (w1_b[:, None] * w2_b[None]).flatten(0, 1)
    b = (w1_a[:, :, None] * w2_a[:, None]).flatten(1)
    return ModuleDelta(a, b, scaling)


TUNER = Tuner(
    served=frozenset({"alpha", "alpha_pattern", "r", "rank_pattern"}),
    # use_effective_conv2d changes convolutions only.
    harmless=frozenset({"init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d"}),
    kinds=frozenset({"linear"}),
    roles={"hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b"},
    config_problems=lambda _document: [],
    shapes=_shapes,
    delta=_delta,
)
