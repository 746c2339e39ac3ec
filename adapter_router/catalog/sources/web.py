"""Files over https: every redirect and every address checked before a byte is asked for."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol
from urllib.parse import urljoin, urlsplit

import httpx2

from adapter_router.catalog.adapter_files import FILES, PICKLE, WEIGHTS
from adapter_router.catalog.sources.address import Address, parse_redirect
from adapter_router.catalog.sources.clients import Clients, proxy_of
from adapter_router.catalog.sources.place import Changed, Failing, RemoteFile, Stream, refused
from adapter_router.catalog.sources.threads import in_thread

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_MAY_HEAL = (408, 425, 429, 500, 502, 503, 504)
_NO_HEAD = (400, 403, 405, 501)  # signed addresses are often for GET alone
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


class Guard(Protocol):
    """Decides where requests may go. Both raise AdapterRejected."""

    def check(self, address: Address) -> object: ...

    def check_ip(self, address: Address, ip: str) -> None: ...


class Web:
    """The files below one address. An asynchronous context manager.

    ``authorization``: a header, and ``query``: what follows the ``?``, for the address itself; neither goes anywhere
    else. ``url``: of a file, by name.
    """

    def __init__(
        self,
        guard: Guard,
        url: Callable[[str], str],
        clients: Clients,
        authorization: str | None = None,
        query: str | None = None,
    ) -> None:
        self._guard = guard
        self._url = url
        self._origin = _origin(url(""))
        self._clients = clients
        self._open: dict[str | None, httpx2.AsyncClient] = {}  # by proxy
        self._authorization = authorization
        self._query = query

    async def __aenter__(self) -> Web:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._open.values():
            await client.aclose()

    async def files(self) -> Mapping[str, RemoteFile]:
        found = await asyncio.gather(*(self._look_at(name) for name in FILES))
        files = {file.name: file for file in found if file is not None}
        if WEIGHTS not in files and (pickle := await self._look_at(PICKLE)) is not None:
            files[PICKLE] = pickle
        return files

    @asynccontextmanager
    async def read(self, file: RemoteFile, start: int) -> AsyncIterator[Stream]:
        async with self._get(file.name, start) as response:
            if _tag(response) != (file.tag, file.strong):
                raise Changed
            yield _stream(response, file.name, start)

    @asynccontextmanager
    async def stream(self, name: str, start: int) -> AsyncIterator[Stream]:
        """As ``read``, of a file that never changes."""
        async with self._get(name, start) as response:
            yield _stream(response, name, start)

    @asynccontextmanager
    async def _get(self, name: str, start: int) -> AsyncIterator[httpx2.Response]:
        async with self._request("GET", name, {"Range": f"bytes={start}-"} if start else {}) as response:
            if response.status_code == 416:
                raise Changed
            _raise_for_status(response, name)
            yield response

    async def _look_at(self, name: str) -> RemoteFile | None:
        async with self._request("HEAD", name) as response:
            if response.status_code not in _NO_HEAD:
                return _described(response, name)
        async with self._request("GET", name) as response:  # only its head: the rest is not read
            return _described(response, name)

    @asynccontextmanager
    async def _request(
        self, method: str, name: str, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx2.Response]:
        """The answer after all redirects, its body not read yet."""
        url = self._url(name) + (f"?{self._query}" if self._query else "")
        try:
            for _ in range(_MOST_REDIRECTS + 1):
                proxy = proxy_of(url)
                address = await self._checked(url, proxy)
                own = {"Authorization": self._authorization} if self._is_own(url) and self._authorization else {}
                client = self._client(proxy)
                async with client.stream(method, url, headers={**(headers or {}), **own}) as response:
                    if proxy is None:
                        self._check_peer(response, address)
                    if response.status_code not in _REDIRECTS:
                        yield response
                        return
                    url = urljoin(url, response.headers.get("location", ""))
        except (httpx2.TransportError, httpx2.StreamError) as error:
            raise Failing(f"{name}: {_told(error)}") from None  # its text may have the whole address
        except httpx2.HTTPError as error:
            raise refused([f"{name}: {type(error).__name__}"]) from None
        raise refused([f"{name}: more than {_MOST_REDIRECTS} redirects"])

    def _client(self, proxy: str | None) -> httpx2.AsyncClient:
        if proxy not in self._open:
            self._open[proxy] = self._clients.make(proxy)
        return self._open[proxy]

    async def _checked(self, url: str, proxy: str | None) -> Address:
        address, problems = parse_redirect(url)
        if address is None or problems:
            raise refused(f"a redirect leads to {problem}" for problem in problems)
        self._guard.check(address)
        host, port = urlsplit(url).hostname or "", urlsplit(url).port
        if proxy is None:  # else it is the proxy that knows addresses, and decides
            try:
                found = await in_thread(partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError):
                raise Failing(f"{host} has no address (DNS)") from None
            for *_, where in found:
                self._guard.check_ip(address, str(where[0]))
        return address

    def _check_peer(self, response: httpx2.Response, address: Address) -> None:
        """Whom we talk to: a name may have been another's when it was checked."""
        stream = response.extensions.get("network_stream")
        peer = stream.get_extra_info("server_addr") if stream is not None else None
        if peer is not None:
            self._guard.check_ip(address, str(ipaddress.ip_address(peer[0].partition("%")[0])))

    def _is_own(self, url: str) -> bool:
        return _origin(url) == self._origin


def _described(response: httpx2.Response, name: str) -> RemoteFile | None:
    if response.status_code in (404, 410):
        return None
    _raise_for_status(response, name)
    tag, strong = _tag(response)
    size = response.headers.get("content-length", "")  # of HEAD's answer some say 0, whatever the file has
    return RemoteFile(name, (int(size) or None) if size.isdigit() else None, tag, strong)


def _tag(response: httpx2.Response) -> tuple[str, bool]:
    tag = response.headers.get("etag", "")
    if tag and not tag.startswith("W/"):
        return tag, True
    return tag or response.headers.get("last-modified", ""), False


def _stream(response: httpx2.Response, name: str, start: int) -> Stream:
    headers = response.headers
    if headers.get("content-encoding", "identity") != "identity":
        raise refused([f"{name}: the server compresses it unasked; have it send the file as it is"])
    if response.status_code == 206:  # perhaps of less than was asked for; how long the whole is we must know
        match = _RANGE.fullmatch(headers.get("content-range", ""))
        if match is None or int(match.group(1)) != start:
            raise refused([f"{name}: the server sends another part than the one it was asked for"])
        return Stream(start, int(match.group(2)), _chunks(response, name))
    length = headers.get("content-length", "")
    if not length.isdigit() and "chunked" not in headers.get("transfer-encoding", ""):
        raise refused([f"{name}: the server does not say where the file ends, so a part could pass for the whole"])
    return Stream(0, int(length) if length.isdigit() else None, _chunks(response, name))


async def _chunks(response: httpx2.Response, name: str) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.aiter_raw():
            yield chunk
    except (httpx2.TransportError, httpx2.StreamError) as error:
        raise Failing(f"{name}: {_told(error)}") from None


def _raise_for_status(response: httpx2.Response, name: str) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    told = f"{name}: the server says {status} {response.reason_phrase:.100}"
    if status in _MAY_HEAL:
        after = response.headers.get("retry-after", "")
        raise Failing(told, float(after) if after.isdigit() else None)
    if status in (401, 403, 407):
        told += (
            "; name credentials that may read it with secretRef (a server that says so of files which are not there "
            "must say 404, else we would serve less than there is)"
        )
    raise refused([told])


def _told(error: Exception) -> str:
    kinds: tuple[tuple[type[Exception], str], ...] = (
        (httpx2.ConnectTimeout, "no connection within idle_timeout_s"),
        (httpx2.TimeoutException, "nothing came for idle_timeout_s"),
        (httpx2.ConnectError, "no connection"),
        (httpx2.RemoteProtocolError, "the connection ended before the file did"),
    )
    words = next((words for kind, words in kinds if isinstance(error, kind)), type(error).__name__)
    detail = str(error.__cause__ or error)
    return f"{words} ({detail:.200})" if isinstance(error, httpx2.ConnectError) and "certificate" in detail else words


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)
