"""The right answer of a mix, by another way than ours: PEFT merges each adapter into a copy of the base of its own, in
float64, and the copies' distances from the base are added up weight by weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adapter_router.errors import AdapterRejected
from adapter_router.types import Row, RowResult, TaskKind
from tests.parity.bases import CLASSIFYING
from tests.parity.build import Adapter
from tests.parity.configs import generator
from tests.parity.oracle import Features, exact_svd, random_inputs, rounding, run_exactly
from tests.parity.world import Base, adapters_on, make_base, start, unchanged

TOLERANCE = 2e-4
NO_SUM = (
    "trainable_token_indices",
    "aLoRA",
    "convolution in groups",
    "scaled inputs (IA3)",
    "is replaced as a whole",
    "cancel the base's output",
)
"""What a refused mix must be refused for."""
_EACH = 16


def _untied(model: Any) -> Any:
    """A float64 copy whose output layer has a weight of its own: merging shall not change what it is tied to."""
    model = copy.deepcopy(model).double()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    output = base.get_output_embeddings()
    if output is not None and output.weight is base.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.clone())
    return model


@lru_cache(64)
def _merged(adapter: Adapter) -> dict[str, torch.Tensor]:
    """All weights with the adapter in them."""
    with exact_svd():
        return dict(_untied(adapter.alone).merge_and_unload().state_dict())


def _saved_modules(adapter: Adapter) -> tuple[str, ...]:
    modules = adapter.alone.named_modules()
    return tuple(f"{p.removeprefix('base_model.model.')}." for p, m in modules if hasattr(m, "modules_to_save"))


def _is_head(base: Base, name: str) -> bool:
    if base.task not in (*CLASSIFYING, "question-answering"):
        return False
    return "pooler" in name or any(name.startswith(head + ".") for head in base.architecture.heads_of(base.task))


def _mixed(mix: Mapping[Adapter, float], head: Adapter) -> Any:
    """A float64 model of W + sum of w_i (W_i - W), the task's head as it is in ``head``."""
    base = head.site.base
    model = _untied(base.pristine(head.site.labels))
    own = model.state_dict()
    total = {name: tensor.clone() for name, tensor in own.items()}
    for adapter, weight in mix.items():
        for name, tensor in _merged(adapter).items():
            if _is_head(base, name) and name.startswith(_saved_modules(adapter)):
                if adapter is head:
                    total[name] = tensor
            elif tensor.is_floating_point() and tensor.shape == own[name].shape:
                total[name] += weight * (tensor - own[name])
    model.load_state_dict(total)
    return model


def _mergeable(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Those that PEFT can merge by itself: it must give the right answer alone, and change nothing by merging."""
    good = []
    for adapter in adapters:
        if adapter.recipe.oracle != "alone":
            continue
        row = random_inputs(adapter.site.base, generator("probe", adapter.name), adapter.planted)
        try:
            alone = run_exactly(_mixed({adapter: 1.0}, adapter), row, adapter.site.base.task)
        except (ValueError, KeyError, RuntimeError, AttributeError, NotImplementedError):
            continue
        if adapter.planted or _off(adapter.logits(row), alone) <= TOLERANCE:
            good.append(adapter)
    return good


def in_mixes(
    architecture: str, task: TaskKind, seed: int, root: Path, names: Iterable[str] | None = None
) -> tuple[int, list[str]]:
    """Random pairs and triples in one batch: how many were compared, and what is wrong.

    ``names``: recipes to mix, by default this seed's share of them all.
    """
    base = make_base(architecture, task, seed, root)
    rng = generator("mixes", architecture, task, seed)
    with start(base) as engine, unchanged(engine.base.model):
        adapters = []
        for adapter in adapters_on(base, root, names):
            try:
                engine.load_adapter(adapter.name, adapter.directory, task=adapter.task)
            except AdapterRejected:
                continue
            adapters.append(adapter)
        adapters = _mergeable(adapters)
        asked: list[tuple[dict[Adapter, float], Adapter, Features]] = []
        for _ in range(_EACH):
            chosen = rng.sample(adapters, rng.choice((2, 2, 3)))
            weights = {adapter: round(rng.uniform(-1, 1), 2) for adapter in chosen}
            asked.append((weights, rng.choice(chosen), random_inputs(base, rng, chosen[0].planted)))
        rows = [
            Row(
                features,
                {adapter.name: weight for adapter, weight in weights.items()},
                parameters=_parameters(task),
                head=head.name,
            )
            for weights, head, features in asked
        ]
        parents = [(adapter, random_inputs(base, rng, adapter.planted)) for adapter in adapters]
        answers = engine.infer([*rows, *(Row(row, who.name, parameters=_parameters(task)) for who, row in parents)])
    results, own = answers[: len(rows)], answers[len(rows) :]
    compared = 0
    problems = [
        f"{who.name} beside its mixes: {result}"
        for (who, row), result in zip(parents, own, strict=True)
        if not (isinstance(result, RowResult) and _equals_alone(result.logits, who, row))
    ]
    for (weights, head, features), row, result in zip(asked, rows, results, strict=True):
        name = f"{row.adapter} with the head of {row.head}"
        if isinstance(result, AdapterRejected):
            if not all(any(reason in problem for reason in NO_SUM) for problem in result.problems):
                problems.append(f"{name}: refused: {result}")
            continue
        compared += 1
        if not isinstance(result, RowResult):
            problems.append(f"{name}: {result}")
            continue
        error = _wrong_by(result.logits, _mixed(weights, head), features, task)
        if not error <= TOLERANCE:  # not a number is no answer either
            problems.append(f"{name}: off by {error:.2g} of its size")
    return compared, problems


def _parameters(task: TaskKind) -> dict[str, str]:
    return {"pooling": "none"} if task == "embedding" else {}


def _equals_alone(logits: np.ndarray, who: Adapter, row: Features) -> bool:
    """As PEFT alone, or where its own float32 rounding is what differs, as its answer in float64."""
    return (
        _off(logits, who.logits(row)) <= TOLERANCE or _wrong_by(logits, who.alone, row, who.site.base.task) <= TOLERANCE
    )


def _wrong_by(logits: np.ndarray, model: Any, row: Features, task: TaskKind) -> float:
    """How far from the model in float64, relative to the largest logit; 0.0 if float32 takes the model there."""
    right = run_exactly(model, row, task)
    error = _off(logits, right)
    if error <= TOLERANCE:
        return error
    return 0.0 if np.abs(logits - right).max() <= 2 * rounding(model, row, task, right) else error


def _off(logits: np.ndarray, right: np.ndarray) -> float:
    """The largest difference, relative to the largest logit where that is above 1."""
    return float(np.abs(logits - right).max() / max(1.0, float(np.abs(right).max())))
