"""A converted adapter -> its form on the device, in host memory still."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn

from adapter_router.adapters.adapter_tensors import AdapterTensors
from adapter_router.adapters.delta import AdapterDelta, ModuleDelta, ParameterDelta
from adapter_router.engine.base_model import BaseModel, PreparedTask
from adapter_router.engine.reading import Loaded
from adapter_router.engine.resident import ChangedModule, DeviceDelta, Head, ResidentAdapter
from adapter_router.engine.transfer import HOST
from adapter_router.errors import AdapterRejected


def place(digest: str, loaded: Loaded, base: BaseModel) -> ResidentAdapter:
    """Copy what ``loaded`` changes into the layout that a forward reads, and let the modules it acts on be grouped."""
    adapter, delta = loaded.tensors, loaded.converted.delta
    prepared = base.task(adapter.task)
    heads = _heads(adapter, delta, prepared)
    attention = {path for path in delta.modules if _kind(prepared, path) == "attention"}
    deltas = {
        path: DeviceDelta.of(
            module,
            HOST,
            transposed=_kind(prepared, path) in ("linear", "embedding"),
            folded=base.dtype == torch.float32,
        )
        for path, module in delta.modules.items()
        if path not in attention
    }
    _check_reach(deltas, heads)
    touched = {*deltas, *heads}
    mixing = {path for path in touched if path not in prepared.watched.rows or path == prepared.spec.backbone}
    if mixing and adapter.invocation:
        raise AdapterRejected.because(["alora_invocation_tokens act where this base does not keep rows apart"])
    around = {_keeper(path, prepared) for path in mixing}
    isolated = {path for path in around if path is not None}
    for path in touched | isolated:
        base.group(adapter.task, path)
    return ResidentAdapter(
        digest=digest,
        task=adapter.task,
        deltas={base.plan_path(adapter.task, path): d for path, d in deltas.items()},
        heads={base.plan_path(adapter.task, path): head for path, head in heads.items()},
        num_labels=adapter.num_labels,
        num_bytes=loaded.num_bytes,
        max_rank=max((d.rank for d in deltas.values()), default=0),
        isolated=frozenset(base.plan_path(adapter.task, path) for path in isolated),
        solo=None in around,
        caches=any(hasattr(m, "layer_idx") for h in heads.values() if isinstance(h, nn.Module) for m in h.modules()),
        invocation=adapter.invocation,
        parts=loaded.parts,
    )


def _check_reach(deltas: Iterable[str], heads: Collection[str]) -> None:
    """What runs in a module's place runs as it is: nothing else can act there or inside it."""
    unreached = [
        f"{path} cannot be changed: {head} runs as a whole, with changes of its own"
        for path in (*deltas, *heads)
        for head in heads
        if path.startswith(head + ".") or (path == head and path in deltas)
    ]
    if unreached:
        raise AdapterRejected.because(unreached)


def _keeper(path: str, prepared: PreparedTask) -> str | None:
    """The smallest module around ``path`` that keeps rows apart; None where only the whole model does."""
    while path:
        path = path.rpartition(".")[0]
        if path in prepared.watched.rows and path != prepared.spec.backbone:
            return path
    return None


def _kind(prepared: PreparedTask, path: str) -> str | None:
    spec = prepared.spec.targets.get(path)
    return spec.kind if spec else None


def _heads(adapter: AdapterTensors, delta: AdapterDelta, prepared: PreparedTask) -> dict[str, Head]:
    model = prepared.model
    heads: dict[str, Head] = {
        path: model.build_head(path, parameters, adapter.num_labels, HOST) for path, parameters in delta.saved.items()
    }
    for path, changes in delta.parameters.items():
        heads[path] = ChangedModule(model.model.get_submodule(path), changes)
    for path, module in delta.modules.items():
        if _kind(prepared, path) == "attention":
            heads[path] = ChangedModule(model.model.get_submodule(path), attention_changes(module))
    return heads


def attention_changes(delta: ModuleDelta) -> dict[str, ParameterDelta]:
    """LoRA of ``nn.MultiheadAttention``: of its joint input projection, and of its output projection.

    PEFT adds the second twice (peft 0.21, ``MultiheadAttention.merge``), when it trains and ever after.
    """
    assert delta.a is not None and delta.b is not None and delta.a2 is not None and delta.b2 is not None
    return {
        "in_proj_weight": ParameterDelta(delta.a, delta.b, delta.scaling),
        "out_proj.weight": ParameterDelta(delta.a2, delta.b2, 2 * delta.scaling),
    }
