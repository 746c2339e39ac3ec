"""``adapter-router quantize``: a LoftQ base and the adapter that training starts from.

The directory written is an ordinary transformers checkpoint of the dequantised weights, which PEFT can train on
anywhere; ``quantized.safetensors`` beside it, which the engine serves in its place; and ``initial_adapter``, which
names the base by its fingerprint.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapter_router.adapters.adapter_config import MAX_RANK
from adapter_router.adapters.keys import listed
from adapter_router.catalog.location import resolve
from adapter_router.config import QuantizationConfig
from adapter_router.engine.auto_classes import AUTO_CLASSES, served_tasks
from adapter_router.engine.base_files import device_of, fingerprint_of
from adapter_router.engine.task_model import TaskModel
from adapter_router.quantization.base import DTYPES, ByConfig, weight_source
from adapter_router.quantization.bits import KEPT_BITS
from adapter_router.quantization.initial_adapter import INITIAL_ADAPTER, InitialAdapter, untouched_factors
from adapter_router.quantization.loftq import loftq
from adapter_router.quantization.packed_file import FILE, write_packed
from adapter_router.quantization.report import LayerReport, Report
from adapter_router.quantization.schemes import Packed, pack, unpack
from adapter_router.quantization.weights import matrix_of, quantizable
from adapter_router.types import TaskKind

_CPU = torch.device("cpu")
_MAX_ITERATIONS = 1000
# Weights in whatever format: the written ones take their place.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".ot", ".msgpack", ".npz", ".gguf", ".index.json"),
    *(".onnx", ".onnx_data"),
)
# What models compute for themselves, and old checkpoints hold all the same.
_COMPUTED = ("position_ids", "inv_freq", "masked_bias")


@dataclass(frozen=True)
class Order:
    """What to write. ``base``: a directory, or ``package:module/subdir``. ``task``: whose class PEFT will train.

    ``targets``: ends of the paths of linear layers that the adapter changes; none means all of them. ``device``
    computes the decompositions, ``seed`` is that of layers left at 16 bits, whose adapter starts as PEFT's own.
    """

    base: str
    out: Path
    bits: int = 4
    bits_pattern: Mapping[str, int] = field(default_factory=dict)
    rank: int = 16
    iterations: int = 5
    targets: tuple[str, ...] = ()
    task: TaskKind | None = None
    device: str = "cpu"
    seed: int = 0


class InvalidOrder(ValueError):
    """``problems``: every reason why nothing was written."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def quantize(order: Order, progress: Callable[[str], object] = str) -> Report:
    """Write ``order.out``, all of it or nothing; ``progress`` is told a line for each layer.

    Raises InvalidOrder with every problem, ValueError or OSError when the base cannot be had.
    """
    source = resolve(order.base)
    if not Path(source).is_dir():
        raise ValueError("must be a directory, or package:module/subdir")
    base = _Checkpoint(source)
    plan = _plan(order, base)
    layers, packed, factors = [], {}, {}
    generator = torch.Generator().manual_seed(order.seed)
    for path, bits in plan.bits.items():
        try:
            done = _decompose(base.modules[path], bits, order, path in plan.targets, generator)
        except ValueError as error:
            raise InvalidOrder([f"{plan.names[path]}: {error}"]) from error
        if done.packed is not None:
            packed[path] = done.packed
        if done.factors is not None:
            factors[path] = done.factors
        layers.append(done.report(plan.names[path], bits))
        progress(layers[-1].line())
    with _all_or_nothing(order.out) as scratch:
        base.save(scratch)
        if packed:
            write_packed(scratch / FILE, packed)
        written = TaskModel(
            base.tasks[0], str(scratch), "auto", _CPU, weight_source(str(scratch), base.config, _CPU, None)
        )
        fingerprint = fingerprint_of(written.model, written.untrained)
        transposed = any(isinstance(base.modules[path], Conv1D) for path in factors)
        name, task = str(order.out.resolve()), plan.task
        adapter = InitialAdapter(name, fingerprint, task, base.prefix(task), order.rank, transposed, factors)
        adapter.write(scratch / INITIAL_ADAPTER)
        _readable(scratch)
    return Report(str(order.out), fingerprint, tuple(layers))


class _Checkpoint:
    """The base as the class that its checkpoint is of, so that it is written under the names it was read by.

    ``modules``: linear layers of the backbone, by their paths inside it.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.config: PretrainedConfig = AutoConfig.from_pretrained(source)
        self.tasks = served_tasks(self.config)
        self.model, self._untrained, self.left_over = self._whole()
        model = self.model
        bare = AutoModel._model_mapping.get(type(self.config), None)
        self.modules = quantizable(model, _backbone_path(model), self._untrained, has_head=type(model) is not bare)

    def _whole(self) -> tuple[PreTrainedModel, frozenset[str], list[str]]:
        """The checkpoint in the first class that reads all of it; what it lacks there, and what no class reads."""
        named = [getattr(transformers, name, None) for name in self.config.architectures or []]
        classes: list[Any] = [kind for kind in named if isinstance(kind, type) and issubclass(kind, PreTrainedModel)]
        autos = (AutoModelForPreTraining, *(AUTO_CLASSES[task] for task in self.tasks), AutoModel)
        classes += [auto for auto in autos if type(self.config) in auto._model_mapping]
        left_over: list[str] = []
        for kind in classes:
            model, info = kind.from_pretrained(self.source, dtype="auto", output_loading_info=True)
            left_over = [name for name in sorted(info["unexpected_keys"]) if not name.endswith(_COMPUTED)]
            if not left_over:
                break
        return model.eval().requires_grad_(False), frozenset(info["missing_keys"]), left_over

    def prefix(self, task: TaskKind) -> str:
        """What ``task``'s model calls its backbone; "" where it is nothing else."""
        with torch.device("meta"):
            return _backbone_path(AUTO_CLASSES[task].from_config(self.config))

    def names(self) -> dict[str, str]:
        """Layers as the model of the base's own task calls them, which patterns are matched against."""
        own = self.tasks[0]
        prefix = self.prefix(own) or (self.model.base_model_prefix if own == "embedding" else "")
        return {path: f"{prefix}.{path}" if prefix else path for path in self.modules}

    def save(self, directory: Path) -> None:
        """Write configuration, weights that the checkpoint had, and every other file beside them."""
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in self._untrained}
        self.model.save_pretrained(directory, state_dict=state)
        for file in Path(self.source).iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS) and not (directory / file.name).exists():
                shutil.copyfile(file, directory / file.name)


def _readable(directory: Path) -> None:
    """safetensors writes files for their owner alone; let all be as readable as the configuration."""
    for file in directory.rglob("*.safetensors"):
        shutil.copymode(directory / "config.json", file)


def _backbone_path(model: PreTrainedModel) -> str:
    prefix: str = model.base_model_prefix
    return prefix if isinstance(getattr(model, prefix, None), nn.Module) else ""


@dataclass(frozen=True)
class _Plan:
    """By path inside the backbone; ``names`` as patterns see them."""

    task: TaskKind
    names: Mapping[str, str]
    bits: Mapping[str, int]
    targets: frozenset[str]


def _plan(order: Order, base: _Checkpoint) -> _Plan:
    """What is done to each layer. Raises InvalidOrder with every problem."""
    problems = _order_problems(order, base)
    names = base.names()
    bits: dict[str, int] = {}
    try:
        config = QuantizationConfig(order.bits, order.bits_pattern)
        weight_source(base.source, base.config, _CPU, config)
        by_config = ByConfig(config)
        bits = by_config.choose(names)
        by_config.check()
    except ValueError as error:
        problems.append(str(error))
    matched = {target: {path for path in names if _ends_in(names[path], target)} for target in order.targets}
    problems += [
        f"target-modules: {t!r:.80} is no linear layer of this base" for t, paths in matched.items() if not paths
    ]
    targets = frozenset(path for paths in matched.values() for path in paths) if order.targets else frozenset(names)
    narrow = [path for path in targets if min(matrix_of(base.modules[path]).shape) < order.rank]
    if narrow:
        problems.append(f"rank {order.rank} is more than {len(narrow)} layers allow, e.g. {names[min(narrow)]}")
    if problems:
        raise InvalidOrder(problems)
    return _Plan(order.task or base.tasks[0], names, bits, targets)


def _order_problems(order: Order, base: _Checkpoint) -> list[str]:
    problems = []
    if os.path.lexists(order.out):
        problems.append(f"out: {order.out} exists already")
    if order.out.resolve().is_relative_to(Path(base.source).resolve()):
        problems.append(f"out: {order.out} lies inside the base, which is only read")
    if base.left_over:
        problems.append(f"no class of transformers reads all of this base; left over: {listed(base.left_over)}")
    if not 1 <= order.rank <= MAX_RANK:
        problems.append(f"rank is {order.rank}, must be from 1 to {MAX_RANK}")
    if not 0 <= order.seed < 1 << 63:
        problems.append(f"seed is {order.seed}, must be from 0 to 2^63 - 1")
    problems += [
        f"{path} is {matrix_of(module).dtype}, served are float32, float16 and bfloat16"
        for path, module in base.modules.items()
        if matrix_of(module).dtype not in DTYPES
    ]
    try:
        torch.zeros(1, device=device_of(order.device))
    except (RuntimeError, AssertionError) as error:
        problems.append(f"device {order.device!r:.80}: {str(error).splitlines()[0]}")
    if not 1 <= order.iterations <= _MAX_ITERATIONS:
        problems.append(f"iterations is {order.iterations}, must be from 1 to {_MAX_ITERATIONS}")
    if order.task is not None and order.task not in base.tasks:
        problems.append(f"task {order.task!r} is not one of this base: {', '.join(base.tasks)}")
    return problems


def _ends_in(path: str, target: str) -> bool:
    """PEFT's rule for a list of target modules."""
    return path == target or path.endswith(f".{target}")


@dataclass(frozen=True)
class _Decomposed:
    """``packed`` None: left as it was; ``factors`` None: the adapter does not change it."""

    packed: Packed | None
    factors: tuple[torch.Tensor, torch.Tensor] | None
    bytes_before: int
    plain_error: float = 0.0
    error: float = 0.0

    def report(self, name: str, bits: int) -> LayerReport:
        after = self.bytes_before if self.packed is None else self.packed.num_bytes
        rank = None if self.factors is None else len(self.factors[0])
        return LayerReport(name, bits, rank, self.bytes_before, after, self.plain_error, self.error)


def _decompose(module: nn.Module, bits: int, order: Order, is_target: bool, generator: torch.Generator) -> _Decomposed:
    """Round ``module``'s weight in place."""
    stored = matrix_of(module)
    weight, size = stored.float(), stored.nbytes
    if bits == KEPT_BITS:
        shape = (weight.shape[0], weight.shape[1])
        return _Decomposed(None, untouched_factors(shape, order.rank, generator) if is_target else None, size)
    plain = pack(weight, bits)
    plain_error = float((weight - unpack(plain, stored.dtype).float()).norm())
    if is_target:
        result = loftq(weight, bits, order.rank, order.iterations, str(device_of(order.device)))
        packed, factors, change = result.packed, (result.a, result.b), result.b @ result.a
    else:
        packed, factors, change = plain, None, torch.zeros(())
    rounded = unpack(packed, stored.dtype)
    error = float((weight - (rounded.float() + change)).norm())
    # Another tensor in its place: the old one may be a mapping of the checkpoint's file.
    module.get_parameter("weight").data = rounded.t().contiguous() if isinstance(module, Conv1D) else rounded
    return _Decomposed(packed, factors, size, plain_error, error)


@contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """A directory that becomes ``out`` at the end, or is removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.parent / f".{out.name}.{uuid.uuid4().hex}"
    scratch.mkdir()
    try:
        yield scratch
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
