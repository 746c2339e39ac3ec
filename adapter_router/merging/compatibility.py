"""What keeps adapters that are each sound from being merged with each other, all of it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapter_router.adapters.adapter_config import MAX_RANK
from adapter_router.adapters.base_spec import BaseSpec
from adapter_router.adapters.delta import ModuleDelta
from adapter_router.adapters.keys import listed
from adapter_router.adapters.tuners.lora import takes_from_base
from adapter_router.merging.loading import LoadedPart
from adapter_router.merging.modules import Term
from adapter_router.merging.request import MergeRequest

_REMEDY = "merge by svd, or another type that ends in _svd"


def task_problems(parts: Sequence[LoadedPart]) -> list[str]:
    """Adapters of different tasks have no result that serves one."""
    if len({part.tensors.task for part in parts}) <= 1:
        return []
    return ["the adapters serve different tasks: " + ", ".join(f"{part.name} {part.tensors.task}" for part in parts)]


def layer_terms(parts: Sequence[LoadedPart], spec: BaseSpec) -> dict[str, list[Term]]:
    """The changes of each module's weight, in the order of the base's modules; a part without it does not count."""
    terms = {
        path: [
            Term(part.delta.modules[path], part.weight)
            for part in parts
            if path in part.delta.modules and _changes_weight(part.delta.modules[path])
        ]
        for path in spec.targets
    }
    return {path: found for path, found in terms.items() if found}


def _changes_weight(delta: ModuleDelta) -> bool:
    return delta.a is not None or delta.dense is not None or delta.gain is not None


def layer_problems(
    parts: Sequence[LoadedPart], terms: Mapping[str, Sequence[Term]], request: MergeRequest
) -> list[str]:
    """Why the type cannot take these changes of the modules' weights."""
    combination = request.combination
    problems = []
    if not terms and len(parts) == len(request.parts):
        problems.append("no adapter changes a weight: there is nothing to merge")
    if combination.on != "delta":
        problems += _full_rank_problems(parts, terms, request.type)
    if combination.on == "factors":
        problems += _unequal_ranks(parts, terms, request.type) + _derived_problems(parts, request.type)
    if combination.on == "sum" and (widest := _widest(terms)) > MAX_RANK:
        problems.append(f"cat makes a rank of {widest}, the limit is {MAX_RANK}; {_REMEDY}")
    if combination.cuts_rank and request.rank is None and terms and not max(part.rank for part in parts):
        problems.append("none of the adapters has a rank (LoHa, LoKr, OFT, IA3): say which rank the result is to have")
    return problems


def takes_cat(terms: Mapping[str, Sequence[Term]]) -> bool:
    """Whether ``cat`` would merge these changes."""
    return all(term.is_low_rank for found in terms.values() for term in found) and _widest(terms) <= MAX_RANK


def _widest(terms: Mapping[str, Sequence[Term]]) -> int:
    return max((sum(term.delta.rank for term in found) for found in terms.values()), default=0)


def default_rank(parts: Sequence[LoadedPart]) -> int:
    """The largest rank of any part, as in PEFT."""
    return max(1, *(part.rank for part in parts))


def _full_rank_problems(parts: Sequence[LoadedPart], terms: Mapping[str, Sequence[Term]], kind: str) -> list[str]:
    problems = []
    for part in parts:
        full = [p for p in terms if (d := part.delta.modules.get(p)) and (d.gain is not None or d.dense is not None)]
        if full:
            problems.append(
                f"{part.name}: {kind} merges low-rank factors, it changes whole weights (DoRA, LoHa, LoKr, OFT, IA3) "
                f"of {listed(full, 3)}; {_REMEDY}"
            )
    return problems


def _derived_problems(parts: Sequence[LoadedPart], kind: str) -> list[str]:
    """Factors that are known up to their signs: they were derived from the base's weights, not read from a file."""
    problems = []
    for part in parts:
        derived = [
            target.base_path
            for target, roles in part.tensors.targets.items()
            if target.spec.kind == "linear" and takes_from_base(target.config.document) and "a0" not in roles
        ]
        if derived:
            problems.append(
                f"{part.name}: {kind} merges A and B apart, and of what its training took out of the base (PiSSA, "
                f"OLoRA, KaSA) only their product is known, not their signs, at {listed(derived, 3)}; merge by cat, "
                "svd, or another type that ends in _svd"
            )
    return problems


def _unequal_ranks(parts: Sequence[LoadedPart], terms: Mapping[str, Sequence[Term]], kind: str) -> list[str]:
    """Modules whose factors have different shapes."""
    unequal = [
        path for path, found in terms.items() if len({term.delta.rank for term in found if term.is_low_rank}) > 1
    ]
    if not unequal:
        return []
    first = unequal[0]
    ranks = ", ".join(f"{p.name} {p.delta.modules[first].rank}" for p in parts if first in p.delta.modules)
    return [
        f"{kind} needs equal ranks, they differ on {len(unequal)} modules, e.g. {first} ({ranks}); "
        f"merge by cat, svd, or another type that ends in _svd"
    ]
