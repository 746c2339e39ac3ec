"""The content store: private copies that no change of the source reaches, and no damage goes unnoticed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.errors import AdapterRejected, AdapterUnavailable

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEAD = "config.json"


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "store")


def source(directory: Path, config: bytes = b"{}", weights: bytes = b"weights", head: bytes | None = None) -> Path:
    """An adapter directory; to the store its files are only bytes."""
    directory.mkdir()
    (directory / CONFIG).write_bytes(config)
    (directory / WEIGHTS).write_bytes(weights)
    if head is not None:
        (directory / HEAD).write_bytes(head)
    return directory


def copies(store: ContentStore) -> list[Path]:
    """The copies in ``store``, which must have no work left over."""
    assert list((store.work / "staging").glob("*")) == []
    return sorted(path for path in store.root.iterdir() if path != store.work)


def refusal(store: ContentStore, directory: Path) -> tuple[str, ...]:
    """The problems of ``directory``, which must leave nothing behind in the store."""
    before = copies(store)
    with pytest.raises(AdapterRejected) as caught:
        store.admit(directory)
    assert copies(store) == before
    return caught.value.problems


def test_same_content_is_stored_once(store: ContentStore, tmp_path: Path) -> None:
    one = store.admit(source(tmp_path / "one", head=b"{}"))
    two = store.admit(source(tmp_path / "two", head=b"{}"))
    assert one == two and one == store.admit(tmp_path / "one")
    assert copies(store) == [one.directory]
    assert one.digest.startswith("sha256:") and len(one.digest) == 7 + 64


def test_every_file_is_part_of_the_digest(store: ContentStore, tmp_path: Path) -> None:
    variants = [
        {"config": b"{}", "weights": b"weights"},
        {"config": b"{ }", "weights": b"weights"},
        {"config": b"{}", "weights": b"Weights"},
        {"config": b"{}weights", "weights": b""},
        {"config": b"", "weights": b"{}weights"},
        {"config": b"{}", "weights": b"weights", "head": b""},
        {"config": b"{}", "weights": b"weights", "head": b"{}"},
        {"config": b"{}", "weights": b"weights{}"},
    ]
    stored = [store.admit(source(tmp_path / str(index), **files)) for index, files in enumerate(variants)]
    assert len({one.digest for one in stored}) == len({one.directory for one in stored}) == len(variants)


def test_digest_depends_on_nothing_but_the_served_files(store: ContentStore, tmp_path: Path) -> None:
    bare = store.admit(source(tmp_path / "bare"))
    with_more = source(tmp_path / "more")
    (with_more / "README.md").write_text("A readme.")
    (with_more / "adapter_model.bin").write_bytes(b"pickle")
    os.utime(with_more / WEIGHTS, (0, 0))
    assert store.admit(with_more) == bare
    assert sorted(path.name for path in bare.directory.iterdir()) == [CONFIG, WEIGHTS]
    assert ContentStore(tmp_path / "other").admit(with_more).digest == bare.digest


def test_read_gives_back_what_was_admitted(store: ContentStore, tmp_path: Path) -> None:
    large = os.urandom((1 << 20) * 2 + 17)  # more than one chunk of the copy, and not whole chunks
    files = store.admit(source(tmp_path / "a", b'{"r": 8}', large, b"[]")).read()
    assert (files.config, files.weights, files.head_config) == (b'{"r": 8}', large, b"[]")
    assert store.admit(source(tmp_path / "b")).read().head_config is None


def test_later_changes_of_the_source_reach_nothing(store: ContentStore, tmp_path: Path) -> None:
    directory = source(tmp_path / "a")
    stored = store.admit(directory)
    os.truncate(directory / WEIGHTS, 3)
    (directory / CONFIG).write_bytes(b"[]")
    (directory / HEAD).write_bytes(b"{}")
    assert stored.read().weights == b"weights" and stored.read().config == b"{}"
    (directory / WEIGHTS).unlink()
    assert stored.read().weights == b"weights"
    assert not os.path.samestat((stored.directory / CONFIG).stat(), (directory / CONFIG).stat())


def linked(link: Path, target: str, content: bytes = b"weights") -> None:
    """``link`` leads to ``target``, relative to its directory, which holds ``content``."""
    actual = link.parent / target
    actual.parent.mkdir(parents=True, exist_ok=True)
    actual.write_bytes(content)
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def test_links_inside_the_directory_are_copied_as_what_they_name(store: ContentStore, tmp_path: Path) -> None:
    directory = source(tmp_path / "a")
    linked(directory / WEIGHTS, "checkpoints/best")
    (directory / "initial").symlink_to("checkpoints")
    (directory / "checkpoints" / WEIGHTS).write_bytes(b"before")
    stored = store.admit(directory)
    (directory / "checkpoints" / "best").unlink()
    assert stored.read().weights == b"weights" and stored.read().initial_weights == b"before"
    assert not any(path.is_symlink() for path in stored.directory.rglob("*"))


@pytest.mark.parametrize("subfolder", ["", "my-adapter", "adapters/mine"])
def test_a_snapshot_of_the_hubs_cache_is_made_of_links_to_blobs(
    subfolder: str, store: ContentStore, tmp_path: Path
) -> None:
    directory = tmp_path / "hub" / "models--somebody--adapter" / "snapshots" / "0123abcd" / subfolder
    (directory / "initial").mkdir(parents=True)
    up = "../" * (2 + len(Path(subfolder).parts))
    linked(directory / CONFIG, f"{up}blobs/1", b"{}")
    linked(directory / WEIGHTS, f"{up}blobs/2")
    linked(directory / "initial" / WEIGHTS, f"../{up}blobs/3", b"before")
    files = store.admit(directory).read()
    assert (files.config, files.weights, files.initial_weights) == (b"{}", b"weights", b"before")


def test_the_directory_itself_may_be_a_link(
    store: ContentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--a" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    linked(snapshot / CONFIG, "../../blobs/1", b"{}")
    linked(snapshot / WEIGHTS, "../../blobs/2")
    (tmp_path / "current").symlink_to(snapshot)
    stored = store.admit(snapshot)
    assert stored == store.admit(tmp_path / "current")
    monkeypatch.chdir(snapshot)
    assert stored == store.admit(".")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, HEAD, "adapter_router.json", "initial/adapter_model.safetensors"])
def test_a_link_out_of_the_directory_is_refused(name: str, store: ContentStore, tmp_path: Path) -> None:
    directory = source(tmp_path / "a", head=b"{}")
    (directory / "initial").mkdir()
    linked(directory / name, "../../b/secret" if "/" in name else "../b/secret")
    (problem,) = refusal(store, directory)
    assert problem.startswith(f"{name} is a link to a place outside the directory")


def test_a_snapshot_may_not_reach_another_repositorys_blobs(store: ContentStore, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    source(snapshot)
    linked(snapshot / WEIGHTS, "../../../models--b/blobs/1")
    (problem,) = refusal(store, snapshot)
    assert WEIGHTS in problem and "outside" in problem


def test_blobs_that_are_a_link_themselves_lead_nowhere(store: ContentStore, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    source(snapshot)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "models--a" / "blobs").symlink_to(tmp_path / "secrets")
    linked(snapshot / WEIGHTS, "../../blobs/1")
    (problem,) = refusal(store, snapshot)
    assert WEIGHTS in problem and "outside" in problem


def overwrite(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"WEIGHTS")


def truncate(directory: Path) -> None:
    os.truncate(directory / WEIGHTS, 1)


def drop(directory: Path) -> None:
    (directory / CONFIG).unlink()


def drop_the_optional(directory: Path) -> None:
    (directory / HEAD).unlink()


def make_a_directory(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).mkdir()


@pytest.mark.parametrize("tamper", [overwrite, truncate, drop, drop_the_optional, make_a_directory])
def test_damage_is_noticed_and_mended_by_the_original(
    tamper: Callable[[Path], None], store: ContentStore, tmp_path: Path
) -> None:
    directory = source(tmp_path / "a", head=b"{}")
    stored = store.admit(directory)
    tamper(stored.directory)
    with pytest.raises(AdapterUnavailable, match=stored.digest) as caught:
        stored.read()
    assert caught.value.retryable
    assert store.admit(directory) == stored
    assert stored.read().weights == b"weights"
    assert copies(store) == [stored.directory]


def test_a_file_too_many_is_noticed_and_mended(store: ContentStore, tmp_path: Path) -> None:
    directory = source(tmp_path / "a")
    stored = store.admit(directory)
    (stored.directory / HEAD).write_bytes(b"{}")
    with pytest.raises(AdapterUnavailable):
        stored.read()
    store.admit(directory)
    assert stored.read().head_config is None


def test_a_copy_that_is_gone_is_unavailable_until_admitted_again(store: ContentStore, tmp_path: Path) -> None:
    directory = source(tmp_path / "a")
    stored = store.admit(directory)
    for path in stored.directory.iterdir():
        path.unlink()
    stored.directory.rmdir()
    with pytest.raises(AdapterUnavailable, match="cannot be read"):
        stored.read()
    with pytest.raises(AdapterUnavailable):
        StoredAdapter("sha256:0", tmp_path / "nowhere").read()
    assert store.admit(directory).read().weights == b"weights"


def test_missing_files_are_listed_together(store: ContentStore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    problems = refusal(store, tmp_path / "empty")
    assert len(problems) == 2
    assert f"{CONFIG} is missing" in problems and f"{WEIGHTS} is missing" in problems


def test_every_problem_of_a_directory_is_listed(store: ContentStore, tmp_path: Path) -> None:
    directory = tmp_path / "bad"
    (directory / WEIGHTS).mkdir(parents=True)
    (directory / HEAD).write_bytes(b" " * ((1 << 20) + 1))
    missing, not_a_file, too_large = refusal(store, directory)
    assert missing == f"{CONFIG} is missing"
    assert not_a_file == f"{WEIGHTS} is not a regular file"
    assert HEAD in too_large and "1048577 bytes, the limit is 1048576" in too_large


def test_pickle_is_refused_with_the_way_out(store: ContentStore, tmp_path: Path) -> None:
    directory = source(tmp_path / "a")
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")
    (problem,) = refusal(store, directory)
    assert f"{WEIGHTS} is missing" in problem and "pickle" in problem and "safe_serialization=True" in problem


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, HEAD])
def test_fifo_is_refused_without_waiting_for_a_writer(name: str, store: ContentStore, tmp_path: Path) -> None:
    directory = source(tmp_path / "a", head=b"{}")
    (directory / name).unlink()
    os.mkfifo(directory / name)
    assert refusal(store, directory) == (f"{name} is not a regular file",)


@pytest.mark.timeout(10)
def test_link_to_a_device_is_refused(store: ContentStore, tmp_path: Path) -> None:
    directory = source(tmp_path / "a")
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to("/dev/zero")
    (problem,) = refusal(store, directory)
    assert WEIGHTS in problem


@pytest.mark.parametrize("name", ["nowhere", "file", "x" * 300, "nul\0byte"])
def test_what_is_not_a_directory_is_refused(name: str, store: ContentStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (problem,) = refusal(store, tmp_path / name)
    assert "is not a directory" in problem


def test_dangling_link_is_a_missing_file(store: ContentStore, tmp_path: Path) -> None:
    directory = source(tmp_path / "a")
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to("nowhere")
    assert refusal(store, directory) == (f"{WEIGHTS} is missing",)


def test_concurrent_admits_agree(store: ContentStore, tmp_path: Path) -> None:
    directory = source(tmp_path / "a", weights=os.urandom(1 << 22), head=b"{}")
    barrier = threading.Barrier(8)

    def admit(_: int) -> tuple[StoredAdapter, bytes]:
        barrier.wait()
        stored = store.admit(directory)
        return stored, stored.read().weights

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(admit, range(8)))
    assert {stored for stored, _ in results} == {results[0][0]}
    assert {weights for _, weights in results} == {(directory / WEIGHTS).read_bytes()}
    assert copies(store) == [results[0][0].directory]


def test_root_is_made_with_its_parents_and_for_its_owner_only(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "deep" / "store")
    stored = store.admit(source(tmp_path / "a"))
    assert store.root.stat().st_mode & 0o777 == 0o700
    # Another process on the same store finds what the first one left.
    assert ContentStore(store.root).admit(tmp_path / "a") == stored
