"""Object stores, through fsspec: files in parts of some megabytes, which makes limits and resuming the same for all."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fsspec.asyn import AsyncFileSystem

from adapter_router.catalog.adapter_files import FILES, PICKLE, WEIGHTS
from adapter_router.catalog.sources.address import Address
from adapter_router.catalog.sources.options import options_of
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
_S3_TAG = re.compile(r'ETag=("[^"]*")')  # a weak one matches nothing
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
        options = options_of(address.scheme, secret, self._idle_timeout_s)
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
        self._scheme = address.scheme
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
                part = await self._ask(self._part(file, begin, end))
            except FileNotFoundError:
                raise Changed from None
            except Exception as error:
                raise _failure(error, file.name) from None
            if len(part) != end - begin:
                raise Failing(f"{file.name}: {len(part)} bytes came for {end - begin}")
            yield part

    def _part(self, file: RemoteFile, begin: int, end: int) -> Coroutine[Any, Any, bytes]:
        tag = _S3_TAG.match(file.tag)
        if self._scheme == "s3" and tag is not None:
            return _s3_part(self._file_system, self._path(file.name), tag.group(1), begin, end)
        return self._file_system._cat_file(self._path(file.name), start=begin, end=end)  # type: ignore[no-any-return]

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


async def _s3_part(file_system: AsyncFileSystem, path: str, tag: str, begin: int, end: int) -> bytes:
    """Of the object with this tag only.

    One that is overwritten and restored by deleting the newer version looks in the end as it did before, and what was
    read between the two would be mixed with it. s3fs has no word for that.
    """
    bucket, key, _ = file_system.split_path(path)
    wanted = {"Range": f"bytes={begin}-{end - 1}", "IfMatch": tag}
    answer = await file_system._call_s3("get_object", Bucket=bucket, Key=key, **wanted)
    try:
        part: bytes = await answer["Body"].read()
        return part
    finally:
        answer["Body"].close()


def _file_system(scheme: str, options: Mapping[str, Any]) -> AsyncFileSystem:
    package, name, extra = _CLASSES[scheme]
    try:
        kind = getattr(importlib.import_module(package), name)
    except ImportError:
        raise refused(
            [f"{scheme}:// needs the package {package}, which is not installed: pip install 'adapter-router[{extra}]'"]
        ) from None
    loop = asyncio.new_event_loop()
    threading.Thread(target=_serve, args=(loop,), name=f"{scheme} io", daemon=True).start()
    try:
        opened: AsyncFileSystem = kind(**options, loop=loop, use_listings_cache=False, skip_instance_cache=True)
    except Exception as error:
        loop.call_soon_threadsafe(loop.stop)
        raise refused([f"{scheme}:// cannot be opened with these credentials: {type(error).__name__}"]) from None
    if scheme == "s3":
        opened.retries = 1  # it is we who try again, and know when to stop
    return opened


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _stop(file_system: AsyncFileSystem) -> None:
    """End a file system's thread once those who still use it have had their time."""
    loop = file_system.loop
    loop.call_soon_threadsafe(lambda: loop.call_later(_LAST_USE_S, loop.stop))


def _failure(error: Exception, name: str) -> Exception:
    """What went wrong, without the library's own words, which may have addresses and keys in them."""
    status, code = _status(error)
    if status == 412:
        return Changed()
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
