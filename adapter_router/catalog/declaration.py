"""The declarative manifest: a YAML list of adapters, or a mapping whose ``adapters`` is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapter_router.catalog.addressing import name_problem
from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.differences import Difference
from adapter_router.catalog.records import AdapterSpec
from adapter_router.errors import InvalidRequest
from adapter_router.types import Source, TaskKind

__all__ = ["Difference", "apply", "drift", "parse"]

_Text = Annotated[str, Field(min_length=1, max_length=2000)]
_SHA256 = r"^(sha256:)?[0-9a-f]{64}$"


class _Entry(BaseModel):
    """One adapter of the manifest."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    uri: _Text
    base: _Text | None = None
    task: TaskKind | None = None
    labels: list[_Text] | None = None
    pinned: bool = False
    preload: bool = False
    lazy: bool = False
    secret_ref: _Text | None = Field(None, alias="secretRef")
    revision: _Text | None = None
    sha256: Annotated[str, Field(pattern=_SHA256)] | None = None

    def spec(self) -> AdapterSpec:
        """As the catalog knows it."""
        source = Source(self.uri, self.revision, self.sha256, self.secret_ref)
        labels = None if self.labels is None else tuple(self.labels)
        return AdapterSpec(self.name, source, self.base, self.task, labels, self.pinned, self.preload, self.lazy)


def parse(text: str) -> list[AdapterSpec]:
    """The adapters that ``text`` declares. Raises InvalidRequest with every problem of every entry."""
    problems: list[str] = []
    specs: dict[str, AdapterSpec] = {}
    for number, entry in enumerate(_entries(text)):
        named = entry.get("name") if isinstance(entry, dict) else None
        shown = f"adapters[{number}]" + (f" ({named!r:.80})" if isinstance(named, str) else "")
        try:
            spec = _Entry.model_validate(entry).spec()
        except ValidationError as error:
            problems += [f"{shown}: {problem}" for problem in _worded(error)]
            continue
        if problem := name_problem(spec.name):
            problems.append(f"{shown}: {problem}")
        elif spec.name in specs:
            problems.append(f"{shown}: the name is declared twice")
        specs[spec.name] = spec
    if problems:
        raise InvalidRequest("the manifest is refused: " + "; ".join(problems), "adapters", problems)
    return list(specs.values())


def drift(declared: Sequence[AdapterSpec], catalog: Catalog) -> list[Difference]:
    """How ``catalog`` differs from what is declared. Raises InvalidRequest when a name is declared twice."""
    return catalog.drift(declared)


def apply(declared: Sequence[AdapterSpec], catalog: Catalog) -> list[Difference]:
    """Bring ``catalog`` in line with what is declared; returns what was done, and what cannot be: the conflicts."""
    return catalog.reconcile(declared)


class _Loader(yaml.SafeLoader):
    """YAML's plain types; a key that stands twice in a mapping is an error, not the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, times in keys.items() if times > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(sorted(twice))} stands twice in one mapping", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _entries(text: str) -> list[Any]:
    try:
        document = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        said = " ".join(str(error).split()) if not isinstance(error, RecursionError) else "it is nested too deeply"
        raise InvalidRequest(f"the manifest is no YAML: {said}", "adapters") from error
    if isinstance(document, dict):
        if unknown := [key for key in document if key != "adapters"]:
            raise InvalidRequest(f"the manifest has unknown keys: {', '.join(map(repr, unknown))}", "adapters")
        document = document.get("adapters")
    if not isinstance(document, list):
        raise InvalidRequest("the manifest must be a list of adapters; [] declares that there are none", "adapters")
    return document


def _worded(error: ValidationError) -> list[str]:
    problems = []
    for each in error.errors(include_url=False):
        path = ".".join(map(str, each["loc"])) or "entry"
        if each["type"] == "missing":  # its input would be all the rest
            problems.append(f"{path} is missing")
            continue
        advice = (
            "; put quotes around it"
            if each["type"] == "string_type" and not isinstance(each["input"], list | dict)
            else ""
        )
        problems.append(f"{path} is {each['input']!r:.80}: {each['msg']}{advice}")
    return problems
