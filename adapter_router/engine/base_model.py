"""The shared base: one backbone under the heads of several tasks, its inputs and its shapes. Weights are read-only."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)

from adapter_router.adapters.base_spec import BaseSpec
from adapter_router.adapters.base_weights import BaseWeights
from adapter_router.catalog.location import resolve
from adapter_router.config import EngineConfig
from adapter_router.engine.auto_classes import served_tasks
from adapter_router.engine.backbone import SharedBackbone, rows_of
from adapter_router.engine.base_files import (
    check_digest,
    device_of,
    fingerprint_of,
)
from adapter_router.engine.inputs import TextEncoder
from adapter_router.engine.layers import GroupedModule
from adapter_router.engine.plan import ActivePlan, BatchPlan, Segment
from adapter_router.engine.probe import Batch, WatchedModules, watch_modules
from adapter_router.engine.row_encoder import row_encoder
from adapter_router.engine.task_model import TaskModel
from adapter_router.engine.trials import Trials
from adapter_router.quantization.base import weight_source
from adapter_router.quantization.weights import ServedTensors
from adapter_router.types import TaskKind

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedTask:
    """One task's model, what validation knows of it, and what a probe saw.

    ``shares``: its head gives the same answer on a backbone output computed before. ``pads_left``: prompts of different
    length may be continued side by side.
    """

    model: TaskModel
    spec: BaseSpec
    weights: BaseWeights
    watched: WatchedModules
    shares: bool
    pads_left: bool


class BaseModel:
    """One base model, shared by all adapters of all its tasks. A task's head is read when it is first needed.

    ``quantized``: bits of the modules that are, by name in the model of the base's own task. ``num_bytes``: of that
    model's parameters; ``full_bytes``: what they would take unquantised.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Load the base named by ``config``.

        Raises ValueError when its weights are not those ``config.base_sha256`` names, or it cannot run a batch exactly.
        """
        self.device = device_of(config.device)
        self.lock = threading.RLock()  # held by whoever runs the model or changes how it runs
        self._name = config.base
        self._source = resolve(config.base)
        self._dtype = config.dtype
        check_digest(self._source, config.base_sha256)
        checkpoint = AutoConfig.from_pretrained(self._source)
        self.tasks = served_tasks(checkpoint)
        self._packed = weight_source(self._source, checkpoint, self.device, config.quantization, config.dtype)
        self._active = ActivePlan()
        self._grouped: dict[nn.Module, GroupedModule] = {}
        self._prepared: dict[TaskKind, PreparedTask] = {}
        self._failed: dict[TaskKind, str] = {}
        self._shared: SharedBackbone | None = None
        self._preparing = threading.RLock()  # one task at a time; never taken while ``lock`` is held
        self._grouping = threading.Lock()
        first = self._read(self.tasks[0])
        if first.task != "embedding" and not _is_bare(first.backbone, first.config):
            self.tasks = tuple(task for task in self.tasks if task != "embedding")
        self.fingerprint = fingerprint_of(first.model, first.untrained)
        self.dtype: torch.dtype = first.dtype
        self.quantized, self.num_bytes, self.full_bytes = first.quantized, first.num_bytes, first.full_bytes
        if self.quantized:
            logger.info(
                "base %s: %d modules quantised to %s bits, %d bytes instead of %d",
                self._name,
                len(self.quantized),
                ", ".join(str(bits) for bits in sorted(set(self.quantized.values()))),
                self.num_bytes,
                self.full_bytes,
            )
        self.encoder = row_encoder(self._source, first, self.device)
        self._trials = Trials(self._name, self.encoder, self.device, self.dtype)
        has_backbone = bool(first.backbone_path) or first.task == "embedding"
        self._backbone = _whole_backbone(first, lambda: self._read("embedding")) if has_backbone else first.backbone
        if self._packed is not None:
            self._packed.check()
        self._shared = SharedBackbone(self._backbone) if has_backbone else None
        self._backbone_options = first.options
        self._prepared[first.task] = self._prepare(first)
        if isinstance(self.encoder, TextEncoder):
            with self.lock, torch.inference_mode():
                self.encoder.masks_anywhere = self._trials.keeps_masked_rows(first)

    @property
    def model(self) -> PreTrainedModel:
        """The model of the base's own task."""
        return self._prepared[self.tasks[0]].model.model

    @property
    def spec(self) -> BaseSpec:
        """Shapes under the head of the base's own task."""
        return self._prepared[self.tasks[0]].spec

    def task(self, task: TaskKind) -> PreparedTask:
        """The base under ``task``'s head. Raises ValueError as the constructor does, KeyError for no task of ours."""
        if task not in self.tasks:
            raise KeyError(task)
        if task not in self._prepared:
            with self._preparing:
                if task in self._failed:
                    raise ValueError(self._failed[task])
                if task not in self._prepared:
                    try:
                        self._prepared[task] = self._prepare(self._read(task))
                    except Exception as error:
                        self._failed[task] = str(error)
                        raise
        return self._prepared[task]

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def hidden_size(self) -> int:
        """Numbers in a token's vector; 0 where the base has no embeddings to give."""
        return int(self.model.config.hidden_size) if "embedding" in self.tasks else 0

    def end_tokens(self, task: TaskKind) -> frozenset[int]:
        """Tokens that end a text generated for ``task``."""
        ends = self._prepared[task].model.model.generation_config.eos_token_id
        return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)

    def may_share(self, tasks: Sequence[TaskKind]) -> bool:
        """Whether rows of all ``tasks`` can go through the backbone together."""
        return self._shared is not None and all(self._prepared[task].shares for task in tasks)

    def forward(self, features: Batch, plan: BatchPlan, padding: int | None) -> list[tuple[Segment, torch.Tensor]]:
        """Raw output of every segment's rows; ragged ends are NaN. The caller holds ``lock``.

        ``padding``: the token that ``features`` are filled up with.
        """
        self._await(plan)
        tasks = plan.tasks()
        features = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in features.items()}
        with torch.inference_mode(), self._active.running(plan):
            if len(tasks) == 1:
                raw = self._prepared[plan.segments[0].task].model.run(features, padding)
                return [(s, raw[s.start : s.stop]) for s in plan.segments]
            output = self._backbone(**features, **self._backbone_options)
            answers = []
            for task, segments in tasks.items():
                own = rows_of(output, segments, plan.num_rows)
                chosen = {name: rows_of(tensor, segments, plan.num_rows) for name, tensor in features.items()}
                with self._active.running(plan.narrowed(segments)):
                    raw = self._finish(self._prepared[task].model, chosen, own, padding)
                offset = 0
                for segment in segments:
                    count = segment.stop - segment.start
                    answers.append((segment, raw[offset : offset + count]))
                    offset += count
        return answers

    def generate(self, features: Batch, plan: BatchPlan, max_new_tokens: int) -> torch.Tensor:
        """Token ids of transformers' greedy search, (rows, tokens). The caller holds ``lock``."""
        self._await(plan)
        model = self._prepared[plan.segments[0].task].model.model
        with torch.inference_mode(), self._active.running(plan):
            ids: torch.Tensor = model.generate(
                **features, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True
            )
        return ids

    def group(self, task: TaskKind, path: str) -> None:
        """Let adapters act on the module ``path`` from now on.

        A forward may be running: whoever it runs for has no change there, so that the module does what it did.
        """
        prepared = self.task(task)
        module = prepared.model.model.get_submodule(path)
        with self._grouping:
            if module not in self._grouped:
                rows = prepared.watched.rows.get(path)
                self._grouped[module] = GroupedModule(module, self.plan_path(task, path), self._active, rows)

    def plan_path(self, task: TaskKind, path: str) -> str:
        """The name under which all tasks know the module ``path``: heads may call the backbone differently."""
        backbone = self._prepared[task].model.backbone_path
        if not backbone:
            return f".{path}" if task == "embedding" else path
        return path.removeprefix(backbone) if path.startswith(backbone + ".") else path

    def _await(self, plan: BatchPlan) -> None:
        """Let the device, not this thread, wait for adapters that are still being copied to it."""
        for segment in plan.segments:
            if segment.adapter is not None and segment.adapter.arrived is not None:
                segment.adapter.arrived.wait(torch.cuda.current_stream(self.device))

    def _read(self, task: TaskKind) -> TaskModel:
        backbone = None if self._shared is None else self._backbone
        return TaskModel(task, self._source, self._dtype, self.device, self._packed, backbone)

    def _finish(self, model: TaskModel, features: Batch, output: object, padding: int | None) -> torch.Tensor:
        """One task's head on the backbone's ``output``."""
        assert self._shared is not None
        if model.task == "embedding":
            return model.raw(output)
        with self._shared.answering(output):
            return model.run(features, padding)

    def _prepare(self, model: TaskModel) -> PreparedTask:
        """Share the backbone, then look at how the model behaves."""
        shared = self._shared is not None and model.share_backbone(self._backbone)
        with self.lock, torch.inference_mode():
            self._trials.check_padding(model)
            watched = watch_modules(model.model, self._trials.batch, self._trials.runner(model))
            shares = shared and self._replays(model)
            pads_left = model.task == "text-generation" and self._trials.pads_left(model)
        spec = model.describe(watched, self.fingerprint)
        served = ServedTensors(model.model, dict(model.model.named_parameters(remove_duplicate=False)))
        weights = BaseWeights(served, spec.targets, served.quantized)
        return PreparedTask(model, spec, weights, watched, shares, pads_left)

    def _replays(self, model: TaskModel) -> bool:
        """Whether the head, given the backbone's output, answers as the whole model does."""
        if model.task == "embedding":
            return True
        batch, padding = self._trials.batch(), self._trials.padding
        replayed = self._finish(model, batch, self._backbone(**batch, **self._backbone_options), padding)
        return torch.allclose(replayed.float(), model.run(batch, padding).float(), rtol=1e-4, atol=1e-5)


def _is_bare(backbone: nn.Module, config: PretrainedConfig) -> bool:
    """Whether the backbone is what the checkpoint gives without a head."""
    return type(config) in AutoModel._model_mapping and type(backbone) is AutoModel._model_mapping[type(config)]


def _whole_backbone(first: TaskModel, read: Callable[[], TaskModel]) -> nn.Module:
    """The backbone with all parts that any head may want: some heads' own lacks the pooler."""
    if first.task == "embedding" or not _is_bare(first.backbone, first.config):
        return first.backbone
    with torch.device("meta"):
        whole = AutoModel.from_config(first.config)
    if set(whole.state_dict()) <= set(ServedTensors(first.backbone, first.backbone.state_dict())):
        return first.backbone
    backbone: nn.Module = read().model
    return backbone
