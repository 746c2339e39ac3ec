"""``adapter-router doctor``: green, red with every reason, and a canary that notices a neighbour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapter_router.engine import forward
from adapter_router.engine.plan import PlanRow
from deployments.cli import main
from tests.tiny import TinyBase, edit_config, edit_tensors


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["doctor", *arguments])
    return status, capsys.readouterr().out


def test_a_good_adapter_is_green_and_described(
    tiny_bert: TinyBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_bert.adapter(tmp_path / "a", 3, 0, use_dora=True)
    status, text = doctor(capsys, str(directory), "--base", str(tiny_bert.directory), "--canary")
    assert status == 0 and text.startswith("OK ")
    assert "14 tensors applied to 5 modules; ranks 8" in text and "task text-classification, 3 labels" in text
    assert "bert.encoder.layer.1.attention.self.value" in text and "canary: alone and beside a neighbour" in text


def test_a_bad_adapter_is_red_with_every_reason(
    tiny_bert: TinyBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_bert.adapter(tmp_path / "a", 3, 0)
    edit_config(directory, layer_replication=[[0, 2]], lora_alpha="much")
    edit_tensors(directory, lambda tensors: tensors.pop("base_model.model.classifier.bias"))
    arguments = (str(directory), "--base", str(tiny_bert.directory))
    status, text = doctor(capsys, *arguments)
    assert status == 1 and text.startswith("REFUSED ") and "3 problems" in text
    status, text = doctor(capsys, *arguments, "--json")
    document: dict[str, Any] = json.loads(text)
    assert status == 1 and document["healthy"] is False and document["report"] is None
    problems = "\n".join(document["problems"])
    assert all(name in problems for name in ("layer_replication", "lora_alpha", "classifier.bias"))


def test_an_adapter_without_effect_is_warned_about(
    tiny_bert: TinyBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_bert.adapter(tmp_path / "a", 3, 0)

    def forget(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor * (0 if "lora_B" in name else 1)

    edit_tensors(directory, forget)
    status, text = doctor(capsys, str(directory), "--base", str(tiny_bert.directory), "--json")
    document = json.loads(text)
    assert status == 0 and "4 of 5 modules have no effect" in document["report"]["warnings"][0]
    assert sorted(size > 0 for size in document["report"]["norms"].values()) == [False] * 4 + [True]


def test_a_base_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path), "--base", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_canary_notices_a_neighbours_adapter(
    tiny_bert: TinyBase, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of a batch is given the first row's adapter: the fault of many servers."""
    directory = tiny_bert.adapter(tmp_path / "a", 3, 0)
    first: list[Any] = []

    def neighbours(adapter: Any, *rest: Any) -> PlanRow:
        if adapter is not None:
            first.append(adapter)
        return PlanRow(first[-2] if len(first) > 1 else adapter, *rest)

    monkeypatch.setattr(forward, "PlanRow", neighbours)
    status, text = doctor(capsys, str(directory), "--base", str(tiny_bert.directory), "--canary")
    assert status == 1 and "canary: alone and mixed differ" in text
