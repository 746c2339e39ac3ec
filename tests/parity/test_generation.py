"""Rows of different prompts and adapters generate together what PEFT alone generates for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.bases import ARCHITECTURES
from tests.parity.proofs import in_generation


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gemma3", "mixtral", "t5"])
def test_tokens_equal_peft_alone(architecture: str, seed: int, tmp_path: Path) -> None:
    assert in_generation(architecture, ARCHITECTURES[architecture].tasks[0], seed, tmp_path) == []
