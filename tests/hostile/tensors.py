"""Tensors that are sick, foreign, missing, misshaped or not the adapter's to bring."""

from __future__ import annotations

import torch

from tests.hostile.case import Case, untouched
from tests.hostile.spoil import (
    INITIAL,
    PREFIX,
    added,
    both,
    changed,
    configured,
    cut,
    edited,
    empty,
    filled,
    keys,
    removed,
    renamed,
)

_QUERY = "bert.encoder.layer.0.attention.self.query"
_KEY = "bert.encoder.layer.0.attention.self.key"
_WORDS = "bert.embeddings.word_embeddings"
_POSITIONS = "bert.embeddings.position_embeddings"
_A, _B = f"{_QUERY}.lora_A.weight", f"{_QUERY}.lora_B.weight"
_NAN, _INF = float("nan"), float("inf")
# The good adapter -> the ending of a tensor of each of its roles.
_ROLES = {
    "plain": ("lora_A.weight", "lora_B.weight", "classifier.weight", "classifier.bias"),
    "dora": ("lora_magnitude_vector",),
    "lora bias": ("lora_B.bias",),
    "target biases": ("query.base_layer.bias",),
    "all biases": ("LayerNorm.bias", "key.bias"),
    "kasa": ("lora_diag",),
    "blocks": ("query.lora_A.weight",),
    "words": ("lora_embedding_A", "lora_embedding_B"),
    "tokens": ("trainable_tokens_delta",),
    "adalora": ("lora_A", "lora_B", "lora_E"),
    "ia3": ("ia3_l",),
    "vera": ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
    "oft": ("oft_R.weight",),
    "norms": ("LayerNorm.weight", "LayerNorm.bias"),
    "only tokens": ("trainable_tokens_delta",),
    "tied head": ("wte.weight",),
    "experts": ("experts.lora_A.weight", "experts.lora_B.weight", "experts.base_layer.lora_A.weight"),
    "convolution": ("projection.lora_A.weight", "projection.lora_B.weight", "lora_magnitude_vector"),
}
# What says which tensor a role's problem is about, where the message does not repeat the ending.
_NAMES = {
    "query.base_layer.bias": "query",
    "experts.lora_A.weight": "experts",
    "experts.lora_B.weight": "experts",
    "experts.base_layer.lora_A.weight": "experts",
    "wte.weight": "wte",
}


def _each(kind: str, make: object) -> tuple[Case, ...]:
    return tuple(
        Case(f"{kind} {ending} of {of}", make(ending), (_NAMES.get(ending, ending),), of)  # type: ignore[operator]
        for of, endings in _ROLES.items()
        for ending in endings
    )


def _cast(ending: str, dtype: torch.dtype, name: str) -> Case:
    return Case(f"{name} {ending}", changed(ending, lambda t: t.to(dtype)), (f"{ending} has dtype {name}",))


def _foreign(name: str, *shape: int, of: str = "plain") -> Case:
    return Case(f"{name} of {of}", added({name: shape}), (name,), of)


def _two_dtypes(directory: object) -> None:
    """One magnitude under both of PEFT's names for it, once in half precision."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        key = keys(tensors, "lora_magnitude_vector")[0]
        tensors[f"{key}.weight"] = tensors[key].half()

    edited(edit)(directory)  # type: ignore[arg-type]


def _many_labels(tensors: dict[str, torch.Tensor]) -> None:
    """Five million labels that take no bytes."""
    tensors[f"{PREFIX}classifier.weight"] = torch.zeros(5_000_000, 0)
    del tensors[f"{PREFIX}classifier.bias"]


def _no_labels(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PREFIX}classifier.weight"] = torch.zeros(0, 32)
    tensors[f"{PREFIX}classifier.bias"] = torch.zeros(0)


def _under_embedding_names(tensors: dict[str, torch.Tensor]) -> None:
    """LoRA of a linear layer under the names of an embedding's, which PEFT would not read."""
    tensors[f"{PREFIX}{_QUERY}.lora_embedding_A"] = tensors.pop(PREFIX + _A)
    tensors[f"{PREFIX}{_QUERY}.lora_embedding_B"] = tensors.pop(PREFIX + _B)


def _of_embedding_under_linear_names(tensors: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        key = keys(tensors, f"lora_embedding_{side}")[0]
        tensors[key.replace(f"lora_embedding_{side}", f"lora_{side}.weight")] = tensors.pop(key)


def _large_and_sick(tensors: dict[str, torch.Tensor]) -> None:
    """96 MiB, the last number of which is none."""
    tensors[f"{PREFIX}classifier.weight"] = filled(_NAN)(torch.zeros(786_432, 32))
    tensors[f"{PREFIX}classifier.bias"] = torch.zeros(786_432)


def _other_head(tensors: dict[str, torch.Tensor]) -> None:
    """The tied output layer with another weight than the embedding's."""
    tensors[f"{PREFIX}lm_head.weight"] = tensors[keys(tensors, "wte.weight")[0]] + 1


def _other_tied_lora(tensors: dict[str, torch.Tensor]) -> None:
    """The tied output layer's LoRA is not the embedding's turned round."""
    key = keys(tensors, "lm_head.lora_A.weight")[0]
    tensors[key] = tensors[key] + 1


SICK = (
    *_each("NaN in", lambda ending: changed(ending, filled(_NAN))),
    Case("Inf", changed("classifier.bias", filled(-_INF)), ("classifier.bias holds NaN or infinite",)),
    Case("Inf of float16", changed(_A, lambda t: filled(_INF)(t.half())), (f"{_A} holds NaN or infinite",)),
    Case("NaN of bfloat16", changed(_B, lambda t: filled(_NAN)(t.bfloat16())), (f"{_B} holds NaN or infinite",)),
    Case("NaN in initial", changed(_A, filled(_NAN), INITIAL), ("initial: ", _A), of="fast pissa"),
    Case("NaN at the end of 96 MiB", edited(_large_and_sick), ("classifier.weight holds NaN",)),
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
    _foreign(f"{_KEY}.base_layer.bias", 32, of="target biases"),
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
    Case("tokens of another module", renamed(_POSITIONS, _POSITIONS), ("position_embeddings",), of="tokens")
    if False
    else Case(
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
    Case("one magnitude in two dtypes", _two_dtypes, ("lora_magnitude_vector",), of="dora"),
    Case("another output layer than the tied one", edited(_other_head), ("lm_head",), of="tied head"),
    Case("another LoRA than the tied one", edited(_other_tied_lora), ("lm_head",), of="tied words"),
    Case("a copy of words that are not the base's", changed(f"{_WORDS}.base_layer.weight", filled(7.0)), (_WORDS,), of="words"),
    Case("a copy of words cut short", changed(f"{_WORDS}.base_layer.weight", cut), (_WORDS,), of="words"),
)

MISSING = (
    *_each("no", removed),
    Case("no query at all", removed(_A, _B), (f"1 target modules have no tensors: {_QUERY}",)),
    Case("no head", removed("classifier.weight", "classifier.bias"), ("classifier.weight",)),
    Case("no initial A", edited(lambda t: t.pop(PREFIX + _A), INITIAL), (_QUERY,), of="fast pissa"),
    Case("one bias of all", removed(f"{_KEY}.bias"), (_KEY,), of="all biases"),
    Case("experts of one layer", removed(*(f"layers.0.mlp.experts.{x}" for x in ("lora_A.weight", "lora_B.weight", "base_layer.lora_A.weight", "base_layer.lora_B.weight"))), ("layers.0.mlp.experts",), of="experts"),
    Case("DoRA declared only", configured(use_dora=True), ("lora_magnitude_vector",)),
    Case("lora_bias declared only", configured(lora_bias=True), ("lora_B.bias",)),
    Case("all biases declared only", configured(bias="all"), ("bias",)),
    Case("biases of targets declared only", configured(bias="lora_only"), ("bias",)),
    Case("KaSA declared only", configured(kasa_config={"a": 1}), ("lora_diag",)),
    Case("DoRA no longer declared", configured(use_dora=False), ("lora_magnitude_vector",), of="dora"),
    Case("biases no longer declared", configured(bias="none"), ("bias",), of="all biases"),
)

MISSHAPED = (
    *_each("short", lambda ending: changed(ending, cut)),
    *_each("empty", lambda ending: changed(ending, empty)),
    *_each("flat", lambda ending: changed(ending, lambda t: t.reshape(1, -1, 1, 1, 1))),
    Case("short initial", changed(_A, cut, INITIAL), (_QUERY,), of="fast pissa"),
    Case("A transposed", changed(_A, lambda t: t.t()), (f"{_A} has shape [32, 8]",)),
    Case("B twice as tall", changed(_B, lambda t: t.repeat(2, 1)), (f"{_B} has shape [64, 8]",)),
    Case("IA3 turned round", changed("ia3_l", lambda t: t.t()), ("ia3_l",), of="ia3"),
    Case("head a number", changed("classifier.bias", lambda t: t[0]), ("classifier.bias has shape []",)),
    Case("head of two sizes", changed("classifier.bias", lambda t: t[:2]), ("disagree on the number of labels",)),
    Case("head of no labels", edited(_no_labels), ("the head has no labels",)),
    Case("head of five million labels", edited(_many_labels), ("classifier.weight",)),
)

ELSEWHERE = (
    Case("on a narrower base", untouched, ("has shape [8, 64], this base and config need [8, 32]",), "of a wider base", "bert"),
    Case("on a shallower base", untouched, ("layer.3.attention.self.query",), "of a deeper base", "bert"),
    Case("on a base of fewer words", untouched, ("word_embeddings",), "of another vocabulary", "bert"),
    Case("of DistilBERT", untouched, ("q_lin",), "of distilbert", "bert"),
    Case("of Llama", untouched, ("q_proj",), "of llama", "gpt2"),
    Case("of Llama on Mixtral", untouched, (), "of llama", "mixtral") if False else Case("of BERT on ViT", untouched, ("text-classification",), "plain", "vit"),
    Case("of ViT on BERT", untouched, ("q_proj",), "vit", "bert"),
    Case("of GPT-2 on BERT", untouched, ("text-generation",), "gpt2", "bert"),
    Case("PiSSA of equal directions", untouched, (_QUERY, "initial/"), "identity pissa", "identity"),
    Case("KaSA of equal directions", untouched, (_QUERY,), "identity kasa", "identity"),
)

CASES = (*SICK, *FOREIGN, *MISSING, *MISSHAPED, *ELSEWHERE)
