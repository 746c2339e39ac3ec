"""``import-dir``: every adapter directory below a folder, registered in one go."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.progress import track

from deployments.admin import tables
from deployments.admin.client import Refused, Server, adapter_path
from deployments.admin.following import follow, revision
from deployments.admin.tables import Screen
from deployments.admin.verbs import declared

_CONFIG = "adapter_config.json"
_EXISTS = "adapter_exists"


def import_dir(server: Server, screen: Screen, args: argparse.Namespace) -> int:
    """Exit status 0: all are Ready (or lazy, and registered); 1: some are not, every reason is said."""
    root = Path(args.directory).expanduser().absolute()
    found = {args.prefix + name: directory for name, directory in adapter_directories(root)}
    if not found:
        screen.complain(f"there is no adapter ({_CONFIG}) in {root} or below it")
        return 1
    since = revision(server)
    outcomes = {
        name: _register(server, name, found[name], args)
        for name in track(sorted(found), "registering", console=screen.talk, transient=True, disable=screen.is_quiet)
    }
    known = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, Refused)}
    if known and not args.lazy and not args.no_wait:
        outcomes.update(follow(server, known, since, screen))
    return _summarise(outcomes, screen)


def adapter_directories(root: Path) -> Iterator[tuple[str, Path]]:
    """Names and places of all adapter directories at and below ``root``; hidden folders and links are not entered.

    A name is the path below ``root``, with slashes; ``root`` itself is called by its own name.
    """
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if _CONFIG in files:
            directory = Path(folder)
            yield (root.name if directory == root else directory.relative_to(root).as_posix()), directory


def _register(server: Server, name: str, directory: Path, args: argparse.Namespace) -> dict[str, Any] | Refused:
    """One registration; one that is known already as the same is not an error."""
    body = {"name": name, "uri": str(directory), "replace": args.replace, **declared(args)}
    try:
        registered: dict[str, Any] = server.ask(
            "POST", "/v1/adapters", {key: value for key, value in body.items() if value is not None}
        )
    except Refused as error:
        if error.code != _EXISTS:
            return error
        there: dict[str, Any] = server.ask("GET", adapter_path(name))
        asked = {"uri": str(directory), **{key: value for key, value in declared(args).items() if value}}
        return there if all(there[key] == value for key, value in asked.items()) else error
    return registered


def _summarise(outcomes: Mapping[str, dict[str, Any] | Refused], screen: Screen) -> int:
    errors: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        error = outcome.document["error"] if isinstance(outcome, Refused) else outcome["error"]
        if error is not None:
            errors[name] = error
    entries = [outcome for outcome in outcomes.values() if not isinstance(outcome, Refused)]
    document = {"data": entries, "failed": errors}
    screen.show(document, tables.adapters(entries))
    for name, error in errors.items():
        screen.complain(f"{name}: {error['message']}", error.get("problems", ()))
    screen.say(f"{len(outcomes) - len(errors)} of {len(outcomes)} adapters registered, {len(errors)} failed")
    return 1 if errors else 0
