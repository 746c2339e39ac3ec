"""A real https server on loopback that serves files, counts what is asked of it, and misbehaves when told to."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import re
import socket
import ssl
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """An authority's certificate, and the key and certificate that it gave to localhost."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, key: Any, signer: Any, issuer: str, extensions: list[Any]) -> x509.Certificate:
        builder = x509.CertificateBuilder(
            issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]),
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(hours=1),
            not_valid_after=now + datetime.timedelta(hours=1),
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(signer, hashes.SHA256())

    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    subject = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    authority = certificate(
        "test authority",
        authority_key,
        authority_key,
        "test authority",
        [(x509.BasicConstraints(True, None), True), (usage, True), (subject, False)],
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    ours = certificate(
        "localhost",
        key,
        authority_key,
        "test authority",
        [
            (x509.SubjectAlternativeName(names), False),
            (x509.BasicConstraints(False, None), True),
            (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject), False),
        ],
    )
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(authority.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(private + ours.public_bytes(pem))
    return folder / "ca.pem", folder / "server.pem"


@dataclass
class Request:
    """One request as it came; ``sent`` counts the body's bytes that went out."""

    method: str
    path: str
    headers: Message
    sent: int = 0

    @property
    def range(self) -> str | None:
        return self.headers.get("Range")


Fault = Callable[["Handler", Request], bool]
"""Answers a request in its own way and returns True, or does something and leaves the answer to the server."""


@dataclass
class Site:
    """What a server has: files by path, and what goes wrong, by path, one fault for each GET of it."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: defaultdict[str, deque[Fault]] = field(default_factory=lambda: defaultdict(deque))
    requests: list[Request] = field(default_factory=list)
    denied: set[str] = field(default_factory=set)
    strong: bool = True
    ranges: bool = True
    closing: threading.Event = field(default_factory=threading.Event)

    def asked(self, method: str, ending: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and request.path.endswith(ending)]

    def fail(self, path: str, *faults: Fault) -> None:
        self.faults[path].extend(faults)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def log_message(self, *_: object) -> None:
        pass

    def body(self, request: Request, data: bytes) -> None:
        for start in range(0, len(data), 1 << 16):
            self.wfile.write(data[start : start + (1 << 16)])
            request.sent += len(data[start : start + (1 << 16)])

    def head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def tag(self, content: bytes) -> str:
        return f'{"" if self.site.strong else "W/"}"{hashlib.md5(content).hexdigest()}"'

    def answer(self, method: str) -> None:
        """As the site has it."""
        request = Request(method, self.path, self.headers)
        self.site.requests.append(request)
        path = self.path.partition("?")[0]
        try:
            waiting = self.site.faults[path]
            if method == "GET" and waiting and waiting.popleft()(self, request):
                return
            content = self.site.files.get(path)
            if path in self.site.denied:
                self.head(403, Content_Length="0")
                return
            if content is None:
                self.head(404, Content_Length="0")
                return
            self._send(request, content)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            self.close_connection = True

    def _send(self, request: Request, content: bytes) -> None:
        tag = self.tag(content)
        wanted = re.fullmatch(r"bytes=(\d+)-", request.range or "")
        conditions = {None, tag}
        if wanted and self.site.ranges and request.headers.get("If-Range") in conditions:
            start = int(wanted.group(1))
            end = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.head(206, Content_Length=str(len(content) - start), Content_Range=end, ETag=tag)
            self.body(request, content[start:])
            return
        self.head(200, Content_Length=str(len(content)), ETag=tag)
        if request.method == "GET":
            self.body(request, content)


class WebServer:
    """``url`` of its root; ``site`` is what it has."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.site = Site()
        handler = type("SiteHandler", (Handler,), {"site": self.site})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
            scheme = "https"
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that go away
        self.port = self._server.server_address[1]
        self.url = f"{scheme}://localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def route(self, **methods: Callable[[Handler], None]) -> None:
        """Have requests answered by others, by method."""
        for method, answer in methods.items():

            def do(handler: Handler, answer: Callable[[Handler], None] = answer) -> None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):
                    answer(handler)

            setattr(self._server.RequestHandlerClass, f"do_{method}", do)

    def close(self) -> None:
        self.site.closing.set()
        self._server.shutdown()
        self._server.server_close()


class Proxy:
    """Connects clients to what they ask for; ``asked`` says what that was."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        proxy = self

        class Tunnel(BaseHTTPRequestHandler):
            def do_CONNECT(self) -> None:
                proxy.asked.append(self.path)
                host, _, port = self.path.rpartition(":")
                with socket.create_connection((host, int(port))) as far:
                    self.send_response(200)
                    self.end_headers()
                    back = threading.Thread(target=_pour, args=(far, self.connection), daemon=True)
                    back.start()
                    _pour(self.connection, far)
                    back.join()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Tunnel)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _pour(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


# -- what may go wrong ---------------------------------------------------------------------------------------------


def status(code: int, **headers: str) -> Fault:
    def answer(handler: Handler, _: Request) -> bool:
        handler.head(code, Content_Length="0", **headers)
        return True

    return answer


def hang(handler: Handler, _: Request) -> bool:
    """Say nothing until the test is over."""
    handler.site.closing.wait(60)
    handler.close_connection = True
    return True


def cut(after: int) -> Fault:
    """Promise what is asked for, and close the connection after some bytes of it."""

    def answer(handler: Handler, request: Request) -> bool:
        content = handler.site.files[request.path.partition("?")[0]]
        start = int(request.range[6:-1]) if request.range and handler.site.ranges else 0
        rest = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        handler.head(206 if start else 200, Content_Length=str(len(content) - start), ETag=handler.tag(content), **rest)
        handler.body(request, content[start : start + after])
        handler.close_connection = True
        return True

    return answer


def shorter(handler: Handler, request: Request) -> bool:
    """Less than was announced, and it is said to be all."""
    content = handler.site.files[request.path]
    handler.head(200, Content_Length=str(len(content) - 1), ETag=handler.tag(content))
    handler.body(request, content[:-1])
    return True


def drip(handler: Handler, request: Request) -> bool:
    """A byte now and then: never idle, never done."""
    content = handler.site.files[request.path]
    handler.head(200, Content_Length=str(len(content)), ETag=handler.tag(content))
    for byte in content:
        if handler.site.closing.wait(0.05):
            break
        handler.body(request, bytes([byte]))
    handler.close_connection = True
    return True


def drip_head(handler: Handler, _: Request) -> bool:
    """A head that never ends."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(10_000):
        if handler.site.closing.wait(0.05):
            break
        handler.wfile.write(f"X-{number}: x\r\n".encode())
        handler.wfile.flush()
    handler.close_connection = True
    return True


def endless(handler: Handler, request: Request) -> bool:
    """No length beforehand, and more than anybody wants."""
    content = handler.site.files[request.path]
    handler.head(200, Transfer_Encoding="chunked", ETag=handler.tag(content))
    while not handler.site.closing.is_set():
        handler.wfile.write(b"10000\r\n")
        handler.body(request, bytes(1 << 16))
        handler.wfile.write(b"\r\n")
    handler.close_connection = True
    return True


def chunked(handler: Handler, request: Request) -> bool:
    """No length beforehand, but an end."""
    content = handler.site.files[request.path]
    handler.head(200, Transfer_Encoding="chunked", ETag=handler.tag(content))
    handler.wfile.write(f"{len(content):x}\r\n".encode())
    handler.body(request, content)
    handler.wfile.write(b"\r\n0\r\n\r\n")
    return True


def unmeasured(handler: Handler, request: Request) -> bool:
    """Neither length nor chunks: the end of the connection is the end of the file, or not."""
    content = handler.site.files[request.path]
    handler.head(200, Connection="close", ETag=handler.tag(content))
    handler.body(request, content[: len(content) // 2])
    handler.close_connection = True
    return True


def redirect(location: str) -> Fault:
    return status(302, Location=location)


def first(action: Callable[[], object]) -> Fault:
    """Do something, then answer as always."""

    def answer(*_: object) -> bool:
        action()
        return False

    return answer
