"""Credentials by name: found where they are promised, and shown nowhere."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from adapter_router.catalog.sources.secrets import Secret, Secrets
from adapter_router.errors import AdapterRejected


def refusal(secrets: Secrets, name: str) -> str:
    with pytest.raises(AdapterRejected) as caught:
        secrets(name)
    assert "hush" not in str(caught.value) + repr(caught.value.__cause__) + repr(caught.value.__context__)
    return str(caught.value)


def test_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_ROUTER_SECRET_MY_BUCKET_1", '{"key": "me", "secret": "hush"}')
    assert dict(Secrets()("my-bucket.1")) == {"key": "me", "secret": "hush"}


def test_from_a_file_and_from_a_directory_of_files(tmp_path: Path) -> None:
    (tmp_path / "one").write_text('{"token": "hush"}')
    mounted = tmp_path / "two" / "..2026"  # as Kubernetes mounts a secret
    mounted.mkdir(parents=True)
    (mounted / "token").write_text("hush\n")
    (tmp_path / "two" / "..data").symlink_to("..2026")
    (tmp_path / "two" / "token").symlink_to("..data/token")
    assert dict(Secrets(tmp_path)("one")) == dict(Secrets(tmp_path)("two")) == {"token": "hush"}


def test_one_that_was_replaced_counts_at_once(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path)
    for value in ("old", "new"):
        (tmp_path / "a").write_text(f'{{"token": "{value}"}}')
        assert secrets("a")["token"] == value


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "/etc/passwd", "a\0", "ä", "a" * 201])
def test_a_name_is_no_path(name: str, tmp_path: Path) -> None:
    assert "is not a name" in refusal(Secrets(tmp_path), name)


def test_one_that_is_missing_is_told_with_where_to_put_it(tmp_path: Path) -> None:
    assert "set ADAPTER_ROUTER_SECRET_A_B, or sources.secrets_dir" in refusal(Secrets(), "a-b")
    assert f"or make {tmp_path}/a" in refusal(Secrets(tmp_path), "a")


@pytest.mark.parametrize("text", ["hush", '["hush"]', '{"a": {"b": "hush"}}', '{"a": "hush"', "\x80hush"])
def test_one_that_cannot_be_read_is_not_told(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(text.encode("latin-1"))
    refusal(Secrets(tmp_path), "a")
    if text.isascii():
        monkeypatch.setenv("ADAPTER_ROUTER_SECRET_B", text)
        assert "ADAPTER_ROUTER_SECRET_B is not a JSON object of strings" in refusal(Secrets(), "b")


def test_its_text_shows_nothing() -> None:
    secret = Secret({"token": "hush"})
    assert "hush" not in f"{secret} {secret!r}" and "token" not in repr(secret)
    assert dict(pickle.loads(pickle.dumps(secret))) == {"token": "hush"}
