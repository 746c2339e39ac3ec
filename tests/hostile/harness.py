"""What must hold of every refusal, and the measuring of it."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterNotFound, AdapterRejected
from adapter_router.types import Row, RowResult
from tests.hostile.case import ROOM_BYTES
from tests.hostile.good import GOOD, save_adapter, save_base

MAX_CPU_S = 2.0 if sys.gettrace() is None else 5.0
"""Processor time, so that other work on the machine fails nothing; waiting for ever is what pytest's timeout is for.
Coverage's tracing costs a multiple of what is traced."""
MAX_MORE_BYTES = 80 << 20
"""On top of twice the directory's size."""
MAX_MESSAGE = 64 << 10
_WITNESS = "witness"


@dataclass
class Cost:
    """CPU seconds and the growth of this process's resident memory at its peak (None where Linux is not there)."""

    cpu_s: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def measured() -> Iterator[Cost]:
    """Resident memory counts whatever torch, Python and the allocator hold."""
    cost = Cost()
    gc.collect()
    before = _reset_peak()
    start = time.process_time()
    try:
        yield cost
    finally:
        cost.cpu_s = time.process_time() - start
        if before is not None:
            cost.peak_bytes = _memory("VmHWM") - before


def _reset_peak() -> int | None:
    """Resident bytes, from which on the peak is counted again."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory is used again unseen
        Path("/proc/self/clear_refs").write_text("5")
        return _memory("VmRSS")
    except (OSError, AttributeError):
        return None


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


@dataclass
class Site:
    """One base's engine with one loaded adapter, whose answer to one row nothing may change."""

    base: str
    engine: Engine
    row: Row
    answer: bytes = b""
    weights: str = ""
    resident: list[str] = field(default_factory=list)

    def remember(self) -> None:
        """Take the present state for the right one."""
        self.answer, self.weights, self.resident = self._answer(), self._digest(), self.engine.resident()

    def assert_untouched(self, name: str) -> None:
        """Nothing is registered, resident or different."""
        assert self.engine.resident() == self.resident
        (unknown,) = self.engine.infer([Row(self.row.inputs, name)])
        assert type(unknown) is AdapterNotFound
        assert self._answer() == self.answer
        assert self._digest() == self.weights

    def _answer(self) -> bytes:
        (result,) = self.engine.infer([self.row])
        assert isinstance(result, RowResult), result
        return result.logits.tobytes()

    def _digest(self) -> str:
        """Of the weights under all heads."""
        hasher = hashlib.sha256()
        for task in self.engine.base.tasks:
            for name, tensor in sorted(self.engine.base.task(task).model.model.state_dict().items()):
                hasher.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return hasher.hexdigest()


class Sites:
    """Bases, engines and good adapters, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._engines = ExitStack()
        self._sites: dict[str, Site] = {}

    def close(self) -> None:
        self._engines.close()

    def adapter(self, name: str) -> Path:
        """The good adapter ``name``; not to be written to."""
        directory = self._root / f"adapter {name}"
        return directory if directory.exists() else save_adapter(name, self._base(GOOD[name].base), directory)

    def copy(self, name: str, directory: Path) -> Path:
        """A copy of the good adapter ``name``, to be spoiled."""
        return shutil.copytree(self.adapter(name), directory)

    def site(self, base: str) -> Site:
        """The engine of a served base, with the good adapter of the base's name as its witness (DoRA on BERT)."""
        if base not in self._sites:
            config = EngineConfig(
                base=str(self._base(base)),
                device="cpu",
                adapter_memory_bytes=ROOM_BYTES,
                store_dir=self._root / f"store {base}",
            )
            engine = self._engines.enter_context(Engine(config))
            witness = "dora" if base == "bert" else base
            engine.load_adapter(_WITNESS, self.adapter(witness))
            site = Site(base, engine, Row(_features(base), _WITNESS))
            site.remember()
            self._sites[base] = site
            gc.collect()
            gc.freeze()  # so that collecting before each measurement takes no time
        return self._sites[base]

    def _base(self, name: str) -> Path:
        directory = self._root / f"base {name}"
        return directory if directory.exists() else save_base(name, directory)


def _features(base: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    if base == "vit":
        return {"pixel_values": rng.standard_normal((3, 16, 16)).astype(np.float32)}
    return {"input_ids": rng.integers(5, 100, 12)}


def refusal(site: Site, directory: Path, **options: Any) -> AdapterRejected:
    """The refusal of ``directory``, cheap, typed and without a trace."""
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    with measured() as cost, pytest.raises(AdapterRejected) as caught:
        site.engine.load_adapter("bad", directory, **options)
        site.engine.unload_adapter("bad")  # served after all: the next case shall not suffer for it
    site.assert_untouched("bad")
    message, problems = str(caught.value), caught.value.problems
    assert len(message) <= MAX_MESSAGE, f"{len(problems)} problems make a message of {len(message)} characters"
    assert problems and all(problem in message for problem in problems)
    assert cost.cpu_s < MAX_CPU_S
    if cost.peak_bytes is not None:
        assert cost.peak_bytes <= 2 * size + MAX_MORE_BYTES
    return caught.value


def assert_named(problems: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    for fragment in fragments:
        assert any(fragment in problem for problem in problems), f"{fragment!r} is not among {problems}"
