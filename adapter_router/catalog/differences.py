"""What is declared against what is registered: a pure comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from adapter_router.catalog.records import AdapterSpec, Registration
from adapter_router.errors import InvalidRequest

DifferenceKind = Literal["added", "changed", "adopted", "removed", "conflict"]

_FLAGS = ("pinned", "preload", "lazy")


@dataclass(frozen=True)
class Difference:
    """How one adapter differs from its declaration, and so what reconciling does.

    ``added``: declared, not registered. ``changed``: registered otherwise; ``fields``: name, registered and declared
    value. ``adopted``: somebody has registered the same source by hand; it is managed from now on. ``removed``: managed
    and no longer declared. ``conflict``: cannot be reconciled, for ``reason``; it stays as it is.
    """

    name: str
    kind: DifferenceKind
    fields: tuple[tuple[str, object, object], ...] = ()
    reason: str | None = None

    @property
    def is_content(self) -> bool:
        """Whether files must be fetched or checked again, not only flags be set."""
        return any(field not in _FLAGS for field, _, _ in self.fields)

    def __str__(self) -> str:
        changes = ", ".join(f"{field}: {old!r} -> {new!r}" for field, old, new in self.fields)
        return f"{self.name}: {self.kind}" + f" ({self.reason or changes})" * bool(self.reason or changes)


def compare(declared: AdapterSpec, found: Registration | None) -> Difference | None:
    """How ``found`` differs from ``declared``; None where it does not."""
    if found is None:
        return Difference(declared.name, "added")
    fields = tuple(
        (field, old, new)
        for (field, old), new in zip(_fields(found.spec).items(), _fields(declared).values(), strict=True)
        if old != new
    )
    if not found.managed and found.spec.source != declared.source:
        reason = f"it is registered by hand, from {found.spec.source.uri}; remove it, or declare that"
        return Difference(declared.name, "conflict", reason=reason)
    if not found.managed:
        return Difference(declared.name, "adopted", fields)
    return Difference(declared.name, "changed", fields) if fields else None


def check_unique(declared: Sequence[AdapterSpec]) -> None:
    """Raise InvalidRequest, with every name, when names are declared more than once."""
    counts = Counter(spec.name for spec in declared)
    problems = [f"{name!r} is declared {count} times" for name, count in counts.items() if count > 1]
    if problems:
        raise InvalidRequest("; ".join(problems), "adapters", problems)


def _fields(spec: AdapterSpec) -> dict[str, object]:
    source = spec.source
    return {
        "uri": source.uri,
        "revision": source.revision,
        "sha256": source.sha256,
        "secretRef": source.secret_ref,
        "base": spec.base,
        "task": spec.task,
        "labels": spec.labels,
        **{flag: getattr(spec, flag) for flag in _FLAGS},
    }
