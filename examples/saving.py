"""What the training scripts share: the optimiser loop, and adapter directories as this project ships them.

An adapter directory holds PEFT's own two files, with fp16 tensors and without the path of the machine that
trained it, and one file more that carries what PEFT drops: ``config.json`` with the label names of a head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

MINILM = "sentence-transformers/all-MiniLM-L6-v2"  # what adapters record of their base, in place of a path


def fit(model: torch.nn.Module, losses: Iterator[torch.Tensor], steps: int, peak_rate: float) -> None:
    """``steps`` steps of AdamW, with a one-cycle schedule, on what requires a gradient in ``model``.

    ``losses`` has no end and computes each loss only when asked, that is after the step before it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps, pct_start=0.15)
    model.train()
    for loss in islice(losses, steps):
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def save_adapter(model: PeftModel, out: Path, base_name: str) -> int:
    """Write PEFT's files for a base that its readers know as ``base_name``; return the bytes of the weights.

    ``model`` takes over the rounding to fp16, so that what is measured afterwards is what was written.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.half())
    model.save_pretrained(out)
    weights = out / "adapter_model.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base_name
    config["target_modules"] = sorted(config["target_modules"])
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "README.md").unlink(missing_ok=True)
    return weights.stat().st_size


def save_labels(out: Path, model_type: str, labels: list[str], **more: Any) -> None:
    """Write ``config.json``: the kind of model, the label names in the order of the head's outputs, and ``more``."""
    document = {
        "model_type": model_type,
        **more,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    (out / "config.json").write_text(json.dumps(document, indent=2) + "\n")
