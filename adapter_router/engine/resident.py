"""One adapter on the device, ready for the grouped forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from adapter_router.adapters.delta import ModuleDelta, ParameterDelta
from adapter_router.types import TaskKind

Head = Callable[..., Any]
"""What runs in a base module's place for one adapter's rows."""

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class DeviceDelta:
    """Device form of a ``ModuleDelta``, float32.

    ``a`` (in, rank) and ``b`` (rank, out) of a linear layer, contiguous; of an embedding ``a`` (vocabulary, rank); of a
    convolution its two kernels. ``dense`` (in, out). ``scaling`` is 1 where it has been folded into ``b``.
    ``token_ids`` ascend.
    """

    rank: int = 0
    scaling: float = 1.0
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    active_shift: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    token_rows: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is low-rank and nothing else."""
        rest = (self.dense, self.gain, self.shift, self.active_shift, self.input_scale, self.token_ids)
        return all(tensor is None for tensor in rest)

    def mapped(self, change: Change) -> DeviceDelta:
        """``change`` of every tensor."""
        values: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        changed: dict[str, Any] = {n: change(v) if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        return DeviceDelta(**changed)

    @classmethod
    def of(cls, delta: ModuleDelta, device: torch.device, *, transposed: bool, folded: bool) -> DeviceDelta:
        """``transposed``: factors of a linear layer; ``folded``: the scaling goes into ``b``."""

        def place(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, torch.float32).contiguous()

        def turned(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return place(tensor.to(device).t() if transposed and tensor is not None else tensor)

        def place_ids(ids: torch.Tensor | None) -> torch.Tensor | None:
            return None if ids is None else ids[order].to(device)

        order = slice(None) if delta.token_ids is None else delta.token_ids.argsort()
        b = turned(delta.b)
        scaling = 1.0 if folded or delta.b is None else delta.scaling
        if folded and b is not None:
            b = b * delta.scaling
        return cls(
            rank=delta.rank,
            scaling=scaling,
            a=turned(delta.a),
            b=b,
            dense=None if delta.dense is None else place(delta.dense.t()),
            gain=place(delta.gain),
            shift=place(delta.shift),
            active_shift=place(delta.active_shift),
            input_scale=place(delta.input_scale),
            token_ids=place_ids(delta.token_ids),
            token_rows=place(None if delta.token_rows is None else delta.token_rows[order]),
        )


class ChangedModule:
    """The base's own module with some parameters changed, for kinds of modules that no formula of ours covers.

    The changed parameters exist only while it runs.
    """

    def __init__(self, module: nn.Module, deltas: Mapping[str, ParameterDelta]) -> None:
        """``deltas`` by the parameters' names inside ``module``, on its device."""
        self._module = module
        self._deltas = deltas

    def mapped(self, change: Change) -> ChangedModule:
        """``change`` of every tensor that is not the base's."""
        deltas = {name: replace(d, a=change(d.a), b=change(d.b)) for name, d in self._deltas.items()}
        return ChangedModule(self._module, deltas)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameters = dict(self._module.named_parameters())
        changed = {
            name: (parameters[name].float() + delta.dense()).to(parameters[name].dtype)
            for name, delta in self._deltas.items()
        }
        result: Any = functional_call(self._module, changed, args, kwargs)
        return result


@dataclass(frozen=True)
class ResidentAdapter:
    """``deltas`` and ``heads`` by the path of the base module they act on; a head runs in the module's place.

    ``isolated``: modules that must run its rows apart from others', because inside them rows cannot be told apart;
    ``solo``: no module can, so that its rows run in a batch of their own.
    ``caches``: a head of it writes to the KV cache. ``invocation``: tokens from which on it is active.
    ``parts``: of a mix, the digests of its adapters. ``arrived``: on CUDA, when its copy to the device is complete.
    """

    digest: str
    task: TaskKind
    deltas: Mapping[str, DeviceDelta]
    heads: Mapping[str, Head]
    num_labels: int
    num_bytes: int
    max_rank: int
    isolated: frozenset[str] = frozenset()
    solo: bool = False
    caches: bool = False
    invocation: tuple[int, ...] = ()
    parts: frozenset[str] = frozenset()
    arrived: torch.cuda.Event | None = None

    def mapped(self, change: Change) -> ResidentAdapter:
        """``change`` of every tensor. Heads are changed in place: nobody may use this one any more."""
        deltas = {path: delta.mapped(change) for path, delta in self.deltas.items()}
        return replace(self, deltas=deltas, heads={path: _mapped(head, change) for path, head in self.heads.items()})


def _mapped(head: Head, change: Change) -> Head:
    if isinstance(head, ChangedModule):
        return head.mapped(change)
    assert isinstance(head, nn.Module)
    changed: nn.Module = head._apply(change)  # type: ignore[no-untyped-call]
    return changed
