"""Every hostile or broken adapter is refused by name within two seconds, and nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile import configs, files, shapes, tensors
from tests.hostile.case import Case
from tests.hostile.good import FOREIGN, GOOD
from tests.hostile.harness import Sites, assert_named, refusal

pytestmark = [
    pytest.mark.timeout(30),
    pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft"),
]
_GROUPS = {"files": files.CASES, "config": configs.CASES, "tensors": tensors.CASES, "shapes": shapes.CASES}
CASES = {f"{group}: {case.name}": case for group, cases in _GROUPS.items() for case in cases}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    sites = Sites(tmp_path_factory.mktemp("sites"))
    yield sites
    sites.close()


def test_no_two_cases_share_a_name() -> None:
    assert len(CASES) == sum(map(len, _GROUPS.values()))


@pytest.mark.parametrize("name", [name for name in GOOD if name not in FOREIGN])
def test_what_is_spoiled_below_is_good(name: str, sites: Sites) -> None:
    site = sites.site(GOOD[name].base)
    report = site.engine.load_adapter("good", sites.adapter(name))
    site.engine.unload_adapter("good")
    assert report.modules
    site.assert_untouched("good")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_refused_without_a_trace(case: Case, sites: Sites, tmp_path: Path) -> None:
    site = sites.site(case.on or GOOD[case.of].base)
    directory = sites.copy(case.of, tmp_path / "a" / "adapter")
    case.spoil(directory)
    error = refusal(site, directory, **case.options)
    assert_named(error.problems, case.says)
    assert not (directory / "executed").exists()


def test_what_was_refused_is_not_kept_on_disk(sites: Sites, tmp_path: Path) -> None:
    site = sites.site("bert")
    directory = sites.copy("plain", tmp_path / "adapter")
    (directory / "adapter_config.json").write_text("{}")
    before = sorted(site.engine.config.store_dir.iterdir())  # type: ignore[union-attr]
    refusal(site, directory)
    assert sorted(site.engine.config.store_dir.iterdir()) == before  # type: ignore[union-attr]
