"""A validated adapter + the pristine base's weights -> what it changes at each module, in one form for all methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from adapter_router.adapters.adapter_tensors import AdapterTensors
from adapter_router.adapters.base_weights import BaseWeights
from adapter_router.adapters.coverage.experts import Expert
from adapter_router.adapters.delta import AdapterDelta, ModuleDelta, ParameterDelta
from adapter_router.adapters.tuners.lora import changes_base
from adapter_router.adapters.tuners.tuner import Target
from adapter_router.errors import AdapterRejected

# Two loads of one PiSSA-like adapter, even PEFT's own, differ by this much of what was taken from the base.
_WORTH_A_WARNING = 1e-4
TOO_UNCERTAIN = 1e-2
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Converted:
    """``warnings``: the validation's and those of the weights."""

    delta: AdapterDelta
    warnings: tuple[str, ...]


def convert(adapter: AdapterTensors, weights: BaseWeights) -> Converted:
    """Raises AdapterRejected with every reason why the base's weights do not allow it."""
    problems = [
        f"{name}: the file's copy differs from this base's; the adapter was trained on another base"
        for name, copy in adapter.copies.items()
        if not _same(weights.parameter(name), copy)
    ]
    problems += [
        f"target_parameters changes {name}, which is quantised on this base: train it with target_modules, or leave "
        "the module at 16 bits"
        for name in adapter.experts
        if name.endswith(".weight") and weights.is_quantized(name.removesuffix(".weight"))
    ]
    modules: dict[str, ModuleDelta] = {}
    warnings = list(adapter.warnings)
    for target, tensors in adapter.targets.items():
        try:
            delta = adapter.method.delta(target, {**adapter.shared, **tensors}, weights)
        except ValueError as error:
            problems.append(str(error))
            continue
        modules[target.base_path] = delta
        if delta.uncertainty > _WORTH_A_WARNING:
            findings = problems if delta.uncertainty > TOO_UNCERTAIN else warnings
            findings.append(_uncertain(target, delta.uncertainty))
    if problems:
        raise AdapterRejected.because(problems)
    for path, bias in adapter.biases.items():
        modules[path] = _with_bias(modules.get(path, ModuleDelta()), bias, weights.bias(path))
    for path, (ids, rows) in adapter.tokens.items():
        modules[path] = ModuleDelta(token_ids=torch.tensor(ids), token_rows=rows, shift=_without_bias(path, weights))
    changes = AdapterDelta(modules, _saved(adapter, weights), _parameters(adapter))
    return Converted(changes, tuple(warnings))


def _uncertain(target: Target, uncertainty: float) -> str:
    known = f"is only known to {uncertainty:.0e} of its size" if uncertainty < 1 else "cannot be determined"
    advice = (
        "; put the adapter as it was before training into initial/"
        if changes_base(target.config.document.get("init_lora_weights", True))
        else "; PEFT's own answers differ there from machine to machine"
    )
    return f"{target.base_path}: what training took out of the base {known}: its singular values lie too close{advice}"


def idle_modules(sizes: Mapping[str, float]) -> tuple[str, ...]:
    """A warning about modules whose change is nothing, if there are any."""
    idle = [path for path, size in sizes.items() if size == 0]
    return (f"{len(idle)} of {len(sizes)} modules have no effect, e.g. {idle[0]}",) if idle else ()


def norms(delta: AdapterDelta) -> dict[str, float]:
    """Size of the change at each module: ||s B A + D|| of the weight, or of whatever else is there."""
    sizes = {path: _size(module) for path, module in delta.modules.items()}
    sizes |= {path: _length(*parameters.values()) for path, parameters in delta.saved.items()}
    for path, changed in delta.parameters.items():
        sizes[path] = _length(*(small_product(p.b.float(), p.a.float()) * p.scaling for p in changed.values()))
    return sizes


def _size(delta: ModuleDelta) -> float:
    parts = [t for t in (delta.dense, delta.shift, delta.token_rows) if t is not None]
    if delta.gain is not None:
        parts.append(delta.gain.float() - 1)
    if delta.input_scale is not None:
        parts.append(delta.input_scale.float() - 1)
    if delta.a is not None and delta.b is not None:
        parts.append(small_product(delta.b.float().flatten(1), delta.a.float().flatten(1)) * delta.scaling)
    if delta.a2 is not None and delta.b2 is not None:
        parts.append(small_product(delta.b2.float(), delta.a2.float()) * delta.scaling)
    return _length(*parts)


def small_product(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """A matrix of the norm of ``b @ a`` and of its rank's size: QR of both sides, without the product itself."""
    if b.shape[-1] != a.shape[-2] or min(b.shape[-2], a.shape[-1]) <= b.shape[-1]:
        product: torch.Tensor = b @ a if b.shape[-1] == a.shape[-2] else b
        return product
    left, right = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.transpose(-1, -2), mode="r").R
    small: torch.Tensor = left @ right.transpose(-1, -2)
    return small


def _length(*tensors: torch.Tensor) -> float:
    """Frobenius norm of all together, without a copy of any."""
    chunks = (flat[i : i + _CHUNK] for flat in (t.flatten() for t in tensors) for i in range(0, len(flat), _CHUNK))
    return math.sqrt(sum(float(chunk.double().square().sum()) for chunk in chunks))


def _same(own: torch.Tensor | None, copy: torch.Tensor) -> bool:
    """Whether a file's copy, perhaps rounded to a narrower type, is the base's."""
    if own is None:
        return False
    own = own.detach().cpu()
    narrower = copy.dtype if copy.dtype.itemsize < own.dtype.itemsize else own.dtype
    return torch.equal(own.to(narrower), copy.to(narrower))


def _with_bias(delta: ModuleDelta, bias: torch.Tensor, own: torch.Tensor | None) -> ModuleDelta:
    """``bias`` replaces the base's: what the module adds changes by the difference."""
    difference = bias.float() - (0 if own is None else own)
    return replace(delta, shift=difference if delta.shift is None else delta.shift + difference)


def _without_bias(path: str, weights: BaseWeights) -> torch.Tensor | None:
    """PEFT gives an output layer with replaced rows no bias."""
    bias = weights.bias(path)
    return None if bias is None else -bias


def _saved(adapter: AdapterTensors, weights: BaseWeights) -> dict[str, dict[str, torch.Tensor]]:
    """Saved modules, and those that had single parameters replaced, as wholes."""
    saved = {path: dict(parameters) for path, parameters in adapter.saved.items()}
    for path, parameters in adapter.replaced.items():
        saved[path] = {**weights.parameters_of(path), **saved.get(path, {}), **parameters}
    return saved


def _parameters(adapter: AdapterTensors) -> dict[str, dict[str, ParameterDelta]]:
    changed: dict[str, dict[str, ParameterDelta]] = {}
    for name, expert in adapter.experts.items():
        owner, _, leaf = name.rpartition(".")
        changed.setdefault(owner, {})[leaf] = _parameter_delta(expert)
    return changed


def _parameter_delta(expert: Expert) -> ParameterDelta:
    """PEFT stacks the experts' ranks: A as (experts, rank, in), B as (out, rank, experts)."""
    a = expert.a.reshape(expert.count, -1, expert.a.shape[-1])
    b = expert.b.reshape(expert.b.shape[0], -1, expert.count).permute(2, 0, 1)
    if not expert.stacked:
        a, b = a[0], b[0]
    return ParameterDelta(a.contiguous(), b.contiguous(), expert.scaling, expert.transposed)
