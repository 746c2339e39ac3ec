"""What each verb of ``adapter-router adapters`` asks of the server, and shows. All return the exit status."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_router.catalog.addressing import address_of
from deployments.admin import tables
from deployments.admin.client import Refused, Server, adapter_path, alias_path
from deployments.admin.following import follow, revision
from deployments.admin.tables import Screen


def add(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """Register one adapter; unless told otherwise, wait until it is Ready or Failed."""
    since = revision(server)
    body = {"name": args.name, "uri": location(args.uri), "replace": args.replace, **declared(args)}
    registration = server.ask("POST", "/v1/adapters", {key: value for key, value in body.items() if value is not None})
    if args.no_wait or args.lazy:
        screen.show(registration, tables.adapters([registration]))
        return 0
    return report(follow(server, {args.name: registration}, since, screen)[args.name], screen)


def report(outcome: Mapping[str, Any] | Refused, screen: Screen) -> int:
    """What became of one registration."""
    if isinstance(outcome, Refused):
        raise outcome
    if (error := outcome["error"]) is None:
        screen.show(outcome, tables.adapters([outcome]))
        return 0
    screen.show(outcome)
    screen.complain(f"{outcome['name']} failed: {error['message']}", error["problems"])
    if outcome["retry_at"]:
        screen.say(f"it is tried again in {max(0.0, outcome['retry_at'] - time.time()):.0f} s")
    return 1


def list_(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """Adapters, or what replicas hold of them."""
    query = {"after": args.after, "phase": args.phase, "view": "residency" if args.residency else None}
    shown = tables.residency if args.residency else tables.adapters
    if args.all:
        entries = list(server.pages("/v1/adapters", **query))
        screen.show({"data": entries}, shown(entries))
        return 0
    page = server.ask("GET", "/v1/adapters", query={**query, "limit": args.limit})
    screen.show(page, shown(page["data"]))
    if page["has_more"]:
        screen.say(f"there are more: --after {page['last_id']}, or --all")
    return 0


def show(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """One adapter and its versions."""
    adapter = server.ask("GET", adapter_path(args.name))
    versions = server.ask("GET", adapter_path(args.name, "versions"))["data"]
    screen.show({**adapter, "versions": versions}, tables.adapter(adapter), "", tables.versions(versions))
    return 0


def alias(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """Show one alias or all of them, or change what one means."""
    if args.delete:
        return _forget(server, screen, args)
    if args.name is None:
        entries = list(server.pages("/v1/aliases"))
        screen.show({"data": entries}, tables.aliases(entries))
        return 0
    if len(dict(args.weights)) < len(args.weights):
        screen.complain("a version stands twice among the weights")
        return 2
    if args.weights:
        headers = None if args.if_revision is None else {"If-Match": f'"{args.if_revision}"'}
        answer = server.ask("PUT", alias_path(args.name), dict(args.weights), headers=headers)
    else:
        answer = server.ask("GET", alias_path(args.name))
    screen.show(answer, tables.aliases([answer]))
    return 0


def _forget(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    if args.name is None or args.weights or args.if_revision is not None:
        screen.complain("--delete takes a name, and nothing else")
        return 2
    answer = server.ask("DELETE", alias_path(args.name))
    screen.show(answer, f"{args.name} is no alias any more")
    return 0


def rollback(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """Undo an alias' last change."""
    answer = server.ask("POST", alias_path(args.name, "rollback"))
    screen.show(answer, tables.aliases([answer]))
    return 0


def warm(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """Load an adapter on all replicas."""
    answer = server.ask("POST", adapter_path(args.name, "warm"))
    screen.show(answer, *(f"{load['version']} is on {load['replica']}" for load in answer["data"]))
    return 0


def pin(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """Keep an adapter on all devices, or no longer."""
    answer = server.ask("DELETE" if args.verb == "unpin" else "PUT", adapter_path(args.name, "pin"))
    screen.show(answer, tables.adapters([answer]))
    return 0


def remove(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """Remove an adapter with all its versions, or retire one version."""
    address = address_of(args.name)
    if address is None or address.number is None:
        answer = server.ask("DELETE", adapter_path(args.name))
        screen.show(answer, f"{args.name} is removed")
    else:
        answer = server.ask("DELETE", adapter_path(address.adapter, "versions", str(address.number)))
        screen.show(answer, f"{args.name} is retired")
    return 0


def retry(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """Fetch and check an adapter anew."""
    since = revision(server)
    answer = server.ask("POST", adapter_path(args.name, "retry"), {})
    if args.no_wait:
        screen.show(answer, tables.adapters([answer]))
        return 0
    return report(follow(server, {args.name: answer}, since, screen)[args.name], screen)


def refresh(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """Look at an adapter's source again."""
    answer = server.ask("POST", adapter_path(args.name, "versions"), {"activate": not args.no_activate})
    found = "is a new version" if answer["new"] else "was known"
    screen.show(answer, f"what lies at the source {found}:", tables.versions([answer]))
    return 0


def events(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """What happened to one adapter, or to all."""
    path = "/v1/events" if args.name is None else adapter_path(args.name, "events")
    after = args.after
    if after is None:
        after = max(0, revision(server) - args.limit) if args.name is None else 0
    page = server.ask("GET", path, query={"after": after, "limit": args.limit})
    screen.show(page, tables.events(page["data"]))
    if page["has_more"]:
        screen.say(f"there are more: --after {page['last_id']}")
    return 0


def reconcile(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """Bring the server in line with a manifest, or say how it differs."""
    if args.manifest is None:
        method, body = ("GET" if args.dry_run else "POST"), None
    else:
        method = "POST"
        body = sys.stdin.buffer.read() if args.manifest == "-" else Path(args.manifest).read_bytes()
    query = {"dry_run": "true"} if args.dry_run and method == "POST" else None
    answer = server.ask(method, "/v1/manifest", body, query=query, headers={"Content-Type": "application/yaml"})
    differences = answer["data"]
    what = "differs" if args.dry_run else "was brought about"
    screen.show(answer, *([f"this {what}:", tables.differences(differences)] if differences else ["nothing differs"]))
    conflicts = sum(difference["kind"] == "conflict" for difference in differences)
    if conflicts and not args.dry_run:
        screen.complain(f"{conflicts} of these could not be brought about: a conflict leaves everything as it was")
        return 1
    return 0


def capacity(server: Server, screen: Screen, args: argparse.Namespace) -> int:  # noqa: ARG001
    """How much of the replicas' memory is taken, and how many adapters fit."""
    answer = server.ask("GET", "/v1/capacity")
    screen.show(answer, *(tables.capacity(base) for base in answer["data"]))
    return 0


def declared(args: argparse.Namespace) -> dict[str, Any]:
    """What is said about an adapter besides its name and place."""
    return {
        "base": args.base,
        "task": args.task,
        "labels": args.labels,
        "revision": getattr(args, "revision", None),
        "sha256": getattr(args, "sha256", None),
        "secretRef": args.secret_ref,
        "pinned": args.pinned,
        "preload": args.preload,
        "lazy": args.lazy,
    }


def location(uri: str) -> str:
    """A relative path means one below the directory in which the command runs, not the server's."""
    return uri if "://" in uri or uri.startswith("package:") else str(Path(uri).expanduser().absolute())
