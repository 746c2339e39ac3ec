"""``adapter_config.json`` as PEFT writes it -> the fields that all methods share, and every problem with them.

PEFT ignores what it does not know and accepts NaN as a scale; here each field is served, harmless, or refused by name:
the common ones here, a method's own in its file under ``tuners``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adapter_router.adapters.patterns import Matcher
from adapter_router.adapters.strict_json import parse_object

FINGERPRINT = "sha256:"  # what a base's fingerprint starts with
# Fields that every method has, and that are read here.
COMMON_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    }
)
# PEFT saves these modules itself for a task, whether or not the model has them.
IMPLIED_SAVED = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_BIASES = ("none", "all", "lora_only")
_PATTERNED = ("LORA", "LOHA", "LOKR")
MAX_RANK = 4096
_MAX_ALPHA = 1e9
_MAX_NAMES = 1000
_MAX_TARGETS = 20_000
_MAX_NAME_LENGTH = 2000
_MAX_CHARACTERS = 100_000
_MOST_FIELDS = 20
_LIMITS = f"(at most {_MAX_NAMES}, each of at most {_MAX_NAME_LENGTH} characters)"


@dataclass(frozen=True)
class AdapterConfig:
    """The part of a PEFT configuration that all methods share; names as in PEFT.

    Paths are those of the adapter's own naming. ``ranks_known``: no rank had to be read as another.
    ``document`` is the file itself, for the methods' own fields.
    """

    peft_type: str
    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    task_type: str | None
    bias: str
    ranks_known: bool = True
    document: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    matcher: Matcher = field(default_factory=Matcher, compare=False, repr=False)

    @property
    def base_fingerprint(self) -> str | None:
        """The base that ``revision`` pins by its fingerprint, as ``adapter-router quantize`` writes it.

        PEFT hands this field on unchanged from the adapter it starts with to the one it saves; it empties
        ``loftq_config``. Revisions of hubs are no fingerprints: git allows no colon in them.
        """
        revision = self.document.get("revision")
        return revision if isinstance(revision, str) and revision.startswith(FINGERPRINT) else None

    def rank_of(self, path: str) -> int:
        """Rank of the target module ``path``."""
        keys = self.matcher.matching_keys(self.rank_pattern, path)
        return self.rank_pattern[keys[0]] if keys else self.r

    def alpha_of(self, path: str) -> float:
        """Alpha of the target module ``path``."""
        keys = self.matcher.matching_keys(self.alpha_pattern, path)
        return self.alpha_pattern[keys[0]] if keys else self.alpha

    def scaling_of(self, path: str, rank: int) -> float:
        """``s`` of ``y = Wx + s B A x``: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        return self.alpha_of(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Whether PEFT would put LoRA on the module ``path``."""
        if self.exclude_modules and self.matcher.names(self.exclude_modules, path):
            return False
        if self.matcher.in_saved_module(self.modules_to_save, path):
            return False
        if not self.matcher.names(self.target_modules, path):
            return False
        named_in_full = isinstance(self.target_modules, str) or path in self.target_modules
        if not self.layers_to_transform or named_in_full:
            return True
        return self.matcher.layer_index(self.layers_pattern, path) in self.layers_to_transform

    def saves(self, path: str) -> bool:
        """Whether PEFT would store the whole module ``path``: it ends in a saved name, with or without a dot."""
        return any(path.endswith(name) for name in self.modules_to_save)

    def overlapping_patterns(self, path: str) -> list[str]:
        """Pattern keys beyond the first that match ``path`` with another value: PEFT's own files reorder them."""
        overlaps = []
        for patterns in (self.rank_pattern, self.alpha_pattern):
            keys = self.matcher.matching_keys(patterns, path)
            overlaps += [key for key in keys[1:] if patterns[key] != patterns[keys[0]]]
        return overlaps

    def pattern_problems(self, paths: Iterable[str]) -> list[str]:
        """What is wrong with the expressions, found by trying every one of them on every path."""
        for path in paths:
            self.overlapping_patterns(path)
            self.matcher.names(self.target_modules, path)
            self.matcher.names(self.exclude_modules, path)
            self.matcher.in_saved_module(self.modules_to_save, path)
            if self.layers_pattern:
                self.matcher.layer_index(self.layers_pattern, path)
        return list(self.matcher.problems.values())


def parse_adapter_config(raw: bytes) -> tuple[AdapterConfig | None, list[str]]:
    """The configuration and every problem with it; the configuration is None only where no sense can be made of it."""
    document, problems = parse_object(raw, "adapter_config.json")
    if document is None:
        return None, problems
    problems += _contradictions(document)
    reader = _FieldReader(document, problems)
    patterned = document.get("peft_type") in _PATTERNED
    alpha_name = "lora_alpha" if "lora_alpha" in document else "alpha"
    task_type = document.get("task_type") if isinstance(document.get("task_type"), str) else None
    config = AdapterConfig(
        peft_type=str(document.get("peft_type")),
        r=reader.rank("r", document.get("r", 8)) if patterned else 1,
        alpha=reader.number(alpha_name, document.get(alpha_name, 8)),
        rank_pattern=reader.pattern("rank_pattern", reader.rank) if patterned else {},
        alpha_pattern=reader.pattern("alpha_pattern", reader.number) if patterned else {},
        use_rslora=reader.flag("use_rslora"),
        target_modules=reader.names("target_modules"),
        exclude_modules=reader.names("exclude_modules"),
        layers_to_transform=reader.indices("layers_to_transform"),
        layers_pattern=reader.name_list("layers_pattern"),
        modules_to_save=reader.name_list("modules_to_save") + IMPLIED_SAVED.get(task_type or "", ()),
        task_type=task_type,
        bias=document["bias"] if document.get("bias") in _BIASES else "none",
        document=document,
    )
    return replace(config, ranks_known=not reader.rank_faults), problems


def unserved_fields(document: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Fields that are set and that nobody here knows: what they would change cannot be told."""
    unserved = [
        name
        for name, value in document.items()
        if name not in known and not (value is None or value is False or value in ("", [], {}))
    ]
    if len(unserved) > _MOST_FIELDS:
        return [f"{len(unserved)} fields are not served, e.g. {', '.join(map(_short, unserved[:_MOST_FIELDS]))}"]
    return [f"{_short(name).strip(chr(39))}={json.dumps(document[name])[:80]} is not served" for name in unserved]


def _contradictions(document: dict[str, Any]) -> list[str]:
    """Combinations that PEFT itself refuses."""
    problems = []
    if not isinstance(document.get("task_type"), str | None):
        problems.append(f"task_type is {_short(document['task_type'])}, must be a name")
    if document.get("bias") not in (None, *_BIASES):
        problems.append(f"bias is {_short(document['bias'])}, must be one of {', '.join(_BIASES)}")
    layers = document.get("layers_to_transform")
    for name in ("layers_to_transform", "layers_pattern"):
        if document.get(name) and isinstance(document.get("target_modules"), str):
            problems.append(f"{name} needs target_modules to be a list, it is an expression")
    if document.get("layers_pattern") and layers is None:
        problems.append("layers_pattern needs layers_to_transform")
    return problems


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _FieldReader:
    """Reads typed fields; a field of the wrong type becomes a problem and a harmless default."""

    def __init__(self, document: dict[str, Any], problems: list[str]) -> None:
        self._document = document
        self._problems = problems
        self.rank_faults = False

    def rank(self, name: str, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK:
            return value
        self.rank_faults = True
        self._problems.append(f"{name} is {_short(value)}, must be an integer from 1 to {MAX_RANK}")
        return 1

    def number(self, name: str, value: Any) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_ALPHA:
            return value
        self._problems.append(f"{name} is {_short(value)}, must be a number of at most {_MAX_ALPHA:g}")
        return 0.0

    def flag(self, name: str) -> bool:
        value = self._document.get(name) or False
        if not isinstance(value, bool):
            self._problems.append(f"{name} is {_short(value)}, must be true or false")
        return bool(value)

    def pattern(self, name: str, read: Any) -> dict[str, Any]:
        value = self._document.get(name) or {}
        # An empty pattern is legal: it matches nothing.
        if not isinstance(value, dict) or not self._sane(name, [key for key in value if key != ""]):
            self._problems.append(f"{name} is {_short(value)}, must be an object {_LIMITS}")
            return {}
        return {key: read(f"{name}[{key!r}]", entry) for key, entry in value.items()}

    def names(self, name: str) -> str | tuple[str, ...]:
        value = self._document.get(name)
        return value if isinstance(value, str) and self._sane(name, [value]) else self.name_list(name)

    def name_list(self, name: str) -> tuple[str, ...]:
        value = self._document.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not self._sane(name, value):
            self._problems.append(f"{name} is {_short(value)}, must be a list of names {_LIMITS}")
            return ()
        return tuple(dict.fromkeys(value))

    @staticmethod
    def _sane(name: str, entries: Collection[Any]) -> bool:
        """Few and short enough to be tried on every module; ``target_modules`` of large models list every one."""
        most = _MAX_TARGETS if name == "target_modules" else _MAX_NAMES
        if len(entries) > most or not all(isinstance(e, str) and 0 < len(e) <= _MAX_NAME_LENGTH for e in entries):
            return False
        return name == "target_modules" or sum(map(len, entries)) <= _MAX_CHARACTERS

    def indices(self, name: str) -> tuple[int, ...]:
        value = self._document.get(name)
        value = [] if value is None else [value] if isinstance(value, int) else value
        if not isinstance(value, list) or not all(isinstance(entry, int) for entry in value):
            self._problems.append(f"{name} is {_short(value)}, must be a list of layer numbers")
            return ()
        return tuple(value)
