"""What a merge did, and how far its result is from the weighted sum of the adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from adapter_router.merging.loading import LoadedPart
from adapter_router.merging.modules import MergedLayer
from adapter_router.merging.peft_directory import MergedAdapter
from adapter_router.merging.request import MergeRequest
from adapter_router.merging.weight_change import total_norm
from adapter_router.types import TaskKind

_DISTORTED = 0.05  # of the sum's size: worth a warning
_CANCELLED = 1e-4  # of the parts' sizes: what is left of less is rounding
_MOST_LINES = 12


@dataclass(frozen=True)
class LayerError:
    """One module: ``rank`` of the result, ``size`` ||dW|| of the exact sum, ``distance`` ||dW' - dW|| of the two.

    ``summed``: sum_i |w_i| ||dW_i||, what the sum would measure if nothing cancelled.
    """

    path: str
    rank: int
    size: float
    distance: float
    summed: float

    @property
    def error(self) -> float:
        """The distance in sizes of the sum; infinite where there is nothing to sum and the result is not nothing."""
        return _relative([self])


@dataclass(frozen=True)
class MergeReport:
    """``out`` None: a dry run. ``digest``: of the result's files, ``sha256:…``. ``provenance``: as in its metadata."""

    out: str | None
    digest: str
    provenance: Mapping[str, Any]
    layers: tuple[LayerError, ...]
    saved: tuple[str, ...]
    labels: tuple[str, ...]
    num_bytes: int
    warnings: tuple[str, ...]

    @property
    def error(self) -> float:
        """||dW' - dW|| / ||dW|| of all modules together."""
        return _relative(self.layers)

    def document(self) -> dict[str, Any]:
        """For machines; an infinite error is null."""
        return {
            "merged": True,
            "out": self.out,
            "digest": self.digest,
            **self.provenance,
            "saved_modules": list(self.saved),
            "labels": list(self.labels),
            "bytes": self.num_bytes,
            "relative_error": _number(self.error),
            "layers": [
                {"path": layer.path, "rank": layer.rank, "size": layer.size, "relative_error": _number(layer.error)}
                for layer in self.layers
            ],
            "warnings": list(self.warnings),
        }

    def lines(self) -> list[str]:
        """For people; the first line is the verdict."""
        kind, parents = self.provenance["type"], self.provenance["parents"]
        sums = " + ".join(f"{parent['weight']:g} {parent['name']}" for parent in parents)
        where = f"written to {self.out}" if self.out else "dry run, nothing written"
        ranks = ", ".join(str(rank) for rank in sorted({layer.rank for layer in self.layers}))
        return [
            f"OK {sums} merged by {kind}: {where}",
            f"  version {self.digest}, {self.num_bytes} bytes",
            f"  {len(self.layers)} modules, ranks {ranks}; saved modules: {', '.join(self.saved) or 'none'}",
            f"  off the exact weighted sum by {self.error:.2g} of its size",
            *self._worst_lines(),
            *(f"  warning: {warning}" for warning in self.warnings),
        ]

    def _worst_lines(self) -> list[str]:
        worst = sorted(self.layers, key=lambda layer: layer.error, reverse=True)
        lines = [
            "  error     rank  module",
            *(f"  {e.error:<8.2g}  {e.rank:4d}  {e.path}" for e in worst[:_MOST_LINES]),
        ]
        return lines + [f"  and {len(worst) - _MOST_LINES} modules with less"] * (len(worst) > _MOST_LINES)


def assemble(
    adapter: MergedAdapter, merged: Sequence[MergedLayer], digest: str, warnings: Sequence[str], *, exact_by_cat: bool
) -> MergeReport:
    """The report of a dry run. ``exact_by_cat``: whether ``cat`` would take the parts."""
    layers = tuple(
        LayerError(layer.path, layer.a.shape[0], layer.size, layer.distance, layer.summed) for layer in merged
    )
    tensors = [t for module in adapter.delta.modules.values() for t in module.tensors().values()]
    tensors += [t for module in adapter.delta.saved.values() for t in module.values()]
    distorted = _distortion(adapter.provenance["type"], layers, exact_by_cat=exact_by_cat)
    return MergeReport(
        out=None,
        digest=digest,
        provenance=adapter.provenance,
        layers=layers,
        saved=tuple(sorted(adapter.delta.saved)),
        labels=adapter.head.labels,
        num_bytes=sum(t.numel() * t.itemsize for t in tensors),
        warnings=(*distorted, *warnings),
    )


def provenance(
    request: MergeRequest, parts: Sequence[LoadedPart], rank: int, task: TaskKind, fingerprint: str
) -> dict[str, Any]:
    """What the result's metadata says of where it comes from; ``fingerprint``: the base's."""
    combination = request.combination
    return {
        "adapter_router": version("adapter-router"),
        "type": request.type,
        "parents": [{"name": part.name, "weight": part.weight, "digest": part.digest} for part in parts],
        "rank": rank if combination.cuts_rank else None,
        "density": request.density,
        "sign": (request.sign or "total") if combination.elects else None,
        "seed": request.seed if combination.drops == "random" else None,
        "head": str(request.head),
        "task": task,
        "base_fingerprint": fingerprint,
    }


def _distortion(kind: str, layers: Sequence[LayerError], *, exact_by_cat: bool) -> list[str]:
    """A warning where the result is another adapter than the sum."""
    distorted = [layer for layer in layers if layer.error > _DISTORTED]
    if not distorted:
        return []
    worst = max(distorted, key=lambda layer: layer.error)
    return [
        f"{kind} is {_relative(layers):.0%} off the weighted sum, {worst.error:.0%} at {worst.path}: test the result, "
        f"or {_advice(kind, exact_by_cat=exact_by_cat)}"
    ]


def _advice(kind: str, *, exact_by_cat: bool) -> str:
    """How to come nearer to the sum."""
    if kind == "cat":
        return "choose weights whose products float32 can hold"
    ways = ["raise --rank" if kind == "svd" else ""] + ["merge by cat, which is exact"] * exact_by_cat
    return ", or ".join(filter(None, ways)) or "merge by svd, and raise --rank until it is near enough"


def _relative(layers: Sequence[LayerError]) -> float:
    """Of all modules together; what the parts' changes leave of each other is no less than rounding."""
    distance = total_norm([layer.distance for layer in layers])
    size = total_norm([layer.size for layer in layers])
    size = max(size, _CANCELLED * total_norm([layer.summed for layer in layers]))
    return distance / size if size else math.inf if distance else 0.0


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
