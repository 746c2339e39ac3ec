"""Configuration + tensors + base -> an adapter that can be served exactly, or every reason why not.

Every tensor must have exactly one role (one side of a LoRA pair, or part of a saved module), every declared target
must be covered, and every shape must be the base's. PEFT answers most of these faults with silence.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

import torch

from adapter_router.adapters.adapter_config import IMPLIED_SAVED, AdapterConfig, parse_adapter_config
from adapter_router.adapters.base_spec import BaseSpec, Shape
from adapter_router.adapters.checkpoint import read_tensors
from adapter_router.adapters.head_config import HeadConfig, default_activation, label_problems, parse_head_config
from adapter_router.errors import AdapterRejected
from adapter_router.types import Activation, AdapterFiles

_PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
_TASK_TYPES = ("SEQ_CLS", None)
_LISTED = 8  # names of one kind that a problem spells out


@dataclass(frozen=True)
class LoraPair:
    """``y += scaling * (x A^T) B^T`` with A of (rank, in_features) and B of (out_features, rank), file's dtype."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterTensors:
    """A validated adapter on the host.

    ``saved``: module path -> its whole parameters by name relative to the module.
    """

    pairs: dict[str, LoraPair]
    saved: dict[str, dict[str, torch.Tensor]]
    num_labels: int
    labels: tuple[str, ...]
    activation: Activation
    warnings: tuple[str, ...]


def validate(files: AdapterFiles, base: BaseSpec, labels: tuple[str, ...] | None = None) -> AdapterTensors:
    """Check an adapter's ``files`` against ``base``; ``labels`` overrides the directory's own.

    Raises AdapterRejected with every problem.
    """
    config, problems = parse_adapter_config(files.config)
    head, head_problems = parse_head_config(files.head_config)
    tensors, tensor_problems = read_tensors(files.weights)
    problems += head_problems + tensor_problems
    if head.model_type is not None and head.model_type != base.model_type:
        problems.append(f"adapter was trained on a {head.model_type!r} model, this base is {base.model_type!r}")
    if config is None or tensors is None:
        raise AdapterRejected.because(problems)
    problems += config.pattern_problems(base.linears)
    check = _Check(config, base, problems)
    check.run(tensors)
    check.choose_labels(labels, head)
    if problems:
        raise AdapterRejected.because(problems)
    return AdapterTensors(
        check.pairs, check.saved, check.num_labels, check.labels, check.activation, tuple(check.warnings)
    )


@dataclass
class _Check:
    """One pass over one adapter; findings gather in ``problems``."""

    config: AdapterConfig
    base: BaseSpec
    problems: list[str]
    warnings: list[str] = field(default_factory=list)
    pairs: dict[str, LoraPair] = field(default_factory=dict)
    saved: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    num_labels: int = 0
    labels: tuple[str, ...] = ()
    activation: Activation = "softmax"

    def run(self, tensors: dict[str, torch.Tensor]) -> None:
        """Give every tensor its role, then check each role's shapes and completeness."""
        sides, saved, unknown = self._sort(tensors)
        if unknown:
            self.problems.append(f"{len(unknown)} tensors have no place in this base: {_some(unknown)}")
        if not sides and not saved:
            self.problems.append("the adapter has no tensor for this base")
        if self.config.task_type not in _TASK_TYPES:
            self.problems.append(f"task_type {self.config.task_type!r:.80} is not served; only SEQ_CLS is")
        self._check_targets(set(sides))
        self._check_rowwise(sides.keys() & self.base.linears.keys())
        for path, pair in sides.items():
            self._check_pair(path, pair)
        self._check_saved(saved)

    def _sort(
        self, tensors: dict[str, torch.Tensor]
    ) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor], list[str]]:
        """Tensors by role: LoRA sides by module and side, saved parameters by name, keys without any role."""
        sides: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        saved: dict[str, torch.Tensor] = {}
        unknown = []
        for key, tensor in tensors.items():
            name = key.removeprefix(_PREFIX)
            lora = _LORA_KEY.fullmatch(name)
            if not key.startswith(_PREFIX):
                unknown.append(key)
            elif lora:
                sides[lora["path"]][lora["side"]] = tensor
            elif name in self.base.parameters and self._saved_root(name):
                saved[name] = tensor
            else:
                unknown.append(key)
        return sides, saved, unknown

    def choose_labels(self, override: tuple[str, ...] | None, head: HeadConfig) -> None:
        """Label names: the caller's, the directory's, the base's for its own head, or transformers' ``LABEL_0``…."""
        own_head = any(name in self.base.label_axes for name in self._saved_names())
        named = override if override is not None else head.labels
        if not own_head:  # the adapter uses the base's head, names and activation included
            self.activation = head.activation or self.base.activation
            named = named if named is not None else self.base.labels
        else:
            self.activation = head.activation or default_activation(self.num_labels)
            named = named if named is not None else tuple(f"LABEL_{index}" for index in range(self.num_labels))
        if self.num_labels and len(named) != self.num_labels:
            self.problems.append(f"{len(named)} label names for a head of {self.num_labels} labels")
        if override is not None:
            self.problems += label_problems(override)
        self.labels = named

    def _saved_names(self) -> Iterator[str]:
        return (f"{root}.{name}" for root, parameters in self.saved.items() for name in parameters)

    def _check_targets(self, present: set[str]) -> None:
        if self.config.matcher.problems:
            return  # what the patterns mean is not known
        declared = {path for path in self.base.linears if self.config.targets(path)}
        missing = sorted(declared - present)
        if missing:
            self.problems.append(f"{len(missing)} target modules have no LoRA tensors: {_some(missing)}")
        undeclared = sorted(path for path in present - declared if path in self.base.linears)
        if undeclared:
            self.problems.append(f"LoRA tensors on modules that target_modules does not name: {_some(undeclared)}")
        foreign = sorted(present - set(self.base.linears))
        if foreign:
            self.problems.append(f"LoRA tensors on modules this base does not have: {_some(foreign)}")

    def _check_pair(self, path: str, sides: dict[str, torch.Tensor]) -> None:
        if path not in self.base.linears:
            return
        if set(sides) != {"A", "B"}:
            self.problems.append(f"{path} has lora_{'/'.join(sides)} without its partner")
            return
        linear = self.base.linears[path]
        # Where a pattern is faulty the rank it means is not known: then the tensors' own must do.
        rank = sides["A"].shape[0] if self.config.matcher.problems else self.config.rank_of(path)
        shapes_fit = True
        for side, expected in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
            if tuple(sides[side].shape) != expected:
                shapes_fit = False
                self._misshaped(f"{path}.lora_{side}", tuple(sides[side].shape), expected)
        overlaps = self.config.overlapping_patterns(path)
        if overlaps:
            self.warnings.append(f"{path}: patterns {overlaps} also match; the first in the file was taken, as in PEFT")
        if shapes_fit:
            self.pairs[path] = LoraPair(sides["A"], sides["B"], self.config.scaling_of(path, rank))

    def _saved_root(self, parameter: str) -> str | None:
        """Path of the outermost saved module that holds ``parameter``."""
        parts = parameter.split(".")
        for depth in range(1, len(parts)):
            path = ".".join(parts[:depth])
            if self.config.saves(path):
                return path
        return None

    def _check_saved(self, saved: dict[str, torch.Tensor]) -> None:
        self._check_saved_names()
        roots = {root for name in self.base.parameters if (root := self._saved_root(name))}
        self.num_labels = self._count_labels(saved)
        self._check_rowwise(roots)
        for root in sorted(roots):
            expected = self.base.parameters_of(root)
            missing = sorted(expected.keys() - saved.keys())
            if missing:
                self.problems.append(f"saved module {root} lacks {_some(missing)}")
            self.saved[root] = {}
            for name in expected.keys() & saved.keys():
                shape = self.base.shape_with_labels(name, self.num_labels)
                if tuple(saved[name].shape) != shape:
                    self._misshaped(name, tuple(saved[name].shape), shape)
                self.saved[root][name.removeprefix(root + ".")] = saved[name]
        random = sorted(self.base.untrained - saved.keys())
        if random:
            self.problems.append(
                f"neither the base nor the adapter holds {_some(random)}; "
                "add the module to modules_to_save and train it"
            )

    def _check_rowwise(self, paths: Set[str]) -> None:
        shared = sorted(paths - self.base.rowwise)
        if shared:
            self.problems.append(f"this base does not compute these modules row by row: {_some(shared)}")

    def _check_saved_names(self) -> None:
        paths = self.base.module_paths()
        for name in self.config.modules_to_save:
            if name not in IMPLIED_SAVED and not any(path.endswith(name) for path in paths):
                self.problems.append(f"modules_to_save names {name!r}, which this base does not have")

    def _count_labels(self, saved: dict[str, torch.Tensor]) -> int:
        counts = {
            name: saved[name].shape[axis]
            for name, axis in self.base.label_axes.items()
            if name in saved and saved[name].dim() > axis
        }
        if 0 in counts.values():
            self.problems.append(f"the head has no labels: {[name for name, count in counts.items() if not count]}")
        if len(set(counts.values())) > 1:
            self.problems.append(f"the head's tensors disagree on the number of labels: {counts}")
        return next(iter(counts.values()), self.base.num_labels)

    def _misshaped(self, name: str, actual: Shape, expected: Shape) -> None:
        self.problems.append(f"{name} has shape {list(actual)}, this base and config need {list(expected)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
