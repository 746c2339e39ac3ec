"""Adapters of the Hugging Face hub: huggingface_hub against a server that speaks its API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.errors import AdapterRejected, AdapterUnavailable
from adapter_router.types import Source
from tests.sources.conftest import CONFIG, WEIGHTS, copies, quick
from tests.sources.hub_server import HubServer
from tests.sources.web_server import WebServer, cut, drip_head, first, hang, redirect, status

LARGE = os.urandom((3 << 20) + 17)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that may be asked: only the environment of the tests says that none may."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def fetcher(hub: HubServer, store: ContentStore) -> Fetcher:
    return Fetcher(quick("hf://org", idle_timeout_s=5), store, lambda _: {"endpoint": hub.url, "token": "hush"})


def fetch(fetcher: Fetcher, uri: str, revision: str | None = None) -> StoredAdapter:
    stored = fetcher.fetch(Source(uri, revision, secret_ref="hub"))
    fetcher.store.settle(stored, keep=True)
    return stored


def refusal(fetcher: Fetcher, uri: str, revision: str | None = None) -> str:
    with pytest.raises(AdapterRejected) as caught:
        fetch(fetcher, uri, revision)
    assert copies(fetcher.store) == [] and "hush" not in str(caught.value)
    return str(caught.value)


def test_what_comes_is_what_the_revision_holds(hub: HubServer, fetcher: Fetcher) -> None:
    old = hub.push("org/food", config=b"{}", weights=b"old")
    hub.push("org/food", "v2", config=b"{}", weights=b"two")
    hub.push("org/food", "refs/pr/1", config=b"{}", weights=b"request")
    hub.push("org/food", config=b"[]", weights=LARGE, **{"config.json": b"[]", "adapter_model.bin": b"pickle"})
    files = fetch(fetcher, "hf://org/food").read()
    assert (files.config, files.weights, files.head_config) == (b"[]", LARGE, b"[]")
    assert fetch(fetcher, "hf://org/food@v2").read().weights == b"two"
    assert fetch(fetcher, "hf://org/food", "v2").read().weights == b"two"
    assert fetch(fetcher, f"hf://models/org/food@{old}").read().weights == b"old"
    assert fetch(fetcher, "hf://org/food@refs%2Fpr%2F1").read().weights == b"request"
    assert hub.web.site.asked("GET", ".bin") == []


def test_an_adapter_in_a_folder(hub: HubServer, fetcher: Fetcher) -> None:
    hub.push("org/many", **{f"adapters/one/{CONFIG}": b"{}", f"adapters/one/{WEIGHTS}": b"one", WEIGHTS: b"other"})
    assert fetch(fetcher, "hf://org/many/adapters/one").read().weights == b"one"
    assert "adapter_config.json is missing" in refusal(
        Fetcher(fetcher.config, ContentStore(fetcher.store.root / "new"), fetcher._secrets), "hf://org/many"
    )


def test_a_branch_that_moved_is_another_version(hub: HubServer, fetcher: Fetcher) -> None:
    source = Source("hf://org/food", secret_ref="hub")
    hub.push("org/food", config=b"{}", weights=b"one")
    one, seen = fetch(fetcher, "hf://org/food"), fetcher.fingerprint(source)
    assert fetch(fetcher, "hf://org/food") == one and len(hub.web.site.asked("GET", WEIGHTS)) == 1
    hub.push("org/food", config=b"{}", weights=b"two")
    assert fetcher.fingerprint(source) != seen
    assert fetch(fetcher, "hf://org/food").read().weights == b"two" and one.read().weights == b"one"


def test_a_branch_that_moves_meanwhile_gives_the_commit_that_was_looked_at(hub: HubServer, fetcher: Fetcher) -> None:
    commit = hub.push("org/food", config=b"{}", weights=LARGE)
    hub.fail(
        f"/org/food/resolve/{commit}/{WEIGHTS}",
        first(lambda: hub.push("org/food", config=b"[]", weights=b"new")),
    )
    files = fetch(fetcher, "hf://org/food").read()
    assert (files.config, files.weights) == (b"{}", LARGE)


def test_a_dropped_connection_goes_on_where_it_was(hub: HubServer, fetcher: Fetcher) -> None:
    commit = hub.push("org/food", config=b"{}", weights=LARGE)
    hub.fail(f"/org/food/resolve/{commit}/{WEIGHTS}", cut(1 << 20), cut(1 << 20))
    assert fetch(fetcher, "hf://org/food").read().weights == LARGE
    assert [request.range for request in hub.web.site.asked("GET", WEIGHTS)] == [
        None,
        f"bytes={1 << 20}-",
        f"bytes={2 << 20}-",
    ]


def test_what_is_not_what_the_hub_says_is_not_taken(hub: HubServer, fetcher: Fetcher) -> None:
    commit = hub.push("org/food", config=b"{}", weights=LARGE)
    hub.web.site.files[f"/org/food/resolve/{commit}/{WEIGHTS}"] = bytes(len(LARGE))
    with pytest.raises(AdapterUnavailable, match="not what its place says it is"):
        fetch(fetcher, "hf://org/food")
    assert copies(fetcher.store) == []


def test_one_too_large_is_not_even_begun(hub: HubServer, fetcher: Fetcher) -> None:
    hub.push("org/food", config=b"{}", weights=bytes((12 << 20) + 1))
    assert f"{WEIGHTS} has {(12 << 20) + 1} bytes" in refusal(fetcher, "hf://org/food")
    assert hub.web.site.asked("GET", WEIGHTS) == []


def test_what_is_not_there_is_named(hub: HubServer, fetcher: Fetcher) -> None:
    hub.push("org/food", config=b"{}", weights=b"w")
    assert "no revision v9" in refusal(fetcher, "hf://org/food@v9")
    assert "no such repository" in refusal(fetcher, "hf://org/drinks")
    hub.push("org/pickle", config=b"{}", **{"adapter_model.bin": b"pickle"})
    assert "is a pickle and is never read" in refusal(fetcher, "hf://org/pickle")


def test_the_token_opens_a_private_repository_and_goes_nowhere_else(
    hub: HubServer, fetcher: Fetcher, web: WebServer
) -> None:
    commit = hub.push("org/food", config=b"{}", weights=b"w")
    hub.token = "other"
    assert "secretRef" in refusal(fetcher, "hf://org/food")
    hub.token = "hush"
    hub.fail(f"/org/food/resolve/{commit}/{WEIGHTS}", *[redirect(f"{web.url}/cdn")] * 3)
    assert "not a public address" in refusal(fetcher, "hf://org/food")
    assert web.site.requests == []
    hub.web.site.faults.clear()
    assert fetch(fetcher, "hf://org/food").read().weights == b"w"


def test_a_hub_that_stumbles_is_asked_again(hub: HubServer, fetcher: Fetcher) -> None:
    hub.push("org/food", config=b"{}", weights=b"w")
    hub.fail("/api/models/org/food", status(503), status(500))
    assert fetch(fetcher, "hf://org/food").read().weights == b"w"


@pytest.mark.parametrize("path", ["", "/paths-info/{commit}"])
def test_a_hub_that_hangs_is_given_up(path: str, hub: HubServer, store: ContentStore) -> None:
    commit = hub.push("org/food", config=b"{}", weights=b"w")
    hub.fail("/api/models/org/food" + path.format(commit=commit), *[hang] * 9)
    fetcher = Fetcher(quick("hf://", idle_timeout_s=0.3), store, lambda _: {"endpoint": hub.url})
    begun = time.monotonic()
    with pytest.raises(AdapterUnavailable, match="cannot be asked"):
        fetch(fetcher, "hf://org/food")
    assert time.monotonic() - begun < 20


def test_a_hub_whose_address_has_a_password_in_it_is_told_without(hub: HubServer, store: ContentStore) -> None:
    hub.fail("/api/models/org/food", *[hang] * 9)
    endpoint = hub.url.replace("://", "://me:hush@")
    fetcher = Fetcher(quick("hf://", idle_timeout_s=0.3), store, lambda _: {"endpoint": endpoint})
    with pytest.raises(AdapterUnavailable, match="cannot be asked") as caught:
        fetch(fetcher, "hf://org/food")
    assert "hush" not in str(caught.value)


@pytest.mark.timeout(60)
def test_a_hub_that_answers_for_ever_is_given_up_in_time(hub: HubServer, store: ContentStore) -> None:
    """It is never idle, and so it is not for the library to notice."""
    hub.push("org/food", config=b"{}", weights=b"w")
    hub.fail("/api/models/org/food", drip_head)
    fetcher = Fetcher(quick("hf://", timeout_s=1), store, lambda _: {"endpoint": hub.url})
    begun = time.monotonic()
    with pytest.raises(AdapterUnavailable, match="timeout_s"):
        fetch(fetcher, "hf://org/food")
    assert time.monotonic() - begun < 20


def test_a_repository_of_another_organisation_is_not_allowed_by_any_name(hub: HubServer, fetcher: Fetcher) -> None:
    hub.push("org/food", config=b"{}", weights=b"w")
    hub.push("evil/food", config=b"{}", weights=b"w")
    assert "not below any prefix" in refusal(fetcher, "hf://evil/food")
    assert hub.web.site.requests == []
    hub.names["org/food"] = "evil/food"  # it was moved there, and its old name still leads to it
    assert "hf://evil/food" in refusal(fetcher, "hf://org/food")
    assert hub.web.site.asked("GET", WEIGHTS) == []


# -- offline -------------------------------------------------------------------------------------------------------


def in_hub_cache(home: Path, repository: str, commit: str) -> None:
    """As huggingface_hub keeps what it has downloaded."""
    root = home / ("models--" + repository.replace("/", "--"))
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for name, content in ((CONFIG, b"{}"), (WEIGHTS, b"cached")):
        (root / "blobs" / name).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{name}")


def test_offline_the_hub_is_not_asked(hub: HubServer, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push("org/food", config=b"{}", weights=b"w")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1 forbids to ask the hub" in refusal(fetcher, "hf://org/food")
    assert hub.web.site.requests == []


def test_offline_what_is_cached_is_served(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_hub_cache(tmp_path / "hub", "org/food", "0123abcd" * 5)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert fetch(fetcher, "hf://org/food").read().weights == b"cached"
    assert fetch(fetcher, "hf://org/food@" + "0123abcd" * 5).read().weights == b"cached"
    with pytest.raises(AdapterRejected, match="HF_HUB_OFFLINE"):
        fetch(fetcher, "hf://org/food@v2")
    with pytest.raises(AdapterRejected, match="not below any prefix"):
        fetch(fetcher, "hf://evil/food")


SCRIPT = """
import json, sys
from pathlib import Path
from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore
from adapter_router.config import SourceConfig
from adapter_router.errors import AdapterRejected
from adapter_router.types import Source
try:
    fetched = Fetcher(SourceConfig(), ContentStore(Path(sys.argv[1]))).fetch(Source("hf://org/food"))
    print(json.dumps(fetched.read().weights.decode()))
except AdapterRejected as error:
    print(json.dumps(list(error.problems)))
"""


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_environment_says_which_hub_and_whether(offline: str, hub: HubServer, tmp_path: Path) -> None:
    hub.push("org/food", config=b"{}", weights=b"w")
    hub.token = "of-the-environment"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": offline,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "of-the-environment",
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store")]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout
    answer = json.loads(printed)
    assert answer == "w" if offline == "0" else "HF_HUB_OFFLINE=1" in answer[0]
