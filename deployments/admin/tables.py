"""What the server answers, as tables. Every text in them is somebody else's, so none of it is markup."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_PHASE_STYLES = {"Ready": "green", "Failed": "red", "Retired": "dim"}
_WIDE = 200  # of what no terminal shows: nobody folds lines there
_DIGEST_SHOWN = len("sha256:") + 12


class Screen:
    """Answers on standard output, as JSON for scripts or as tables; everything else on standard error."""

    def __init__(self, *, as_json: bool) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # names of adapters and places need not be of its characters
                stream.reconfigure(errors="backslashreplace")
        self.as_json = as_json
        self.talk = _console(stderr=True)
        self._answers = _console(stderr=False)

    def show(self, document: object, *shown: RenderableType) -> None:
        """``document`` for scripts, ``shown`` for people."""
        if self.as_json:
            self._answers.out(json.dumps(document, indent=2), highlight=False)
            return
        for part in shown:
            self._answers.print(_text(part) if isinstance(part, str) else part, highlight=False)

    @property
    def is_quiet(self) -> bool:
        """Whether nobody would see a bar move."""
        return self.as_json or not self.talk.is_terminal

    def say(self, line: str, style: str = "") -> None:
        """One remark for people."""
        text = _text(line)
        text.stylize(style)
        self.talk.print(text, highlight=False, soft_wrap=True)

    def complain(self, message: str, problems: Sequence[str] = ()) -> None:
        """What went wrong, and every reason that ``message`` does not list itself."""
        self.say(message, "red")
        for problem in problems:
            if problem not in message:
                self.say(f"  - {problem}", "red")


def adapters(entries: Iterable[Mapping[str, Any]]) -> Table:
    """A line for each registration."""
    table = _table("adapter", "phase", "means", "task", "base", "", "why")
    for entry in entries:
        target = entry["targets"][0] if entry["targets"] else {}
        table.add_row(
            _text(entry["name"]),
            Text(entry["phase"], _PHASE_STYLES.get(entry["phase"], "yellow")),
            _text(meaning(entry["targets"], entry["name"])),
            _text(target.get("task", entry["task"])),
            _text(target.get("base", entry["base"])),
            _text(" ".join(flag for flag in ("pinned", "preload", "lazy", "managed") if entry[flag])),
            _text(_reason(entry["error"])),
        )
    return table


def adapter(entry: Mapping[str, Any]) -> Table:
    """One registration, field by field."""
    table = Table.grid(padding=(0, 2))
    told = {**entry, "targets": meaning(entry["targets"], entry["name"])}
    for key, value in told.items():
        if value in (None, "", [], 0):
            continue
        shown = _moment(value) if key in ("created", "updated", "retry_at") else _spelled(value)
        table.add_row(Text(key, "bold"), _text(shown))
    return table


def versions(entries: Iterable[Mapping[str, Any]]) -> Table:
    """A line for each version of an adapter."""
    table = _table("version", "content", "share", "task", "labels", "base", "bytes", "since", "")
    for entry in entries:
        table.add_row(
            _text(f"v{entry['number']}"),
            _text(entry["version"][:_DIGEST_SHOWN]),
            _text(f"{entry['share']:.0%}" if entry["share"] else ""),
            _text(entry["task"]),
            _text(entry["num_labels"]),
            _text(entry["base"]),
            _text(f"{entry['num_bytes']:,}"),
            _text(_moment(entry["created"])),
            _text("retired" if entry["retired"] else ""),
        )
    return table


def aliases(entries: Iterable[Mapping[str, Any]]) -> Table:
    """A line for each alias."""
    table = _table("alias", "means", "revision", "since")
    for entry in entries:
        table.add_row(
            _text(entry["name"]),
            _text(meaning(entry["targets"], entry["name"])),
            _text(entry["revision"]),
            _text(_moment(entry["updated"])),
        )
    return table


def residency(entries: Iterable[Mapping[str, Any]]) -> Table:
    """A line for each adapter in each replica's memory."""
    table = _table("replica", "base", "tier", "adapter", "content", "bytes", "pinned", "leases", "idle")
    for entry in entries:
        table.add_row(
            _text(entry["replica"]),
            _text(entry["base"]),
            _text(entry["tier"]),
            _text(", ".join(entry["versions"]) or "(a mix, or removed)"),
            _text(entry["version"][:_DIGEST_SHOWN]),
            _text(f"{entry['num_bytes']:,}"),
            _text("yes" if entry["pinned"] else ""),
            _text(entry["leases"] or ""),
            _text(f"{entry['idle_s']:.0f} s"),
        )
    return table


def events(entries: Iterable[Mapping[str, Any]]) -> Table:
    """A line for each event."""
    table = _table("revision", "at", "name", "what", "detail")
    for entry in entries:
        table.add_row(
            _text(entry["revision"]),
            _text(_moment(entry["at"])),
            _text(entry["name"]),
            _text(entry["kind"]),
            _text(", ".join(f"{key} {_spelled(value)}" for key, value in entry["detail"].items())),
        )
    return table


def capacity(entry: Mapping[str, Any]) -> Table:
    """One base: a line for each of its replicas."""
    table = _table("replica", "device", "used", "pinned", "host", "used", "adapters that fit")
    table.title, table.title_justify, table.title_style = f"{entry['base']}: {entry['summary']}", "left", "bold"
    for replica in entry["replicas"]:
        sizes = ("device_bytes", "device_used", "pinned_bytes", "host_bytes", "host_used", "fits")
        table.add_row(_text(replica["replica"]), *(_text(f"{replica[size]:,}") for size in sizes))
    return table


def differences(entries: Iterable[Mapping[str, Any]]) -> Table:
    """A line for each difference between a manifest and the catalog."""
    table = _table("adapter", "difference", "detail")
    for entry in entries:
        changes = ", ".join(
            f"{field}: {_spelled(change['registered'])} -> {_spelled(change['declared'])}"
            for field, change in entry["fields"].items()
        )
        table.add_row(_text(entry["name"]), _text(entry["kind"]), _text(entry["reason"] or changes))
    return table


def meaning(targets: Sequence[Mapping[str, Any]], name: str) -> str:
    """What a name means: ``v2``, ``90% v1, 10% v2``; versions of other adapters with theirs."""
    total = sum(target["weight"] for target in targets)
    spelled = [
        f"v{target['number']}" if target["adapter"] == name else f"{target['adapter']}@v{target['number']}"
        for target in targets
    ]
    if len(targets) == 1:
        return spelled[0]
    shares = (f"{100 * target['weight'] / total:.3g}%" for target in targets)
    return ", ".join(f"{share} {version}" for share, version in zip(shares, spelled, strict=True))


def _reason(error: Mapping[str, Any] | None) -> str:
    """The first of the reasons: there may be many in a list of many."""
    problems = error["problems"] or [error["message"]] if error else [""]
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _console(*, stderr: bool) -> Console:
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if is_terminal else _WIDE)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _text(value: object) -> Text:
    """What a terminal may be sent: nothing in it moves the cursor."""
    text = "" if value is None else str(value)
    printable = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return Text(printable, overflow="fold")


def _spelled(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_spelled(entry)}" for key, entry in value.items())
    return str(value)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
