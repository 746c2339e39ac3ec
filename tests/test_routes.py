"""Every inference route over a real engine, without Ray: bodies in, answers and errors out."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from adapter_router.catalog.location import resolve
from adapter_router.catalog.names import Names
from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRouterError
from adapter_router.types import AdapterVersion, BaseInfo, Row, RowOutcome, RowResult, TaskKind
from deployments.api import build_http, image_classify
from deployments.demo.tenants import BASE
from deployments.router import current_router

TAGS = ("O", "B-PER", "I-PER", "LOC")
SPECIES = ("cat", "dog", "eel")
TEXT_ADAPTERS: dict[str, tuple[TaskKind, str, type, tuple[str, ...]]] = {
    "topics": ("text-classification", "SEQ_CLS", AutoModelForSequenceClassification, ("a", "b", "c")),
    "relevance": ("text-classification", "SEQ_CLS", AutoModelForSequenceClassification, ("relevant",)),
    "entities": ("token-classification", "TOKEN_CLS", AutoModelForTokenClassification, TAGS),
    "answers": ("question-answering", "QUESTION_ANS", AutoModelForQuestionAnswering, ()),
    "search": ("embedding", "FEATURE_EXTRACTION", AutoModel, ()),
    "unscaled": ("embedding", "FEATURE_EXTRACTION", AutoModel, ()),
    "of-tokens": ("embedding", "FEATURE_EXTRACTION", AutoModel, ()),
}
MANIFESTS: dict[str, dict[str, Any]] = {"unscaled": {"normalize": False}, "of-tokens": {"pooling": "none"}}


class EngineRouter:
    """What routes ask of the router, from one engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.names = Names()

    async def infer_many(self, rows: Sequence[Row], together: bool = False) -> list[RowOutcome]:  # noqa: ARG002
        return await asyncio.to_thread(self.engine.infer, rows)

    async def version_of(self, row: Row) -> AdapterVersion | AdapterRouterError | None:
        return self.names.find(None if row.adapter == self.engine.info().name else row.adapter, row.head)

    def base_of(self, row: Row) -> BaseInfo:  # noqa: ARG002 - there is only one
        return self.engine.info()

    def result(self, row: Row) -> RowResult:
        (outcome,) = self.engine.infer([row])
        assert isinstance(outcome, RowResult), outcome
        return outcome

    def add(self, name: str, model: Any, task: TaskKind, labels: Sequence[str], directory: Path, **lora: Any) -> None:
        """A random PEFT adapter of ``model``, every one of its tensors away from zero."""
        adapted = get_peft_model(model, LoraConfig(r=4, **lora))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
        adapted.save_pretrained(directory)
        (directory / "adapter_router.json").write_text(json.dumps(MANIFESTS.get(name, {})))
        self.names.add(self.engine.load_adapter(name, directory, task, labels or None).version)

    def client(self) -> TestClient:
        http = build_http()
        http.dependency_overrides[current_router] = lambda: self
        return TestClient(http)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRouter]:
    """The real MiniLM base with an adapter for each task on texts."""
    torch.manual_seed(0)
    with Engine(EngineConfig(base=BASE, device="cpu")) as engine:
        router = EngineRouter(engine)
        for name, (task, peft_task, auto_class, labels) in TEXT_ADAPTERS.items():
            options = {"num_labels": len(labels)} if labels else {}
            model = auto_class.from_pretrained(resolve(BASE), **options)  # type: ignore[attr-defined]
            router.add(
                name,
                model,
                task,
                labels,
                tmp_path_factory.mktemp(name),
                task_type=peft_task,
                target_modules=["query", "value"],
            )
        yield router


@pytest.fixture(scope="module")
def client(router: EngineRouter) -> TestClient:
    return router.client()


@pytest.fixture(scope="module")
def image_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRouter]:
    """A tiny vision base with one adapter."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(directory)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(directory)
    with Engine(EngineConfig(base=str(directory), device="cpu")) as engine:
        router = EngineRouter(engine)
        model = ViTForImageClassification.from_pretrained(directory, num_labels=len(SPECIES))
        lora = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
        router.add("species", model, "image-classification", SPECIES, tmp_path_factory.mktemp("species"), **lora)
        yield router


@pytest.fixture(scope="module")
def image_client(image_router: EngineRouter) -> TestClient:
    return image_router.client()


def post(client: TestClient, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] >= 0
    assert answer["adapter"]["name"] == answer["model"] == body["model"]
    assert answer["adapter"]["version"].startswith("sha256:") and set(answer["adapter"]) == {
        "name",
        "version",
        "replicas",
    }
    return answer


# -- texts -----------------------------------------------------------------------------------------------------------


def test_classify_takes_texts_and_token_ids(client: TestClient, router: EngineRouter) -> None:
    answer = post(client, "/v1/classify", model="topics", input=["one text", "another text"], request_id="r1")
    assert answer["id"] == "classify-r1" and answer["object"] == "list"
    expected = router.result(Row("another text", "topics"))
    assert answer["data"][1]["index"] == 1 and answer["data"][1]["num_classes"] == 3
    assert answer["data"][1]["probs"] == pytest.approx(expected.output["probs"], abs=1e-6)  # type: ignore[typeddict-item]
    by_ids = post(client, "/classify", model="topics", input=[[101, 7592, 102], [101, 102]])
    assert [len(by_ids["data"]), by_ids["usage"]["prompt_tokens"]] == [2, 5]
    logits = post(client, "/v1/classify", model="topics", input="another text", use_activation=False)
    assert logits["data"][0]["probs"] == pytest.approx(expected.logits.tolist(), abs=1e-5)


def test_every_route_takes_mixes(client: TestClient, router: EngineRouter) -> None:
    mix = {"topics": 0.7, "relevance": -0.3}
    expected = router.result(Row("another text", mix, head="topics"))
    spellings: list[dict[str, Any]] = [
        {"model": mix},
        {"merged_adapters": {"ids": list(mix), "weights": list(mix.values()), "merge_strategy": "cat"}},
        {"model": "", "merged_adapters": {"ids": list(mix), "weights": list(mix.values()), "merge_strategy": "cat"}},
    ]
    for spelling in spellings:
        answer = client.post("/v1/classify", json={**spelling, "head": "topics", "input": "another text"}).json()
        assert answer["data"][0]["probs"] == pytest.approx(expected.output["probs"], abs=1e-6)  # type: ignore[typeddict-item]
        assert answer["adapter"]["name"] == "0.7 topics + -0.3 relevance"
        assert answer["adapter"]["version"] == expected.version
        parts = {part["name"]: (part["version"], part["weight"]) for part in answer["adapter"]["parts"]}
        assert parts == {name: (router.names.find(name).digest, weight) for name, weight in mix.items()}  # type: ignore[union-attr]
    embedded = {"model": {"search": 0.5, "unscaled": 0.5}, "head": "search"}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/token-classify": {"model": {"entities": 1}, "input": "Ada in London"},
        "/v1/question-answer": {"model": {"answers": 1}, "question": "Who?", "context": "Ada in London"},
        "/v1/embeddings": {**embedded, "input": "a text"},
        "/v1/score": {**embedded, "text_1": "a text", "text_2": "a text"},
        "/v1/rerank": {"model": {"relevance": 0.5}, "query": "a", "documents": ["b", "c"]},
    }
    for path, body in bodies.items():
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        assert response.json()["adapter"]["name"] == " + ".join(
            f"{float(w)} {name}" for name, w in body["model"].items()
        )


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": {"topics": 0.5, "relevance": 0.5}}, 400, "name one of topics, relevance as head"),
        ({"model": {"topics": 0.5}, "head": "relevance"}, 400, "head 'relevance' is not among the mixed adapters"),
        ({"model": "topics", "head": "topics"}, 400, "head chooses among the adapters of a mix; this is none"),
        ({"model": {"topics": 0.5, "topic": 0.5}}, 404, "no adapter is named 'topic'; did you mean 'topics'"),
        ({"model": {"topics": 0.5, "search": 0.5}, "head": "topics"}, 400, "serve different tasks"),
        ({"model": {}}, 400, "0 adapters"),
        ({"model": {"topics": "0.5"}}, 400, "model"),
        (
            {"merged_adapters": {"ids": ["topics"], "weights": [1, 2], "merge_strategy": "cat"}},
            400,
            "2 weights for 1 ids",
        ),
        ({"merged_adapters": {"ids": ["topics", "topics"], "merge_strategy": "cat"}}, 400, "names an adapter twice"),
        (
            {"model": "topics", "merged_adapters": {"ids": ["topics"], "merge_strategy": "cat"}},
            400,
            "both say who answers",
        ),
        ({"merged_adapters": {"ids": ["topics"], "weights": [1]}}, 400, "merge_strategy"),
        (
            {"merged_adapters": {"ids": ["topics"], "weights": [1], "merge_strategy": "linear"}},
            400,
            "merge_strategy",
        ),
    ],
)
def test_bad_mixes_are_told_what_is_wrong(client: TestClient, body: dict[str, Any], status: int, says: str) -> None:
    response = client.post("/v1/classify", json={**body, "input": "text"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert any(says in text for text in (error["message"], *error.get("problems", ()))), error


def test_token_classify_names_the_stretches_of_each_text(client: TestClient, router: EngineRouter) -> None:
    texts = ["Ada Lovelace met Charles Babbage in London", "Caf\u00e9 in \ud55c\uad6d\uc5b4?"]
    answer = post(client, "/v1/token-classify", model="entities", input=texts, ignore_labels=[])
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    for text, entry in zip(texts, answer["data"], strict=True):
        assert entry["entities"]
        for entity in entry["entities"]:
            assert entity["word"] == text[entity["start"] : entity["end"]]
            assert entity["entity_group"] in {"O", "PER", "LOC"}
    parameters = {"aggregation_strategy": "max", "ignore_labels": ["PER"]}
    entities = post(client, "/v1/token-classify", model="entities", input=texts[0], **parameters)["data"][0]["entities"]
    output = router.result(Row(texts[0], "entities", parameters=parameters)).output
    assert entities == [
        {**entity, "score": pytest.approx(entity["score"], abs=1e-6)}
        for entity in output["entities"]  # type: ignore[typeddict-item]
    ]
    plain = post(client, "/v1/token-classify", model="entities", input=texts[0], aggregation_strategy="none")
    assert all("entity" in entity and "index" in entity for entity in plain["data"][0]["entities"])


def test_question_answer_points_into_the_context(client: TestClient) -> None:
    context = "Ada Lovelace was born in London in 1815."
    body = {"model": "answers", "question": "Where was Ada born?", "context": context, "top_k": 3}
    answers = post(client, "/v1/question-answer", **body)["answers"]
    assert 1 <= len(answers) <= 3
    assert all(answer["answer"] == context[answer["start"] : answer["end"]] != "" for answer in answers)
    assert [a["score"] for a in answers] == sorted((a["score"] for a in answers), reverse=True)
    with_none = post(client, "/v1/question-answer", **{**body, "top_k": 50}, handle_impossible_answer=True)["answers"]
    assert sum(answer["answer"] == "" for answer in with_none) == 1
    short = post(client, "/v1/question-answer", **body, max_answer_len=1)["answers"]
    assert all(" " not in answer["answer"] for answer in short)


def test_embeddings_are_openais(client: TestClient, router: EngineRouter) -> None:
    texts = ["one text", "another text"]
    answer = post(client, "/v1/embeddings", model="search", input=texts)
    assert [(entry["object"], entry["index"]) for entry in answer["data"]] == [("embedding", 0), ("embedding", 1)]
    vectors = np.array([entry["embedding"] for entry in answer["data"]])
    expected = router.result(Row(texts[1], "search")).output["embedding"]  # type: ignore[typeddict-item]
    np.testing.assert_allclose(vectors[1], expected, atol=1e-6)
    encoded = post(client, "/v1/embeddings", model="search", input=texts, encoding_format="base64")
    decoded = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in encoded["data"]]
    np.testing.assert_allclose(decoded, vectors, atol=1e-6)
    cut = np.array(post(client, "/v1/embeddings", model="search", input=texts[0], dimensions=8)["data"][0]["embedding"])
    np.testing.assert_allclose(cut, vectors[0, :8] / np.linalg.norm(vectors[0, :8]), atol=1e-6)
    raw = post(client, "/v1/embeddings", model="search", input=texts[0], normalize=False)["data"][0]["embedding"]
    assert np.linalg.norm(raw) != pytest.approx(1)
    np.testing.assert_allclose(np.array(raw) / np.linalg.norm(raw), vectors[0], atol=1e-5)
    ids = post(client, "/v1/embeddings", model="search", input=[101, 7592, 102])
    assert ids["usage"]["prompt_tokens"] == 3 and len(ids["data"][0]["embedding"]) == vectors.shape[1]
    of_tokens = post(client, "/v1/embeddings", model="of-tokens", input=[101, 7592, 102])["data"][0]["embedding"]
    assert np.shape(of_tokens) == (3, vectors.shape[1])


@pytest.mark.parametrize(
    ("first", "second"),
    [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")],
)
def test_score_of_a_cross_encoder_in_every_spelling(
    client: TestClient, router: EngineRouter, first: str, second: str
) -> None:
    questions, documents = ["Where is London?", "What are eels?"], ["London is a city", "Eels live in water"]

    def expected(*pairs: tuple[str, str]) -> Any:
        results = [router.result(Row(pair, "relevance")).output for pair in pairs]
        return pytest.approx([result["score"] for result in results], abs=1e-6)  # type: ignore[typeddict-item]

    answer = post(client, "/v1/score", **{"model": "relevance", first: questions[0], second: documents})
    assert [(entry["index"], entry["object"]) for entry in answer["data"]] == [(0, "score"), (1, "score")]
    scores = [entry["score"] for entry in answer["data"]]
    assert scores == expected((questions[0], documents[0]), (questions[0], documents[1]))
    paired = post(client, "/score", **{"model": "relevance", first: questions, second: documents})
    assert [entry["score"] for entry in paired["data"]] == expected(*zip(questions, documents, strict=True))


@pytest.mark.parametrize("model", ["search", "unscaled"])
def test_score_of_an_embedding_adapter_is_the_cosine(client: TestClient, router: EngineRouter, model: str) -> None:
    texts = ["Where is London?", "London is a city", "Eels live in water"]
    vectors = [router.result(Row(text, model)).logits.astype(np.float64) for text in texts]
    units = [vector / np.linalg.norm(vector) for vector in vectors]
    one_to_many = post(client, "/v1/score", model=model, text_1=texts[0], text_2=texts[1:])
    assert [e["score"] for e in one_to_many["data"]] == pytest.approx([units[0] @ units[1], units[0] @ units[2]])
    pairs = post(client, "/v1/score", model=model, text_1=texts[:2], text_2=texts[1:])
    assert [e["score"] for e in pairs["data"]] == pytest.approx([units[0] @ units[1], units[1] @ units[2]])


@pytest.mark.parametrize("model", ["relevance", "search"])
def test_rerank_sorts_by_score(client: TestClient, model: str) -> None:
    documents = ["London is a city", "Eels live in water", "The Thames runs through London"]
    scores = post(client, "/v1/score", model=model, text_1="Where is London?", text_2=documents)["data"]
    body = {"model": model, "query": "Where is London?", "documents": [documents[0], {"text": documents[1]}]}
    body["documents"].append(documents[2])  # type: ignore[attr-defined]
    results = post(client, "/v1/rerank", **body)["results"]
    assert [r["relevance_score"] for r in results] == pytest.approx(sorted((s["score"] for s in scores), reverse=True))
    for result in results:
        assert result["relevance_score"] == pytest.approx(scores[result["index"]]["score"], abs=1e-6)
        assert result["document"] == {"text": documents[result["index"]]}
    (best,) = post(client, "/rerank", **body, top_n=1, return_documents=False)["results"]
    assert best["index"] == results[0]["index"] and "document" not in best


LONG = "word " * 600


@pytest.mark.parametrize(
    ("path", "body", "num_rows"),
    [
        ("classify", {"model": "topics", "input": LONG}, 1),
        ("token-classify", {"model": "entities", "input": [LONG, LONG]}, 2),
        ("question-answer", {"model": "answers", "question": "What?", "context": LONG}, 1),
        ("embeddings", {"model": "search", "input": LONG}, 1),
        ("score", {"model": "relevance", "text_1": "What?", "text_2": [LONG, LONG]}, 2),
        ("score", {"model": "search", "text_1": LONG, "text_2": [LONG, LONG]}, 3),
        ("rerank", {"model": "relevance", "query": "What?", "documents": [LONG]}, 1),
    ],
)
def test_a_long_text_is_refused_or_cut_as_asked(
    client: TestClient, path: str, body: dict[str, Any], num_rows: int
) -> None:
    refused = client.post(f"/v1/{path}", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    cut = post(client, f"/v1/{path}", **body, truncate_prompt_tokens=9)
    assert cut["usage"]["prompt_tokens"] == 9 * num_rows


QA = {"model": "answers", "question": "q?", "context": "c"}


@pytest.mark.parametrize(
    ("path", "body", "status", "fragment"),
    [
        ("classify", {"model": "nobody", "input": "x"}, 404, "nobody"),
        ("classify", {"model": "topics", "input": []}, 400, "input"),
        ("classify", {"model": "topics", "input": [True]}, 400, "input"),
        ("classify", {"model": "search", "input": "x"}, 422, "embedding"),
        ("token-classify", {"model": "entities"}, 400, "Field required"),
        ("token-classify", {"model": "entities", "input": "x", "aggregation_strategy": "median"}, 400, "'average'"),
        ("token-classify", {"model": "entities", "input": "x", "ignore_labels": "O"}, 400, "ignore_labels"),
        ("token-classify", {"model": "entities", "input": "x", "stride": 3}, 400, "stride"),
        ("token-classify", {"model": "topics", "input": "x"}, 422, "text-classification"),
        ("token-classify", {"model": "nobody", "input": "x"}, 404, "nobody"),
        ("question-answer", {**QA, "question": ""}, 400, "question"),
        ("question-answer", {**QA, "context": ["a", "b"]}, 400, "context"),
        ("question-answer", {**QA, "top_k": 0}, 400, "top_k"),
        ("question-answer", {**QA, "top_k": 10**9}, 400, "top_k"),
        ("question-answer", {**QA, "max_answer_len": "7"}, 400, "max_answer_len"),
        ("question-answer", {**QA, "model": "entities"}, 422, "token-classification"),
        ("embeddings", {"model": "search", "input": "x", "encoding_format": "hex"}, 400, "encoding_format"),
        ("embeddings", {"model": "search", "input": "x", "dimensions": 0}, 400, "dimensions"),
        ("embeddings", {"model": "search", "input": "x", "dimensions": 385}, 400, "384"),
        ("embeddings", {"model": "search", "input": "x", "normalize": "yes"}, 400, "normalize"),
        ("embeddings", {"model": "search", "input": [[]]}, 400, "input"),
        ("embeddings", {"model": "topics", "input": "x"}, 422, "text-classification"),
        ("score", {"model": "relevance", "text_1": ["a", "b"], "text_2": ["c"] * 3}, 400, "2 texts against 3"),
        ("score", {"model": "relevance", "text_1": "a", "queries": "a", "text_2": "b"}, 400, "queries"),
        ("score", {"model": "relevance", "text_1": "a"}, 400, "text_2"),
        ("score", {"model": "topics", "text_1": "a", "text_2": "b"}, 422, "3 labels"),
        ("score", {"model": "of-tokens", "text_1": "a", "text_2": "b"}, 422, "one vector a token"),
        ("embeddings", {"model": "of-tokens", "input": "x", "encoding_format": "base64"}, 400, "encoding_format float"),
        ("score", {"model": "entities", "text_1": "a", "text_2": "b"}, 422, "token-classification"),
        ("score", {"model": "nobody", "text_1": "a", "text_2": "b"}, 404, "nobody"),
        ("rerank", {"model": "relevance", "query": "a", "documents": []}, 400, "documents"),
        ("rerank", {"model": "relevance", "query": "a", "documents": [{"title": "b"}]}, 400, "documents"),
        ("rerank", {"model": "relevance", "query": "a", "documents": ["b"], "top_n": -1}, 400, "top_n"),
    ],
)
def test_bad_bodies(client: TestClient, path: str, body: dict[str, Any], status: int, fragment: str) -> None:
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"} and fragment in str(error)


# -- images ----------------------------------------------------------------------------------------------------------


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def test_images_come_as_base64_data_urls_or_the_body_itself(
    image_client: TestClient, image_router: EngineRouter
) -> None:
    images = [picture(0), picture(1)]
    texts = [base64.b64encode(images[0]).decode(), "data:image/png;base64," + base64.b64encode(images[1]).decode()]
    answer = post(image_client, "/v1/image-classify", model="species", input=texts)
    for index, (image, entry) in enumerate(zip(images, answer["data"], strict=True)):
        expected = image_router.result(Row(image, "species")).output
        assert entry["index"] == index and entry["label"] == expected["label"]  # type: ignore[typeddict-item]
        assert entry["probs"] == pytest.approx(expected["probs"], abs=1e-6)  # type: ignore[typeddict-item]
    for kind in ("image/png", "application/octet-stream"):
        raw = image_client.post(
            "/v1/image-classify?model=species&top_k=2", content=images[0], headers={"content-type": kind}
        )
        (entry,) = raw.json()["data"]
        assert entry["probs"] == pytest.approx(answer["data"][0]["probs"], abs=1e-6)
        assert entry["top_k"][0] == {"label": entry["label"], "score": entry["score"]}
        assert [best["score"] for best in entry["top_k"]] == sorted(entry["probs"], reverse=True)[:2]
    logits = image_client.post(
        "/v1/image-classify?model=species&use_activation=false", content=images[0], headers={"content-type": "image/x"}
    )
    assert sum(logits.json()["data"][0]["probs"]) != pytest.approx(1)


PNG = base64.b64encode(picture(0)).decode()


@pytest.mark.parametrize(
    ("body", "status", "fragment"),
    [
        ({"model": "species", "input": "not base64!"}, 400, "base64"),
        ({"model": "species", "input": "https://example.com/cat.png"}, 400, "base64"),
        ({"model": "species", "input": "data:image/png,abc"}, 400, "data:TYPE;base64"),
        ({"model": "species", "input": ""}, 400, "input"),
        ({"model": "species", "input": []}, 400, "input"),
        ({"model": "species", "input": "bm90IGFuIGltYWdl"}, 400, "image"),
        ({"model": "species", "input": PNG, "top_k": 0}, 400, "top_k"),
        ({"model": "species", "input": PNG, "truncate_prompt_tokens": 4}, 400, "truncate_prompt_tokens"),
        ({"model": "nobody", "input": PNG}, 404, "nobody"),
    ],
)
def test_bad_image_bodies(image_client: TestClient, body: dict[str, Any], status: int, fragment: str) -> None:
    response = image_client.post("/v1/image-classify", json=body)
    assert response.status_code == status and fragment in str(response.json()["error"]), response.text


@pytest.mark.parametrize(
    ("content", "kind", "query", "fragment"),
    [
        (b"", "image/png", "?model=species", "empty"),
        (b"{", "application/json", "", "Invalid JSON"),
        (b"\xff", "application/json; charset=utf-8", "", "malformed"),
        (b"GIF", "image/gif", "?model=species", "image"),
        (picture(0), "image/png", "?model=species&mode=x", "mode"),
        (picture(0), "image/png", "?model=species&top_k=many", "top_k"),
        (picture(0), "multipart/form-data", "?model=species", "content-type"),
        (bytes(image_classify.MAX_BODY_BYTES + 1), "image/png", "?model=species", "larger than"),
    ],
)
def test_bad_raw_bodies(image_client: TestClient, content: bytes, kind: str, query: str, fragment: str) -> None:
    response = image_client.post(f"/v1/image-classify{query}", content=content, headers={"content-type": kind})
    assert response.status_code == 400 and fragment in str(response.json()["error"]), response.text


def test_the_routes_describe_themselves() -> None:
    paths = build_http().openapi()["paths"]
    assert set(paths["/v1/image-classify"]["post"]["requestBody"]["content"]) >= {"application/json", "image/*"}
    assert "/score" not in paths and "/rerank" not in paths
