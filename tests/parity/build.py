"""Adapters made from recipes: initialised by PEFT, moved away from zero as training would, saved, and their oracle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from torch.func import functional_call

from adapter_router.types import TaskKind
from tests.parity.bases import Base
from tests.parity.configs import LORA_RECIPES, Recipe, generator
from tests.parity.initial import INITIAL_RECIPES
from tests.parity.legacy import LEGACY_RECIPES
from tests.parity.oracle import load_alone, run
from tests.parity.site import Site
from tests.parity.tuners import TUNER_RECIPES

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe for recipe in (*LORA_RECIPES, *INITIAL_RECIPES, *LEGACY_RECIPES, *TUNER_RECIPES)
}
_LOUDNESS = 0.3


@dataclass(frozen=True)
class Adapter:
    """A saved adapter. ``planted``: tokens without which a row may not notice it."""

    name: str
    recipe: Recipe
    site: Site
    directory: Path
    planted: tuple[int, ...]
    trained: Any

    @property
    def task_and_name(self) -> str:
        """What the engine knows it by."""
        return f"{self.site.base.task}-{self.name}"

    @property
    def task(self) -> TaskKind | None:
        """What must be said when it is loaded, None where its configuration tells."""
        return None if self.site.task_type else self.site.base.task

    @cached_property
    def alone(self) -> Any:
        """The model that knows this adapter's right answers."""
        if self.recipe.oracle == "trained":
            return self.trained
        directory = _native(self.directory) if self.recipe.oracle == "native" else self.directory
        return load_alone(self.site.base, directory, self.site.labels)

    def without(self, row: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits of the base with the adapter's saved head and nothing else of it."""
        model = self.site.base.pristine(self.site.labels)
        parameters = {}
        for name in self.site.arch.heads_of(self.site.base.task) if self.site.brings_head else ():
            saved = self.alone.get_base_model().get_submodule(name).modules_to_save["default"]
            parameters |= {f"{name}.{key}": value for key, value in saved.named_parameters()}
        return run(lambda **batch: functional_call(model, parameters, (), batch), [dict(row)], self.site.base.task)[0]

    def logits(self, row: Mapping[str, np.ndarray]) -> np.ndarray:
        return run(self.alone, [dict(row)], self.site.base.task)[0]


def build(base: Base, recipe: Recipe, directory: Path) -> Adapter | None:
    """The adapter of ``recipe`` on ``base``, or None where it has no meaning there."""
    rng = generator(base.architecture.name, base.task, base.seed, recipe.name)
    if recipe.headless and not base.trained_head:
        return None
    headless = base.trained_head and (recipe.headless or rng.random() < 0.3)
    site = Site(base, rng, bool(headless))
    config = recipe.build(site)
    if config is None:
        return None
    torch.manual_seed(rng.getrandbits(31))
    model = base.fresh(site.labels)
    if recipe.prepare:
        recipe.prepare(model, config, site)
    peft_model = get_peft_model(model, config).eval()
    _save(peft_model, recipe, site, directory)
    if recipe.oracle == "native":
        shutil.copytree(directory, _native(directory))
    if recipe.edit:
        recipe.edit(directory, site)
    kept = peft_model if recipe.oracle == "trained" else None
    return Adapter(recipe.name, recipe, site, directory, _planted(config), kept)


def _planted(config: PeftConfig) -> tuple[int, ...]:
    if getattr(config, "alora_invocation_tokens", None):
        return tuple(config.alora_invocation_tokens)
    tokens = getattr(config, "token_indices", None) or getattr(config, "trainable_token_indices", None) or ()
    return tuple(next(iter(tokens.values())) if isinstance(tokens, dict) else tokens)[:2]


def _native(directory: Path) -> Path:
    return directory.with_name(directory.name + "-native")


def _save(model: Any, recipe: Recipe, site: Site, directory: Path) -> None:
    model.create_or_update_model_card = lambda _: None  # its template takes longer than all the rest
    initial = directory.with_name(directory.name + "-initial")
    if recipe.initial or recipe.converted:
        model.peft_config["default"].init_lora_weights, init = True, model.peft_config["default"].init_lora_weights
        model.save_pretrained(initial)
        model.peft_config["default"].init_lora_weights = init
    train(model)
    if recipe.finish:
        recipe.finish(model, site)
    if recipe.converted:
        model.save_pretrained(directory, path_initial_model_for_weight_conversion=str(initial))
    else:
        model.save_pretrained(directory)
    if recipe.initial:
        (directory / "initial").mkdir()
        shutil.copy(initial / "adapter_model.safetensors", directory / "initial")


def train(model: Any) -> None:
    """Move every trainable tensor away from where its initialisation left it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * _LOUDNESS)
