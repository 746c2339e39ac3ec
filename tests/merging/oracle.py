"""PEFT's own merges, and the formulas in float64, both as changes of weights by module path: (out, in), flattened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.linalg import norm
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel

from adapter_router.merging.merge import merge
from adapter_router.merging.report import MergeReport
from adapter_router.merging.request import HeadPolicy, MergeRequest, Part
from tests.merging.bases import MergeBase

Changes = dict[str, np.ndarray]
SEED = 11


def ours(
    base: MergeBase, paths: Sequence[Path], weights: Sequence[float], kind: str, **options: Any
) -> tuple[Changes, MergeReport]:
    """Our merge, read by PEFT's loader."""
    out = base.new()
    report = merge(request(paths, weights, kind, **options), base.loaded, out)
    return changes(PeftModel.from_pretrained(base.fresh(), out), "default"), report


def request(paths: Sequence[Path], weights: Sequence[float], kind: str, **options: Any) -> MergeRequest:
    """Parts are called ``0``, ``1``…."""
    parts = tuple(Part(str(i), str(path), weight) for i, (path, weight) in enumerate(zip(paths, weights, strict=True)))
    options = {"seed": SEED, "head": HeadPolicy.parse(options.pop("head", "refuse")), **options}
    return MergeRequest(parts, kind, **options)  # type: ignore[arg-type]


def theirs(model: PeftModel, weights: Sequence[float], kind: str, **options: Any) -> Changes:
    """PEFT's merge of the adapters ``0``, ``1``…, its random numbers started right before the first is drawn."""
    inject = LoraModel.inject_adapter

    def inject_and_seed(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)
        torch.manual_seed(SEED)

    names = [str(index) for index in range(len(weights))]
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    with mock.patch.object(LoraModel, "inject_adapter", inject_and_seed):
        model.add_weighted_adapter(names, list(weights), "merged", combination_type=kind, **options)
    return changes(model, "merged")


def theirs_cut_in_float64(model: PeftModel, weights: Sequence[float], kind: str, **options: Any) -> Changes:
    """PEFT's merge, with singular vectors in float64: where two singular values nearly meet, float32 mixes them."""
    svd = torch.linalg.svd

    def exact(matrix: torch.Tensor, **_: Any) -> list[torch.Tensor]:
        return [part.float() for part in svd(matrix.double(), full_matrices=False)]

    with mock.patch.object(torch.linalg, "svd", exact):
        return theirs(model, weights, kind, **options)


def changes(model: PeftModel, name: str) -> Changes:
    """What the adapter ``name`` adds to each weight, float64, by the formula of the forward pass."""
    found = {}
    for path, layer in model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        elif name in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        else:
            continue
        product = b.detach().double().flatten(1) @ a.detach().double().flatten(1)
        found[path] = (product * layer.scaling[name]).numpy()
    return found


def exact_sum(model: PeftModel, weights: Sequence[float]) -> Changes:
    """``sum_i w_i s_i B_i A_i`` in float64."""
    total: Changes = {}
    for index, weight in enumerate(weights):
        for path, change in changes(model, str(index)).items():
            total[path] = total.get(path, 0) + weight * change
    return total


def distance(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """||difference|| / ||expected|| of the worst module."""
    assert found.keys() == expected.keys()
    return max(float(norm(found[path] - change) / max(norm(change), 1e-12)) for path, change in expected.items())


def alone(base: MergeBase, directory: Path) -> Changes:
    """What PEFT, with nothing but this adapter on a fresh base, makes of every parameter: the difference, float64."""
    return folded(base, PeftModel.from_pretrained(base.fresh(), directory))


def folded(base: MergeBase, model: PeftModel) -> Changes:
    """The active adapter's effect on every parameter of the base, heads that it replaces included."""
    before = {name: tensor.double().numpy() for name, tensor in base.fresh().state_dict().items()}
    after = {name: tensor.double().numpy() for name, tensor in model.merge_and_unload().state_dict().items()}
    return {name: after[name] - tensor for name, tensor in before.items() if name in after}


def weighted(base: MergeBase, paths: Sequence[Path], weights: Sequence[float]) -> Changes:
    """``sum_i w_i (W_i - W)`` of every parameter, each adapter alone on a fresh base."""
    parts = [alone(base, path) for path in paths]
    return {name: sum(w * part[name] for w, part in zip(weights, parts, strict=True)) for name in parts[0]}


def relative(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """||difference|| / ||expected|| of all parameters together."""
    difference = sum(float(np.square(found[name] - change).sum()) for name, change in expected.items())
    return float(np.sqrt(difference / sum(float(np.square(change).sum()) for change in expected.values())))
