"""PEFT's rules for matching module paths, on expressions that strangers wrote.

The rules are those of peft 0.21 (``tuners_utils.check_target_module_exists``, ``other.get_pattern_key``). PEFT uses
``re``, which cannot be interrupted; we match with ``regex``, which can, and refuse what the two would read differently.
A key without operators, such as a module's path, is compared as text, which no large model makes slow.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

import regex

_MATCH_LIMIT_S = 0.25  # by the clock, which other processes share
_ADAPTER_LIMIT_S = 0.5
_SPENT_S = 1e-3
# A brace that is no quantifier is literal text to ``re`` and a fuzzy match to ``regex``; so are POSIX classes.
_READ_DIFFERENTLY = re.compile(r"\{(?!\d+(,\d*)?\}|,\d+\})|\[\[?:")
_ESCAPED = re.compile(r"\\.|\[\^?\]?[^\]:]*\]", re.DOTALL)
# The expression of a key of characters, escaped punctuation and dots, which stand for any character, alone.
_PLAIN = re.compile(r"\(\.\*\\\.\)\?\((\^?)((?:[A-Za-z0-9_.-]|\\[!-/:-@[-`{-~])*)\)\$")

_WORD = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class _Tail:
    """A key that matches ``length`` characters at a path's end, or a ``whole`` path: those of ``end`` as they are.

    ``dotted``: all of them, where dots stand among them.
    """

    length: int
    end: str
    whole: bool
    dotted: re.Pattern[str] | None

    @classmethod
    def of(cls, expression: str) -> _Tail | None:
        """None for an expression that is more than text."""
        plain = _PLAIN.fullmatch(expression)
        if plain is None:
            return None
        anchor, text = plain.groups()
        signs = re.findall(r"\\?.", text)
        last_dot = max((place for place, sign in enumerate(signs) if sign == "."), default=-1)
        end = "".join(sign[-1] for sign in signs[last_dot + 1 :])
        return cls(len(signs), end, bool(anchor), re.compile(text) if "." in signs else None)

    def fits(self, path: str) -> bool:
        """What the expression's full match of ``path`` says."""
        start = len(path) - self.length
        if start < 0 or not path.endswith(self.end) or "\n" in path:
            return False
        if start > 0 and (self.whole or path[start - 1] != "."):
            return False
        return self.dotted is None or self.dotted.fullmatch(path, start) is not None


class Matcher:
    """The expressions of one adapter, each compiled once, all of them matched within one time limit.

    A faulty expression matches nothing and is listed in ``problems``.
    """

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self._compiled: dict[str, regex.Pattern[str] | None] = {}
        self._found: dict[tuple[str, str], regex.Match[str] | None] = {}
        self._keys: dict[tuple[str, ...], list[tuple[str, str, _Tail | None]]] = {}
        self._left_s = _ADAPTER_LIMIT_S

    def matching_keys(self, patterns: Iterable[str], path: str) -> list[str]:
        """``rank_pattern`` and ``alpha_pattern``: the keys that match ``path`` at its end, at a dot.

        PEFT takes the FIRST in file order.
        """
        keys = tuple(patterns)
        if keys not in self._keys:
            expressions = {key: rf"(.*\.)?({key})$" for key in keys}
            self._keys[keys] = [(key, expression, _Tail.of(expression)) for key, expression in expressions.items()]
        return [
            key
            for key, expression, tail in self._keys[keys]
            if (self._match(expression, path, key) if tail is None else tail.fits(path))
        ]

    def names(self, names: str | tuple[str, ...], path: str) -> bool:
        """``target_modules`` and ``exclude_modules``: a string is a full-match expression, a list holds path tails."""
        if isinstance(names, str):
            found = self._match(names, path, names)
            return found is not None
        return any(path == name or path.endswith("." + name) for name in names)

    def in_saved_module(self, names: Iterable[str], path: str) -> bool:
        """Whether a module lies in one that ``modules_to_save`` names; such a module is never a LoRA target."""
        return any(
            (f".{name}." in f".{path}." and "\n" not in path)
            if _WORD.fullmatch(name)
            else self._match(rf"(^|.*\.){name}($|\..*)", path, name)
            for name in names
        )

    def layer_index(self, layers_patterns: tuple[str, ...], path: str) -> int | None:
        """The layer number of ``path``: what follows one of ``layers_patterns``, else the first number between dots."""
        if not layers_patterns:
            found = self._match(r".*?\.[^.]*\.(?P<index>\d+)\..*", path, "")
            return int(found["index"]) if found else None
        for pattern in layers_patterns:
            found = self._match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\..*", path, pattern)
            if found is not None:
                return int(found["index"])
        return None

    def _match(self, expression: str, path: str, written: str) -> regex.Match[str] | None:
        """Full match of ``expression``, which PEFT makes of ``written``."""
        if (expression, path) in self._found:
            return self._found[expression, path]
        if self._left_s <= _SPENT_S:
            self.problems.setdefault("", f"matching all patterns takes too long: more than {_ADAPTER_LIMIT_S:g} s")
            return None
        start = time.thread_time()
        try:
            compiled = self._compile(expression, written)
            if compiled is None or written in self.problems:
                return None
            self._found[expression, path] = compiled.fullmatch(path, timeout=min(_MATCH_LIMIT_S, self._left_s))
        except TimeoutError:
            self.problems[written] = f"pattern {_short(written)} takes too long on {path!r}"
            return None
        finally:
            self._left_s = max(1e-6, self._left_s - (time.thread_time() - start))
        return self._found[expression, path]

    def _compile(self, expression: str, written: str) -> regex.Pattern[str] | None:
        if expression not in self._compiled:
            self._compiled[expression] = None
            try:
                re.compile(expression)
                self._compiled[expression] = regex.compile(expression)
            except (re.error, regex.error, OverflowError, RecursionError) as error:
                self.problems[written] = f"pattern {_short(written)} is not a regular expression: {error}"
            if _READ_DIFFERENTLY.search(_ESCAPED.sub("", written)):
                self.problems.setdefault(written, f"pattern {_short(written)} has a stray brace or a [:class:]")
        return self._compiled[expression]


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
