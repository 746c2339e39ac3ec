"""AdaLoRA: LoRA in the form of a singular value decomposition (Zhang et al. 2023, arXiv:2303.10512).

``y = f(x) + s B (E * A) x`` with ``lora_A`` (rank, in), ``lora_E`` (rank, 1), ``lora_B`` (out, rank). The rank is
``init_r``, less what training pruned: ``rank_pattern`` marks what is left of each module.
``s = lora_alpha / (init_r + 1e-5)``; PEFT divides by the rank before pruning, and puts the rank after pruning in the
place of an alpha that is not positive. Its ``r``, ``use_rslora`` and ``alpha_pattern`` have no effect here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapter_router.adapters.base_spec import Shape
from adapter_router.adapters.delta import ModuleDelta
from adapter_router.adapters.tuners.tuner import Target, Tuner, Weights

_INIT_R = 12
_MAX_RANK = 4096
_SUFFIX = ".lora_E"


def _config_problems(document: Mapping[str, Any]) -> list[str]:
    problems = []
    rank = document.get("init_r", _INIT_R)
    if not _is_rank(rank):
        problems.append(f"init_r is {rank!r:.80}, must be an integer from 1 to {_MAX_RANK}")
    pattern = document.get("rank_pattern")
    if pattern is not None and not isinstance(pattern, dict):
        return [*problems, f"rank_pattern is {pattern!r:.80}, must be an object or null"]
    return problems + [
        f"rank_pattern[{key!r:.200}] must be a list of {rank!r:.80} booleans and end in {_SUFFIX}"
        for key, kept in (pattern or {}).items()
        if not key.endswith(_SUFFIX) or not _is_mask(kept, rank)
    ]


def _is_rank(rank: object) -> bool:
    return type(rank) is int and 1 <= rank <= _MAX_RANK


def _is_mask(kept: Any, length: object) -> bool:
    return isinstance(kept, list) and len(kept) == length and all(type(entry) is bool for entry in kept)


def _initial_rank(target: Target) -> int:
    rank: int = target.config.document.get("init_r", _INIT_R)
    return rank if _is_rank(rank) else _INIT_R


def _rank(target: Target) -> int:
    pattern = target.config.document.get("rank_pattern")
    kept: Any = pattern.get(target.path + _SUFFIX) if isinstance(pattern, dict) else None
    initial = _initial_rank(target)
    return sum(kept) if _is_mask(kept, initial) else initial


def _shapes(target: Target, _present: Mapping[str, Shape]) -> dict[str, Shape]:
    rank = _rank(target)
    return {"a": (rank, target.spec.in_features), "b": (target.spec.out_features, rank), "e": (rank, 1)}


def _delta(target: Target, tensors: Mapping[str, torch.Tensor], _weights: Weights) -> ModuleDelta:
    rank = _rank(target)
    if rank == 0:
        return ModuleDelta()
    alpha = target.config.alpha_of(target.path)
    scaling = (alpha if alpha > 0 else rank) / (_initial_rank(target) + 1e-5)
    return ModuleDelta(tensors["a"].float() * tensors["e"].float(), tensors["b"].float(), scaling)


TUNER = Tuner(
    served=frozenset({"init_r", "lora_alpha", "rank_pattern"}),
    harmless=frozenset(
        {
            "alpha_pattern",
            "beta1",
            "beta2",
            "corda_config",
            "deltaT",
            "eva_config",
            "init_lora_weights",
            "lora_dropout",
            "lora_ga_config",
            "megatron_config",
            "megatron_core",
            "orth_reg_weight",
            "qalora_group_size",
            "r",
            "runtime_config",
            "target_r",
            "tfinal",
            "tinit",
            "total_step",
            "use_rslora",
        }
    ),
    kinds=frozenset({"linear"}),
    roles={"lora_A": "a", "lora_B": "b", "lora_E": "e"},
    config_problems=_config_problems,
    shapes=_shapes,
    delta=_delta,
)
