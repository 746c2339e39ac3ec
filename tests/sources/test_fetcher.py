"""Local sources, copies that are obtained anew, and what a fetcher is asked to leave alone."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore
from adapter_router.config import SourceConfig
from adapter_router.errors import AdapterFailed, AdapterRejected, AdapterUnavailable
from adapter_router.types import AdapterVersion, Source
from tests.sources.conftest import CONFIG, WEIGHTS, copies, put, quick
from tests.sources.web_server import WebServer, status


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return made(tmp_path / "adapters" / "a", b"weights")


def made(folder: Path, weights: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(b"{}")
    (folder / WEIGHTS).write_bytes(weights)
    return folder


@pytest.fixture
def local(store: ContentStore) -> Fetcher:
    return Fetcher(SourceConfig(), store)


def version(fetcher: Fetcher, uri: str) -> AdapterVersion:
    source = Source(uri)
    stored = fetcher.fetch(source)
    fetcher.store.settle(stored, keep=True)
    return AdapterVersion(
        "food", stored.digest, stored.directory, "text-classification", ("x",), "softmax", source=source
    )


# -- local sources -------------------------------------------------------------------------------------------------


def test_a_path_has_several_names(
    local: Fetcher, directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(directory)
    (tmp_path / "with space%20").symlink_to(directory)
    monkeypatch.chdir(directory.parent)
    uris = [str(directory), "a", f"file://{directory}", f"file://localhost{directory}/", str(tmp_path / "link")]
    uris += [str(tmp_path / "with space%20"), f"file://{tmp_path}/with%20space%2520"]
    assert len({local.fetch(Source(uri)).digest for uri in uris}) == 1


def test_a_package_holds_adapters(local: Fetcher) -> None:
    folder = next(path for path in Path("deployments/demo/adapters").iterdir() if path.is_dir())
    packaged = local.fetch(Source(f"package:deployments/demo/adapters/{folder.name}"))
    assert packaged.digest == local.fetch(Source(str(folder))).digest


def test_a_path_overwritten_in_place_is_another_version(local: Fetcher, directory: Path) -> None:
    one, seen = version(local, str(directory)), local.fingerprint(Source(str(directory)))
    assert local.fingerprint(Source(str(directory))) == seen
    made(directory, b"others!")
    assert local.fingerprint(Source(str(directory))) != seen
    assert version(local, str(directory)).digest != one.digest
    assert local.obtain(one).read().weights == b"weights"


@pytest.mark.parametrize("leads", ["/etc", "../secret"])
def test_a_link_out_of_what_is_allowed_is_not_followed(leads: str, store: ContentStore, directory: Path) -> None:
    made(directory.parent.parent / "secret", b"secret")
    (directory.parent / "out").symlink_to(leads if leads.startswith("/") else f"../{leads[3:]}")
    fetcher = Fetcher(quick(f"file://{directory.parent}"), store)
    fetcher.fetch(Source(str(directory)))
    for uri in (str(directory.parent / "out"), f"file://{directory.parent}/out", f"{directory.parent}/../secret"):
        with pytest.raises(AdapterRejected, match="not below any prefix"):
            fetcher.fetch(Source(uri))
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to(directory.parent.parent / "secret" / WEIGHTS)
    with pytest.raises(AdapterRejected, match="a link to a place outside"):
        fetcher.fetch(Source(str(directory)))


@pytest.mark.parametrize("name", ["nowhere", "file", "x" * 300, "nul\0byte"])
def test_what_is_no_directory_is_refused(name: str, local: Fetcher, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AdapterRejected, match="is not a directory"):
        local.fetch(Source(str(tmp_path / name)))


def test_a_pin_that_is_missed_leaves_nothing(local: Fetcher, directory: Path) -> None:
    with pytest.raises(AdapterRejected, match="it must be"):
        local.fetch(Source(str(directory), sha256="sha256:" + "0" * 64))
    assert copies(local.store) == []


# -- copies --------------------------------------------------------------------------------------------------------


def test_a_copy_that_is_there_needs_no_source(web: WebServer, fetcher: Fetcher) -> None:
    known = version(fetcher, put(web, "/a"))
    web.close()
    assert fetcher.obtain(known).read().weights == b"weights"
    assert fetcher.obtain(replace(known, source=None)).read().weights == b"weights"


def test_a_copy_that_is_gone_is_fetched(web: WebServer, fetcher: Fetcher) -> None:
    known = version(fetcher, put(web, "/a"))
    shutil.rmtree(known.directory)
    assert fetcher.obtain(known).read().weights == b"weights"
    node = Fetcher(fetcher.config, ContentStore(fetcher.store.root.parent / "another node"))
    assert node.obtain(known).read().weights == b"weights"
    assert len(web.site.asked("GET", WEIGHTS)) == 3


def test_a_copy_that_was_damaged_is_fetched(web: WebServer, fetcher: Fetcher) -> None:
    known = version(fetcher, put(web, "/a"))
    assert known.directory is not None
    (Path(known.directory) / WEIGHTS).write_bytes(b"others!")
    with pytest.raises(AdapterUnavailable, match="changed on disk"):
        fetcher.obtain(known).read()
    assert fetcher.obtain(known).read().weights == b"weights"


def test_an_evicted_copy_is_fetched(web: WebServer, tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "small", budget_bytes=1500)
    fetcher = Fetcher(quick(f"{web.url}/"), store)
    versions = [version(fetcher, put(web, f"/{number}", bytes([number]) * 1000)) for number in range(3)]
    assert len(copies(store)) == 1
    for number, known in enumerate(versions):
        assert fetcher.obtain(known).read().weights == bytes([number]) * 1000
    assert len(copies(store)) == 1


def test_a_source_that_holds_another_version_now_is_told(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", b"one")
    known = version(fetcher, uri)
    put(web, "/a", b"two")
    assert fetcher.obtain(known).read().weights == b"one"
    shutil.rmtree(known.directory)
    with pytest.raises(AdapterFailed, match="its source no longer holds it") as caught:
        fetcher.obtain(known)
    assert known.digest in str(caught.value) and "'food'" in str(caught.value) and caught.value.problems
    assert copies(fetcher.store) == []


@pytest.mark.parametrize("far", [True, False], ids=["https", "path"])
def test_a_source_that_is_gone_is_told(
    far: bool, web: WebServer, fetcher: Fetcher, directory: Path, local: Fetcher
) -> None:
    uri, asked = (put(web, "/a"), fetcher) if far else (str(directory), local)
    known = version(asked, uri)
    shutil.rmtree(known.directory)
    web.site.files.clear()
    shutil.rmtree(directory)
    with pytest.raises(AdapterFailed, match="missing" if far else "is not a directory"):
        asked.obtain(known)
    with pytest.raises(AdapterFailed, match="its source is not known"):
        asked.obtain(replace(known, source=None))


def test_a_source_that_stumbles_is_unavailable(web: WebServer, fetcher: Fetcher) -> None:
    known = version(fetcher, put(web, "/a"))
    shutil.rmtree(known.directory)
    web.site.fail(f"/a/{CONFIG}", *[status(500)] * 3)
    with pytest.raises(AdapterUnavailable):
        fetcher.obtain(known)
    assert fetcher.obtain(known).read().weights == b"weights"


# -- what nobody shall see -------------------------------------------------------------------------------------------


def test_no_credential_reaches_a_log_or_an_error(
    web: WebServer, store: ContentStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "adapter_router")
    monkeypatch.setenv("ADAPTER_ROUTER_SECRET_MINE", '{"token": "hush-token", "query": "sig=hush-query"}')
    fetcher = Fetcher(quick(f"{web.url}/"), store)
    told = []
    for fault in (status(403), status(500), status(302, Location="https://me:hush@elsewhere/?sig=hush")):
        web.site.fail(f"/a/{CONFIG}", *[fault] * 3)
        with pytest.raises((AdapterRejected, AdapterUnavailable)) as caught:
            fetcher.fetch(Source(put(web, "/a"), secret_ref="mine"))
        web.site.faults.clear()
        error: BaseException | None = caught.value
        while error is not None:
            told.append(f"{error!r} {error}")
            error = error.__cause__ or error.__context__
    everything = "".join(told) + caplog.text
    assert "hush" not in everything
    assert "hush" not in "".join(path.read_text() for path in store.work.rglob("*.json"))
    index = store.work / "index.db"
    assert not index.exists() or b"hush" not in index.read_bytes()


def test_a_wrong_configuration_lists_every_problem() -> None:
    with pytest.raises(ValueError) as caught:
        SourceConfig("s3://", timeout_s=0, idle_timeout_s=-1, attempts=0, backoff_s=float("nan"))
    for name in ("allowed", "timeout_s", "idle_timeout_s", "attempts", "backoff_s"):
        assert name in str(caught.value)
