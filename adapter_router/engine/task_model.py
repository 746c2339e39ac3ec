"""The base under one task's head: transformers' own class, whose backbone all tasks share."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from adapter_router.adapters.base_spec import BaseSpec
from adapter_router.adapters.head_config import ACTIVATIONS, default_activation
from adapter_router.engine import describe
from adapter_router.engine.auto_classes import AUTO_CLASSES, CLASSIFIERS
from adapter_router.engine.probe import WatchedModules
from adapter_router.quantization.base import WeightSource, quantize_model
from adapter_router.types import Activation, TaskKind

_MAX_TEMPLATES = 16


class TaskModel:
    """One task's model. Weights are read-only. ``quantized``: bits of the modules that are, by name."""

    def __init__(
        self,
        task: TaskKind,
        source: str,
        dtype: str,
        device: torch.device,
        packed: WeightSource | None = None,
        backbone: nn.Module | None = None,
    ) -> None:
        """Read the checkpoint ``source`` as the model for ``task``.

        ``packed``: where quantised weights come from. ``backbone``: already on the device, used in place of the own one
        if it is of the same class.
        """
        self.task = task
        self._auto_class: Any = AUTO_CLASSES[task]
        # A question has two answers, start and end, however many labels the checkpoint's own head has.
        options = {"num_labels": 2} if task == "question-answering" else {}
        model, info = self._auto_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self.dtype: torch.dtype = self.model.dtype
        self.untrained: frozenset[str] = frozenset(info["missing_keys"])
        self.config: PretrainedConfig = self.model.config
        # A cache would be one for all rows: copies of a saved layer would see each other's keys.
        caching = "use_cache" in inspect.signature(self.model.forward).parameters
        self.options = {"return_dict": True, **({"use_cache": False} if caching else {})}
        # Decoders score a row at its last token that is not padding. One that knows of no padding token is told which
        # one this batch was padded with, a token that none of its rows has.
        is_text = self.model.main_input_name == "input_ids"
        self._finds_padding_by_id = is_text and task == "text-classification" and self.config.pad_token_id is None
        self._templates: dict[int, PreTrainedModel] = {}
        self._lock = threading.Lock()
        # Looked up before the backbone is shared: ties are told by identity.
        self._embedding, self._tied = describe.input_embedding(self.model), describe.tied_modules(self.model)
        own = getattr(self.model, self.model.base_model_prefix, None)
        self.backbone_path: str = self.model.base_model_prefix if isinstance(own, nn.Module) else ""
        self.full_bytes = _num_bytes(self.model)
        self.quantized: dict[str, int] = {}
        shared = backbone is not None and self.share_backbone(backbone)
        if packed is not None and not shared:  # before it moves: the device need not have room for the whole
            has_head = task != "embedding"
            self.quantized = quantize_model(self.model, self.backbone_path, self.untrained, packed, has_head=has_head)
        self.num_bytes = _num_bytes(self.model)
        self.model.to(device)

    @property
    def backbone(self) -> nn.Module:
        """The part below the head; the model itself where it has none."""
        backbone: nn.Module = self.model.get_submodule(self.backbone_path)
        return backbone

    def share_backbone(self, backbone: nn.Module) -> bool:
        """Use ``backbone`` in place of the own one if it is of the same class."""
        if type(backbone) is not type(self.backbone):
            return False
        if self.backbone_path:
            setattr(self.model, self.backbone_path, backbone)
        else:
            self.model = backbone
        return True

    def run(self, features: Mapping[str, torch.Tensor], padding: int | None = None) -> torch.Tensor:
        """Raw output of (rows, …): logits, start and end logits side by side, or the backbone's last hidden state.

        ``padding``: the token that the batch is filled up with.
        """
        if self._finds_padding_by_id:
            self.config.pad_token_id = padding
        return self.raw(self.model(**features, **self.options))

    def raw(self, output: Any) -> torch.Tensor:
        """The task's tensor of a model's output."""
        if self.task == "question-answering":
            return torch.stack([output.start_logits, output.end_logits], dim=-1)
        tensor: torch.Tensor = output.last_hidden_state if self.task == "embedding" else output.logits
        return tensor

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the base head's own labels; none for tasks without."""
        if self.task not in CLASSIFIERS:
            return ()
        return tuple(self.config.id2label[index] for index in range(self.config.num_labels))

    @property
    def activation(self) -> Activation:
        """How the base head's own logits become scores."""
        if self.task not in CLASSIFIERS:
            return "none"
        if self.task == "token-classification":
            return "softmax"
        return ACTIVATIONS.get(self.config.problem_type) or default_activation(self.config.num_labels)

    def build_head(
        self, path: str, parameters: Mapping[str, torch.Tensor], num_labels: int, device: torch.device
    ) -> nn.Module:
        """A fresh module like the base's ``path`` for ``num_labels`` labels, holding ``parameters`` on ``device``."""
        with self._lock:
            head: nn.Module = copy.deepcopy(self._template(num_labels).get_submodule(path))
        placed = {name: tensor.to(device, self.dtype, copy=True) for name, tensor in parameters.items()}
        head.load_state_dict(placed, strict=True, assign=True)
        self._fill_constants(head, self.model.get_submodule(path), device)
        left = [name for name, tensor in (*head.named_parameters(), *head.named_buffers()) if tensor.is_meta]
        if left:
            raise RuntimeError(f"saved module {path} has tensors that no adapter file holds: {left}")
        return head.eval().requires_grad_(False)

    def _fill_constants(self, head: nn.Module, own: nn.Module, device: torch.device) -> None:
        """Buffers that no checkpoint holds are the base's."""
        for name, buffer in own.named_buffers():
            path, _, leaf = name.rpartition(".")
            target = head.get_submodule(path)
            if getattr(target, leaf).is_meta:
                setattr(target, leaf, buffer.to(device, copy=True))

    def describe(self, watched: WatchedModules, fingerprint: str) -> BaseSpec:
        """What validation needs to know; ``watched``: what a probe saw."""
        own = self._template(self.config.num_labels)
        axes = {}
        if self.task in CLASSIFIERS:
            axes = describe.label_axes(self._template(2), self._template(3))
        untrained = self.untrained
        if self.task == "embedding":  # vectors are pooled by us, from the last hidden state
            untrained = frozenset(name for name in untrained if "pooler" not in name.split("."))
        return BaseSpec(
            task=self.task,
            model_type=self.config.model_type,
            labels=self.labels,
            activation=self.activation,
            backbone=self.backbone_path,
            backbone_name=self.model.base_model_prefix,
            heads=self._heads(own),
            modules=frozenset(path for path, _ in own.named_modules() if path),
            called=watched.called,
            targets=describe.target_specs(own),
            shiftable=describe.shiftable_modules(own),
            parameters=describe.parameter_shapes(own),
            label_axes=axes,
            untrained=untrained,
            transposed_experts=describe.transposed_experts(own),
            embedding=self._embedding,
            tied=self._tied,
            fingerprint=fingerprint,
        )

    def _heads(self, own: PreTrainedModel) -> frozenset[str]:
        """Children that a model without the task does not have."""
        if self.task not in (*CLASSIFIERS, "question-answering"):
            return frozenset()
        children = {name for name, _ in own.named_children()}
        if self.backbone_path:
            return frozenset(children - {self.backbone_path})
        with torch.device("meta"):
            bare = AutoModel.from_config(self.config)
        return frozenset(children - {name for name, _ in bare.named_children()})

    def _template(self, num_labels: int) -> PreTrainedModel:
        """The architecture with ``num_labels`` labels, without weights."""
        if self.task not in CLASSIFIERS:
            num_labels = self.config.num_labels
        if num_labels not in self._templates:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.pop(next(iter(self._templates)))
            config = copy.deepcopy(self.config)
            config.num_labels = num_labels
            with torch.device("meta"):
                self._templates[num_labels] = type(self.model)._from_config(config)
        return self._templates[num_labels]


def _num_bytes(model: nn.Module) -> int:
    """Of all parameters; tied ones count once."""
    return sum(parameter.nbytes for parameter in model.parameters())
