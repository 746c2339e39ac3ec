"""Every row of a mixed batch equals PEFT alone, whatever its adapter is; the base stays as it was, bit for bit."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest

from adapter_router.types import TaskKind
from tests.parity.bases import ARCHITECTURES
from tests.parity.build import RECIPES, build
from tests.parity.proofs import compared, in_mixed_batches
from tests.parity.results import HEAD_ROW, RESULTS
from tests.parity.table import PEERS
from tests.parity.world import SEEDS, adapters_on, make_base

CASES = [(name, task) for name, entry in ARCHITECTURES.items() for task in entry.tasks]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("architecture", "task"), CASES)
def test_each_row_equals_peft_alone(architecture: str, task: TaskKind, seed: int, tmp_path: Path) -> None:
    world, problems = in_mixed_batches(architecture, task, seed, tmp_path)
    RESULTS.add(architecture, task, seed, world)
    assert problems == []


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert", "llama"])
def test_rows_of_different_tasks_share_a_batch(architecture: str, tmp_path: Path) -> None:
    first, *others = ARCHITECTURES[architecture].tasks
    base = make_base(architecture, first, 0, tmp_path)
    bases = [base, *(base.sharing(task) for task in others)]
    names = ("plain", "dora", "save-norm", "rank-pattern")
    adapters = [adapter for each in bases for adapter in adapters_on(each, tmp_path, names)]
    world, problems = compared(bases, adapters, 0)
    assert problems == []
    assert len(world.adapters) == len(bases) * len(names)


def test_every_recipe_has_a_base(tmp_path: Path) -> None:
    """No recipe is dead: each gives an adapter on at least one of these."""
    left = set(RECIPES)
    cases: tuple[tuple[str, TaskKind, int], ...] = (
        ("bert", "text-classification", 1),
        ("vit", "image-classification", 1),
        ("mixtral", "text-generation", 0),
        ("qwen2", "text-generation", 0),
        ("llama", "embedding", 0),
        ("t5", "seq2seq-generation", 0),
    )
    for architecture, task, seed in cases:
        base = make_base(architecture, task, seed, tmp_path / architecture)
        left -= {name for name in left if build(base, RECIPES[name], tmp_path / architecture / name)}
    assert left == set()


def test_the_table_has_a_line_for_every_recipe() -> None:
    assert {recipe.row for recipe in RECIPES.values()} | {HEAD_ROW} == set(PEERS)


def test_enough_was_proven() -> None:
    """Runs last, over what this session ran: of a part of the cases it can say nothing."""
    if len(RESULTS.cases) < len(CASES) * len(SEEDS):
        pytest.skip("only a part of the cases was run")
    seeds = defaultdict(set)
    for (_, _, recipe), ran in RESULTS.runs.items():
        seeds[recipe] |= ran
    assert len({architecture for architecture, _, _ in RESULTS.runs}) >= 20
    assert len(RESULTS.runs) >= 1500
    assert set(seeds) == set(RECIPES)
    assert [name for name, ran in seeds.items() if len(ran) < 2] == []
    if path := os.environ.get("PARITY_JSON"):
        RESULTS.write(Path(path))
