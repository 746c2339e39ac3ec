"""IA3: learned rescaling of a module's input or output (Liu et al. 2022, arXiv:2205.05638).

``y = f(l * x)`` of a module that ``feedforward_modules`` names, else ``y = l * f(x)``, bias included. ``ia3_l`` is
(1, in) or (out, 1) at a linear layer, (1, in, 1, 1) or (1, out, 1, 1) at a convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapter_router.adapters.base_spec import Shape
from adapter_router.adapters.delta import ModuleDelta
from adapter_router.adapters.patterns import Matcher
from adapter_router.adapters.tuners.tuner import Target, Tuner, Weights

_MAX_NAMES = 20_000
_MAX_NAME_LENGTH = 2000


def _config_problems(document: Mapping[str, Any]) -> list[str]:
    names = document.get("feedforward_modules")
    if isinstance(names, str) and len(names) <= _MAX_NAME_LENGTH:
        matcher = Matcher()
        matcher.names(names, "")
        return [f"feedforward_modules: {problem}" for problem in matcher.problems.values()]
    if not isinstance(names, list) or not _sane(names):
        return [
            f"feedforward_modules is {names!r:.80}, must be an expression or a list of module names, [] if there are "
            "none; where it is missing PEFT guesses by the model type"
        ]
    targets = document.get("target_modules")
    strange = [name for name in names if isinstance(targets, list) and name not in targets]
    return [f"feedforward_modules names {strange[:3]}, which target_modules does not"] if strange else []


def _sane(names: list[Any]) -> bool:
    named = all(isinstance(name, str) and 0 < len(name) <= _MAX_NAME_LENGTH for name in names)
    return named and len(names) <= _MAX_NAMES


def _scales_input(target: Target) -> bool:
    """PEFT matches these names as bare endings, without the dot that it asks of ``target_modules``."""
    names = target.config.document.get("feedforward_modules")
    if isinstance(names, str):
        return target.config.matcher.names(names, target.path)
    return isinstance(names, list) and any(isinstance(name, str) and target.path.endswith(name) for name in names)


def _shapes(target: Target, _present: Mapping[str, Shape]) -> dict[str, Shape]:
    spec = target.spec
    scales_input = _scales_input(target)
    features = spec.in_features if scales_input else spec.out_features
    if spec.kind == "linear":
        return {"l": (1, features) if scales_input else (features, 1)}
    return {"l": (1, features) + (1,) * len(spec.kernel)}


def _delta(target: Target, tensors: Mapping[str, torch.Tensor], _weights: Weights) -> ModuleDelta:
    scale = tensors["l"].float().flatten()
    return ModuleDelta(input_scale=scale) if _scales_input(target) else ModuleDelta(gain=scale)


TUNER = Tuner(
    served=frozenset({"feedforward_modules"}),
    harmless=frozenset({"init_ia3_weights"}),
    kinds=frozenset({"linear", "conv"}),
    roles={"ia3_l": "l"},
    config_problems=_config_problems,
    shapes=_shapes,
    delta=_delta,
)
