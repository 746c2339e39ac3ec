"""Many threads loading, unloading and inferring on one engine: no wrong answer, no drift of the base."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterExists, AdapterNotFound
from adapter_router.types import Row, RowResult
from tests.tiny import TinyBase, peft_logits, random_features, weights_digest

SECONDS = 60
THREADS = 32
ADAPTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (3, {}),
    "rank-64": (2, {"r": 64, "lora_alpha": 3}),
    "pissa": (4, {"init_lora_weights": "pissa", "r": 4}),
    "olora": (2, {"init_lora_weights": "olora"}),
    "dora": (5, {"use_dora": True}),
    "bias-all": (3, {"bias": "all"}),
    "pooler": (7, {"modules_to_save": ["pooler"]}),
    "embedding": (2, {"target_modules": ["query", "word_embeddings"]}),
    "tokens": (3, {"trainable_token_indices": list(range(5, 40))}),
    "all-linear": (6, {"target_modules": "all-linear", "r": 2}),
}


@pytest.mark.timeout(SECONDS + 240)
def test_32_threads_load_unload_and_infer_without_a_wrong_answer(tmp_path: Path) -> None:
    base = TinyBase("bert", tmp_path / "base")
    # Room for about half of the adapters: loading, eviction and reloading go on all the time.
    config = EngineConfig(base=str(base.directory), device="cpu", adapter_memory_bytes=120_000)
    rng = np.random.default_rng(0)
    inputs = [random_features(rng) for _ in range(12)]
    expected: dict[str, list[np.ndarray]] = {}
    directories = {}
    for seed, (name, (labels, lora)) in enumerate(ADAPTERS.items()):
        directories[name] = base.adapter(tmp_path / name, labels, seed, **lora)
        alone = base.alone(directories[name], labels)
        expected[name] = [peft_logits(alone, features) for features in inputs]
    with Engine(config) as engine:
        before = weights_digest(engine.base.model)
        for name, directory in directories.items():
            engine.load_adapter(name, directory)
        soak = _Soak(engine, directories, inputs, expected)
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(soak.run, range(THREADS)))
        assert weights_digest(engine.base.model) == before
    assert soak.wrong == [] and soak.answered > 1000 and soak.reloaded > 20
    assert engine.metrics.evictions._value.get() > 20


class _Soak:
    """Every fourth thread loads and unloads, the others ask."""

    def __init__(self, engine: Engine, directories: dict[str, Path], inputs: list[Any], expected: Any) -> None:
        self.engine, self.directories, self.inputs, self.expected = engine, directories, inputs, expected
        self.wrong: list[str] = []
        self.answered = self.reloaded = 0
        self._lock = threading.Lock()
        self._stop = time.monotonic() + SECONDS

    def run(self, number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < self._stop:
            if number % 4 == 0:
                self._reload(rng.choice(list(self.directories)))
            else:
                self._ask(rng)

    def _reload(self, name: str) -> None:
        try:
            self.engine.unload_adapter(name)
            self.engine.load_adapter(name, self.directories[name])
        except (AdapterExists, AdapterNotFound):  # another thread was faster
            return
        with self._lock:
            self.reloaded += 1

    def _ask(self, rng: random.Random) -> None:
        asked = [(rng.choice(list(self.expected)), rng.randrange(len(self.inputs))) for _ in range(rng.randint(1, 12))]
        outcomes = self.engine.infer([Row(self.inputs[index], name) for name, index in asked])
        for (name, index), outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, AdapterNotFound):  # unloaded just now
                continue
            right = isinstance(outcome, RowResult) and np.allclose(
                outcome.logits, self.expected[name][index], atol=2e-4, rtol=0
            )
            with self._lock:
                self.answered += 1
                if not right:
                    self.wrong.append(f"{name}: {outcome}")
