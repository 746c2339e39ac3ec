"""Recipes: every kind of PEFT configuration that an adapter directory can carry, drawn at random per base and seed.

A recipe gives a configuration for a site, or None where it has no meaning there. ``oracle`` says who knows the right
answer:

- "alone": PEFT with the saved directory on a fresh base;
- "trained": the model in memory that was saved, because PEFT itself restores these files wrongly;
- "native": PEFT with the same tensors under the names that it reads, because it does not read the ones in the file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file

from tests.parity.site import Site

Build = Callable[[Site], PeftConfig | None]
Edit = Callable[[Path, Site], None]
Oracle = Literal["alone", "trained", "native"]


@dataclass(frozen=True)
class Recipe:
    """``row``: its line in the compatibility table. ``edit`` changes the saved directory.

    ``prepare`` readies a fresh base for the initialisation. ``initial``: keep the adapter as initialised.
    ``finish`` changes the trained model before it is saved; ``converted``: saved as plain LoRA.
    ``headless``: needs an adapter without a head; None leaves it to chance.
    ``changes``: whether the logits must differ from an adapter of zeros.
    """

    name: str
    row: str
    build: Build
    edit: Edit | None = None
    oracle: Oracle = "alone"
    prepare: Callable[[Any, LoraConfig, Site], None] | None = None
    initial: bool = False
    converted: bool = False
    finish: Callable[[Any, Site], None] | None = None
    headless: bool | None = None
    changes: bool = True


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def cast(dtype: torch.dtype) -> Edit:
    return lambda directory, _: edit_tensors(directory, lambda t: {name: x.to(dtype) for name, x in t.items()})


def _reversed_patterns(directory: Path, _: Site) -> None:
    """Patterns in another order than PEFT writes them in: the first match in the file's order counts."""
    config = json.loads((directory / "adapter_config.json").read_text())
    edit_config(directory, alpha_pattern=dict(reversed(config["alpha_pattern"].items())))


def _unordered(directory: Path, site: Site) -> None:
    """A file whose tensors and keys come in another order."""
    items = list(json.loads((directory / "adapter_config.json").read_text()).items())
    site.rng.shuffle(items)
    (directory / "adapter_config.json").write_text(json.dumps(dict(items)))


# -- which layers, which rank, which scale ------------------------------------------------------------------------


def _rank_pattern(site: Site) -> PeftConfig:
    first, second = site.arch.attention[:2]
    return site.lora(target_modules=[first, second, *site.arch.mlp[:1]], r=2, rank_pattern={first: 5, second: 3})


def _anchored_patterns(site: Site) -> PeftConfig:
    path = site.layer_path()
    leaf = site.arch.attention[1]
    return site.lora(
        target_modules=list(site.arch.attention[:2]),
        rank_pattern={f"^{path}": 4, rf".*\d.*\.{leaf}": 2},
        alpha_pattern={f"^{path}": 11.5, leaf: 3},
    )


def _overlapping(site: Site) -> PeftConfig:
    leaf = site.arch.attention[0]
    return site.lora(
        target_modules=[*site.linears(), leaf],
        alpha_pattern={leaf: 2, rf".*{leaf}": 31.0, f"^{site.layer_path()}": -7},
    )


def _dotted(site: Site) -> PeftConfig:
    path = site.layer_path()
    tail = path.partition(".")[2]
    half = ".".join(path.split(".")[-2:])[1:]
    return site.lora(
        target_modules=[*site.linears(), site.arch.attention[0]],
        alpha_pattern={half: 100, tail: 23},  # the first is no whole name, so it matches nothing
    )


def _patterns_rslora(site: Site) -> PeftConfig:
    first, second = site.arch.attention[:2]
    return site.lora(
        target_modules=[first, second], r=3, use_rslora=True, rank_pattern={first: 5}, alpha_pattern={second: 2.5}
    )


def _one_layer(site: Site) -> PeftConfig:
    return site.lora(target_modules=[site.layer_path()])


def _layers(site: Site) -> PeftConfig | None:
    return site.lora(layers_to_transform=[1], target_modules=site.linears()) if site.numbered else None


def _layers_pattern(site: Site) -> PeftConfig | None:
    return site.lora(layers_to_transform=0, layers_pattern=site.numbered) if site.numbered else None


def _excluded(site: Site) -> PeftConfig | None:
    return site.lora(exclude_modules=rf".*{site.numbered}\.0\..*") if site.numbered else None


def _excluded_names(site: Site) -> PeftConfig:
    first, second = site.arch.attention[:2]
    return site.lora(target_modules=[first, second, *site.arch.mlp], exclude_modules=[second, site.layer_path()])


def _regex(site: Site) -> PeftConfig:
    names = "|".join(name.replace(".", r"\.") for name in site.linears())
    return site.lora(target_modules=rf".*\.({names})")


def _all_linear(site: Site) -> PeftConfig | None:
    # PEFT leaves out the head itself for classes it knows; a composite head's inner layers would be hit twice.
    return site.lora(target_modules="all-linear", r=2, modules_to_save=site.saved())


def _lm_head_target(site: Site) -> PeftConfig | None:
    return site.lora(target_modules=[*site.attention(), "lm_head"]) if site.generative else None


def _pooler(site: Site) -> PeftConfig | None:
    heads = site.saved() or []
    if not site.has(site.arch.pooler) or any(site.arch.pooler.startswith(head) for head in heads):
        return None
    if site.base.task != "text-classification":
        return None
    return site.lora(target_modules=[*site.attention(), site.arch.pooler])


# -- what is trained beside A and B -------------------------------------------------------------------------------


def _bias_and_dora(site: Site) -> PeftConfig | None:
    return site.lora(bias="lora_only", use_dora=True) if _biased(site) else None


def _biased(site: Site) -> bool:
    return any("bias" in name for name, _ in site.base.pristine(site.labels).named_parameters())


def _bias(kind: str) -> Build:
    return lambda site: site.lora(bias=kind) if _biased(site) else None


def _embedding(site: Site, **fields: Any) -> PeftConfig | None:
    if not site.has(site.arch.embedding):
        return None
    return site.lora(target_modules=[site.arch.embedding, *site.attention()], **fields)


def _conv(site: Site, **fields: Any) -> PeftConfig | None:
    if not site.has(site.arch.conv):
        return None
    return site.lora(target_modules=[site.arch.conv, *site.attention()], **fields)


def _positions(site: Site) -> PeftConfig | None:
    name = {"bert": "position_embeddings", "gpt2": "wpe", "siglip": "position_embedding"}.get(site.arch.name)
    return site.lora(target_modules=[name, *site.attention()]) if name else None


def _dora_pissa(site: Site) -> PeftConfig:
    return site.lora(use_dora=True, init_lora_weights="pissa", lora_alpha=site.alpha)


def _block_diagonal(site: Site) -> PeftConfig | None:
    if site.arch.conv1d:
        return None
    first, second = site.arch.attention[:2]
    part = first[:-1] if "." not in first and len(first) > 3 else f".{first}"  # a part of the path is a match
    blocks = BdLoraConfig(target_modules_bd_a=[f".{second}"], target_modules_bd_b=[part], nblocks=2, match_strict=False)
    return site.lora(use_bdlora=blocks, r=4, target_modules=[*site.linears(), first, second])


def _kasa(site: Site) -> PeftConfig | None:
    return None if site.arch.conv1d else site.lora(kasa_config=KasaConfig())


def _olora(site: Site) -> PeftConfig | None:
    return None if site.arch.conv1d else site.lora(init_lora_weights="olora", lora_alpha=site.alpha)


def _initialised(init: str, **fields: Any) -> Build:
    return lambda site: site.lora(init_lora_weights=init, lora_alpha=site.alpha, **fields)


def _pissa_patterns(site: Site) -> PeftConfig:
    first, second = site.arch.attention[:2]
    return site.lora(
        target_modules=[first, second, *site.arch.mlp[:1]],
        init_lora_weights="pissa",
        lora_alpha=site.alpha,
        rank_pattern={first: 4},
        alpha_pattern={second: 5},
    )


# -- experts, tokens, saved modules -------------------------------------------------------------------------------


def _experts(which: slice, tandem: bool = False) -> Build:
    def build(site: Site) -> PeftConfig | None:
        if not site.arch.experts:
            return None
        targets = site.attention() if tandem else []
        return site.lora(target_modules=targets, target_parameters=list(site.arch.experts[which]), r=2)

    return build


def _experts_patterns(site: Site) -> PeftConfig | None:
    if not site.arch.experts:
        return None
    up, down = site.arch.experts
    patterns: dict[str, Any] = {"rank_pattern": {up: 3}, "alpha_pattern": {down: 9}}
    return site.lora(target_modules=site.attention(), target_parameters=[up, down], r=2, **patterns)


def _token_list(site: Site) -> PeftConfig | None:
    if not site.has(site.arch.embedding):
        return None
    return site.lora(trainable_token_indices=site.tokens(20), target_modules=site.attention())


def _token_dict(site: Site) -> PeftConfig | None:
    if not site.has(site.arch.embedding):
        return None
    return site.lora(trainable_token_indices={site.arch.embedding: site.tokens(25)}, target_modules=site.attention())


def _save(name_of: Callable[[Site], str], **fields: Any) -> Build:
    def build(site: Site) -> PeftConfig | None:
        name = name_of(site)
        heads = site.saved() or []
        if not site.has(name) or any(name.startswith(head) for head in heads):
            return None
        return site.lora(modules_to_save=[name, *heads], target_modules=site.attention(), **fields)

    return build


def _save_head_and_embedding(site: Site) -> PeftConfig | None:
    if not site.generative:
        return None
    return site.lora(modules_to_save=["lm_head", site.arch.embedding], target_modules=site.attention())


def _first_layer(site: Site) -> str:
    return f"{site.arch.stack}.0" if site.arch.stack and not site.arch.is_vision else ""


def _activated(site: Site, **fields: Any) -> PeftConfig | None:
    if not site.causal:
        return None
    return site.lora(alora_invocation_tokens=site.rng.sample(range(5, site.base.sizes.vocab), 2), **fields)


def _alpha(value: float) -> Build:
    return lambda site: site.lora(lora_alpha=value)


def _with(**fields: Any) -> Build:
    return lambda site: site.lora(**fields)


def _prefix_added(directory: Path, site: Site) -> None:
    """Keys as an adapter of the whole model spells them, though this one serves the trunk."""
    prefix = type(site.base.pristine(2)).base_model_prefix
    start = "base_model.model."
    edit_tensors(directory, lambda t: {start + prefix + "." + key.removeprefix(start): x for key, x in t.items()})


LORA_RECIPES: tuple[Recipe, ...] = (
    Recipe("plain", "plain LoRA", _with()),
    Recipe("headless", "plain LoRA, base's own head", _with(), headless=True),
    Recipe("unordered", "plain LoRA", _with(), edit=_unordered),
    Recipe("rank-pattern", "rank_pattern", _rank_pattern),
    Recipe("anchored-patterns", "rank_pattern, alpha_pattern: anchored, regex", _anchored_patterns),
    Recipe("overlapping-alpha", "alpha_pattern: overlapping", _overlapping, edit=_reversed_patterns),
    Recipe("dotted-alpha", "alpha_pattern: dotted", _dotted),
    Recipe("rslora", "use_rslora", _with(use_rslora=True, r=4)),
    Recipe("rslora-patterns", "use_rslora with patterns", _patterns_rslora),
    Recipe("one-layer", "target_modules: one full path", _one_layer),
    Recipe("layers", "layers_to_transform", _layers),
    Recipe("layers-pattern", "layers_pattern", _layers_pattern),
    Recipe("excluded-regex", "exclude_modules", _excluded),
    Recipe("excluded-names", "exclude_modules", _excluded_names),
    Recipe("regex", "target_modules: regex", _regex),
    Recipe("all-linear", "target_modules: all-linear", _all_linear),
    Recipe("lm-head", "LoRA on lm_head", _lm_head_target),
    Recipe("pooler", "LoRA on the pooler", _pooler),
    Recipe("alpha-negative", "negative lora_alpha", _alpha(-9)),
    Recipe("alpha-zero", "lora_alpha 0", _alpha(0), changes=False),
    Recipe("alpha-float", "float lora_alpha", _alpha(11.3137)),
    Recipe("gaussian", "init: gaussian, orthogonal, MiCA, EVA", _with(init_lora_weights="gaussian")),
    Recipe("orthogonal", "init: gaussian, orthogonal, MiCA, EVA", _with(init_lora_weights="orthogonal", r=4)),
    Recipe(
        "mica",
        "init: gaussian, orthogonal, MiCA, EVA",
        lambda s: None if s.arch.conv1d else s.lora(init_lora_weights="mica"),
    ),
    Recipe("velora", "VeLoRA, MonteCLoRA (training only)", _with(velora_config=VeloraConfig(num_groups=2))),
    Recipe("monteclora", "VeLoRA, MonteCLoRA (training only)", _with(monteclora_config=MontecloraConfig())),
    Recipe("dropout", "lora_dropout (training only)", _with(lora_dropout=0.3)),
    Recipe("float16-file", "file in float16", _with(), edit=cast(torch.float16)),
    Recipe("bfloat16-file", "file in bfloat16", _with(), edit=cast(torch.bfloat16)),
    Recipe("lora-bias", "lora_bias", _with(lora_bias=True)),
    Recipe("bias-all", "bias: all", _bias("all")),
    Recipe("bias-lora-only", "bias: lora_only", _bias("lora_only")),
    Recipe("bias-dora", "bias with DoRA", _bias_and_dora),
    Recipe("dora", "use_dora", _with(use_dora=True)),
    Recipe("dora-rslora", "use_dora with use_rslora", _with(use_dora=True, use_rslora=True, r=4)),
    Recipe("dora-pissa", "use_dora with PiSSA", _dora_pissa),
    Recipe("dora-embedding", "use_dora on embeddings", lambda site: _embedding(site, use_dora=True)),
    Recipe("dora-conv", "use_dora on convolutions", lambda site: _conv(site, use_dora=True)),
    Recipe("embedding", "LoRA on embeddings", _embedding),
    Recipe("embedding-rslora", "LoRA on embeddings", lambda site: _embedding(site, use_rslora=True, r=3)),
    Recipe(
        "embedding-tied",
        "LoRA on tied embeddings, ensure_weight_tying",
        lambda site: _embedding(site, ensure_weight_tying=True) if site.causal else None,
    ),
    Recipe(
        "embedding-tied-thrice",  # PEFT's reload of it differs from what it saved, by more than the logits' size
        "LoRA on tied embeddings, ensure_weight_tying",
        lambda site: _embedding(site, ensure_weight_tying=True) if site.generative and not site.causal else None,
        oracle="trained",
    ),
    Recipe("positions", "LoRA on position embeddings", _positions),
    Recipe("conv", "LoRA on convolutions", _conv),
    Recipe("kasa", "KaSA", _kasa),
    Recipe("block-diagonal", "BD-LoRA", _block_diagonal),
    Recipe("pissa", "init: PiSSA", _initialised("pissa")),
    Recipe("pissa-rslora", "init: PiSSA", _initialised("pissa", use_rslora=True)),
    Recipe("pissa-patterns", "init: PiSSA", _pissa_patterns),
    Recipe("olora", "init: OLoRA", _olora),
    Recipe("experts-one", "target_parameters", _experts(slice(0, 1))),
    Recipe("experts-other", "target_parameters", _experts(slice(1, 2))),
    Recipe("experts-both", "target_parameters", _experts(slice(0, 2))),
    Recipe("experts-tandem", "target_parameters with target_modules", _experts(slice(0, 2), tandem=True)),
    Recipe("experts-patterns", "target_parameters with target_modules", _experts_patterns),
    Recipe("token-list", "trainable_token_indices", _token_list),
    Recipe("token-dict", "trainable_token_indices", _token_dict),
    Recipe("save-pooler", "modules_to_save: pooler", _save(lambda site: site.arch.pooler.split(".")[0])),
    Recipe("save-norm", "modules_to_save: norms", _save(lambda site: site.arch.norms)),
    Recipe("save-layer", "modules_to_save: a whole layer", _save(_first_layer)),
    Recipe("save-embedding", "modules_to_save: embeddings", _save(lambda site: site.arch.embedding)),
    Recipe("save-lm-head", "modules_to_save: lm_head", _save(lambda _: "lm_head")),
    Recipe("save-both", "modules_to_save: lm_head and embeddings", _save_head_and_embedding),
    Recipe(
        "save-embedding-tied",
        "modules_to_save, ensure_weight_tying",
        _save(lambda site: site.arch.embedding if site.causal else "", ensure_weight_tying=True),
    ),
    Recipe("activated", "aLoRA", _activated),
    Recipe("activated-rslora", "aLoRA", lambda site: _activated(site, use_rslora=True, r=3)),
    Recipe("activated-bias", "aLoRA with lora_bias", lambda site: _activated(site, lora_bias=True)),
    Recipe("activated-biases", "aLoRA with bias", lambda site: _activated(site, bias="all") if _biased(site) else None),
    Recipe("activated-head", "aLoRA with a saved lm_head", lambda site: _activated(site, modules_to_save=["lm_head"])),
    Recipe(
        "prefixed-keys",
        "keys with the backbone's name",
        lambda site: site.lora() if site.base.task == "embedding" else None,
        edit=_prefix_added,
        oracle="native",
    ),
)


def generator(*parts: object) -> random.Random:
    """Random choices that depend on ``parts`` alone."""
    return random.Random("/".join(map(str, parts)))
