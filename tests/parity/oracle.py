"""PEFT alone: one adapter on a fresh base, one row at a time, unpadded. And the inputs it is asked with."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from peft import PeftModel

from adapter_router.types import TaskKind
from tests.parity.bases import LONGEST, Base

Features = dict[str, np.ndarray]
FIRST_ID = 5
"""Ids below are special: padding, start, end, masks of the various tokenizers."""


def random_inputs(base: Base, rng: random.Random, planted: tuple[int, ...] = ()) -> Features:
    """Features of one row. ``planted``: a token sequence that the row must hold, once or twice."""
    draw = np.random.default_rng(rng.getrandbits(32))
    if base.architecture.is_vision:
        return {"pixel_values": draw.standard_normal((3, 16, 16)).astype(np.float32)}
    ids = draw.integers(FIRST_ID, base.sizes.vocab, int(draw.integers(len(planted) + 2, LONGEST + 1)))
    if planted:
        for _ in range(2):
            start = int(draw.integers(0, len(ids) - len(planted) + 1))
            ids[start : start + len(planted)] = planted
    features: Features = {"input_ids": ids}
    if rng.random() < 0.5:
        features["attention_mask"] = np.ones(len(ids), dtype=np.int64)
    if base.task == "seq2seq-generation":
        features["decoder_input_ids"] = draw.integers(FIRST_ID, base.sizes.vocab, int(draw.integers(1, LONGEST + 1)))
    return features


def as_batch(rows: list[Features]) -> dict[str, torch.Tensor]:
    """Rows of one length as tensors."""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def logits_of(output: Any, task: TaskKind) -> torch.Tensor:
    """What our engine calls ``logits``, rows first."""
    if task == "question-answering":
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.last_hidden_state if task == "embedding" else output.logits


def run(model: Any, rows: list[Features], task: TaskKind, dtype: torch.dtype = torch.float32) -> list[np.ndarray]:
    """Logits of ``rows``, which are of one length, through one model of type ``dtype``."""
    batch = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in as_batch(rows).items()
    }
    with torch.inference_mode():
        logits = logits_of(model(**batch), task)
    return list(logits.float().numpy())


def load_alone(base: Base, directory: Path, labels: int, dtype: torch.dtype = torch.float32) -> Any:
    """PEFT with this one adapter on a fresh base."""
    with exact_svd():
        return PeftModel.from_pretrained(base.fresh(labels, dtype), directory).eval()


@contextmanager
def exact_svd() -> Iterator[None]:
    """PEFT factorises the base in float32 to load PiSSA and KaSA, where singular values that lie close together cost
    it four digits: here it is given the float64 factors, rounded.
    """
    original = torch.linalg.svd

    def exact(matrix: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(part.to(matrix.dtype) for part in original(matrix.double(), *args, **kwargs))

    with mock.patch.object(torch.linalg, "svd", exact):
        yield


def run_exactly(model: Any, row: Features, task: TaskKind) -> np.ndarray:
    """The model in float64: what its float32 answer is a rounding of."""
    features = {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in row.items()}
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"  # torch multiplies stacks of experts in float32 at most
    with torch.inference_mode():
        logits: np.ndarray = logits_of(exact(**as_batch([features])), task)[0].numpy()
    return logits


def rounding(model: Any, row: Features, task: TaskKind, exact: np.ndarray) -> float:
    """How far from ``exact`` float32 takes the model itself: the largest error of six, all weights but the first time
    moved by about their last digit, which is what another order of sums does. Some random models magnify it
    a thousandfold.
    """
    draws = torch.Generator().manual_seed(0)
    errors = []
    for size in (0.0, *[torch.finfo(torch.float32).eps] * 5):
        single = copy.deepcopy(model).float()
        with torch.no_grad():
            for weight in single.parameters():
                weight.mul_(1 + size * torch.randn(weight.shape, generator=draws))
        errors += [float(np.abs(answer - exact).max()) for answer in run(single, [row], task)]
    return max(errors)


def greedy(model: Any, features: Mapping[str, np.ndarray], max_new_tokens: int) -> tuple[int, ...]:
    """Tokens that one row generates, without its prompt and its end token."""
    batch = {name: torch.from_numpy(array)[None] for name, array in features.items() if name != "decoder_input_ids"}
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    config = model.config
    with torch.inference_mode():
        tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)[0].tolist()
    tokens = tokens[1:] if config.is_encoder_decoder else tokens[batch["input_ids"].shape[1] :]
    return tuple(tokens[: tokens.index(config.eos_token_id)] if config.eos_token_id in tokens else tokens)
