"""PEFT's rules for matching module paths, with a time limit on every user-supplied expression.

The rules are those of peft 0.21 (``tuners_utils.check_target_module_exists``, ``other.get_pattern_key``,
``other._set_trainable``).
"""

from __future__ import annotations

from collections.abc import Iterable

import regex

_TIMEOUT_S = 0.05


class PatternError(ValueError):
    """An expression that does not compile, or takes too long on some module path."""


def matching_keys(patterns: Iterable[str], path: str) -> list[str]:
    """``rank_pattern`` and ``alpha_pattern``: the keys that match ``path`` at its end, at a dot.

    PEFT takes the FIRST in file order.
    """
    return [key for key in patterns if _match(rf"(.*\.)?({key})$", path)]


def matches_names(names: str | tuple[str, ...], path: str) -> bool:
    """``target_modules`` and ``exclude_modules``: a string is a full-match expression, a list holds path tails."""
    if isinstance(names, str):
        return _match(rf"(?:{names})\Z", path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def in_saved_module(names: Iterable[str], path: str) -> bool:
    """Whether a module lies in one that ``modules_to_save`` names; such a module is never a LoRA target."""
    return any(_match(rf"(^|.*\.){name}($|\..*)", path) for name in names)


def layer_index(layers_patterns: tuple[str, ...], path: str) -> int | None:
    """The layer number of ``path``: what follows one of ``layers_patterns``, else the first number between dots."""
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in layers_patterns]
    for expression in expressions or [r".*?\.[^.]*\.(\d+)\."]:
        found = _match(expression, path)
        if found is not None:
            return int(found.group(1))
    return None


def _match(expression: str, path: str) -> regex.Match[str] | None:
    try:
        return regex.match(expression, path, timeout=_TIMEOUT_S)
    except TimeoutError as error:
        raise PatternError(f"pattern {expression!r} takes too long on {path!r}") from error
    except regex.error as error:
        raise PatternError(f"pattern {expression!r} is not a regular expression: {error}") from error
