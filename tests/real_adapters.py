"""Random adapters of the real base, saved by PEFT."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from adapter_router.catalog.location import resolve
from deployments.demo.tenants import BASE


def random_adapter(directory: Path, seed: int, num_labels: int = 3) -> Path:
    """A classifier of rank 8 whose weights follow from ``seed``; what lies in ``directory`` is overwritten."""
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(resolve(BASE), num_labels=num_labels)
    lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(directory)
    return directory
