"""An adapter as what it changes at each module of the base: the one form that every PEFT method is brought to.

Nothing here touches the base: a method that edits base weights when it trains (PiSSA, biases, rotations) becomes a
difference to the pristine ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch


@dataclass(frozen=True)
class ModuleDelta:
    """What one adapter changes at one module ``f``, on the host::

        y = gain * (f(input_scale * x) + scaling * (x A^T) B^T + x D^T) + shift

    ``a`` (rank, in), ``b`` (out, rank); for a convolution the kernels of the two it becomes, for an embedding
    (rank, vocabulary) and (features, rank). ``dense`` D (out, in). ``gain``, ``shift`` (out,); ``input_scale`` (in,).
    ``active_shift`` is added only where an aLoRA adapter is active.
    ``token_rows`` (n, features) replace rows ``token_ids`` of an embedding; of an output layer they replace rows of its
    weight, which then has no bias (PEFT's rule). ``a2``, ``b2``: of an attention's output projection.
    ``uncertainty``: relative error of what was derived from the base's weights.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scaling: float = 1.0
    dense: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    active_shift: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    token_rows: torch.Tensor | None = None
    a2: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    uncertainty: float = 0.0

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are set, by field."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class ParameterDelta:
    """``W' = W + scaling * delta`` of one parameter that no layer type of ours computes with.

    ``a`` (experts, rank, in) and ``b`` (experts, out, rank) of a stack of experts, or (rank, in) and (out, rank);
    ``transposed``: the parameter is stored as (…, in, out).
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool = False

    def dense(self) -> torch.Tensor:
        """``scaling * B A`` in the parameter's own layout, float32."""
        delta = torch.matmul(self.b.float(), self.a.float()) * self.scaling
        return delta.transpose(-1, -2) if self.transposed else delta


@dataclass(frozen=True)
class AdapterDelta:
    """A whole adapter by module path.

    ``saved``: modules that the adapter replaces, by their parameters' names inside them.
    ``parameters``: changed parameters of modules of other kinds, by their names inside the module.
    """

    modules: Mapping[str, ModuleDelta] = field(default_factory=dict)
    saved: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    parameters: Mapping[str, Mapping[str, ParameterDelta]] = field(default_factory=dict)

    def device_bytes(self, head_dtype: torch.dtype) -> int:
        """Bytes on the device: changes are float32 there, saved modules of ``head_dtype``."""
        changes = sum(t.numel() for module in self.modules.values() for t in module.tensors().values())
        experts = sum(p.a.numel() + p.b.numel() for owner in self.parameters.values() for p in owner.values())
        heads = sum(t.numel() for module in self.saved.values() for t in module.values())
        return (changes + experts) * torch.float32.itemsize + heads * head_dtype.itemsize
