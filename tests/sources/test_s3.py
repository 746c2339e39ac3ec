"""Adapters in S3: s3fs against moto's server."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from adapter_router.catalog.sources import objects
from adapter_router.catalog.sources.address import parse
from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.errors import AdapterRejected, AdapterUnavailable
from adapter_router.types import Source
from tests.sources.conftest import CONFIG, WEIGHTS, copies, quick, unfinished
from tests.sources.s3_server import S3Server, cut, first, hang, short, status

LARGE = os.urandom((9 << 20) + 17)  # three parts
PARTS = [f"bytes={a}-{b - 1}" for a, b in ((0, 4 << 20), (4 << 20, 8 << 20), (8 << 20, len(LARGE)))]


@pytest.fixture
def s3() -> Iterator[S3Server]:
    server = S3Server("adapters")
    yield server
    server.close()


@pytest.fixture
def fetcher(s3: S3Server, store: ContentStore) -> Fetcher:
    return Fetcher(quick("s3://adapters/", idle_timeout_s=10), store, lambda _: s3.secret)


def fetch(fetcher: Fetcher, uri: str) -> StoredAdapter:
    stored = fetcher.fetch(Source(uri, secret_ref="s3"))
    fetcher.store.settle(stored, keep=True)
    return stored


def test_what_comes_is_what_lies_there(s3: S3Server, fetcher: Fetcher) -> None:
    uri = s3.put("food/v1", config=b"{}", weights=LARGE, **{"config.json": b"[]", "adapter_model.bin": b"pickle"})
    s3.put("food/v10", config=b"[]", weights=b"others")
    files = fetch(fetcher, uri).read()
    assert (files.config, files.weights, files.head_config) == (b"{}", LARGE, b"[]")
    assert s3.ranges(WEIGHTS) == PARTS
    assert not [asked for asked in s3.asked if asked.path.endswith(".bin") and asked.method != "PUT"]
    assert unfinished(fetcher.store) == []


def test_the_same_again_costs_no_download_and_another_is_another_version(s3: S3Server, fetcher: Fetcher) -> None:
    uri = s3.put("a", config=b"{}", weights=b"one")
    one, seen = fetch(fetcher, uri), fetcher.fingerprint(Source(uri, secret_ref="s3"))
    assert fetch(fetcher, uri) == one and len(s3.ranges(WEIGHTS)) == 1
    s3.put("a", weights=b"two")
    assert fetcher.fingerprint(Source(uri, secret_ref="s3")) != seen
    two = fetch(fetcher, uri)
    assert (one.read().weights, two.read().weights) == (b"one", b"two")


@pytest.mark.parametrize("fault", [status(500), status(503, "SlowDown"), cut(1000), short(1)])
def test_parts_that_fail_are_asked_for_again_alone(fault: object, s3: S3Server, fetcher: Fetcher) -> None:
    uri = s3.put("a", config=b"{}", weights=LARGE)
    s3.fail("GET", WEIGHTS, first(lambda: s3.fail("GET", WEIGHTS, fault)))  # type: ignore[arg-type]
    assert fetch(fetcher, uri).read().weights == LARGE
    assert s3.ranges(WEIGHTS) == [PARTS[0], PARTS[1], PARTS[1], PARTS[2]]


def test_what_came_before_an_error_is_kept_for_the_next_fetch(s3: S3Server, fetcher: Fetcher) -> None:
    uri = s3.put("a", config=b"{}", weights=LARGE)
    s3.fail("GET", WEIGHTS, first(lambda: s3.fail("GET", WEIGHTS, *[status(500)] * 3)))
    with pytest.raises(AdapterUnavailable, match=r"s3://adapters/a .*Oops"):
        fetch(fetcher, uri)
    assert copies(fetcher.store) == [] and len(unfinished(fetcher.store)) == 1
    assert fetch(fetcher, uri).read().weights == LARGE
    assert s3.ranges(WEIGHTS) == [PARTS[0], *[PARTS[1]] * 4, PARTS[2]]


def test_one_overwritten_while_it_is_read_is_never_mixed(s3: S3Server, fetcher: Fetcher) -> None:
    uri = s3.put("a", config=b"{}", weights=LARGE)
    changed = bytes(len(LARGE))
    overwrite = first(lambda: s3.put("a", config=b"[]", weights=changed))
    s3.fail("GET", WEIGHTS, first(lambda: s3.fail("GET", WEIGHTS, overwrite)))
    files = fetch(fetcher, uri).read()
    assert files.config == b"[]" and files.weights == changed


def test_one_overwritten_and_restored_while_it_is_read_is_never_mixed(s3: S3Server, fetcher: Fetcher) -> None:
    """In the end it looks as it did in the beginning: same tag, same time, same version."""
    s3.client.put_bucket_versioning(Bucket="adapters", VersioningConfiguration={"Status": "Enabled"})
    uri = s3.put("a", config=b"{}", weights=LARGE)
    other = {"Bucket": "adapters", "Key": f"a/{WEIGHTS}"}
    versions: list[str] = []

    def overwrite() -> None:
        versions.append(s3.client.put_object(**other, Body=bytes(len(LARGE)))["VersionId"])
        s3.fail("HEAD", WEIGHTS, first(restore))

    def restore() -> None:
        s3.client.delete_object(**other, VersionId=versions[0])

    s3.fail("GET", WEIGHTS, first(lambda: s3.fail("GET", WEIGHTS, first(overwrite))))
    assert fetch(fetcher, uri).read().weights == LARGE
    assert len(versions) == 1


def test_one_removed_while_it_is_read_is_not_there(s3: S3Server, fetcher: Fetcher) -> None:
    uri = s3.put("a", config=b"{}", weights=LARGE)
    remove = first(lambda: s3.client.delete_object(Bucket="adapters", Key=f"a/{WEIGHTS}"))
    s3.fail("GET", WEIGHTS, first(lambda: s3.fail("GET", WEIGHTS, remove)))
    with pytest.raises(AdapterRejected, match=f"{WEIGHTS} is missing"):
        fetch(fetcher, uri)


def test_one_that_hangs_is_given_up_in_time(s3: S3Server, store: ContentStore) -> None:
    uri = s3.put("a", config=b"{}", weights=LARGE)
    s3.fail("GET", WEIGHTS, *[hang] * 5)
    fetcher = Fetcher(quick("s3://", timeout_s=20, idle_timeout_s=2), store, lambda _: s3.secret)
    begun = time.monotonic()
    with pytest.raises(AdapterUnavailable, match="idle_timeout_s"):
        fetch(fetcher, uri)
    assert time.monotonic() - begun < 15


def test_one_too_large_is_not_even_begun(s3: S3Server, fetcher: Fetcher) -> None:
    uri = s3.put("a", config=b"{}", weights=bytes((12 << 20) + 1))
    with pytest.raises(AdapterRejected, match=f"{WEIGHTS} has {(12 << 20) + 1} bytes"):
        fetch(fetcher, uri)
    assert set(s3.ranges("")) <= {None}  # listings


@pytest.mark.parametrize("folder", ["nowhere", "a/deeper"])
def test_missing_files_are_listed_together(folder: str, s3: S3Server, fetcher: Fetcher) -> None:
    s3.put("a", config=b"{}", weights=b"w")
    with pytest.raises(AdapterRejected) as caught:
        fetch(fetcher, f"s3://adapters/{folder}")
    assert len(caught.value.problems) == 2 and all(" is missing" in problem for problem in caught.value.problems)


def test_a_pickle_alone_is_refused_with_the_way_out(s3: S3Server, fetcher: Fetcher) -> None:
    uri = s3.put("a", config=b"{}", **{"adapter_model.bin": b"pickle"})
    with pytest.raises(AdapterRejected, match="is a pickle and is never read"):
        fetch(fetcher, uri)
    assert s3.ranges(".bin") == []


def test_a_bucket_that_is_not_allowed_is_not_asked(s3: S3Server, fetcher: Fetcher) -> None:
    s3.asked.clear()
    for uri in ("s3://adapters2/a", "s3://others/adapters", "s3://adapters/../others/a"):
        with pytest.raises(AdapterRejected):
            fetch(fetcher, uri)
    assert s3.asked == []


def test_denied_is_refused_and_says_nothing_of_the_keys(s3: S3Server, fetcher: Fetcher) -> None:
    uri = s3.put("a", config=b"{}", weights=b"w")
    s3.fail("HEAD", CONFIG, status(403, "Forbidden"))
    with pytest.raises(AdapterRejected, match="secretRef") as caught:
        fetch(fetcher, uri)
    assert "hush" not in str(caught.value) and "somebody" not in str(caught.value)


def test_without_credentials_it_is_refused(s3: S3Server, store: ContentStore) -> None:
    fetcher = Fetcher(quick("s3://"), store, lambda _: {"endpoint_url": s3.secret["endpoint_url"]})
    with pytest.raises(AdapterRejected, match="no credentials"):
        fetch(fetcher, s3.put("a", config=b"{}", weights=b"w"))


def test_what_is_not_used_any_more_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_MOST_OPEN", 1)
    monkeypatch.setattr(objects, "_LAST_USE_S", 0)
    stores = objects.ObjectStores(5)
    address = parse(Source("s3://adapters/a"))
    loops = [stores.folder(address, {"key": key, "secret": "hush"})._file_system.loop for key in ("one", "two")]
    until = time.monotonic() + 30
    while not loops[0].is_closed():
        assert time.monotonic() < until
        time.sleep(0.005)
    assert loops[1].is_running()


def test_the_secret_is_what_signs(s3: S3Server, fetcher: Fetcher) -> None:
    s3.asked.clear()
    fetch(fetcher, s3.put("a", config=b"{}", weights=b"w"))
    assert all("Credential=somebody/" in asked.authorization for asked in s3.asked if asked.method != "PUT")
