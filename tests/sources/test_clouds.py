"""Adapters in Google's and Azure's stores: gcsfs and adlfs against servers that speak their APIs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.sources.objects import _failure
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.errors import AdapterRejected, AdapterUnavailable
from adapter_router.types import Source
from tests.sources.cloud_servers import AzureServer, CloudServer, GoogleServer
from tests.sources.conftest import WEIGHTS, copies, quick
from tests.sources.web_server import first, hang, status

LARGE = os.urandom((5 << 20) + 17)  # two parts
PARTS = [f"bytes=0-{(4 << 20) - 1}", f"bytes={4 << 20}-{len(LARGE) - 1}"]


@pytest.fixture(params=[GoogleServer, AzureServer], ids=["gs", "az"])
def cloud(request: pytest.FixtureRequest) -> Iterator[CloudServer]:
    server = request.param()
    yield server
    server.close()


def secret(cloud: CloudServer) -> dict[str, str]:
    if isinstance(cloud, GoogleServer):
        return {"anon": "true", "endpoint_url": cloud.url}
    assert isinstance(cloud, AzureServer)
    return {"connection_string": cloud.connection_string}


@pytest.fixture
def fetcher(cloud: CloudServer, store: ContentStore) -> Fetcher:
    config = quick(f"{cloud.scheme}://adapters/food", idle_timeout_s=5)
    return Fetcher(config, store, lambda _: secret(cloud))


def fetch(fetcher: Fetcher, uri: str) -> StoredAdapter:
    stored = fetcher.fetch(Source(uri, secret_ref="cloud"))
    fetcher.store.settle(stored, keep=True)
    return stored


def test_what_comes_is_what_lies_there(cloud: CloudServer, fetcher: Fetcher) -> None:
    uri = cloud.put("adapters/food/v 1", config=b"{}", weights=LARGE, **{"config.json": b"[]"})
    files = fetch(fetcher, uri).read()
    assert (files.config, files.weights, files.head_config) == (b"{}", LARGE, b"[]")
    assert cloud.ranges(WEIGHTS) == PARTS


def test_the_same_again_costs_no_download_and_another_is_another_version(cloud: CloudServer, fetcher: Fetcher) -> None:
    uri = cloud.put("adapters/food", config=b"{}", weights=b"one")
    one = fetch(fetcher, uri)
    assert fetch(fetcher, uri) == one and len(cloud.ranges(WEIGHTS)) == 1
    cloud.put("adapters/food", weights=b"two")
    assert fetch(fetcher, uri).read().weights == b"two" and one.read().weights == b"one"


def test_one_overwritten_while_it_is_read_is_never_mixed(cloud: CloudServer, fetcher: Fetcher) -> None:
    uri = cloud.put("adapters/food", config=b"{}", weights=LARGE)
    changed = bytes(len(LARGE))
    overwrite = first(lambda: cloud.put("adapters/food", config=b"[]", weights=changed))
    cloud.web.site.fail(f"adapters/food/{WEIGHTS}", first(lambda: None), overwrite)
    files = fetch(fetcher, uri).read()
    assert files.config == b"[]" and files.weights == changed


def test_parts_that_fail_are_asked_for_again_alone(cloud: CloudServer, fetcher: Fetcher) -> None:
    uri = cloud.put("adapters/food", config=b"{}", weights=LARGE)
    cloud.web.site.fail(f"adapters/food/{WEIGHTS}", first(lambda: None), status(503))
    assert fetch(fetcher, uri).read().weights == LARGE
    assert cloud.ranges(WEIGHTS) == [PARTS[0], PARTS[1], PARTS[1]]


def test_one_that_hangs_is_given_up(cloud: CloudServer, store: ContentStore) -> None:
    uri = cloud.put("adapters/food", config=b"{}", weights=LARGE)
    cloud.web.site.fail(f"adapters/food/{WEIGHTS}", *[hang] * 9)
    config = quick(f"{cloud.scheme}://", idle_timeout_s=2, attempts=2)
    with pytest.raises(AdapterUnavailable, match="idle_timeout_s"):
        fetch(Fetcher(config, store, lambda _: secret(cloud)), uri)
    assert copies(store) == []


def test_missing_files_are_listed_together(cloud: CloudServer, fetcher: Fetcher) -> None:
    with pytest.raises(AdapterRejected) as caught:
        fetch(fetcher, f"{cloud.scheme}://adapters/food/nowhere")
    assert len(caught.value.problems) == 2 and all(" is missing" in problem for problem in caught.value.problems)


def test_what_is_not_allowed_is_not_asked(cloud: CloudServer, fetcher: Fetcher) -> None:
    for path in ("adapters/foo", "adapters/food2", "adapters", "others/food", "adapters/food/../x"):
        with pytest.raises(AdapterRejected):
            fetch(fetcher, f"{cloud.scheme}://{path}")
    assert cloud.web.site.requests == []


def test_denied_is_refused_and_says_nothing_of_the_keys(cloud: CloudServer, fetcher: Fetcher) -> None:
    uri = cloud.put("adapters/food", config=b"{}", weights=b"w")
    cloud.denied = True
    with pytest.raises(AdapterRejected, match="secretRef") as caught:
        fetch(fetcher, uri)
    assert "aHVzaA" not in str(caught.value)


def test_a_service_account_gets_a_token_of_its_own(store: ContentStore) -> None:
    google = GoogleServer()
    try:
        uri = google.put("adapters/food", config=b"{}", weights=b"w")
        google.denied = True
        secret = {"service_account": google.service_account(), "endpoint_url": google.url}
        fetcher = Fetcher(quick("gs://", idle_timeout_s=10), store, lambda _: secret)
        assert fetch(fetcher, uri).read().weights == b"w"
    finally:
        google.close()


@pytest.mark.parametrize(
    ("uri", "given", "told"),
    [
        ("s3://adapters/a", {"keys": "hush"}, "'keys'; s3:// takes aws_access_key_id"),
        ("gs://adapters/a", {"token": "hush"}, "'token'; gs:// takes service_account"),
        ("gs://adapters/a", {"service_account": "{hush"}, "is not the JSON of a service account's key"),
        ("gs://adapters/a", {"service_account": '{"a": "hush"}'}, "cannot be opened with these credentials"),
        ("az://adapters/a", {"account_keys": "hush"}, "'account_keys'; az:// takes account_name"),
        ("az://adapters/a", {"connection_string": "hush"}, "cannot be opened with these credentials"),
        ("hf://org/name", {"tokn": "hush"}, "'tokn'; hf:// takes token, endpoint"),
    ],
)
def test_wrong_credentials_are_named_but_not_told(
    uri: str, given: dict[str, str], told: str, store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(AdapterRejected) as caught:
        fetch(Fetcher(quick("s3://", "gs://", "az://", "hf://"), store, lambda _: given), uri)
    assert told in str(caught.value) and "hush" not in str(caught.value)


def test_what_a_library_says_is_not_repeated() -> None:
    """It may have been signed, and the signature be part of it."""
    error = RuntimeError("https://acct.example/container/a?sig=hush")
    error.__cause__ = ValueError("hush")
    assert "hush" not in str(_failure(error, WEIGHTS)) and WEIGHTS in str(_failure(error, WEIGHTS))


@pytest.mark.parametrize(
    ("uri", "package", "extra"),
    [("s3://b/a", "s3fs", "s3"), ("gs://b/a", "gcsfs.core", "gcs"), ("az://b/a", "adlfs", "azure")],
)
def test_a_package_that_is_missing_is_named(
    uri: str, package: str, extra: str, store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AdapterRejected, match=rf"pip install 'adapter-router\[{extra}\]'"):
        fetch(Fetcher(quick("s3://", "gs://", "az://"), store, lambda _: {}), uri)
