"""Several adapters of one base -> one adapter, as a normal PEFT directory: all of it, or every reason why not.

The inputs pass the admission of serving, and so does the result before it is moved into place.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adapter_router.adapters.delta import AdapterDelta, ModuleDelta
from adapter_router.adapters.keys import listed
from adapter_router.adapters.tuners.tuner import Weights
from adapter_router.adapters.weighted_sum import Part as Summand
from adapter_router.adapters.weighted_sum import weighted_sum
from adapter_router.catalog.location import resolve
from adapter_router.catalog.store import ContentStore
from adapter_router.config import EngineConfig
from adapter_router.engine.base_model import BaseModel, PreparedTask
from adapter_router.engine.reading import Reader
from adapter_router.errors import AdapterRejected
from adapter_router.merging import biases, peft_directory
from adapter_router.merging.combination import Settings
from adapter_router.merging.compatibility import default_rank, layer_problems, layer_terms, takes_cat, task_problems
from adapter_router.merging.heads import Head, Saved, changed_heads, choose_head, head_problems, no_head
from adapter_router.merging.loading import LoadedPart, load_parts, unmergeable
from adapter_router.merging.modules import Layer, MergedLayer, Term, merge_layer
from adapter_router.merging.peft_directory import MergedAdapter
from adapter_router.merging.read_back import check_read_back
from adapter_router.merging.report import MergeReport, assemble, provenance
from adapter_router.merging.request import MergeRequest, Part, is_number
from adapter_router.types import TASK_KINDS

Progress = Callable[[int, int, str], None]
"""Called before each module: how many are done, of how many, and its path."""


@dataclass(frozen=True)
class _Plan:
    """A merge that nothing speaks against.

    ``terms``: changes of weights to merge, by module. ``saved`` modules of the result, its head's and others;
    ``shifts`` of biases by module, to be written in ``form``.
    """

    parts: Sequence[LoadedPart]
    prepared: PreparedTask
    terms: Mapping[str, Sequence[Term]]
    saved: Saved
    shifts: Mapping[str, torch.Tensor]
    form: biases.BiasForm
    head: Head
    rank: int


def merge(
    request: MergeRequest,
    base: BaseModel | str,
    out: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge the adapters of ``request`` on the host and write the result to ``out``, which must not exist.

    ``base``: the model they were trained on, loaded or by name; it is only read. ``dry_run`` does everything but the
    writing. Raises AdapterRejected with every problem of the request and of all adapters, or WriteFailed (an OSError)
    when ``out`` cannot be written; nothing is left behind then. Raises ValueError or OSError when the base cannot be
    had.
    """
    target = Path(out)
    problems = request.problems() + _target_problems(target, request.parts)
    if not request.parts:
        raise AdapterRejected.because(problems)
    base = BaseModel(EngineConfig(base=base, device="cpu")) if isinstance(base, str) else base
    with tempfile.TemporaryDirectory() as scratch:
        store, task = ContentStore(Path(scratch) / "store"), request.task if request.task in TASK_KINDS else None
        parts, faults = load_parts(request.parts, store, Reader(base), task)
        plan = _plan(parts, base, request, problems + faults)
        merged = _merge_layers(plan, request, progress)
        adapter = _result(plan, merged, request, base.fingerprint)
        place = Path(scratch) / "result" if dry_run else target
        with peft_directory.staging(place) as staging:
            with peft_directory.writing(place):
                peft_directory.write(staging, adapter, plan.prepared.spec, plan.prepared.weights)
            digest, warnings = check_read_back(adapter, staging, store, base)
            if not dry_run:
                with peft_directory.writing(place):
                    staging.rename(target)
    warnings = (*_warnings(plan, request), *warnings)
    report = assemble(adapter, merged, digest, warnings, exact_by_cat=takes_cat(plan.terms))
    return report if dry_run else replace(report, out=str(target))


def _target_problems(out: Path, parts: Sequence[Part]) -> list[str]:
    inside = [
        f"{out} lies inside the adapter {part.name}: it would become another" for part in parts if _lies_in(out, part)
    ]
    if os.path.lexists(out):
        return [f"{out} exists; a merge never overwrites", *inside]
    return inside if out.absolute().parent.is_dir() else [f"{out.absolute().parent} is not a directory", *inside]


def _lies_in(out: Path, part: Part) -> bool:
    try:
        return Path(os.path.realpath(out)).is_relative_to(os.path.realpath(resolve(os.fspath(part.directory))))
    except (OSError, ValueError):  # told when the part is read
        return False


def _plan(parts: Sequence[LoadedPart], base: BaseModel, request: MergeRequest, problems: list[str]) -> _Plan:
    """Raises AdapterRejected with ``problems`` and everything that keeps ``parts`` from being merged.

    Parts of different tasks cannot be merged; those of each are still asked what else is wrong with them.
    """
    problems = problems + task_problems(parts)
    plans = []
    for task in dict.fromkeys(part.tensors.task for part in parts):
        same = [part if is_number(part.weight) else replace(part, weight=1.0) for part in parts]
        plan, faults = _plan_task([part for part in same if part.tensors.task == task], base.task(task), request)
        plans.append(plan)
        problems += faults
    if problems or len(plans) != 1 or plans[0] is None:
        raise AdapterRejected.because(list(dict.fromkeys(problems)))
    return plans[0]


def _plan_task(
    parts: Sequence[LoadedPart], prepared: PreparedTask, request: MergeRequest
) -> tuple[_Plan | None, list[str]]:
    """The merge of parts of one task, or everything that can be told of why there is none."""
    spec = prepared.spec
    problems = [problem for part in parts for problem in unmergeable(part, spec)]
    if not request.is_understood:
        return None, problems
    terms = layer_terms(parts, spec)
    headless = head_problems(parts, request.head, spec)
    problems += layer_problems(parts, terms, request) + headless
    head = no_head(parts[0]) if headless or request.problems() else choose_head(parts, request.head, spec)
    try:
        exact = _exact_sum(parts, head, prepared)
    except AdapterRejected as error:
        return None, problems + list(error.problems)
    shifts = {path: delta.shift for path, delta in exact.modules.items() if delta.shift is not None}
    shifts = {path: shift for path, shift in shifts.items() if shift.any()}
    saved = peft_directory.with_copies(exact.saved, spec, prepared.weights)
    form, faults = biases.choose_form(shifts, terms, saved, spec)
    problems += faults + _copy_problems(exact.saved, saved, {*terms, *shifts})
    plan = _Plan(parts, prepared, terms, saved, shifts, form, head, request.rank or default_rank(parts))
    return (None, problems) if problems else (plan, [])


def _copy_problems(saved: Saved, written: Saved, changed: set[str]) -> list[str]:
    copied = written.keys() - saved.keys()
    both = sorted(path for path in changed for root in copied if f"{path}.".startswith(root + "."))
    if not both:
        return []
    return [
        f"PEFT takes every module whose path ends in a saved one's ({listed(sorted(saved))}) for saved, too, and the "
        f"merge changes {listed(both)}: there is no file of both"
    ]


def _exact_sum(parts: Sequence[LoadedPart], head: Head, prepared: PreparedTask) -> AdapterDelta:
    """Shifts and saved modules; changes of weights are ``merge_layer``'s.

    Raises AdapterRejected for what has no sum, such as changes of a module that is replaced as a whole.
    """
    summands = [Summand(part.name, _shifts(part.delta, prepared.weights), part.weight) for part in parts]
    summands.append(Summand("the head", AdapterDelta(saved=head.saved), 0.0))
    return weighted_sum(summands, len(parts), prepared.spec, prepared.weights)


def _shifts(delta: AdapterDelta, weights: Weights) -> AdapterDelta:
    """``delta`` with nothing but shifts at its modules, what gains do to biases included."""
    modules = {
        path: ModuleDelta(shift=biases.total_shift(module, weights.bias(path)), uncertainty=module.uncertainty)
        for path, module in delta.modules.items()
    }
    return AdapterDelta(modules, delta.saved)


def _merge_layers(plan: _Plan, request: MergeRequest, progress: Progress | None) -> list[MergedLayer]:
    """Raises AdapterRejected with every module where numbers overflow."""
    generator = torch.Generator().manual_seed(request.seed)
    settings = Settings(request.combination, request.density or 1.0, request.sign or "total", generator)
    merged, problems = [], []
    for done, (path, terms) in enumerate(plan.terms.items()):
        if progress is not None:
            progress(done, len(plan.terms), path)
        try:
            layer = Layer(path, plan.prepared.spec.targets[path], terms)
            merged.append(merge_layer(layer, settings, plan.rank, plan.prepared.weights))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise AdapterRejected.because(problems)
    return merged


def _result(plan: _Plan, merged: Sequence[MergedLayer], request: MergeRequest, fingerprint: str) -> MergedAdapter:
    modules = {layer.path: ModuleDelta(layer.a, layer.b, 1.0, shift=plan.shifts.get(layer.path)) for layer in merged}
    elsewhere = {path: ModuleDelta(shift=shift) for path, shift in plan.shifts.items() if path not in modules}
    names = {part.base_name for part in plan.parts}
    demanded = [part.tensors.base_fingerprint for part in plan.parts if part.tensors.base_fingerprint is not None]
    task = plan.prepared.spec.task
    return MergedAdapter(
        task=task,
        delta=AdapterDelta({**modules, **elsewhere}, plan.saved),
        biases=plan.form,
        head=plan.head,
        provenance=provenance(request, plan.parts, plan.rank, task, fingerprint),
        base_name=names.pop() if len(names) == 1 else None,
        base_fingerprint=demanded[0] if demanded else None,
    )


def _warnings(plan: _Plan, request: MergeRequest) -> list[str]:
    """What is worth knowing of the parts and of the form of their merge."""
    spec = plan.prepared.spec
    told = [f"{part.name}: {warning}" for part in plan.parts for warning in part.warnings]
    told += changed_heads(plan.parts, request.head, spec)
    return told + biases.unfoldable(plan.form, plan.terms, spec)
