"""The shipped adapters of every task on the real bases: one forward for all of them, each as PEFT alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from adapter_router.catalog.location import resolve
from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.types import Row, RowResult
from deployments.demo.tenants import ADDRESSES, BASE, IMAGE_TENANTS, QUESTIONS, SAMPLES, TEXT_TENANTS, VISION_BASE
from examples.tenant_data import TENANTS
from tests.tiny import weights_digest

PATHS = {tenant.name: resolve(tenant.path) for tenant in (*TEXT_TENANTS, *IMAGE_TENANTS)}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(EngineConfig(base=BASE, device="cpu")) as engine:
        for tenant in TEXT_TENANTS:
            engine.load_adapter(tenant.name, tenant.path)
        yield engine


@pytest.fixture(scope="module")
def images() -> Iterator[Engine]:
    with Engine(EngineConfig(base=VISION_BASE, device="cpu")) as engine:
        for tenant in IMAGE_TENANTS:
            engine.load_adapter(tenant.name, tenant.path)
        yield engine


def results_of(engine: Engine, rows: list[Row]) -> list[RowResult]:
    outcomes = engine.infer(rows)
    assert all(isinstance(outcome, RowResult) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, RowResult)]


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve(BASE))


def test_four_tasks_of_seven_tenants_share_one_forward(engine: Engine) -> None:
    rows = [Row(text, tenant.name) for tenant in TEXT_TENANTS for text in tenant.samples[:4]]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    before, weights = engine.metrics.forwards._value.get(), weights_digest(engine.base.model)
    mixed = results_of(engine, rows)
    assert engine.metrics.forwards._value.get() == before + 1
    for row, result in zip(rows, mixed, strict=True):
        (alone,) = results_of(engine, [row])
        np.testing.assert_allclose(result.logits, alone.logits, atol=1e-4)
    assert weights_digest(engine.base.model) == weights


def test_the_tagger_equals_peft_alone_and_finds_the_parts(engine: Engine) -> None:
    base = AutoModelForTokenClassification.from_pretrained(resolve(BASE), num_labels=22)
    alone = PeftModel.from_pretrained(base, PATHS["addresses"]).eval()
    results = results_of(engine, [Row(text, "addresses") for text in ADDRESSES])
    for text, result in zip(ADDRESSES, results, strict=True):
        with torch.inference_mode():
            expected = alone(**tokenizer()(text, return_tensors="pt")).logits[0]
        np.testing.assert_allclose(result.logits, expected, atol=1e-4)
    entities = results[0].output["entities"]  # type: ignore[typeddict-item]
    found = {entity["entity_group"]: ADDRESSES[0][entity["start"] : entity["end"]] for entity in entities}
    assert found["AddressNumber"] == "742" and found["ZipCode"] == "62704" and found["StateName"] == "IL"


def test_the_answerer_equals_peft_alone_and_is_right(engine: Engine) -> None:
    base = AutoModelForQuestionAnswering.from_pretrained(resolve(BASE))
    alone = PeftModel.from_pretrained(base, PATHS["address-questions"]).eval()
    results = results_of(engine, [Row(pair, "address-questions") for pair in QUESTIONS])
    for pair, result in zip(QUESTIONS, results, strict=True):
        with torch.inference_mode():
            output = alone(**tokenizer()(*pair, return_tensors="pt"))
        expected = torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)
        np.testing.assert_allclose(result.logits, expected, atol=1e-4)
    answers = [result.output["answers"][0]["answer"] for result in results]  # type: ignore[typeddict-item]
    assert (answers[0], answers[1], answers[6]) == ("62704", "1600", "NE")


def test_the_embedder_equals_peft_alone_and_finds_the_same_intent(engine: Engine) -> None:
    alone = PeftModel.from_pretrained(AutoModel.from_pretrained(resolve(BASE)), PATHS["intent-search"]).eval()
    text = SAMPLES["smart-home"][0]
    (result,) = results_of(engine, [Row(text, "intent-search")])
    with torch.inference_mode():
        pooled = alone(**tokenizer()(text, return_tensors="pt")).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(result.logits, torch.nn.functional.normalize(pooled, dim=0), atol=1e-5)
    train, held_out = TENANTS["smart-home"]()
    known, asked = train[:300], held_out[:60]
    vectors = [r.logits for r in results_of(engine, [Row(t, "intent-search") for t, _ in (*known, *asked)])]
    nearest = np.argmax(np.stack(vectors[len(known) :]) @ np.stack(vectors[: len(known)]).T, axis=1)
    hits = sum(known[index][1] == label for index, (_, label) in zip(nearest, asked, strict=True))
    assert hits / len(asked) > 0.85


def test_a_bare_base_and_an_adapter_embed_beside_each_other(engine: Engine) -> None:
    rows = [Row("lights off", None, "embedding"), Row("lights off", "intent-search")]
    rows.append(Row("lights off", "intent-search", parameters={"dimensions": 64, "normalize": True}))
    bare, adapted, short = (result.logits for result in results_of(engine, rows))
    assert np.abs(bare - adapted).max() > 1e-2 and len(short) == 64
    np.testing.assert_allclose(short, adapted[:64] / np.linalg.norm(adapted[:64]), atol=1e-6)


def test_image_tenants_equal_peft_alone_and_are_right(images: Engine) -> None:
    rows = [(Row(image, tenant.name), label) for tenant in IMAGE_TENANTS for image, label in tenant.images]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    results = results_of(images, [row for row, _ in rows])
    assert images.metrics.forwards._value.get() == 1
    for (row, label), result in zip(rows, results, strict=True):
        assert result.output["label"] == label  # type: ignore[typeddict-item]
        pixels = images.base.encoder.encode(row).features["pixel_values"]
        with torch.inference_mode():
            expected = _image_model(str(row.adapter), len(result.logits))(pixel_values=torch.from_numpy(pixels)[None])
        np.testing.assert_allclose(result.logits, expected.logits[0], rtol=1e-5, atol=1e-5)


@cache
def _image_model(name: str, num_labels: int) -> Any:
    base = AutoModelForImageClassification.from_pretrained(
        resolve(VISION_BASE), num_labels=num_labels, ignore_mismatched_sizes=True
    )
    return PeftModel.from_pretrained(base, PATHS[name]).eval()
