"""What validation needs to know of a base model: names and shapes, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapter_router.types import Activation

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LinearSpec:
    """A module LoRA can target: ``y = x W^T`` with ``W`` of (out_features, in_features)."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class BaseSpec:
    """Shapes of one base model under one task's head.

    ``labels``, ``activation``: of the base's own head.
    ``label_axes``: parameters whose shape follows the number of labels -> the axis that does.
    ``untrained``: parameters the checkpoint lacks; transformers fills them with random numbers, so an adapter
    must bring its own.
    ``rowwise``: modules that map rows to rows, and so can differ from row to row.
    """

    model_type: str
    labels: tuple[str, ...]
    activation: Activation
    linears: Mapping[str, LinearSpec]
    parameters: Mapping[str, Shape]
    label_axes: Mapping[str, int]
    untrained: frozenset[str]
    rowwise: frozenset[str]

    @property
    def num_labels(self) -> int:
        """Labels of the base's own head."""
        return len(self.labels)

    def parameters_of(self, path: str) -> dict[str, Shape]:
        """Shapes of a module's parameters by their full names."""
        return {name: shape for name, shape in self.parameters.items() if name.startswith(path + ".")}

    def module_paths(self) -> set[str]:
        """Dotted paths of all modules that hold parameters, inner ones included."""
        paths: set[str] = set()
        for name in self.parameters:
            parts = name.split(".")
            paths.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
        return paths

    def shape_with_labels(self, parameter: str, num_labels: int) -> Shape:
        """Shape of ``parameter`` in a model of ``num_labels`` labels."""
        shape = list(self.parameters[parameter])
        if parameter in self.label_axes:
            shape[self.label_axes[parameter]] = num_labels
        return tuple(shape)
