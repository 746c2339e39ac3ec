"""Whole parameters in the file: of saved modules, changed biases, and copies of the base's."""

from __future__ import annotations

from collections.abc import Collection

import torch

from adapter_router.adapters.adapter_config import IMPLIED_SAVED
from adapter_router.adapters.coverage.findings import Findings
from adapter_router.adapters.keys import SortedTensors, Tensors, listed
from adapter_router.adapters.tuners.lora import takes_from_base

_IMPLIED = {name for names in IMPLIED_SAVED.values() for name in names}


class ParameterCheck:
    """What passed: ``saved`` modules by path, ``biases`` by module, ``replaced`` (other single parameters) by module.

    ``copies`` of the base's by name; ``whole``: the saved modules' parameters by name. ``num_labels`` and
    ``has_own_head``: of the head among the saved modules, else the base's.
    """

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.saved: dict[str, Tensors] = {}
        self.biases: Tensors = {}
        self.replaced: dict[str, Tensors] = {}
        self.copies: Tensors = {}
        self.whole: Tensors = {}
        self.num_labels = 0
        self.has_own_head = False
        self._changed_biases: set[str] = set()
        self._saving: dict[str, bool] = {}

    def run(self, found: SortedTensors, declared: Collection[str]) -> None:
        """``declared``: the method's target modules."""
        self._check_copies(found, declared)
        self.whole = self._sort_named(found, declared)
        self._check_saved(self.whole)
        self._check_biases(declared)

    def _check_copies(self, found: SortedTensors, declared: Collection[str]) -> None:
        # What such an initialisation leaves of the base is stored as if it were the base's.
        residual = takes_from_base(self._findings.config.document)
        for name, tensor in found.copies.items():
            parameter = self._findings.parameter(name)
            if residual and parameter is not None and parameter.rpartition(".")[0] in declared:
                continue
            if parameter is None:
                self._findings.problems.append(f"a copy of {name}, which this base does not have")
            elif tuple(tensor.shape) != self._findings.base.parameters[parameter]:
                self._findings.misshaped(name, tuple(tensor.shape), self._findings.base.parameters[parameter])
            else:
                self.copies[parameter] = tensor

    def _sort_named(self, found: SortedTensors, declared: Collection[str]) -> Tensors:
        """Parameters of saved modules; biases and the like go where they belong."""
        saved: Tensors = {}
        for name, tensor in found.biases.items():
            parameter = self._findings.parameter(f"{name}.bias")
            if parameter is not None and self._findings.naming.actual(name) in declared:
                self._add_bias(parameter, tensor)
            elif self._findings.naming.actual(name) is not None:
                self._findings.problems.append(f"a bias of {name}, which has none or is no target module")
        unknown = []
        biased = self._findings.config.bias == "all"
        for name, tensor in found.named.items():
            parameter = self._findings.parameter(name)
            if parameter is not None and (self._saved_root(parameter) or self._is_tied(parameter)):
                saved[parameter] = tensor
            elif parameter is not None and biased and "bias" in name:
                self._add_bias(parameter, tensor)
            else:
                unknown.append(name)
        if unknown:
            count = "1 tensor" if len(unknown) == 1 else f"{len(unknown)} tensors"
            self._findings.problems.append(f"{count} that nothing declares: {listed(unknown)}")
        return saved

    def _add_bias(self, parameter: str, tensor: torch.Tensor) -> None:
        owner, _, leaf = parameter.rpartition(".")
        expected = self._findings.base.parameters[parameter]
        self._changed_biases.add(parameter)
        if tuple(tensor.shape) != expected:
            self._findings.misshaped(parameter, tuple(tensor.shape), expected)
        elif leaf == "bias" and owner in self._findings.base.shiftable and owner in self._findings.base.called:
            self.biases[owner] = tensor
        else:
            caller = owner
            while caller and caller not in self._findings.base.called:
                caller = caller.rpartition(".")[0]
            self.replaced.setdefault(caller, {})[parameter.removeprefix(caller + ".")] = tensor

    def _check_biases(self, declared: Collection[str]) -> None:
        """PEFT saves all biases of the model, or all of the target modules'."""
        if self._findings.config.bias == "none" or self._findings.config.matcher.problems:
            return
        if self._findings.config.bias == "all":
            expected = {
                n for n in self._findings.base.parameters if n.endswith(".bias") and self._saved_root(n) is None
            }
        else:
            expected = {f"{path}.bias" for path in declared if f"{path}.bias" in self._findings.base.parameters}
        if absent := sorted(expected - self._changed_biases):
            self._findings.problems.append(f"bias={self._findings.config.bias!r}, but the file lacks {listed(absent)}")

    def _saves(self, path: str) -> bool:
        if path not in self._saving:  # asked of every module around every parameter
            self._saving[path] = self._is_saved(path)
        return self._saving[path]

    def _is_saved(self, path: str) -> bool:
        spelled = self._findings.naming.spelled(path)
        if self._findings.config.peft_type == "LN_TUNING" and self._findings.config.targets(spelled):
            return True
        return self._findings.config.saves(spelled)

    def _saved_root(self, parameter: str) -> str | None:
        """Path of the outermost saved module that holds ``parameter``."""
        parts = parameter.split(".")
        paths = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        return next((path for path in paths if self._saves(path)), None)

    def _is_tied(self, parameter: str) -> bool:
        """Whether PEFT's ``ensure_weight_tying`` puts the parameter into the file beside the saved embedding's."""
        owner = parameter.rpartition(".")[0]
        return owner in self._findings.base.tied and bool(self._findings.config.document.get("ensure_weight_tying"))

    def _check_saved(self, saved: Tensors) -> None:
        self._check_saved_names()
        roots = {root for name in self._findings.base.parameters if (root := self._saved_root(name))}
        roots |= {name.rpartition(".")[0] for name in saved if self._saved_root(name) is None}
        self.num_labels = self._count_labels(saved)
        self.has_own_head = any(name in self._findings.base.label_axes for name in saved)
        for root in sorted(roots):
            expected = self._findings.base.parameters_of(root)
            missing = sorted(expected.keys() - saved.keys())
            if missing:
                self._findings.problems.append(f"saved module {root} lacks {listed(missing)}")
            self.saved[root] = {}
            for name in expected.keys() & saved.keys():
                shape = self._findings.base.shape_with_labels(name, self.num_labels)
                if tuple(saved[name].shape) != shape:
                    self._findings.misshaped(name, tuple(saved[name].shape), shape)
                self.saved[root][name.removeprefix(root + ".")] = saved[name]
        random = sorted(name for name in self._findings.base.untrained - saved.keys() if self._saved_root(name) is None)
        if random:
            self._findings.problems.append(
                f"neither the base nor the adapter holds {listed(random)}; "
                "add the module to modules_to_save and train it"
            )

    def _check_saved_names(self) -> None:
        paths = [self._findings.naming.spelled(path) for path in self._findings.base.modules]
        for name in self._findings.config.modules_to_save:
            if name not in _IMPLIED and not any(path.endswith(name) for path in paths):
                self._findings.problems.append(f"modules_to_save names {name!r}, which this base does not have")

    def _count_labels(self, saved: Tensors) -> int:
        counts = {
            name: saved[name].shape[axis]
            for name, axis in self._findings.base.label_axes.items()
            if name in saved and saved[name].dim() > axis
        }
        if 0 in counts.values():
            self._findings.problems.append(
                f"the head has no labels: {[name for name, count in counts.items() if not count]}"
            )
        if len(set(counts.values())) > 1:
            self._findings.problems.append(f"the head's tensors disagree on the number of labels: {counts}")
        return next(iter(counts.values()), self._findings.base.num_labels)
