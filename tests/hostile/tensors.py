"""Tensors that are sick, or not the adapter's to bring."""

from __future__ import annotations

import re

import torch

from tests.hostile.case import Case
from tests.hostile.roles import each_role
from tests.hostile.spoil import (
    INITIAL,
    PREFIX,
    added,
    both,
    changed,
    configured,
    cut,
    edited,
    filled,
    keys,
    renamed,
)

_QUERY = "bert.encoder.layer.0.attention.self.query"
_KEY = "bert.encoder.layer.0.attention.self.key"
_WORDS = "bert.embeddings.word_embeddings"
_POSITIONS = "bert.embeddings.position_embeddings"
_A, _B = f"{_QUERY}.lora_A.weight", f"{_QUERY}.lora_B.weight"
_NAN, _INF = float("nan"), float("inf")
_INSIDE = re.compile(r"\.(lora_|base_layer|token_adapter|trainable|ia3_l|modules_to_save|original_module)")


def _cast(ending: str, dtype: torch.dtype, name: str) -> Case:
    return Case(f"{name} {ending}", changed(ending, lambda t: t.to(dtype)), (f"{ending} has dtype {name}",))


def _foreign(name: str, *shape: int, of: str = "plain") -> Case:
    return Case(f"{name} of {of}", added({name: shape}), (_INSIDE.split(name)[0],), of)


def _two_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    """One magnitude under both of PEFT's names for it, once in half precision."""
    key = keys(tensors, "lora_magnitude_vector")[0]
    tensors[f"{key}.weight"] = tensors[key].half()


def _under_embedding_names(tensors: dict[str, torch.Tensor]) -> None:
    """LoRA of a linear layer under the names of an embedding's, which PEFT would not read."""
    tensors[f"{PREFIX}{_QUERY}.lora_embedding_A"] = tensors.pop(PREFIX + _A)
    tensors[f"{PREFIX}{_QUERY}.lora_embedding_B"] = tensors.pop(PREFIX + _B)


def _of_embedding_under_linear_names(tensors: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        key = keys(tensors, f"lora_embedding_{side}")[0]
        tensors[key.replace(f"lora_embedding_{side}", f"lora_{side}.weight")] = tensors.pop(key)


def _large_and_sick(tensors: dict[str, torch.Tensor]) -> None:
    """60 MiB, the last number of which is none."""
    tensors[f"{PREFIX}classifier.weight"] = filled(_NAN)(torch.zeros(491_520, 32))
    tensors[f"{PREFIX}classifier.bias"] = torch.zeros(491_520)


def _other_head(tensors: dict[str, torch.Tensor]) -> None:
    """The tied output layer with another weight than the embedding's."""
    tensors[f"{PREFIX}lm_head.weight"] = tensors[keys(tensors, "embed_tokens.weight")[0]] + 1


def _other_tied_lora(tensors: dict[str, torch.Tensor]) -> None:
    """The tied output layer's LoRA is not the embedding's turned round."""
    key = keys(tensors, "lm_head.lora_A.weight")[0]
    tensors[key] = tensors[key] + 1


SICK = (
    *each_role("NaN in", lambda ending: changed(ending, filled(_NAN))),
    Case("Inf", changed("classifier.bias", filled(-_INF)), ("classifier.bias holds NaN or infinite",)),
    Case("Inf of float16", changed(_A, lambda t: filled(_INF)(t.half())), (f"{_A} holds NaN or infinite",)),
    Case("NaN of bfloat16", changed(_B, lambda t: filled(_NAN)(t.bfloat16())), (f"{_B} holds NaN or infinite",)),
    Case("NaN in initial", changed(_A, filled(_NAN), INITIAL), ("initial: ", _A), of="fast pissa"),
    Case("NaN at the end of 60 MiB", edited(_large_and_sick), ("classifier.weight holds NaN",)),
    _cast(_A, torch.int8, "I8"),
    _cast(_B, torch.uint64, "U64"),
    _cast(_A, torch.bool, "BOOL"),
    _cast(_A, torch.complex64, "C64"),
    _cast(_A, torch.float8_e4m3fn, "F8_E4M3"),
    _cast(_A, torch.float8_e5m2, "F8_E5M2"),
    _cast("classifier.weight", torch.float64, "F64"),
)

FOREIGN = (
    _foreign(f"{_KEY}.weight", 32, 32),
    _foreign(f"{_QUERY}.weight", 32, 32),
    _foreign(f"{_QUERY}.base_layer.weight", 32, 32),
    _foreign("bert.encoder.layer.0.output.LayerNorm.weight", 32),
    _foreign(f"{_WORDS}.weight", 100, 32),
    _foreign("bert.pooler.dense.weight", 32, 32),
    _foreign(f"{_QUERY}.bias", 32),
    _foreign(f"{_QUERY}.base_layer.bias", 32),
    _foreign("bert.encoder.layer.0.output.LayerNorm.bias", 32),
    _foreign("bert.pooler.dense.base_layer.bias", 32, of="target biases"),
    _foreign("bert.encoder.layer.0.output.LayerNorm.bias", 32, of="target biases"),
    _foreign(f"{_QUERY}.lora_B.victim.weight", 32, 8),
    _foreign(f"{_QUERY}.lora_B.default.weight", 32, 8),
    _foreign(f"{_QUERY}.lora_magnitude_vector.victim.weight", 32, of="dora"),
    _foreign("classifier.modules_to_save.victim.weight", 3, 32),
    _foreign("classifier.original_module.weight", 3, 32),
    _foreign(f"{_WORDS}.token_adapter.trainable_tokens_delta.victim", 3, 32, of="tokens"),
    _foreign("lm_head.weight", 100, 32, of="gpt2"),
    _foreign("score.weight", 3, 32, of="gpt2"),
    _foreign("classifier.scale", 3),
    _foreign(f"{_QUERY}.lora_magnitude_vector", 32),
    _foreign(f"{_QUERY}.lora_B.bias", 32),
    _foreign(f"{_QUERY}.lora_diag", 8),
    _foreign(f"{_QUERY}.ia3_l", 32, 1),
    _foreign(f"{_QUERY}.base_layer.lora_A.weight", 8, 32),
    _foreign(f"{_QUERY}.base_layer.base_layer.lora_A.weight", 8, 32),
    _foreign(f"{_QUERY}.base_layer.base_layer.bias", 32, of="target biases"),
    _foreign("model.layers.0.mlp.experts.base_layer.base_layer.lora_A.weight", 12, 32, of="experts"),
    _foreign(f"{_POSITIONS}.token_adapter.trainable_tokens_delta", 3, 32, of="tokens"),
    _foreign("bert.encoder.layer.9.attention.self.query.base_layer.weight", 32, 32),
    _foreign("lora_A.weight", 8, 32),
    _foreign("", 8, 32),
    Case(
        "LoRA on a module not named",
        added({f"{_KEY}.lora_A.weight": (8, 32), f"{_KEY}.lora_B.weight": (32, 8)}),
        (f"target_modules does not name: {_KEY}",),
    ),
    Case(
        "LoRA on a module that is not there",
        added({"bert.encoder.layer.9.x.lora_A.weight": (8, 32), "bert.encoder.layer.9.x.lora_B.weight": (32, 8)}),
        ("bert.encoder.layer.9.x",),
    ),
    Case(
        "LoRA on a norm",
        both(
            configured(target_modules=["query", "value", "LayerNorm"]),
            added({"bert.embeddings.LayerNorm.lora_A.weight": (8, 32)}),
        ),
        ("bert.embeddings.LayerNorm",),
    ),
    Case(
        "rows of positions where the list means words",
        both(
            configured(trainable_token_indices=[3, 7, 11]),
            renamed(f"{_WORDS}.token_adapter.trainable_tokens_delta", f"{_POSITIONS}.trainable_tokens_delta"),
        ),
        (_POSITIONS,),
        of="tokens",
    ),
    Case("no prefix", renamed(f"{PREFIX}classifier.weight", "classifier.weight"), ("classifier.weight",)),
    Case("another method's names", renamed("lora_A.weight", "hada_w1_a"), ("hada_w1_a",)),
    Case("names of an embedding on a linear layer", edited(_under_embedding_names), (_QUERY,)),
    Case("names of a linear layer on an embedding", edited(_of_embedding_under_linear_names), (_WORDS,), of="words"),
    Case("one magnitude in two dtypes", edited(_two_dtypes), ("lora_magnitude_vector",), of="dora"),
    Case("another output layer than the tied one", edited(_other_head), ("lm_head",), of="tied head"),
    Case("another LoRA than the tied one", edited(_other_tied_lora), ("lm_head",), of="tied words"),
    Case(
        "a copy of words that are not the base's",
        changed("embed_tokens.base_layer.weight", filled(7.0)),
        ("embed_tokens.weight", "another base"),
        of="tied words",
    ),
    Case(
        "a copy of words cut short", changed("embed_tokens.base_layer.weight", cut), ("embed_tokens",), of="tied words"
    ),
    Case(
        "a copy of a head that is not the base's",
        changed("lm_head.base_layer.weight", filled(7.0)),
        ("lm_head",),
        of="tied words",
    ),
)

CASES = (*SICK, *FOREIGN)
