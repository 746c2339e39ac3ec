"""Configuration + tensors + base -> an adapter that can be served exactly, or every reason why not.

Every tensor must have exactly one role, every declared target must be covered, and every shape must be the base's.
PEFT answers most of these faults with silence. Only names and shapes are looked at here; ``convert`` does the maths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from adapter_router.adapters.adapter_config import (
    COMMON_FIELDS,
    AdapterConfig,
    parse_adapter_config,
    unserved_fields,
)
from adapter_router.adapters.adapter_tensors import AdapterTensors
from adapter_router.adapters.base_spec import BaseSpec
from adapter_router.adapters.checkpoint import read_tensors
from adapter_router.adapters.coverage.coverage import Coverage
from adapter_router.adapters.coverage.findings import Findings
from adapter_router.adapters.forms import Forms, form_of
from adapter_router.adapters.head_config import HeadConfig, default_activation, label_problems, parse_head_config
from adapter_router.adapters.keys import SortedTensors, sort_tensors
from adapter_router.adapters.manifest import Manifest, parse_manifest
from adapter_router.adapters.methods import METHODS
from adapter_router.adapters.naming import choose_naming
from adapter_router.adapters.tasks import choose_task
from adapter_router.adapters.tuners.lora import changes_base, needs_initial, rounds_base
from adapter_router.adapters.tuners.tuner import Tuner
from adapter_router.errors import AdapterRejected
from adapter_router.types import Activation, AdapterFiles, EmbeddingSettings, TaskKind

_CLASSIFIES = ("text-classification", "token-classification", "image-classification")


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


def validate(
    files: AdapterFiles, bases: Bases, request: Request = Request(), forms: Forms | None = None
) -> AdapterTensors:
    """Check an adapter's ``files`` against the base. Raises AdapterRejected with every problem.

    ``forms``: those that passed on this base; another of the same form is not looked at again but for its numbers.
    """
    if forms is not None and (known := _of_known_form(files, bases, request, forms)) is not None:
        return known
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
    counted = coverage.parameters.num_labels, coverage.parameters.has_own_head
    labels, activation, label_faults = _labels(request, head, base, *counted, named=not problems)
    problems += label_faults
    problems += _embedding_problems(manifest, base)
    if problems:
        raise AdapterRejected.because(problems)
    adapter = AdapterTensors(
        method=method,
        task=task,
        num_labels=coverage.parameters.num_labels,
        has_own_head=coverage.parameters.has_own_head,
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
    if forms is not None and files.initial_weights is None and not config.document.get("ensure_weight_tying"):
        forms.learn(form_of(files, request.task), adapter, tensors)  # elsewhere the numbers were compared, too
    return adapter


def _of_known_form(files: AdapterFiles, bases: Bases, request: Request, forms: Forms) -> AdapterTensors | None:
    """What ``validate`` would make of files of a form that passed; None where it has to look for itself."""
    form = form_of(files, request.task)
    if files.initial_weights is not None or form not in forms:
        return None
    tensors, problems = read_tensors(files.weights)
    head, head_problems = parse_head_config(files.head_config)
    if tensors is None or (adapter := forms.find(form, tensors)) is None:
        return None
    base = bases.spec(adapter.task)
    counted = adapter.num_labels, adapter.has_own_head
    labels, activation, label_faults = _labels(request, head, base, *counted, named=True)
    if problems or head_problems or label_faults or head.model_type not in (None, base.model_type):
        return None
    return replace(adapter, labels=labels, activation=activation)


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
    request: Request, head: HeadConfig, base: BaseSpec, count: int, has_own_head: bool, *, named: bool
) -> tuple[tuple[str, ...], Activation, list[str]]:
    """Label names: the caller's, the directory's, the base's for its own head, or transformers' ``LABEL_0``….

    ``count`` of them. ``named`` False: the last are not made up, because the adapter is refused anyhow and their number
    absurd.
    """
    if base.task not in _CLASSIFIES:
        return (), "none", ["labels are given, but the task has none"] if request.labels else []
    names = request.labels if request.labels is not None else head.labels
    activation = head.activation
    if has_own_head:
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
