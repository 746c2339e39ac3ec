"""Recipes of the other PEFT methods."""

from __future__ import annotations

from typing import Any

from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftConfig,
    TrainableTokensConfig,
    VeraConfig,
)

from tests.parity.configs import Recipe
from tests.parity.site import Site


def _ia3(site: Site) -> PeftConfig:
    attention, inner = site.attention(), list(site.arch.mlp[-1:])
    return IA3Config(**site.fields(), target_modules=attention + inner, feedforward_modules=inner)


def _ia3_conv(site: Site) -> PeftConfig | None:
    if not site.has(site.arch.conv):
        return None
    return IA3Config(**site.fields(), target_modules=[site.arch.conv, *site.attention()], feedforward_modules=[])


def _adalora(site: Site) -> PeftConfig:
    ranks = {"init_r": site.rng.randint(2, 5), "target_r": 2, "total_step": 10}
    return AdaLoraConfig(
        **site.fields(),
        **ranks,
        lora_alpha=site.rng.choice([1, 8, 16]),
        target_modules=site.linears(),
        fan_in_fan_out=site.arch.conv1d,
    )


def _prune(model: Any, site: Site) -> None:
    """Give up some components, as AdaLoRA's allocator does: their weights are zero, and they leave the file."""
    pattern = {}
    for name, parameter in model.base_model.model.named_parameters():
        if ".lora_E." in name:
            kept = [site.rng.random() < 0.6 for _ in range(len(parameter))]
            kept[0] = True
            parameter.data *= 3
            parameter.data[[not keep for keep in kept]] = 0
            pattern[name] = kept
    model.peft_config["default"].rank_pattern = pattern


def _norms(site: Site) -> PeftConfig:
    return LNTuningConfig(**site.fields(), target_modules=[site.arch.norms])


def _tokens(site: Site) -> PeftConfig | None:
    if not site.has(site.arch.embedding) or not (site.headless or not site.arch.heads_of(site.base.task)):
        return None
    return TrainableTokensConfig(
        task_type=site.task_type, token_indices=site.tokens(25), target_modules=[site.arch.embedding]
    )


def _vera(site: Site) -> PeftConfig:
    return VeraConfig(
        **site.fields(),
        r=site.rng.randint(2, 8),
        target_modules=site.linears(),
        save_projection=True,
        projection_prng_key=site.rng.randint(0, 9),
        fan_in_fan_out=site.arch.conv1d,
    )


def _loha(site: Site) -> PeftConfig | None:
    return None if site.arch.conv1d else LoHaConfig(**_lycoris(site))


def _loha_conv(site: Site) -> PeftConfig | None:
    if not site.has(site.arch.conv):
        return None
    return LoHaConfig(
        **{**_lycoris(site), "target_modules": [site.arch.conv, *site.attention()]},
        use_effective_conv2d=site.rng.random() < 0.5,
    )


def _lokr(site: Site) -> PeftConfig | None:
    return None if site.arch.conv1d else LoKrConfig(**_lycoris(site))


def _lokr_decomposed(site: Site) -> PeftConfig | None:
    if site.arch.conv1d:
        return None
    fields = {**_lycoris(site), "r": 2}
    return LoKrConfig(**fields, decompose_both=True, decompose_factor=site.rng.choice([-1, 4]))


def _lycoris(site: Site) -> dict[str, Any]:
    first = site.arch.attention[0]
    return {
        **site.fields(),
        "r": site.rng.randint(2, 5),
        "alpha": site.rng.choice([1, 4, 8]),
        "target_modules": [*site.linears(), first],
        "rank_pattern": {first: 3},
        "alpha_pattern": {first: 5},
    }


def _oft(site: Site, **fields: Any) -> PeftConfig | None:
    if site.arch.conv1d:
        return None
    return OFTConfig(
        **site.fields(),
        oft_block_size=site.rng.choice([4, 8]),
        r=0,
        target_modules=site.linears(),
        fan_in_fan_out=site.arch.conv1d,
        **fields,
    )


TUNER_RECIPES: tuple[Recipe, ...] = (
    Recipe("ia3", "IA3", _ia3),
    Recipe("ia3-conv", "IA3", _ia3_conv),
    Recipe("adalora", "AdaLoRA", _adalora),
    Recipe("adalora-pruned", "AdaLoRA", _adalora, finish=_prune),
    Recipe("ln-tuning", "LN_TUNING", _norms),
    Recipe("trainable-tokens", "TRAINABLE_TOKENS", _tokens),
    Recipe("vera", "VeRA, projections saved", _vera),
    Recipe("loha", "LoHa", _loha),
    Recipe("loha-conv", "LoHa", _loha_conv),
    Recipe("lokr", "LoKr", _lokr),
    Recipe("lokr-decomposed", "LoKr", _lokr_decomposed),
    Recipe("oft", "OFT", _oft),
    Recipe("oft-shared", "OFT", lambda site: _oft(site, block_share=True)),
    Recipe("oft-cayley", "OFT", lambda site: _oft(site, use_cayley_neumann=False)),
)
