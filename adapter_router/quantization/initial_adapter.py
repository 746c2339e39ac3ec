"""The adapter that training on a LoftQ base starts from: PEFT's two files, and the base it belongs to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

INITIAL_ADAPTER = "initial_adapter"  # the directory inside the base's
_TASK_TYPES = {  # those that make PEFT save no modules beside LoRA
    "text-generation": "CAUSAL_LM",
    "seq2seq-generation": "SEQ_2_SEQ_LM",
    "embedding": "FEATURE_EXTRACTION",
}


@dataclass(frozen=True)
class InitialAdapter:
    """``factors``: A (rank, in) and B (out, rank) by the module's path inside the backbone; the scaling is 1.

    ``backbone``: what the model that PEFT trains calls its backbone; "" where it is nothing else. ``transposed``: its
    layers store their weight as (in, out).
    """

    base: str
    fingerprint: str
    task: str
    backbone: str
    rank: int
    transposed: bool
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    def write(self, directory: Path) -> None:
        """Write the PEFT directory."""
        directory.mkdir()
        inside = f"base_model.model.{self.backbone}." if self.backbone else "base_model.model."
        tensors = {}
        for path, (a, b) in self.factors.items():
            tensors[f"{inside}{path}.lora_A.weight"] = a.contiguous()
            tensors[f"{inside}{path}.lora_B.weight"] = b.contiguous()
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(self._config(), indent=2, sort_keys=True)
        (directory / "adapter_config.json").write_text(text + "\n")

    def _config(self) -> dict[str, object]:
        return {
            "base_model_name_or_path": self.base,
            # The one free field that PEFT hands on when the adapter is trained and saved again.
            "revision": self.fingerprint,
            "bias": "none",
            "fan_in_fan_out": self.transposed,
            "inference_mode": False,
            "init_lora_weights": True,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": sorted(self.factors),
            "task_type": _TASK_TYPES.get(self.task),
        }


def untouched_factors(
    shape: tuple[int, int], rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's ordinary start for a weight (out, in) that is not rounded: A as ``nn.Linear``'s own, B zero."""
    bound = 1 / math.sqrt(shape[1])  # kaiming_uniform_ with a = sqrt(5)
    a = torch.empty(rank, shape[1]).uniform_(-bound, bound, generator=generator)
    return a, torch.zeros(shape[0], rank)
