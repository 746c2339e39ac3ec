"""Processes of the Ray that this process has started; nobody else's are ever found."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from tests.serving import serve_pids, wait_for

CONTROLLER = "ServeController"
PROXY = "ProxyActor"


def actor_pids(title: str) -> list[int]:
    """Living processes below this one whose title, which Ray gives them, has ``title`` in it."""
    return [process.pid for process in psutil.Process().children(recursive=True) if title in _title(process)]


def kill(pids: Iterable[int]) -> None:
    """SIGKILL for all of them as one: none sees another die."""
    pids = list(pids)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that do nothing and let nobody know; those that have not been killed go on afterwards."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def wait_for_successors(deployment: str, before: Iterable[int], count: int) -> None:
    """Until a deployment has ``count`` processes, and none of those ``before``."""
    gone = set(before)
    wait_for(lambda: len(now := set(serve_pids(deployment))) == count and not now & gone)


def node_pids(node: Any) -> list[int]:
    """All that runs on one node of a ``ray.cluster_utils.Cluster``: its raylet, and everything that has started."""
    daemons = [info.process.pid for kinds in node.all_processes.values() for info in kinds]
    families = [[pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))] for pid in daemons]
    return [pid for family in families for pid in family]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just died
        return ""
