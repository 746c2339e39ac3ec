"""Names of a stand-alone engine: what one means, and what is said of a name that means nothing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_router.catalog.addressing import each_version
from adapter_router.catalog.names import Names
from adapter_router.errors import AdapterExists, AdapterNotFound, InvalidRequest
from adapter_router.types import AdapterVersion, Row


def version(adapter: str, digest: str = "sha256:1") -> AdapterVersion:
    return AdapterVersion(adapter, digest, Path("/store"), "text-classification", ("no", "yes"), "softmax")


@pytest.fixture
def names() -> Names:
    """Holds ``banking`` and ``weather``, the same content under two names, and ``music``."""
    names = Names()
    for name, digest in [("weather", "sha256:1"), ("banking", "sha256:1"), ("music", "sha256:2")]:
        names.add(version(name, digest))
    return names


def test_found_by_name(names: Names) -> None:
    assert names.find("music") == version("music", "sha256:2")
    assert names.find(None) is None
    assert [found.adapter for found in names.versions()] == ["weather", "banking", "music"]


def test_taken_name_keeps_its_meaning(names: Names) -> None:
    with pytest.raises(AdapterExists, match="'music' is loaded already; unload it first"):
        names.add(version("music", "sha256:3"))
    with pytest.raises(AdapterExists, match="'music' is loaded already"):
        names.check_name("music")
    assert names.find("music") == version("music", "sha256:2")


def test_replaced_in_place(names: Names) -> None:
    names.add(version("weather", "sha256:3"), replace=True)
    names.add(version("new", "sha256:4"), replace=True)
    assert names.find("weather") == version("weather", "sha256:3")
    assert [found.adapter for found in names.versions()] == ["weather", "banking", "music", "new"]


def test_removed_name_is_free_again(names: Names) -> None:
    assert names.remove("music") == version("music", "sha256:2")
    assert isinstance(names.find("music"), AdapterNotFound)
    names.check_name("music")
    with pytest.raises(AdapterNotFound, match="no adapter is named 'music'"):
        names.remove("music")
    names.add(version("music", "sha256:5"))
    assert names.find("music") == version("music", "sha256:5")


def test_content_is_held_until_its_last_name_goes(names: Names) -> None:
    assert names.holds("sha256:1") and not names.holds("sha256:9")
    names.remove("weather")
    assert names.holds("sha256:1")
    names.add(version("banking", "sha256:2"), replace=True)
    assert not names.holds("sha256:1") and names.holds("sha256:2")


def test_unknown_name_is_answered_with_close_ones(names: Names) -> None:
    error = names.find("wether")
    assert isinstance(error, AdapterNotFound)
    assert str(error) == "no adapter is named 'wether'; did you mean 'weather'?"
    assert (error.status, error.param) == (404, "model")
    far = names.find("zzz")
    assert str(far) == "no adapter is named 'zzz'"
    for number in range(5):
        names.add(version(f"music-{number}"))
    with pytest.raises(AdapterNotFound) as caught:
        names.remove("music-9")
    assert str(caught.value).count("'music-") == 4  # the unknown name and at most three hints


@pytest.mark.parametrize(
    "name",
    ["", "a\nb", "tab\t", "\x00", "\x1b[2J", "\u2028", "\ud800", " a", "weather ", "a@v1", "a@sha256:1", "a" * 201],
)
def test_what_cannot_be_a_name_is_refused(name: str, names: Names) -> None:
    with pytest.raises(InvalidRequest) as caught:
        names.check_name(name)
    assert caught.value.param == "adapter" and repr(name)[:100] in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a", "org/model:v2", "with space", "приют", "表"])
def test_printable_name_is_free(name: str, names: Names) -> None:
    names.check_name(name)


def test_one_of_many_adding_the_same_name_wins(names: Names) -> None:
    barrier = threading.Barrier(8)

    def add(number: int) -> str | None:
        barrier.wait()
        try:
            names.add(version("contested", f"sha256:{number}"))
        except AdapterExists:
            return None
        return f"sha256:{number}"

    with ThreadPoolExecutor(8) as pool:
        (winner,) = [digest for digest in pool.map(add, range(8)) if digest]
    assert names.find("contested") == version("contested", winner)


def test_a_version_can_be_addressed_by_its_content(names: Names) -> None:
    long = "sha256:" + "ab" * 32
    names.add(version("exact", long))
    for address in (f"exact@{long}", f"exact@{long[:19]}"):
        assert names.find(address) == version("exact", long)
    for address in (f"exact@{long[:18]}", f"exact@sha256:{'cd' * 32}", f"nobody@{long}", "exact@v1", "exact@"):
        assert isinstance(names.find(address), AdapterNotFound), address
    assert isinstance(names.find("exact", "exact"), InvalidRequest), "head is for mixes"


def test_every_row_gets_its_own_answer() -> None:
    """Only rows of one mix with one key share theirs: what is drawn for one is not drawn for another."""
    asked: list[tuple[object, object, object]] = []

    def find(adapter: object, head: object, key: object) -> int:
        asked.append((adapter, head, key))
        return len(asked)

    mix = {"a": 0.5, "b": 0.5}
    rows = [Row("x", mix, sticky_key=key) for key in ("k", "k", "l", None, None)]
    rows += [Row("x", "a", sticky_key="k"), Row("x", mix, head="a", sticky_key="k"), Row("x"), Row("x")]
    assert each_version(rows, find) == [1, 1, 2, 3, 4, 5, 6, 7, 8]
    assert asked[2] == (mix, None, None) and asked[4] == ("a", None, "k")
