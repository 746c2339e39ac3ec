"""A mix answers with the weighted sum of its adapters' changes, whatever kinds they are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapter_router.types import TaskKind
from tests.parity.bases import ARCHITECTURES
from tests.parity.mixing import in_mixes
from tests.parity.world import SEEDS

CASES = [(name, task) for name, entry in ARCHITECTURES.items() for task in entry.tasks]


@pytest.mark.parametrize(("architecture", "task"), CASES)
def test_a_mix_is_the_weighted_sum(architecture: str, task: TaskKind, tmp_path: Path) -> None:
    seed = CASES.index((architecture, task)) % len(SEEDS)
    compared, problems = in_mixes(architecture, task, seed, tmp_path)
    assert problems == []
    assert compared >= 5


def test_experts_are_summed_too(tmp_path: Path) -> None:
    names = ("experts-one", "experts-both", "experts-tandem", "plain")
    compared, problems = in_mixes("mixtral", "text-generation", 1, tmp_path, names)
    assert problems == []
    assert compared == 16
