"""Whose head the result has: the saved modules above the backbone, label names and settings, which have no sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapter_router.adapters.base_spec import BaseSpec
from adapter_router.adapters.keys import listed
from adapter_router.merging.loading import LoadedPart
from adapter_router.merging.request import HeadPolicy
from adapter_router.types import Activation, EmbeddingSettings

_CHOICES = "choose a head policy: keep=NAME, or average where all have the same labels"
Saved = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Head:
    """``saved``: parameters of the head's saved modules by path and name inside, as in ``AdapterDelta``."""

    saved: Saved
    labels: tuple[str, ...]
    activation: Activation
    embedding: EmbeddingSettings


def head_problems(parts: Sequence[LoadedPart], policy: HeadPolicy, spec: BaseSpec) -> list[str]:
    """Why the policy gives the result no head. ``parts`` are not empty and serve one task."""
    if policy.kind == "keep":
        return []
    if policy.kind == "average":
        return _unequal(parts, spec)
    heads = {part.name: sorted(_head_of(part, spec).saved) for part in parts}
    if bringing := [f"{name} ({listed(paths)})" for name, paths in heads.items() if paths]:
        return [f"heads cannot be summed: {'; '.join(bringing)}; {_CHOICES}"]
    return [f"{problem}; {_CHOICES}" for problem in _unequal_settings(parts)]


def choose_head(parts: Sequence[LoadedPart], policy: HeadPolicy, spec: BaseSpec) -> Head:
    """The result's head, where ``head_problems`` finds none."""
    if policy.kind == "average":
        return _average(parts, spec)
    if policy.kind == "keep":
        kept = [part for part in parts if part.name == policy.part]
        return _head_of(kept[0], spec) if kept else no_head(parts[0])
    return _head_of(parts[0], spec)


def no_head(part: LoadedPart) -> Head:
    """Labels and settings of ``part``, to ask what else there is to know where no head can be chosen."""
    return Head({}, part.tensors.labels, part.tensors.activation, part.tensors.embedding)


def changed_heads(parts: Sequence[LoadedPart], policy: HeadPolicy, spec: BaseSpec) -> list[str]:
    """Warnings: what adds to a head is summed like everything else, whosever head was chosen."""
    if policy.kind == "refuse":
        return []
    changed = {part.name: [path for path in part.delta.modules if spec.is_head(path)] for part in parts}
    return [
        f"{name} changes the head by LoRA or biases ({listed(paths, 3)}): that is summed by weight, --head {policy} "
        "only governs saved modules"
        for name, paths in changed.items()
        if paths
    ]


def _head_of(part: LoadedPart, spec: BaseSpec) -> Head:
    saved = {path: module for path, module in part.delta.saved.items() if spec.is_head(path)}
    return Head(saved, part.tensors.labels, part.tensors.activation, part.tensors.embedding)


def _unequal_settings(parts: Sequence[LoadedPart]) -> list[str]:
    first, *others = parts
    problems = []
    for name in ("labels", "activation", "embedding"):
        own = getattr(first.tensors, name)
        different = [part.name for part in others if getattr(part.tensors, name) != own]
        if different:
            problems.append(f"{first.name} and {listed(different)} do not have the same {name}, in the same order")
    return problems


def _unequal(parts: Sequence[LoadedPart], spec: BaseSpec) -> list[str]:
    """What keeps heads from being averaged."""
    first, *others = parts
    problems = [f"head policy average: {problem}" for problem in _unequal_settings(parts)]
    own = _shapes(first, spec)
    for part in others:
        shapes = _shapes(part, spec)
        if different := sorted({name for name in own.keys() | shapes if own.get(name) != shapes.get(name)}):
            problems.append(
                f"head policy average: the heads of {first.name} and {part.name} differ in names or shapes: "
                f"{listed(different)}"
            )
    return problems


def _shapes(part: LoadedPart, spec: BaseSpec) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in _parameters(part, spec).items()}


def _parameters(part: LoadedPart, spec: BaseSpec) -> dict[str, torch.Tensor]:
    """By full names: one adapter may save a head as a whole, another all its pieces."""
    saved = _head_of(part, spec).saved
    return {f"{path}.{name}": tensor for path, module in saved.items() for name, tensor in module.items()}


def _average(parts: Sequence[LoadedPart], spec: BaseSpec) -> Head:
    """``sum_i w_i t_i / sum_i w_i`` of every tensor, float32."""
    total = sum(part.weight for part in parts)
    own = [(_parameters(part, spec), part.weight / (total or 1)) for part in parts]  # 0: others were refused

    def mean(name: str) -> torch.Tensor:
        return torch.stack([parameters[name].double() * share for parameters, share in own]).sum(dim=0).float()

    first = _head_of(parts[0], spec)
    saved = {path: {name: mean(f"{path}.{name}") for name in module} for path, module in first.saved.items()}
    return Head(saved, first.labels, first.activation, first.embedding)
