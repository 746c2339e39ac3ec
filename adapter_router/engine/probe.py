"""What a base can do, found by watching small forward passes instead of trusting a list of architectures.

``rowwise_modules``: which modules can carry an adapter per row. A module that is handed something else than one entry
per row (position tables, flattened batches), answers with more than a tensor, or whose weights are used without
calling it, would get adapters wrong or ignore them in silence.

``padding_error``: how far a row's logits move when it is padded beside longer ones. Models whose layers see padding
(convolutions, Fourier mixing) cannot be batched exactly.

``zeros_are_default``: whether a feature given as zeros means the same as not given, so that rows with it and rows
without it may share a batch.
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


def padding_error(model: nn.Module, vocab_size: int, pad_token_id: int, device: torch.device) -> float:
    """Largest difference of any logit between rows alone and padded in one batch, relative to the largest logit."""
    lengths = (4, 7, 11)
    rows = [_tokens(length, vocab_size, pad_token_id, device) for length in lengths]
    ids = torch.full((len(rows), max(lengths)), pad_token_id, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    with torch.inference_mode():
        alone = torch.cat([model(input_ids=row[None]).logits for row in rows]).float()
        together = model(input_ids=ids, attention_mask=mask).logits.float()
    return float((together - alone).abs().max() / alone.abs().max().clamp(min=1e-6))


def zeros_are_default(model: nn.Module, feature: str, vocab_size: int, pad_token_id: int, device: torch.device) -> bool:
    """Whether ``feature`` given as zeros changes nothing."""
    ids = _tokens(_TOKENS, vocab_size, pad_token_id, device)[None]
    with torch.inference_mode():
        without = model(input_ids=ids).logits
        zeros = model(input_ids=ids, **{feature: torch.zeros_like(ids)}).logits
    return torch.equal(without, zeros)


def _tokens(length: int, vocab_size: int, pad_token_id: int, device: torch.device) -> torch.Tensor:
    """Token ids all over the vocabulary, none of them padding."""
    ids = (torch.arange(1, length + 1, device=device) * 7919) % vocab_size
    return torch.where(ids == pad_token_id, (ids + 1) % vocab_size, ids)


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == _ROWS
