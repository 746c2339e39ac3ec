"""One download a node: threads and processes share it, and what a killed one left is gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.errors import AdapterRejected, AdapterRouterError, AdapterUnavailable
from adapter_router.types import Source
from tests.sources.conftest import CONFIG, WEIGHTS, copies, put, quick, unfinished
from tests.sources.web_server import Handler, Request, WebServer, cut, first, status

LARGE = os.urandom((3 << 20) + 17)


class Gate:
    """Holds an answer back until it is opened."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

    def __call__(self, handler: Handler, _: Request) -> bool:
        self.reached.set()
        while not (self._opened.wait(0.05) or handler.site.closing.is_set()):
            pass
        return False

    def open(self) -> None:
        self._opened.set()


def wait_for(condition: object) -> None:
    until = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.005)


def waiting(fetcher: Fetcher) -> int:
    return sum(flight.num_waiting for flight in list(fetcher._flights._flights.values()))


@pytest.mark.parametrize("keep", [True, False])
def test_threads_share_a_download(keep: bool, web: WebServer, fetcher: Fetcher) -> None:
    uri, gate = put(web, "/a", LARGE), Gate()
    web.site.fail(f"/a/{WEIGHTS}", gate)
    with ThreadPoolExecutor(6) as pool:
        fetches = [pool.submit(fetcher.fetch, Source(uri)) for _ in range(6)]
        wait_for(lambda: waiting(fetcher) == 5)
        gate.open()
        stored = [fetch.result() for fetch in fetches]
    assert len(web.site.asked("GET", WEIGHTS)) == 1
    for number, one in enumerate(stored):
        assert one.read().weights == LARGE
        fetcher.store.settle(one, keep=keep and number == 0)
    assert copies(fetcher.store) == ([stored[0].directory] if keep else [])


def test_threads_share_a_failure(web: WebServer, fetcher: Fetcher) -> None:
    uri, gate = put(web, "/a"), Gate()
    web.site.fail(f"/a/{WEIGHTS}", gate, *[status(403)] * 9)
    web.site.fail(f"/a/{CONFIG}", status(403))

    def fetch() -> AdapterRouterError:
        with pytest.raises(AdapterRouterError) as caught:
            fetcher.fetch(Source(uri))
        return caught.value

    with ThreadPoolExecutor(4) as pool:
        fetches = [pool.submit(fetch) for _ in range(4)]
        wait_for(lambda: waiting(fetcher) == 3 or fetches[0].done())
        gate.open()
        errors = [fetch.result() for fetch in fetches]
    assert {(type(error), error.problems) for error in errors} == {(AdapterRejected, errors[0].problems)}


def test_a_pin_of_one_is_none_of_the_others(web: WebServer, fetcher: Fetcher) -> None:
    uri, gate = put(web, "/a", LARGE), Gate()
    web.site.fail(f"/a/{WEIGHTS}", gate)
    with ThreadPoolExecutor(2) as pool:
        pinned = pool.submit(fetcher.fetch, Source(uri, sha256="0" * 64))
        assert gate.reached.wait(30)
        free = pool.submit(fetcher.fetch, Source(uri))
        wait_for(lambda: waiting(fetcher) == 1)
        gate.open()
        assert free.result().read().weights == LARGE
        with pytest.raises(AdapterRejected, match="it must be"):
            pinned.result()
    assert len(web.site.asked("GET", WEIGHTS)) == 1
    fetcher.store.settle(free.result(), keep=True)
    assert len(copies(fetcher.store)) == 1


def test_different_sources_do_not_wait_for_each_other(web: WebServer, fetcher: Fetcher) -> None:
    slow, fast, gate = put(web, "/slow"), put(web, "/fast"), Gate()
    web.site.fail(f"/slow/{WEIGHTS}", gate)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(fetcher.fetch, Source(slow))
        assert gate.reached.wait(30)
        fetcher.fetch(Source(fast))
        assert not late.done()
        gate.open()
        late.result()


# -- several processes ---------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore
from adapter_router.config import SourceConfig
from adapter_router.errors import AdapterRouterError
from adapter_router.types import Source
root, uri, limits = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
for limit in limits:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
store = ContentStore(root, max_bytes=8 << 20)
fetcher = Fetcher(SourceConfig((uri, "file://"), timeout_s=30, idle_timeout_s=30, attempts=3, backoff_s=0.01), store)
print("ready", flush=True)
try:
    stored = fetcher.fetch(Source(uri))
    store.settle(stored, keep=True)
    print(stored.digest)
except AdapterRouterError as error:
    print(type(error).__name__, str(error).replace("\\n", " "))
"""


class Process:
    """Another process that fetches ``uri`` into the same store."""

    def __init__(self, root: Path, uri: str, *limits: int) -> None:
        command = [sys.executable, "-c", SCRIPT, str(root), uri, json.dumps(limits)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def answer(self) -> str:
        out, _ = self.process.communicate(timeout=60)
        return out.strip()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()


def test_processes_share_a_download(web: WebServer, store: ContentStore, processes: list[Process]) -> None:
    uri, gate = put(web, "/a", LARGE), Gate()
    web.site.fail(f"/a/{WEIGHTS}", gate)
    processes += [Process(store.root, uri) for _ in range(3)]
    assert gate.reached.wait(30)
    assert all(process.process.poll() is None for process in processes)
    gate.open()
    assert len({process.answer() for process in processes}) == 1
    assert len(web.site.asked("GET", WEIGHTS)) == 1 and len(copies(store)) == 1 and unfinished(store) == []


def test_a_killed_download_is_gone_on_with(
    web: WebServer, store: ContentStore, fetcher: Fetcher, processes: list[Process]
) -> None:
    uri = put(web, "/a", LARGE)

    def stall(handler: Handler, request: Request) -> bool:
        handler.head(200, Content_Length=str(len(LARGE)), ETag=handler.tag(LARGE))
        handler.body(request, LARGE[: 1 << 20])
        handler.wfile.flush()
        return Gate()(handler, request) or True

    web.site.fail(f"/a/{WEIGHTS}", stall)
    processes.append(Process(store.root, uri))
    partly = store.work / "downloads"
    wait_for(lambda: any(path.stat().st_size == 1 << 20 for path in partly.rglob(WEIGHTS)))
    wait_for(lambda: any(path.stat().st_size == 2 for path in partly.rglob(CONFIG)))
    processes[0].kill()
    stored = fetcher.fetch(Source(uri))
    assert stored.read().weights == LARGE
    assert [request.range for request in web.site.asked("GET", WEIGHTS)] == [None, f"bytes={1 << 20}-"]
    assert len(web.site.asked("GET", CONFIG)) == 1


def test_one_that_waits_for_another_process_does_not_wait_for_ever(
    web: WebServer, store: ContentStore, processes: list[Process]
) -> None:
    uri, gate = put(web, "/a", LARGE), Gate()
    web.site.fail(f"/a/{WEIGHTS}", gate)
    processes.append(Process(store.root, uri))
    assert gate.reached.wait(30)
    with pytest.raises(AdapterUnavailable, match="another process"):
        Fetcher(quick(uri, timeout_s=0.5), store).fetch(Source(uri))


def test_one_that_waited_for_a_process_that_died_fetches_itself(
    web: WebServer, store: ContentStore, fetcher: Fetcher, processes: list[Process]
) -> None:
    uri, gate = put(web, "/a", LARGE), Gate()
    web.site.fail(f"/a/{WEIGHTS}", gate)
    processes.append(Process(store.root, uri))
    assert gate.reached.wait(30)
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(fetcher.fetch, Source(uri))
        wait_for(lambda: fetcher._flights._flights)
        processes[0].kill()
        assert ours.result().read().weights == LARGE


# -- a full disk ---------------------------------------------------------------------------------------------------


def test_a_full_disk_is_no_fault_of_the_adapters(
    web: WebServer, store: ContentStore, fetcher: Fetcher, processes: list[Process]
) -> None:
    """The system refuses to write more than a MiB of a file; then there is room again, and the download goes on."""
    uri = put(web, "/a", LARGE)
    processes.append(Process(store.root, uri, 1 << 20))
    answer = processes[0].answer()
    assert answer.startswith("AdapterUnavailable") and uri in answer and str(store.root) in answer
    assert copies(store) == [] and len(unfinished(store)) == 1
    stored = fetcher.fetch(Source(uri))
    assert stored.read().weights == LARGE
    assert web.site.asked("GET", WEIGHTS)[-1].range == f"bytes={1 << 20}-"


def test_a_full_disk_is_no_fault_of_a_local_adapters_either(
    store: ContentStore, processes: list[Process], tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / CONFIG).write_bytes(b"{}")
    (tmp_path / "a" / WEIGHTS).write_bytes(LARGE)
    processes.append(Process(store.root, str(tmp_path / "a"), 1 << 20))
    assert processes[0].answer().startswith("AdapterUnavailable")
    assert copies(store) == []


# -- what is not finished --------------------------------------------------------------------------------------------


def leave_unfinished(web: WebServer, fetcher: Fetcher, folder: str) -> None:
    uri = put(web, folder, LARGE)
    web.site.fail(f"{folder}/{WEIGHTS}", cut(1 << 20), *[status(500)] * 3)
    with pytest.raises(AdapterUnavailable):
        fetcher.fetch(Source(uri))


def test_what_nobody_goes_on_with_is_removed_after_a_day(web: WebServer, fetcher: Fetcher) -> None:
    leave_unfinished(web, fetcher, "/old")
    (old,) = unfinished(fetcher.store)
    os.utime(old, (0, 0))
    leave_unfinished(web, fetcher, "/new")
    assert len(unfinished(fetcher.store)) == 1 and not old.exists()


def test_what_goes_while_it_is_looked_at_is_no_error(web: WebServer, fetcher: Fetcher) -> None:
    """Others finish with theirs at any time."""
    leave_unfinished(web, fetcher, "/a")
    (fetcher.store.work / "downloads" / "gone").symlink_to("nowhere")
    again = Fetcher(fetcher.config, fetcher.store)
    assert again.fetch(Source(f"{web.url}/a")).read().weights == LARGE


def test_what_is_not_finished_takes_a_quarter_of_the_budget_at_most(web: WebServer, tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "small", max_bytes=8 << 20, budget_bytes=10 << 20)
    fetcher = Fetcher(quick(f"{web.url}/"), store)
    for number in range(5):
        leave_unfinished(web, fetcher, f"/{number}")
    assert len(unfinished(store)) == 2


def test_a_machine_that_was_started_anew_begins_anew(web: WebServer, fetcher: Fetcher) -> None:
    """A file that was being written when the power went may have its length and not its bytes."""
    leave_unfinished(web, fetcher, "/a")
    (state,) = (fetcher.store.work / "downloads").rglob("state.json")
    document = json.loads(state.read_text())
    state.write_text(json.dumps({**document, "boot": "another"}))
    assert fetcher.fetch(Source(f"{web.url}/a")).read().weights == LARGE
    assert web.site.asked("GET", WEIGHTS)[-1].range is None


def test_a_download_makes_room_for_itself(web: WebServer, tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "small", max_bytes=8 << 20, budget_bytes=4 << 20)
    fetcher = Fetcher(quick(f"{web.url}/"), store)

    def fetch(folder: str, weights: bytes) -> StoredAdapter:
        stored = fetcher.fetch(Source(put(web, folder, weights)))
        store.settle(stored, keep=True)
        return StoredAdapter(stored.digest, stored.directory)

    during: list[list[Path]] = []
    web.site.fail(f"/2/{WEIGHTS}", first(lambda: during.append(copies(store))))
    one, two = fetch("/1", bytes(3 << 20)), fetch("/2", LARGE)
    assert during == [[]]  # it has gone before the disk was asked for more
    assert copies(store) == [two.directory] and not one.directory.exists() and store.num_evicted == 1
