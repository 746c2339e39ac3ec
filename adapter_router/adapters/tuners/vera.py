"""VeRA: two vectors per module around shared random projections (Kopiczko et al. 2023, arXiv:2310.11454).

``y = f(x) + b * (B (d * (A x)))`` with ``vera_lambda_d`` d (rank,) and ``vera_lambda_b`` b (out,) of the module, and
of the adapter ``vera_A`` A (rank, >= in) and ``vera_B`` B (>= out, rank), cut to the module's features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapter_router.adapters.base_spec import Shape
from adapter_router.adapters.delta import ModuleDelta
from adapter_router.adapters.tuners.tuner import Target, Tuner, Weights

_R = 256
_MAX_RANK = 4096


def _is_rank(rank: object) -> bool:
    return type(rank) is int and 1 <= rank <= _MAX_RANK


def _config_problems(document: Mapping[str, Any]) -> list[str]:
    problems = []
    rank = document.get("r", _R)
    if not _is_rank(rank):
        problems.append(f"r is {rank!r:.80}, must be an integer from 1 to {_MAX_RANK}")
    saved = document.get("save_projection", True)
    if saved is False:
        # PEFT draws them again at the largest shape of all targets, with a generator that torch may change.
        problems.append(
            "save_projection=false leaves the shared projections out of the file; load the adapter with PEFT, add its "
            "base_model.vera_A and base_model.vera_B to the file and set save_projection to true"
        )
    elif saved is not True:
        problems.append(f"save_projection is {saved!r:.80}, must be true")
    return problems


def _shapes(target: Target, present: Mapping[str, Shape]) -> dict[str, Shape]:
    spec = target.spec
    rank = target.config.document.get("r", _R)
    rank = rank if _is_rank(rank) else _R
    # The projections are as large as the largest target needs.
    columns = max(spec.in_features, _extent(present.get("vera_A"), 1))
    rows = max(spec.out_features, _extent(present.get("vera_B"), 0))
    return {"d": (rank,), "b": (spec.out_features,), "vera_A": (rank, columns), "vera_B": (rows, rank)}


def _extent(shape: Shape | None, axis: int) -> int:
    return shape[axis] if shape is not None and len(shape) == 2 else 0


def _delta(target: Target, tensors: Mapping[str, torch.Tensor], _weights: Weights) -> ModuleDelta:
    a = tensors["vera_A"][:, : target.spec.in_features].float()
    b = tensors["vera_B"][: target.spec.out_features].float()
    return ModuleDelta(tensors["d"].float()[:, None] * a, tensors["b"].float()[:, None] * b)


TUNER = Tuner(
    served=frozenset({"r", "save_projection"}),
    harmless=frozenset({"d_initial", "init_weights", "projection_prng_key", "vera_dropout"}),
    kinds=frozenset({"linear"}),
    roles={"vera_lambda_b": "b", "vera_lambda_d": "d"},
    config_problems=_config_problems,
    shapes=_shapes,
    delta=_delta,
    shared=frozenset({"vera_A", "vera_B"}),
)
