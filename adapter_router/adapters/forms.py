"""Adapters trained alike differ in numbers, not in form: what was found out about one holds for the next.

A form is everything that validation looks at but the numbers: configuration, manifest, and names, shapes and dtypes of
the tensors. Where an adapter passed whose numbers no check compared, others of its form pass as well.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections import OrderedDict
from collections.abc import Mapping

import torch

from adapter_router.adapters.adapter_tensors import AdapterTensors
from adapter_router.adapters.strict_json import parse_object
from adapter_router.types import AdapterFiles, TaskKind

_REMEMBERED = 256
_SETS = ("target_modules", "exclude_modules", "modules_to_save")
_NOT_LOOKED_AT = "base_model_name_or_path"

Key = bytes


class Forms:
    """Forms that passed on one base, those used last. Thread-safe."""

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self._remembered = remembered
        self._forms: OrderedDict[Key, tuple[AdapterTensors, dict[int, str]]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: Key, tensors: Mapping[str, torch.Tensor]) -> AdapterTensors | None:
        """An adapter of a known form with ``tensors``, by their names in the file; labels are those of another."""
        with self._lock:
            known = self._forms.get(key)
            if known is None:
                return None
            self._forms.move_to_end(key)
        form, names = known
        return form.mapped(lambda tensor: tensors[names[id(tensor)]])

    def __contains__(self, key: Key) -> bool:
        return key in self._forms

    def learn(self, key: Key, adapter: AdapterTensors, tensors: Mapping[str, torch.Tensor]) -> None:
        """Remember the form of an adapter that passed, if each tensor of its file is in it as it was read.

        A tensor that is not may have been left out because of its numbers.
        """
        marks = {id(tensor): torch.empty(0, device="meta") for tensor in tensors.values()}
        used: set[int] = set()

        def marked(tensor: torch.Tensor) -> torch.Tensor:
            used.add(id(tensor))
            return marks.get(id(tensor), tensor)

        form = adapter.mapped(marked)
        if used == marks.keys():
            names = {id(marks[id(tensor)]): name for name, tensor in tensors.items()}
            with self._lock:
                self._forms[key] = form, names
                while len(self._forms) > self._remembered:
                    self._forms.popitem(last=False)


def form_of(files: AdapterFiles, task: TaskKind | None) -> Key:
    """What decides whether the files pass for ``task``, but for numbers, labels, and files from before training."""
    header = files.weights[8 : 8 + struct.unpack("<Q", files.weights[:8])[0]] if len(files.weights) >= 8 else b""
    hasher = hashlib.sha256(repr(task).encode())
    for part in (_tidied(files.config), files.manifest or b"", header):
        hasher.update(len(part).to_bytes(8) + part)
    return hasher.digest()


def _tidied(config: bytes) -> bytes:
    """The configuration without what differs between trainings of one kind: PEFT writes sets as they come."""
    document, problems = parse_object(config, "adapter_config.json")
    if document is None or problems:
        return config
    for name in _SETS:
        if isinstance(entries := document.get(name), list) and all(isinstance(entry, str) for entry in entries):
            document[name] = sorted(set(entries))
    return json.dumps({name: value for name, value in document.items() if name != _NOT_LOOKED_AT}).encode()
