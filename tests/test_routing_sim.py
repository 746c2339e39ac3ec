"""The simulator of ``benchmarks.routing_sim``: every row is answered once, always the same way; and what we promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.routing_sim import plot
from benchmarks.routing_simulation.routers import PEERS
from benchmarks.routing_simulation.setting import Setting
from benchmarks.routing_simulation.traces import TRACES
from benchmarks.routing_simulation.world import Figures, simulate

TINY = Setting(replicas=10, adapters=200, slots=8, rows=3000)
SMALL = Setting(replicas=10, adapters=1000, slots=40, rows=15_000)


def run(rule: str, name: str, setting: Setting, *, lru: bool = False) -> Figures:
    return simulate(rule, TRACES[name](setting, np.random.default_rng(1)), setting, lru=lru)


@pytest.mark.parametrize("rule", ["ours", *PEERS])
@pytest.mark.parametrize("name", ["zipf 1.5", "failure", "growth"])
def test_every_row_is_answered_once_and_every_run_is_the_same(rule: str, name: str) -> None:
    one = run(rule, name, TINY)  # it checks each row
    assert one == run(rule, name, TINY)
    assert 0 < one.hit_rate < 1 and one.rows < TINY.rows and one.balance >= 1


def test_no_replica_has_a_quarter_more_to_do_than_the_mean() -> None:
    assert run("ours", "zipf 1.0", SMALL).balance <= 1.25
    assert run("consistent hash", "zipf 1.0", SMALL).balance > 2


@pytest.mark.parametrize("name", ["failure", "growth"])
def test_a_change_of_replicas_moves_their_share_of_adapters_alone(name: str) -> None:
    moved = run("ours", name, TINY).moved
    assert moved is not None and 0 < moved <= 1.5


@pytest.mark.parametrize("name", ["zipf 1.0", "burst", "failure"])
def test_more_hits_than_the_peers_as_they_are(name: str) -> None:
    ours = run("ours", name, SMALL)
    assert all(run(peer, name, SMALL, lru=True).hit_rate < ours.hit_rate for peer in PEERS)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    figures = {name: {rule: run(rule, name, TINY) for rule in ("ours", *PEERS)} for name in ("zipf 1.0", "growth")}
    plot(tmp_path / "plot.png", figures)
    with Image.open(tmp_path / "plot.png") as image:
        assert len(image.getcolors(1 << 16) or ()) > len(PEERS)
