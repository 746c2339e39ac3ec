"""One engine, many adapters of different kinds on its base, and how its answers compare with PEFT alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRejected
from adapter_router.types import Row, RowResult, TaskKind
from tests.parity.bases import ARCHITECTURES, Base
from tests.parity.build import RECIPES, Adapter, build
from tests.parity.configs import generator
from tests.parity.oracle import Features, random_inputs, rounding, run, run_exactly

TOLERANCE = 2e-4
LEAST_EFFECT = 1e-2
SEEDS = range(5)
PER_BASE = int(os.environ.get("PARITY_PER_BASE", "15"))
"""Adapters on one base of one seed; 100 is every recipe there is."""


def weights_of(model: torch.nn.Module) -> dict[str, bytes]:
    """Every weight, byte for byte."""
    return {
        name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
        if tensor.dim()
    }


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Fails when the base's weights are not bit for bit what they were."""
    before = weights_of(model)
    yield
    after = weights_of(model)
    assert [name for name in before if before[name] != after.get(name)] == []


def start(base: Base, dtype: str = "float32") -> Engine:
    return Engine(EngineConfig(base=str(base.directory), device="cpu", dtype=dtype))


def recipes_for(base: Base) -> Iterator[str]:
    """All recipes in an order of this architecture and task; each seed starts at another fifth."""
    names = sorted(RECIPES)
    generator(base.architecture.name, base.task).shuffle(names)
    first = base.seed * len(names) // len(SEEDS)
    yield from names[first:] + names[:first]


def adapters_on(base: Base, root: Path, names: Iterable[str] | None = None) -> list[Adapter]:
    """Adapters that have a meaning on ``base``, of the recipes ``names`` or of this seed's share."""
    # There is one architecture of this kind, and recipes for it alone.
    limit = PER_BASE * (2 if base.task == "seq2seq-generation" else 1)
    adapters: list[Adapter] = []
    for name in names or recipes_for(base):
        adapter = build(base, RECIPES[name], root / f"{base.task}-{name}")
        if adapter is not None:
            adapters.append(adapter)
        if len(adapters) == limit:
            break
    return adapters


def row_of(adapter: Adapter | None, base: Base, features: Features) -> Row:
    parameters = {"pooling": "none"} if base.task == "embedding" else {}
    if adapter is None:
        return Row(features, None, task=base.task, parameters=parameters)
    return Row(features, adapter.task_and_name, parameters=parameters)


def close(logits: np.ndarray, expected: np.ndarray) -> bool:
    """Within the tolerance, relative to the largest logit where that is above 1."""
    if logits.shape != expected.shape:
        return False
    return bool(np.abs(logits - expected).max() <= TOLERANCE * max(1.0, float(np.abs(expected).max())))


@dataclass
class World:
    """``refused``: adapters that the engine would not load, by name, with its reasons. ``problems``: what is wrong.

    ``effects``: by how much an adapter moved logits, its head apart.
    """

    engine: Engine
    rng: Random
    adapters: list[Adapter] = field(default_factory=list)
    refused: dict[str, Sequence[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    effects: dict[str, float] = field(default_factory=dict)

    def load(self, adapters: Iterable[Adapter]) -> None:
        for adapter in adapters:
            try:
                report = self.engine.load_adapter(adapter.task_and_name, adapter.directory, task=adapter.task)
            except AdapterRejected as error:
                self.refused[adapter.name] = error.problems
                continue
            if report.version.task != adapter.site.base.task:
                self.problems.append(f"{adapter.task_and_name} was taken for {report.version.task}")
            self.adapters.append(adapter)

    def check(self, bases: Sequence[Base], share: float = 1.0) -> None:
        """One batch: every row another adapter, in random order, bare rows where a base has a trained head."""
        chosen: list[Adapter | Base] = self.rng.sample(self.adapters, math.ceil(share * len(self.adapters)))
        chosen += [base for base in bases if base.trained_head]
        self.rng.shuffle(chosen)
        rows, inputs = [], []
        for who in chosen:
            adapter = who if isinstance(who, Adapter) else None
            base = who.site.base if isinstance(who, Adapter) else who
            planted = adapter.planted if adapter and (share == 1.0 or self.rng.random() < 0.5) else ()
            inputs.append(random_inputs(base, self.rng, planted))
            rows.append(row_of(adapter, base, inputs[-1]))
        for who, row, features, result in zip(chosen, rows, inputs, self.engine.infer(rows), strict=True):
            self._compare(who, row, features, result)

    def check_effects(self) -> None:
        """An adapter that changes nothing is no test; by chance a lone logit may stand still in a row or two."""
        for adapter in self.adapters:
            for _ in range(5):
                if self.effects[adapter.task_and_name] >= LEAST_EFFECT or not adapter.recipe.changes:
                    break
                features = random_inputs(adapter.site.base, self.rng, adapter.planted)
                self._note_effect(adapter, features, adapter.logits(features))
            else:
                self.problems.append(f"{adapter.task_and_name}: no test, it changes nothing")

    def _note_effect(self, adapter: Adapter, features: Features, right: np.ndarray) -> None:
        if self.effects.get(adapter.task_and_name, 0.0) < LEAST_EFFECT:
            self.effects[adapter.task_and_name] = float(np.abs(right - adapter.without(features)).max())

    def _compare(self, who: Adapter | Base, row: Row, features: Features, result: object) -> None:
        """With PEFT alone, or, where its own float32 rounding is what differs, with its answer in float64."""
        name = row.adapter or f"bare {row.task}"
        base = who.site.base if isinstance(who, Adapter) else who
        model = who.alone if isinstance(who, Adapter) else who.pristine(who.labels)
        right = run(model, [features], base.task)[0]
        if isinstance(who, Adapter):
            self._note_effect(who, features, right)
        if not isinstance(result, RowResult):
            self.problems.append(f"{name}: {type(result).__name__}: {result}")
        elif result.logits.shape != right.shape:
            self.problems.append(f"{name}: shape {result.logits.shape}, PEFT alone {right.shape}")
        elif not close(result.logits, right):
            exact = run_exactly(model, features, base.task)
            ours, theirs = np.abs(result.logits - exact).max(), rounding(model, features, base.task, exact)
            if not (close(result.logits, exact) or ours <= 2 * theirs):
                self.problems.append(f"{name}: off by {ours:.2g} of {np.abs(right).max():.3g}, PEFT by {theirs:.2g}")


def make_base(architecture: str, task: TaskKind, seed: int, root: Path) -> Base:
    return Base(ARCHITECTURES[architecture], task, seed, root / "base")
