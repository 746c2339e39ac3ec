"""What validation needs to know of a base model: names and shapes, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from adapter_router.types import Activation, TaskKind

Shape = tuple[int, ...]


TargetKind = Literal["linear", "embedding", "conv", "attention"]


@dataclass(frozen=True)
class TargetSpec:
    """A module that adapters can act on.

    ``in_features``, ``out_features``: of a linear layer ``y = x W^T``, whatever its storage; vocabulary and features of
    an embedding; channels of a convolution; of an ``nn.MultiheadAttention`` the embedding and three times it.
    ``kernel``, ``groups``: of a convolution.
    ``transposed``: the weight is stored as (in, out), as in transformers' ``Conv1D``.
    """

    kind: TargetKind
    in_features: int
    out_features: int
    has_bias: bool = False
    kernel: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False


@dataclass(frozen=True)
class BaseSpec:
    """Shapes of one base model under one task's head.

    ``labels``, ``activation``: of the base's own head; no labels for a task that has none.
    ``backbone``: path of the part that all tasks share ("" where the model is nothing else), ``backbone_name``: what
    models with a head call it.
    ``heads``: children of the model that answer with labels or spans; none where the answer is tokens or a vector.
    ``modules``: paths of all modules; ``called``: those that a forward pass calls, and so can be changed at all.
    ``targets``: modules that methods can act on; ``shiftable``: modules whose output ends in adding their bias.
    ``parameters``: shapes by name. ``label_axes``: parameters whose shape follows the number of labels -> the axis
    that does. ``untrained``: parameters the checkpoint lacks; transformers fills them with random numbers, so an
    adapter must bring its own.
    ``transposed_experts``: modules whose expert weights are stored as (experts, in, out).
    ``embedding``: the input embedding's path; ``tied``: other modules that share its weight.
    """

    task: TaskKind
    model_type: str
    labels: tuple[str, ...]
    activation: Activation
    backbone: str
    backbone_name: str
    heads: frozenset[str]
    modules: frozenset[str]
    called: frozenset[str]
    targets: Mapping[str, TargetSpec]
    shiftable: frozenset[str]
    parameters: Mapping[str, Shape]
    label_axes: Mapping[str, int]
    untrained: frozenset[str]
    transposed_experts: frozenset[str]
    embedding: str | None
    tied: tuple[str, ...]
    fingerprint: str

    @property
    def num_labels(self) -> int:
        """Labels of the base's own head."""
        return len(self.labels)

    def is_head(self, path: str) -> bool:
        """Whether the module ``path`` is part of the task's head: in ``heads``, or the pooler.

        A pooler's output goes nowhere but into a head, with which it is trained.
        """
        top, *inside = path.split(".")
        return top in self.heads or (bool(self.heads) and "pooler" in inside)

    def parameters_of(self, path: str) -> dict[str, Shape]:
        """Shapes of a module's parameters by their full names."""
        return {name: shape for name, shape in self.parameters.items() if name.startswith(path + ".")}

    def shape_with_labels(self, parameter: str, num_labels: int) -> Shape:
        """Shape of ``parameter`` in a model of ``num_labels`` labels."""
        shape = list(self.parameters[parameter])
        if parameter in self.label_axes:
            shape[self.label_axes[parameter]] = num_labels
        return tuple(shape)
