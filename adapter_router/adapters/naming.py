"""Module paths as an adapter's file spells them -> as the base model spells them.

An adapter may have been trained on the bare backbone (``encoder…``) or under a head (``bert.encoder…``), and, for
vision models, on transformers 4, whose module names were others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from adapter_router.adapters.base_spec import BaseSpec

# transformers 5 -> transformers 4, in order; the inverse of its own checkpoint conversion.
_VIT = (
    (r"(^|\.)layers\.(?=\d)", r"\1encoder.layer."),
    (r"\.attention\.q_proj$", ".attention.attention.query"),
    (r"\.attention\.k_proj$", ".attention.attention.key"),
    (r"\.attention\.v_proj$", ".attention.attention.value"),
    (r"\.attention\.o_proj$", ".attention.output.dense"),
    (r"\.mlp\.fc1$", ".intermediate.dense"),
    (r"\.mlp\.fc2$", ".output.dense"),
)
_DINOV2 = (
    (r"\.attention\.q_proj$", ".attention.attention.query"),
    (r"\.attention\.k_proj$", ".attention.attention.key"),
    (r"\.attention\.v_proj$", ".attention.attention.value"),
    (r"\.attention\.o_proj$", ".attention.output.dense"),
)
_BEFORE_5: Mapping[str, tuple[tuple[str, str], ...]] = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
}


class Naming:
    """One way to spell the base's module paths."""

    def __init__(self, spelled: Mapping[str, str]) -> None:
        """``spelled``: the base's path -> the adapter's."""
        self._spelled = spelled
        self._actual = {name: path for path, name in spelled.items()}

    def spelled(self, path: str) -> str:
        """The adapter's name of the base's module ``path``; its own where the adapter has none."""
        return self._spelled.get(path, path)

    def actual(self, name: str) -> str | None:
        """The base's path of what the adapter calls ``name``."""
        return self._actual.get(name)

    def knows(self, names: Iterable[str]) -> int:
        """How many of ``names`` are modules of the base."""
        return sum(name in self._actual for name in names)


def choose_naming(base: BaseSpec, used: Collection[str]) -> Naming:
    """The spelling that explains most of ``used``.

    The first of equals wins: the base's own, without or with the backbone's name, transformers 4's.
    """
    own = {path: path for path in base.modules}
    if base.backbone:
        other = {path: path.removeprefix(base.backbone + ".") for path in own}
    else:
        other = {path: f"{base.backbone_name}.{path}" for path in own}
    candidates = [own, other]
    if base.model_type in _BEFORE_5:
        candidates += [_respelled(names, _BEFORE_5[base.model_type]) for names in (own, other)]
    namings = [Naming(names) for names in candidates if len(set(names.values())) == len(names)]
    return max(namings, key=lambda naming: naming.knows(used))


def _respelled(names: Mapping[str, str], rules: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {path: _respell(name, rules) for path, name in names.items()}


def _respell(path: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path
