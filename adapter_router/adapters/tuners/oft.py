"""OFT: an orthogonal map of a module's input (Qiu et al. 2023, arXiv:2306.07280; 2025, arXiv:2506.19847).

``y = f(R^T x)`` with R block-diagonal, blocks of ``oft_block_size`` features or ``r`` of them, hence
``D = W (R - I)^T``. ``oft_R.weight`` (blocks, size (size - 1) / 2), or (1, …) where all blocks share it, is the
upper triangle of skew-symmetric matrices Q, row by row, and each block R the Cayley transform
``(I - Q) (I + Q)^-1``, or its Neumann series in -Q, cut off: ``I + 2 Q + … + 2 Q^(n-2) + Q^(n-1)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from adapter_router.adapters.base_spec import Shape
from adapter_router.adapters.delta import ModuleDelta
from adapter_router.adapters.tuners.tuner import Target, Tuner, Weights

_FLAGS = {"coft": False, "block_share": False, "use_cayley_neumann": True}
_TERMS = 5
_EPS = 6e-5
_MAX_FEATURES = 1_000_000
_MAX_TERMS = 64
_MAX_EPS = 1e9
_NEUMANN_CHANGED = (0, 18)


def _config_problems(document: Mapping[str, Any]) -> list[str]:
    problems = _size_problems(document)
    for name, default in _FLAGS.items():
        flag = document.get(name, default)
        if type(flag) is not bool:
            problems.append(f"{name} is {flag!r:.80}, must be true or false")
    terms = document.get("num_cayley_neumann_terms", _TERMS)
    if type(terms) is not int or not 1 <= terms <= _MAX_TERMS:
        problems.append(f"num_cayley_neumann_terms is {terms!r:.80}, must be an integer from 1 to {_MAX_TERMS}")
    eps = document.get("eps", _EPS)
    if type(eps) not in (int, float) or not 0 <= eps <= _MAX_EPS:
        problems.append(f"eps is {eps!r:.80}, must be a number from 0 to {_MAX_EPS:g}")
    if document.get("use_cayley_neumann", True) is True and not _knows_series(document.get("peft_version")):
        problems.append(
            "use_cayley_neumann has another series before PEFT 0.18, and peft_version does not say it is newer; "
            "train the adapter again"
        )
    return problems


def _size_problems(document: Mapping[str, Any]) -> list[str]:
    if "oft_block_size" not in document:
        return ["oft_block_size is missing, as before PEFT 0.14, whose OFT was another; train the adapter again"]
    sizes = {"r": document.get("r", 0), "oft_block_size": document["oft_block_size"]}
    problems = [
        f"{name} is {size!r:.80}, must be an integer from 0 to {_MAX_FEATURES}"
        for name, size in sizes.items()
        if type(size) is not int or not 0 <= size <= _MAX_FEATURES
    ]
    if not problems and (sizes["r"] == 0) == (sizes["oft_block_size"] == 0):
        problems.append("one of r and oft_block_size must be 0 and the other must not")
    return problems


def _knows_series(version: object) -> bool:
    found = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) >= _NEUMANN_CHANGED


def _nearest_divisor(features: int, wanted: int) -> int:
    """The divisor of ``features`` nearest to ``wanted``, the smaller of two equally near."""
    if wanted >= features:
        return features
    lower = next(divisor for divisor in range(wanted, 0, -1) if features % divisor == 0)
    higher = next(divisor for divisor in range(wanted, features + 1) if features % divisor == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _block_size(target: Target) -> int:
    features, blocks = target.spec.in_features, target.config.document.get("r", 0)
    if blocks:
        return features // _nearest_divisor(features, blocks)
    return _nearest_divisor(features, target.config.document["oft_block_size"])


def _shapes(target: Target, _present: Mapping[str, Shape]) -> dict[str, Shape]:
    if target.spec.transposed or _size_problems(target.config.document):  # PEFT has no OFT for transformers' Conv1D
        return {}
    size = _block_size(target)
    blocks = 1 if target.config.document.get("block_share", False) else target.spec.in_features // size
    return {"r": (blocks, size * (size - 1) // 2)}


def _skew(upper: torch.Tensor, size: int) -> torch.Tensor:
    matrices = upper.new_zeros(upper.shape[0], size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    matrices[:, rows, columns] = upper
    return matrices - matrices.transpose(1, 2)


def _constrained(skew: torch.Tensor, eps: float) -> torch.Tensor:
    """COFT: matrices no longer than ``eps``, shared among the blocks; longer ones are shortened."""
    longest = eps / skew.shape[0] ** 0.5
    norms = skew.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norms <= longest, skew, skew * (longest / norms))


def _cayley_less_identity(skew: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    less_identity: torch.Tensor = torch.linalg.solve(identity + skew, -2 * skew, left=False)
    return less_identity


def _neumann_less_identity(skew: torch.Tensor, terms: int) -> torch.Tensor:
    if terms == 1:
        return torch.zeros_like(skew)
    total, power = 2 * skew, skew
    if terms == 2:
        return total
    # PEFT computes three terms as if they were four.
    for _ in range(2, max(terms, 4) - 1):
        power = power @ skew
        total += 2 * power
    return total + power @ skew


def _rotation_less_identity(target: Target, upper: torch.Tensor) -> torch.Tensor:
    """``R - I`` (blocks, size, size) in float64: small rotations would drown in the identity."""
    document = target.config.document
    skew = _skew(upper.double(), _block_size(target))
    if document.get("coft", False):
        skew = _constrained(skew, document.get("eps", _EPS))
    if document.get("use_cayley_neumann", True):
        return _neumann_less_identity(skew, document.get("num_cayley_neumann_terms", _TERMS))
    return _cayley_less_identity(skew)


def _delta(target: Target, tensors: Mapping[str, torch.Tensor], weights: Weights) -> ModuleDelta:
    rotation = _rotation_less_identity(target, tensors["r"]).float()
    size = rotation.shape[-1]
    weight = weights.weight(target.base_path)
    blocks = weight.reshape(weight.shape[0], -1, size)
    shared = rotation.expand(blocks.shape[1], size, size)
    return ModuleDelta(dense=torch.einsum("onc,nkc->onk", blocks, shared).flatten(1))


TUNER = Tuner(
    served=frozenset({"r", "oft_block_size", *_FLAGS, "eps", "num_cayley_neumann_terms"}),
    harmless=frozenset({"init_weights", "module_dropout"}),
    kinds=frozenset({"linear"}),
    roles={"oft_R.weight": "r"},
    config_problems=_config_problems,
    shapes=_shapes,
    delta=_delta,
)
