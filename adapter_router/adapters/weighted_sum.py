"""The exact weighted sum of several adapters' changes as the changes of one: ranks side by side, not multiplied out.

    y = f(x) + sum_i w_i * (y_i - f(x))

with ``y_i`` what adapter i alone makes of the module ``f``'s output (``ModuleDelta``). A gain ``g_i`` multiplies ``f``,
so the sum has the gain ``G = 1 + sum_i w_i (g_i - 1)`` and each part's own terms are divided by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adapter_router.adapters.base_spec import BaseSpec
from adapter_router.adapters.base_weights import BaseWeights
from adapter_router.adapters.convert import TOO_UNCERTAIN
from adapter_router.adapters.delta import AdapterDelta, ModuleDelta, ParameterDelta
from adapter_router.adapters.keys import listed
from adapter_router.errors import AdapterRejected

_LEAST_GAIN = 1e-3  # dividing by less would lose more than three of float32's seven digits


@dataclass(frozen=True)
class Part:
    """One adapter of a sum: ``name`` for messages."""

    name: str
    delta: AdapterDelta
    weight: float


def weighted_sum(parts: Sequence[Part], head: int, spec: BaseSpec, weights: BaseWeights) -> AdapterDelta:
    """``sum_i w_i`` times the parts' changes on the base of ``spec`` and ``weights``.

    A task's head (``BaseSpec.is_head``) cannot be summed: that of part number ``head`` stays as it is. Other saved
    modules become ``W + sum_i w_i (W_i - W)``. Raises AdapterRejected with everything that has no exact sum.
    """
    saved = {path: module for path, module in parts[head].delta.saved.items() if spec.is_head(path)}
    problems = []
    for path in _keys(part.delta.saved for part in parts):
        if not spec.is_head(path):
            base = weights.parameters_of(path)
            own = [(part.delta.saved[path], part.weight) for part in parts if path in part.delta.saved]
            if strange := [
                name for name in _keys(m for m, _ in own) if name not in base or f"{path}.{name}" in spec.untrained
            ]:
                problems.append(f"{path} is saved with {listed(strange)}: only parameters of the base have a sum")
            saved[path] = _saved_sum(base, own)
    problems += _conflicts(parts, saved)
    modules: dict[str, ModuleDelta] = {}
    parameters: dict[str, dict[str, ParameterDelta]] = {}
    for path in _keys(part.delta.modules for part in parts):
        present = [(part.delta.modules[path], part.weight) for part in parts if path in part.delta.modules]
        faults = [f"{path}: {fault}" for fault in _faults(present)]
        problems += faults
        if not faults:
            modules[path] = _sum(present)
    for path in _keys(part.delta.parameters for part in parts):
        owners = [(part.delta.parameters[path], part.weight) for part in parts if path in part.delta.parameters]
        parameters[path] = {
            name: _parameter_sum([(owner[name], weight) for owner, weight in owners if name in owner])
            for name in _keys(owner for owner, _ in owners)
        }
    if problems:
        raise AdapterRejected.because(problems)
    return AdapterDelta(modules, saved, parameters)


def _saved_sum(
    base: Mapping[str, torch.Tensor], present: Sequence[tuple[Mapping[str, torch.Tensor], float]]
) -> dict[str, torch.Tensor]:
    total = {name: own.detach().to("cpu", torch.float64) for name, own in base.items()}
    summed = {
        name: own + sum(weight * (module[name].double() - own) for module, weight in present)
        for name, own in total.items()
    }
    return {name: tensor.float() for name, tensor in summed.items()}


def _keys(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    """Keys of all mappings, each once, in order."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _conflicts(parts: Sequence[Part], saved: Mapping[str, object]) -> list[str]:
    """Changes of a module that the sum runs as a whole, saved or with changed parameters, or of something inside it."""
    whole = dict.fromkeys(saved, "saved")
    for part in parts:
        whole |= dict.fromkeys(part.delta.parameters, "parameters")
        whole |= {path: "modules" for path, delta in part.delta.modules.items() if delta.a2 is not None}
    return [
        f"{part.name} changes {path}, and {root} is replaced as a whole: there is no sum of the two"
        for part in parts
        for kind in ("saved", "parameters", "modules")
        for path in getattr(part.delta, kind)
        if kind != "saved" or path in saved
        for root, form in whole.items()
        if path.startswith(root + ".") or (path == root and kind != form)
    ]


def _faults(present: Sequence[tuple[ModuleDelta, float]]) -> list[str]:
    """Why these changes of one module have no sum in our form."""
    deltas = [delta for delta, _ in present]
    faults = []
    if any(delta.token_ids is not None for delta in deltas):
        faults.append("replaced token rows (trainable_token_indices) are not served in a weighted sum")
    if any(delta.active_shift is not None for delta in deltas):
        faults.append("what acts from an invocation on (aLoRA) has no part in a weighted sum")
    if any(_is_grouped(delta) for delta in deltas):
        faults.append("LoRA of a convolution in groups is not served in a weighted sum")
    scales = any(delta.input_scale is not None for delta in deltas)
    if scales and any(delta.rank or delta.dense is not None or delta.gain is not None for delta in deltas):
        faults.append("scaled inputs (IA3) and other changes have no exact sum")
    divided = any(delta.rank or delta.dense is not None for delta in deltas)
    if divided and _has_gain(deltas) and float(_gain(present).abs().min()) < _LEAST_GAIN:
        faults.append("the weighted gains (DoRA, IA3) cancel the base's output; choose other weights")
    if _uncertainty(present) > TOO_UNCERTAIN:
        faults.append("what training took out of the base is not known well enough for so large a weight")
    return faults


def _is_grouped(delta: ModuleDelta) -> bool:
    return delta.a is not None and delta.b is not None and delta.b.shape[1] != delta.a.shape[0]


def _has_gain(deltas: Sequence[ModuleDelta]) -> bool:
    return any(delta.gain is not None for delta in deltas)


def _gain(present: Sequence[tuple[ModuleDelta, float]]) -> torch.Tensor:
    """(out,): what multiplies the base's own output."""
    return 1 + torch.stack([w * (d.gain.double() - 1) for d, w in present if d.gain is not None]).sum(dim=0)


def _sum(present: Sequence[tuple[ModuleDelta, float]]) -> ModuleDelta:
    deltas = [delta for delta, _ in present]
    gain = _gain(present) if _has_gain(deltas) else None
    a, b = _factors([(d.a, d.b, _before_gain(d, w, gain) * d.scaling) for d, w in present])
    a2, b2 = _factors([(d.a2, d.b2, torch.tensor(w * d.scaling)) for d, w in present])
    scales = [(d.input_scale, w) for d, w in present if d.input_scale is not None]
    return ModuleDelta(
        a=a,
        b=b,
        dense=_total([(d.dense, _before_gain(d, w, gain)) for d, w in present]),
        gain=None if gain is None else gain.float(),
        shift=_total([(d.shift, torch.tensor(w)) for d, w in present]),
        input_scale=1 + torch.stack([w * (s.float() - 1) for s, w in scales]).sum(dim=0) if scales else None,
        a2=a2,
        b2=b2,
        uncertainty=_uncertainty(present),
    )


def _uncertainty(present: Sequence[tuple[ModuleDelta, float]]) -> float:
    return max(abs(weight) * delta.uncertainty for delta, weight in present)


def _before_gain(delta: ModuleDelta, weight: float, gain: torch.Tensor | None) -> torch.Tensor:
    """What multiplies a part's own terms before the sum's gain does: a number, or (out,)."""
    own = torch.tensor(weight, dtype=torch.float64)
    if gain is None:
        return own
    return own * (1 if delta.gain is None else delta.gain.double()) / gain


def _factors(
    present: Sequence[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """All ranks side by side; the factor goes into B."""
    pairs = [(a.float(), _times(b, factor)) for a, b, factor in present if a is not None and b is not None]
    if not pairs:
        return None, None
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)


def _total(present: Sequence[tuple[torch.Tensor | None, torch.Tensor]]) -> torch.Tensor | None:
    terms = [_times(tensor, factor) for tensor, factor in present if tensor is not None]
    return torch.stack(terms).sum(dim=0) if terms else None


def _times(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``factor``: a number, or one for each output (the first axis)."""
    wide = factor if factor.dim() == 0 else factor.reshape(-1, *(1,) * (tensor.dim() - 1))
    return (tensor.double() * wide).float()


def _parameter_sum(present: Sequence[tuple[ParameterDelta, float]]) -> ParameterDelta:
    """Experts' ranks side by side, too."""
    first = present[0][0]
    a = torch.cat([delta.a.float() for delta, _ in present], dim=-2)
    b = torch.cat([delta.b.float() * (delta.scaling * weight) for delta, weight in present], dim=-1)
    return ParameterDelta(a, b, 1.0, first.transposed)
