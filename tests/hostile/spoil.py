"""Ways to spoil an adapter directory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEAD = "config.json"
MANIFEST = "adapter_router.json"
INITIAL = "initial/adapter_model.safetensors"

Spoil = Callable[[Path], object]
Change = Callable[[torch.Tensor], torch.Tensor]


def both(*spoils: Spoil) -> Spoil:
    return lambda directory: [spoil(directory) for spoil in spoils]


# -- files --------------------------------------------------------------------------------------------------------


def file_bytes(name: str, raw: bytes) -> Spoil:
    return lambda directory: (directory / name).write_bytes(raw)


def document(name: str, content: Any) -> Spoil:
    return file_bytes(name, json.dumps(content).encode())


def dropped(name: str) -> Spoil:
    return lambda directory: (directory / name).unlink()


def container(header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> Spoil:
    """A weights file of this header; ``length``: what it says of the header's."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return file_bytes(WEIGHTS, struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(shape: list[Any], start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


# -- configuration ------------------------------------------------------------------------------------------------


def configured(**fields: Any) -> Spoil:
    def spoil(directory: Path) -> None:
        path = directory / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return spoil


def without(field: str) -> Spoil:
    def spoil(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        del config[field]
        (directory / CONFIG).write_text(json.dumps(config))

    return spoil


# -- tensors ------------------------------------------------------------------------------------------------------


def edited(edit: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS) -> Spoil:
    """``edit`` changes the file's tensors in place."""

    def spoil(directory: Path) -> None:
        tensors = load_file(directory / file)
        edit(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, directory / file, metadata={"format": "pt"})

    return spoil


def keys(tensors: Mapping[str, torch.Tensor], ending: str) -> list[str]:
    """Keys that end so, in order; there must be one."""
    found = sorted(key for key in tensors if key.endswith(ending))
    assert found, f"no key ends in {ending!r} among {sorted(tensors)}"
    return found


def added(shapes: Mapping[str, tuple[int, ...]]) -> Spoil:
    """More tensors, of ones, by what follows the prefix."""
    return edited(lambda tensors: tensors.update({PREFIX + name: torch.ones(s) for name, s in shapes.items()}))


def removed(*endings: str) -> Spoil:
    """Every tensor whose key ends so is gone."""
    return edited(lambda tensors: [tensors.pop(key) for ending in endings for key in keys(tensors, ending)])


def changed(ending: str, change: Change, file: str = WEIGHTS) -> Spoil:
    """The first tensor whose key ends so is another one."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        key = keys(tensors, ending)[0]
        tensors[key] = change(tensors[key])

    return edited(edit, file)


def renamed(old: str, new: str) -> Spoil:
    """In the first key that ends in ``old`` the ending is ``new``."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        key = keys(tensors, old)[0]
        tensors[key.removesuffix(old) + new] = tensors.pop(key)

    return edited(edit)


def filled(value: float) -> Change:
    """The tensor with ``value`` in its last place."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the end of its last axis."""
    return tensor[..., :-1]


def empty(tensor: torch.Tensor) -> torch.Tensor:
    """No entries along the first axis."""
    return tensor[:0]
