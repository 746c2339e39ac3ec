"""``/v1/adapters`` over HTTP, without Ray: what is registered, refused, mended, versioned, and removed."""

from __future__ import annotations

import shutil
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from adapter_router.config import SourceConfig
from tests.local_app import LocalApp, local_app
from tests.serving import wait_for
from tests.tiny import TinyBase, edit_config

NOBODY = "http://127.0.0.1:1/"  # a port nobody listens on


@pytest.fixture(scope="module")
def hanging() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


@pytest.fixture(scope="module")
def local(tiny_bert: TinyBase, hanging: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApp]:
    sources = SourceConfig(allowed=("file://", "package:", "https://", NOBODY, hanging), attempts=1)
    with local_app(tmp_path_factory.mktemp("local"), tiny_bert.directory, catalog={"sources": sources}) as app:
        yield app


@pytest.fixture
def directory(tiny_bert: TinyBase, tmp_path: Path, name: str) -> Path:
    """An adapter with three labels, and with content of the test's own: what tests share is never freed."""
    return tiny_bert.adapter(tmp_path / "adapter", 3, zlib.crc32(name.encode()))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name of the test's own; names may have slashes."""
    return f"tests/{request.node.name}".replace("[", "/").replace("]", "")


def ask(local: LocalApp, method: str, path: str, body: Any = None, status: int = 200, **more: Any) -> Any:
    response = local.http.request(method, path, json=body, **more)
    assert response.status_code == status, response.text
    return response.json()


def refused(local: LocalApp, method: str, path: str, body: Any, status: int, **more: Any) -> str:
    """The whole text of an error, which has the usual shape."""
    error = ask(local, method, path, body, status, **more)["error"]
    assert set(error) >= {"message", "type", "param", "code"} and "Traceback" not in str(error)
    return str(error)


def register(local: LocalApp, name: str, directory: Path, **fields: Any) -> Any:
    return ask(local, "POST", "/v1/adapters", {"name": name, "uri": str(directory), "wait": True, **fields}, 201)


def version_of(local: LocalApp, model: str) -> Any:
    """The version that answers."""
    return ask(local, "POST", "/v1/classify", {"model": model, "input": [[1, 2, 3]]})["adapter"]["version"]


def name_of_base(local: LocalApp) -> Any:
    return ask(local, "GET", "/v1/models")["data"][0]["id"]


# -- registering -------------------------------------------------------------------------------------------------------


def test_registered_and_waited_for(local: LocalApp, name: str, directory: Path) -> None:
    body = {"name": name, "uri": str(directory), "labels": ["x", "y", "z"], "wait": True}
    response = local.http.post("/v1/adapters", json=body)
    assert response.status_code == 201 and response.headers["location"] == f"/v1/adapters/{name}"
    registration = response.json()
    assert registration["phase"] == "Ready" and registration["error"] is None
    assert (registration["uri"], registration["labels"]) == (str(directory), ["x", "y", "z"])
    assert registration == ask(local, "GET", f"/v1/adapters/{name}")
    (target,) = registration["targets"]
    assert (target["adapter"], target["number"], target["weight"]) == (name, 1, 1)
    assert target["version"] == version_of(local, name) and target["num_labels"] == 3
    assert (target["task"], target["base"]) == ("text-classification", name_of_base(local))
    answer = ask(local, "POST", "/v1/classify", {"model": name, "input": [[1, 2, 3]]})
    assert answer["data"][0]["label"] in {"x", "y", "z"}


def test_registered_in_the_background(local: LocalApp, name: str, directory: Path) -> None:
    registration = ask(local, "POST", "/v1/adapters", {"name": name, "uri": str(directory)}, 202)
    assert registration["phase"] != "Ready" and registration["targets"] == []
    wait_for(lambda: ask(local, "GET", f"/v1/adapters/{name}")["phase"] == "Ready")


def test_a_lazy_one_waits_for_its_first_row(local: LocalApp, name: str, directory: Path) -> None:
    body = {"name": name, "uri": str(directory), "lazy": True}
    assert ask(local, "POST", "/v1/adapters", body, 202)["phase"] == "Registered"
    register(local, f"{name}-other", directory)  # whatever was in the queue has been done
    assert ask(local, "GET", f"/v1/adapters/{name}")["phase"] == "Registered"
    assert version_of(local, name) == version_of(local, f"{name}-other")
    assert ask(local, "GET", f"/v1/adapters/{name}")["phase"] == "Ready"


@pytest.mark.parametrize(
    ("fields", "status", "fragments"),
    [
        ({"uri": None, "labels": "x", "pinned": 1, "colour": 2}, 400, ["uri", "labels", "pinned", "colour"]),
        ({"name": 7}, 400, ["name"]),
        ({"name": ""}, 400, ["name"]),
        ({"name": "a@v2"}, 400, ["what follows @ is a version"]),
        ({"name": " a"}, 400, ["blanks"]),
        ({"name": "a\nb"}, 400, ["cannot name an adapter"]),
        ({"name": "x" * 201}, 400, ["201"]),
        ({"name": "org/../etc"}, 400, [".."]),
        ({"name": "org/versions"}, 400, ["/versions"]),
        ({"name": "org/versions/2"}, 400, ["/versions/2"]),
        ({"name": "warm/warm"}, 400, ["/warm"]),
        ({"base": "no-such-base"}, 400, ["no-such-base", "tiny-bert"]),
        ({"task": "poetry"}, 400, ["task"]),
        ({"wait": "yes"}, 400, ["wait"]),
        ({"wait_s": 0}, 400, ["wait_s"]),
        ({"sha256": "abc"}, 422, ["sha256"]),
        ({"uri": "ftp://host/x"}, 422, ["ftp"]),
        ({"uri": "/x", "revision": "main"}, 422, ["only hf://"]),
    ],
)
def test_what_cannot_be_registered(local: LocalApp, fields: dict[str, Any], status: int, fragments: list[str]) -> None:
    before = ask(local, "GET", "/v1/events")["revision"]
    text = refused(local, "POST", "/v1/adapters", {"name": "refused", "uri": "/x", **fields}, status)
    for fragment in fragments:
        assert fragment in text
    assert ask(local, "GET", "/v1/events")["revision"] == before, "nothing was written"


def test_a_bases_name_is_no_adapters(local: LocalApp, tiny_bert: TinyBase, directory: Path) -> None:
    base = ask(local, "GET", "/v1/models")["data"][0]
    for taken in (str(tiny_bert.directory), base["metadata"]["version"]):
        text = refused(local, "POST", "/v1/adapters", {"name": taken, "uri": str(directory)}, 400)
        assert "base model's" in text


def test_credentials_in_an_address_are_kept_nowhere(local: LocalApp, name: str) -> None:
    for address in ("https://me:hunter2@example.com/x", "https://example.com/x?token=hunter2"):
        text = refused(local, "POST", "/v1/adapters", {"name": name, "uri": address}, 422)
        assert "hunter2" not in text and "secretRef" in text
    assert "hunter2" not in str(ask(local, "GET", "/v1/events", params={"limit": 1000}))
    assert ask(local, "GET", f"/v1/adapters/{name}", status=404)


def test_a_taken_name(local: LocalApp, name: str, directory: Path, tiny_bert: TinyBase, tmp_path: Path) -> None:
    register(local, name, directory, pinned=True)
    body = {"name": name, "uri": str(tiny_bert.adapter(tmp_path / "other", 2, 2)), "wait": True}
    assert "adapter_exists" in refused(local, "POST", "/v1/adapters", body, 400)
    replaced = ask(local, "POST", "/v1/adapters", {**body, "replace": True}, 201)
    assert replaced["uri"] == body["uri"] and not replaced["pinned"]
    assert replaced["targets"][0]["number"] == 2 and replaced["created"] < replaced["updated"]


def test_a_refused_one_says_why_and_can_be_tried_again(local: LocalApp, name: str, directory: Path) -> None:
    edit_config(directory, lora_alpha=float("nan"), r=-1)
    error = ask(local, "POST", "/v1/adapters", {"name": name, "uri": str(directory), "wait": True}, 422)["error"]
    assert error["code"] == "adapter_invalid" and len(error["problems"]) == 2 and name in error["message"]
    registration = ask(local, "GET", f"/v1/adapters/{name}")
    assert registration["phase"] == "Failed" and registration["error"]["problems"] == error["problems"]
    assert registration["attempts"] == 1 and registration["retry_at"] is None
    assert refused(local, "POST", "/v1/classify", {"model": name, "input": [[1]]}, 424).count("lora_alpha") >= 1
    assert "lora_alpha" in refused(local, "POST", f"/v1/adapters/{name}/warm", None, 424)
    assert "lora_alpha" in refused(local, "POST", f"/v1/adapters/{name}/retry", {"wait": True}, 422)
    edit_config(directory, lora_alpha=16, r=8)
    assert ask(local, "POST", f"/v1/adapters/{name}/retry", {"wait": True})["phase"] == "Ready"
    assert version_of(local, name)


def test_retried_in_the_background(local: LocalApp, name: str, tmp_path: Path, tiny_bert: TinyBase) -> None:
    missing = tmp_path / "later"
    refused(local, "POST", "/v1/adapters", {"name": name, "uri": str(missing), "wait": True}, 422)
    tiny_bert.adapter(missing, 2, 2)
    assert ask(local, "POST", f"/v1/adapters/{name}/retry", status=202)["phase"] == "Registered"
    wait_for(lambda: ask(local, "GET", f"/v1/adapters/{name}")["phase"] == "Ready")
    assert "NotFound" in refused(local, "POST", "/v1/adapters/nobody/retry", None, 404)
    assert "why" in refused(local, "POST", f"/v1/adapters/{name}/retry", {"why": 1}, 400)


def test_a_source_that_may_heal_is_tried_again_by_itself(local: LocalApp, name: str) -> None:
    error = ask(local, "POST", "/v1/adapters", {"name": name, "uri": f"{NOBODY}x", "wait": True}, 424)["error"]
    assert error["code"] == "adapter_failed" and NOBODY in error["message"]
    registration = ask(local, "GET", f"/v1/adapters/{name}")
    assert registration["error"]["retryable"] and registration["retry_at"] > registration["updated"]
    ask(local, "DELETE", f"/v1/adapters/{name}")


def test_waiting_ends_but_the_registration_goes_on(local: LocalApp, name: str, hanging: str, directory: Path) -> None:
    body = {"name": name, "uri": f"{hanging}x", "wait": True, "wait_s": 0.3}
    registration = ask(local, "POST", "/v1/adapters", body, 202)
    assert registration["phase"] == "Fetching"
    register(local, f"{name}-quick", directory)  # nobody waits for the one that hangs
    assert ask(local, "GET", f"/v1/adapters/{name}")["phase"] == "Fetching"
    ask(local, "DELETE", f"/v1/adapters/{name}")


# -- looking ---------------------------------------------------------------------------------------------------------


def test_registrations_come_in_pages_by_name(local: LocalApp, name: str, directory: Path, tmp_path: Path) -> None:
    names = [f"{name}/{number}" for number in range(5)]
    for each in names:
        register(local, each, directory)
    failed = f"{name}/1-failed"
    refused(local, "POST", "/v1/adapters", {"name": failed, "uri": str(tmp_path), "wait": True}, 422)
    first = ask(local, "GET", "/v1/adapters", params={"after": f"{name}/", "limit": 2})
    assert [entry["name"] for entry in first["data"]] == [first["first_id"], first["last_id"]] == names[:2]
    assert first["has_more"]
    second = ask(local, "GET", "/v1/adapters", params={"after": first["last_id"], "limit": 2})
    assert [entry["name"] for entry in second["data"]] == [failed, names[2]]
    chosen = ask(local, "GET", "/v1/adapters", params={"after": f"{name}/", "phase": "Failed"})["data"]
    assert [entry["name"] for entry in chosen][:1] == [failed]
    assert {entry["phase"] for entry in chosen} == {"Failed"}
    last = ask(local, "GET", "/v1/adapters", params={"after": "\U0010ffff"})
    assert (last["data"], last["first_id"], last["last_id"], last["has_more"]) == ([], None, None, False)


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/aliases", "/v1/models", "/v1/events"])
def test_a_page_that_cannot_be(local: LocalApp, path: str) -> None:
    for query in ({"limit": 0}, {"limit": 1001}, {"limit": "many"}, {"ater": "x"}):
        text = refused(local, "GET", path, None, 400, params=query)
        assert next(iter(query)) in text


def test_an_adapter_that_is_not_there(local: LocalApp, name: str, directory: Path) -> None:
    register(local, name, directory)
    wrong = f"{name[:-1]}_"
    for method, path in (
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/versions"),
        ("POST", "/versions"),
        ("GET", "/versions/1"),
        ("DELETE", "/versions/1"),
        ("POST", "/warm"),
        ("PUT", "/pin"),
        ("DELETE", "/pin"),
        ("POST", "/retry"),
    ):
        assert f"did you mean '{name}'" in refused(local, method, f"/v1/adapters/{wrong}{path}", None, 404)


def test_events_tell_the_story_of_one_and_of_all(local: LocalApp, name: str, directory: Path) -> None:
    before = ask(local, "GET", "/v1/events")["revision"]
    register(local, name, directory)
    ask(local, "DELETE", f"/v1/adapters/{name}")
    told = ask(local, "GET", f"/v1/adapters/{name}/events")["data"]
    assert [event["kind"] for event in told] == ["registered", "phase", "phase", "version", "alias", "removed"]
    assert told[0]["detail"]["uri"] == str(directory) and told[3]["detail"]["number"] == 1
    everything = ask(local, "GET", "/v1/events", params={"after": before, "limit": 1000})
    assert [event for event in everything["data"] if event["name"] == name] == told
    assert everything["revision"] >= everything["last_id"] == everything["data"][-1]["revision"]
    page = ask(local, "GET", f"/v1/adapters/{name}/events", params={"after": told[0]["revision"], "limit": 2})
    assert page["data"] == told[1:3] and page["has_more"]
    assert "after" in refused(local, "GET", "/v1/events", None, 400, params={"after": -1})
    assert ask(local, "GET", "/v1/adapters/nobody-ever/events")["data"] == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"/v1/events?after={10**30}"),
        ("GET", f"/v1/adapters/a/events?after={1 << 63}"),
        ("GET", f"/v1/adapters/a/versions/{10**30}"),
        ("DELETE", f"/v1/adapters/a/versions/{10**30}"),
        ("GET", "/v1/adapters?after=%00"),
        ("GET", "/v1/adapters/a%00b"),
        ("GET", "/v1/aliases?after=a%00"),
        ("DELETE", "/v1/aliases/%00"),
        ("GET", "/v1/models?after=%00"),
    ],
)
def test_what_no_database_takes_is_the_callers_mistake(local: LocalApp, method: str, path: str) -> None:
    refused(local, method, path, None, 400)


# -- names in paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["org/name", "versions", "a/versions-of/b", "/leading", "100% #1?&=+;ü 表", "a//b", "x/"]
)
def test_names_that_need_care_in_a_url(local: LocalApp, kind: str, directory: Path) -> None:
    register(local, kind, directory)
    for path in (quote(kind, safe="/"), quote(kind, safe="")):
        assert ask(local, "GET", f"/v1/adapters/{path}")["name"] == kind
        assert len(ask(local, "GET", f"/v1/adapters/{path}/versions")["data"]) == 1
        assert ask(local, "GET", f"/v1/adapters/{path}/versions/1")["number"] == 1
        assert ask(local, "GET", f"/v1/models/{path}")["id"] == kind
        assert ask(local, "GET", f"/v1/aliases/{path}")["name"] == kind
    assert ask(local, "DELETE", f"/v1/adapters/{quote(kind, safe='/')}")["name"] == kind


def test_a_path_never_means_another_adapter(local: LocalApp, name: str, directory: Path) -> None:
    """What ends like an action is one, whatever the method: nothing is removed or read by mistake."""
    register(local, name, directory)
    for method, action in (
        ("DELETE", "/versions"),
        ("DELETE", "/warm"),
        ("DELETE", "/events"),
        ("DELETE", "/retry"),
        ("GET", "/warm"),
        ("GET", "/pin"),
        ("POST", "/pin"),
    ):
        assert "method_not_allowed" in refused(local, method, f"/v1/adapters/{name}{action}", None, 405)
    assert "method_not_allowed" in refused(local, "PUT", f"/v1/aliases/{name}/rollback", {"v1": 1}, 405)
    assert ask(local, "GET", f"/v1/adapters/{name}")["phase"] == "Ready"
    body = {"name": f"{name}%2Fwarm", "uri": str(directory)}
    assert ask(local, "POST", "/v1/adapters", body, 202)["name"] == body["name"], "only paths are decoded"


# -- versions --------------------------------------------------------------------------------------------------------


def test_a_changed_source_is_another_version(local: LocalApp, name: str, directory: Path, tiny_bert: TinyBase) -> None:
    register(local, name, directory)
    old = version_of(local, name)
    same = ask(local, "POST", f"/v1/adapters/{name}/versions")
    assert (same["number"], same["version"], same["new"], same["share"]) == (1, old, False, 1.0)
    tiny_bert.adapter(directory, 2, 9)
    assert version_of(local, name) == old, "what was overwritten is not served before somebody says so"
    newer = ask(local, "POST", f"/v1/adapters/{name}/versions", {"activate": False}, 201)
    assert (newer["number"], newer["new"], newer["share"], newer["num_labels"]) == (2, True, 0.0, 2)
    assert newer["version"] != old == version_of(local, name)
    assert version_of(local, f"{name}@v2") == newer["version"]
    again = ask(local, "POST", f"/v1/adapters/{name}/versions", {})
    assert (again["number"], again["new"], again["share"]) == (2, False, 1.0)
    assert version_of(local, name) == newer["version"]
    listed = ask(local, "GET", f"/v1/adapters/{name}/versions")["data"]
    assert [(entry["number"], entry["share"], entry["retired"]) for entry in listed] == [(1, 0.0, None), (2, 1.0, None)]
    assert listed[1] == ask(local, "GET", f"/v1/adapters/{name}/versions/2")
    assert listed[0]["base"] == str(tiny_bert.directory) and listed[0]["num_bytes"] > 0
    assert "activated" in refused(local, "POST", f"/v1/adapters/{name}/versions", {"activated": True}, 400)


def test_a_broken_source_changes_nothing(local: LocalApp, name: str, directory: Path) -> None:
    register(local, name, directory)
    old = version_of(local, name)
    edit_config(directory, r=-1)
    assert "problems" in refused(local, "POST", f"/v1/adapters/{name}/versions", None, 422)
    shutil.rmtree(directory)
    refused(local, "POST", f"/v1/adapters/{name}/versions", None, 422)
    assert ask(local, "GET", f"/v1/adapters/{name}")["phase"] == "Ready" and version_of(local, name) == old


def test_a_version_is_retired_once_nothing_leads_to_it(
    local: LocalApp, name: str, directory: Path, tiny_bert: TinyBase
) -> None:
    register(local, name, directory)
    old = version_of(local, name)
    assert "leads to it" in refused(local, "DELETE", f"/v1/adapters/{name}/versions/1", None, 400)
    tiny_bert.adapter(directory, 2, 9)
    ask(local, "POST", f"/v1/adapters/{name}/versions", status=201)
    assert version_of(local, f"{name}@v1") == old
    ask(local, "DELETE", f"/v1/adapters/{name}/versions/1")
    assert ask(local, "GET", f"/v1/adapters/{name}/versions/1")["retired"] > 0
    assert "retired" in refused(local, "POST", "/v1/classify", {"model": f"{name}@v1", "input": [[1]]}, 404)
    held = ask(local, "GET", "/v1/adapters", params={"view": "residency", "limit": 1000})["data"]
    assert old not in {entry["version"] for entry in held}
    for number in (3, 0):
        assert f"v{number}" in refused(local, "DELETE", f"/v1/adapters/{name}/versions/{number}", None, 404)


def test_removed_with_all_its_versions(local: LocalApp, name: str, directory: Path) -> None:
    register(local, name, directory)
    alias = f"{name}-alias"
    ask(local, "PUT", f"/v1/aliases/{alias}", {f"{name}@v1": 1})
    assert alias in refused(local, "DELETE", f"/v1/adapters/{name}", None, 400)
    ask(local, "DELETE", f"/v1/aliases/{alias}")
    version = version_of(local, name)
    assert ask(local, "DELETE", f"/v1/adapters/{name}") == {"name": name, "removed": True, "versions": [version]}
    refused(local, "POST", "/v1/classify", {"model": name, "input": [[1]]}, 404)
    held = ask(local, "GET", "/v1/adapters", params={"view": "residency", "limit": 1000})["data"]
    assert version not in {entry["version"] for entry in held}


# -- vLLM's pair -----------------------------------------------------------------------------------------------------


def test_loading_and_unloading_in_vllms_words(local: LocalApp, directory: Path, tiny_bert: TinyBase) -> None:
    body = {"lora_name": "vllm", "lora_path": str(directory)}

    def post(path: str, **more: Any) -> httpx.Response:
        return local.http.post(f"/v1/{path}_lora_adapter", json={**body, **more})

    loaded = post("load", labels=["a", "b", "c"], base=str(tiny_bert.directory))
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'vllm' added successfully.")
    assert loaded.headers["content-type"].startswith("text/plain")
    again = post("load").json()["error"]
    assert again["type"] == "InvalidUserInput" and again["message"] == (
        "The lora adapter 'vllm' has already been loaded. If you want to load the adapter in place, "
        "set 'load_inplace' to True."
    )
    assert post("load", load_inplace=True, lora_path=f"file://{directory}").status_code == 200
    for nowhere in ("/nonexistent", "x" * 5000, "nul\0"):
        missing = post("load", lora_name="v2", lora_path=nowhere)
        assert missing.status_code == 404
        assert missing.json()["error"]["message"] == f"Loading lora v2 failed: No adapter found for {nowhere}"
    assert post("load", lora_name="v2", lora_path="s4://bucket/x").status_code == 422
    assert post("load", lora_name="v2", lora_path="file:///nonexistent").status_code == 422
    assert post("load", lora_name="v2", base="nobody").status_code == 400
    body.pop("lora_path")
    ask(local, "PUT", "/v1/aliases/of-vllm", {"vllm@v1": 1})
    assert post("unload").status_code == 400 and "of-vllm" in post("unload").text
    ask(local, "DELETE", "/v1/aliases/of-vllm")
    unloaded = post("unload", lora_int_id=3)
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'vllm' removed successfully.")
    gone = post("unload")
    assert gone.status_code == 404
    assert gone.json()["error"]["message"] == "The lora adapter 'vllm' cannot be found."
    for empty in ({"lora_name": "", "lora_path": str(directory)}, {"lora_name": "x", "lora_path": ""}):
        nothing = post("load", **empty)
        assert nothing.status_code == 400 and nothing.json()["error"]["type"] == "InvalidUserInput"
        assert nothing.json()["error"]["message"] == "Both 'lora_name' and 'lora_path' must be provided."
    nobody = post("unload", lora_name="")
    assert nobody.status_code == 400 and nobody.json()["error"]["type"] == "InvalidUserInput"
    assert nobody.json()["error"]["message"] == "'lora_name' needs to be provided to unload a LoRA adapter."
