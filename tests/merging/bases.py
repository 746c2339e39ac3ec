"""Tiny random bases of several kinds, and random adapters on them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

from adapter_router.config import EngineConfig
from adapter_router.engine.base_model import BaseModel

LABELS = 3
ALPHAS = (2, 4, 7, 16, -3)
_TEXT = {"vocab_size": 50, "max_position_embeddings": 24}
_CONFIGS: dict[str, Any] = {
    "bert": lambda: hf.BertConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, num_labels=LABELS, **_TEXT
    ),
    "llama": lambda: hf.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=40,
        pad_token_id=0,
        **_TEXT,
    ),
    "qwen2": lambda: hf.Qwen2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        pad_token_id=0,
        **_TEXT,
    ),
    "gpt2": lambda: hf.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=24, vocab_size=50, pad_token_id=0, num_labels=LABELS
    ),
    "vit": lambda: hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=LABELS,
    ),
}
_CONFIGS["trunk"] = _CONFIGS["llama"]
_CLASSES: dict[str, Any] = {
    "bert": hf.AutoModelForSequenceClassification,
    "llama": hf.AutoModelForCausalLM,
    "qwen2": hf.AutoModelForCausalLM,
    "trunk": hf.AutoModel,
    "gpt2": hf.AutoModelForSequenceClassification,
    "vit": hf.AutoModelForImageClassification,
}
TARGETS: dict[str, tuple[str, ...]] = {
    "bert": ("query", "value", "intermediate.dense", "word_embeddings"),
    "llama": ("q_proj", "v_proj", "up_proj", "embed_tokens"),
    "gpt2": ("c_attn", "mlp.c_fc", "wte"),
    "vit": ("q_proj", "v_proj", "projection"),
}
"""Leaves of modules that adapters act on: linear layers, transposed ones, tables, a convolution.

Of the bases that random merges are made on; ``qwen2`` has layers with and without bias, ``trunk`` no head.
"""


@dataclass
class MergeBase:
    """A base with a trained head on disk, loaded once for all merges."""

    kind: str
    directory: Path
    _made: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        model = _CLASSES[self.kind].from_config(_CONFIGS[self.kind]())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(self.directory / "base")

    @property
    def path(self) -> str:
        return str(self.directory / "base")

    @cached_property
    def loaded(self) -> BaseModel:
        return BaseModel(EngineConfig(base=self.path, device="cpu"))

    def fresh(self) -> Any:
        return _CLASSES[self.kind].from_pretrained(self.path).eval()

    def new(self) -> Path:
        """A directory that does not exist yet."""
        self._made += 1
        return self.directory / f"made-{self._made}"

    def adapter(self, seed: int, *, std: float = 0.3, **lora: Any) -> Path:
        """A random adapter saved by PEFT: every tensor away from zero, by default without a head of its own."""
        torch.manual_seed(seed)
        fields: dict[str, Any] = {"r": 4, "target_modules": list(TARGETS.get(self.kind, ("q_proj",))[:2]), **lora}
        model = get_peft_model(self.fresh(), LoraConfig(fan_in_fan_out=self.kind == "gpt2", **fields))
        if not takes_from_base(fields):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(torch.randn_like(parameter) * std)
        else:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.05)
        directory = self.new()
        model.save_pretrained(directory, save_embedding_layers=False)
        return directory

    def random_parts(self, seed: int, count: int, *, equal_ranks: bool) -> tuple[list[Path], list[float]]:
        """``count`` adapters on random, perhaps disjoint targets, and weights of both signs.

        rsLoRA on all but the first: PEFT's result inherits that of the first, and is wrong then.
        """
        rng = random.Random(seed)
        rank = rng.randint(1, 4)
        names = TARGETS[self.kind]
        paths = [
            self.adapter(
                rng.randrange(10**6),
                r=rank if equal_ranks else rng.randint(1, 5),
                lora_alpha=rng.choice(ALPHAS),
                use_rslora=index > 0 and rng.random() < 0.3,
                alpha_pattern={names[0]: rng.choice(ALPHAS)} if rng.random() < 0.5 else {},
                rank_pattern={} if equal_ranks or rng.random() < 0.5 else {names[1]: rng.randint(1, 5)},
                target_modules=rng.sample(names, rng.randint(1, len(names))),
            )
            for index in range(count)
        ]
        weights = [round(rng.uniform(0.2, 1.2), 2) * rng.choice([1, 1, 1, -1]) for _ in paths]
        return paths, weights


def takes_from_base(fields: dict[str, Any]) -> bool:
    return isinstance(fields.get("init_lora_weights"), str) or bool(fields.get("kasa_config"))


def several(base: MergeBase, directories: list[Path]) -> PeftModel:
    """One PEFT model with the adapters ``0``, ``1``…."""
    model = PeftModel.from_pretrained(base.fresh(), directories[0], adapter_name="0")
    for index, directory in enumerate(directories[1:], 1):
        model.load_adapter(directory, adapter_name=str(index))
    return model
