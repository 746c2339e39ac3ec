"""Whether an adapter's tensors and its configuration cover each other, and fit the base.

Findings gather in ``problems``; what passed is left in the base's own paths.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adapter_router.adapters.adapter_config import IMPLIED_SAVED, AdapterConfig
from adapter_router.adapters.base_spec import BaseSpec, Shape
from adapter_router.adapters.keys import SortedTensors, Tensors, listed
from adapter_router.adapters.naming import Naming
from adapter_router.adapters.tuners.tuner import Target, Tuner

Roles = dict[str, torch.Tensor]
_IMPLIED = {name for names in IMPLIED_SAVED.values() for name in names}
_MAX_INVOCATION = 1000
_SPELLED_OUT = 16


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


class Coverage:
    """One pass over one adapter."""

    def __init__(
        self, config: AdapterConfig, method: Tuner, base: BaseSpec, naming: Naming, problems: list[str]
    ) -> None:
        self._config = config
        self._method = method
        self._base = base
        self._naming = naming
        self._problems = problems
        self._lacking: dict[str, list[str]] = defaultdict(list)
        self._surplus: dict[str, list[str]] = defaultdict(list)
        self._misshapes: list[str] = []
        self._declared_once: set[str] = set()
        self._changed_biases: set[str] = set()
        # Where the method's own fields are faulty, what they ask of the tensors is not known.
        self._understood = config.sound and not method.config_problems(config.document)
        self.warnings: list[str] = []
        self.targets: dict[Target, Roles] = {}
        self.experts: dict[str, Expert] = {}
        self.tokens: dict[str, tuple[tuple[int, ...], torch.Tensor]] = {}
        self.biases: Tensors = {}
        self.saved: dict[str, Tensors] = {}
        self.replaced: dict[str, Tensors] = {}
        self.copies: Tensors = {}
        self.invocation: tuple[int, ...] = ()
        self.num_labels = 0
        self.has_own_head = False

    def run(self, found: SortedTensors, initial: SortedTensors | None) -> None:
        """Check everything; see the attributes for what was found good."""
        foreign = found.unknown + self._foreign(found)
        if foreign:
            have = "tensor has" if len(foreign) == 1 else "tensors have"
            self._problems.append(f"{len(foreign)} {have} no place in this base: {listed(foreign)}")
        if found.repeated:
            self._problems.append(f"tensors that contradict each other: {listed(found.repeated)}")
        owners = self._parameter_owners()
        layers = self._expert_layers(found, owners)
        roles = {path: {**found.shared, **own} for path, own in _by_path(found.targets, self._naming).items()}
        roles = {path: own for path, own in roles.items() if path not in layers}
        before = _by_path(initial.targets, self._naming) if initial else None
        self._check_declared(set(roles))
        for path, present in roles.items():
            able = path in self._base.targets and self._base.targets[path].kind in self._method.kinds
            if able and self._understood:
                self._check_target(path, present, before)
        self._report_incomplete()
        if set(self._method.shared) - set(found.shared):
            self._problems.append(
                f"tensors are missing: {listed(sorted(set(self._method.shared) - set(found.shared)))}"
            )
        self._check_experts(owners, layers)
        self._check_tokens(found.tokens)
        self._check_invocation()
        self._check_copies(found)
        saved = self._sort_named(found)
        self._check_saved(saved)
        self._check_biases()
        self._check_ties(saved)
        self._check_called()
        self._report_misshaped()
        if not (roles or saved or self.experts or self.tokens or self.biases or self.replaced):
            self._problems.append("the adapter has no tensor for this base")

    # -- names ---------------------------------------------------------------------------------------------------

    def _foreign(self, found: SortedTensors) -> list[str]:
        """Names of modules that this base does not have."""
        groups: Iterable[Iterable[str]] = (found.targets, found.expert_layers, found.tokens, found.biases)
        return sorted(name for group in groups for name in group if self._naming.actual(name) is None)

    def _parameter(self, name: str) -> str | None:
        """The base's name of the parameter that the file calls ``name``."""
        owner, _, leaf = name.rpartition(".")
        path = self._naming.actual(owner) if owner else ""
        full = f"{path}.{leaf}" if path else leaf
        return full if path is not None and full in self._base.parameters else None

    # -- targets -------------------------------------------------------------------------------------------------

    def _declared(self) -> set[str]:
        """Modules that PEFT would put the method on."""
        declared = {
            path
            for path, spec in self._base.targets.items()
            if spec.kind in self._method.kinds and self._config.targets(self._naming.spelled(path))
        }
        # The output projection of a targeted attention goes with it.
        return {path for path in declared if not self._is_attention(path.rpartition(".")[0], declared)}

    def _is_attention(self, path: str, declared: set[str]) -> bool:
        return path in declared and self._base.targets[path].kind == "attention"

    def _check_declared(self, present: set[str]) -> None:
        if self._config.matcher.problems:
            return  # what the patterns mean is not known
        declared = self._declared_once = self._declared()
        if self._method.kinds and not (declared or self._config.document.get("target_parameters")):
            self._problems.append("target_modules, with what narrows it, names no module of this base")
        missing = sorted(declared - present)
        if missing:
            have = "target module has" if len(missing) == 1 else "target modules have"
            self._problems.append(f"{len(missing)} {have} no tensors: {listed(missing)}")
        tied = set(self._base.tied) if self._config.document.get("ensure_weight_tying") else set()
        extra = present - declared - tied
        able = {p for p in extra if p in self._base.targets and self._base.targets[p].kind in self._method.kinds}
        if able:
            self._problems.append(f"tensors on modules that target_modules does not name: {listed(sorted(able))}")
        if extra - able:
            self._problems.append(
                f"modules that {self._config.peft_type} cannot act on: {listed(sorted(extra - able))}"
            )

    def _check_target(self, path: str, present: Roles, before: Mapping[str, Roles] | None) -> None:
        spelled = self._naming.spelled(path)
        target = Target(spelled, path, self._base.targets[path], self._config)
        changed = before is not None and target.spec.kind == "linear"
        if before is not None and changed:
            first = before.get(path, {})
            present = {**present, **{f"{role}0": first[role] for role in ("a", "b") if role in first}}
        shapes = {role: tuple(tensor.shape) for role, tensor in present.items()}
        expected = self._method.shapes(target, shapes)
        if not expected:
            self._problems.append(f"{self._config.peft_type} cannot act on {path}, in PEFT neither")
            return
        wanted = set(expected) | ({"a0", "b0"} if changed else set())
        for role in sorted(wanted - set(shapes)):
            self._lacking[self._suffix(role)].append(path)
        for role in sorted(set(shapes) - wanted):
            self._surplus[self._suffix(role)].append(path)
        for role in sorted(wanted & set(shapes) & set(expected)):
            if shapes[role] != tuple(expected[role]) and not self._config.matcher.problems:
                self._misshaped(f"{path}.{self._suffix(role)}", shapes[role], expected[role])
        overlaps = self._config.overlapping_patterns(spelled)
        if overlaps:
            self.warnings.append(f"{path}: patterns {overlaps} also match; the first in the file was taken, as in PEFT")
        self.targets[target] = present

    def _suffix(self, role: str) -> str:
        """A role as the file spells it."""
        return next((suffix for suffix, known in self._method.roles.items() if known == role), role)

    def _report_incomplete(self) -> None:
        for suffix, paths in sorted(self._lacking.items()):
            self._problems.append(f"{suffix} is missing on {_modules(paths)}")
        for suffix, paths in sorted(self._surplus.items()):
            self._problems.append(f"{suffix} is there on {_modules(paths)}, but the configuration does not call for it")

    # -- experts -------------------------------------------------------------------------------------------------

    def _parameter_owners(self) -> dict[str, list[str]]:
        """Modules with parameters that ``target_parameters`` names, and those parameters in the module's order."""
        names = self._config.document.get("target_parameters") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._problems.append("target_parameters must be a list of names")
            return {}
        owners: dict[str, list[str]] = defaultdict(list)
        matched = set()
        for parameter in self._base.parameters:
            owner, _, leaf = parameter.rpartition(".")
            spelled = f"{self._naming.spelled(owner)}.{leaf}"
            hits = {name for name in names if _tail(spelled, name)}
            if hits:
                owners[owner].append(leaf)
            matched |= hits
        if unmatched := sorted(set(names) - matched):
            self._problems.append(f"target_parameters names {listed(unmatched)}, which this base does not have")
        return owners

    def _expert_layers(self, found: SortedTensors, owners: Mapping[str, list[str]]) -> dict[str, dict[int, Roles]]:
        """The tensors of ``owners``: PEFT nests one layer a parameter, the first parameter innermost."""
        layers = {
            path: dict(nested)
            for name, nested in found.expert_layers.items()
            if (path := self._naming.actual(name)) is not None
        }
        for name, roles in found.targets.items():
            path = self._naming.actual(name)
            if path is not None and path in owners and not self._config.targets(name):
                layers.setdefault(path, {})[0] = roles
        return layers

    def _check_experts(self, owners: Mapping[str, list[str]], layers: Mapping[str, dict[int, Roles]]) -> None:
        if absent := sorted(set(owners) - set(layers)):
            self._problems.append(f"target_parameters of these modules have no tensors: {listed(absent)}")
        if surplus := sorted(set(layers) - set(owners)):
            self._problems.append(f"tensors on modules that target_parameters does not name: {listed(surplus)}")
        for owner in sorted(set(owners) & set(layers)):
            leaves = owners[owner]
            for depth in set(range(len(leaves))) | set(layers[owner]):
                leaf = leaves[len(leaves) - 1 - depth] if depth < len(leaves) else ""
                self._check_expert(owner, leaf, layers[owner].get(depth, {}))

    def _check_expert(self, owner: str, leaf: str, roles: Roles) -> None:
        parameter = f"{owner}.{leaf}"
        present = "/".join(f"lora_{role.upper()}" for role in sorted(roles)) or "no tensors"
        if not leaf:
            self._problems.append(f"{owner} has {present} for more parameters than target_parameters names")
            return
        if set(roles) != {"a", "b"}:
            self._problems.append(f"{parameter} needs lora_A and lora_B, it has {present}")
            return
        shape = self._base.parameters[parameter]
        if len(shape) not in (2, 3):
            self._problems.append(f"{parameter} has {len(shape)} dimensions, LoRA acts on 2 or 3")
            return
        spelled = f"{self._naming.spelled(owner)}.{leaf}"
        rank = self._config.rank_of(spelled)
        experts = shape[0] if len(shape) == 3 else 1
        transposed = len(shape) == 3 and owner in self._base.transposed_experts
        rows, columns = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
        for role, expected in (("a", (rank * experts, columns)), ("b", (rows, rank * experts))):
            if tuple(roles[role].shape) != expected:
                self._misshaped(f"{parameter}: lora_{role.upper()}", tuple(roles[role].shape), expected)
        scaling = self._config.scaling_of(spelled, rank)
        self.experts[parameter] = Expert(roles["a"], roles["b"], scaling, experts, len(shape) == 3, transposed)

    # -- tokens --------------------------------------------------------------------------------------------------

    def _check_tokens(self, tokens: Tensors) -> None:
        indices = self._config.document.get("trainable_token_indices") or self._config.document.get("token_indices")
        wanted: dict[str, tuple[int, ...]] = {}
        for name in tokens:
            path = self._naming.actual(name)
            if path is not None:
                wanted[path] = self._token_ids(indices, name)
        if tokens and not indices:
            self._problems.append(f"rows of tokens of {listed(tokens)}, but the configuration names no token indices")
        if indices and not tokens:
            self._problems.append("the configuration names token indices, but the file has no trainable_tokens_delta")
        if isinstance(indices, dict) and len(wanted) < len(indices):
            self._problems.append(
                f"token indices are given for {listed(map(str, indices))}, but rows only for {listed(sorted(wanted))}"
            )
        for name, rows in tokens.items():
            path = self._naming.actual(name)
            if path is None:
                continue
            self._check_token_rows(path, wanted[path], rows)
        replaced = self.tokens.get(self._base.embedding or "")
        if replaced is not None:
            self.tokens = {**dict.fromkeys(self._base.tied, replaced), **self.tokens}

    def _token_ids(self, indices: Any, name: str) -> tuple[int, ...]:
        if isinstance(indices, dict):
            indices = next((ids for key, ids in indices.items() if _tail(name, str(key))), [])
        good = isinstance(indices, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in indices)
        return tuple(indices) if good else ()

    def _check_token_rows(self, path: str, ids: tuple[int, ...], rows: torch.Tensor) -> None:
        shape = self._base.parameters.get(f"{path}.weight", ())
        if not self._names_tokens(path):
            self._problems.append(
                f"the file replaces rows of {path}, which the configuration's token indices are not for"
            )
        if len(shape) != 2 or path not in self._base.targets:
            self._problems.append(f"{path} is no embedding whose rows could be replaced")
        elif len(set(ids)) != len(ids) or not all(0 <= index < shape[0] for index in ids):
            self._problems.append(f"{path}: token indices must be different and lie in 0 to {shape[0] - 1}")
        elif tuple(rows.shape) != (len(ids), shape[1]):
            self._misshaped(f"{path}.trainable_tokens_delta", tuple(rows.shape), (len(ids), shape[1]))
        else:
            self.tokens[path] = (ids, rows)
        if any(target.base_path == path for target in self.targets):
            self._problems.append(
                f"{path} has both replaced rows and {self._config.peft_type}; PEFT has no rule for it"
            )

    def _names_tokens(self, path: str) -> bool:
        """Whether the configuration's token numbers are rows of ``path``: a plain list means the input embedding's."""
        if path in self._base.tied:
            return True  # PEFT replaces them wherever the table's weight is used
        if self._config.peft_type == "TRAINABLE_TOKENS":
            return self._config.targets(self._naming.spelled(path))
        by_name = isinstance(self._config.document.get("trainable_token_indices"), dict)
        return by_name or path == self._base.embedding

    def _check_invocation(self) -> None:
        tokens = self._config.document.get("alora_invocation_tokens")
        if not tokens:
            return
        good = isinstance(tokens, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in tokens)
        self.invocation = tuple(tokens) if good else ()
        if not good or len(tokens) > _MAX_INVOCATION:
            self._problems.append(f"alora_invocation_tokens must be a list of at most {_MAX_INVOCATION} token ids")
        if self._base.task != "text-generation":
            self._problems.append(
                f"alora_invocation_tokens belong to causal language models, the task is {self._base.task}"
            )
        if self._config.document.get("use_dora") or any(t.spec.kind != "linear" for t in self.targets):
            self._problems.append("alora_invocation_tokens act on linear layers without use_dora only")

    # -- whole parameters ----------------------------------------------------------------------------------------

    def _check_copies(self, found: SortedTensors) -> None:
        for name, tensor in found.copies.items():
            parameter = self._parameter(name)
            if parameter is None:
                self._problems.append(f"a copy of {name}, which this base does not have")
            elif tuple(tensor.shape) != self._base.parameters[parameter]:
                self._misshaped(name, tuple(tensor.shape), self._base.parameters[parameter])
            else:
                self.copies[parameter] = tensor

    def _sort_named(self, found: SortedTensors) -> Tensors:
        """Parameters of saved modules; biases and the like go where they belong."""
        saved: Tensors = {}
        for name, tensor in found.biases.items():
            parameter = self._parameter(f"{name}.bias")
            if parameter is not None and self._naming.actual(name) in self._declared_once:
                self._add_bias(parameter, tensor)
            elif self._naming.actual(name) is not None:
                self._problems.append(f"a bias of {name}, which has none or is no target module")
        unknown = []
        biased = self._config.bias == "all"
        for name, tensor in found.named.items():
            parameter = self._parameter(name)
            if parameter is not None and (self._saved_root(parameter) or self._is_tied(parameter)):
                saved[parameter] = tensor
            elif parameter is not None and biased and "bias" in name:
                self._add_bias(parameter, tensor)
            else:
                unknown.append(name)
        if unknown:
            count = "1 tensor" if len(unknown) == 1 else f"{len(unknown)} tensors"
            self._problems.append(f"{count} that nothing declares: {listed(unknown)}")
        return saved

    def _check_biases(self) -> None:
        """PEFT saves all biases of the model, or all of the target modules'."""
        if self._config.bias == "none" or self._config.matcher.problems:
            return
        if self._config.bias == "all":
            expected = {n for n in self._base.parameters if n.endswith(".bias") and self._saved_root(n) is None}
        else:
            expected = {f"{path}.bias" for path in self._declared_once if f"{path}.bias" in self._base.parameters}
        if absent := sorted(expected - self._changed_biases):
            self._problems.append(f"bias={self._config.bias!r}, but the file lacks {listed(absent)}")

    def _check_ties(self, saved: Tensors) -> None:
        """What PEFT keeps equal because the base does must be equal in the file, too."""
        if not self._config.document.get("ensure_weight_tying"):
            return
        weight = saved.get(f"{self._base.embedding}.weight")
        roles = {target.base_path: own for target, own in self.targets.items()}
        table = roles.get(self._base.embedding or "", {})
        for path in self._base.tied:
            own = saved.get(f"{path}.weight")
            if weight is not None and own is not None and not torch.equal(weight, own):
                self._problems.append(f"{path} and {self._base.embedding} are tied, but their saved weights differ")
            head = roles.get(path, {})
            pairs = [(table.get("embedding_b"), head.get("a")), (table.get("embedding_a"), head.get("b"))]
            if any(t is not None and h is not None and not torch.equal(t.mT, h) for t, h in pairs if _is_matrix(t)):
                self._problems.append(f"{path} and {self._base.embedding} are tied, but their LoRA differs")

    def _add_bias(self, parameter: str, tensor: torch.Tensor) -> None:
        owner, _, leaf = parameter.rpartition(".")
        expected = self._base.parameters[parameter]
        self._changed_biases.add(parameter)
        if tuple(tensor.shape) != expected:
            self._misshaped(parameter, tuple(tensor.shape), expected)
        elif leaf == "bias" and owner in self._base.shiftable and owner in self._base.called:
            self.biases[owner] = tensor
        else:
            caller = owner
            while caller and caller not in self._base.called:
                caller = caller.rpartition(".")[0]
            self.replaced.setdefault(caller, {})[parameter.removeprefix(caller + ".")] = tensor

    def _saves(self, path: str) -> bool:
        spelled = self._naming.spelled(path)
        if self._config.peft_type == "LN_TUNING" and self._config.targets(spelled):
            return True
        return self._config.saves(spelled)

    def _saved_root(self, parameter: str) -> str | None:
        """Path of the outermost saved module that holds ``parameter``."""
        parts = parameter.split(".")
        paths = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        return next((path for path in paths if self._saves(path)), None)

    def _is_tied(self, parameter: str) -> bool:
        """Whether PEFT's ``ensure_weight_tying`` puts the parameter into the file beside the saved embedding's."""
        owner = parameter.rpartition(".")[0]
        return owner in self._base.tied and bool(self._config.document.get("ensure_weight_tying"))

    def _check_saved(self, saved: Tensors) -> None:
        self._check_saved_names()
        roots = {root for name in self._base.parameters if (root := self._saved_root(name))}
        roots |= {name.rpartition(".")[0] for name in saved if self._saved_root(name) is None}
        self.num_labels = self._count_labels(saved)
        self.has_own_head = any(name in self._base.label_axes for name in saved)
        for root in sorted(roots):
            expected = self._base.parameters_of(root)
            missing = sorted(expected.keys() - saved.keys())
            if missing:
                self._problems.append(f"saved module {root} lacks {listed(missing)}")
            self.saved[root] = {}
            for name in expected.keys() & saved.keys():
                shape = self._base.shape_with_labels(name, self.num_labels)
                if tuple(saved[name].shape) != shape:
                    self._misshaped(name, tuple(saved[name].shape), shape)
                self.saved[root][name.removeprefix(root + ".")] = saved[name]
        random = sorted(name for name in self._base.untrained - saved.keys() if self._saved_root(name) is None)
        if random:
            self._problems.append(
                f"neither the base nor the adapter holds {listed(random)}; "
                "add the module to modules_to_save and train it"
            )

    def _check_saved_names(self) -> None:
        paths = [self._naming.spelled(path) for path in self._base.modules]
        for name in self._config.modules_to_save:
            if name not in _IMPLIED and not any(path.endswith(name) for path in paths):
                self._problems.append(f"modules_to_save names {name!r}, which this base does not have")

    def _count_labels(self, saved: Tensors) -> int:
        counts = {
            name: saved[name].shape[axis]
            for name, axis in self._base.label_axes.items()
            if name in saved and saved[name].dim() > axis
        }
        if 0 in counts.values():
            self._problems.append(f"the head has no labels: {[name for name, count in counts.items() if not count]}")
        if len(set(counts.values())) > 1:
            self._problems.append(f"the head's tensors disagree on the number of labels: {counts}")
        return next(iter(counts.values()), self._base.num_labels)

    def _check_called(self) -> None:
        """A module that the forward pass never calls cannot be changed by changing what it answers."""
        idle = [target for target in self.targets if target.base_path not in self._base.called]
        for target in idle:
            del self.targets[target]
        if idle:
            paths = sorted(target.base_path for target in idle)
            self.warnings.append(f"this base never calls {listed(paths)}: LoRA there has no effect, in PEFT neither")
        if self._base.embedding not in self._base.called and any(path in self._base.called for path in self._base.tied):
            # It only holds the weight that the tables tied to it compute with.
            self.tokens.pop(self._base.embedding or "", None)
            self.saved.pop(self._base.embedding or "", None)
        owners = {parameter.rpartition(".")[0] for parameter in self.experts} | set(self.replaced)
        touched = owners | set(self.tokens) | set(self.biases) | set(self.saved)
        unused = sorted(path for path in touched if path not in self._base.called)
        if unused:
            self._problems.append(f"this base uses these modules' weights without calling them: {listed(unused)}")

    def _misshaped(self, name: str, actual: Shape, expected: Shape) -> None:
        self._misshapes.append(f"{name} has shape {list(actual)}, this base and config need {list(expected)}")

    def _report_misshaped(self) -> None:
        self._problems += self._misshapes[:_SPELLED_OUT]
        if len(self._misshapes) > _SPELLED_OUT:
            self._problems.append(f"{len(self._misshapes) - _SPELLED_OUT} more tensors have other shapes than needed")


def _is_matrix(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.dim() == 2


def _modules(paths: list[str]) -> str:
    return f"{len(paths)} module{'s' if len(paths) > 1 else ''}: {listed(sorted(paths))}"


def _tail(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _by_path(targets: Mapping[str, Roles], naming: Naming) -> dict[str, Roles]:
    return {path: roles for name, roles in targets.items() if (path := naming.actual(name)) is not None}
