"""Tiny random base checkpoints of many architectures; sizes vary with the seed, weights are loud."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

from adapter_router.types import TaskKind

Config = hf.PretrainedConfig
LONGEST = 16
"""Tokens of the longest row; position tables have room for twice as many and the offset of RoBERTa's."""

_AUTO: Mapping[str, Any] = {
    "text-classification": hf.AutoModelForSequenceClassification,
    "token-classification": hf.AutoModelForTokenClassification,
    "question-answering": hf.AutoModelForQuestionAnswering,
    "image-classification": hf.AutoModelForImageClassification,
    "embedding": hf.AutoModel,
    "text-generation": hf.AutoModelForCausalLM,
    "seq2seq-generation": hf.AutoModelForSeq2SeqLM,
}
TASK_TYPES: Mapping[str, str | None] = {
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "image-classification": None,
    "embedding": "FEATURE_EXTRACTION",
    "text-generation": "CAUSAL_LM",
    "seq2seq-generation": "SEQ_2_SEQ_LM",
}
CLASSIFYING: tuple[TaskKind, ...] = ("text-classification", "token-classification", "image-classification")
_QA = "question-answering"
ENCODER_TASKS: tuple[TaskKind, ...] = ("text-classification", "token-classification", "question-answering", "embedding")
DECODER_TASKS: tuple[TaskKind, ...] = ("text-generation", "text-classification")


@dataclass(frozen=True)
class Sizes:
    """Sizes of one base. ``tied``: whether a language model's head shares the embedding's weights."""

    hidden: int
    heads: int
    layers: int
    vocab: int
    inner: int
    labels: int
    tied: bool

    @classmethod
    def of(cls, seed: int) -> Sizes:
        rng = random.Random(seed)
        heads = rng.choice([2, 4])
        hidden = heads * rng.choice([8] if heads == 4 else [8, 16, 24])
        inner = rng.choice([32, 40, 64])
        return cls(hidden, heads, rng.choice([2, 2, 3]), rng.randint(61, 97), inner, rng.randint(2, 5), seed % 2 == 0)


@dataclass(frozen=True)
class Architecture:
    """One architecture, and the names an adapter can use on it.

    ``attention``: leaf names of the attention's linears; ``mlp``: of the other linears of a layer, as dotted tails.
    ``pooler``: linears between trunk and head. ``norms``: one kind of norm in each layer, as a dotted tail.
    ``stack``: the path of the list of layers, "" where layers hold no numbers of their own (ALBERT).
    ``heads``: modules that the task's class adds to the trunk.
    ``experts``: stacked parameters of a mixture of experts.
    """

    name: str
    config: Callable[[Sizes], Config]
    tasks: tuple[TaskKind, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    embedding: str = ""
    conv: str = ""
    pooler: str = ""
    norms: str = ""
    stack: str = ""
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    conv1d: bool = False

    @property
    def is_vision(self) -> bool:
        return "image-classification" in self.tasks

    @property
    def is_decoder(self) -> bool:
        return "text-generation" in self.tasks

    def heads_of(self, task: str) -> tuple[str, ...]:
        if task == "text-classification" and self.is_decoder:
            return ("score",)
        default = {"question-answering": ("qa_outputs",), "embedding": ()}
        if task in ("text-generation", "seq2seq-generation"):
            return ()
        return self.heads.get(task, default.get(task, ("classifier",)))


def _bert_like(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "intermediate_size": s.inner,
        "max_position_embeddings": 2 * LONGEST + 4,
    }


def _vit_like(s: Sizes) -> dict[str, Any]:
    sizes = {
        name: value for name, value in _bert_like(s).items() if name not in ("vocab_size", "max_position_embeddings")
    }
    return {**sizes, "image_size": 16, "patch_size": 8}


def _llama_like(s: Sizes) -> dict[str, Any]:
    return {
        **_bert_like(s),
        "num_key_value_heads": s.heads // 2,
        "head_dim": 8,
        "tie_word_embeddings": s.tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _distilbert(s: Sizes) -> Config:
    return hf.DistilBertConfig(
        vocab_size=s.vocab,
        dim=s.hidden,
        n_layers=s.layers,
        n_heads=s.heads,
        hidden_dim=s.inner,
        max_position_embeddings=2 * LONGEST + 4,
    )


def _deberta(s: Sizes) -> Config:
    return hf.DebertaV2Config(
        **_bert_like(s), relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], type_vocab_size=0
    )


def _modernbert(s: Sizes) -> Config:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4}
    return hf.ModernBertConfig(**_bert_like(s), **special, local_attention=8, global_attn_every_n_layers=2)


def _deit(s: Sizes) -> Config:
    return hf.DeiTConfig(**_vit_like(s), architectures=["DeiTForImageClassification"])


def _dinov2(s: Sizes) -> Config:
    sizes = {name: value for name, value in _vit_like(s).items() if name != "intermediate_size"}
    return hf.Dinov2Config(**sizes, mlp_ratio=2)


def _swin(s: Sizes) -> Config:
    return hf.SwinConfig(
        image_size=16, patch_size=4, embed_dim=8 * s.heads // 2, depths=[2, 1], num_heads=[2, 4], window_size=2
    )


def _siglip(s: Sizes) -> Config:
    text = {**_bert_like(s), "vocab_size": 30, "num_hidden_layers": 1, "max_position_embeddings": 8}
    return hf.SiglipConfig(vision_config=_vit_like(s), text_config=text)


def _gemma3(s: Sizes) -> Config:
    return hf.Gemma3TextConfig(**_llama_like(s), sliding_window=8, query_pre_attn_scalar=8)


def _gpt2(s: Sizes) -> Config:
    return hf.GPT2Config(
        n_embd=s.hidden,
        n_layer=s.layers,
        n_head=s.heads,
        n_inner=s.inner,
        vocab_size=s.vocab,
        n_positions=2 * LONGEST + 4,
        tie_word_embeddings=s.tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _mixtral(s: Sizes) -> Config:
    return hf.MixtralConfig(**_llama_like(s), num_local_experts=3, num_experts_per_tok=2)


def _t5(s: Sizes) -> Config:
    return hf.T5Config(
        vocab_size=s.vocab,
        d_model=s.hidden,
        d_kv=8,
        d_ff=s.inner,
        num_layers=s.layers,
        num_heads=s.heads,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
        tie_word_embeddings=s.tied,
    )


_BERT_NAMES: dict[str, Any] = {
    "attention": ("query", "key", "value", "attention.output.dense"),
    "mlp": ("intermediate.dense", "output.dense"),
    "embedding": "word_embeddings",
    "norms": "output.LayerNorm",
    "stack": "encoder.layer",
}
_LLAMA_NAMES: dict[str, Any] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "embedding": "embed_tokens",
    "norms": "post_attention_layernorm",
    "stack": "model.layers",
}
_VIT_NAMES: dict[str, Any] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("fc1", "fc2"),
    "conv": "projection",
    "norms": "layernorm_after",
    "stack": "layers",
}
_IMAGES: tuple[TaskKind, ...] = ("image-classification",)

ARCHITECTURES: Mapping[str, Architecture] = {
    entry.name: entry
    for entry in (
        Architecture(
            "bert", lambda s: hf.BertConfig(**_bert_like(s)), ENCODER_TASKS, pooler="pooler.dense", **_BERT_NAMES
        ),
        Architecture("roberta", lambda s: hf.RobertaConfig(**_bert_like(s)), ENCODER_TASKS, **_BERT_NAMES),
        Architecture("xlm-roberta", lambda s: hf.XLMRobertaConfig(**_bert_like(s)), ENCODER_TASKS[:3], **_BERT_NAMES),
        Architecture(
            "distilbert",
            _distilbert,
            ENCODER_TASKS,
            attention=("q_lin", "k_lin", "v_lin", "out_lin"),
            mlp=("ffn.lin1", "ffn.lin2"),
            embedding="word_embeddings",
            norms="sa_layer_norm",
            stack="transformer.layer",
            heads={"text-classification": ("pre_classifier", "classifier")},
        ),
        Architecture(
            "deberta-v2",
            _deberta,
            ENCODER_TASKS,
            pooler="pooler.dense",
            **{**_BERT_NAMES, "attention": ("query_proj", "key_proj", "value_proj", "attention.output.dense")},
            heads={"text-classification": ("pooler", "classifier")},
        ),
        Architecture(
            "electra", lambda s: hf.ElectraConfig(**_bert_like(s), embedding_size=16), ENCODER_TASKS, **_BERT_NAMES
        ),
        Architecture(
            "modernbert",
            _modernbert,
            ENCODER_TASKS,
            attention=("Wqkv", "attn.Wo"),
            mlp=("Wi", "mlp.Wo"),
            embedding="tok_embeddings",
            norms="mlp_norm",
            stack="layers",
            heads={
                "text-classification": ("head", "classifier"),
                "token-classification": ("head", "classifier"),
                "question-answering": ("head", "classifier"),
            },
        ),
        Architecture(
            "albert",
            lambda s: hf.AlbertConfig(**_bert_like(s), embedding_size=16),
            ENCODER_TASKS,
            attention=("query", "key", "value", "attention.dense"),
            mlp=("ffn", "ffn_output"),
            embedding="word_embeddings",
            norms="full_layer_layer_norm",
            pooler="pooler",
        ),
        Architecture(
            "mpnet",
            lambda s: hf.MPNetConfig(**_bert_like(s)),
            ENCODER_TASKS,
            **{**_BERT_NAMES, "attention": ("attn.q", "attn.k", "attn.v", "attn.o")},
        ),
        Architecture("vit", lambda s: hf.ViTConfig(**_vit_like(s)), _IMAGES, **_VIT_NAMES),
        Architecture("deit", _deit, _IMAGES, **_VIT_NAMES),
        Architecture("dinov2", _dinov2, _IMAGES, **{**_VIT_NAMES, "norms": "norm2", "stack": "encoder.layer"}),
        Architecture("swin", _swin, _IMAGES, **{**_VIT_NAMES, "stack": "encoder.layers"}),
        Architecture(
            "siglip",
            _siglip,
            _IMAGES,
            attention=("q_proj", "k_proj", "v_proj", "self_attn.out_proj"),
            mlp=("fc1", "fc2"),
            conv="patch_embedding",
            norms="layer_norm2",
            stack="encoder.layers",
        ),
        Architecture(
            "llama", lambda s: hf.LlamaConfig(**_llama_like(s)), (*DECODER_TASKS, "embedding"), **_LLAMA_NAMES
        ),
        Architecture("qwen2", lambda s: hf.Qwen2Config(**_llama_like(s)), DECODER_TASKS, **_LLAMA_NAMES),
        Architecture(
            "qwen3", lambda s: hf.Qwen3Config(**_llama_like(s)), (*DECODER_TASKS, "embedding"), **_LLAMA_NAMES
        ),
        Architecture("mistral", lambda s: hf.MistralConfig(**_llama_like(s)), DECODER_TASKS, **_LLAMA_NAMES),
        Architecture("gemma3", _gemma3, DECODER_TASKS, **_LLAMA_NAMES),
        Architecture(
            "gpt2",
            _gpt2,
            DECODER_TASKS,
            attention=("c_attn", "attn.c_proj"),
            mlp=("c_fc", "mlp.c_proj"),
            embedding="wte",
            norms="ln_2",
            stack="transformer.h",
            conv1d=True,
        ),
        Architecture(
            "mixtral",
            _mixtral,
            DECODER_TASKS,
            **{**_LLAMA_NAMES, "mlp": ()},
            experts=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        ),
        Architecture(
            "t5",
            _t5,
            ("seq2seq-generation",),
            attention=("q", "k", "v", "o"),
            mlp=("wi", "wo"),
            embedding="embed_tokens",
            norms="layer_norm",
            stack="block",
        ),
    )
}


class Base:
    """A base checkpoint on disk, and fresh models of it.

    ``trained_head``: the checkpoint holds the task's whole model; otherwise only the trunk (a language model's with
    its own head).
    """

    def __init__(self, architecture: Architecture, task: TaskKind, seed: int, directory: Path) -> None:
        self.architecture = architecture
        self.task = task
        self.seed = seed
        self.sizes = Sizes.of(seed)
        self.directory = directory
        generative = task in ("text-generation", "seq2seq-generation")
        self.trained_head = generative or task == "embedding" or seed % 2 == 1
        self._models: dict[tuple[int, torch.dtype], Any] = {}
        config = architecture.config(self.sizes)
        config.num_labels = self.sizes.labels if task in CLASSIFYING else 2
        torch.manual_seed(seed)
        model = self._checkpoint_class().from_config(config).eval()
        make_loud(model, seed)
        model.save_pretrained(directory)

    def _checkpoint_class(self) -> Any:
        if self.task == "embedding":
            # Half of the embedding bases come with a head that embeddings do not use.
            if self.architecture.is_decoder:
                return hf.AutoModelForCausalLM
            return _AUTO["token-classification"] if self.seed % 2 else hf.AutoModel
        if self.trained_head:
            return _AUTO[self.task]
        return hf.AutoModelForCausalLM if self.architecture.is_decoder else hf.AutoModel

    def sharing(self, task: TaskKind) -> Base:
        """The same checkpoint under another task, whose head it lacks."""
        other = copy.copy(self)
        other.task, other.trained_head, other._models = task, task == "embedding", {}
        return other

    def fresh(self, labels: int, dtype: torch.dtype = torch.float32) -> Any:
        """transformers' model of this base for ``labels`` labels, that nobody else holds."""
        return copy.deepcopy(self.pristine(labels, dtype))

    def pristine(self, labels: int, dtype: torch.dtype = torch.float32) -> Any:
        """The model that ``fresh`` copies; only to be looked at."""
        key = (labels, dtype)
        if key not in self._models:
            wanted: dict[str, Any] = {"ignore_mismatched_sizes": True} if self.task in (*CLASSIFYING, _QA) else {}
            if wanted:
                wanted["num_labels"] = 2 if self.task == _QA else labels
            torch.manual_seed(labels)
            self._models[key] = _AUTO[self.task].from_pretrained(self.directory, dtype=dtype, **wanted).eval()
        return self._models[key]

    @property
    def labels(self) -> int:
        """Labels of the base's own head (2, unused, where the task has none)."""
        return self.sizes.labels if self.task in CLASSIFYING else 2


def make_loud(model: nn.Module, seed: int) -> None:
    """Weights, biases and norms of a size that makes every one of them matter."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in tables:
                parameter.copy_(noise * 0.6)
            elif parameter.dim() > 1:
                fan_in = parameter.shape[-1] if parameter.dim() != 4 else parameter[0].numel()
                parameter.copy_(noise * 1.2 / fan_in**0.5)
            else:
                parameter.add_(noise * 0.2)
