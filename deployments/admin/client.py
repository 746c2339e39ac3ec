"""The admin API of a running application, asked over HTTP."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx

_CONNECT_S = 5.0
_ANSWER_S = 900.0  # a source is looked at again, or an adapter loaded everywhere, before some answers come
_PAGE = 500
_SHOWN = 200


class Refused(Exception):
    """The server's error, in its own words."""

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        super().__init__(str(error.get("message", f"HTTP status {status}")))
        self.status = status
        self.code = str(error.get("code"))
        self.problems = [str(problem) for problem in error.get("problems", ())]
        self.document = {"error": dict(error)}


class Unreachable(Exception):
    """Nobody answers at the URL, or somebody else does."""


class Server:
    """A running application at ``url``. Raises Refused and Unreachable."""

    def __init__(self, url: str) -> None:
        self._url = url
        timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
        try:
            self._http = httpx.Client(base_url=url, timeout=timeout, trust_env=not _is_loopback(url))
        except (httpx.InvalidURL, ValueError) as error:
            raise Unreachable(f"{url!r} is not a URL: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The answer's JSON. ``body``: what to send as JSON; bytes are sent as they are."""
        content: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        given = {key: value for key, value in (query or {}).items() if value is not None}
        try:
            response = self._http.request(
                method, path, params=given, headers=headers, **({} if body is None else content)
            )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise Unreachable(f"{self._url!r} is not a URL: {error}") from error
        except httpx.HTTPError as error:
            raise Unreachable(f"no answer from {self._url}: {error or type(error).__name__}") from error
        return self._document(response)

    def pages(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Every entry of a list that comes in pages."""
        query = {"limit": _PAGE, **query}
        while True:
            page = self.ask("GET", path, query=query)
            yield from page["data"]
            if not page["has_more"]:
                return
            query["after"] = page["last_id"]

    def _document(self, response: httpx.Response) -> Any:
        try:
            document = response.json()
        except ValueError:
            document = None
        if isinstance(document, dict):
            if response.is_success:
                return document
            if isinstance(error := document.get("error"), dict):
                raise Refused(response.status_code, error)
        raise Unreachable(
            f"{self._url} is not an adapter-router: it answers {response.status_code} {response.text:.{_SHOWN}}"
        )


def adapter_path(name: str, *verb: str) -> str:
    """Where the adapter ``name`` is told ``verb``; names may hold any printable character."""
    return "/".join(["/v1/adapters", quote(name, safe="/"), *verb])


def alias_path(name: str, *verb: str) -> str:
    """Where the alias ``name`` is."""
    return "/".join(["/v1/aliases", quote(name, safe="/"), *verb])


def _is_loopback(url: str) -> bool:
    """Whether a proxy that the environment names could not find the server anyhow."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
