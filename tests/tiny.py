"""Tiny random bases and adapters built in code, and PEFT alone on a fresh base as the oracle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    RobertaConfig,
)

from adapter_router.types import Row

VOCABULARY = 100
_COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 40}
_CONFIGS: dict[str, Any] = {
    "bert": lambda: BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **_COMMON
    ),
    "roberta": lambda: RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **_COMMON
    ),
    "distilbert": lambda: DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, **_COMMON),
}
QUERY_VALUE = {"bert": ["query", "value"], "roberta": ["query", "value"], "distilbert": ["q_lin", "v_lin"]}


class TinyBase:
    """A random base checkpoint on disk, without a classification head unless ``num_labels`` is given."""

    def __init__(self, kind: str, directory: Path, num_labels: int | None = None, seed: int = 0) -> None:
        self.kind = kind
        self.directory = directory
        torch.manual_seed(seed)
        config = _CONFIGS[kind]()
        if num_labels is None:
            model = AutoModel.from_config(config)
        else:
            config.num_labels = num_labels
            model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():  # transformers' own scale leaves logits too quiet to tell adapters apart
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4.0)
        model.save_pretrained(directory)

    def fresh(self, num_labels: int) -> Any:
        """transformers' model of this base for ``num_labels`` labels."""
        return AutoModelForSequenceClassification.from_pretrained(
            self.directory, num_labels=num_labels, ignore_mismatched_sizes=True
        )

    def adapter(self, directory: Path, num_labels: int, seed: int, **lora: Any) -> Path:
        """A random adapter saved by PEFT, every one of its tensors away from zero."""
        torch.manual_seed(seed)
        fields: dict[str, Any] = {"task_type": "SEQ_CLS", "r": 8, "target_modules": QUERY_VALUE[self.kind], **lora}
        model = get_peft_model(self.fresh(num_labels), LoraConfig(**fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(directory)
        return directory

    def alone(self, directory: Path, num_labels: int) -> PeftModel:
        """PEFT with this one adapter on a fresh base."""
        return PeftModel.from_pretrained(self.fresh(num_labels), directory).eval()


def peft_logits(model: Any, features: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logits of one row, unpadded."""
    with torch.inference_mode():
        batch = {name: torch.from_numpy(array)[None] for name, array in features.items()}
        return model(**batch).logits[0].float().numpy()  # type: ignore[no-any-return]


def random_features(rng: np.random.Generator, longest: int = 24) -> dict[str, np.ndarray]:
    """Token ids of random length; 0 and 1 (padding) and specials are left out."""
    length = int(rng.integers(1, longest + 1))
    return {"input_ids": rng.integers(5, VOCABULARY, length), "attention_mask": np.ones(length, dtype=np.int64)}


def random_row(rng: np.random.Generator, adapter: str | None) -> Row:
    return Row(random_features(rng), adapter)


def edit_config(directory: Path, **fields: Any) -> None:
    """Change fields of an adapter's ``adapter_config.json``."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(directory: Path, edit: Any) -> None:
    """Rewrite an adapter's tensors: ``edit(tensors)`` changes the dictionary in place."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def weights_digest(model: torch.nn.Module) -> dict[str, bytes]:
    """Every weight of a model, byte for byte."""
    return {name: tensor.detach().cpu().numpy().tobytes() for name, tensor in model.state_dict().items()}
