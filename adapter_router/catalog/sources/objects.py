"""Object stores, through fsspec: files in parts of some megabytes, which makes limits and resuming the same for all."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fsspec.asyn import AsyncFileSystem

from adapter_router.catalog.adapter_files import FILES, PICKLE, WEIGHTS
from adapter_router.catalog.sources.address import Address
from adapter_router.catalog.sources.place import Changed, Failing, RemoteFile, Stream, refused

_PART_BYTES = 4 << 20
_MOST_OPEN = 64
_LAST_USE_S = 600.0
_CLASSES = {
    "s3": ("s3fs", "S3FileSystem", "s3"),
    "gs": ("gcsfs.core", "GCSFileSystem", "gcs"),
    "az": ("adlfs", "AzureBlobFileSystem", "azure"),
}
# What fsspec's file systems tell of a file that is another once it is written again.
_TAGS = ("ETag", "etag", "generation", "VersionId", "md5Hash", "last_modified", "LastModified")
_STRONG_TAGS = ("ETag", "etag", "generation")
_DENIED = (401, 403)
_MAY_HEAL = (408, 409, 425, 429)


class ObjectStores:
    """File systems by kind and credentials, each with a thread of its own: one that hangs holds up no other."""

    def __init__(self, idle_timeout_s: float) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._lock = threading.Lock()
        self._open: OrderedDict[str, AsyncFileSystem] = OrderedDict()

    def folder(self, address: Address, secret: Mapping[str, str]) -> ObjectFolder:
        """Blocks, as some look for credentials. Raises AdapterRejected when ``secret`` or a package is missing."""
        options = _OPTIONS[address.scheme](secret, self._idle_timeout_s)
        key = hashlib.sha256(json.dumps([address.scheme, options], sort_keys=True).encode()).hexdigest()
        with self._lock:
            found = self._open.get(key)
        if found is None:
            found = _file_system(address.scheme, options)
        with self._lock:
            if self._open.setdefault(key, found) is not found:
                _stop(found)
            self._open.move_to_end(key)
            if len(self._open) > _MOST_OPEN:
                _stop(self._open.popitem(last=False)[1])
            return ObjectFolder(self._open[key], address, self._idle_timeout_s)


class ObjectFolder:
    """The objects below one prefix: a ``Place``."""

    def __init__(self, file_system: AsyncFileSystem, address: Address, idle_timeout_s: float) -> None:
        self._file_system = file_system
        self._prefix = "/".join((address.authority, *address.segments))
        self._idle_timeout_s = idle_timeout_s

    async def files(self) -> Mapping[str, RemoteFile]:
        found = await asyncio.gather(*(self._look_at(name) for name in FILES))
        files = {file.name: file for file in found if file is not None}
        if WEIGHTS not in files and (pickle := await self._look_at(PICKLE)) is not None:
            files[PICKLE] = pickle
        return files

    @asynccontextmanager
    async def read(self, file: RemoteFile, start: int) -> AsyncIterator[Stream]:
        yield Stream(start, file.size, self._parts(file, start))

    async def _parts(self, file: RemoteFile, start: int) -> AsyncIterator[bytes]:
        assert file.size is not None
        for begin in range(start, file.size, _PART_BYTES):
            end = min(begin + _PART_BYTES, file.size)
            try:
                part = await self._ask(self._file_system._cat_file(self._path(file.name), start=begin, end=end))
            except FileNotFoundError:
                raise Changed from None
            except Exception as error:
                raise _failure(error, file.name) from None
            if len(part) != end - begin:
                raise Failing(f"{file.name}: {len(part)} bytes came for {end - begin}")
            yield part

    async def _look_at(self, name: str) -> RemoteFile | None:
        try:
            info = await self._ask(self._file_system._info(self._path(name)))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise _failure(error, name) from None
        if info["type"] != "file":
            return None
        tag = " ".join(f"{key}={info[key]}" for key in _TAGS if info.get(key))
        return RemoteFile(name, int(info["size"]), tag, any(info.get(key) for key in _STRONG_TAGS))

    async def _ask(self, call: Coroutine[Any, Any, Any]) -> Any:
        """``call`` on the file system's own loop, given up when nothing comes."""
        async with asyncio.timeout(self._idle_timeout_s):
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._file_system.loop))

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}"


def _file_system(scheme: str, options: Mapping[str, Any]) -> AsyncFileSystem:
    package, name, extra = _CLASSES[scheme]
    try:
        kind = getattr(importlib.import_module(package), name)
    except ImportError:
        raise refused(
            [f"{scheme}:// needs the package {package}, which is not installed: pip install 'adapter-router[{extra}]'"]
        ) from None
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"{scheme} io", daemon=True).start()
    try:
        opened: AsyncFileSystem = kind(**options, loop=loop, use_listings_cache=False, skip_instance_cache=True)
    except Exception as error:
        loop.call_soon_threadsafe(loop.stop)
        raise refused([f"{scheme}:// cannot be opened with these credentials: {type(error).__name__}"]) from None
    if scheme == "s3":
        opened.retries = 1  # it is we who try again, and know when to stop
    return opened


def _stop(file_system: AsyncFileSystem) -> None:
    """End a file system's thread once those who still use it have had their time."""
    loop = file_system.loop
    loop.call_soon_threadsafe(lambda: loop.call_later(_LAST_USE_S, loop.stop))


def _failure(error: Exception, name: str) -> Exception:
    """What went wrong, without the library's own words, which may have addresses and keys in them."""
    status, code = _status(error)
    if isinstance(error, Failing | Changed):
        return error
    told = f"{name}: the store says {code or status}" if code or status else f"{name}: {type(error).__name__}"
    if isinstance(error, PermissionError) or status in _DENIED or str(error).startswith("Forbidden"):
        return refused(
            [
                f"{told}; name credentials with secretRef that may read it, and list the folder (without that, stores "
                "say so of files which are not there, too, and we would serve less than there is)"
            ]
        )
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return refused([f"{name}: there are no credentials; name some with secretRef"])
    if isinstance(error, TimeoutError):
        return Failing(f"{name}: nothing came within idle_timeout_s")
    if status is not None and 400 <= status < 500 and status not in _MAY_HEAL:
        return refused([told])
    return Failing(told)


def _status(error: BaseException | None) -> tuple[int | None, str | None]:
    """The HTTP status and the store's own word, from botocore's, gcsfs', azure's and aiohttp's errors."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, Mapping):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, f"{response.get('Error', {}).get('Code', status):.100}"
        if type(error).__module__ == "aiohttp.http_exceptions":
            return None, None  # an answer that broke off: its code is aiohttp's own, not the store's
        for name in ("status_code", "status", "code"):
            if str(getattr(error, name, "")).isdigit():
                return int(getattr(error, name)), None
        error = error.__cause__
    return None, None


def _s3_options(secret: Mapping[str, str], idle_timeout_s: float) -> dict[str, Any]:
    values = _values(
        secret,
        {
            "aws_access_key_id": "key",
            "aws_secret_access_key": "secret",
            "aws_session_token": "token",
            "key": "key",
            "secret": "secret",
            "token": "token",
            "endpoint_url": "endpoint_url",
            "region": "region",
            "anon": "anon",
        },
        "s3://",
    )
    region = values.pop("region", None)
    timeouts = {"connect_timeout": idle_timeout_s, "read_timeout": idle_timeout_s}
    return {
        **values,
        "client_kwargs": {"region_name": region} if region else {},
        "config_kwargs": {**timeouts, "retries": {"total_max_attempts": 1}},
    }


def _gs_options(secret: Mapping[str, str], _: float) -> dict[str, Any]:
    values = _values(secret, {"service_account": "token", "endpoint_url": "endpoint_url", "anon": "anon"}, "gs://")
    if values.pop("anon", False):
        values["token"] = "anon"
    elif "token" in values:
        try:
            values["token"] = json.loads(values["token"])
        except ValueError:
            raise refused(["the secret's service_account is not the JSON of a service account's key"]) from None
    return {**values, "access": "read_only"}


def _az_options(secret: Mapping[str, str], _: float) -> dict[str, Any]:
    names = ("account_name", "account_key", "sas_token", "connection_string", "tenant_id", "client_id", "client_secret")
    return _values(secret, {**{name: name for name in names}, "anon": "anon"}, "az://")


def _values(secret: Mapping[str, str], known: Mapping[str, str], scheme: str) -> dict[str, Any]:
    """``secret`` under the names of the library's arguments."""
    values: dict[str, Any] = {key.lower(): value for key, value in secret.items()}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise refused([f"the secret has {', '.join(map(repr, unknown))}; {scheme} takes {', '.join(known)}"])
    if "anon" in values:
        values["anon"] = values["anon"].lower() in ("1", "true", "yes")
    return {known[key]: value for key, value in values.items()}


_OPTIONS = {"s3": _s3_options, "gs": _gs_options, "az": _az_options}
