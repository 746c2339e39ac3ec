"""Which module gets how many bits: the base's own number, unless a pattern says another."""

from __future__ import annotations

from collections.abc import Iterable

from adapter_router.adapters.patterns import Matcher
from adapter_router.config import QuantizationConfig
from adapter_router.quantization.schemes import missing_library

KEPT_BITS = 16  # a module left as it is


def choose_bits(config: QuantizationConfig, paths: Iterable[str]) -> tuple[dict[str, int], set[str]]:
    """Bits of every module in ``paths``, names as in the base model's own task class, and the patterns that matched.

    A pattern matches the end of a path, at a dot; the first that matches decides, as in PEFT's ``rank_pattern``. Raises
    ValueError with every problem: patterns that take too long, a missing library.
    """
    matcher = Matcher()
    matches = {path: matcher.matching_keys(config.bits_pattern, path) for path in paths}
    chosen = {path: config.bits_pattern[keys[0]] if keys else config.bits for path, keys in matches.items()}
    problems = [*matcher.problems.values(), *missing_library(set(chosen.values()))]
    if problems:
        raise ValueError("quantization: " + "; ".join(problems))
    return chosen, {key for keys in matches.values() for key in keys}
