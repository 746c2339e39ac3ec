"""Sentence templates of home-assistant-intents -> sample sentences.

The template language: ``[optional]``, ``(one|of|these)``, ``<rule>``, ``{list}`` or ``{list:slot}``,
and ``;`` between parts that may come in any order. Sampling is deterministic for a given ``Random``.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

_TOKEN = re.compile(r"\[|\]|\(|\)|\||;|<[^>]+>|\{[^}]+\}|[^\[\]()|;<{]+")
_MAX_DEPTH = 8

# Lists that the package leaves to each household ("wildcard" or filled from the user's own devices).
HOUSEHOLD: dict[str, list[str]] = {
    "area": ["kitchen", "bedroom", "living room", "garage", "office", "hallway", "bathroom", "attic"],
    "floor": ["ground floor", "first floor", "upstairs", "basement"],
    "name": ["ceiling lamp", "desk fan", "front door", "coffee machine", "tv", "heater", "porch light"],
    "message": ["dinner is ready", "it is bedtime", "the taxi has arrived"],
    "search_query": ["bohemian rhapsody", "jazz for studying", "the morning news", "a podcast on history"],
    "zone": ["work", "school", "home"],
    "timer_name": ["pizza", "laundry", "workout"],
    "timer_command": ["turn off the lights", "open the garage"],
    "shopping_list_item": ["milk", "two apples", "bread", "coffee beans"],
    "todo_list_item": ["call mom", "pay the rent", "water the plants"],
}


@dataclass(frozen=True)
class _Choice:
    """One of ``options``, each a sequence of nodes; ``optional`` adds the empty one."""

    options: list[list[Any]]
    optional: bool = False


class TemplateSampler:
    """Samples sentences from the templates of one language document."""

    def __init__(self, document: dict[str, Any], rng: random.Random) -> None:
        self._rules: dict[str, str] = document["expansion_rules"]
        self._lists: dict[str, Any] = document["lists"]
        self._rng = rng

    def sample(self, template: str) -> str:
        """One sentence, with runs of blanks folded."""
        return " ".join(self._expand(template, 0).split())

    def _expand(self, template: str, depth: int) -> str:
        if depth > _MAX_DEPTH:
            return ""
        tokens = _TOKEN.findall(template)
        return self._emit(_parse(tokens), depth)

    def _emit(self, node: _Choice | str, depth: int) -> str:
        if isinstance(node, _Choice):
            if node.optional and self._rng.random() < 0.5:
                return ""
            return "".join(self._emit(part, depth) for part in self._rng.choice(node.options))
        if node.startswith("<"):
            return self._expand(self._rules.get(node[1:-1], ""), depth + 1)
        if node.startswith("{"):
            return self._fill(node[1:-1].split(":")[0], depth)
        return " " if node == ";" else node

    def _fill(self, name: str, depth: int) -> str:
        spec = self._lists.get(name, {})
        if "values" in spec:
            value = self._rng.choice(spec["values"])
            return self._expand(value["in"] if isinstance(value, dict) else value, depth + 1)
        if "range" in spec:
            low, high = spec["range"]["from"], spec["range"]["to"]
            return str(self._rng.randint(max(low, 1), min(high, 100)) if low < 100 else low)
        return self._rng.choice(HOUSEHOLD.get(name, ["thing"]))


def _parse(tokens: list[str]) -> _Choice:
    """Tokens -> tree; ``tokens`` is consumed from the front."""
    options: list[list[Any]] = [[]]
    while tokens:
        token = tokens.pop(0)
        if token in "])":
            break
        if token == "|":
            options.append([])
        elif token == "[":
            inner = _parse(tokens)
            options[-1].append(_Choice(inner.options, optional=True))
        elif token == "(":
            options[-1].append(_parse(tokens))
        else:
            options[-1].append(token)
    return _Choice(options)
