"""Configuration + tensors + base -> an adapter that can be served exactly, or every reason why not.

Every tensor must have exactly one role, every declared target must be covered, and every shape must be the base's.
PEFT answers most of these faults with silence. Only names and shapes are looked at here; ``convert`` does the maths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from adapter_router.adapters.adapter_config import (
    COMMON_FIELDS,
    AdapterConfig,
    parse_adapter_config,
    unserved_fields,
)
from adapter_router.adapters.base_spec import BaseSpec
from adapter_router.adapters.checkpoint import read_tensors
from adapter_router.adapters.coverage.coverage import Coverage
from adapter_router.adapters.coverage.experts import Expert
from adapter_router.adapters.coverage.findings import Findings, Roles
from adapter_router.adapters.coverage.parameters import ParameterCheck
from adapter_router.adapters.head_config import HeadConfig, default_activation, label_problems, parse_head_config
from adapter_router.adapters.keys import SortedTensors, sort_tensors
from adapter_router.adapters.manifest import Manifest, parse_manifest
from adapter_router.adapters.methods import METHODS
from adapter_router.adapters.naming import choose_naming
from adapter_router.adapters.tasks import choose_task
from adapter_router.adapters.tuners.lora import changes_base, needs_initial, rounds_base
from adapter_router.adapters.tuners.tuner import Target, Tuner
from adapter_router.errors import AdapterRejected
from adapter_router.types import Activation, AdapterFiles, EmbeddingSettings, TaskKind

_CLASSIFIES = ("text-classification", "token-classification", "image-classification")


@dataclass(frozen=True)
class AdapterTensors:
    """A validated adapter on the host, tensors in the file's dtype, by the base's module paths.

    ``targets``: the method's tensors by role. ``experts``: by parameter. ``tokens``: row numbers and rows.
    ``biases``: new values. ``saved``: whole parameters of replaced modules by their names inside; ``replaced``: single
    parameters by module. ``copies``: what the file says base weights are. ``shared``: the method's own.
    ``invocation``: tokens that switch the adapter on (aLoRA); empty for one that is always on.
    ``base_fingerprint``: the base that its files demand, if they name one.
    """

    method: Tuner
    task: TaskKind
    num_labels: int
    labels: tuple[str, ...]
    activation: Activation
    embedding: EmbeddingSettings
    invocation: tuple[int, ...]
    num_tensors: int
    warnings: tuple[str, ...]
    targets: dict[Target, Roles] = field(default_factory=dict)
    experts: dict[str, Expert] = field(default_factory=dict)
    tokens: dict[str, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    saved: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    replaced: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    copies: dict[str, torch.Tensor] = field(default_factory=dict)
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    base_fingerprint: str | None = None


@dataclass(frozen=True)
class Request:
    """What the one who loads the adapter says about it; None leaves it to the files."""

    task: TaskKind | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Bases:
    """The base under each task's head: ``tasks`` it serves, its own first, and ``spec`` of each."""

    tasks: tuple[TaskKind, ...]
    spec: Callable[[TaskKind], BaseSpec]


def validate(files: AdapterFiles, bases: Bases, request: Request = Request()) -> AdapterTensors:
    """Check an adapter's ``files`` against the base. Raises AdapterRejected with every problem."""
    config, problems = parse_adapter_config(files.config)
    head, head_problems = parse_head_config(files.head_config)
    manifest, manifest_problems = parse_manifest(files.manifest)
    tensors, tensor_problems = read_tensors(files.weights)
    problems += head_problems + manifest_problems + tensor_problems
    method = METHODS.get(config.peft_type) if config else None
    if config is None or method is None or tensors is None:
        if config is not None and method is None:
            given = config.document.get("peft_type")
            fault = "is missing" if given is None else f"{given!r:.80} is not served"
            problems.append(f"peft_type {fault}; served are {', '.join(METHODS)}")
        raise AdapterRejected.because(problems)
    problems += unserved_fields(config.document, COMMON_FIELDS | method.served | method.harmless)
    problems += method.config_problems(config.document)
    found = sort_tensors(tensors, config, method)
    initial, initial_problems = _initial(config, method, files)
    problems += initial_problems
    asked = {"the request": request.task, "adapter_router.json": manifest.task}
    task, task_problems = choose_task(asked, config.task_type, found.module_paths(), bases.tasks)
    problems += task_problems
    if task is None:
        raise AdapterRejected.because(problems)
    base = bases.spec(task)
    problems += _base_problems(base, config, head, manifest)
    naming = choose_naming(base, found.module_paths())
    problems += config.pattern_problems([naming.spelled(path) for path in base.modules])
    findings = Findings(config, method, base, naming, problems)
    coverage = Coverage(findings)
    coverage.run(found, initial)
    problems += [fault for fault in config.matcher.problems.values() if fault not in problems]
    labels, activation, label_faults = _labels(request, head, base, coverage.parameters, named=not problems)
    problems += label_faults
    problems += _embedding_problems(manifest, base)
    if problems:
        raise AdapterRejected.because(problems)
    return AdapterTensors(
        method=method,
        task=task,
        num_labels=coverage.parameters.num_labels,
        labels=labels,
        activation=activation,
        embedding=manifest.embedding or EmbeddingSettings(),
        invocation=coverage.tokens.invocation,
        num_tensors=len(tensors),
        warnings=tuple(findings.warnings),
        targets=coverage.targets.targets,
        experts=coverage.experts.experts,
        tokens=coverage.tokens.tokens,
        biases=coverage.parameters.biases,
        saved=coverage.parameters.saved,
        replaced=coverage.parameters.replaced,
        copies=coverage.parameters.copies,
        shared=found.shared,
        base_fingerprint=manifest.base_fingerprint or config.base_fingerprint,
    )


def _initial(config: AdapterConfig, method: Tuner, files: AdapterFiles) -> tuple[SortedTensors | None, list[str]]:
    """The adapter as it was before training, where its initialisation changed the base."""
    init = config.document.get("init_lora_weights", True)
    if files.initial_weights is None:
        if config.peft_type == "LORA" and needs_initial(init) and not method.config_problems(config.document):
            return None, [
                f"init_lora_weights={init!r:.80} trained against a changed base that cannot be told from the pristine "
                "one: put the adapter as saved right after its initialisation into initial/adapter_model.safetensors, "
                "or convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
            ]
        return None, []
    if not (config.peft_type == "LORA" and changes_base(init)):
        return None, [f"initial/ is for initialisations that change the base, init_lora_weights is {init!r:.80}"]
    tensors, problems = read_tensors(files.initial_weights)
    problems = [f"initial: {problem}" for problem in problems]
    return (sort_tensors(tensors, config, method) if tensors is not None else None), problems


def _base_problems(base: BaseSpec, config: AdapterConfig, head: HeadConfig, manifest: Manifest) -> list[str]:
    problems = []
    if head.model_type is not None and head.model_type != base.model_type:
        problems.append(f"adapter was trained on a {head.model_type!r} model, this base is {base.model_type!r}")
    stated = {manifest.base_fingerprint, config.base_fingerprint} - {None}
    problems += [
        f"adapter was trained on the base {fingerprint:.80}, this one is {base.fingerprint}: serve it on that base"
        for fingerprint in sorted(map(str, stated))
        if fingerprint != base.fingerprint
    ]
    if config.peft_type == "LORA" and rounds_base(config.document) and not stated:
        problems.append(
            "init_lora_weights='loftq' was trained on a quantised base that PEFT made in memory, and nothing says that "
            "it is this one: write that base with adapter-router quantize --method loftq, serve it, and name its "
            f"fingerprint as base_fingerprint in the adapter's adapter_router.json; this base is {base.fingerprint}"
        )
    return problems


def _embedding_problems(manifest: Manifest, base: BaseSpec) -> list[str]:
    settings = manifest.embedding
    if settings is None:
        return []
    if base.task != "embedding":
        return [f"adapter_router.json: pooling and the like belong to embeddings, the task is {base.task}"]
    width = base.parameters[f"{base.embedding}.weight"][1] if base.embedding else None
    if settings.dimensions and width and settings.dimensions > width:
        return [f"adapter_router.json: dimensions is {settings.dimensions}, the base has {width}"]
    return []


def _labels(
    request: Request, head: HeadConfig, base: BaseSpec, parameters: ParameterCheck, *, named: bool
) -> tuple[tuple[str, ...], Activation, list[str]]:
    """Label names: the caller's, the directory's, the base's for its own head, or transformers' ``LABEL_0``….

    ``named`` False: the last are not made up, because the adapter is refused anyhow and its number of labels absurd.
    """
    if base.task not in _CLASSIFIES:
        return (), "none", ["labels are given, but the task has none"] if request.labels else []
    count = parameters.num_labels
    names = request.labels if request.labels is not None else head.labels
    activation = head.activation
    if parameters.has_own_head:
        activation = activation or _default_activation(base.task, count)
    else:  # the base's head, names and activation included
        activation = activation or base.activation
        names = names if names is not None else base.labels
    if names is None:
        return tuple(f"LABEL_{index}" for index in range(count)) if named else (), activation, []
    problems = label_problems(request.labels) if request.labels is not None else []
    if count and len(names) != count:
        problems.append(f"{len(names)} label names for a head of {count} labels")
    return names, activation, problems


def _default_activation(task: TaskKind, count: int) -> Activation:
    return default_activation(count) if task == "text-classification" else "softmax"
