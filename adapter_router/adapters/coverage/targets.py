"""The modules that a method acts on: all declared ones are there, no others, and every tensor fits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from adapter_router.adapters.coverage.findings import Findings, Roles
from adapter_router.adapters.keys import listed
from adapter_router.adapters.tuners.lora import takes_from_base
from adapter_router.adapters.tuners.tuner import Target


class TargetCheck:
    """``targets``: what passed; ``declared``: what PEFT would put the method on."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._lacking: dict[str, list[str]] = defaultdict(list)
        self._surplus: dict[str, list[str]] = defaultdict(list)
        # Where the method's own fields are faulty, what they ask of the tensors is not known.
        config = findings.config
        self._understood = config.ranks_known and not findings.method.config_problems(config.document)
        self.declared: set[str] = set()
        self.targets: dict[Target, Roles] = {}

    def run(self, roles: Mapping[str, Roles], before: Mapping[str, Roles] | None) -> None:
        """``roles`` by the base's path; ``before``: those of the adapter as it was before training."""
        base, method = self._findings.base, self._findings.method
        self._check_declared(set(roles))
        for path, present in roles.items():
            able = path in base.targets and base.targets[path].kind in method.kinds
            if able and self._understood:
                self._check_target(path, present, before)
        self._report_incomplete()

    def _check_declared(self, present: set[str]) -> None:
        if self._findings.config.matcher.problems:
            return  # what the patterns mean is not known
        declared = self.declared = self._declared()
        if self._findings.method.kinds and not (declared or self._findings.config.document.get("target_parameters")):
            self._findings.problems.append("target_modules, with what narrows it, names no module of this base")
        missing = sorted(declared - present)
        if missing:
            have = "target module has" if len(missing) == 1 else "target modules have"
            self._findings.problems.append(f"{len(missing)} {have} no tensors: {listed(missing)}")
        tied = set(self._findings.base.tied) if self._findings.config.document.get("ensure_weight_tying") else set()
        extra = present - declared - tied
        able = {
            p
            for p in extra
            if p in self._findings.base.targets and self._findings.base.targets[p].kind in self._findings.method.kinds
        }
        if able:
            self._findings.problems.append(
                f"tensors on modules that target_modules does not name: {listed(sorted(able))}"
            )
        if extra - able:
            self._findings.problems.append(
                f"modules that {self._findings.config.peft_type} cannot act on: {listed(sorted(extra - able))}"
            )

    def _declared(self) -> set[str]:
        """Modules that PEFT would put the method on."""
        declared = {
            path
            for path, spec in self._findings.base.targets.items()
            if spec.kind in self._findings.method.kinds
            and self._findings.config.targets(self._findings.naming.spelled(path))
        }
        # The output projection of a targeted attention goes with it.
        return {path for path in declared if not self._is_attention(path.rpartition(".")[0], declared)}

    def _is_attention(self, path: str, declared: set[str]) -> bool:
        return path in declared and self._findings.base.targets[path].kind == "attention"

    def _check_target(self, path: str, present: Roles, before: Mapping[str, Roles] | None) -> None:
        spelled = self._findings.naming.spelled(path)
        target = Target(spelled, path, self._findings.base.targets[path], self._findings.config)
        changed = before is not None and target.spec.kind == "linear"
        if before is not None and changed:
            first = before.get(path, {})
            present = {**present, **{f"{role}0": first[role] for role in ("a", "b") if role in first}}
        shapes = {role: tuple(tensor.shape) for role, tensor in present.items()}
        expected = self._findings.method.shapes(target, shapes)
        if not expected:
            self._findings.problems.append(f"{self._findings.config.peft_type} cannot act on {path}, in PEFT neither")
            return
        shared = self._findings.base.tied and path in (self._findings.base.embedding, *self._findings.base.tied)
        if shared and target.spec.kind == "linear" and takes_from_base(self._findings.config.document):
            self._findings.problems.append(
                f"{path} shares its weight with {self._findings.base.embedding}: an initialisation that takes part of "
                "it would change both"
            )
        wanted = set(expected) | ({"a0", "b0"} if changed else set())
        for role in sorted(wanted - set(shapes)):
            self._lacking[self._suffix(role)].append(path)
        for role in sorted(set(shapes) - wanted):
            self._surplus[self._suffix(role)].append(path)
        for role in sorted(wanted & set(shapes) & set(expected)):
            if shapes[role] != tuple(expected[role]) and not self._findings.config.matcher.problems:
                self._findings.misshaped(f"{path}.{self._suffix(role)}", shapes[role], expected[role])
        overlaps = self._findings.config.overlapping_patterns(spelled)
        if overlaps:
            self._findings.warnings.append(
                f"{path}: patterns {overlaps} also match; the first in the file was taken, as in PEFT"
            )
        self.targets[target] = present

    def _suffix(self, role: str) -> str:
        """A role as the file spells it."""
        return next((suffix for suffix, known in self._findings.method.roles.items() if known == role), role)

    def _report_incomplete(self) -> None:
        for suffix, paths in sorted(self._lacking.items()):
            self._findings.problems.append(f"{suffix} is missing on {_modules(paths)}")
        for suffix, paths in sorted(self._surplus.items()):
            self._findings.problems.append(
                f"{suffix} is there on {_modules(paths)}, but the configuration does not call for it"
            )


def _modules(paths: list[str]) -> str:
    return f"{len(paths)} module{'s' if len(paths) > 1 else ''}: {listed(sorted(paths))}"
