"""The written directory, admitted as any other: what comes back must be what was meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from adapter_router.adapters.delta import AdapterDelta, ModuleDelta
from adapter_router.adapters.keys import listed
from adapter_router.catalog.store import ContentStore
from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.reading import Reader
from adapter_router.errors import AdapterRejected, InternalError
from adapter_router.merging.loading import LoadedPart, load
from adapter_router.merging.peft_directory import MergedAdapter
from adapter_router.merging.request import Part

_ROUNDING = 1e-5  # of a shift that was stored as part of the base's bias
_Saved = Mapping[str, Mapping[str, torch.Tensor]]


def check_read_back(
    adapter: MergedAdapter, directory: Path, store: ContentStore, base: BaseModel
) -> tuple[str, tuple[str, ...]]:
    """The digest of ``directory`` and the warnings of its admission.

    Raises AdapterRejected when it is refused, InternalError when it says something else than ``adapter``.
    """
    try:
        found = load(Part("the result", str(directory), 1.0), store, Reader(base), None)
    except AdapterRejected as error:
        raise AdapterRejected.because([f"the result: {problem}" for problem in error.problems]) from error
    wrong = [*_differences(adapter.delta, found.delta, base, adapter), *_other_settings(adapter, found)]
    if wrong:
        raise InternalError(f"the merged files do not say what they should: {listed(wrong)}")
    return found.digest, found.warnings


def _differences(meant: AdapterDelta, found: AdapterDelta, base: BaseModel, adapter: MergedAdapter) -> list[str]:
    weights = base.task(adapter.task).weights
    names = meant.modules.keys() ^ found.modules.keys()
    wrong = [path for path in sorted(names) if not _is_rounding(meant, found, path)]
    for path in meant.modules.keys() & found.modules.keys():
        own = weights.bias(path)
        if not _same(meant.modules[path], found.modules[path], 0.0 if own is None else float(own.abs().max())):
            wrong.append(path)
    if not _same_saved(meant.saved, found.saved):
        wrong.append("saved modules")
    return [*wrong, *found.parameters]


def _is_rounding(meant: AdapterDelta, found: AdapterDelta, path: str) -> bool:
    """Whether a module that only one side has is a shift lost in the rounding of the bias it was added to."""
    delta = meant.modules.get(path) or found.modules[path]
    return delta.a is None and delta.shift is not None and float(delta.shift.abs().max()) < _ROUNDING


def _same(meant: ModuleDelta, found: ModuleDelta, bias: float) -> bool:
    if found.scaling != meant.scaling and meant.a is not None:
        return False
    if not (_equal(meant.a, found.a) and _equal(meant.b, found.b)) or {*found.tensors()} - {"a", "b", "shift"}:
        return False
    none = torch.zeros(1)
    left, right = (none if delta.shift is None else delta.shift for delta in (meant, found))
    return bool(torch.all((left - right).abs() <= _ROUNDING * (bias + left.abs())))


def _equal(meant: torch.Tensor | None, found: torch.Tensor | None) -> bool:
    if meant is None or found is None:
        return meant is found
    return torch.equal(meant, found)


def _same_saved(meant: _Saved, found: _Saved) -> bool:
    left, right = (
        {(path, name): tensor for path, module in saved.items() for name, tensor in module.items()}
        for saved in (meant, found)
    )
    return left.keys() == right.keys() and all(torch.equal(tensor, right[key]) for key, tensor in left.items())


def _other_settings(adapter: MergedAdapter, found: LoadedPart) -> list[str]:
    tensors, head = found.tensors, adapter.head
    pairs = {
        "task": (tensors.task, adapter.task),
        "labels": (tensors.labels, head.labels),
        "activation": (tensors.activation, head.activation),
        "embedding": (tensors.embedding, head.embedding),
        "base_fingerprint": (tensors.base_fingerprint, adapter.base_fingerprint),
    }
    return [name for name, (left, right) in pairs.items() if left != right]
