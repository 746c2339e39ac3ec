"""Every type on random pairs and triples equals PEFT's own, random drops included."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from adapter_router.merging.combination import COMBINATIONS, Combination, Settings, SignMethod, combine
from tests.merging.bases import TARGETS, MergeBase, several
from tests.merging.oracle import distance, exact_sum, ours, theirs, theirs_cut_in_float64

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]

_EQUAL, _UNEQUAL = range(12), range(12, 16)
CASES = [(kind, seed) for kind in TARGETS for seed in (*_EQUAL, *_UNEQUAL)]
_TOLERANCE = 1e-5


def count_of(seed: int) -> int:
    return 2 + seed % 2


def options_of(combination: Combination, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same choices for us and for PEFT."""
    mine: dict[str, Any] = {}
    if combination.drops:
        mine["density"] = (0.2, 0.5, 0.8, 0.95)[seed % 4]
    peft = dict(mine)
    if combination.cuts_rank and seed % 5:
        mine["rank"] = peft["svd_rank"] = 1 + seed % 5
    if combination.elects:
        mine["sign"] = peft["majority_sign_method"] = ("total", "frequency")[seed // 2 % 2]
    return mine, peft


def test_every_type_meets_twenty_pairs_and_twenty_triples() -> None:
    counts = Counter(count_of(seed) for _, seed in CASES if seed in _EQUAL)
    assert min(counts[2], counts[3]) >= 20


@pytest.mark.parametrize(("kind", "seed"), CASES, ids=str)
def test_merges_equal_pefts(bases: dict[str, MergeBase], kind: str, seed: int) -> None:
    base = bases[kind]
    paths, weights = base.random_parts(seed, count_of(seed), equal_ranks=seed in _EQUAL)
    model = several(base, paths)
    for name, combination in COMBINATIONS.items():
        if combination.on == "factors" and seed not in _EQUAL:
            continue
        mine, peft = options_of(combination, seed)
        expected = theirs(model, weights, name, **peft)
        found, _ = ours(base, paths, weights, name, **mine)
        error = distance(found, expected)
        if combination.cuts_rank and _TOLERANCE <= error < 1e-4:
            error = distance(found, theirs_cut_in_float64(model, weights, name, **peft))
        assert error < _TOLERANCE, name


@pytest.mark.parametrize(("kind", "seed"), CASES[::4], ids=str)
def test_cat_and_svd_of_full_rank_are_the_exact_sum(bases: dict[str, MergeBase], kind: str, seed: int) -> None:
    base = bases[kind]
    paths, weights = base.random_parts(seed, count_of(seed), equal_ranks=False)
    expected = exact_sum(several(base, paths), weights)
    for name, options in (("cat", {}), ("svd", {"rank": 50})):
        found, report = ours(base, paths, weights, name, **options)
        assert distance(found, expected) < _TOLERANCE
        assert report.error < _TOLERANCE and not report.warnings


@pytest.mark.parametrize("name", [name for name, c in COMBINATIONS.items() if c.drops != "random" and c.on != "sum"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("seed", range(5))
def test_a_formula_is_what_it_says_entry_by_entry(name: str, sign: SignMethod, seed: int) -> None:
    """The table of ``combination.py``, one number at a time, in float64."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(4, 5)) for _ in range(3)]
    weights = [0.7, -0.4, 1.1]
    combination, density = COMBINATIONS[name], 0.55  # type: ignore[index]
    kept = []
    for part in parts:
        smallest = np.sort(np.abs(part).ravel())[-int(density * part.size)] if combination.drops else 0.0
        kept.append(np.where(np.abs(part) >= smallest, part, 0.0))
    expected = np.zeros((4, 5))
    for place in np.ndindex(4, 5):
        values = [part[place] for part in kept]
        agreeing = list(zip(values, weights, strict=True))
        if combination.elects:
            elected = 1 if sum(values if sign == "total" else np.sign(values)) >= 0 else -1
            agreeing = [(v, w) for v, w in agreeing if np.sign(v) == elected]
        expected[place] = sum(v * w for v, w in agreeing)
        if combination.elects:
            expected[place] /= max(1, len(agreeing))
    settings = Settings(combination, density, sign, torch.Generator())
    found = combine([torch.from_numpy(part) for part in parts], weights, settings)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-14)


def test_random_drops_keep_the_mean_and_follow_the_seed() -> None:
    ones = [torch.ones(200, 200)]

    def dropped(seed: int, density: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return combine(ones, [1.0], Settings(COMBINATIONS["dare_linear"], density, "total", generator))

    assert float(dropped(0, 0.3).mean()) == pytest.approx(1.0, abs=0.03)
    assert set(dropped(0, 0.5).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped(3, 0.3), dropped(3, 0.3)) and not torch.equal(dropped(3, 0.3), dropped(4, 0.3))
    assert torch.equal(dropped(0, 1.0), ones[0])
