"""Good adapters, one of each kind, on a few tiny bases: copies of them are what the cases spoil."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig

from adapter_router.types import TaskKind

VOCABULARY = 100
LABELS = 3
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
_CAUSAL: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE: dict[str, Any] = {**_TEXT, "image_size": 16, "patch_size": 8}
del _IMAGE["vocab_size"], _IMAGE["max_position_embeddings"]

BASES: Mapping[str, tuple[Callable[[], Any], Any]] = {
    "bert": (lambda: hf.BertConfig(**_TEXT), hf.AutoModel),
    # Every direction of its query weights is as large as any other: nothing can tell which ones PiSSA took.
    "identity": (lambda: hf.BertConfig(**_TEXT), hf.AutoModel),
    "gpt2": (
        lambda: hf.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=40, pad_token_id=0, eos_token_id=2
        ),
        hf.AutoModelForCausalLM,
    ),
    "mixtral": (
        lambda: hf.MixtralConfig(**_CAUSAL, num_local_experts=3, num_experts_per_tok=2),
        hf.AutoModelForCausalLM,
    ),
    "vit": (lambda: hf.ViTConfig(**_IMAGE), hf.AutoModel),
    "llama": (lambda: hf.LlamaConfig(**_CAUSAL, tie_word_embeddings=True), hf.AutoModelForCausalLM),
    # Not served here; adapters of theirs are brought to the others.
    "wide bert": (lambda: hf.BertConfig(**{**_TEXT, "hidden_size": 64}), hf.AutoModel),
    "deep bert": (lambda: hf.BertConfig(**{**_TEXT, "num_hidden_layers": 4}), hf.AutoModel),
    "wordy bert": (lambda: hf.BertConfig(**{**_TEXT, "vocab_size": VOCABULARY + 20}), hf.AutoModel),
    "distilbert": (
        lambda: hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=VOCABULARY),
        hf.AutoModel,
    ),
}

_AUTO: Mapping[TaskKind, Any] = {
    "text-classification": hf.AutoModelForSequenceClassification,
    "token-classification": hf.AutoModelForTokenClassification,
    "image-classification": hf.AutoModelForImageClassification,
    "question-answering": hf.AutoModelForQuestionAnswering,
    "embedding": hf.AutoModel,
    "text-generation": hf.AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Good:
    """``task_type`` and a head come with the task; ``initial``: the adapter before training is kept beside it."""

    config: Callable[[], PeftConfig]
    base: str = "bert"
    task: TaskKind = "text-classification"
    initial: bool = False


def _lora(**fields: Any) -> Callable[[], PeftConfig]:
    return lambda: LoraConfig(**{"task_type": "SEQ_CLS", "r": 8, "target_modules": ["query", "value"], **fields})


def _gpt2(**fields: Any) -> Callable[[], PeftConfig]:
    defaults = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    return lambda: LoraConfig(**{**defaults, **fields})


def _llama(**fields: Any) -> Callable[[], PeftConfig]:
    return lambda: LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **fields})


def _other(kind: type[PeftConfig], **fields: Any) -> Callable[[], PeftConfig]:
    return lambda: kind(**{"task_type": "SEQ_CLS", "target_modules": ["query", "value"], **fields})


GOOD: Mapping[str, Good] = {
    "plain": Good(_lora()),
    "no head": Good(_lora(task_type="FEATURE_EXTRACTION"), task="embedding"),
    "token classes": Good(_lora(task_type="TOKEN_CLS"), task="token-classification"),
    "answers": Good(_lora(task_type="QUESTION_ANS"), task="question-answering"),
    "dora": Good(_lora(use_dora=True)),
    "lora bias": Good(_lora(lora_bias=True)),
    "all biases": Good(_lora(bias="all")),
    "target biases": Good(_lora(bias="lora_only")),
    "kasa": Good(_lora(kasa_config=KasaConfig())),
    "blocks": Good(_lora(use_bdlora=BdLoraConfig(target_modules_bd_a=["query"], nblocks=2, match_strict=False))),
    "words": Good(_lora(target_modules=["query", "word_embeddings"])),
    "tokens": Good(_lora(trainable_token_indices={"word_embeddings": [3, 7, 11]})),
    "pissa": Good(_lora(init_lora_weights="pissa")),
    "fast pissa": Good(_lora(init_lora_weights="pissa_niter_4"), initial=True),
    "adalora": Good(_other(AdaLoraConfig, init_r=4, target_r=2, total_step=10)),
    "ia3": Good(_other(IA3Config, target_modules=["query", "intermediate.dense"], feedforward_modules=["query"])),
    "vera": Good(_other(VeraConfig, r=4)),
    "loha": Good(_other(LoHaConfig, r=2)),
    "lokr": Good(_other(LoKrConfig, r=2)),
    "oft": Good(_other(OFTConfig, oft_block_size=8, r=0)),
    "norms": Good(_other(LNTuningConfig, target_modules=["LayerNorm"])),
    "only tokens": Good(
        _other(
            TrainableTokensConfig,
            task_type="FEATURE_EXTRACTION",
            target_modules=["word_embeddings"],
            token_indices=[3, 7, 11],
        ),
        task="embedding",
    ),
    "identity": Good(_lora(target_modules=["value"]), base="identity"),
    "gpt2": Good(_gpt2(), base="gpt2", task="text-generation"),
    "alora": Good(_gpt2(alora_invocation_tokens=[5, 6]), base="gpt2", task="text-generation"),
    "llama": Good(_llama(), base="llama", task="text-generation"),
    "tied head": Good(
        _llama(modules_to_save=["embed_tokens"], ensure_weight_tying=True), base="llama", task="text-generation"
    ),
    "tied words": Good(
        _llama(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
        base="llama",
        task="text-generation",
    ),
    "tied tokens": Good(_llama(trainable_token_indices=[3, 7]), base="llama", task="text-generation"),
    "mixtral": Good(_llama(), base="mixtral", task="text-generation"),
    "experts": Good(
        _llama(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        base="mixtral",
        task="text-generation",
    ),
    "vit": Good(
        _lora(task_type=None, target_modules=["q_proj"], modules_to_save=["classifier"]),
        base="vit",
        task="image-classification",
    ),
    "convolution": Good(
        _lora(task_type=None, target_modules=["projection"], modules_to_save=["classifier"], use_dora=True),
        base="vit",
        task="image-classification",
    ),
    "identity pissa": Good(_lora(init_lora_weights="pissa"), base="identity"),
    "identity kasa": Good(_lora(kasa_config=KasaConfig()), base="identity"),
    "of a wider base": Good(_lora(target_modules=["query"]), base="wide bert"),
    "of a deeper base": Good(_lora(target_modules=["query"]), base="deep bert"),
    "of another vocabulary": Good(_lora(target_modules=["query", "word_embeddings"]), base="wordy bert"),
    "of distilbert": Good(_lora(target_modules=["q_lin"]), base="distilbert"),
    # PEFT's factors of a square transposed layer do not belong together.
    "of transposed layers": Good(
        _gpt2(target_modules=["attn.c_proj"], init_lora_weights="olora"), base="gpt2", task="text-generation"
    ),
}
# Good where they come from, yet nothing to be served on the bases above.
FOREIGN = tuple(name for name in GOOD if name.startswith(("of ", "identity ")))


def save_base(name: str, directory: Path) -> Path:
    """A random checkpoint, loud enough to tell adapters apart."""
    config, auto = BASES[name]
    torch.manual_seed(0)
    model = auto.from_config(config())
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            if name == "identity" and path.endswith("query.weight"):
                parameter.copy_(torch.eye(len(parameter)))
    model.save_pretrained(directory)
    return directory


def save_adapter(name: str, base: Path, directory: Path) -> Path:
    """The good adapter ``name``, every one of its tensors away from zero."""
    good = GOOD[name]
    torch.manual_seed(len(name))
    labels = {"num_labels": LABELS} if good.task.endswith("classification") else {}
    model = get_peft_model(_AUTO[good.task].from_pretrained(base, **labels), good.config())
    model.create_or_update_model_card = lambda _: None  # its template takes longer than all the rest
    if good.initial:
        model.save_pretrained(directory / "initial")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory)
    return directory
