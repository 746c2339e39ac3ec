"""Broken and hostile files: containers, documents, things that are no files at all, and links that lead out."""

from __future__ import annotations

import json
import os
import pickle
import socket
from pathlib import Path

from tests.hostile.case import ROOM_BYTES, Case
from tests.hostile.spoil import (
    CONFIG,
    HEAD,
    INITIAL,
    MANIFEST,
    PREFIX,
    WEIGHTS,
    Spoil,
    both,
    container,
    document,
    dropped,
    entry,
    file_bytes,
)

_DAMAGED = (f"{WEIGHTS} is damaged",)
_HUGE = 1 << 62


class _Payload:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def _pickled(name: str) -> Spoil:
    return lambda directory: (directory / name).write_bytes(pickle.dumps(_Payload(directory / "executed")))


def _fifo(name: str) -> Spoil:
    def spoil(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return spoil


def _socket(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    here = Path.cwd()
    os.chdir(directory)  # a socket's path may only be short
    try:
        socket.socket(socket.AF_UNIX).bind(WEIGHTS)
    finally:
        os.chdir(here)


def _folder(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).mkdir()


def _link(name: str, target: str) -> Spoil:
    def spoil(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)

    return spoil


def _moved_out(name: str, where: str, *, absolute: bool = False) -> Spoil:
    """The file lies at ``where``, relative to the directory, and a link to it in its place."""

    def spoil(directory: Path) -> None:
        outside = (directory / where).resolve()
        outside.parent.mkdir(parents=True, exist_ok=True)
        (directory / name).rename(outside)
        (directory / name).symlink_to(outside if absolute else where)

    return spoil


def _initial_outside(directory: Path) -> None:
    (directory / "initial").rename(directory.parent / "elsewhere")
    (directory / "initial").symlink_to("../elsewhere")


def _chained(directory: Path) -> None:
    """A link inside the directory to a link that leads out of it."""
    _moved_out("second", "../elsewhere")(_with_second(directory))
    (directory / WEIGHTS).symlink_to("second")


def _with_second(directory: Path) -> Path:
    (directory / WEIGHTS).rename(directory / "second")
    return directory


def _looped(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to("second")
    (directory / "second").symlink_to(WEIGHTS)


def _truncated(directory: Path) -> None:
    path = directory / WEIGHTS
    os.truncate(path, path.stat().st_size - 100)


def _enlarged(directory: Path) -> None:
    path = directory / WEIGHTS
    os.truncate(path, path.stat().st_size + 100)


def _sparse(directory: Path) -> None:
    """Half a GiB that takes no room where it came from: more than all adapters together may have on the device."""
    os.truncate(directory / WEIGHTS, 8 * ROOM_BYTES)


def _many(count: int, dtype: str) -> Spoil:
    names = (f"{PREFIX}bert.encoder.layer.0.attention.self.query{index}.lora_A.weight" for index in range(count))
    return container({name: entry([0, 8], 0, 0, dtype) for name in names})


def _nested(depth: int) -> bytes:
    return b'{"a": ' + b"[" * depth + b"]" * depth + b"}"


def _config_with(name: str, raw: str) -> Spoil:
    """A field whose value is ``raw`` text."""

    def spoil(directory: Path) -> None:
        fields = json.loads((directory / CONFIG).read_text())
        fields.pop(name, None)
        (directory / CONFIG).write_text(json.dumps(fields)[:-1] + f', "{name}": {raw}}}')

    return spoil


def _twice(directory: Path) -> None:
    """One of the header's names stands there twice, with two shapes of one size."""
    raw = (directory / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].decode().rstrip()
    name, place = next((n, e) for n, e in json.loads(header).items() if n.endswith("lora_A.weight"))
    other = json.dumps({name: {**place, "shape": place["shape"][::-1]}})[1:-1]
    container(f"{{{other}, {header[1:]}".encode(), raw[end:])(directory)


KINDS = (
    Case("pickle alone", both(_pickled("adapter_model.bin"), dropped(WEIGHTS)), ("adapter_model.bin is a pickle",)),
    Case("pickle under the name of safetensors", _pickled(WEIGHTS), (WEIGHTS,)),
    Case("FIFO for weights", _fifo(WEIGHTS), (f"{WEIGHTS} is not a regular file",)),
    Case("FIFO for config", _fifo(CONFIG), (f"{CONFIG} is not a regular file",)),
    Case("FIFO for labels", _fifo(HEAD), (f"{HEAD} is not a regular file",)),
    Case("FIFO for manifest", _fifo(MANIFEST), (f"{MANIFEST} is not a regular file",)),
    Case("FIFO for initial", _fifo(INITIAL), (f"{INITIAL} is not a regular file",)),
    Case("socket for weights", _socket, (f"{WEIGHTS} is not a regular file",)),
    Case("directory for weights", _folder, (f"{WEIGHTS} is not a regular file",)),
    Case("device for weights", _link(WEIGHTS, "/dev/zero"), (WEIGHTS,)),
    Case("device for config", _link(CONFIG, "/dev/full"), (CONFIG,)),
    Case("config absent", dropped(CONFIG), (f"{CONFIG} is missing",)),
    Case("weights absent", dropped(WEIGHTS), (f"{WEIGHTS} is missing",)),
    Case("larger than the room for all", _sparse, (WEIGHTS,)),
)

LINKS = (
    Case("weights of a neighbour", _moved_out(WEIGHTS, "../elsewhere"), (WEIGHTS, "outside")),
    Case("weights of a neighbour, absolute", _moved_out(WEIGHTS, "../elsewhere", absolute=True), (WEIGHTS, "outside")),
    Case("config of the system", _link(CONFIG, "/etc/passwd"), (CONFIG, "outside")),
    Case("labels of a neighbour", both(document(HEAD, {}), _moved_out(HEAD, "../elsewhere")), (HEAD, "outside")),
    Case("manifest of a neighbour", both(document(MANIFEST, {}), _moved_out(MANIFEST, "../e")), (MANIFEST, "outside")),
    Case("initial in another directory", _initial_outside, ("initial", "outside"), of="fast pissa"),
    Case("link to a link that leads out", _chained, (WEIGHTS, "outside")),
    Case("up and down again", _moved_out(WEIGHTS, "../../b/c"), (WEIGHTS, "outside")),
    Case("blobs of no hub cache", _moved_out(WEIGHTS, "../../blobs/x"), (WEIGHTS, "outside")),
    Case("dangling", _link(WEIGHTS, "nowhere"), (WEIGHTS,)),
    Case("loop", _looped, (WEIGHTS,)),
)

CONTAINERS = (
    Case("empty", file_bytes(WEIGHTS, b""), _DAMAGED),
    Case("seven bytes", file_bytes(WEIGHTS, b"1234567"), _DAMAGED),
    Case("truncated", _truncated, _DAMAGED),
    Case("enlarged", _enlarged, _DAMAGED),
    Case("header longer than the file", container(b"{}", length=1000), _DAMAGED),
    Case("header of 2^62 bytes", container(b"{}", length=_HUGE), (f"header of {_HUGE} bytes",)),
    Case("header cut short", container({"a": entry([1], 0, 4)}, bytes(4), length=9), _DAMAGED),
    Case("header not text", container(b"\xff\xfe" * 8), _DAMAGED),
    Case("header a list", container(b"[1, 2]"), _DAMAGED),
    Case("header of numbers", container(b'{"a": 5}'), _DAMAGED),
    Case("header nested deep", container(_nested(200_000)), _DAMAGED),
    Case("header of a million lists", container(b'{"a": [' + b"[], " * 1_000_000 + b"[]]}"), _DAMAGED),
    Case("no tensors", container(b"{}"), ("the adapter has no tensor for this base",)),
    Case("overlap", container({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), _DAMAGED),
    Case("hole", container({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), _DAMAGED),
    Case("bytes beyond the last tensor", container({"a": entry([1], 0, 4)}, bytes(8)), _DAMAGED),
    Case("tensor beyond the end", container({"a": entry([1 << 20], 0, 4 << 20)}, bytes(8)), _DAMAGED),
    Case("tensor that ends before it starts", container({"a": entry([1], 4, 0)}, bytes(4)), _DAMAGED),
    Case("negative place", container({"a": entry([1], -4, 0)}, bytes(4)), _DAMAGED),
    Case("half a place", container({"a": entry([1], 0, 4.5)}, bytes(4)), _DAMAGED),
    Case("shape larger than its bytes", container({"a": entry([1000], 0, 4)}, bytes(4)), _DAMAGED),
    Case("shape beyond 64 bits", container({"a": entry([1 << 33, 1 << 33], 0, 4)}, bytes(4)), _DAMAGED),
    Case("nothing, 2^124 times", container({"a": entry([0, _HUGE, _HUGE], 0, 0)}), (WEIGHTS,)),
    Case("nothing, 2^63 times", container({"a": entry([0, 1 << 63], 0, 0)}), (WEIGHTS,)),
    Case("a hundred axes", container({"a": entry([1] * 100, 0, 4)}, bytes(4)), (WEIGHTS,)),
    Case("dtype in a list", container({"a": entry([1], 0, 4, ["F32"])}, bytes(4)), _DAMAGED),
    Case("dtype of half bytes", container({"a": entry([2], 0, 1, "F4")}, bytes(1)), ("a has dtype F4",)),
    Case("one name twice", _twice, ("lora_A.weight",)),
    Case("100,000 tensors", _many(100_000, "F32"), (WEIGHTS,)),
    Case("30,000 tensors", _many(30_000, "F32"), (" tensors",)),
    Case("30,000 tensors of int8", _many(30_000, "I8"), ("dtype I8",)),
    Case("name of 4 MB", container({"x" * 4_000_000: entry([1], 0, 4, "I8")}, bytes(4)), ("dtype I8",)),
    Case("name that forges a line", container({"x\n  - all well": entry([1], 0, 1, "I8")}, b"1"), (r"x\n  - all",)),
)

DOCUMENTS = (
    Case("config not JSON", file_bytes(CONFIG, b"{'r': 8}"), (f"{CONFIG} is not JSON",)),
    Case("config not text", file_bytes(CONFIG, b"\xff\xfe"), (f"{CONFIG} is not JSON",)),
    Case("config a list", file_bytes(CONFIG, b"[]"), (f"{CONFIG} is not a JSON object",)),
    Case("config too large", file_bytes(CONFIG, b" " * (1 << 20) + b"{}"), (f"{CONFIG} has 1048578 bytes",)),
    Case("config nested deep", file_bytes(CONFIG, _nested(100_000)), (f"{CONFIG} is not JSON",)),
    Case("config nested just so", _config_with("r", "[" * 900 + "]" * 900), ("r is [[[",)),
    Case("unknown field nested just so", _config_with("gate", "[" * 900 + "]" * 900), ("gate", "is not served")),
    Case("number of a million digits", _config_with("r", "9" * 1_000_000), (CONFIG,)),
    Case(
        "50,000 unknown fields", document(CONFIG, {"peft_type": "LORA"} | {f"f{i}": 1 for i in range(50_000)}), ("f0",)
    ),
    Case("labels not JSON", file_bytes(HEAD, b"{"), (f"{HEAD} is not JSON",)),
    Case("labels nested deep", file_bytes(HEAD, _nested(100_000)), (f"{HEAD} is not JSON",)),
    Case("labels too large", file_bytes(HEAD, b" " * (2 << 20)), (f"{HEAD} has 2097152 bytes",)),
    Case("manifest not JSON", file_bytes(MANIFEST, b"{"), (f"{MANIFEST} is not JSON",)),
    Case("manifest a list", file_bytes(MANIFEST, b"[]"), (f"{MANIFEST} is not a JSON object",)),
    Case("manifest nested deep", file_bytes(MANIFEST, _nested(100_000)), (f"{MANIFEST} is not JSON",)),
    Case("manifest too large", file_bytes(MANIFEST, b" " * (2 << 20)), (f"{MANIFEST} has 2097152 bytes",)),
    Case("initial truncated", lambda d: os.truncate(d / INITIAL, 100), ("initial: ", "damaged"), of="fast pissa"),
)

CASES = (*KINDS, *LINKS, *CONTAINERS, *DOCUMENTS)
