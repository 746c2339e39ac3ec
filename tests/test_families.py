"""Other architectures: served exactly as PEFT alone, or refused before anything is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    ConvBertConfig,
    ElectraConfig,
    FNetConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PretrainedConfig,
)

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.types import Row, RowResult
from tests.tiny import peft_logits

SIZES: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER: dict[str, Any] = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 40}
PAD: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[PretrainedConfig, list[dict[str, Any]]]] = {
    # GPT-2 reads token_type_ids through its word embeddings: zeros are not the same as none.
    "gpt2-conv1d": (
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=40, **PAD),
        [{"target_modules": ["c_attn"]}, {"target_modules": ["c_attn", "c_fc"], "r": 16}],
    ),
    # A saved decoder layer must not see the keys that its neighbours' copies left in a cache.
    "llama-saved-layer": (
        LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=40, **PAD),
        [{"target_modules": ["q_proj"], "modules_to_save": ["layers.1"]}, {"target_modules": ["q_proj", "v_proj"]}],
    ),
    "electra": (
        ElectraConfig(**ENCODER, embedding_size=32),
        [{"target_modules": ["query"]}, {"r": 32, "target_modules": ["value"]}],
    ),
    "modernbert": (
        ModernBertConfig(**ENCODER, **PAD, cls_token_id=3, sep_token_id=4),
        [{"target_modules": ["Wqkv"]}, {"target_modules": ["Wo"], "modules_to_save": ["head"]}],
    ),
}


def save_base(config: PretrainedConfig, directory: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.save_pretrained(directory)
    return directory


def fresh(base: Path, num_labels: int) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_rows_equal_peft_alone(family: str, tmp_path: Path) -> None:
    config, adapters = FAMILIES[family]
    base = save_base(config, tmp_path / "base")
    alone = {}
    with Engine(EngineConfig(base=str(base), device="cpu")) as engine:
        for index, lora in enumerate(adapters):
            directory, labels = tmp_path / str(index), 3 + index
            torch.manual_seed(index)
            model = get_peft_model(
                fresh(base, labels), LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **lora)
            )
            model.save_pretrained(directory)
            engine.load_adapter(str(index), directory)
            alone[str(index)] = PeftModel.from_pretrained(fresh(base, labels), directory).eval()
        rng = np.random.default_rng(0)
        for _ in range(10):
            rows = [Row({"input_ids": rng.integers(5, 100, rng.integers(2, 20))}, str(i % 2)) for i in range(8)]
            for row, result in zip(rows, engine.infer(rows), strict=True):
                assert isinstance(result, RowResult), result
                expected = peft_logits(alone[str(row.adapter)], row.inputs)  # type: ignore[arg-type]
                np.testing.assert_allclose(result.logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [FNetConfig(**{**ENCODER, "num_attention_heads": None}), ConvBertConfig(**ENCODER)],
    ids=["fnet", "convbert"],
)
def test_a_base_that_sees_padding_is_refused_at_start(config: PretrainedConfig, tmp_path: Path) -> None:
    base = save_base(config, tmp_path / "base")
    with pytest.raises(ValueError, match=r"padding moves its logits|cannot run a padded batch"):
        Engine(EngineConfig(base=str(base), device="cpu"))


def test_the_bases_own_head_keeps_its_names_and_activation(tmp_path: Path) -> None:
    config = BertConfig(
        **ENCODER, num_labels=2, problem_type="multi_label_classification", id2label={0: "no", 1: "yes"}
    )
    base = save_base(config, tmp_path / "base")
    lora = LoraConfig(target_modules=["query"], init_lora_weights=False)
    get_peft_model(fresh(base, 2), lora).save_pretrained(tmp_path / "a")
    with Engine(EngineConfig(base=str(base), device="cpu")) as engine:
        version = engine.load_adapter("a", tmp_path / "a").version
    assert (version.labels, version.activation) == (("no", "yes"), "sigmoid")


def test_one_lone_label_is_scored_by_a_sigmoid(tmp_path: Path) -> None:
    base = save_base(BertConfig(**ENCODER), tmp_path / "base")
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    get_peft_model(fresh(base, 1), lora).save_pretrained(tmp_path / "a")
    with Engine(EngineConfig(base=str(base), device="cpu")) as engine:
        engine.load_adapter("a", tmp_path / "a")
        (result,) = engine.infer([Row({"input_ids": np.arange(5, 9)}, "a")])
    assert isinstance(result, RowResult)
    assert result.output["score"] == pytest.approx(1 / (1 + np.exp(-result.logits[0]))) and result.output["score"] < 1


def test_the_fingerprint_tells_bases_of_one_shape_apart(tmp_path: Path) -> None:
    prints = []
    for seed in (0, 0, 1):
        base = save_base(BertConfig(**ENCODER), tmp_path / str(len(prints)))
        config = json.loads((base / "config.json").read_text())
        if seed:
            model = fresh(base, config.get("num_labels", 2))
            with torch.no_grad():
                model.classifier.weight.add_(0.1)
            model.save_pretrained(base)
        with Engine(EngineConfig(base=str(base), device="cpu")) as engine:
            prints.append(engine.base.fingerprint)
    assert prints[0] == prints[1] != prints[2]
