"""One text, many adapters: each answers as it does alone, one tokenisation, one forward, errors in their place."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from adapter_router.engine import Engine
from adapter_router.errors import Overloaded
from adapter_router.types import Row
from tests.recorder import Recorder, encodings, sample, tenants_engine

TEXTS = ["742 Maple Street, Springfield, IL 62704", "switch the heater off"]
CLASSIFIERS = ["language", "guardrail", "smart-home"]


@pytest.fixture(scope="module")
def tenants() -> Iterator[Engine]:
    with tenants_engine() as engine:
        yield engine


@pytest.fixture
def recorder(tenants: Engine) -> Recorder:
    return Recorder(tenants)


@pytest.fixture
def http(recorder: Recorder) -> Iterator[TestClient]:
    with recorder.client() as client:
        yield client


def post(http: TestClient, path: str, **body: Any) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def alike(value: Any) -> Any:
    """``value``, numbers compared with a tolerance."""
    if isinstance(value, dict):
        return {key: alike(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [alike(entry) for entry in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("path", "names", "body"),
    [
        ("/v1/classify", CLASSIFIERS, {"use_activation": False}),
        ("/v1/token-classify", ["addresses"], {"aggregation_strategy": "first", "ignore_labels": []}),
        ("/v1/embeddings", ["intent-search"], {"dimensions": 8}),
    ],
)
def test_each_adapter_answers_as_if_asked_alone(
    http: TestClient, recorder: Recorder, path: str, names: list[str], body: dict[str, Any]
) -> None:
    alone = {name: post(http, path, model=name, input=TEXTS, **body) for name in names}
    recorder.calls.clear()
    answer = post(http, path, model=names, input=TEXTS, request_id="r1", **body)
    ((rows, together),) = recorder.calls
    assert together and [row.adapter for row in rows] == [name for name in names for _ in TEXTS]
    assert answer["object"] == "list" and answer["model"] == names and answer["id"].endswith("-r1")
    assert list(answer["data"]) == names and answer["data"] == {n: alike(alone[n]["data"]) for n in names}
    assert answer["adapters"] == {name: alone[name]["adapter"] for name in names}
    tokens = sum(one["usage"]["prompt_tokens"] for one in alone.values())
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == tokens > 0


def test_classifiers_of_texts_and_of_tokens_answer_side_by_side(
    http: TestClient, tenants: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [post(http, "/v1/classify", model=name, input=TEXTS[0])["data"] for name in CLASSIFIERS]
    entities = post(http, "/v1/token-classify", model="addresses", input=TEXTS[0], aggregation_strategy="max")["data"]
    seen = encodings(tenants, monkeypatch)
    forwards = sample(tenants, "forwards_total")
    names = [*CLASSIFIERS, "addresses"]
    answer = post(http, "/v1/classify_multi", models=names, input=TEXTS[0], aggregation_strategy="max")
    assert len(seen) == 1 and sample(tenants, "forwards_total") - forwards == 1
    assert answer["model"] == names
    assert answer["data"] == alike(dict(zip(names, [*labels, entities], strict=True)))


def test_an_adapter_that_fails_has_its_error_in_its_place(http: TestClient) -> None:
    names = ["nobody", "language", "intent-search"]
    answer = post(http, "/v1/classify_multi", models=names, input=TEXTS[0])
    assert answer["data"]["language"][0]["label"] and list(answer["adapters"]) == ["language"]
    codes = {name: answer["data"][name]["error"]["code"] for name in ("nobody", "intent-search")}
    assert codes == {"nobody": "model_not_found", "intent-search": "task_mismatch"}
    alone = post(http, "/v1/classify", model="language", input=TEXTS[0])
    assert answer["usage"] == alone["usage"]


def test_an_answer_that_cannot_be_written_is_its_adapters_error_alone(http: TestClient, tenants: Engine) -> None:
    body = {"input": TEXTS[0], "encoding_format": "base64"}
    answer = post(http, "/v1/embeddings", model=["intent-search", "language"], **body)
    vector = np.frombuffer(base64.b64decode(answer["data"]["intent-search"][0]["embedding"]), "<f4")
    (result,) = tenants.infer([Row(TEXTS[0], "intent-search")])
    np.testing.assert_allclose(vector, result.output["embedding"], atol=1e-5)  # type: ignore[union-attr, typeddict-item]
    assert answer["data"]["language"]["error"]["code"] == "task_mismatch"


def test_when_all_fail_the_first_ones_error_is_the_answer(http: TestClient, recorder: Recorder) -> None:
    response = http.post("/v1/classify", json={"model": ["intent-search", "nobody"], "input": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "task_mismatch")
    recorder.error = Overloaded("full", retry_after_s=6.5)
    response = http.post("/v1/classify", json={"model": CLASSIFIERS, "input": "x"})
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "at least 1 item"),
        ([""], "at least 1 character"),
        (["language", "guardrail", "language"], "'language' stands there twice"),
        ([f"a{number}" for number in range(65)], "at most 64"),
        (["language", 7], "valid string"),
        (["language", {"guardrail": 0.5}], "valid string"),
    ],
)
@pytest.mark.parametrize(("path", "field"), [("/v1/classify", "model"), ("/v1/classify_multi", "models")])
def test_bad_lists_of_adapters(
    http: TestClient, recorder: Recorder, path: str, field: str, names: list[Any], says: str
) -> None:
    response = http.post(path, json={field: names, "input": "x"})
    error = response.json()["error"]
    assert response.status_code == 400 and recorder.calls == []
    assert any(problem.startswith(field) and says in problem for problem in error["problems"]), error


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score", {"model": ["intent-search"], "text_1": "a", "text_2": "b"}),
        ("/v1/question-answer", {"model": ["address-questions"], "question": "a", "context": "b"}),
        ("/v1/classify_multi", {"input": "x"}),
        ("/v1/classify_multi", {"models": ["language"], "input": [[101, 102]]}),
        ("/v1/classify_multi", {"models": ["language"], "input": []}),
        ("/v1/classify_multi", {"models": ["language"], "model": "language", "input": "x"}),
        (
            "/v1/classify",
            {"model": ["language"], "merged_adapters": {"ids": ["a"], "merge_strategy": "cat"}, "input": "x"},
        ),
        ("/v1/classify", {"model": ["language"], "head": "language", "input": "x"}),
    ],
)
def test_what_takes_no_list_or_nothing_but_one_says_so(http: TestClient, path: str, body: dict[str, Any]) -> None:
    assert http.post(path, json=body).status_code == 400


def test_all_adapters_of_a_request_see_the_same_user(http: TestClient, recorder: Recorder) -> None:
    post(http, "/v1/classify", model=CLASSIFIERS, input=TEXTS, user="somebody")
    assert {row.sticky_key for row in recorder.rows} == {"somebody"}
    recorder.calls.clear()
    post(http, "/v1/classify_multi", models=["language", "addresses"], input=TEXTS)
    (key,) = {row.sticky_key for row in recorder.rows}
    assert key
