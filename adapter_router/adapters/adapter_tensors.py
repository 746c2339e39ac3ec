"""What validation makes of an adapter's files: every tensor in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from adapter_router.adapters.coverage.experts import Expert
from adapter_router.adapters.coverage.findings import Roles
from adapter_router.adapters.tuners.tuner import Target, Tuner
from adapter_router.types import Activation, EmbeddingSettings, TaskKind


@dataclass(frozen=True)
class AdapterTensors:
    """A validated adapter on the host, tensors in the file's dtype, by the base's module paths.

    ``targets``: the method's tensors by role. ``experts``: by parameter. ``tokens``: row numbers and rows.
    ``biases``: new values. ``saved``: whole parameters of replaced modules by their names inside; ``replaced``: single
    parameters by module. ``copies``: what the file says base weights are. ``shared``: the method's own.
    ``invocation``: tokens that switch the adapter on (aLoRA); empty for one that is always on.
    ``base_fingerprint``: the base that its files demand, if they name one. ``has_own_head``: labels are its own.
    """

    method: Tuner
    task: TaskKind
    num_labels: int
    has_own_head: bool
    labels: tuple[str, ...]
    activation: Activation
    embedding: EmbeddingSettings
    invocation: tuple[int, ...]
    num_tensors: int
    warnings: tuple[str, ...]
    targets: dict[Target, Roles] = field(default_factory=dict)
    experts: dict[str, Expert] = field(default_factory=dict)
    tokens: dict[str, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    saved: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    replaced: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    copies: dict[str, torch.Tensor] = field(default_factory=dict)
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    base_fingerprint: str | None = None

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> AdapterTensors:
        """``change`` of every tensor."""

        def each(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: change(tensor) for name, tensor in tensors.items()}

        return replace(
            self,
            targets={target: each(roles) for target, roles in self.targets.items()},
            experts={name: replace(e, a=change(e.a), b=change(e.b)) for name, e in self.experts.items()},
            tokens={path: (ids, change(rows)) for path, (ids, rows) in self.tokens.items()},
            biases=each(self.biases),
            saved={path: each(tensors) for path, tensors in self.saved.items()},
            replaced={path: each(tensors) for path, tensors in self.replaced.items()},
            copies=each(self.copies),
            shared=each(self.shared),
        )
