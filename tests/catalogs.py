"""What tests of the catalog put into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapter_router.catalog.records import AdapterSpec
from adapter_router.types import AdapterVersion, Source

BASE = "sha256:base"


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def spec(name: str, uri: str = "/adapters/x", **fields: Any) -> AdapterSpec:
    return AdapterSpec(name, Source(uri), **fields)


def version(adapter: str, number: int, **fields: Any) -> AdapterVersion:
    """A version whose content is ``number``."""
    values: dict[str, Any] = {"base": BASE, "num_bytes": 10, **fields}
    labels = values.pop("labels", ("no", "yes"))
    return AdapterVersion(adapter, digest(number), Path("/store"), "text-classification", labels, "softmax", **values)
