"""The published failures of PEFT that this project exists to end, each under its own name.

0  peft#2270, #2184   PiSSA adapters loaded one after another predict differently from each loaded alone
1  peft#2206          ``modules_to_save`` of one adapter leaks into the next
2  peft#1943          ``add_weighted_adapter`` needs folklore, and its result is not the weighted sum
3  peft#1960          in a mixed batch every row gets the active adapter's classifier
4  peft#1746          an adapter whose shapes do not fit is silently half applied; LoftQ has one width for all layers
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config

from adapter_router.catalog.location import resolve
from adapter_router.config import EngineConfig, QuantizationConfig
from adapter_router.engine import Engine
from adapter_router.engine.base_model import BaseModel
from adapter_router.errors import AdapterNotFound, AdapterRejected
from adapter_router.merging.combination import COMBINATIONS
from adapter_router.merging.merge import merge
from adapter_router.merging.request import HeadPolicy, MergeRequest, Part
from adapter_router.types import Row, RowResult
from deployments.cli import main
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


_MIX = {"language": 0.7, "smart-home": -0.3}


def test_article_2_a_merge_and_a_mix_are_the_weighted_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two real adapters, in one batch with both parents: merged beforehand by one command, and mixed when asked."""
    command = ["merge", "--base", BASE, "--type", "cat", "--head", "keep=language", "--out", str(tmp_path / "merged")]
    for name, weight in _MIX.items():
        command += ["--adapter", name, ADAPTERS[name], str(weight)]
    assert main(command) == 0
    assert "off the exact weighted sum by" in capsys.readouterr().out
    texts = [text for text, _ in TENANTS["language"]()[1][:40]]
    with Engine(EngineConfig(base=BASE, device="cpu")) as engine:
        before = weights_digest(engine.base.model)
        for name in _MIX:
            engine.load_adapter(name, ADAPTERS[name])
        merged = engine.load_adapter("merged", tmp_path / "merged")
        names: list[Any] = ["merged", _MIX, *_MIX]
        rows = [Row(text, name, head="language" if name is _MIX else None) for text in texts for name in names]
        results = engine.infer(rows)
        assert all(isinstance(result, RowResult) for result in results)
        answers = {str(name): [r.logits for r in results[index :: len(names)]] for index, name in enumerate(names)}  # type: ignore[union-attr]
        for name in _MIX:
            np.testing.assert_allclose(
                answers[name], [r.logits for r in _infer(engine, texts, name)], rtol=1e-5, atol=1e-5
            )
        assert weights_digest(engine.base.model) == before
        mix = next(result for row, result in zip(rows, results, strict=True) if row.adapter is _MIX)
        resident = engine._residency._tiers.lease(mix.version)  # type: ignore[union-attr]
    np.testing.assert_allclose(answers[str(_MIX)], answers["merged"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(answers["merged"], _by_peft(texts), atol=1e-4)
    assert resident is not None and merged.ranks == (resident.max_rank,) == (16,)  # 8 of each parent


def _infer(engine: Engine, texts: list[str], name: str) -> list[RowResult]:
    results = [engine.infer([Row(text, name)])[0] for text in texts]
    assert all(isinstance(result, RowResult) for result in results)
    return results  # type: ignore[return-value]


def _by_peft(texts: list[str]) -> np.ndarray:
    """Both adapters merged into copies of the base, the copies' distances from it added up, the chosen head on top."""
    base = AutoModelForSequenceClassification.from_pretrained(resolve(BASE), num_labels=10)
    pristine = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    total = dict(pristine)
    for name, weight in _MIX.items():
        fresh = AutoModelForSequenceClassification.from_pretrained(resolve(BASE), num_labels=10)
        own = PeftModel.from_pretrained(fresh, resolve(ADAPTERS[name])).merge_and_unload().state_dict()
        for key, tensor in own.items():
            if "classifier" in key or "pooler" in key:
                total[key] = tensor if name == "language" else total[key]
            elif tensor.is_floating_point():
                total[key] = total[key] + weight * (tensor - pristine[key])
    base.load_state_dict(total)
    tokenizer = AutoTokenizer.from_pretrained(resolve(BASE))
    with torch.inference_mode():
        return np.stack([base.eval()(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in texts])


def test_article_2_every_type_says_how_far_it_is_from_the_sum(tmp_path: Path) -> None:
    """``linear`` multiplies factors with each other that do not belong together; PEFT says nothing of it."""
    parts = tuple(Part(name, ADAPTERS[name], weight) for name, weight in _MIX.items())
    base = BaseModel(EngineConfig(base=BASE, device="cpu"))
    for kind, combination in COMBINATIONS.items():
        request = MergeRequest(
            parts, kind, density=0.5 if combination.drops else None, head=HeadPolicy.parse("keep=smart-home")
        )
        report = merge(request, base, tmp_path / kind)
        assert {layer.path for layer in report.layers} and report.labels
        if kind == "cat":
            assert report.error < 1e-6 and not report.warnings
        else:
            assert report.error > 0.05
            assert any(
                "off the exact weighted sum" in warning or "weighted sum" in warning for warning in report.warnings
            )
        peft = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(resolve(BASE), num_labels=10), tmp_path / kind
        )
        assert peft.peft_config["default"].use_rslora is False


def test_article_2_everything_wrong_is_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    parts = (
        Part("a", ADAPTERS["language"], float("nan")),
        Part("a", str(tmp_path / "missing"), 1.0),
        Part("b", str(tmp_path), 1.0),
    )
    request = MergeRequest(parts, "ties", rank=4, density=None, head=HeadPolicy.parse("keep=c"))
    with pytest.raises(AdapterRejected) as refusal:
        merge(request, BASE, tmp_path / "out")
    told = "\n".join(refusal.value.problems)
    for says in ("weight is nan", "several adapters are named a", "rank is for types", "density is missing", "keep=c"):
        assert says in told
    assert "missing is not a directory" in told and "adapter_config.json is missing" in told
    assert list(tmp_path.iterdir()) == []


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
        np.testing.assert_allclose(result.logits, alone.logits, rtol=1e-5, atol=1e-5)


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


def test_article_4_a_base_is_quantised_layer_by_layer(tiny_bert: TinyBase, tmp_path: Path) -> None:
    """``bits_pattern``, which the issue asks for and PEFT does not have; the first expression that matches decides."""
    patterns = {r"layer\.0\.attention\..*": 8, "query": 16, r".*\.dense": 3}
    directory = tiny_bert.adapter(tmp_path / "a", 3, 0)
    config = EngineConfig(
        base=str(tiny_bert.directory), device="cpu", quantization=QuantizationConfig(bits=4, bits_pattern=patterns)
    )
    with Engine(config) as engine:
        before = weights_digest(engine.base.model)
        bits = {path.removeprefix("bert.encoder."): width for path, width in engine.base.quantized.items()}
        assert bits["layer.0.attention.self.query"] == bits["layer.0.attention.output.dense"] == 8
        assert "layer.1.attention.self.query" not in bits  # 16 bits
        assert bits["layer.1.intermediate.dense"] == 3 and bits["layer.1.attention.self.value"] == 4
        assert engine.base.num_bytes < 0.7 * engine.base.full_bytes
        assert engine.metrics.registry.get_sample_value("adapter_router_base_bytes") == engine.base.num_bytes
        engine.load_adapter("a", directory)
        rows = [Row(random_features(np.random.default_rng(seed)), "a") for seed in range(8)]
        mixed = logits_of(engine, rows)
        for row, logits in zip(rows, mixed, strict=True):
            np.testing.assert_allclose(logits_of(engine, [row])[0], logits, rtol=1e-5, atol=1e-5)
        assert weights_digest(engine.base.model) == before


def test_article_4_loftq_chooses_its_bits_by_layer_and_its_adapters_stay_on_their_base(
    tiny_bert: TinyBase, engine: Engine, tmp_path: Path
) -> None:
    """One command writes base and initial adapter; PEFT trains; the result is served there and nowhere else."""
    out = tmp_path / "loftq"
    patterns = [r"layer\.0\.attention\..*=8", r"layer\.1\..*=2"]
    command = ["quantize", str(tiny_bert.directory), "--bits", "4", "--bits-pattern", *patterns, "--rank", "4"]
    assert main([*command, "--task", "text-classification", "--out", str(out)]) == 0
    lora = LoraConfig.from_pretrained(out / "initial_adapter")
    lora.task_type = "SEQ_CLS"
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(out, num_labels=3), lora)
    initial = load_peft_weights(str(out / "initial_adapter"), device="cpu")
    set_peft_model_state_dict(model, get_peft_model_state_dict(model) | initial)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(tmp_path / "trained")
    row = Row(random_features(np.random.default_rng(0)), "trained")
    with torch.inference_mode():
        expected = model(**{k: torch.from_numpy(v)[None] for k, v in row.inputs.items()}).logits  # type: ignore[union-attr]
    with Engine(EngineConfig(base=str(out), device="cpu")) as quantised:
        assert set(quantised.base.quantized.values()) == {2, 4, 8}
        quantised.load_adapter("trained", tmp_path / "trained")
        np.testing.assert_allclose(logits_of(quantised, [row]), expected, rtol=1e-5, atol=1e-5)
        fingerprint = quantised.base.fingerprint
    with pytest.raises(AdapterRejected, match=f"trained on the base {fingerprint}.*serve it on that base"):
        engine.load_adapter("trained", tmp_path / "trained")
