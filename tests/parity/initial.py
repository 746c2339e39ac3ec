"""Recipes of initialisations that change the base, whose files hold half the truth.

PEFT cannot restore them from the trained adapter alone, so the directory also keeps the adapter as it was initialised
(``initial/adapter_model.safetensors``), and the model in memory that was trained is the oracle.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

from tests.parity.bases import Base
from tests.parity.configs import Recipe, generator
from tests.parity.oracle import as_batch, logits_of, random_inputs
from tests.parity.site import Site


def _few_rows(base: Base) -> list[dict[str, torch.Tensor]]:
    rng = generator(base.architecture.name, base.seed, "calibration")
    return [as_batch([random_inputs(base, rng)]) for _ in range(4)]


def _observe_covariance(model: Any, config: LoraConfig, site: Site) -> None:
    def forward() -> None:
        for batch in _few_rows(site.base):
            model(**batch)

    preprocess_corda(model, config, run_model=forward)


def _observe_gradients(model: Any, config: LoraConfig, site: Site) -> None:
    def step() -> None:
        for batch in _few_rows(site.base):
            logits_of(model(**batch), site.base.task).square().mean().backward()

    preprocess_loraga(model, config, step)


def _corda(site: Site) -> PeftConfig | None:
    if site.arch.conv1d or site.arch.name == "swin":  # PEFT itself sees matrices only
        return None
    method = CordaConfig(corda_method=site.rng.choice(["ipm", "kpm"]), verbose=False)
    return site.lora(lora_alpha=site.alpha, init_lora_weights="corda", corda_config=method, r=3)


def _gradient_aligned(site: Site) -> PeftConfig | None:
    settings = LoraGAConfig(direction=site.rng.choice(["ArBr", "ArB2r", "A2rBr"]), scale="unit")
    return (
        None
        if site.arch.conv1d
        else site.lora(lora_alpha=site.alpha, init_lora_weights="lora_ga", lora_ga_config=settings, r=2)
    )


def _randomised_pissa(site: Site) -> PeftConfig:
    return site.lora(lora_alpha=site.alpha, init_lora_weights=f"pissa_niter_{site.rng.choice([1, 4])}")


def _eva(site: Site) -> PeftConfig | None:
    return site.lora(init_lora_weights="eva", eva_config=EvaConfig())


def _convertible(init: str) -> Any:
    """PEFT's conversion drops everything but A and B, so the adapter has no head."""

    def build(site: Site) -> PeftConfig | None:
        return (
            None
            if site.arch.conv1d
            else site.lora(lora_alpha=site.alpha, init_lora_weights=init, use_rslora=site.rng.random() < 0.5)
        )

    return build


INITIAL_RECIPES: tuple[Recipe, ...] = (
    Recipe("pissa-niter", "init: pissa_niter, initial adapter kept", _randomised_pissa, oracle="trained", initial=True),
    Recipe(
        "pissa-initial",
        "init: PiSSA",
        lambda site: site.lora(lora_alpha=site.alpha, init_lora_weights="pissa", r=3),
        oracle="trained",
        initial=True,
    ),
    Recipe(
        "corda",
        "init: CorDA, initial adapter kept",
        _corda,
        oracle="trained",
        prepare=_observe_covariance,
        initial=True,
    ),
    Recipe(
        "lora-ga",
        "init: LoRA-GA, initial adapter kept",
        _gradient_aligned,
        oracle="trained",
        prepare=_observe_gradients,
        initial=True,
    ),
    Recipe("eva", "init: gaussian, orthogonal, MiCA, EVA", _eva),
    Recipe("converted-pissa", "converted at saving", _convertible("pissa"), converted=True, headless=True),
    Recipe("converted-niter", "converted at saving", _convertible("pissa_niter_4"), converted=True, headless=True),
    Recipe("converted-olora", "converted at saving", _convertible("olora"), converted=True, headless=True),
)
