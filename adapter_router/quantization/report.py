"""What ``adapter-router quantize`` says of the base it wrote."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapter_router.quantization.bits import KEPT_BITS
from adapter_router.quantization.initial_adapter import INITIAL_ADAPTER

_ADVICE = "try fewer iterations or more bits"


@dataclass(frozen=True)
class LayerReport:
    """One linear layer. Errors are Frobenius norms: ||W - Q|| of plain rounding, ||W - (Q + B A)|| as written.

    ``rank`` None: the adapter does not change it.
    """

    module: str
    bits: int
    rank: int | None
    bytes_before: int
    bytes_after: int
    plain_error: float
    error: float

    def line(self) -> str:
        errors = "" if self.bits == KEPT_BITS else f"  error {self.plain_error:.4g} -> {self.error:.4g}"
        rank = "" if self.rank is None else f"  rank {self.rank}"
        return f"{self.module}: {self.bits} bits{rank}{errors}"


@dataclass(frozen=True)
class Report:
    """What was written. ``worse``: layers where plain rounding alone would have been nearer to the weight."""

    directory: str
    fingerprint: str
    layers: tuple[LayerReport, ...]

    @property
    def worse(self) -> tuple[str, ...]:
        return tuple(layer.module for layer in self.layers if layer.rank and layer.error > layer.plain_error)

    def lines(self) -> list[str]:
        """For people."""
        document, worse = self.document(), self.worse
        return [
            f"written {self.directory}: {len(self.layers)} linear layers, {document['bytes_after']} bytes instead of "
            f"{document['bytes_before']}",
            f"train {document['initial_adapter']} on it; fingerprint {self.fingerprint}",
            *(
                f"warning: {len(worse)} layers would be nearer without LoftQ, e.g. {name}: {_ADVICE}"
                for name in worse[:1]
            ),
        ]

    def document(self) -> dict[str, Any]:
        """For machines."""
        return {
            "directory": self.directory,
            "initial_adapter": str(Path(self.directory) / INITIAL_ADAPTER),
            "base_fingerprint": self.fingerprint,
            "bytes_before": sum(layer.bytes_before for layer in self.layers),
            "bytes_after": sum(layer.bytes_after for layer in self.layers),
            "worse_than_plain": list(self.worse),
            "layers": [asdict(layer) for layer in self.layers],
        }
