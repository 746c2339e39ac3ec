"""Tensors that are missing or misshaped, and adapters of other bases."""

from __future__ import annotations

import torch

from tests.hostile.case import Case, untouched
from tests.hostile.roles import each_role
from tests.hostile.spoil import (
    INITIAL,
    PREFIX,
    changed,
    configured,
    cut,
    edited,
    empty,
    removed,
)

_QUERY = "bert.encoder.layer.0.attention.self.query"
_KEY = "bert.encoder.layer.0.attention.self.key"
_WORDS = "bert.embeddings.word_embeddings"
_POSITIONS = "bert.embeddings.position_embeddings"
_A, _B = f"{_QUERY}.lora_A.weight", f"{_QUERY}.lora_B.weight"
_NAN, _INF = float("nan"), float("inf")


def _many_labels(tensors: dict[str, torch.Tensor]) -> None:
    """Five million labels that take no bytes."""
    tensors[f"{PREFIX}classifier.weight"] = torch.zeros(5_000_000, 0)
    del tensors[f"{PREFIX}classifier.bias"]


def _large_head(tensors: dict[str, torch.Tensor]) -> None:
    """48 MiB in the file, twice as much on the device."""
    tensors[f"{PREFIX}classifier.weight"] = torch.ones(786_432, 32, dtype=torch.bfloat16)
    tensors[f"{PREFIX}classifier.bias"] = torch.ones(786_432, dtype=torch.bfloat16)


def _no_labels(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PREFIX}classifier.weight"] = torch.zeros(0, 32)
    tensors[f"{PREFIX}classifier.bias"] = torch.zeros(0)


def _without_first_experts(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "layers.0.mlp.experts." in key]:
        del tensors[key]


MISSING = (
    *each_role("no", removed),
    Case("no query at all", removed(_A, _B), (f"1 target module has no tensors: {_QUERY}",)),
    Case("no head", removed("classifier.weight", "classifier.bias"), ("classifier.weight",)),
    Case("no initial A", edited(lambda t: t.pop(PREFIX + _A), INITIAL), (_QUERY,), of="fast pissa"),
    Case("one bias of all", removed(f"{_KEY}.bias"), (_KEY,), of="all biases"),
    Case("no expert of one layer", edited(_without_first_experts), ("layers.0.mlp.experts",), of="experts"),
    Case("DoRA declared only", configured(use_dora=True), ("lora_magnitude_vector",)),
    Case("lora_bias declared only", configured(lora_bias=True), ("lora_B.bias",)),
    Case("all biases declared only", configured(bias="all"), ("bias",)),
    Case("biases of targets declared only", configured(bias="lora_only"), ("bias",)),
    Case("KaSA declared only", configured(kasa_config={"a": 1}), ("lora_diag",)),
    Case("DoRA no longer declared", configured(use_dora=False), ("lora_magnitude_vector",), of="dora"),
    Case("biases no longer declared", configured(bias="none"), ("bias",), of="all biases"),
)

MISSHAPED = (
    Case(
        "answers of three kinds",
        changed("qa_outputs.weight", lambda t: t[[0, 1, 1]]),
        ("qa_outputs.weight",),
        of="answers",
    ),
    *each_role("short", lambda ending: changed(ending, cut)),
    *each_role("empty", lambda ending: changed(ending, empty)),
    *each_role("flat", lambda ending: changed(ending, lambda t: t.reshape(1, -1, 1, 1, 1))),
    Case("short tied head", changed("lm_head.weight", cut), ("lm_head.weight",), of="tied head"),
    Case("short initial", changed(_A, cut, INITIAL), (_QUERY,), of="fast pissa"),
    Case("A transposed", changed(_A, lambda t: t.t()), (f"{_A} has shape [32, 8]",)),
    Case("B twice as tall", changed(_B, lambda t: t.repeat(2, 1)), (f"{_B} has shape [64, 8]",)),
    Case("IA3 turned round", changed("ia3_l", lambda t: t.t()), ("ia3_l",), of="ia3"),
    Case("head a number", changed("classifier.bias", lambda t: t[0]), ("classifier.bias has shape []",)),
    Case("head of two sizes", changed("classifier.bias", lambda t: t[:2]), ("disagree on the number of labels",)),
    Case("head of no labels", edited(_no_labels), ("the head has no labels",)),
    Case("head larger than the room for all", edited(_large_head), ("adapter_memory_bytes",)),
    Case("head of five million labels", edited(_many_labels), ("classifier.weight",)),
)

ELSEWHERE = (
    Case(
        "on a narrower base",
        untouched,
        ("has shape [8, 64], this base and config need [8, 32]",),
        "of a wider base",
        "bert",
    ),
    Case("on a shallower base", untouched, ("layer.3.attention.self.query",), "of a deeper base", "bert"),
    Case("on a base of fewer words", untouched, ("word_embeddings",), "of another vocabulary", "bert"),
    Case("of DistilBERT on BERT", untouched, ("q_lin",), "of distilbert", "bert"),
    Case("of Llama on GPT-2", untouched, ("q_proj",), "llama", "gpt2"),
    Case("of Mixtral's experts on Llama", untouched, ("mlp.experts",), "experts", "llama"),
    Case("of BERT on ViT", untouched, ("text-classification",), "plain", "vit"),
    Case("OLoRA of square transposed layers", untouched, ("OLoRA", "attn.c_proj"), "of transposed layers", "gpt2"),
    Case("of ViT on BERT", untouched, ("q_proj",), "vit", "bert"),
    Case("of GPT-2 on BERT", untouched, ("text-generation",), "gpt2", "bert"),
    Case("PiSSA of equal directions", untouched, (_QUERY, "initial/"), "identity pissa", "identity"),
    Case("KaSA of equal directions", untouched, (_QUERY,), "identity kasa", "identity"),
)

CASES = (*MISSING, *MISSHAPED, *ELSEWHERE)
