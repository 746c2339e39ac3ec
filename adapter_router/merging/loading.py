"""The adapters to merge, admitted exactly as for serving, and what of them no merge can take."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, replace

from adapter_router.adapters.adapter_config import AdapterConfig, parse_adapter_config
from adapter_router.adapters.adapter_tensors import AdapterTensors
from adapter_router.adapters.base_spec import BaseSpec
from adapter_router.adapters.convert import idle_modules, norms
from adapter_router.adapters.delta import AdapterDelta, ModuleDelta
from adapter_router.adapters.keys import listed
from adapter_router.adapters.validate import Request
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.engine.reading import Reader
from adapter_router.errors import AdapterRejected, AdapterUnavailable
from adapter_router.merging.request import Part
from adapter_router.types import TaskKind

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class WriteFailed(OSError):
    """A place that a merge writes to cannot be written: no fault of the base's or of an adapter's."""


@dataclass(frozen=True)
class LoadedPart:
    """A part on the host: ``delta`` without modules that it leaves as they are.

    ``rank``: the largest that its configuration or its tensors name, 0 where there is none.
    """

    name: str
    weight: float
    digest: str
    tensors: AdapterTensors
    delta: AdapterDelta
    rank: int
    base_name: str | None
    warnings: tuple[str, ...]


def load_parts(
    parts: tuple[Part, ...], store: ContentStore, reader: Reader, task: TaskKind | None
) -> tuple[list[LoadedPart], list[str]]:
    """The parts that can be served, and everything wrong with the others.

    Raises AdapterUnavailable when a private copy is lost, WriteFailed when there is no room for one.
    """
    loaded, problems = [], []
    for part in parts:
        try:
            loaded.append(load(part, store, reader, task))
        except AdapterRejected as error:
            problems += [f"{part.name}: {problem}" for problem in error.problems]
        except ValueError as error:
            problems.append(f"{part.name}: {error}")
    return loaded, problems


def load(part: Part, store: ContentStore, reader: Reader, task: TaskKind | None) -> LoadedPart:
    """Raises as ``load_parts``, AdapterRejected, and ValueError for the base's head."""
    stored = _admit(part, store)
    read = reader.read(stored.read(), Request(task))
    config, _ = parse_adapter_config((stored.directory / "adapter_config.json").read_bytes())
    assert config is not None  # else it would have been refused
    name = config.document.get("base_model_name_or_path")
    delta = without_idle(read.converted.delta)
    return LoadedPart(
        name=part.name,
        weight=part.weight,
        digest=stored.digest,
        tensors=read.tensors,
        delta=delta,
        rank=max(_declared_rank(config), *(module.rank for module in delta.modules.values()), 0),
        base_name=name if isinstance(name, str) else None,
        warnings=(*read.converted.warnings, *idle_modules(norms(delta))),
    )


def _admit(part: Part, store: ContentStore) -> StoredAdapter:
    try:
        return store.admit(part.directory)
    except AdapterUnavailable as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _DISK_FULL:  # no fault of the adapter's
            raise WriteFailed(cause.errno, cause.strerror, str(store.root)) from error
        raise


def without_idle(delta: AdapterDelta) -> AdapterDelta:
    """``delta`` less shifts of nothing, of which ``bias="all"`` files are full, and modules that are then empty."""
    modules = {path: _without_idle_shift(module) for path, module in delta.modules.items()}
    return replace(delta, modules={path: module for path, module in modules.items() if module.tensors()})


def _without_idle_shift(delta: ModuleDelta) -> ModuleDelta:
    idle = delta.shift is not None and not delta.shift.any()
    return replace(delta, shift=None) if idle else delta


def _declared_rank(config: AdapterConfig) -> int:
    """PEFT takes the configuration's ranks for a merge's, whether or not a module has them."""
    return max(config.r, *config.rank_pattern.values(), 0) if config.peft_type == "LORA" else 0


def unmergeable(part: LoadedPart, spec: BaseSpec) -> list[str]:
    """What of ``part`` no merge can take, by name."""
    found = {
        "experts or other parameters (target_parameters)": list(part.delta.parameters),
        "replaced token rows (trainable_token_indices)": _where(part.delta.modules, "token_ids"),
        "scaled inputs (IA3)": _where(part.delta.modules, "input_scale"),
        "LoRA of nn.MultiheadAttention": _where(part.delta.modules, "a2"),
        "LoRA of a convolution in groups": [
            path
            for path, delta in part.delta.modules.items()
            if path in spec.targets and spec.targets[path].groups > 1 and delta.tensors().keys() - {"shift"}
        ],
    }
    problems = [f"{part.name}: {kind} cannot be merged: {listed(paths)}" for kind, paths in found.items() if paths]
    if part.tensors.invocation:
        problems.append(f"{part.name}: it acts from an invocation on (aLoRA); a merged adapter acts on all tokens")
    return problems


def _where(modules: Mapping[str, ModuleDelta], field: str) -> list[str]:
    return [path for path, delta in modules.items() if getattr(delta, field) is not None]
