"""All checks of one adapter, in the order in which they need each other.

What passed is left in the base's own paths; what did not is in the findings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from adapter_router.adapters.coverage.experts import ExpertCheck
from adapter_router.adapters.coverage.findings import Findings, Roles
from adapter_router.adapters.coverage.parameters import ParameterCheck
from adapter_router.adapters.coverage.targets import TargetCheck
from adapter_router.adapters.coverage.tokens import TokenCheck
from adapter_router.adapters.keys import SortedTensors, listed
from adapter_router.adapters.naming import Naming


class Coverage:
    """One pass over one adapter; each check keeps what passed it."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.targets = TargetCheck(findings)
        self.experts = ExpertCheck(findings)
        self.tokens = TokenCheck(findings)
        self.parameters = ParameterCheck(findings)

    def run(self, found: SortedTensors, initial: SortedTensors | None) -> None:
        """Check everything; ``initial``: the adapter before training, where there is one."""
        findings, naming = self._findings, self._findings.naming
        self._report_foreign(found)
        self.experts.run(found)
        roles = {path: {**found.shared, **own} for path, own in _by_path(found.targets, naming).items()}
        roles = {path: own for path, own in roles.items() if path not in self.experts.layers}
        self.targets.run(roles, _by_path(initial.targets, naming) if initial else None)
        if absent := sorted(findings.method.shared - set(found.shared)):
            findings.problems.append(f"tensors are missing: {listed(absent)}")
        self.tokens.run(found.tokens, self.targets.targets)
        self.parameters.run(found, self.targets.declared)
        self._check_ties()
        self._check_called()
        findings.report_misshaped()
        saved = self.parameters
        if not (roles or saved.whole or self.experts.experts or self.tokens.tokens or saved.biases or saved.replaced):
            findings.problems.append("the adapter has no tensor for this base")

    def _report_foreign(self, found: SortedTensors) -> None:
        foreign = found.unknown + self._foreign(found)
        if foreign:
            have = "tensor has" if len(foreign) == 1 else "tensors have"
            self._findings.problems.append(f"{len(foreign)} {have} no place in this base: {listed(foreign)}")
        if found.repeated:
            self._findings.problems.append(f"tensors that contradict each other: {listed(found.repeated)}")

    def _foreign(self, found: SortedTensors) -> list[str]:
        """Names of modules that this base does not have."""
        groups: Iterable[Iterable[str]] = (found.targets, found.expert_layers, found.tokens, found.biases)
        return sorted(name for group in groups for name in group if self._findings.naming.actual(name) is None)

    def _check_ties(self) -> None:
        """What PEFT keeps equal because the base does must be equal in the file, too."""
        if not self._findings.config.document.get("ensure_weight_tying"):
            return
        saved = self.parameters.whole
        weight = saved.get(f"{self._findings.base.embedding}.weight")
        roles = {target.base_path: own for target, own in self.targets.targets.items()}
        table = roles.get(self._findings.base.embedding or "", {})
        for path in self._findings.base.tied:
            own = saved.get(f"{path}.weight")
            if weight is not None and own is not None and not torch.equal(weight, own):
                self._findings.problems.append(
                    f"{path} and {self._findings.base.embedding} are tied, but their saved weights differ"
                )
            head = roles.get(path, {})
            pairs = [(table.get("embedding_b"), head.get("a")), (table.get("embedding_a"), head.get("b"))]
            if any(t is not None and h is not None and not torch.equal(t.mT, h) for t, h in pairs if _is_matrix(t)):
                self._findings.problems.append(
                    f"{path} and {self._findings.base.embedding} are tied, but their LoRA differs"
                )

    def _check_called(self) -> None:
        """A module that the forward pass never calls cannot be changed by changing what it answers."""
        idle = [target for target in self.targets.targets if target.base_path not in self._findings.base.called]
        for target in idle:
            del self.targets.targets[target]
        if idle:
            paths = sorted(target.base_path for target in idle)
            self._findings.warnings.append(
                f"this base never calls {listed(paths)}: LoRA there has no effect, in PEFT neither"
            )
        if self._findings.base.embedding not in self._findings.base.called and any(
            path in self._findings.base.called for path in self._findings.base.tied
        ):
            # It only holds the weight that the tables tied to it compute with.
            self.tokens.tokens.pop(self._findings.base.embedding or "", None)
            self.parameters.saved.pop(self._findings.base.embedding or "", None)
        owners = {parameter.rpartition(".")[0] for parameter in self.experts.experts} | set(self.parameters.replaced)
        touched = owners | set(self.tokens.tokens) | set(self.parameters.biases) | set(self.parameters.saved)
        unused = sorted(path for path in touched if path not in self._findings.base.called)
        if unused:
            self._findings.problems.append(
                f"this base uses these modules' weights without calling them: {listed(unused)}"
            )


def _is_matrix(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.dim() == 2


def _by_path(targets: Mapping[str, Roles], naming: Naming) -> dict[str, Roles]:
    return {path: roles for name, roles in targets.items() if (path := naming.actual(name)) is not None}
