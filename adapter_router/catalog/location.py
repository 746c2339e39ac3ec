"""Where models and adapters lie: a path, or ``package:module/subdir`` for a folder inside an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PACKAGE = "package:"


def resolve(location: str) -> str:
    """``location`` as a path; anything but the ``package:`` form is returned as it is.

    The package is found without importing it. Raises ValueError when it is not installed.
    """
    if not location.startswith(_PACKAGE):
        return location
    name, _, subdirectory = location.removeprefix(_PACKAGE).partition("/")
    # Only a top-level name: looking for a.b would import a.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{location!r}: no package {name!r} is installed")
    return str(Path(next(iter(spec.submodule_search_locations))) / subdirectory)
