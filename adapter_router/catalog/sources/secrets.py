"""Credentials by name, from the environment or mounted files. Their values are never shown, logged or stored."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from adapter_router.errors import AdapterRejected

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_VARIABLE = "ADAPTER_ROUTER_SECRET_"


class Secret(Mapping[str, str]):
    """Values by key; its text shows neither."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> str:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return "Secret(***)"


class Secrets:
    """Reads the secret anew each time, so that one that was replaced counts from then on."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    def __call__(self, name: str) -> Mapping[str, str]:
        """The variable ``ADAPTER_ROUTER_SECRET_<NAME>`` or the file ``name``, JSON objects of strings; or a directory.

        In a directory each file is a value, as Kubernetes mounts secrets. Raises AdapterRejected.
        """
        if not _NAME.fullmatch(name):
            raise _refused(f"secretRef {name!r:.100} is not a name (letters, digits, dots, hyphens, underscores)")
        variable = _VARIABLE + re.sub(r"[.-]", "_", name).upper()
        if variable in os.environ:
            return _parsed(os.environ[variable], f"the environment variable {variable}")
        if self._directory is None:
            raise _refused(f"secret {name!r} is not there: set {variable}, or sources.secrets_dir")
        path = self._directory / name
        try:
            if path.is_dir():
                return Secret({file.name: file.read_text().strip() for file in path.iterdir() if _is_value(file)})
            text = path.read_text()
        except FileNotFoundError:
            problem = f"secret {name!r} is not there: set {variable}, or make {path}"
        except (OSError, UnicodeDecodeError) as error:
            problem = f"secret {name!r} cannot be read from {path}: {type(error).__name__}"
        else:
            return _parsed(text, f"the file {path}")
        raise _refused(problem)  # here, where what could not be decoded is not its context


def _is_value(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def _parsed(text: str, place: str) -> Secret:
    try:
        values = json.loads(text)
    except ValueError:  # its text repeats what it could not read
        values = None
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise _refused(f"{place} is not a JSON object of strings")
    return Secret(values)


def _refused(problem: str) -> AdapterRejected:
    return AdapterRejected.because([problem])
