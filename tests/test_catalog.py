"""The catalog: what a name means, and what is said of a name that means nothing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_router.catalog.adapters import Catalog
from adapter_router.errors import AdapterExists, AdapterNotFound, InvalidRequest
from adapter_router.types import AdapterVersion


def version(adapter: str, digest: str = "sha256:1") -> AdapterVersion:
    return AdapterVersion(adapter, digest, Path("/store"), "text-classification", ("no", "yes"), "softmax")


@pytest.fixture
def catalog() -> Catalog:
    """Holds ``banking`` and ``weather``, the same content under two names, and ``music``."""
    catalog = Catalog()
    for name, digest in [("weather", "sha256:1"), ("banking", "sha256:1"), ("music", "sha256:2")]:
        catalog.add(version(name, digest))
    return catalog


def test_found_by_name(catalog: Catalog) -> None:
    assert catalog.find("music") == version("music", "sha256:2")
    assert catalog.find(None) is None
    assert [found.adapter for found in catalog.versions()] == ["weather", "banking", "music"]


def test_taken_name_keeps_its_meaning(catalog: Catalog) -> None:
    with pytest.raises(AdapterExists, match="'music' is loaded already; unload it first"):
        catalog.add(version("music", "sha256:3"))
    with pytest.raises(AdapterExists, match="'music' is loaded already"):
        catalog.check_name("music")
    assert catalog.find("music") == version("music", "sha256:2")


def test_replaced_in_place(catalog: Catalog) -> None:
    catalog.add(version("weather", "sha256:3"), replace=True)
    catalog.add(version("new", "sha256:4"), replace=True)
    assert catalog.find("weather") == version("weather", "sha256:3")
    assert [found.adapter for found in catalog.versions()] == ["weather", "banking", "music", "new"]


def test_removed_name_is_free_again(catalog: Catalog) -> None:
    assert catalog.remove("music") == version("music", "sha256:2")
    assert isinstance(catalog.find("music"), AdapterNotFound)
    catalog.check_name("music")
    with pytest.raises(AdapterNotFound, match="no adapter is named 'music'"):
        catalog.remove("music")
    catalog.add(version("music", "sha256:5"))
    assert catalog.find("music") == version("music", "sha256:5")


def test_content_is_held_until_its_last_name_goes(catalog: Catalog) -> None:
    assert catalog.holds("sha256:1") and not catalog.holds("sha256:9")
    catalog.remove("weather")
    assert catalog.holds("sha256:1")
    catalog.add(version("banking", "sha256:2"), replace=True)
    assert not catalog.holds("sha256:1") and catalog.holds("sha256:2")


def test_unknown_name_is_answered_with_close_ones(catalog: Catalog) -> None:
    error = catalog.find("wether")
    assert isinstance(error, AdapterNotFound)
    assert str(error) == "no adapter is named 'wether'; did you mean 'weather'?"
    assert (error.status, error.param) == (404, "model")
    far = catalog.find("zzz")
    assert str(far) == "no adapter is named 'zzz'"
    for number in range(5):
        catalog.add(version(f"music-{number}"))
    with pytest.raises(AdapterNotFound) as caught:
        catalog.remove("music-9")
    assert str(caught.value).count("'music-") == 4  # the unknown name and at most three hints


@pytest.mark.parametrize("name", ["", "a\nb", "tab\t", "\x00", "\x1b[2J", "\u2028", "\ud800"])
def test_empty_or_unprintable_name_is_refused(name: str, catalog: Catalog) -> None:
    with pytest.raises(InvalidRequest) as caught:
        catalog.check_name(name)
    assert caught.value.param == "adapter" and repr(name) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a", "org/model:v2", "with space", "приют", "表", "weather "])
def test_printable_name_is_free(name: str, catalog: Catalog) -> None:
    catalog.check_name(name)


def test_one_of_many_adding_the_same_name_wins(catalog: Catalog) -> None:
    barrier = threading.Barrier(8)

    def add(number: int) -> str | None:
        barrier.wait()
        try:
            catalog.add(version("contested", f"sha256:{number}"))
        except AdapterExists:
            return None
        return f"sha256:{number}"

    with ThreadPoolExecutor(8) as pool:
        (winner,) = [digest for digest in pool.map(add, range(8)) if digest]
    assert catalog.find("contested") == version("contested", winner)
