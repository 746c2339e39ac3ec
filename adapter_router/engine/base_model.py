"""The shared base: transformers' own model with grouped layers, its tokenizer and its shapes. Weights are read-only."""

from __future__ import annotations

import copy
import hashlib
import inspect
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from adapter_router.adapters.base_spec import BaseSpec, LinearSpec
from adapter_router.adapters.head_config import ACTIVATIONS, default_activation
from adapter_router.catalog.location import resolve
from adapter_router.config import EngineConfig
from adapter_router.engine.inputs import FEATURES, InputEncoder, InputLimits
from adapter_router.engine.layers import GroupedLinear, GroupedModule
from adapter_router.engine.plan import ActivePlan, BatchPlan
from adapter_router.engine.probe import padding_error, rowwise_modules, zeros_are_default
from adapter_router.engine.tasks import AUTO_CLASSES
from adapter_router.types import Activation, TaskKind

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
_WEIGHTS = "model.safetensors"
_MAX_TEMPLATES = 16
_OPTIONAL = ("token_type_ids",)  # features that a row may leave out


class BaseModel:
    """One base model under one task's head, shared by all adapters."""

    def __init__(self, config: EngineConfig, task: TaskKind = "text-classification") -> None:
        """Load the base named by ``config``.

        Raises ValueError when its weights are not those ``config.base_sha256`` names.
        """
        self._auto_class: Any = AUTO_CLASSES[task]
        self.device = _device(config.device)
        source = resolve(config.base)
        _check_digest(source, config.base_sha256)
        self.model, untrained = self._read(source, config.dtype)
        self._config: PretrainedConfig = self.model.config
        # A cache would be one for all rows: copies of a saved layer would see each other's keys.
        caching = "use_cache" in inspect.signature(self.model.forward).parameters
        self._options = {"return_dict": True, **({"use_cache": False} if caching else {})}
        self._active = ActivePlan()
        self._templates: dict[int, PreTrainedModel] = {}
        self._grouped_modules: dict[str, GroupedModule] = {}
        self._lock = threading.Lock()
        tokenizer = _tokenizer(source)
        limits = self._probe(_limits(self.model, tokenizer), config.base)
        self.encoder = InputEncoder(tokenizer, limits)
        self.spec = self._describe(untrained, limits.features)
        self.fingerprint = _fingerprint(self.model, untrained)
        for path, module in list(self.model.named_modules()):
            if path in self.spec.linears:
                GroupedLinear(module, path, self._active)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def labels(self) -> tuple[str, ...]:
        """The base head's own label names."""
        return tuple(self._config.id2label[index] for index in range(self._config.num_labels))

    @property
    def activation(self) -> Activation:
        """How the base head's own logits become scores."""
        return ACTIVATIONS.get(self._config.problem_type) or default_activation(self._config.num_labels)

    def forward(self, features: Mapping[str, torch.Tensor], plan: BatchPlan) -> torch.Tensor:
        """Logits of (rows, widest head), padded with NaN; rows as sorted in ``plan``. One forward at a time."""
        with torch.inference_mode(), self._active.running(plan):
            logits: torch.Tensor = self.model(**features, **self._options).logits
        return logits

    def build_head(self, path: str, parameters: Mapping[str, torch.Tensor], num_labels: int) -> nn.Module:
        """A fresh module like the base's ``path`` for ``num_labels`` labels, holding ``parameters`` on our device."""
        with self._lock:
            head: nn.Module = copy.deepcopy(self._template(num_labels).get_submodule(path))
        placed = {name: tensor.to(self.device, self.dtype, copy=True) for name, tensor in parameters.items()}
        head.load_state_dict(placed, strict=True, assign=True)
        left = [name for name, tensor in (*head.named_parameters(), *head.named_buffers()) if tensor.is_meta]
        if left:
            raise RuntimeError(f"saved module {path} has tensors that no adapter file holds: {left}")
        return head.eval().requires_grad_(False)

    def group_module(self, path: str) -> None:
        """Let rows of different adapters run through their own copies of the module ``path`` from now on."""
        with self._lock:
            if path not in self._grouped_modules:
                self._grouped_modules[path] = GroupedModule(self.model.get_submodule(path), path, self._active)

    def _read(self, source: str, dtype: str) -> tuple[PreTrainedModel, frozenset[str]]:
        model, info = self._auto_class.from_pretrained(source, dtype=dtype, output_loading_info=True)
        model = model.to(self.device).eval().requires_grad_(False)
        return model, frozenset(info["missing_keys"])

    def _probe(self, limits: InputLimits, name: str) -> InputLimits:
        """Refuse an architecture that cannot be batched exactly; drop features whose absence means something else."""
        ids = (limits.vocab_size, limits.pad_token_id, self.device)
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.2  # half precision alone moves small logits by percents
        try:
            error = padding_error(self.model, *ids)
            kept = [f for f in limits.features if f not in _OPTIONAL or zeros_are_default(self.model, f, *ids)]
        except Exception as failure:
            raise ValueError(f"base {name!r} cannot run a padded batch of text rows: {failure}") from failure
        if not error <= tolerance:
            raise ValueError(
                f"base {name!r} ({self._config.model_type}): padding moves its logits by {error:.1e} of their size, so "
                "rows of different length cannot share a batch exactly"
            )
        return replace(limits, features=tuple(kept))

    def _describe(self, untrained: frozenset[str], features: tuple[str, ...]) -> BaseSpec:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        fewer, more = self._template(2).state_dict(), self._template(3).state_dict()
        label_axes = {
            name: next(axis for axis, size in enumerate(tensor.shape) if size != more[name].shape[axis])
            for name, tensor in fewer.items()
            if tensor.shape != more[name].shape
        }
        linears = {path: spec for path, module in self.model.named_modules() if (spec := _linear_spec(module))}
        rowwise = rowwise_modules(self.model, features, self.device)
        return BaseSpec(
            model_type=self._config.model_type,
            labels=self.labels,
            activation=self.activation,
            linears=linears,
            parameters=shapes,
            label_axes=label_axes,
            untrained=untrained,
            rowwise=rowwise,
        )

    def _template(self, num_labels: int) -> PreTrainedModel:
        """The architecture with ``num_labels`` labels, without weights."""
        if num_labels not in self._templates:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.pop(next(iter(self._templates)))
            config = copy.deepcopy(self._config)
            config.num_labels = num_labels
            with torch.device("meta"):
                self._templates[num_labels] = self._auto_class.from_config(config)
        return self._templates[num_labels]


def _check_digest(source: str, expected: str | None) -> None:
    if expected is None:
        return
    path = Path(source) / _WEIGHTS
    if not path.is_file():
        raise ValueError(f"base {source!r} has no {_WEIGHTS} to compare with base_sha256")
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise ValueError(f"base {source!r}: {_WEIGHTS} has sha256 {actual}, expected {expected}")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    # Without this look transformers builds an empty tokenizer for a directory that has none.
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in _TOKENIZER_FILES):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    return tokenizer


def _limits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> InputLimits:
    config = model.config
    max_tokens = getattr(config, "max_position_embeddings", None) or 1 << 30
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from padding_idx + 1, so that many rows of its table are never used.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            max_tokens = min(max_tokens, module.num_embeddings - unused)
    if tokenizer is not None:
        max_tokens = min(max_tokens, tokenizer.model_max_length)
    accepted = inspect.signature(model.forward).parameters
    features = tuple(name for name in FEATURES if name in accepted)
    type_vocab_size = getattr(config, "type_vocab_size", None) or 1
    return InputLimits(config.vocab_size, max_tokens, features, config.pad_token_id or 0, type_vocab_size)


def _linear_spec(module: nn.Module) -> LinearSpec | None:
    if isinstance(module, nn.Linear):
        return LinearSpec(module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        return LinearSpec(module.weight.shape[0], module.weight.shape[1])
    return None


def _fingerprint(model: PreTrainedModel, untrained: frozenset[str]) -> str:
    """sha256 over names and bytes of all weights that came from the checkpoint."""
    hasher = hashlib.sha256(model.config.model_type.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name not in untrained:
            hasher.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return "sha256:" + hasher.hexdigest()
