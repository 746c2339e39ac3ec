"""The store's budget, and several processes on one store."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from adapter_router.catalog import copying
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.errors import AdapterRejected, AdapterUnavailable

KIB = 1 << 10
ROOM_FOR_THREE = 3 * KIB + 100


def made(folder: Path, weights: bytes, config: bytes = b"{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def kept(store: ContentStore, tmp_path: Path, number: int) -> StoredAdapter:
    """The ``number``-th adapter of a KiB, admitted and kept."""
    stored = store.admit(made(tmp_path / str(number), bytes([number]) * KIB))
    store.settle(stored, keep=True)
    return StoredAdapter(stored.digest, stored.directory)


def copies(store: ContentStore) -> set[Path]:
    assert list((store.work / "staging").glob("*")) == []
    return {path for path in store.root.iterdir() if path != store.work}


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "store", budget_bytes=ROOM_FOR_THREE)


# -- the budget ----------------------------------------------------------------------------------------------------


def test_those_not_used_for_longest_go_first(store: ContentStore, tmp_path: Path) -> None:
    adapters = [kept(store, tmp_path, number) for number in range(3)]
    assert store.num_evicted == 0 and store.index.num_bytes() == 3 * (KIB + 2)
    store.find(adapters[0].digest)
    adapters.append(kept(store, tmp_path, 3))
    assert copies(store) == {adapters[number].directory for number in (0, 2, 3)}
    assert store.num_evicted == 1 and store.index.num_bytes() == 3 * (KIB + 2)
    store.admit(tmp_path / "2")
    adapters.append(kept(store, tmp_path, 4))
    assert copies(store) == {adapters[number].directory for number in (2, 3, 4)}
    with pytest.raises(AdapterUnavailable):
        adapters[0].read()


def test_one_not_decided_on_stays(store: ContentStore, tmp_path: Path) -> None:
    undecided = store.admit(made(tmp_path / "u", b"u" * KIB))
    again = store.admit(tmp_path / "u")
    for number in range(8):
        kept(store, tmp_path, number)
    assert undecided.read().weights == b"u" * KIB and store.index.num_bytes() <= ROOM_FOR_THREE
    store.settle(undecided, keep=True)
    kept(store, tmp_path, 8)
    assert undecided.read()
    store.settle(again, keep=True)
    for number in range(10, 13):
        kept(store, tmp_path, number)
    assert not undecided.directory.exists()


def test_one_that_somebody_found_stays_until_he_has_it_no_more(store: ContentStore, tmp_path: Path) -> None:
    found = store.find(kept(store, tmp_path, 0).digest)
    for number in range(1, 8):
        kept(store, tmp_path, number)
    assert found is not None and found.read().weights == bytes(KIB)
    assert pickle.loads(pickle.dumps(found)) == found  # a replica may be told; the hold does not travel
    directory = found.directory
    del found
    gc.collect()
    kept(store, tmp_path, 8)
    assert not directory.exists()


def test_where_all_are_in_use_the_budget_gives_way_until_they_are_not(store: ContentStore, tmp_path: Path) -> None:
    undecided = [store.admit(made(tmp_path / f"u{number}", bytes([number]) * KIB)) for number in range(6)]
    assert len(copies(store)) == 6
    for stored in undecided:
        store.settle(stored, keep=True)
    assert len(copies(store)) == 3


def test_room_is_made_before_it_is_needed(store: ContentStore, tmp_path: Path) -> None:
    for number in range(3):
        kept(store, tmp_path, number)
    store.make_room(2 * KIB)
    assert len(copies(store)) == 1


def test_one_larger_than_all_of_the_budget_is_refused_and_moves_nobody(store: ContentStore, tmp_path: Path) -> None:
    adapters = [kept(store, tmp_path, number) for number in range(3)]
    with pytest.raises(AdapterRejected, match="store_bytes"):
        store.admit(made(tmp_path / "large", bytes(4 * KIB)))
    with pytest.raises(AdapterRejected, match="store_bytes"):
        store.make_room(4 * KIB)
    assert copies(store) == {adapter.directory for adapter in adapters} and store.num_evicted == 0


def test_room_is_made_where_the_disk_has_none_for_another_directory(
    store: ContentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        kept(store, tmp_path, number)

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    store.make_room(2 * KIB)
    assert len(copies(store)) == 1


def test_what_was_there_before_counts(tmp_path: Path) -> None:
    unlimited = ContentStore(tmp_path / "store")
    adapters = [kept(unlimited, tmp_path, number) for number in range(6)]
    shutil.rmtree(adapters[4].directory)
    store = ContentStore(unlimited.root, budget_bytes=ROOM_FOR_THREE)
    assert copies(store) == {adapters[number].directory for number in (2, 3, 5)}
    assert store.index.num_bytes() == 3 * (KIB + 2)


@pytest.mark.parametrize("damage", [b"", b"not a database" * 100, None])
def test_an_index_that_is_lost_or_damaged_is_made_again(damage: bytes | None, tmp_path: Path) -> None:
    root = tmp_path / "store"
    first = ContentStore(root, budget_bytes=ROOM_FOR_THREE)
    for number in range(3):
        kept(first, tmp_path, number)
    for file in first.work.glob("index.db*"):
        file.unlink()
    if damage is not None:
        (first.work / "index.db").write_bytes(damage)
    second = ContentStore(root, budget_bytes=ROOM_FOR_THREE)
    assert second.index.num_bytes() == 3 * (KIB + 2)
    kept(second, tmp_path, 3)
    kept(first, tmp_path, 4)  # whoever had the old one open takes to the new one
    assert len(copies(first)) == 3 and first.index.num_bytes() == second.index.num_bytes() == 3 * (KIB + 2)


def test_making_room_costs_what_goes_and_not_what_stays(tmp_path: Path) -> None:
    """Statements of the database; no directory is listed."""
    costs = []
    for number_of_copies in (4, 64):
        store = ContentStore(tmp_path / str(number_of_copies), budget_bytes=number_of_copies * (KIB + 2))
        for number in range(number_of_copies):
            kept(store, tmp_path, number)
        statements: list[str] = []
        assert store.index._connection is not None
        store.index._connection.set_trace_callback(statements.append)
        kept(store, tmp_path, 100)
        assert store.num_evicted == 1
        costs.append(len(statements))
    assert costs[0] == costs[1]


def test_a_copy_that_is_read_all_the_time_is_never_half_there(tmp_path: Path) -> None:
    """Readers find, read and let go; writers evict all the while."""
    store = ContentStore(tmp_path / "store", budget_bytes=2 * (64 * KIB + 2))
    weights = [bytes([number]) * 64 * KIB for number in range(4)]
    sources = [made(tmp_path / str(number), weights[number]) for number in range(4)]
    stop = threading.Event()
    num_read = 0

    def write(number: int) -> None:
        while not stop.is_set():
            store.settle(store.admit(sources[number]), keep=True)

    digests = [store.admit(source).digest for source in sources]
    for number in range(4):
        store.settle(StoredAdapter(digests[number], store.root), keep=True)
    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, number) for number in (0, 1, 2)]
        while num_read < 200 and not any(writer.done() for writer in writers):
            for number, digest in enumerate(digests):
                found = store.find(digest)
                if found is not None:
                    assert found.read().weights == weights[number]
                    num_read += 1
        stop.set()
        for writer in writers:
            writer.result()
    assert num_read >= 200 and store.num_evicted > 10


# -- several processes ---------------------------------------------------------------------------------------------


class Other:
    """Another process on the same store, which does as it is told, a line at a time."""

    script = """
import sys
from pathlib import Path
from adapter_router.catalog.store import ContentStore
store = ContentStore(Path(sys.argv[1]), budget_bytes=int(sys.argv[2]) or None)
admitted = {}
for line in sys.stdin:
    verb, _, what = line.strip().partition(" ")
    if verb == "admit":
        admitted[what] = store.admit(what)
    elif verb == "find":
        admitted[what] = store.find(what)
    elif verb in ("keep", "refuse"):
        store.settle(admitted[what], keep=verb == "keep")
    elif verb == "forget":
        del admitted[what]
    elif verb == "stage":
        staging = store.staging.scratch()
        print(staging.__enter__(), flush=True)
        continue
    print("done", flush=True)
"""

    def __init__(self, root: Path, budget: int = 0) -> None:
        command = [sys.executable, "-c", self.script, str(root), str(budget)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, line: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer
        return answer

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def other(store: ContentStore) -> Iterator[Other]:
    process = Other(store.root)
    yield process
    process.kill()


def test_what_one_refuses_another_may_have_kept(store: ContentStore, other: Other, tmp_path: Path) -> None:
    source = made(tmp_path / "a", b"w")
    ours = store.admit(source)
    other(f"admit {source}")
    other(f"keep {source}")
    store.settle(ours, keep=False)
    assert ours.read().weights == b"w"


def test_what_one_refuses_another_may_not_have_decided_on(store: ContentStore, other: Other, tmp_path: Path) -> None:
    source = made(tmp_path / "a", b"w")
    other(f"admit {source}")
    ours = store.admit(source)
    other(f"refuse {source}")
    assert ours.read().weights == b"w"
    store.settle(ours, keep=True)
    assert ours.read().weights == b"w"


def test_what_nobody_wants_is_gone(store: ContentStore, other: Other, tmp_path: Path) -> None:
    source = made(tmp_path / "a", b"w")
    other(f"admit {source}")
    other(f"refuse {source}")
    store.settle(store.admit(source), keep=False)
    assert copies(store) == set()


@pytest.mark.parametrize("verb", ["admit", "find"])
def test_what_another_process_uses_is_not_evicted(verb: str, store: ContentStore, other: Other, tmp_path: Path) -> None:
    used = kept(store, tmp_path, 0)
    what = str(tmp_path / "0") if verb == "admit" else used.digest
    other(f"{verb} {what}")
    for number in range(1, 6):
        kept(store, tmp_path, number)
    assert used.read()
    other.kill()  # whatever a process held ends with it
    kept(store, tmp_path, 6)
    assert not used.directory.exists()


def test_a_budget_is_kept_by_all_together(store: ContentStore, tmp_path: Path) -> None:
    others = [Other(store.root, ROOM_FOR_THREE) for _ in range(2)]
    try:
        for number in range(12):
            source = made(tmp_path / str(number), bytes([number]) * KIB)
            others[number % 2](f"admit {source}")
            others[number % 2](f"keep {source}")
        assert len(copies(store)) == 3 and store.index.num_bytes() == 3 * (KIB + 2)
    finally:
        for process in others:
            process.kill()


def test_what_a_killed_process_left_is_tidied_and_what_a_living_one_has_is_not(
    store: ContentStore, other: Other
) -> None:
    left = Path(other("stage"))
    (left / "half").write_bytes(bytes(KIB))
    ContentStore(store.root)
    assert left.exists()
    other.kill()
    ContentStore(store.root)
    assert not left.exists()


def test_two_processes_that_admit_and_evict_at_once_agree(tmp_path: Path) -> None:
    """Neither meets a copy that is half there, and the index is right in the end."""
    script = """
import random, sys
from pathlib import Path
from adapter_router.catalog.store import ContentStore
store, random = ContentStore(Path(sys.argv[1]), budget_bytes=int(sys.argv[2])), random.Random(sys.argv[4])
for _ in range(150):
    number = random.randrange(6)
    stored = store.admit(Path(sys.argv[3]) / str(number))
    assert stored.read().weights == bytes([number]) * 1024
    store.settle(stored, keep=random.random() < 0.7)
"""
    for number in range(6):
        made(tmp_path / str(number), bytes([number]) * KIB)
    root = tmp_path / "store"
    command = [sys.executable, "-c", script, str(root), str(ROOM_FOR_THREE), str(tmp_path)]
    processes = [subprocess.Popen([*command, str(seed)]) for seed in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    store = ContentStore(root, budget_bytes=ROOM_FOR_THREE)
    assert len(copies(store)) <= 3
    with sqlite3.connect(store.work / "index.db") as index:
        listed = {row[0].replace(":", "-") for row in index.execute("SELECT digest FROM copies")}
    assert listed == {path.name for path in copies(store)}
    assert store.index.num_bytes() == len(copies(store)) * (KIB + 2)


def test_processes_that_mend_one_copy_at_once_agree(tmp_path: Path) -> None:
    """Each damages it whenever it has it; none is told that the adapter is at fault."""
    script = """
import contextlib, sys
from pathlib import Path
from adapter_router.catalog.store import ContentStore
store = ContentStore(Path(sys.argv[1]))
for _ in range(200):
    stored = store.admit(sys.argv[2])
    with contextlib.suppress(FileNotFoundError):
        (stored.directory / "adapter_config.json").write_bytes(b"damage")
    store.settle(stored, keep=True)
"""
    source = made(tmp_path / "a", b"w")
    root = tmp_path / "store"
    processes = [subprocess.Popen([sys.executable, "-c", script, str(root), str(source)]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    store = ContentStore(root)
    assert store.admit(source).read().weights == b"w" and len(copies(store)) == 1


# -- damage --------------------------------------------------------------------------------------------------------


def overwrite(directory: Path) -> None:
    (directory / "adapter_model.safetensors").write_bytes(b"other")


def drop(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()


def lead_in_a_circle(directory: Path) -> None:
    drop(directory)
    (directory / "adapter_model.safetensors").symlink_to("adapter_model.safetensors")


@pytest.mark.parametrize("damage", [overwrite, drop, shutil.rmtree, lead_in_a_circle])
def test_a_copy_found_damaged_is_found_no_more(
    damage: Callable[[Path], None], store: ContentStore, tmp_path: Path
) -> None:
    stored = kept(store, tmp_path, 0)
    damage(stored.directory)
    with pytest.raises(AdapterUnavailable):
        stored.read()
    assert store.find(stored.digest) is None
    kept(store, tmp_path, 0)
    found = store.find(stored.digest)
    assert found is not None and found.read().weights == bytes(KIB)


def test_a_copy_that_is_sound_again_is_found_again(store: ContentStore, tmp_path: Path) -> None:
    stored = kept(store, tmp_path, 0)
    overwrite(stored.directory)
    with pytest.raises(AdapterUnavailable):
        stored.read()
    (stored.directory / "adapter_model.safetensors").write_bytes(bytes(KIB))
    kept(store, tmp_path, 0)
    assert store.find(stored.digest) is not None


# -- sources that change while they are copied -----------------------------------------------------------------------


@pytest.fixture
def during_copy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], None]], None]:
    """Have something happen after each file that is copied."""
    copy = copying._copy

    def interpose(happen: Callable[[str], None]) -> None:
        def interposed(source: BinaryIO, target: Path, *others: object) -> None:
            copy(source, target, *others)  # type: ignore[arg-type]
            happen(target.name)

        monkeypatch.setattr(copying, "_copy", interposed)

    return interpose


def test_files_of_two_versions_are_never_mixed(
    store: ContentStore, tmp_path: Path, during_copy: Callable[[Callable[[str], None]], None]
) -> None:
    source = made(tmp_path / "a", b"old")
    seen: list[str] = []

    def replace(name: str) -> None:
        seen.append(name)
        if len(seen) == 1:
            made(source, b"new", b"[]")

    during_copy(replace)
    files = store.admit(source).read()
    assert (files.config, files.weights) == (b"[]", b"new") and len(seen) == 4


def test_files_of_two_versions_with_the_same_times_are_never_mixed(
    store: ContentStore, tmp_path: Path, during_copy: Callable[[Callable[[str], None]], None]
) -> None:
    """As rsync and cp leave them when they are told to keep times and write in place."""
    source = made(tmp_path / "a", b"old")
    before = {path: path.stat() for path in source.iterdir()}
    seen: list[str] = []

    def replace(name: str) -> None:
        seen.append(name)
        if len(seen) == 1:
            made(source, b"new", b"[]")
            for path, status in before.items():
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    during_copy(replace)
    files = store.admit(source).read()
    assert (files.config, files.weights) == (b"[]", b"new")


def test_too_many_open_files_are_no_fault_of_the_adapters(store: ContentStore, tmp_path: Path) -> None:
    source = made(tmp_path / "a", b"w")
    kept(store, tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    outcomes = set()
    for room in range(12):
        free = os.open(tmp_path, os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + room, hard))
        try:
            store.settle(store.admit(source), keep=True)
            outcomes.add("kept")
        except AdapterUnavailable:
            outcomes.add("unavailable")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert outcomes == {"kept", "unavailable"}
    assert store.admit(source).read().weights == b"w"


def test_one_that_is_written_all_the_time_is_unavailable(
    store: ContentStore, tmp_path: Path, during_copy: Callable[[Callable[[str], None]], None]
) -> None:
    source = made(tmp_path / "a", b"0")
    during_copy(lambda _: made(source, os.urandom(8)) and None)
    with pytest.raises(AdapterUnavailable, match="is being written"):
        store.admit(source)
    assert copies(store) == set()


def test_one_that_grows_beyond_the_limit_is_cut_off(
    tmp_path: Path, during_copy: Callable[[Callable[[str], None]], None]
) -> None:
    store = ContentStore(tmp_path / "store", max_bytes=KIB)
    source = made(tmp_path / "a", b"w")
    during_copy(lambda name: name == "adapter_config.json" and made(source, bytes(8 << 20)) and None)
    with pytest.raises(AdapterRejected, match="grew beyond"):
        store.admit(source)
    assert copies(store) == set()


@pytest.mark.parametrize("way", ["file", "folder"])
def test_a_file_that_becomes_a_link_is_not_followed(
    way: str, store: ContentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is copied it leads to what the caller may not read, and before and after that it does not."""
    source = made(tmp_path / "a", b"w")
    moved = source if way == "folder" else source / "adapter_model.safetensors"
    made(tmp_path / "secret", b"secret")
    secret = tmp_path / "secret" / ("" if way == "folder" else moved.name)
    copied: list[bytes] = []
    copy, check = copying._copy, copying.identity

    def swap(directory: Path) -> object:
        seen = check(directory)
        if not moved.is_symlink():
            moved.rename(tmp_path / "aside")
            moved.symlink_to(secret)
        return seen

    def noting(reader: BinaryIO, target: Path, *others: object) -> None:
        copy(reader, target, *others)  # type: ignore[arg-type]
        copied.append(target.read_bytes())

    monkeypatch.setattr(copying, "identity", swap)
    monkeypatch.setattr(copying, "_copy", noting)
    with pytest.raises(AdapterRejected, match="a link to a place outside"):
        store.admit(source)
    assert b"secret" not in copied
    if way == "folder":
        with pytest.raises(AdapterRejected, match="is a link by now"):
            store.admit(source, followed=True)
