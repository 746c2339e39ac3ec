"""Which addresses may be read: the operator's list of prefixes, compared part by part with where an address leads."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from pathlib import Path

from adapter_router.catalog.location import resolve
from adapter_router.catalog.sources.address import Address, parse_uri
from adapter_router.errors import AdapterRejected

_WITH_IPV4 = (IPv6Network("64:ff9b::/96"), IPv6Network("::/96"))  # NAT64, and what was before mapped addresses
LOCAL = ("file", "package")


class Policy:
    """An allow-list. Immutable."""

    def __init__(self, allowed: Sequence[str]) -> None:
        """Raises ValueError with every prefix that is none."""
        self._allowed = tuple(allowed)
        self._prefixes: list[tuple[str, ...]] = []
        problems: list[str] = []
        for prefix in allowed:
            scheme, bare, rest = prefix.partition("://")
            if (bare and not rest) or prefix == "package:":
                self._prefixes.append((prefix.removesuffix("://").removesuffix(":").lower(),))
                continue
            address, found = parse_uri(prefix)
            if scheme.lower() == "hf" and "/" not in rest.rstrip("/"):
                address, found = Address("hf", "", (rest.rstrip("/"),)), []  # an organisation
            if address is not None and address.revision is not None:
                found = [f"{prefix!r:.200}: a prefix has no revision"]
            problems += found
            if address is not None and not found:
                try:
                    self._prefixes.append(_parts(address, directory(address) if address.scheme in LOCAL else None))
                except (ValueError, OSError) as error:
                    problems.append(str(error))
        if problems:
            raise ValueError("SourceConfig: allowed: " + "; ".join(problems))

    def check(self, address: Address) -> Path | None:
        """Where ``address`` leads, links followed, if that is a directory of this machine.

        Raises AdapterRejected when no prefix allows it.
        """
        try:
            here = directory(address) if address.scheme in LOCAL else None
        except (ValueError, OSError) as error:
            raise AdapterRejected.because([str(error)]) from error
        parts = _parts(address, here)
        if not any(parts[: len(prefix)] == prefix for prefix in self._prefixes):
            real = f" leads to /{'/'.join(parts[1:])}, which" if address.scheme in LOCAL else ""
            raise AdapterRejected.because(
                [
                    f"{address}{real} is not below any prefix that adapters may be fetched from "
                    f"({', '.join(self._allowed) or 'none'}); let the operator add one to sources.allowed"
                ]
            )
        return here

    def check_ip(self, address: Address, ip: str) -> None:
        """Raises AdapterRejected unless ``address``, whose host is at ``ip``, is public or named by a prefix."""
        found = _innermost(ipaddress.ip_address(ip.partition("%")[0]))
        host = (address.scheme, address.authority)
        public = found.is_global and not found.is_multicast and not getattr(found, "is_site_local", False)
        if public or any(prefix[:2] == host for prefix in self._prefixes):
            return
        raise AdapterRejected.because(
            [
                f"{address} leads to {ip}, which is not a public address; if that is intended let the operator add "
                f"{address.scheme}://{address.authority}/ to sources.allowed"
            ]
        )


def directory(address: Address) -> Path:
    """Where a path or package leads, links followed. Raises ValueError, OSError."""
    if address.scheme == "package":
        home = Path(os.path.realpath(resolve(f"package:{address.authority}/")))
        path = Path(os.path.realpath(home.joinpath(*address.segments)))
        if not path.is_relative_to(home):
            raise ValueError(f"{address} leads out of its package")
        return path
    return Path(os.path.realpath(address.segments[0]))  # which links in a circle are no error to


def _innermost(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if isinstance(ip, IPv4Address):
        return ip
    if any(ip in network for network in _WITH_IPV4):
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1] or ip


def _parts(address: Address, here: Path | None) -> tuple[str, ...]:
    if here is not None:
        return (address.scheme, *here.parts[1:])
    authority = (address.authority,) if address.authority else ()
    return (address.scheme, *authority, *address.segments)
