"""One base under several heads: what one task, row or caller does must not reach another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DebertaV2Config,
    LlamaConfig,
)

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRejected, InvalidRequest, TaskMismatch
from adapter_router.types import Row, RowResult
from tests.tiny import TinyBase, edit_config

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}


def llama(directory: Path, **more: Any) -> Path:
    """A decoder without a head of its own; its output layer is its embedding."""
    torch.manual_seed(0)
    model = AutoModel.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.save_pretrained(directory)
    return directory


def adapter(base: Path, directory: Path, auto: Any, **lora: Any) -> Any:
    """A random adapter, and PEFT with it alone."""
    torch.manual_seed(len(str(directory)))
    model = get_peft_model(auto.from_pretrained(base), LoraConfig(target_modules=["q_proj"], **lora))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return PeftModel.from_pretrained(auto.from_pretrained(base), directory).eval()


def logits(model: Any, **features: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        output = model(**{name: torch.from_numpy(np.asarray(array))[None] for name, array in features.items()})
    return output.logits[0].numpy()  # type: ignore[no-any-return]


def test_a_saved_layer_shares_a_pass_with_another_task(tmp_path: Path) -> None:
    """Rows of one length: a cache common to the whole batch would mix their keys without an error."""
    base = llama(tmp_path / "base", pad_token_id=0)
    alone = {
        "layer": adapter(
            base, tmp_path / "layer", AutoModelForCausalLM, task_type="CAUSAL_LM", modules_to_save=["layers.0"]
        ),
        "plain": adapter(base, tmp_path / "plain", AutoModelForSequenceClassification, task_type="SEQ_CLS"),
    }
    rng = np.random.default_rng(0)
    with Engine(EngineConfig(base=str(base), device="cpu")) as engine:
        for name in alone:
            engine.load_adapter(name, tmp_path / name)
        rows = [Row({"input_ids": rng.integers(5, 100, 7)}, name) for name in ("layer", "plain", "layer", "plain")]
        results = engine.infer(rows)
        assert engine.metrics.forwards._value.get() == 1
    for row, result in zip(rows, results, strict=True):
        assert isinstance(result, RowResult), result
        expected = logits(alone[str(row.adapter)], **row.inputs)  # type: ignore[arg-type]
        np.testing.assert_allclose(result.logits, expected, atol=1e-4)


def test_a_head_read_later_is_tied_as_the_checkpoint_says(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", eos_token_id=2)
    alone = adapter(
        base, tmp_path / "tokens", AutoModelForCausalLM, task_type="CAUSAL_LM", trainable_token_indices=[7, 8, 9]
    )
    ids = np.array([5, 7, 8, 20, 9])
    with Engine(EngineConfig(base=str(base), device="cpu")) as engine:
        assert engine.base.tasks[0] == "text-classification"
        engine.load_adapter("tokens", tmp_path / "tokens")
        (result,) = engine.infer([Row({"input_ids": ids}, "tokens")])
        (event,) = engine.generate([Row({"input_ids": ids}, "tokens", parameters={"max_new_tokens": 5})])
    assert isinstance(result, RowResult), result
    np.testing.assert_allclose(result.logits, logits(alone, input_ids=ids), atol=1e-4)
    with torch.inference_mode():
        tokens = alone.generate(input_ids=torch.from_numpy(ids)[None], max_new_tokens=5, do_sample=False)
    generated = tokens[0, len(ids) :].tolist()
    assert list(event.token_ids) == generated[: generated.index(2) if 2 in generated else None], event.error


def test_a_masked_token_of_one_caller_is_not_everybodys_padding(tmp_path: Path) -> None:
    """A decoder without a padding token scores a row at its end, whatever its neighbours mask."""
    base = llama(tmp_path / "base")
    alone = adapter(base, tmp_path / "a", AutoModelForSequenceClassification, task_type="SEQ_CLS")
    rows = [
        Row({"input_ids": np.array([11, 12, 13])}, "a"),
        Row({"input_ids": np.array([21, 22, 23, 24, 13, 12]), "attention_mask": np.array([1, 1, 1, 1, 0, 1])}, "a"),
    ]
    with Engine(EngineConfig(base=str(base), device="cpu")) as engine:
        engine.load_adapter("a", tmp_path / "a")
        results = engine.infer(rows)
    for row, result in zip(rows, results, strict=True):
        assert isinstance(result, RowResult), result
        np.testing.assert_allclose(result.logits, logits(alone, **row.inputs), atol=1e-4)  # type: ignore[arg-type]


def test_one_content_serves_one_task(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    directory = tiny_bert.adapter(tmp_path / "a", 3, 0)
    edit_config(directory, task_type=None, modules_to_save=["classifier"])
    with pytest.raises(AdapterRejected):  # what was refused leaves no claim on the content
        engine.load_adapter("text", directory, task="token-classification", labels=["too few"])
    engine.load_adapter("text", directory, task="text-classification")
    with pytest.raises(AdapterRejected, match=r"adapter_router\.json"):
        engine.load_adapter("tokens", directory, task="token-classification")
    (directory / "adapter_router.json").write_text('{"task": "token-classification"}')
    engine.load_adapter("tokens", directory)
    ids = np.arange(5, 12)
    text, tokens = engine.infer([Row({"input_ids": ids}, "text"), Row({"input_ids": ids}, "tokens")])
    assert isinstance(text, RowResult) and isinstance(tokens, RowResult)
    assert (text.logits.shape, tokens.logits.shape) == ((3,), (7, 3))
    base = AutoModelForTokenClassification.from_pretrained(tiny_bert.directory, num_labels=3)
    expected = logits(PeftModel.from_pretrained(base, directory).eval(), input_ids=ids)
    np.testing.assert_allclose(tokens.logits, expected, atol=1e-5)


def test_labels_given_at_load_survive_eviction(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    directory = tiny_bert.adapter(tmp_path / "a", 3, 0)
    (directory / "config.json").write_text('{"id2label": {"0": "one", "1": "two"}}')
    version = engine.load_adapter("a", directory, labels=["x", "y", "z"]).version
    engine.evict(version.digest)
    (result,) = engine.infer([Row({"input_ids": np.arange(5, 9)}, "a")])
    assert isinstance(result, RowResult) and result.output["label"] in {"x", "y", "z"}  # type: ignore[typeddict-item]


def test_an_abandoned_generation_holds_no_adapter(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", eos_token_id=2)
    for name in ("a", "b"):
        adapter(base, tmp_path / name, AutoModelForCausalLM, task_type="CAUSAL_LM", r=8 if name == "a" else 4)
    rows = [Row({"input_ids": np.arange(5, 9)}, "a", parameters={"max_new_tokens": 2})] * 2
    with Engine(EngineConfig(base=str(base), device="cpu", adapter_memory_bytes=6000)) as engine:
        engine.load_adapter("a", tmp_path / "a")
        events = engine.generate(rows)
        assert next(events).error is None
        engine.load_adapter("b", tmp_path / "b")  # needs the room of "a"
        assert engine.resident() == [engine.load_adapter("c", tmp_path / "b").version.digest]


def test_generation_that_cannot_fit_is_refused_alone(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", eos_token_id=2)
    adapter(base, tmp_path / "a", AutoModelForCausalLM, task_type="CAUSAL_LM")
    with Engine(EngineConfig(base=str(base), device="cpu")) as engine:
        engine.load_adapter("a", tmp_path / "a")
        asked = [(30, 11), (30, 10), (3, 30)]
        rows = [Row({"input_ids": np.arange(5, 5 + n)}, "a", parameters={"max_new_tokens": m}) for n, m in asked]
        events = {event.index: event for event in engine.generate([*rows, Row("x", None, "text-classification")])}
    assert isinstance(events[0].error, InvalidRequest) and "room for 10" in str(events[0].error)
    assert events[1].error is None and events[2].error is None
    assert isinstance(events[3].error, TaskMismatch)


def test_a_base_that_minds_masked_tokens_takes_rows_without_them(tmp_path: Path) -> None:
    """DeBERTa lets a masked token attend to padding: such rows depend on the length of their batch."""
    config = DebertaV2Config(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        type_vocab_size=0,
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    ids, long = np.arange(5, 11), np.arange(5, 35)
    with Engine(EngineConfig(base=str(tmp_path / "base"), device="cpu")) as engine:
        padded = {"input_ids": ids, "attention_mask": np.array([1, 1, 1, 1, 0, 0])}
        gap = {"input_ids": ids, "attention_mask": np.array([0, 1, 1, 1, 1, 1])}
        cut, refused, _ = engine.infer([Row(padded), Row(gap), Row({"input_ids": long})])
        (short,) = engine.infer([Row({"input_ids": ids[:4]})])
    assert isinstance(cut, RowResult) and isinstance(short, RowResult)
    np.testing.assert_allclose(cut.logits, short.logits, atol=1e-5)
    assert isinstance(refused, InvalidRequest) and "leave them out" in str(refused)
