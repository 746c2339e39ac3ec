"""One case for every role that a tensor can have."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.hostile.case import Case
from tests.hostile.spoil import Spoil

# The good adapter -> the ending of a tensor of each of its roles, and the module it belongs to where others share that.
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
    "ia3": ("query.ia3_l", "intermediate.dense.ia3_l"),
    "vera": ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
    "oft": ("query.oft_R.weight",),
    "norms": ("ln_tuning_layers.weight", "ln_tuning_layers.bias"),
    "only tokens": ("trainable_tokens_delta",),
    "token classes": ("classifier.weight", "classifier.bias"),
    "answers": ("qa_outputs.weight", "qa_outputs.bias"),
    "tied head": ("embed_tokens.weight",),
    "tied words": ("lora_embedding_A", "lora_embedding_B", "lm_head.lora_A.weight", "lm_head.lora_B.weight"),
    "experts": (
        "experts.lora_A.weight",
        "experts.lora_B.weight",
        "experts.base_layer.lora_A.weight",
        "experts.base_layer.lora_B.weight",
    ),
    "convolution": ("projection.lora_A.weight", "projection.lora_B.weight", "lora_magnitude_vector"),
}
# A word that a role's problem must hold, where the ending itself is not what one would look for.
_NAMES = {
    "trainable_tokens_delta": "token",
    "ln_tuning_layers.weight": "LayerNorm",
    "ln_tuning_layers.bias": "LayerNorm",
}
_OWNED = re.compile(r"(.+?)\.(base_layer|lora_A|lora_B|ia3_l|oft_R)\b.*")


def _name(ending: str) -> str:
    owned = _OWNED.match(ending)
    return _NAMES.get(ending) or (owned[1] if owned else ending)


def each_role(kind: str, make: Callable[[str], Spoil]) -> tuple[Case, ...]:
    return tuple(
        Case(f"{kind} {ending} of {of}", make(ending), (_name(ending),), of)
        for of, endings in _ROLES.items()
        for ending in endings
    )
