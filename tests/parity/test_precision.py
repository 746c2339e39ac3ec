"""On 16-bit bases a row's logits equal PEFT alone's to the last bit: LoRA in float32, rounded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.bases import ARCHITECTURES
from tests.parity.proofs import to_the_last_bit


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert", "vit", "llama", "gpt2", "qwen3"])
def test_plain_lora_equals_peft_alone_bit_for_bit(architecture: str, dtype: str, tmp_path: Path) -> None:
    assert to_the_last_bit(architecture, ARCHITECTURES[architecture].tasks[0], dtype, tmp_path) == []
