"""Recipes of adapters that transformers 4 trained on vision models, whose modules it named otherwise.

PEFT reads them on transformers 5 without their attention, silently; the oracle has the same tensors under new names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig

from tests.parity.configs import Build, Recipe, edit_config, edit_tensors
from tests.parity.site import Site

# Names of transformers 5 -> of transformers 4; a path is renamed by all of them in turn.
_ATTENTION: Mapping[str, str] = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
_ALL: Mapping[str, str] = {
    **_ATTENTION,
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    r"(?<!encoder\.)layers(?=\.\d)": "encoder.layer",
}
_RENAMES: Mapping[str, Mapping[str, str]] = {"vit": _ALL, "deit": _ALL, "dinov2": _ATTENTION}
# What one gave as target_modules then.
_TARGETS: Mapping[str, tuple[str, ...]] = {
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "o_proj": ("attention.output.dense",),
    "fc1": ("intermediate.dense",),
    "fc2": ("output.dense",),
}


def old_name(architecture: str, path: str) -> str:
    """A module path or tensor key as transformers 4 wrote it."""
    for new, old in _RENAMES[architecture].items():
        path = re.sub(rf"(?<=\.){new}(?=\.)" if "(" not in new else rf"(?<=\.){new}", old, path)
    return path


def _written_by_4(*targets: str) -> object:
    def edit(directory: Path, site: Site) -> None:
        name = site.arch.name
        edit_tensors(directory, lambda tensors: {old_name(name, key): t for key, t in tensors.items()})
        kept = site.arch.name == "dinov2"
        old = [leaf for target in targets for leaf in ((target,) if kept and target[:2] == "fc" else _TARGETS[target])]
        edit_config(directory, target_modules=old)

    return edit


def _vision(*targets: str, **fields: object) -> Build:
    def build(site: Site) -> PeftConfig | None:
        return site.lora(target_modules=list(targets), **fields) if site.arch.name in _RENAMES else None

    return build


def _recipe(name: str, *targets: str, **fields: object) -> Recipe:
    edit = _written_by_4(*targets)
    return Recipe(name, "written by transformers 4", _vision(*targets, **fields), edit=edit, oracle="native")  # type: ignore[arg-type]


LEGACY_RECIPES: tuple[Recipe, ...] = (
    _recipe("v4-attention", "q_proj", "v_proj"),
    _recipe("v4-dora", "q_proj", "k_proj", "o_proj", use_dora=True),
    _recipe("v4-everything", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", use_rslora=True),
)
