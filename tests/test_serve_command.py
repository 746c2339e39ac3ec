"""``adapter-router serve`` before anything is started: what cannot be read is said in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.cli import main


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ("applications: [", "no Serve config"),
        ("", "no Serve config"),
        ("- 1", "no Serve config"),
        ("applications: [{name: a}]", "args"),
        ("applications: [{name: a, args: }]", "no Serve config"),
        ("applications: [{args: {base: x, colour: red}}]", "colour"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, fragment: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config)
    assert main(["serve", str(path)]) == 2
    complaint = capsys.readouterr().err
    assert str(path) in complaint and fragment in complaint


def test_a_config_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for nowhere in (str(tmp_path / "nowhere.yaml"), "package:no_such_package/cpu.yaml"):
        assert main(["serve", nowhere]) == 2 and nowhere in capsys.readouterr().err
