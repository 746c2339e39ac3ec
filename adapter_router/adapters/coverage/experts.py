"""``target_parameters``: LoRA of parameters that belong to no layer type, such as stacks of experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapter_router.adapters.coverage.findings import Findings, Roles, tails
from adapter_router.adapters.keys import SortedTensors, listed


@dataclass(frozen=True)
class Expert:
    """LoRA of one parameter, ``stacked`` for ``count`` experts or a plain matrix; ``transposed``: stored as (in, out).

    A (experts x rank, in), B (out, rank x experts).
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    count: int
    stacked: bool
    transposed: bool


class ExpertCheck:
    """``experts``: what passed, by parameter; ``layers``: their tensors, by module and depth."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.experts: dict[str, Expert] = {}
        self._owners = self._parameter_owners()
        self.layers: dict[str, dict[int, Roles]] = {}

    def run(self, found: SortedTensors) -> None:
        """Find the tensors and check them."""
        self.layers = self._expert_layers(found)
        self._check_experts(self._owners, self.layers)

    def _parameter_owners(self) -> dict[str, list[str]]:
        """Modules with parameters that ``target_parameters`` names, and those parameters in the module's order."""
        names = self._findings.config.document.get("target_parameters") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._findings.problems.append("target_parameters must be a list of names")
            return {}
        if not names:
            return {}
        wanted, matched = set(names), set[str]()
        owners: dict[str, list[str]] = defaultdict(list)
        for parameter in self._findings.base.parameters:
            owner, _, leaf = parameter.rpartition(".")
            spelled = f"{self._findings.naming.spelled(owner)}.{leaf}"
            if hits := wanted.intersection(tails(spelled)):
                owners[owner].append(leaf)
                matched |= hits
        if unmatched := sorted(wanted - matched):
            self._findings.problems.append(
                f"target_parameters names {listed(unmatched)}, which this base does not have"
            )
        return owners

    def _expert_layers(self, found: SortedTensors) -> dict[str, dict[int, Roles]]:
        """PEFT nests one layer a parameter, the first parameter innermost."""
        layers = {
            path: dict(nested)
            for name, nested in found.expert_layers.items()
            if (path := self._findings.naming.actual(name)) is not None
        }
        for name, roles in found.targets.items():
            path = self._findings.naming.actual(name)
            if path is not None and path in self._owners and not self._findings.config.targets(name):
                layers.setdefault(path, {})[0] = roles
        return layers

    def _check_experts(self, owners: Mapping[str, list[str]], layers: Mapping[str, dict[int, Roles]]) -> None:
        if absent := sorted(set(owners) - set(layers)):
            self._findings.problems.append(f"target_parameters of these modules have no tensors: {listed(absent)}")
        if surplus := sorted(set(layers) - set(owners)):
            self._findings.problems.append(
                f"tensors on modules that target_parameters does not name: {listed(surplus)}"
            )
        for owner in sorted(set(owners) & set(layers)):
            leaves = owners[owner]
            for depth in set(range(len(leaves))) | set(layers[owner]):
                leaf = leaves[len(leaves) - 1 - depth] if depth < len(leaves) else ""
                self._check_expert(owner, leaf, layers[owner].get(depth, {}))

    def _check_expert(self, owner: str, leaf: str, roles: Roles) -> None:
        parameter = f"{owner}.{leaf}"
        present = "/".join(f"lora_{role.upper()}" for role in sorted(roles)) or "no tensors"
        if not leaf:
            self._findings.problems.append(f"{owner} has {present} for more parameters than target_parameters names")
            return
        if set(roles) != {"a", "b"}:
            self._findings.problems.append(f"{parameter} needs lora_A and lora_B, it has {present}")
            return
        shape = self._findings.base.parameters[parameter]
        if len(shape) not in (2, 3):
            self._findings.problems.append(f"{parameter} has {len(shape)} dimensions, LoRA acts on 2 or 3")
            return
        spelled = f"{self._findings.naming.spelled(owner)}.{leaf}"
        rank = self._findings.config.rank_of(spelled)
        experts = shape[0] if len(shape) == 3 else 1
        transposed = len(shape) == 3 and owner in self._findings.base.transposed_experts
        rows, columns = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
        for role, expected in (("a", (rank * experts, columns)), ("b", (rows, rank * experts))):
            if tuple(roles[role].shape) != expected:
                self._findings.misshaped(f"{parameter}: lora_{role.upper()}", tuple(roles[role].shape), expected)
        scaling = self._findings.config.scaling_of(spelled, rank)
        self.experts[parameter] = Expert(roles["a"], roles["b"], scaling, experts, len(shape) == 3, transposed)
