"""A mix answers with the weighted sum of its adapters' changes, whatever kinds they are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapter_router.types import TaskKind
from tests.parity.mixing import in_mixes

_CASES: tuple[tuple[str, TaskKind], ...] = (
    ("bert", "text-classification"),
    ("distilbert", "token-classification"),
    ("vit", "image-classification"),
    ("gpt2", "text-generation"),
    ("mixtral", "text-generation"),
    ("llama", "embedding"),
)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("architecture", "task"), _CASES)
def test_a_mix_is_the_weighted_sum(architecture: str, task: TaskKind, seed: int, tmp_path: Path) -> None:
    compared, problems = in_mixes(architecture, task, seed, tmp_path)
    assert problems == []
    assert compared >= 8


def test_experts_are_summed_too(tmp_path: Path) -> None:
    names = ("experts-one", "experts-both", "experts-tandem", "plain")
    compared, problems = in_mixes("mixtral", "text-generation", 1, tmp_path, names)
    assert problems == []
    assert compared == 24
