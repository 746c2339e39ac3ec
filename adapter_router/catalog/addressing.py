"""How callers say which adapter, and which version of it: ``name``, ``name@v2``, ``name@sha256:…``, and mixes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from adapter_router.catalog.mixing import mixed, weight_problems
from adapter_router.errors import AdapterNotFound, AdapterRouterError, AdapterUnavailable, InvalidRequest
from adapter_router.types import AdapterVersion, Row

_LONGEST_NAME = 200
_NUMBER = re.compile(r"v([1-9][0-9]{0,8})", re.ASCII)
# Names may have slashes, as on a hub; what may follow a name in a URL is therefore the end of none.
_ACTION = re.compile(r"/(versions(/\d+)?|warm|pin|retry|events|rollback)\Z", re.ASCII)
_DOTS = re.compile(r"(\A|/)\.\.?(/|\Z)")
_DIGEST = re.compile(r"sha256:[0-9a-f]{12,64}", re.ASCII)  # the beginning of one is enough where it is clear

_Found = TypeVar("_Found")
Finding = Callable[[str | Mapping[str, float] | None, str | None, str | None], _Found]
"""What a row's ``adapter``, ``head`` and ``sticky_key`` mean."""


@dataclass(frozen=True)
class Address:
    """An adapter or alias (``number`` and ``digest`` None), or one version of an adapter."""

    adapter: str
    number: int | None = None
    digest: str | None = None

    @property
    def is_version(self) -> bool:
        """Whether one version is meant, whatever the name itself means."""
        return self.number is not None or self.digest is not None


def address_of(text: str) -> Address | None:
    """What ``text`` addresses; None for what can be no address."""
    name, at, version = text.partition("@")
    if name_problem(name):
        return None
    if not at:
        return Address(name)
    if number := _NUMBER.fullmatch(version):
        return Address(name, number=int(number[1]))
    return Address(name, digest=version) if _DIGEST.fullmatch(version) else None


def name_problem(name: str) -> str | None:
    """Why ``name`` cannot be an adapter's or an alias'; None when it can."""
    why = None
    if len(name) > _LONGEST_NAME:
        why = f"it has {len(name)} characters, at most {_LONGEST_NAME} are allowed"
    elif "@" in name:
        why = "what follows @ is a version"
    elif name != name.strip():
        why = "it has blanks around it"
    elif _DOTS.search(name):
        why = "in a URL, . and .. between slashes are no parts of a name"
    elif action := action_of(name):
        why = f"in a URL, {action} at the end says what to do with an adapter"
    elif name and name.isprintable():
        return None
    return f"{name!r:.{_LONGEST_NAME}} cannot name an adapter" + f": {why}" * (why is not None)


def action_of(path: str) -> str | None:
    """What the end of a URL's path asks for (``/versions/2``, ``/warm``…); None where all of it is a name."""
    found = _ACTION.search(path)
    return found[0] if found else None


def each_version(rows: Sequence[Row], find: Finding[_Found]) -> list[_Found]:
    """What every row's adapter means, each asked of ``find`` once.

    Rows without a sticky key draw their version each on their own where there are several, so of them only errors are
    remembered.
    """
    known: dict[tuple[object, str | None, str | None], _Found] = {}
    found = []
    for row in rows:
        adapter = id(row.adapter) if isinstance(row.adapter, Mapping) else row.adapter
        key = (adapter, row.head, row.sticky_key)
        meant = known[key] if key in known else find(row.adapter, row.head, row.sticky_key)
        if row.sticky_key is not None or isinstance(meant, AdapterRouterError):
            known[key] = meant
        found.append(meant)
    return found


def find_any(
    adapter: str | Mapping[str, float] | None,
    head: str | None,
    find_one: Callable[[str], AdapterVersion | AdapterRouterError],
) -> AdapterVersion | AdapterRouterError | None:
    """What a row's ``adapter`` and ``head`` mean: a version, None for the bare base, or the error to answer.

    ``find_one`` says it of one name; it is asked once for each name of a mix.
    """
    if isinstance(adapter, Mapping):
        return _find_mix(adapter, head, find_one)
    if head is not None:
        return InvalidRequest("head chooses among the adapters of a mix; this is none", "head")
    return None if adapter is None else find_one(adapter)


def not_found(name: str, hint: str = "") -> AdapterNotFound:
    """The error for a name that means nothing; ``hint`` ends the sentence."""
    return AdapterNotFound(f"no adapter is named {name!r:.200}{hint}", "model")


def _find_mix(
    weights: Mapping[str, float], head: str | None, find_one: Callable[[str], AdapterVersion | AdapterRouterError]
) -> AdapterVersion | AdapterRouterError:
    if problems := weight_problems(weights, head):
        return InvalidRequest("; ".join(problems), "model", problems)
    found = {name: find_one(name) for name in weights}
    errors = {name: each for name, each in found.items() if isinstance(each, AdapterRouterError)}
    if errors:
        return _together(errors)
    try:
        return mixed(weights, {name: v for name, v in found.items() if isinstance(v, AdapterVersion)}, head)
    except InvalidRequest as error:
        return error


def _together(errors: Mapping[str, AdapterRouterError]) -> AdapterRouterError:
    """One error for a mix of whose adapters several cannot be had: a later attempt helps only where it helps all."""
    first = next((error for error in errors.values() if not error.retryable), None)
    if len(errors) == 1 or first is None:
        first = next(iter(errors.values()))
    if len(errors) == 1:
        return first
    problems = [
        f"no adapter is named {name!r:.80}" if isinstance(error, AdapterNotFound) and error is not first else str(error)
        for name, error in errors.items()
    ]
    kind = AdapterUnavailable if first.retryable else type(first)
    return kind("; ".join(problems), "model", problems)
