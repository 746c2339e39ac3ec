"""The four shipped adapters on the real MiniLM: mixed == PEFT alone, and as good as the README says."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adapter_router.catalog.location import resolve
from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.types import Row, RowOutcome, RowResult
from deployments.demo.tenants import ADAPTERS, BASE, BASE_SHA256
from examples.tenant_data import TENANTS
from tests.serving import Application
from tests.tiny import weights_digest

BASE_FOLDER = resolve(BASE)
NAMES = list(ADAPTERS)


@cache
def held_out(tenant: str) -> list[tuple[str, str]]:
    return TENANTS[tenant]()[1]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """24 held-out rows of each tenant, shuffled."""
    chosen = [Row(text, name) for name in NAMES for text, _ in random.Random(0).sample(held_out(name), 24)]
    random.Random(1).shuffle(chosen)
    return chosen


@pytest.fixture(scope="module")
def alone(rows: list[Row]) -> list[np.ndarray]:
    """Each row's logits from PEFT with its adapter alone on a fresh base."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    models = {name: _peft_alone(name) for name in ADAPTERS}
    with torch.inference_mode():
        return [
            models[str(row.adapter)](**tokenizer(row.inputs, return_tensors="pt")).logits[0].numpy() for row in rows
        ]


def _peft_alone(tenant: str) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(BASE_FOLDER, num_labels=NUM_LABELS[tenant])
    return PeftModel.from_pretrained(model, resolve(ADAPTERS[tenant])).eval()


NUM_LABELS = {"smart-home": 10, "helpdesk": 6, "language": 10, "guardrail": 2}


def check(outcomes: list[RowOutcome], alone: list[np.ndarray]) -> None:
    for outcome, expected in zip(outcomes, alone, strict=True):
        assert isinstance(outcome, RowResult), outcome
        assert outcome.logits.shape == expected.shape
        assert np.abs(outcome.logits - expected).max() <= 1e-4
        assert outcome.logits.argmax() == expected.argmax()


def test_96_mixed_rows_equal_peft_alone_also_after_eviction(
    real_engine: Engine, rows: list[Row], alone: list[np.ndarray]
) -> None:
    before = weights_digest(real_engine.base.model)
    check(real_engine.infer(rows), alone)
    for digest in real_engine.resident():
        real_engine.evict(digest)
    check(real_engine.infer(rows), alone)
    assert weights_digest(real_engine.base.model) == before


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1], ["language", "smart-home", "guardrail", "helpdesk"]])
def test_load_order_does_not_matter(order: list[str], rows: list[Row], alone: list[np.ndarray]) -> None:
    with Engine(EngineConfig(base=BASE, base_sha256=BASE_SHA256, device="cpu")) as engine:
        for name in order:
            engine.load_adapter(name, ADAPTERS[name])
        check(engine.infer(rows), alone)


@pytest.mark.serve
def test_the_same_through_the_handle(app: Application, rows: list[Row], alone: list[np.ndarray]) -> None:
    check(app.infer_many(rows), alone)


@pytest.mark.serve
def test_the_same_through_http(app: Application, rows: list[Row], alone: list[np.ndarray]) -> None:
    for row, expected in zip(rows, alone, strict=True):
        body = {"model": row.adapter, "input": row.inputs, "use_activation": False}
        answer = app.http.post("/v1/classify", json=body).raise_for_status().json()
        (entry,) = answer["data"]
        assert np.abs(np.array(entry["probs"]) - expected).max() <= 1e-4
        assert int(np.argmax(entry["probs"])) == expected.argmax()


@pytest.fixture(scope="module")
def readme_accuracies() -> Iterator[dict[str, float]]:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    yield {name: float(value) for name, value in re.findall(r"^\| `([\w-]+)` \|.*\| (0\.\d+) \|$", readme, re.M)}


@pytest.mark.parametrize("tenant", NAMES)
def test_held_out_accuracy_is_what_the_readme_says(
    tenant: str, real_engine: Engine, readme_accuracies: dict[str, float]
) -> None:
    rows = held_out(tenant)
    outcomes = real_engine.infer([Row(text, tenant) for text, _ in rows])
    right = [
        o.output["label"] == label for o, (_, label) in zip(outcomes, rows, strict=True) if isinstance(o, RowResult)
    ]
    assert len(right) == len(rows)
    assert sum(right) / len(rows) == pytest.approx(readme_accuracies[tenant], abs=0.006)


def test_another_base_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 0000"):
        Engine(EngineConfig(base=BASE, base_sha256="0" * 64, device="cpu"))


def test_cpu_replicas_share_the_pages_of_the_base(real_engine: Engine) -> None:
    """Every large weight lies in a mapping of the checkpoint's own file, so the page cache holds it once a node."""
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "model.safetensors" in line or "blobs" in line:
            low, high = line.split()[0].split("-")
            mappings.append((int(low, 16), int(high, 16)))
    weights = [p for name, p in real_engine.base.model.named_parameters() if name.startswith("bert.") and p.dim() > 1]
    assert mappings and all(any(low <= p.data_ptr() < high for low, high in mappings) for p in weights)
