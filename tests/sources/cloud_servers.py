"""As much of Google's and Azure's object stores as gcsfs and adlfs ask to read a file, on loopback."""

from __future__ import annotations

import json
import re
import zlib
from email.utils import formatdate
from urllib.parse import parse_qs, unquote, urlsplit

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.sources.web_server import Handler, Request, WebServer

_NAMES = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}


class CloudServer:
    """Objects by ``bucket/key``; ``web.site`` has the log and the faults."""

    scheme = ""

    def __init__(self) -> None:
        self.web = WebServer()
        self.objects: dict[str, bytes] = {}
        self.denied = False

    def put(self, folder: str, **files: bytes) -> str:
        for name, content in files.items():
            self.objects[f"{folder}/{_NAMES.get(name, name)}"] = content
        return f"{self.scheme}://{folder}"

    def ranges(self, ending: str) -> list[str | None]:
        return [request.range for request in self.web.site.asked("GET", ending)]

    def close(self) -> None:
        self.web.close()

    def _noted(self, handler: Handler, method: str, path: str, given: str | None) -> bool:
        """Log it; whether a fault has answered it."""
        if given is not None and handler.headers.get("Range") is None:
            handler.headers["Range"] = given
        request = Request(method, path, handler.headers)
        self.web.site.requests.append(request)
        waiting = self.web.site.faults[path]
        return bool(method == "GET" and waiting and waiting.popleft()(handler, request))


class GoogleServer(CloudServer):
    """The JSON API under ``url``, and the place that gives tokens to service accounts."""

    scheme = "gs"

    def __init__(self) -> None:
        super().__init__()
        self.url = f"http://127.0.0.1:{self.web.port}"
        self.web.route(GET=self._get, POST=self._token)

    def service_account(self) -> str:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {
            "type": "service_account",
            "project_id": "p",
            "private_key_id": "1",
            "private_key": private.decode(),
            "client_email": "me@p.iam.gserviceaccount.com",
            "token_uri": f"{self.url}/token",
        }
        return json.dumps(account)

    def _token(self, handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        self._json(handler, {"access_token": "hush", "expires_in": 3600, "token_type": "Bearer"})

    def _get(self, handler: Handler) -> None:
        parts = urlsplit(handler.path)
        match = re.fullmatch(r"(/download)?/storage/v1/b/([^/]+)/o(?:/(.+))?", parts.path)
        path = f"{match.group(2)}/{unquote(match.group(3) or '')}" if match else parts.path
        if self._noted(handler, "GET" if match and match.group(1) else "LOOK", path, None):
            return
        if self.denied and handler.headers.get("Authorization") != "Bearer hush":
            self._json(handler, {"error": {"code": 403, "message": "no"}}, 403)
        elif match is None or (match.group(3) and path not in self.objects):
            self._json(handler, {"error": {"code": 404, "message": "no"}}, 404)
        elif not match.group(3):
            prefix = f"{match.group(2)}/{parse_qs(parts.query).get('prefix', [''])[0]}"
            found = [self._described(key) for key in self.objects if key.startswith(prefix)]
            self._json(handler, {"kind": "storage#objects", "items": found})
        elif match.group(1):
            _send_range(handler, self.objects[path], handler.headers.get("Range"), {})
        else:
            self._json(handler, self._described(path))

    def _described(self, path: str) -> dict[str, object]:
        bucket, _, name = path.partition("/")
        content = self.objects[path]
        generation = str(zlib.crc32(content))
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(content)),
            "generation": generation,
            "etag": generation,
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def _json(self, handler: Handler, answer: object, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        handler.head(status, Content_Type="application/json", Content_Length=str(len(body)))
        handler.wfile.write(body)


class AzureServer(CloudServer):
    """The blobs of the account ``acct``."""

    scheme = "az"

    def __init__(self) -> None:
        super().__init__()
        self.connection_string = (
            "DefaultEndpointsProtocol=http;AccountName=acct;AccountKey=aHVzaA==;"
            f"BlobEndpoint=http://127.0.0.1:{self.web.port}/acct;"
        )
        self.web.route(GET=lambda handler: self._get(handler, "GET"), HEAD=lambda handler: self._get(handler, "HEAD"))

    def _get(self, handler: Handler, method: str) -> None:
        parts = urlsplit(handler.path)
        path = unquote(parts.path).removeprefix("/acct/")
        listing = "comp=list" in parts.query
        if self._noted(handler, "LOOK" if listing else method, path, handler.headers.get("x-ms-range")):
            return
        if self.denied:
            handler.head(403, Content_Length="0", x_ms_error_code="AuthorizationFailure")
        elif listing:
            body = (
                f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="{path}">'
                "<Blobs/><NextMarker/></EnumerationResults>"
            ).encode()
            handler.head(200, Content_Type="application/xml", Content_Length=str(len(body)))
            handler.wfile.write(body)
        elif path not in self.objects:
            handler.head(404, Content_Length="0", x_ms_error_code="BlobNotFound")
        else:
            facts = {
                "ETag": f'"0x{zlib.crc32(self.objects[path]):X}"',
                "Last_Modified": formatdate(1, usegmt=True),
                "x_ms_blob_type": "BlockBlob",
            }
            if method == "HEAD":
                handler.head(200, Content_Length=str(len(self.objects[path])), **facts)
            else:
                _send_range(handler, self.objects[path], handler.headers.get("Range"), facts)


def _send_range(handler: Handler, content: bytes, wanted: str | None, headers: dict[str, str]) -> None:
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
    if match is None:
        handler.head(200, Content_Length=str(len(content)), **headers)
        handler.wfile.write(content)
        return
    first, last = int(match.group(1)), min(int(match.group(2)), len(content) - 1)
    part = content[first : last + 1]
    whole = f"bytes {first}-{last}/{len(content)}"
    handler.head(206, Content_Length=str(len(part)), Content_Range=whole, **headers)
    handler.wfile.write(part)
