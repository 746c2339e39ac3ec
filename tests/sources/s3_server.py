"""moto's S3 on loopback, behind a door that counts what is asked and misbehaves when told to."""

from __future__ import annotations

import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Start = Callable[..., Any]
Fault = Callable[["S3Server", dict[str, Any], Start], Iterable[bytes] | None]
"""Answers a request in the place of moto, or returns None and leaves it to moto."""

KEYS = {"aws_access_key_id": "somebody", "aws_secret_access_key": "hush"}


@dataclass
class Asked:
    method: str
    path: str
    range: str | None
    authorization: str


class _Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass


class S3Server:
    """``client`` puts objects into ``bucket``; ``secret`` reads them."""

    def __init__(self, bucket: str) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        self.port = self._server.server_port
        self.asked: list[Asked] = []
        self.faults: deque[tuple[str, str, Fault]] = deque()
        self.closing = threading.Event()
        self.bucket = bucket
        self.secret = {**KEYS, "endpoint_url": f"http://127.0.0.1:{self.port}", "region": "us-east-1"}
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.client = boto3.client("s3", endpoint_url=self.secret["endpoint_url"], region_name="us-east-1", **KEYS)
        urllib.request.urlopen(f"{self.secret['endpoint_url']}/moto-api/reset", data=b"")  # moto's are one a process
        self.client.create_bucket(Bucket=bucket)

    def put(self, folder: str, **files: bytes) -> str:
        """An adapter's files, ``config`` and ``weights`` and others by name; returns their address."""
        names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
        for name, content in files.items():
            self.client.put_object(Bucket=self.bucket, Key=f"{folder}/{names.get(name, name)}", Body=content)
        return f"s3://{self.bucket}/{folder}"

    def fail(self, method: str, ending: str, *faults: Fault) -> None:
        """Let the next requests for what ends so go wrong."""
        self.faults.extend((method, ending, fault) for fault in faults)

    def ranges(self, ending: str) -> list[str | None]:
        return [asked.range for asked in self.asked if asked.method == "GET" and asked.path.endswith(ending)]

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.asked.append(Asked(method, path, environ.get("HTTP_RANGE"), environ.get("HTTP_AUTHORIZATION", "")))
        for number, (wanted, ending, fault) in enumerate(self.faults):
            if method == wanted and path.endswith(ending):
                del self.faults[number]
                answer = fault(self, environ, start)
                if answer is not None:
                    return answer
                break
        answered: Iterable[bytes] = self._moto(environ, start)
        return answered


def status(code: int, word: str = "Oops") -> Fault:
    def answer(_: S3Server, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        body = f"<Error><Code>{word}</Code><Message>hush</Message></Error>".encode()
        start(f"{code} {word}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return answer


def hang(server: S3Server, _: dict[str, Any], start: Start) -> Iterable[bytes]:
    """Say nothing until the test is over."""
    server.closing.wait(60)
    start("503 Gone", [("Content-Length", "0")])
    return []


def cut(after: int) -> Fault:
    """Promise all that is asked for, and send a part of it."""

    def answer(_: S3Server, environ: dict[str, Any], start: Start) -> Iterator[bytes]:
        first, last = map(int, environ["HTTP_RANGE"].removeprefix("bytes=").split("-"))
        size = last - first + 1
        start(
            "206 Partial Content",
            [("Content-Length", str(size)), ("Content-Range", f"bytes {first}-{last}/{last + 1}")],
        )
        yield bytes(min(after, size))

    return answer


def short(by: int) -> Fault:
    """Send less than is asked for, and say that it is all of it."""

    def answer(_: S3Server, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        first, last = map(int, environ["HTTP_RANGE"].removeprefix("bytes=").split("-"))
        size = last - first + 1 - by
        start("206 Partial Content", [("Content-Length", str(size)), ("Content-Range", f"bytes {first}-{last - by}/*")])
        return [bytes(size)]

    return answer


def first(action: Callable[[], object]) -> Fault:
    """Do something, then leave the answer to moto."""

    def answer(*_: object) -> None:
        action()

    return answer
