"""Adapters over https: whole or not at all, however the server behaves."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_router.catalog.adapter_files import FILES
from adapter_router.catalog.sources.address import Address
from adapter_router.catalog.sources.clients import Clients
from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.sources.web import Web
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.errors import AdapterRejected, AdapterUnavailable
from adapter_router.types import Source
from tests.sources.conftest import CONFIG, WEIGHTS, copies, put, quick, unfinished
from tests.sources.web_server import (
    Fault,
    Handler,
    Proxy,
    Request,
    WebServer,
    chunked,
    cut,
    drip,
    drip_head,
    endless,
    first,
    hang,
    redirect,
    shorter,
    status,
    unmeasured,
)

LARGE = os.urandom((3 << 20) + 17)


def fetch(fetcher: Fetcher, uri: str, sha256: str | None = None) -> StoredAdapter:
    stored = fetcher.fetch(Source(uri, sha256=sha256))
    fetcher.store.settle(stored, keep=True)
    return stored


def refusal(fetcher: Fetcher, uri: str) -> str:
    with pytest.raises(AdapterRejected) as caught:
        fetcher.fetch(Source(uri))
    assert not copies(fetcher.store)
    return str(caught.value)


def unavailable(fetcher: Fetcher, uri: str) -> str:
    with pytest.raises(AdapterUnavailable) as caught:
        fetcher.fetch(Source(uri))
    assert not copies(fetcher.store) and caught.value.retryable
    return str(caught.value)


def test_what_comes_is_what_lies_there(web: WebServer, fetcher: Fetcher, tmp_path: Path) -> None:
    uri = put(web, "/a", LARGE, **{"/a/config.json": b"[]", "/a/initial/adapter_model.safetensors": b"before"})
    web.site.files |= {"/a/adapter_model.bin": b"pickle", "/a/README.md": b"read me"}
    stored = fetch(fetcher, uri)
    files = stored.read()
    assert (files.config, files.weights, files.head_config) == (b"{}", LARGE, b"[]")
    assert files.initial_weights == b"before"
    assert not [request for request in web.site.requests if request.path.endswith((".bin", ".md"))]
    local = tmp_path / "local"
    for path, content in web.site.files.items():
        (local / path.removeprefix("/a/")).parent.mkdir(parents=True, exist_ok=True)
        (local / path.removeprefix("/a/")).write_bytes(content)
    assert ContentStore(tmp_path / "other").admit(local).digest == stored.digest
    assert unfinished(fetcher.store) == []


def test_the_same_again_costs_no_download(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", LARGE)
    assert fetch(fetcher, uri) == fetch(fetcher, uri)
    assert len(web.site.asked("GET", WEIGHTS)) == 1


def test_overwritten_in_place_is_another_version(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", b"one")
    one, seen = fetch(fetcher, uri), fetcher.fingerprint(Source(uri))
    assert fetcher.fingerprint(Source(uri)) == seen and len(web.site.asked("GET", "")) == 2
    put(web, "/a", b"two")
    assert fetcher.fingerprint(Source(uri)) != seen
    two = fetch(fetcher, uri)
    assert two.digest != one.digest
    assert (one.read().weights, two.read().weights) == (b"one", b"two")


def test_without_strong_tags_nothing_is_taken_for_the_same(web: WebServer, fetcher: Fetcher) -> None:
    web.site.strong = False
    uri = put(web, "/a", b"one")
    assert fetch(fetcher, uri) == fetch(fetcher, uri)
    assert len(web.site.asked("GET", WEIGHTS)) == 2


def test_a_dropped_connection_goes_on_where_it_was(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", LARGE)
    web.site.fail(f"/a/{WEIGHTS}", cut(1 << 20), cut(1 << 20), cut(1 << 20))
    assert fetch(fetcher, uri).read().weights == LARGE  # three cuts and three attempts: progress counts
    asked = web.site.asked("GET", WEIGHTS)
    assert [request.range for request in asked] == [None, *(f"bytes={n << 20}-" for n in (1, 2, 3))]
    assert sum(request.sent for request in asked) == len(LARGE)


def test_what_came_before_an_error_is_kept_for_the_next_fetch(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", LARGE)
    web.site.fail(f"/a/{WEIGHTS}", cut(1 << 20), *[status(503)] * 3)
    unavailable(fetcher, uri)
    assert len(unfinished(fetcher.store)) == 1
    again = Fetcher(quick(f"{web.url}/"), fetcher.store)
    assert fetch(again, uri).read().weights == LARGE
    assert web.site.asked("GET", WEIGHTS)[-1].range == f"bytes={1 << 20}-"
    assert web.site.asked("GET", CONFIG)[-1].sent == 2 and len(web.site.asked("GET", CONFIG)) == 1
    assert unfinished(fetcher.store) == []


def test_one_that_changed_meanwhile_is_not_continued(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", LARGE)
    changed = bytes(len(LARGE))
    web.site.fail(f"/a/{WEIGHTS}", cut(1 << 20), first(lambda: put(web, "/a", changed)))
    stored = fetch(fetcher, uri)
    assert stored.read().weights == changed


def test_files_of_two_versions_are_never_mixed(web: WebServer, fetcher: Fetcher) -> None:
    """The first file is read, then both are replaced, then the second is read."""
    uri = put(web, "/a", b"old weights")

    def replace() -> None:
        while not web.site.asked("GET", CONFIG) or not web.site.asked("GET", CONFIG)[0].sent:
            time.sleep(0.001)
        web.site.files |= {f"/a/{CONFIG}": b"[]", f"/a/{WEIGHTS}": b"new weights"}

    web.site.fail(f"/a/{WEIGHTS}", first(replace))
    files = fetch(fetcher, uri).read()
    assert (files.config, files.weights) == (b"[]", b"new weights")


def test_a_server_without_ranges_starts_over(web: WebServer, fetcher: Fetcher) -> None:
    web.site.ranges = False
    uri = put(web, "/a", LARGE)
    web.site.fail(f"/a/{WEIGHTS}", cut(1 << 20))
    assert fetch(fetcher, uri).read().weights == LARGE
    assert [request.sent for request in web.site.asked("GET", WEIGHTS)] == [1 << 20, len(LARGE)]


def test_one_that_is_always_cut_at_the_same_place_is_given_up(web: WebServer, fetcher: Fetcher) -> None:
    web.site.ranges = False
    uri = put(web, "/a", LARGE)
    web.site.fail(f"/a/{WEIGHTS}", *[cut(1 << 20)] * 10)
    assert "ended before the file did" in unavailable(fetcher, uri)
    assert len(web.site.asked("GET", WEIGHTS)) <= 4


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_what_may_heal_is_tried_again(code: int, web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a")
    web.site.fail(f"/a/{CONFIG}", status(code), status(code))
    assert fetch(fetcher, uri).read().config == b"{}"
    assert len(web.site.asked("GET", CONFIG)) == 3


def test_what_does_not_heal_is_unavailable(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a")
    web.site.fail(f"/a/{CONFIG}", *[status(500)] * 10)
    text = unavailable(fetcher, uri)
    assert uri in text and "500 Internal Server Error" in text
    assert len(web.site.asked("GET", CONFIG)) == 3


def test_a_server_may_say_when_to_come_back(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a")
    web.site.fail(f"/a/{CONFIG}", status(503, Retry_After="1"))
    begun = time.monotonic()
    fetch(fetcher, uri)
    assert time.monotonic() - begun >= 1


def test_one_that_says_to_come_back_in_an_hour_holds_nobody_that_long(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a")
    web.site.fail(f"/a/{CONFIG}", *[status(429, Retry_After="3600")] * 9)
    begun = time.monotonic()
    assert "429" in unavailable(fetcher, uri)
    assert time.monotonic() - begun < 10 and len(web.site.asked("GET", CONFIG)) == 1


@pytest.mark.parametrize("code", [400, 401, 403, 418])
def test_what_is_denied_is_refused_at_once(code: int, web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a")
    web.site.fail(f"/a/{CONFIG}", *[status(code)] * 3)
    assert str(code) in refusal(fetcher, uri)
    assert len(web.site.asked("GET", CONFIG)) == 1


def test_an_optional_file_that_is_denied_is_no_missing_one(web: WebServer, fetcher: Fetcher) -> None:
    """A store may say so of files that are not there, too; we cannot know."""
    web.site.denied.add("/a/config.json")
    assert "config.json: the server says 403" in refusal(fetcher, put(web, "/a"))


def test_one_that_sends_less_than_it_announced_is_not_taken(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", b"weights")
    web.site.fail(f"/a/{WEIGHTS}", *[shorter] * 3)
    assert f"{WEIGHTS}: 6 of 7 bytes came" in unavailable(fetcher, uri)


@pytest.mark.parametrize("length", [{"Content_Length": "0"}, {}])
def test_an_answer_to_head_may_not_know_the_length(length: dict[str, str], web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", LARGE, **{"/a/config.json": b""})

    def head(handler: Handler) -> None:
        content = web.site.files.get(handler.path)
        handler.head(404 if content is None else 200, ETag=handler.tag(content or b""), Connection="close", **length)

    web.route(HEAD=head)
    files = fetch(fetcher, uri).read()
    assert files.weights == LARGE and files.head_config == b""


def test_a_server_may_send_less_than_the_part_it_was_asked_for(web: WebServer, fetcher: Fetcher) -> None:
    """And nobody knows the length but who says it of the whole."""
    uri = put(web, "/a", LARGE)

    def head(handler: Handler) -> None:
        content = web.site.files.get(handler.path)
        handler.head(404 if content is None else 200, ETag=handler.tag(content or b""), Connection="close")

    def break_off(handler: Handler, _: Request) -> bool:
        handler.head(200, Transfer_Encoding="chunked", ETag=handler.tag(LARGE))
        handler.wfile.write(b"400\r\n" + LARGE[:1024] + b"\r\n")
        handler.close_connection = True
        return True

    def a_kib_more(handler: Handler, _: Request) -> bool:
        part = {"Content_Length": "1024", "Content_Range": f"bytes 1024-2047/{len(LARGE)}"}
        handler.head(206, ETag=handler.tag(LARGE), **part)
        handler.wfile.write(LARGE[1024:2048])
        return True

    web.route(HEAD=head)
    web.site.fail(f"/a/{WEIGHTS}", break_off, a_kib_more)
    assert fetch(fetcher, uri).read().weights == LARGE
    assert [request.range for request in web.site.asked("GET", WEIGHTS)] == [None, "bytes=1024-", "bytes=2048-"]


def test_missing_files_are_listed_together(web: WebServer, fetcher: Fetcher) -> None:
    with pytest.raises(AdapterRejected) as caught:
        fetcher.fetch(Source(f"{web.url}/nowhere"))
    assert caught.value.problems == (
        f"{web.url}/nowhere: {CONFIG} is missing",
        f"{web.url}/nowhere: {WEIGHTS} is missing",
    )


def test_a_pickle_alone_is_refused_with_the_way_out_and_not_read(web: WebServer, fetcher: Fetcher) -> None:
    web.site.files |= {f"/a/{CONFIG}": b"{}", "/a/adapter_model.bin": b"pickle"}
    assert "is a pickle and is never read" in refusal(fetcher, web.url + "/a")
    assert web.site.asked("GET", ".bin") == []


@pytest.mark.parametrize("fault", [hang, drip_head, drip])
def test_one_that_never_ends_is_given_up_in_time(fault: Fault, web: WebServer, store: ContentStore) -> None:
    uri = put(web, "/a", bytes(10_000))
    web.site.fail(f"/a/{WEIGHTS}", *[fault] * 5)
    fetcher = Fetcher(quick(f"{web.url}/", timeout_s=2, idle_timeout_s=0.5), store)
    begun = time.monotonic()
    text = unavailable(fetcher, uri)
    assert time.monotonic() - begun < 20
    assert "timeout_s" in text and uri in text


def test_one_that_hangs_holds_up_no_other(web: WebServer, store: ContentStore) -> None:
    fetcher = Fetcher(quick(f"{web.url}/", idle_timeout_s=1), store)
    slow, fast = put(web, "/slow"), put(web, "/fast", b"others")
    web.site.fail(f"/slow/{WEIGHTS}", *[hang] * 3)
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(unavailable_later, fetcher, slow)
        while not web.site.asked("GET", f"/slow/{WEIGHTS}"):
            time.sleep(0.001)
        assert fetch(fetcher, fast).read().weights == b"others"
        assert not stuck.done()
        stuck.result()


def unavailable_later(fetcher: Fetcher, uri: str) -> None:
    with pytest.raises(AdapterUnavailable):
        fetcher.fetch(Source(uri))


def test_one_too_large_is_not_even_begun(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", bytes((12 << 20) + 1), **{"/a/config.json": bytes((1 << 20) + 1)})
    text = refusal(fetcher, uri)
    assert f"{WEIGHTS} has {(12 << 20) + 1} bytes, the limit is {8 << 20}" in text
    assert "config.json has 1048577 bytes, the limit is 1048576" in text
    assert web.site.asked("GET", "") == []


def test_one_that_turns_out_too_large_is_cut_off(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a")
    web.site.fail(f"/a/{WEIGHTS}", endless)
    assert f"more than {12 << 20} bytes" in refusal(fetcher, uri)
    assert web.site.asked("GET", WEIGHTS)[0].sent < (64 << 20), "some lies in the kernel's buffers"


def test_a_length_may_come_late(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", LARGE)
    web.site.fail(f"/a/{WEIGHTS}", chunked)
    assert fetch(fetcher, uri).read().weights == LARGE


def test_a_file_whose_end_nobody_can_know_is_refused(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", LARGE)
    web.site.fail(f"/a/{WEIGHTS}", unmeasured)
    assert "does not say where the file ends" in refusal(fetcher, uri)


def test_a_server_that_cannot_do_head_is_asked_otherwise(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", LARGE)
    web.route(HEAD=lambda handler: handler.head(405, Content_Length="0"))
    assert fetch(fetcher, uri).read().weights == LARGE


# -- pins ----------------------------------------------------------------------------------------------------------


def test_a_pin_of_the_version_or_of_the_weights(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", LARGE)
    digest = fetch(fetcher, uri).digest
    assert fetch(fetcher, uri, digest).digest == digest
    assert fetch(fetcher, uri, hashlib.sha256(LARGE).hexdigest()).digest == digest


@pytest.mark.parametrize("pin", ["0" * 64, "sha256:" + "0" * 64])
def test_a_pin_that_is_missed_leaves_nothing(pin: str, web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a")
    with pytest.raises(AdapterRejected, match=f"not the {pin} it must be"):
        fetcher.fetch(Source(uri, sha256=pin))
    assert copies(fetcher.store) == []


def test_a_pin_of_a_copy_that_is_damaged_is_looked_at_again(web: WebServer, fetcher: Fetcher) -> None:
    uri, pin = put(web, "/a", LARGE), hashlib.sha256(LARGE).hexdigest()
    (fetch(fetcher, uri, pin).directory / WEIGHTS).unlink()
    with pytest.raises(AdapterUnavailable, match="cannot be read"):
        fetcher.fetch(Source(uri, sha256=pin))
    assert fetch(fetcher, uri, pin).read().weights == LARGE


# -- where it may lead ---------------------------------------------------------------------------------------------


def test_a_redirect_within_what_is_allowed_is_followed(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", LARGE)
    put(web, "/b", LARGE)
    web.site.fail(f"/a/{WEIGHTS}", redirect(f"/b/{WEIGHTS}"))
    assert fetch(fetcher, uri).read().weights == LARGE


def elsewhere(web: WebServer) -> list[str]:
    return [
        f"https://127.0.0.1:{web.port}/private/{WEIGHTS}",
        f"https://localhost:{web.port + 1}/a/{WEIGHTS}",
        f"http://localhost:{web.port}/a/{WEIGHTS}",
        f"{web.url}/private/{WEIGHTS}",
        f"{web.url}/a/../private/{WEIGHTS}",
        f"{web.url}/a/%2e%2e/private/{WEIGHTS}",
        f"{web.url}/a%2f../private/{WEIGHTS}",
        f"{web.url}/ab/{WEIGHTS}",
        f"{web.url}//a/{WEIGHTS}",
        "file:///etc/passwd",
        "https://169.254.169.254/latest/meta-data",
        f"https://me:hush@localhost:{web.port}/a/{WEIGHTS}",
    ]


@pytest.mark.parametrize("number", range(12))
def test_a_redirect_elsewhere_is_not_followed(number: int, web: WebServer, store: ContentStore) -> None:
    uri = put(web, "/a")
    put(web, "/private", b"secret")
    put(web, "/ab", b"secret")
    web.site.fail(f"/a/{WEIGHTS}", redirect(elsewhere(web)[number]))
    text = refusal(Fetcher(quick(f"{web.url}/a"), store), uri)
    assert "redirect" in text or "not below any prefix" in text
    assert "hush" not in text
    assert not any(request.path.startswith(("/private", "/ab", "/latest", "//")) for request in web.site.requests)


def test_a_redirect_to_a_private_address_is_not_followed_even_where_all_hosts_are_allowed(
    web: WebServer, store: ContentStore, certificates: tuple[Path, Path]
) -> None:
    inside = WebServer(certificates[1])
    try:
        uri = put(web, "/a")
        put(inside, "/a", b"secret")
        web.site.fail(f"/a/{WEIGHTS}", redirect(f"{inside.url}/a/{WEIGHTS}"))
        fetcher = Fetcher(quick("https://", f"{web.url}/"), store)
        assert "127.0.0.1, which is not a public address" in refusal(fetcher, uri)
        assert inside.site.requests == []
        web.site.fail(f"/a/{WEIGHTS}", *[redirect(f"{inside.url}/a/{WEIGHTS}")] * 3)
        named = Fetcher(quick(f"{inside.url}/", f"{web.url}/"), store)
        with pytest.raises(AdapterUnavailable, match="being written"):  # it is another file than was promised
            named.fetch(Source(uri))
        assert inside.site.asked("GET", WEIGHTS)
    finally:
        inside.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0.0.0.0"])
def test_all_hosts_are_not_all_addresses(host: str, web: WebServer, store: ContentStore) -> None:
    put(web, "/a")
    text = refusal(Fetcher(quick("https://"), store), f"https://{host}:{web.port}/a")
    assert "not a public address" in text or "names no host" in text
    assert web.site.requests == []


class Doubting:
    """Allows the addresses that a name has when they are looked up, once a file, and not whom we then talk to."""

    def __init__(self) -> None:
        self.times = 0

    def check(self, address: Address) -> None:
        pass

    def check_ip(self, address: Address, ip: str) -> None:
        self.times += 1
        if self.times > len(FILES):
            raise AdapterRejected.because([f"{address} is at {ip} by now"])


def test_a_name_that_changes_its_address_after_it_was_looked_up_gives_nothing() -> None:
    inside = WebServer()

    async def look() -> object:
        base = f"http://127.0.0.1:{inside.port}/a/"
        async with Web(Doubting(), lambda name: base + name, Clients(5)) as web:
            return await web.files()

    try:
        put(inside, "/a", b"secret")
        with pytest.raises(AdapterRejected, match="by now"):
            asyncio.run(look())
    finally:
        inside.close()


def test_behind_a_proxy_it_is_the_proxy_that_is_asked(
    web: WebServer, store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, proxy = put(web, "/a", LARGE), Proxy()
    try:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        fetcher = Fetcher(quick("https://"), store)  # which addresses a name has is none of ours to know then
        assert fetch(fetcher, uri).read().weights == LARGE
        assert set(proxy.asked) == {f"localhost:{web.port}"}
        monkeypatch.setenv("NO_PROXY", "localhost")
        with pytest.raises(AdapterRejected, match="not a public address"):
            fetcher.fetch(Source(uri))
    finally:
        proxy.close()


def test_redirects_in_circles_end(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a")
    web.site.fail(f"/a/{WEIGHTS}", *[redirect(f"/a/{WEIGHTS}")] * 20)
    assert "more than 5 redirects" in refusal(fetcher, uri)


def test_a_certificate_nobody_vouches_for_is_not_trusted(
    web: WebServer, store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    uri = put(web, "/a")
    assert "certificate" in unavailable(Fetcher(quick(f"{web.url}/"), store), uri)
    assert web.site.requests == []


# -- credentials ---------------------------------------------------------------------------------------------------


def with_secret(web: WebServer, store: ContentStore, *allowed: str, **secret: str) -> Callable[[str], StoredAdapter]:
    fetcher = Fetcher(quick(f"{web.url}/", *allowed), store, lambda _: secret)
    return lambda uri: fetcher.fetch(Source(uri, secret_ref="mine"))


def test_credentials_go_to_the_address_and_nowhere_else(
    web: WebServer, store: ContentStore, certificates: tuple[Path, Path]
) -> None:
    other = WebServer(certificates[1])
    try:
        uri = put(web, "/a")
        put(other, "/a")
        web.site.fail(f"/a/{WEIGHTS}", redirect(f"{other.url}/a/{WEIGHTS}"))
        with_secret(web, store, f"{other.url}/", token="hush")(uri)
        assert {request.headers["Authorization"] for request in web.site.requests} == {"Bearer hush"}
        assert [request.headers["Authorization"] for request in other.site.requests] == [None]
    finally:
        other.close()


def test_a_user_and_a_password(web: WebServer, store: ContentStore) -> None:
    with_secret(web, store, username="me", password="hush")(put(web, "/a"))
    assert {request.headers["Authorization"] for request in web.site.requests} == {"Basic bWU6aHVzaA=="}


def test_a_signed_query_goes_with_every_file_and_into_no_error(web: WebServer, store: ContentStore) -> None:
    uri = put(web, "/a")
    with_secret(web, store, query="?sig=hush")(uri)
    assert all(request.path.endswith("?sig=hush") for request in web.site.requests)
    web.site.fail(f"/a/{CONFIG}", status(403))
    web.site.files[f"/a/{CONFIG}"] = b"[]"
    with pytest.raises(AdapterRejected) as caught:
        with_secret(web, store, query="?sig=hush")(uri)
    assert "hush" not in str(caught.value) and "hush" not in repr(caught.value)


def test_the_same_address_with_other_credentials_is_another_source(web: WebServer, store: ContentStore) -> None:
    """Else who may not read it would be given what others fetched."""
    uri = put(web, "/a")
    with_secret(web, store, token="hush")(uri)
    web.site.fail(f"/a/{WEIGHTS}", status(401))
    with pytest.raises(AdapterRejected, match="401"):
        Fetcher(quick(f"{web.url}/"), store).fetch(Source(uri))


def test_a_secret_with_a_key_nobody_reads_is_refused(web: WebServer, store: ContentStore) -> None:
    with pytest.raises(AdapterRejected, match="'tokn'") as caught:
        with_secret(web, store, tokn="hush")(put(web, "/a"))
    assert "hush" not in str(caught.value)


# -- progress ------------------------------------------------------------------------------------------------------


def test_progress_is_told(web: WebServer, fetcher: Fetcher) -> None:
    uri = put(web, "/a", LARGE)
    told: list[tuple[int, int | None]] = []
    fetcher.fetch(Source(uri), lambda done, total: told.append((done, total)))
    assert told[-1] == (len(LARGE) + 2, len(LARGE) + 2) and len(told) > 3
    assert [done for done, _ in told] == sorted(done for done, _ in told)
