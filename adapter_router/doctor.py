"""``adapter-router doctor``: what would happen if an adapter were loaded, and how to mend what is wrong with it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from adapter_router.catalog.location import resolve
from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRejected
from adapter_router.types import LoadReport, Row, RowOutcome, RowResult

_NAME, _NEIGHBOUR = "adapter", "neighbour"
_CANARY_ROWS = 8
_CANARY_TOLERANCE = 1e-4  # of the largest logit, at least of 1
_WEIGHTS = "adapter_model.safetensors"
# What a neighbour must not change: copies of the base, counters, and one of two factors, whose signs would cancel.
_KEPT = ("base_layer", "original_module", "ranknum", "lora_A", "lora_embedding_A", "hada_w1", "lokr_w1", "vera_")


@dataclass(frozen=True)
class Diagnosis:
    """``problems`` empty: the adapter can be served. ``canary``: largest difference alone against mixed, if run."""

    directory: str
    base: str
    problems: tuple[str, ...]
    report: LoadReport | None
    canary: float | None = None

    def document(self) -> dict[str, Any]:
        """For machines."""
        report = asdict(self.report) if self.report else None
        if report is not None:
            report["version"]["directory"] = None  # a private copy that is gone by now
        return {
            "directory": self.directory,
            "base": self.base,
            "healthy": not self.problems,
            "problems": list(self.problems),
            "report": report,
            "canary_max_difference": self.canary,
        }

    def lines(self) -> list[str]:
        """For people; the first line is the verdict."""
        if self.problems:
            count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
            lines = [f"REFUSED {self.directory}: {count}", *(f"  - {problem}" for problem in self.problems)]
        else:
            lines = [f"OK {self.directory} can be served on {self.base}"]
        if self.report is not None:
            lines += _report_lines(self.report)
        if self.canary is not None:
            lines.append(f"  canary: alone and beside a neighbour its rows differ by {self.canary:.1e} at most")
        return lines


def diagnose(directory: str, base: str, *, canary: bool = False) -> Diagnosis:
    """Load ``directory`` on ``base`` in this process, on the CPU.

    ``canary``: also run rows alone and mixed with those of a neighbour. Raises ValueError or OSError when the base
    cannot be had.
    """
    with Engine(EngineConfig(base=base, device="cpu")) as engine:
        try:
            report = engine.load_adapter(_NAME, directory)
            if not canary:
                return Diagnosis(directory, base, (), report)
            worst, problems = _canary(engine, directory)
        except AdapterRejected as error:
            return Diagnosis(directory, base, error.problems, None)
        return Diagnosis(directory, base, problems, report, worst)


def _report_lines(report: LoadReport) -> list[str]:
    version = report.version
    labels = f", {len(version.labels)} labels" if version.labels else ""
    ranks = f"; ranks {', '.join(map(str, report.ranks))}" if report.ranks else ""
    return [
        f"  task {version.task}{labels}, version {version.digest}",
        f"  {report.tensors_applied} tensors applied to {len(report.modules)} modules{ranks}; "
        f"{report.num_bytes} bytes on the device",
        "  size of the change  module",
        *(f"  {size:18.4g}  {path}" for path, size in report.norms.items()),
        *(f"  warning: {warning}" for warning in report.warnings),
    ]


def _canary(engine: Engine, directory: str) -> tuple[float, tuple[str, ...]]:
    """Largest difference of the adapter's rows alone and each beside a neighbour's, and what went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        engine.load_adapter(_NEIGHBOUR, _neighbour(Path(resolve(directory)), Path(scratch) / "neighbour"))
    inputs = [encoded.features for encoded in engine.base.encoder.samples(_CANARY_ROWS, None)]
    rows = [Row(features, _NAME) for features in inputs]
    alone = [engine.infer([row])[0] for row in rows]
    mixed = engine.infer(
        [row for features, own in zip(inputs, rows, strict=True) for row in (own, Row(features, _NEIGHBOUR))]
    )
    faults = [f"canary: {outcome}" for outcome in (*alone, *mixed) if not isinstance(outcome, RowResult)]
    if faults:
        return float("inf"), tuple(dict.fromkeys(faults))
    worst, scale = _difference(alone, mixed[::2])
    right = _CANARY_TOLERANCE * max(1.0, scale)
    return worst, () if worst <= right else (f"canary: alone and mixed differ by {worst:.1e}, more than {right:.1e}",)


def _neighbour(directory: Path, target: Path) -> Path:
    """An adapter of the same shape that does the opposite."""
    shutil.copytree(directory, target)
    tensors = load_file(target / _WEIGHTS)
    changed = {name: t if any(kept in name for kept in _KEPT) else -t for name, t in tensors.items()}
    save_file(changed, target / _WEIGHTS, metadata={"format": "pt"})
    return target


def _difference(alone: Sequence[RowOutcome], mixed: Sequence[RowOutcome]) -> tuple[float, float]:
    """Largest difference, and largest logit."""
    pairs = [(a, b) for a, b in zip(alone, mixed, strict=True) if isinstance(a, RowResult) and isinstance(b, RowResult)]
    worst = max(float(np.abs(a.logits - b.logits).max()) for a, b in pairs)
    return worst, max(float(np.abs(a.logits).max()) for a, _ in pairs)
