"""The documents name what exists, and the router's floor stands without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments.local import read_config

ROOT = Path(__file__).parent.parent


def test_every_file_named_in_the_architecture_exists_and_none_is_missing() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"\b(\w+\.py)\b", text))
    routes = re.findall(r"\b\w+\b", text[text.index("a file per route") : text.index("envelope.py")])
    named |= {f"{route}.py" for route in routes if (ROOT / "deployments" / "api" / f"{route}.py").exists()}
    files = [*(ROOT / "adapter_router").rglob("*.py"), *(ROOT / "deployments").rglob("*.py")]
    assert named - {file.name for file in files} == set()
    assert {file.name for file in files} - named - {"__init__.py"} == set()


def test_every_test_file_named_in_the_readme_exists() -> None:
    named = set(re.findall(r"`(tests/\w+\.py)`", (ROOT / "README.md").read_text()))
    assert named and all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize(
    "module",
    ["adapter_router.routing.dispatcher", "adapter_router.catalog.store", "adapter_router.catalog.routes"],
)
def test_loads_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    "config", sorted((ROOT / "deployments" / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_shipped_configs_are_valid(config: Path) -> None:
    ServeDeploySchema(**yaml.safe_load(config.read_text()))
    assert all(app.args.adapters for app in read_config(config))


def test_a_config_with_an_unknown_argument_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("applications: [{args: {base: x, replica: 2}}]")
    with pytest.raises(ValueError, match="replica"):
        read_config(path)


def test_figures_in_the_readme_are_those_of_the_committed_run() -> None:
    document = json.loads((ROOT / "benchmarks" / "results" / "grouped_forward.json").read_text())
    values = {result["name"]: result["value"] for result in document["results"]}
    sizes = {"MiniLM size": "minilm", "BERT base size": "bert-base"}
    targets = {"query, value": "qv", "all linear layers": "all-linear"}
    ranks = {"8": "r8", "8, 16, 32, 64": "r8-16-32-64"}
    figures = ("ours_over_base", "peft_mixed_over_base", "ours_over_peft_mixed", "ours_over_peft_loop")
    rows = re.findall(
        r"^\| (\w+ \w+ ?\w*) \| ([\w, ]+) \| ([\d, ]+) \| (.*) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(rows) == len(sizes) * len(targets) * len(ranks)
    for size, target, rank, cells in rows:
        case = f"{sizes[size]}/{targets[target]}/{ranks[rank]}/32"
        shown = [float(cell.strip(" *\u00d7")) for cell in cells.split("|")]
        assert shown == [round(values[f"{case}/{figure}"], 2) for figure in figures]


def test_figures_of_many_adapters_are_those_of_the_committed_runs() -> None:
    documents = [
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in ("many_adapters", "cold_loads", "cache")
    ]
    values = {result["name"]: round(result["value"], 2) for document in documents for result in document["results"]}
    shown = re.findall(r"^\| .* \| \*\*([\d.]+)\*\* \| ([\d.]+) \| `python -m", (ROOT / "README.md").read_text(), re.M)
    assert [tuple(map(float, pair)) for pair in shown] == [
        (values["all/2000_over_5"], 1),
        (values["all-from-disk/2000_over_5"], 1),
        (values["known forms/p99_over_quiet"], 1),
        (values["new forms/p99_over_quiet"], 1),
        (values["zipf1.0/hit_rate"], values["zipf1.0/multiplexed/hit_rate"]),
        (values["zipf1.0/hit_rate"], values["zipf1.0/consistent_hash/hit_rate"]),
    ]
