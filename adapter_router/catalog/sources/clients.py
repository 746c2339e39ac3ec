"""Clients that ask over http: whom they trust, through which proxy they ask, and what their log may show."""

from __future__ import annotations

import logging
import ssl
import threading
import urllib.request
from urllib.parse import urlsplit

import httpx2

from adapter_router.catalog.sources.address import redacted


class _WithoutQueries(logging.Filter):
    """httpx logs every address that it asks for, also the signed ones."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            shown = (redacted(str(each)) if isinstance(each, httpx2.URL) else each for each in record.args)
            record.args = tuple(shown)
        return True


logging.getLogger("httpx2").addFilter(_WithoutQueries())


class Clients:
    """Makes http clients. Whom they trust is read once, as that takes far longer than all the rest."""

    def __init__(self, idle_timeout_s: float) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._lock = threading.Lock()
        self._trust: ssl.SSLContext | None = None

    def make(self, proxy: str | None) -> httpx2.AsyncClient:
        """For one event loop. It asks through ``proxy`` or directly, whatever the environment says."""
        with self._lock:
            if self._trust is None:
                self._trust = httpx2.create_ssl_context()
        return httpx2.AsyncClient(
            verify=self._trust,
            trust_env=False,
            proxy=proxy,
            timeout=self._idle_timeout_s,
            headers={"Accept-Encoding": "identity", "User-Agent": "adapter-router"},
            limits=httpx2.Limits(max_connections=None),
        )


def proxy_of(url: str) -> str | None:
    """The one that the environment wants ``url`` to be asked through."""
    parts, proxies = urlsplit(url), urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return None if proxy is None or urllib.request.proxy_bypass(parts.hostname or "") else proxy
