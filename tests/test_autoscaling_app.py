"""Autoscaling of a running application: a Ray of its own, tiny bases, and a load that never stops."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic

import httpx
import numpy as np
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.types import Row, RowResult
from deployments.app import APP_NAME, AppArgs
from deployments.local import deploy, local_ray
from tests.serving import Application, free_port, wait_for
from tests.tiny import TinyBase, random_features

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

_logger = logging.getLogger(__name__)  # seconds: for those who look, with log_cli

_ADAPTERS = [f"adapter-{number}" for number in range(14)]
_FEW = _ADAPTERS[:3]
_RARE = "rare"
_BARE = "the base itself, which every replica has"
_START_S = 200.0  # a replica takes 5 s to start on a machine with nothing else to do; this is for one that has


class Load:
    """One row of each hot adapter, over and over; every answer is compared with the adapter's own."""

    def __init__(self, app: Application, rows: dict[str, Row], alone: dict[str, np.ndarray]) -> None:
        self.hot = _FEW
        self.replicas: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._app = app
        self._rows = rows
        self._alone = alone
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Load:
        self._start(pause_s=0.1)
        return self

    def rise(self) -> None:
        """From now on rows are always under way, to every replica."""
        self.hot = [*self.hot, _BARE]
        for _ in range(3):
            self._start(pause_s=0.0)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _start(self, pause_s: float) -> None:
        self._threads.append(threading.Thread(target=self._run, args=(pause_s,)))
        self._threads[-1].start()

    def _run(self, pause_s: float) -> None:
        while not self._stop.wait(pause_s):
            names = self.hot
            try:
                outcomes = self._app.infer_many([self._rows[name] for name in names])
            except Exception as error:
                self.wrong.append(repr(error))
                continue
            for name, outcome in zip(names, outcomes, strict=True):
                if not isinstance(outcome, RowResult):
                    self.wrong.append(f"{name}: {outcome!r}")
                elif not np.allclose(outcome.logits, self._alone[name], atol=1e-4):
                    self.wrong.append(f"{name}: another adapter's answer")
                else:
                    self.replicas[outcome.replica or ""] += 1


class Scaled:
    """The application, and what Serve and Ray say of it."""

    def __init__(self, app: Application, rows: dict[str, Row], alone: dict[str, np.ndarray]) -> None:
        self.app = app
        self.rows = rows
        self._alone = alone

    def load(self) -> Load:
        return Load(self.app, self.rows, self._alone)

    def running(self, deployment: str = "replica") -> int:
        states = serve.status().applications[APP_NAME].deployments[deployment].replica_states
        return states.get("RUNNING", 0) if sum(states.values()) == states.get("RUNNING", 0) else -1

    def metric(self, name: str, **labels: str) -> float | None:
        """As Prometheus gets it from Ray on this node; None while it is not there."""
        (node,) = ray.nodes()
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        families = text_string_to_metric_families(text)
        samples = [s for family in families for s in family.samples if s.name == f"ray_adapter_router_{name}"]
        values = [s.value for s in samples if labels.items() <= s.labels.items()]
        return values[0] if values else None


@pytest.fixture(scope="module")
def scaled(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scaled]:
    """Two bases: up to four replicas that shall hold four adapters each, and one that may have none."""
    root = tmp_path_factory.mktemp("autoscaling")
    other = TinyBase("distilbert", root / "distilbert")
    directories = {name: tiny_bert.adapter(root / name, 3, seed) for seed, name in enumerate(_ADAPTERS)}
    rng = np.random.default_rng(0)
    rows = {name: Row(random_features(rng), name) for name in (*_ADAPTERS, _RARE)}
    rows[_BARE] = Row(random_features(rng), task="embedding")
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu", store_dir=root / "alone")) as engine:
        size = max(engine.load_adapter(name, directory).num_bytes for name, directory in directories.items())
        alone = {name: _logits(engine, rows[name]) for name in (*_ADAPTERS, _BARE)}
    common = {"device": "cpu", "num_threads": 1, "num_cpus": 0.1}
    quick = {"upscale_delay_s": 0.25, "downscale_delay_s": 3, "report_interval_s": 0.25}
    adapters = {**directories, _RARE: other.adapter(root / _RARE, 2, 99)}
    args = AppArgs(
        base=str(tiny_bert.directory),
        # Room for eight, of which four are meant to be used: who is the home of more than four still has room.
        adapter_memory_bytes=int(8.5 * size),
        autoscaling={**quick, "max_replicas": 4, "memory_fill": 0.5, "downscale_margin": 0.8, "settle_s": 600},
        more_bases=[
            {
                "base": str(other.directory),
                "autoscaling": {**quick, "min_replicas": 0, "max_replicas": 1, "downscale_to_zero_delay_s": 2},
                **common,
            }
        ],
        store_dir=str(root / "store"),
        adapters=[{"name": name, "path": str(directory)} for name, directory in adapters.items()],
        **common,
    )
    port = free_port()
    with local_ray(port):
        yield Scaled(Application(deploy(args), port), rows, alone)


def _logits(engine: Engine, row: Row) -> np.ndarray:
    (outcome,) = engine.infer([row])
    assert isinstance(outcome, RowResult)
    return outcome.logits


def _seconds(condition: Callable[[], bool], timeout_s: float) -> float:
    start = monotonic()
    wait_for(condition, timeout_s)
    return monotonic() - start


def test_replicas_follow_the_hot_adapters_and_no_row_is_lost(scaled: Scaled) -> None:
    with scaled.load() as load:
        wait_for(lambda: load.replicas.total() > 30)
        assert scaled.running() == 1
        (first,) = load.replicas

        load.hot = _ADAPTERS
        _logger.info("3 -> 14 hot: 4 replicas after %.1f s", _seconds(lambda: scaled.running() == 4, _START_S))
        wait_for(lambda: len(load.replicas) == 4, _START_S)
        newcomers = load.replicas.keys() - {first}
        # What it was asked for first, it had: the rows that new replicas got waited for no load.
        missed = {name: scaled.app.metric("cache_misses_total", process=f"replica:{name}") for name in newcomers}
        held = {name: scaled.app.metric("adapter_loads_total", process=f"replica:{name}") for name in newcomers}
        _logger.info("rows that waited for adapters: %s, loads: %s, rows: %s", missed, held, load.replicas)
        assert not any(missed.values()) and all(held.values())

        load.hot = _FEW
        load.rise()
        _logger.info("14 -> 3 hot: 1 replica after %.1f s", _seconds(lambda: scaled.running() == 1, _START_S))
        answered = load.replicas.total()
        wait_for(lambda: load.replicas.total() > answered + 30)
    assert load.wrong == []


def test_the_reason_of_each_decision_can_be_seen(scaled: Scaled) -> None:
    """In Prometheus, from Ray's own endpoint on the controller's node."""
    for reason in ("working_set", "spare"):
        wait_for(lambda reason=reason: scaled.metric("autoscaling_decisions_total", reason=reason) == 1.0)  # type: ignore[misc]
    wait_for(lambda: scaled.metric("autoscaling_target_replicas", deployment="replica") == 1.0)
    assert scaled.metric("autoscaling_wanted_replicas", deployment="replica", rule="tokens") is not None


def test_to_zero_and_back_for_the_first_row(scaled: Scaled) -> None:
    wait_for(lambda: scaled.running("replica-1") == 0)
    assert scaled.app.http.get("/readyz").json()["ready"], "a base that sleeps is no reason to send nobody here"
    (outcome,) = scaled.app.infer_many([scaled.rows[_RARE]])
    assert isinstance(outcome, RowResult) and outcome.adapter == _RARE
    wait_for(lambda: scaled.running("replica-1") == 0)
    assert scaled.running() == 1, "the other base has nothing to do with it"
