"""The proofs that the tests and the mutation run share; each gives a list of what is wrong, empty when all is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from adapter_router.types import Row, RowResult, TaskKind
from tests.parity.build import RECIPES, Adapter, build
from tests.parity.configs import generator
from tests.parity.expected import refused
from tests.parity.oracle import greedy, load_alone, random_inputs, run
from tests.parity.world import Base, World, adapters_on, make_base, row_of, start, unchanged

GENERATING = (
    "plain",
    "dora",
    "embedding",
    "activated",
    "activated-rslora",
    "save-lm-head",
    "save-embedding",
    "token-list",
    "bias-all",
    "pissa",
    "experts-both",
    "lm-head",
    "ia3",
)
_NEW_TOKENS = 7


def in_mixed_batches(
    architecture: str, task: TaskKind, seed: int, root: Path, names: Iterable[str] | None = None
) -> tuple[World, list[str]]:
    """Rows of one task; ``names``: recipes, by default this seed's share of them all."""
    base = make_base(architecture, task, seed, root)
    return compared([base], adapters_on(base, root, names), generator("rows", architecture, task, seed).getrandbits(32))


def compared(bases: Sequence[Base], adapters: Sequence[Adapter], seed: int) -> tuple[World, list[str]]:
    """Two batches over all ``adapters`` in one engine, which must leave the base as it was."""
    with start(bases[0]) as engine:
        world = World(engine, generator(seed))
        with unchanged(engine.base.model):
            world.load(adapters)
            world.check(bases)
            world.check(bases, share=0.5)
    world.check_effects()
    unexpected = [
        f"{name} refused: {'; '.join(why)}"
        for name, why in world.refused.items()
        if not refused(bases[0], RECIPES[name])
    ]
    return world, world.problems + unexpected


def in_generation(architecture: str, task: TaskKind, seed: int, root: Path) -> list[str]:
    """Prompts of different lengths, each adapter with and without what activates it."""
    base = make_base(architecture, task, seed, root)
    adapters = adapters_on(base, root, GENERATING)
    rng = generator("generation", architecture, seed)
    rows, expected = [], []
    for adapter in (*adapters, None):
        for planted in {adapter.planted if adapter else (), ()}:
            features = {"input_ids": random_inputs(base, rng, planted)["input_ids"]}
            rows.append(Row(features, adapter.name if adapter else None, parameters={"max_new_tokens": _NEW_TOKENS}))
            expected.append(greedy(adapter.alone if adapter else base.pristine(base.labels), features, _NEW_TOKENS))
    order = rng.sample(range(len(rows)), len(rows))
    with start(base) as engine, unchanged(engine.base.model):
        for adapter in adapters:
            engine.load_adapter(adapter.name, adapter.directory)
        events = {event.index: event for event in engine.generate([rows[index] for index in order])}
    problems = []
    for place, index in enumerate(order):
        event = events[place]
        if event.error is not None or event.token_ids != expected[index]:
            problems.append(f"{rows[index].adapter}: {event.error or event.token_ids}, alone {expected[index]}")
    if len(set(expected)) <= len(expected) // 2:
        problems.append("no test: most rows generate the same")
    return problems


def _within_an_ulp(result: RowResult, right: np.ndarray, dtype: str) -> bool:
    """Equal, or one unit in the last place apart: some CPUs add up a batched product in another order than a single."""
    unit = torch.finfo(getattr(torch, dtype)).eps * max(1.0, float(np.abs(right).max()))
    return bool(np.abs(result.logits - right).max() <= unit)


def to_the_last_bit(architecture: str, task: TaskKind, dtype: str, root: Path) -> list[str]:
    """Plain LoRA on a 16-bit base; rows of one length, so that PEFT alone can run the very same batch."""
    base = make_base(architecture, task, 1, root)
    recipes = [replace(RECIPES["plain"], name=f"plain-{index}") for index in range(3)]
    adapters = [adapter for recipe in recipes if (adapter := build(base, recipe, root / recipe.name))]
    rng = generator("precision", architecture)
    rows = [random_inputs(base, rng) for _ in range(8)]
    if "input_ids" in rows[0]:
        rows = [{"input_ids": np.resize(row["input_ids"], 7)} for row in rows]
    chosen = [rng.choice(adapters) for _ in rows]
    with start(base, dtype) as engine, unchanged(engine.base.model):
        for adapter in adapters:
            engine.load_adapter(f"{base.task}-{adapter.name}", adapter.directory, task=adapter.task)
        results = engine.infer([row_of(who, base, row) for who, row in zip(chosen, rows, strict=True)])
    problems = []
    for who in adapters:
        alone = load_alone(base, who.directory, who.site.labels, getattr(torch, dtype))
        for index, right in enumerate(run(alone, rows, base.task, getattr(torch, dtype))):
            result = results[index]
            if chosen[index] is who and not (isinstance(result, RowResult) and _within_an_ulp(result, right, dtype)):
                problems.append(f"row {index} of {who.name} differs")
    return problems
