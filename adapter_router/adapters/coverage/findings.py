"""What all checks of one adapter share: what they compare, and where their findings gather."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from adapter_router.adapters.adapter_config import AdapterConfig
from adapter_router.adapters.base_spec import BaseSpec, Shape
from adapter_router.adapters.naming import Naming
from adapter_router.adapters.tuners.tuner import Tuner

Roles = dict[str, torch.Tensor]
_SPELLED_OUT = 16


class Findings:
    """One adapter's configuration and method, the base, and how the file spells it."""

    def __init__(
        self, config: AdapterConfig, method: Tuner, base: BaseSpec, naming: Naming, problems: list[str]
    ) -> None:
        self.config = config
        self.method = method
        self.base = base
        self.naming = naming
        self.problems = problems
        self.warnings: list[str] = []
        self._misshapes: list[str] = []

    def parameter(self, name: str) -> str | None:
        """The base's name of the parameter that the file calls ``name``."""
        owner, _, leaf = name.rpartition(".")
        path = self.naming.actual(owner) if owner else ""
        full = f"{path}.{leaf}" if path else leaf
        return full if path is not None and full in self.base.parameters else None

    def misshaped(self, name: str, actual: Shape, expected: Shape) -> None:
        """Note a tensor of the wrong shape."""
        self._misshapes.append(f"{name} has shape {list(actual)}, this base and config need {list(expected)}")

    def report_misshaped(self) -> None:
        """Make problems of the wrong shapes; of a whole adapter of another width a few will do."""
        self.problems += self._misshapes[:_SPELLED_OUT]
        if len(self._misshapes) > _SPELLED_OUT:
            self.problems.append(f"{len(self._misshapes) - _SPELLED_OUT} more tensors have other shapes than needed")


def tails(path: str) -> Iterator[str]:
    """``path`` and what follows each of its dots: the names that ``target_parameters`` and their like match."""
    while True:
        yield path
        _, dot, path = path.partition(".")
        if not dot:
            return
