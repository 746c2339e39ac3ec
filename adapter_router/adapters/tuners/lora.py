"""LoRA (arXiv:2106.09685) with all its variants that PEFT keeps under one type.

    y = W x + b + s B A x [+ s b_B]                     s = alpha / r, or alpha / sqrt(r) with rsLoRA
    DoRA (arXiv:2402.09353):   y = b + g (W_0 x + s B A x),   g = m / ||W_0 + s B A||   per output feature
    KaSA (arXiv:2412.06071):   y = W_0 x + b + s B diag(d) A x

``W_0`` is the weight the adapter was trained against. Initialisations that move part of it into the adapter (PiSSA
arXiv:2404.02948, OLoRA arXiv:2406.01775, CorDA, LoRA-GA, KaSA's truncation) trained against ``W_0 = W - s B_0 A_0``;
on the pristine ``W`` that is the LoRA ``[A; A_0], [s B, -s B_0]`` of twice the rank.

A of (r, in), B of (out, r); of an embedding (r, vocabulary) and (features, r); of a convolution kernels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from adapter_router.adapters.base_spec import Shape
from adapter_router.adapters.delta import ModuleDelta
from adapter_router.adapters.tuners.tuner import Factors, Target, Tuner, Weights

# Initialisations that only choose where training starts; LoftQ's on a base that it rounded first.
_LOFTQ = "loftq"
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", _LOFTQ)
# Those that change the base, and can be told from it alone.
_DERIVED_INITS = ("pissa", "olora")
_PISSA_NITER = re.compile(r"pissa_niter_\d+")
_RECORDED_INITS = ("corda", "lora_ga")
_ANY_CASE = ("gaussian", "olora", "mica")
_FLAGS = ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying")
_BLOCK_FIELDS = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}
_MAX_BLOCKS = 4096


def changes_base(init: Any) -> bool:
    """Whether an ``init_lora_weights`` trains against a changed base."""
    return isinstance(init, str) and _known_name(init) not in _PLAIN_INITS


def needs_initial(init: Any) -> bool:
    """Whether only the saved initial adapter can tell what an initialisation took from the base."""
    return changes_base(init) and _known_name(init) not in _DERIVED_INITS


def takes_from_base(document: Mapping[str, Any]) -> bool:
    """Whether an adapter of this configuration trained against a changed base."""
    return bool(document.get("kasa_config")) or changes_base(document.get("init_lora_weights", True))


def rounds_base(document: Mapping[str, Any]) -> bool:
    """Whether PEFT rounded the base in memory before it trained the adapter, so that no checkpoint holds that base."""
    return document.get("init_lora_weights") == _LOFTQ


def _known_name(init: str) -> str:
    """PEFT takes some names in any case, others as they are."""
    return init.lower() if init.lower() in _ANY_CASE else init


def _config_problems(document: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{name} is {document[name]!r:.80}, must be true or false"
        for name in _FLAGS
        if not isinstance(document.get(name) or False, bool)
    ]
    if document.get("use_dora") and document.get("lora_bias"):
        problems.append("lora_bias cannot be combined with use_dora; PEFT refuses it, too")
    return [*problems, *_init_problems(document), *_block_problems(document), *_kasa_problems(document)]


def _init_problems(document: Mapping[str, Any]) -> list[str]:
    init = document.get("init_lora_weights", True)
    if init is None or isinstance(init, bool):
        return []
    if not isinstance(init, str):
        return [f"init_lora_weights is {init!r:.80}, must be true, false or a name"]
    name = _known_name(init)
    known = (*_PLAIN_INITS, *_DERIVED_INITS, *_RECORDED_INITS)
    if name not in known and not _PISSA_NITER.fullmatch(name):
        return [f"init_lora_weights is {init!r:.80}, must be one of {', '.join(known)} or pissa_niter_N"]
    return []


def _block_problems(document: Mapping[str, Any]) -> list[str]:
    blocks = document.get("use_bdlora")
    if blocks is None or blocks is False or blocks == {}:
        return []
    if not isinstance(blocks, dict) or not set(blocks) <= _BLOCK_FIELDS:
        return [f"use_bdlora must be an object with {', '.join(sorted(_BLOCK_FIELDS))}"]
    problems = []
    count = blocks.get("nblocks", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _MAX_BLOCKS:
        problems.append(f"use_bdlora.nblocks is {count!r:.80}, must be an integer from 1 to {_MAX_BLOCKS}")
    for name in ("target_modules_bd_a", "target_modules_bd_b"):
        entries = blocks.get(name) or []
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            problems.append(f"use_bdlora.{name} must be a list of names")
    if document.get("use_dora") or document.get("kasa_config"):
        problems.append("use_bdlora cannot be combined with use_dora or kasa_config")
    return problems


def _kasa_problems(document: Mapping[str, Any]) -> list[str]:
    kasa = document.get("kasa_config")
    if not kasa:
        return []
    if not isinstance(kasa, dict):
        return ["kasa_config must be an object"]
    if document.get("use_dora") or changes_base(document.get("init_lora_weights")):
        return ["kasa_config cannot be combined with use_dora or an initialisation that changes the base"]
    return []


def _shapes(target: Target, present: Mapping[str, Shape]) -> dict[str, Shape]:
    spec, document = target.spec, target.config.document
    rank = target.config.rank_of(target.path)
    down, up = ("embedding_a", "embedding_b") if spec.kind == "embedding" else ("a", "b")
    shapes: dict[str, Shape] = {down: (rank, spec.in_features), up: (spec.out_features, rank)}
    if spec.kind == "conv":
        ones = (1,) * len(spec.kernel)
        shapes["a"] = (rank, spec.in_features, *spec.kernel)
        shapes["b"] = (spec.out_features, max(1, rank // spec.groups), *ones)
    if spec.kind == "attention":
        shapes |= {"a2": (rank, spec.in_features), "b2": (spec.in_features, rank)}
    for side in _block_sides(target):
        count = document["use_bdlora"].get("nblocks", 1)
        shapes[side] = (shapes[side][0], shapes[side][1] // count)
    if document.get("lora_bias"):
        shapes["b_bias"] = (spec.out_features,)
    if document.get("use_dora"):
        ones = (1,) * len(spec.kernel)
        shapes["magnitude"] = (1, spec.out_features, *ones) if spec.kind == "conv" else (spec.out_features,)
    if document.get("kasa_config"):
        shapes["diag"] = (rank,)
    if spec.kind != "embedding" and ("a0" in present or "b0" in present):
        shapes |= {"a0": shapes["a"], "b0": shapes["b"]}
    return shapes


def _block_sides(target: Target) -> list[str]:
    """Which of A and B is stored as diagonal blocks: PEFT looks for the names anywhere in the module's."""
    blocks = target.config.document.get("use_bdlora")
    if not isinstance(blocks, dict) or target.spec.kind != "linear":
        return []
    sides = (("a", blocks.get("target_modules_bd_a")), ("b", blocks.get("target_modules_bd_b")))
    return [side for side, names in sides if any(name in target.path for name in names or ())]


def _delta(target: Target, tensors: Mapping[str, torch.Tensor], weights: Weights) -> ModuleDelta:
    document = target.config.document
    scaling = target.config.scaling_of(target.path, target.config.rank_of(target.path))
    a, b = _whole_factors(target, tensors)
    plain = ModuleDelta(a=a, b=b, scaling=scaling, a2=tensors.get("a2"), b2=tensors.get("b2"))
    if "b_bias" in tensors:
        shift = tensors["b_bias"].float() * scaling
        activated = bool(document.get("alora_invocation_tokens"))
        plain = replace(plain, active_shift=shift) if activated else replace(plain, shift=shift)
    delta = _without(plain, _taken_from_base(target, tensors, weights))
    return _with_magnitude(target, delta, tensors["magnitude"], weights) if "magnitude" in tensors else delta


def _whole_factors(target: Target, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B without diagonal blocks and KaSA's diagonal."""
    if target.spec.kind == "embedding":
        return tensors["embedding_a"], tensors["embedding_b"]
    a, b = tensors["a"], tensors["b"]
    for side in _block_sides(target):
        count = target.config.document["use_bdlora"].get("nblocks", 1)
        a, b = (_unblocked(a, count), b) if side == "a" else (a, _unblocked(b, count))
    if "diag" in tensors:
        a = a.float() * tensors["diag"].float()[:, None]
    return a, b


def _without(delta: ModuleDelta, taken: Factors | None) -> ModuleDelta:
    """``delta`` less what training took out of the base: twice the rank, the scaling folded in."""
    if taken is None or delta.a is None or delta.b is None:
        return delta
    a = torch.cat([delta.a.float(), taken.a.float()])
    b = torch.cat([delta.b.float() * delta.scaling, -taken.b.float()], dim=1)
    return replace(delta, a=a, b=b, scaling=1.0, uncertainty=taken.uncertainty)


def _taken_from_base(target: Target, tensors: Mapping[str, torch.Tensor], weights: Weights) -> Factors | None:
    """``A_0`` and ``s B_0``, whose product the adapter's training took out of the base; None where it took nothing."""
    config = target.config
    init = config.document.get("init_lora_weights", True)
    rank = config.rank_of(target.path)
    if target.spec.kind != "linear" or not takes_from_base(config.document):
        return None
    if config.document.get("kasa_config"):
        return weights.smallest(target.base_path, rank)
    scaling = config.scaling_of(target.path, rank)
    if "a0" in tensors:
        return Factors(tensors["a0"], tensors["b0"].float() * scaling)
    if init.lower() == "pissa":
        return weights.largest(target.base_path, rank)
    basis = weights.column_basis(target.base_path, rank)
    return Factors(basis.a, basis.b * scaling)


def _unblocked(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` diagonal blocks, stored one below the other -> the whole matrix."""
    whole: torch.Tensor = torch.block_diag(*blocks.chunk(count))  # type: ignore[no-untyped-call]
    return whole


def _with_magnitude(target: Target, delta: ModuleDelta, magnitude: torch.Tensor, weights: Weights) -> ModuleDelta:
    """DoRA: the output without bias times ``m / ||W_0 + s B A||``, a constant of the adapter."""
    assert delta.a is not None and delta.b is not None
    weight = weights.weight(target.base_path)
    if target.spec.kind == "embedding":
        weight = weight.t()
    product = delta.b.float().flatten(1) @ delta.a.float().flatten(1) * delta.scaling
    norm = (weight.flatten(1) + product).norm(dim=1)
    gain = magnitude.float().flatten() / norm
    bias = weights.bias(target.base_path)
    shift = None if bias is None else (1 - gain) * bias
    return replace(delta, gain=gain, shift=shift)


TUNER = Tuner(
    served=frozenset(
        {
            "alora_invocation_tokens",
            "alpha_pattern",
            "ensure_weight_tying",
            "init_lora_weights",
            "kasa_config",
            "lora_alpha",
            "lora_bias",
            "r",
            "rank_pattern",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_dora",
            "use_rslora",
        }
    ),
    harmless=frozenset(
        {
            "corda_config",
            "eva_config",
            "loftq_config",
            "lora_dropout",
            "lora_ga_config",
            "megatron_core",
            "monteclora_config",
            "qalora_group_size",
            "runtime_config",
            "velora_config",
        }
    ),
    kinds=frozenset({"linear", "embedding", "conv", "attention"}),
    roles={
        "lora_A.weight": "a",
        "lora_B.weight": "b",
        "lora_B.bias": "b_bias",
        "lora_embedding_A": "embedding_a",
        "lora_embedding_B": "embedding_b",
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.weight": "magnitude",
        "lora_diag": "diag",
    },
    config_problems=_config_problems,
    shapes=_shapes,
    delta=_delta,
)
