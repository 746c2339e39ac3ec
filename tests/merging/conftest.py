"""Bases that all tests of merges share."""

from __future__ import annotations

import pytest

from tests.merging.bases import TARGETS, MergeBase

Bases = dict[str, MergeBase]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return {kind: MergeBase(kind, tmp_path_factory.mktemp(f"merge-{kind}")) for kind in TARGETS}


@pytest.fixture
def bert(bases: Bases) -> MergeBase:
    return bases["bert"]
