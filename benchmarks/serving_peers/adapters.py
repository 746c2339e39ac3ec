"""Adapters drawn by seed and saved by PEFT, and what PEFT alone answers with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adapter_router.catalog.location import resolve
from deployments.demo.tenants import BASE

NUM_LABELS = 8  # of every adapter: PEFT cannot hold heads of different sizes on one base
RANKS = (4, 8, 16, 32)


def name_of(index: int) -> str:
    """Of the adapter with that popularity rank, 0 for the most popular."""
    return f"tenant-{index:03}"


def write(folder: Path, count: int) -> dict[str, Path]:
    """``count`` classifiers on query and value, of ranks 4 to 32 in turns; directories by name."""
    base = AutoModelForSequenceClassification.from_pretrained(resolve(BASE), num_labels=NUM_LABELS)
    directories = {}
    for index in range(count):
        torch.manual_seed(index)
        torch.nn.init.normal_(base.classifier.weight, std=0.05)
        lora = LoraConfig(
            task_type="SEQ_CLS", r=RANKS[index % len(RANKS)], target_modules=["query", "value"], init_lora_weights=False
        )
        model = get_peft_model(base, lora)
        model.save_pretrained(folder / name_of(index))
        base = model.unload()
        directories[name_of(index)] = folder / name_of(index)
    return directories


def base_model() -> torch.nn.Module:
    """The base under an untrained head of the adapters' size, as PEFT wants it."""
    model: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(resolve(BASE), num_labels=NUM_LABELS)
    return model.eval()


def tokenizer() -> AutoTokenizer:
    """The base's own."""
    return AutoTokenizer.from_pretrained(resolve(BASE))


def solo_logits(directories: Mapping[str, Path], texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """What each adapter alone on a fresh base says to ``texts``, one at a time; (texts, labels) by name."""
    words = tokenizer()
    answers = {}
    for name, directory in directories.items():
        model = PeftModel.from_pretrained(base_model(), str(directory)).eval()
        with torch.inference_mode():
            logits = [model(**words([text], return_tensors="pt")).logits[0] for text in texts]
        answers[name] = torch.stack(logits).numpy()
    return answers
