"""Every planted error still has its place in the code; that all are noticed, ``tests.parity.mutations`` shows."""

from __future__ import annotations

import pytest

from tests.parity.build import RECIPES
from tests.parity.mutations import MUTATIONS, PACKAGE, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_place_is_there_once(mutation: Mutation) -> None:
    assert (PACKAGE / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    assert all(name in RECIPES or name in ("tokens", "mixes", "bfloat16", "float16") for name in mutation.case.recipes)
    compile((PACKAGE / mutation.file).read_text().replace(mutation.old, mutation.new), mutation.file, "exec")


def test_there_are_many() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 30
