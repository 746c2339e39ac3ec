"""How PEFT's file can say what a merge adds to the modules' outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch

from adapter_router.adapters.base_spec import BaseSpec
from adapter_router.adapters.delta import ModuleDelta
from adapter_router.adapters.keys import listed
from adapter_router.adapters.tuners.tuner import Weights

BiasForm = Literal["none", "lora_bias", "all"]
"""No biases; ``lora_B.bias`` on every target; or ``bias="all"``, where the file holds every bias of the model."""

_ROUNDING = 1e-6


def choose_form(
    shifted: Collection[str], targets: Collection[str], saved: Collection[str], spec: BaseSpec
) -> tuple[BiasForm, list[str]]:
    """The form that can hold shifts of the modules ``shifted``, or why none can.

    ``targets``: modules of the result that have LoRA; ``saved``: those that it replaces. Where both forms can, it is
    the one that PEFT can fold into the base.
    """
    if not shifted:
        return "none", []
    tables = [path for path in targets if spec.targets[path].kind == "embedding"]
    elsewhere = [path for path in shifted if path not in targets]
    unbiased = sorted(path for path in shifted if f"{path}.bias" not in spec.parameters)
    stuck = sorted(path for path in biased(spec, saved) if path not in spec.shiftable or path not in spec.called)
    fits_beside, fits_all = not tables and not elsewhere, not unbiased and not stuck
    if fits_beside and not (fits_all and unfoldable("lora_bias", targets, spec)):
        return "lora_bias", []
    if fits_all:
        return "all", []
    why = f"lora_bias has no place for {listed(sorted(elsewhere) or tables)}, bias='all' none for "
    return "none", [f"PEFT has no form for the changed biases of this merge: {why}{listed(unbiased or stuck)}"]


def unfoldable(form: BiasForm, targets: Iterable[str], spec: BaseSpec) -> list[str]:
    """A warning about ``lora_bias`` of layers without a bias, which PEFT runs but cannot merge."""
    bare = [path for path in targets if f"{path}.bias" not in spec.parameters]
    if form != "lora_bias" or not bare:
        return []
    return [f"PEFT's merge_and_unload cannot fold lora_bias into layers without a bias: {listed(bare, 3)}"]


def biased(spec: BaseSpec, saved: Iterable[str]) -> list[str]:
    """Modules outside ``saved`` ones whose biases a ``bias="all"`` file holds."""
    roots = tuple(saved)
    paths = [name.removesuffix(".bias") for name in spec.parameters if name.endswith(".bias")]
    return [path for path in paths if not any(path == root or path.startswith(root + ".") for root in roots)]


def values(paths: Iterable[str], shifts: Mapping[str, torch.Tensor], weights: Weights) -> dict[str, torch.Tensor]:
    """New biases (out,) by module, float32: the base's and the shift, if there is one."""
    found = {}
    for path in paths:
        own = weights.bias(path)
        assert own is not None
        found[path] = (own + shifts[path]) if path in shifts else own
    return found


def total_shift(delta: ModuleDelta, own: torch.Tensor | None) -> torch.Tensor | None:
    """What ``y = gain * f(x) + shift`` adds to the bias ``own`` of ``f``, (out,); None for nothing."""
    if delta.gain is None or own is None:
        return delta.shift
    moved = (delta.gain.double() - 1) * own
    total = (moved if delta.shift is None else moved + delta.shift).float()
    # DoRA leaves the bias as it is; what remains of it here is rounding.
    return torch.where(total.abs() <= _ROUNDING * (delta.gain.abs() + 1) * own.abs(), 0.0, total)
