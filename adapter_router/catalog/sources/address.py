"""What a URI says, part by part, and every reason why it says nothing we can use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from adapter_router.errors import AdapterRejected
from adapter_router.types import Source

_WEB = ("https", "http")
_KNOWN = "a path, package:, file://, hf://, s3://, gs://, az://, https:// or http://"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_HOST = re.compile(r"([a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.|$))+|\[[0-9a-f:.]+\]")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_SHA256 = re.compile(r"(sha256:)?[0-9a-f]{64}")
_EMPTY_PART = "it has an empty part (//)"
# What stands before the host; a password with a slash in it goes to the last @, as no port looks like that.
_LOGIN = re.compile(r"\A([^/]*@|(?!\[)[^/:]*:(?![0-9]*(/|\Z)).*@)", re.DOTALL)
_SUB_DELIMITERS = "!$&'()*+,;=:@~"


@dataclass(frozen=True)
class Address:
    """Where an adapter lies; no credentials. ``segments`` are decoded; a path is not looked at yet.

    ``authority``: host and port, or bucket; the package's name; empty for paths and ``hf``, whose first two segments
    are the repository.
    """

    scheme: str
    authority: str
    segments: tuple[str, ...]
    revision: str | None = None

    def __str__(self) -> str:
        path = "/".join(self.segments)
        if self.scheme == "file":
            return path
        if self.scheme == "package":
            return f"package:{self.authority}/{path}"
        if self.scheme == "hf":
            repository, rest = "/".join(self.segments[:2]), "".join(f"/{part}" for part in self.segments[2:])
            return f"hf://{repository}{f'@{self.revision}' if self.revision else ''}{rest}"
        return self.url() if self.scheme in _WEB else f"{self.scheme}://{self.authority}/{path}"

    def url(self, name: str = "") -> str:
        """Of the file ``name`` below it, percent-encoded."""
        parts = [quote(part, safe=_SUB_DELIMITERS) for part in (*self.segments, *name.split("/")) if part]
        return f"{self.scheme}://{self.authority}/" + "/".join(parts)


def parse(source: Source) -> Address:
    """Raises AdapterRejected with every problem of ``source``."""
    address, problems = parse_uri(source.uri)
    if source.sha256 is not None and not _SHA256.fullmatch(source.sha256):
        problems.append(
            f"sha256 {source.sha256!r:.100} is neither an adapter's digest (sha256: and 64 hexadecimal digits) nor the "
            "64 of adapter_model.safetensors"
        )
    if source.revision is not None:
        problems += _revision_problems(source, address)
    if problems:
        raise AdapterRejected.because(problems)
    assert address is not None
    if source.revision is not None:
        return Address(address.scheme, address.authority, address.segments, source.revision)
    return address


def parse_uri(uri: str) -> tuple[Address | None, list[str]]:
    """What ``uri`` says, and what is wrong with it; None where nothing can be made of it."""
    if not uri:
        return None, ["the address is empty"]
    shown = redacted(uri)
    if "\0" in uri:
        return None, [f"{shown} is not a directory: it has a NUL in it"]
    match = _SCHEME.match(uri)
    scheme, slashes = (match.group(1).lower(), match.group(2)) if match else ("", None)
    rest = uri[match.end() :] if match else uri
    if scheme == "package" and not slashes:
        name, _, folder = rest.partition("/")
        return Address("package", name, tuple(filter(None, folder.split("/")))), []
    if not slashes and scheme not in _PARSERS:
        return Address("file", "", (uri,)), []  # a file's name may have a colon
    if scheme not in _PARSERS or not slashes:
        return None, [f"{shown}: {scheme!r:.40} is no kind of address we know; use {_KNOWN}"]
    problems: list[str] = []
    address = _PARSERS[scheme](scheme, rest, problems)
    return address, [f"{shown}: {problem}" for problem in problems]


def parse_redirect(url: str) -> tuple[Address | None, list[str]]:
    """Where a server sends us: as ``parse_uri``, but a query is its own business, and so are empty parts."""
    bare = re.sub(r"[?#].*", "", url, flags=re.DOTALL)
    scheme, _, rest = bare.partition("://")
    if scheme.lower() not in _WEB:
        return None, [f"{redacted(url)}, which is neither https:// nor http://"]
    problems: list[str] = []
    address = _web(scheme.lower(), rest, problems)
    return address, [f"{redacted(url)}: {problem}" for problem in problems if problem != _EMPTY_PART]


def redacted(text: str) -> str:
    """``text`` with what may be a credential in an address replaced: before an ``@``, and all after a ``?``.

    Also where it is no address, for a slash too few or one in a password.
    """
    match = re.match(r"[^:/?#@]*:[/\\]*", text)
    if match is None:
        return f"{text:.500}"
    rest = re.sub(r"[?#].*", "?***", text[match.end() :], flags=re.DOTALL)
    return (match.group() + _LOGIN.sub("***@", rest))[:500]


def _revision_problems(source: Source, address: Address | None) -> list[str]:
    shown = redacted(source.uri)
    if address is not None and address.scheme != "hf":
        return [f"{shown}: only hf:// has revisions; use sha256 to insist on a version"]
    if not _is_revision(source.revision or ""):
        return [f"{shown}: revision {source.revision!r:.100} is no branch, tag or commit"]
    if address is not None and address.revision not in (None, source.revision):
        return [f"{shown}: revision is {source.revision!r:.100}, but the address says {address.revision!r:.100}"]
    return []


def _is_revision(text: str) -> bool:
    return bool(_REVISION.fullmatch(text)) and ".." not in text


def _file(scheme: str, rest: str, problems: list[str]) -> Address:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost"):
        problems.append(f"a file:// address has three slashes and no host; {host!r:.80} is none of ours to ask")
    if "?" in path or "#" in path:
        problems.append("? and # must be written %3F and %23")
    decoded = unquote(path, errors="replace")
    if not decoded.isprintable() or "\ufffd" in decoded:
        problems.append("it decodes to characters that no path should have")
    return Address(scheme, "", (slash + decoded,))


def _web(scheme: str, rest: str, problems: list[str]) -> Address:
    if "?" in rest or "#" in rest:
        problems.append(
            "an address must not have a query, which would be stored and shown; put it into a secret as "
            '{"query": …} and name that with secretRef'
        )
    bare = re.sub(r"[?#].*", "", rest, flags=re.DOTALL)
    authority, _, path = bare.partition("/")
    if "@" in authority:
        problems.append(
            'it has credentials in it, which would be stored and shown; put them into a secret as {"username": …, '
            '"password": …} or {"token": …} and name that with secretRef'
        )
    host = _host(scheme, authority.rpartition("@")[2])
    if host is None:
        problems.append("it names no host we can ask (letters, digits, dots and hyphens; punycode for others)")
    return Address(scheme, host or "", _segments(path, problems, encoded=True))


def _host(scheme: str, authority: str) -> str | None:
    """``authority`` in its one form, without a port that is the default; None when it is none."""
    try:
        parts = urlsplit(f"//{authority}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return None
    host = f"[{host}]" if ":" in host else host.removesuffix(".")
    if not _HOST.fullmatch(host) or not authority.isascii():
        return None
    return host if port in (None, 443 if scheme == "https" else 80) else f"{host}:{port}"


def _bucket(scheme: str, rest: str, problems: list[str]) -> Address:
    bucket, _, path = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        kind = "container" if scheme == "az" else "bucket"
        problems.append(f"it must be {scheme}://{kind}/path, and credentials belong into a secret named by secretRef")
    if "?" in path or "#" in path:
        problems.append("? and # are not allowed in it")
    return Address(scheme, bucket, _segments(path, problems, encoded=False))


def _hub(scheme: str, rest: str, problems: list[str]) -> Address:
    segments = _segments(rest.removeprefix("models/"), problems, encoded=False)
    if len(segments) < 2:
        problems.append("it must be hf://organisation/name, hf://organisation/name@revision or one with /folder after")
        return Address(scheme, "", segments)
    name, at, revision = segments[1].partition("@")
    revision = unquote(revision)
    if not (_HUB_NAME.fullmatch(segments[0]) and _HUB_NAME.fullmatch(name)):
        problems.append("organisation and name have letters, digits, dots, hyphens and underscores only")
    if at and not _is_revision(revision):
        problems.append(f"{revision!r:.100} is no branch, tag or commit")
    return Address(scheme, "", (segments[0], name, *segments[2:]), revision or None)


def _segments(path: str, problems: list[str], *, encoded: bool) -> tuple[str, ...]:
    raw = path.removesuffix("/").split("/") if path.strip("/") else []
    segments = tuple(unquote(part, errors="replace") if encoded else part for part in raw)
    if any(not part for part in segments):
        problems.append(_EMPTY_PART)
    # What is encoded twice would be decoded by servers behind others.
    if any(_deeply_decoded(part) in (".", "..") for part in segments):
        problems.append("it has . or .. for a part; write the way without them")
    if any({"/", "\\"} & set(_deeply_decoded(part)) for part in (segments if encoded else ())):
        problems.append("it has an encoded slash or a backslash in it")
    if any(not part.isprintable() or "\ufffd" in part for part in segments):
        problems.append("it has characters that cannot be printed")
    return segments


def _deeply_decoded(part: str) -> str:
    while (decoded := unquote(part)) != part:
        part = decoded
    return part


_PARSERS = {
    "file": _file,
    "hf": _hub,
    "s3": _bucket,
    "gs": _bucket,
    "az": _bucket,
    "https": _web,
    "http": _web,
}
