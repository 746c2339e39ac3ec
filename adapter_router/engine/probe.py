"""Which modules of a base can carry an adapter per row: found by watching one small forward pass.

A module that is handed something else than one entry per row (position tables, flattened batches), answers with more
than a tensor, or whose weights are used without calling it, would get adapters wrong or ignore them in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_ROWS, _TOKENS = 3, 5  # unlike each other, and unlike any leading dimension a model adds by itself


def rowwise_modules(model: nn.Module, features: tuple[str, ...], device: torch.device) -> frozenset[str]:
    """Paths of the modules that map (rows, …) to (rows, …) every time they are called, and are called at all."""
    verdicts: dict[str, bool] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
            verdicts[path] = verdicts.get(path, True) and _has_rows(given) and _has_rows(output)

        return hook

    hooks = [module.register_forward_hook(watch(path), with_kwargs=True) for path, module in model.named_modules()]
    try:
        with torch.inference_mode():
            model(**{name: torch.ones(_ROWS, _TOKENS, dtype=torch.long, device=device) for name in features})
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(path for path, rowwise in verdicts.items() if rowwise)


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == _ROWS
