"""A merged adapter -> the files of a normal PEFT directory: LoRA of scaling 1, float32.

    adapter_config.json, adapter_model.safetensors    what PEFT loads; the weights' metadata says what was merged
    config.json                                       label names and activation, where the task has labels
    adapter_router.json                               the task, and what else no PEFT file says

Float32, whatever the inputs': rounding a sum to the parts' half precision would cost it four of its digits, and PEFT
computes LoRA in float32 anyhow.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from adapter_router.adapters.adapter_config import IMPLIED_SAVED
from adapter_router.adapters.base_spec import BaseSpec
from adapter_router.adapters.base_weights import BaseWeights
from adapter_router.adapters.coverage.findings import tails
from adapter_router.adapters.delta import AdapterDelta
from adapter_router.adapters.head_config import ACTIVATIONS
from adapter_router.adapters.keys import PREFIX
from adapter_router.adapters.tasks import TASK_TYPES
from adapter_router.adapters.tuners.tuner import Weights
from adapter_router.merging import biases
from adapter_router.merging.heads import Head, Saved
from adapter_router.merging.loading import WriteFailed
from adapter_router.types import TaskKind

METADATA_KEY = "adapter_router_merge"


@dataclass(frozen=True)
class MergedAdapter:
    """``delta``: LoRA of scaling 1, shifts of biases to be written as ``biases`` says, saved modules with the head's.

    ``provenance``: JSON object. ``base_name``, ``base_fingerprint``: what the parts' files say, if they agree.
    """

    task: TaskKind
    delta: AdapterDelta
    biases: biases.BiasForm
    head: Head
    provenance: Mapping[str, Any]
    base_name: str | None
    base_fingerprint: str | None

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every module that has LoRA."""
        return {path: module.rank for path, module in self.delta.modules.items() if module.rank}


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new directory beside ``target``, so that one rename moves it there; removed if it is still there.

    Raises WriteFailed.
    """
    room = target.absolute().parent / f".merging-{secrets.token_hex(8)}"
    try:  # entered before there is anything, lest a signal between the two leaves it behind
        with writing(target):
            room.mkdir(mode=0o700)
            (room / "adapter").mkdir()
        yield room / "adapter"
    finally:
        shutil.rmtree(room, ignore_errors=True)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """What the disk refuses is told as a fault of ``target``."""
    try:
        yield
    except OSError as error:
        raise WriteFailed(error.errno, error.strerror or str(error), os.fspath(target)) from error


def with_copies(saved: Saved, spec: BaseSpec, weights: BaseWeights) -> Saved:
    """``saved`` and the base's own of every other module that PEFT takes for saved: it ends in the name of one."""
    names = tuple(path for path in saved if path)
    roots = sorted(path for path in spec.modules if path.endswith(names) and spec.parameters_of(path))
    known = {f"{path}.{name}": tensor for path, module in saved.items() for name, tensor in module.items()}
    copied = {
        path: {
            name: known.get(f"{path}.{name}", own.detach().to("cpu", torch.float32))
            for name, own in weights.parameters_of(path).items()
        }
        for path in roots
        if not any(path.startswith(root + ".") for root in roots)
    }
    return copied | {path: m for path, m in saved.items() if not any(f"{path}.".startswith(f"{c}.") for c in copied)}


def write(directory: Path, adapter: MergedAdapter, spec: BaseSpec, weights: Weights) -> None:
    """Write all files into ``directory``, which exists. Raises OSError."""
    metadata = {"format": "pt", METADATA_KEY: json.dumps(adapter.provenance, sort_keys=True)}
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(adapter, spec, weights).items()}
    (directory / "adapter_model.safetensors").write_bytes(_in_order(save(tensors, metadata)))
    _dump(directory / "adapter_config.json", _config(adapter, spec))
    _dump(directory / "adapter_router.json", _manifest(adapter))
    if adapter.head.labels:
        _dump(directory / "config.json", _head_config(adapter.head, spec))


def _in_order(raw: bytes) -> bytes:
    """A safetensors file with its header sorted: safetensors writes the metadata in random order, so that one merge
    would have another digest each time.
    """
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.dumps(json.loads(raw[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def _dump(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


def _tensors(adapter: MergedAdapter, spec: BaseSpec, weights: Weights) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    shifts = {path: module.shift for path, module in adapter.delta.modules.items() if module.shift is not None}
    for path, module in adapter.delta.modules.items():
        if module.a is None or module.b is None:
            continue
        table = spec.targets[path].kind == "embedding"
        down, up = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{path}.{down}": module.a, f"{path}.{up}": module.b}
        if adapter.biases == "lora_bias":
            none = torch.zeros(spec.targets[path].out_features)
            tensors[f"{path}.lora_B.bias"] = shifts.get(path, none)
    if adapter.biases == "all":
        paths = biases.biased(spec, adapter.delta.saved)
        for path, bias in biases.values(paths, shifts, weights).items():
            tensors[f"{path}.base_layer.bias" if path in adapter.ranks else f"{path}.bias"] = bias
    for path, parameters in adapter.delta.saved.items():
        tensors |= {f"{path}.{name}": tensor for name, tensor in parameters.items()}
    return {PREFIX + name: tensor.clone() for name, tensor in tensors.items()}


def _config(adapter: MergedAdapter, spec: BaseSpec) -> dict[str, Any]:
    ranks = adapter.ranks
    rank = Counter(ranks.values()).most_common(1)[0][0]
    patterns = _patterns(ranks, rank)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(adapter, spec),
        "base_model_name_or_path": adapter.base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(adapter.delta.saved) or None,
        "bias": "all" if adapter.biases == "all" else "none",
        "lora_bias": adapter.biases == "lora_bias",
        "fan_in_fan_out": any(spec.targets[path].transposed for path in ranks),
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
    }


def _task_type(adapter: MergedAdapter, spec: BaseSpec) -> str | None:
    """None where PEFT would take the task's head for a saved module, and the adapter brings none."""
    task_type = next((name for name, task in TASK_TYPES.items() if task == adapter.task), None)
    implied = [path for path in spec.modules if path.endswith(IMPLIED_SAVED.get(task_type or "", ("\0",)))]
    saved = adapter.delta.saved
    missing = [path for path in implied if not any(path == root or path.startswith(root + ".") for root in saved)]
    return None if missing else task_type


def _patterns(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """``rank_pattern`` of the modules without the ``usual`` rank: the shortest tails that only name their like."""
    by_tail: dict[str, set[int]] = {}
    for path, rank in ranks.items():
        for tail in tails(path):
            by_tail.setdefault(tail, set()).add(rank)
    patterns: dict[str, int] = {}
    for path, rank in ranks.items():
        if rank != usual:
            unlike = [tail for tail in tails(path) if by_tail[tail] == {rank}]
            # A whole path may be the tail of another's; only its start tells them apart.
            patterns[re.escape(unlike[-1]) if unlike else "^" + re.escape(path)] = rank
    return patterns


def _head_config(head: Head, spec: BaseSpec) -> dict[str, Any]:
    problem_types = {activation: name for name, activation in ACTIVATIONS.items()}
    return {
        "model_type": spec.model_type,
        "id2label": {str(index): label for index, label in enumerate(head.labels)},
        "label2id": {label: index for index, label in enumerate(head.labels)},
        "problem_type": problem_types[head.activation],
    }


def _manifest(adapter: MergedAdapter) -> dict[str, Any]:
    manifest: dict[str, Any] = {"task": adapter.task}
    if adapter.task == "embedding":
        manifest |= asdict(adapter.head.embedding)
    if adapter.base_fingerprint is not None:
        manifest["base_fingerprint"] = adapter.base_fingerprint
    return manifest
