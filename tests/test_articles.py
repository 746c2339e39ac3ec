"""The published failures of PEFT that this project exists to end, each under its own name.

0  peft#2270, #2184   PiSSA adapters loaded one after another predict differently from each loaded alone
1  peft#2206          ``modules_to_save`` of one adapter leaks into the next
3  peft#1960          in a mixed batch every row gets the active adapter's classifier
4  peft#1746          an adapter whose shapes do not fit is silently half applied
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config

from adapter_router.catalog.location import resolve
from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterNotFound, AdapterRejected
from adapter_router.types import Row, RowResult
from deployments.demo.tenants import ADAPTERS, BASE
from examples.tenant_data import TENANTS
from tests.tiny import TinyBase, edit_config, edit_tensors, random_features, weights_digest

PISSA = {name: Path(__file__).parent / "data" / "pissa" / name for name in ("smart-home", "helpdesk")}
LABELS = {"smart-home": 10, "helpdesk": 6}


def logits_of(engine: Engine, rows: list[Row]) -> np.ndarray:
    """Logits side by side, padded with zeros to the widest."""
    results = engine.infer(rows)
    assert all(isinstance(result, RowResult) for result in results), results
    width = max(len(r.logits) for r in results if isinstance(r, RowResult))
    return np.stack([np.pad(r.logits, (0, width - len(r.logits))) for r in results if isinstance(r, RowResult)])


@pytest.fixture(scope="module")
def questions() -> list[tuple[str, str]]:
    """300 held-out texts, each for the adapter of its tenant."""
    rows = [(name, text) for name in PISSA for text, _ in TENANTS[name]()[1]]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:300]]


@pytest.fixture(scope="module")
def pissa_alone(questions: list[tuple[str, str]]) -> list[np.ndarray]:
    """PEFT with each PiSSA adapter alone on a fresh base."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(BASE))
    models = {}
    for name, directory in PISSA.items():
        base = AutoModelForSequenceClassification.from_pretrained(resolve(BASE), num_labels=LABELS[name])
        models[name] = PeftModel.from_pretrained(base, directory).eval()
    with torch.inference_mode():
        return [models[name](**tokenizer(text, return_tensors="pt")).logits[0].numpy() for name, text in questions]


def test_article_0_two_real_pissa_adapters_predict_as_each_alone(
    questions: list[tuple[str, str]], pissa_alone: list[np.ndarray]
) -> None:
    for order in itertools.permutations(PISSA):
        with Engine(EngineConfig(base=BASE, device="cpu")) as engine:
            before = weights_digest(engine.base.model)
            for name in order:
                engine.load_adapter(name, PISSA[name])
            # Plain neighbours: PEFT's own mixed batch has a PiSSA adapter corrupt them.
            engine.load_adapter("language", ADAPTERS["language"])
            neighbour = Row("Guten Morgen", "language")
            rows = [Row(text, name) for name, text in questions]
            results = engine.infer([row for row in rows for row in (row, neighbour)])
            (quiet,) = engine.infer([neighbour])
            assert weights_digest(engine.base.model) == before
        assert isinstance(quiet, RowResult)
        flipped, worst = 0, 0.0
        for result, expected in zip(results[::2], pissa_alone, strict=True):
            assert isinstance(result, RowResult), result
            flipped += int(np.argmax(result.logits) != np.argmax(expected))
            worst = max(worst, float(np.abs(result.logits - expected).max()))
        assert (flipped, worst < 1e-3) == (0, True), (flipped, worst)
        for result in results[1::2]:
            assert isinstance(result, RowResult)
            np.testing.assert_allclose(result.logits, quiet.logits, atol=1e-4)


def test_article_0_an_initialisation_that_cannot_be_undone_is_refused_with_the_remedy(
    tiny_bert: TinyBase, engine: Engine, tmp_path: Path
) -> None:
    directory = tiny_bert.adapter(tmp_path / "a", 3, 0, init_lora_weights="pissa_niter_4")
    with pytest.raises(AdapterRejected, match=r"initial/adapter_model\.safetensors"):
        engine.load_adapter("a", directory)


@pytest.mark.parametrize("order", list(itertools.permutations(["head", "wte"])))
def test_article_1_saved_modules_are_the_adapters_own(order: tuple[str, str], tmp_path: Path) -> None:
    """The issue's own case: GPT-2, one adapter with its own ``lm_head``, one with its own ``wte``."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=40, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    saved = {"head": ["lm_head"], "wte": ["wte"]}
    alone = {}
    for seed, (name, modules) in enumerate(saved.items()):
        torch.manual_seed(seed)
        fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "fan_in_fan_out": True}
        lora = LoraConfig(modules_to_save=modules, **fields)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(tmp_path / name)
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        alone[name] = PeftModel.from_pretrained(fresh, tmp_path / name).eval()
    features = random_features(np.random.default_rng(0))
    with Engine(EngineConfig(base=str(tmp_path / "base"), device="cpu")) as engine:
        before = weights_digest(engine.base.model)
        for name in order:
            engine.load_adapter(name, tmp_path / name)
            assert weights_digest(engine.base.model) == before
        for _ in range(2):  # again after one was unloaded and came back
            rows = [Row(features, name) for name in ("head", "wte", None, "wte", "head")]
            for row, result in zip(rows, engine.infer(rows), strict=True):
                model = alone[row.adapter] if row.adapter else AutoModelForCausalLM.from_pretrained(tmp_path / "base")
                with torch.inference_mode():
                    expected = model(**{k: torch.from_numpy(v)[None] for k, v in features.items()}).logits[0]
                assert isinstance(result, RowResult), result
                np.testing.assert_allclose(result.logits, expected, atol=1e-4)
            engine.unload_adapter(order[0])
            assert weights_digest(engine.base.model) == before
            engine.load_adapter(order[0], tmp_path / order[0])


def test_article_3_every_row_of_a_mixed_batch_has_its_own_classifier(real_engine: Engine) -> None:
    """Four real tenants of 10, 6, 10 and 2 labels, shuffled: caller's order, own heads, one forward."""
    rows = [Row(text, name) for name in ADAPTERS for text, _ in TENANTS[name]()[1][:8]]
    rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    before = real_engine.metrics.forwards._value.get()
    mixed = real_engine.infer(rows)
    assert real_engine.metrics.forwards._value.get() == before + 1
    for row, result in zip(rows, mixed, strict=True):
        (alone,) = real_engine.infer([row])
        assert isinstance(alone, RowResult) and isinstance(result, RowResult)
        assert result.adapter == row.adapter and result.logits.shape == alone.logits.shape
        np.testing.assert_allclose(result.logits, alone.logits, atol=1e-5)


def test_article_4_shapes_that_do_not_fit_leave_nothing_behind(
    tiny_bert: TinyBase, engine: Engine, tmp_path: Path
) -> None:
    """The issue's own case: an adapter of a pruned model, LoRA B narrower than the base's layer."""
    engine.load_adapter("good", tiny_bert.adapter(tmp_path / "good", 3, 0))
    row = Row(random_features(np.random.default_rng(0)), "good")
    quiet = logits_of(engine, [row])
    pruned = tiny_bert.adapter(tmp_path / "pruned", 3, 1)

    def prune(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("query.lora_B.weight"):
                tensors[name] = tensors[name][:12]

    edit_tensors(pruned, prune)
    resident = engine.resident()
    with pytest.raises(AdapterRejected) as refusal:
        engine.load_adapter("pruned", pruned)
    named = [problem for problem in refusal.value.problems if "query" in problem and "[12, 8]" in problem]
    assert len(named) == len(refusal.value.problems) == 2  # one for each layer
    assert engine.resident() == resident
    (gone,) = engine.infer([Row(row.inputs, "pruned")])
    assert isinstance(gone, AdapterNotFound)
    assert np.array_equal(logits_of(engine, [row]), quiet)


def test_article_4_ranks_and_scalings_by_layer_are_the_configurations(
    tiny_bert: TinyBase, engine: Engine, tmp_path: Path
) -> None:
    directory = tiny_bert.adapter(tmp_path / "a", 3, 0, rank_pattern={r"layer\.0.*query": 2, "value": 6})
    assert engine.load_adapter("a", directory).ranks == (2, 6, 8)
    edit_config(directory, rank_pattern={r"layer\.0.*query": 3, "value": 6})
    with pytest.raises(AdapterRejected, match=r"need \[3, 32\]"):
        engine.load_adapter("b", directory)
