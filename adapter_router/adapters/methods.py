"""The PEFT methods that are served, by ``peft_type``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from adapter_router.adapters.tuners import adalora, ia3, loha, lokr, lora, oft, vera
from adapter_router.adapters.tuners.tuner import Tuner

# Methods that only replace whole modules or rows of embeddings have no formula of their own.
_NO_FORMULA = replace(lora.TUNER, served=frozenset(), harmless=frozenset(), kinds=frozenset(), roles={})

METHODS: Mapping[str, Tuner] = {
    "LORA": lora.TUNER,
    "ADALORA": adalora.TUNER,
    "IA3": ia3.TUNER,
    "LOHA": loha.TUNER,
    "LOKR": lokr.TUNER,
    "OFT": oft.TUNER,
    "VERA": vera.TUNER,
    "LN_TUNING": replace(_NO_FORMULA, config_problems=lambda _: []),
    "TRAINABLE_TOKENS": replace(
        _NO_FORMULA,
        served=frozenset({"token_indices"}),
        harmless=frozenset({"init_weights"}),
        config_problems=lambda _: [],
    ),
}
