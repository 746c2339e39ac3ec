"""What a base can do, found by watching small forward passes instead of trusting a list of architectures.

``watch_modules``: which modules are called, and which of their arguments have entries for each row. A module that is
handed something else than rows (position tables), or whose answer for one row depends on another, cannot carry several
adapters at once.

``padding_error``: how far a row's output moves when it is padded beside longer ones. Models whose layers see padding
(convolutions, Fourier mixing) cannot be batched exactly.

``zeros_are_default``: whether a feature given as zeros means the same as not given, so that rows with it and rows
without it may share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from adapter_router.quantization.weights import INNER

Batch = dict[str, torch.Tensor]
_FEW, _MORE = 3, 5  # unlike each other, and unlike any leading dimension a model adds by itself
_CHANGED = 1  # the row that differs between two otherwise equal batches


class _Bounds(Protocol):
    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


@dataclass(frozen=True)
class RowArguments:
    """Which positional and named arguments of a module have entries for each row."""

    positions: frozenset[int]
    names: frozenset[str]

    def select(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], segments: Sequence[_Bounds], num_rows: int
    ) -> tuple[list[Any], dict[str, Any]]:
        """Those rows' arguments; everything else is passed on."""

        def cut(value: torch.Tensor) -> torch.Tensor:
            per_row = value.shape[0] // num_rows
            pieces = [value[s.start * per_row : s.stop * per_row] for s in segments]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        def own(value: Any, has_rows: bool) -> Any:
            return cut(value) if has_rows and isinstance(value, torch.Tensor) else value

        chosen = [own(value, index in self.positions) for index, value in enumerate(args)]
        return chosen, {name: own(value, name in self.names) for name, value in kwargs.items()}


@dataclass(frozen=True)
class WatchedModules:
    """``called``: paths of modules that a forward calls. ``rows``: of those that keep rows apart, their arguments."""

    called: frozenset[str]
    rows: Mapping[str, RowArguments]


@dataclass(frozen=True)
class _Call:
    """Tensors that one call was given, by position or name, and those of its answer if it has no others."""

    given: Mapping[int | str, torch.Tensor]
    answer: Sequence[torch.Tensor]


def watch_modules(model: nn.Module, batch: Callable[[int], Batch], run: Callable[[Batch], Any]) -> WatchedModules:
    """Run ``model`` on three small batches; ``batch(n)`` makes one of n rows, ``run`` runs it.

    A module keeps rows apart when the leading dimensions of its answer and of an argument grow with the number of
    rows, every time, and changing one row changes that row's part alone.
    """
    few, more = batch(_FEW), batch(_MORE)
    other = {name: tensor[:_FEW].clone() for name, tensor in few.items()}
    for name, tensor in other.items():
        tensor[_CHANGED] = more[name][_FEW + 1]
    records = [_record(model, features, run) for features in (few, more, other)]
    rows = {}
    for path, calls in records[0].items():
        triples = list(zip(calls, records[1].get(path, []), records[2].get(path, []), strict=False))
        arguments = [_row_arguments(*triple) for triple in triples]
        whole = len(calls) == len(triples) and all(arguments) and len(set(arguments)) == 1
        if whole and arguments[0] is not None:
            rows[path] = arguments[0]
    return WatchedModules(frozenset(records[0]), rows)


def padding_error(alone: Sequence[torch.Tensor], together: Sequence[torch.Tensor]) -> float:
    """Largest difference between rows' outputs alone and in one padded batch, relative to the largest output."""
    scale = max(float(output.abs().max()) for output in alone)
    worst = max(float((one - other).abs().max()) for one, other in zip(alone, together, strict=True))
    return worst / max(scale, 1e-6)


def zeros_are_default(run: Callable[[Batch], torch.Tensor], batch: Batch, feature: str) -> bool:
    """Whether ``feature`` given as zeros changes nothing."""
    given = {**batch, feature: torch.zeros_like(batch["input_ids"])}
    without = {name: tensor for name, tensor in batch.items() if name != feature}
    return torch.equal(run(without), run(given))


def _record(model: nn.Module, features: Batch, run: Callable[[Batch], Any]) -> dict[str, list[_Call]]:
    calls: dict[str, list[_Call]] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:
            values: dict[int | str, Any] = dict(enumerate(args))
            values.update(kwargs)
            given = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
            calls.setdefault(path, []).append(_Call(given, [part.clone() for part in answer_tensors(answer) or []]))

        return hook

    # Parts of a quantised weight give the whole weight as their answer, and nobody adapts them.
    watched = [(path, module) for path, module in model.named_modules() if INNER not in path.split(".")]
    hooks = [module.register_forward_hook(watch(path), with_kwargs=True) for path, module in watched]
    try:
        with torch.inference_mode():
            run(features)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _row_arguments(few: _Call, more: _Call, other: _Call) -> RowArguments | None:
    answers = list(zip(few.answer, more.answer, other.answer, strict=False))
    if not answers or not all(_grows(a, b) and _keeps_rows_apart(a, c) for a, b, c in answers):
        return None
    growing = {key for key, value in few.given.items() if key in more.given and _grows(value, more.given[key])}
    first = next(iter(few.given), None)
    if first not in growing or not _keeps_rows_apart(few.given[first], other.given[first]):
        return None
    return RowArguments(
        frozenset(key for key in growing if isinstance(key, int)),
        frozenset(key for key in growing if isinstance(key, str)),
    )


def answer_tensors(answer: Any) -> list[torch.Tensor] | None:
    """The tensors of a module's answer: one, or a tuple's; None for any other kind of answer."""
    if isinstance(answer, torch.Tensor):
        return [answer]
    plain = type(answer) is tuple and all(part is None or isinstance(part, torch.Tensor) for part in answer)
    return [part for part in answer if part is not None] if plain else None


def _grows(few: torch.Tensor, more: torch.Tensor) -> bool:
    """Whether a leading dimension is a fixed number of entries for each row."""
    if few.dim() < 2 or few.dim() != more.dim():
        return False
    return few.shape[0] % _FEW == 0 and few.shape[0] // _FEW * _MORE == more.shape[0]


def _keeps_rows_apart(few: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether changing one row changed nothing but that row's entries."""
    if few.shape != other.shape:
        return False
    per_row = few.shape[0] // _FEW
    untouched = [index for index in range(few.shape[0]) if index // per_row != _CHANGED]
    return torch.allclose(few[untouched].float(), other[untouched].float(), rtol=1e-4, atol=1e-5, equal_nan=True)
