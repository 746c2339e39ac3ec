"""An adapter is served exactly as by PEFT alone, or refused with every reason at once and without effect."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterNotFound, AdapterRejected
from adapter_router.types import LoadReport, Row, RowResult
from tests.tiny import TinyBase, edit_config, edit_tensors, peft_logits, random_features, random_row

LABELS = 3
PREFIX = "base_model.model."
QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = "bert.encoder.layer.0.attention.self.key"
VALUE = "bert.encoder.layer.1.attention.self.value"
QUERY_A, QUERY_B = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight"
VALUE_A, VALUE_B = f"{PREFIX}{VALUE}.lora_A.weight", f"{PREFIX}{VALUE}.lora_B.weight"
HEAD = f"{PREFIX}classifier"
EMBEDDINGS = f"{PREFIX}bert.embeddings.word_embeddings"
PARAMETERS = "adapter_model.safetensors"

Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as PEFT saves it, to be copied and spoiled."""
    return tiny_bert.adapter(tmp_path_factory.mktemp("saved") / "adapter", LABELS, 1)


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A private copy of ``saved``."""
    return shutil.copytree(saved, tmp_path / "adapter")


@pytest.fixture(scope="module")
def good(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.adapter(tmp_path_factory.mktemp("good") / "adapter", 2, 2)


def configured(**fields: Any) -> Spoil:
    return lambda directory: edit_config(directory, **fields)


def config_bytes(raw: bytes) -> Spoil:
    return lambda directory: (directory / "adapter_config.json").write_bytes(raw)


def head_config(document: Any) -> Spoil:
    return lambda directory: (directory / "config.json").write_text(json.dumps(document))


def weights(raw: bytes) -> Spoil:
    return lambda directory: (directory / PARAMETERS).write_bytes(raw)


def with_header(header: bytes) -> Spoil:
    return weights(struct.pack("<Q", len(header)) + header)


def truncated(directory: Path) -> None:
    path = directory / PARAMETERS
    path.write_bytes(path.read_bytes()[:-100])


def added(shapes: dict[str, tuple[int, ...]]) -> Spoil:
    return lambda directory: edit_tensors(directory, lambda t: t.update({k: torch.ones(s) for k, s in shapes.items()}))


def removed(*names: str) -> Spoil:
    return lambda directory: edit_tensors(directory, lambda tensors: [tensors.pop(name) for name in names])


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors.update({name: change(tensors[name])}))


def renamed(old: str, new: str) -> Spoil:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors.update({new: tensors.pop(old)}))


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor with ``value`` in its last place."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


def without_labels(directory: Path) -> None:
    empty = {f"{HEAD}.weight": torch.zeros(0, 32), f"{HEAD}.bias": torch.zeros(0)}
    edit_tensors(directory, lambda tensors: tensors.update(empty))


FILES: list[tuple[str, Spoil, list[str]]] = [
    ("truncated", truncated, ["damaged"]),
    ("empty", weights(b""), ["damaged"]),
    ("seven bytes", weights(b"1234567"), ["damaged"]),
    ("huge header", weights(struct.pack("<Q", 1 << 62) + b"{}"), [f"header of {1 << 62} bytes"]),
    ("header not JSON", with_header(b"{" * 64), ["header is not JSON"]),
    ("header not text", with_header(b"\xff\xfe" * 8), ["header is not JSON"]),
    ("header nested deep", with_header(b"[" * 200_000), ["header is not JSON"]),
    ("header a list", with_header(b"[1, 2]"), ["header is not a JSON object"]),
    ("header of numbers", with_header(b'{"a": 5}'), ["damaged"]),
    ("no tensors", with_header(b"{}"), ["no tensor for this base", "4 target modules have no LoRA tensors"]),
    ("config not JSON", config_bytes(b"{'r': 8}"), ["adapter_config.json is not JSON"]),
    ("config not text", config_bytes(b"\xff\xfe"), ["adapter_config.json is not JSON"]),
    ("config nested deep", config_bytes(b"[" * 200_000), ["adapter_config.json is not JSON"]),
    ("config a list", config_bytes(b"[]"), ["adapter_config.json is not a JSON object"]),
    ("config too large", config_bytes(b" " * (1 << 20) + b"{}"), ["adapter_config.json has 1048578 bytes"]),
    (
        "config absent",
        lambda directory: (directory / "adapter_config.json").unlink(),
        ["adapter_config.json is missing"],
    ),
]

TENSORS: list[tuple[str, Spoil, list[str]]] = [
    ("NaN", replaced(QUERY_A, filled(float("nan"))), [f"{QUERY_A} holds NaN"]),
    ("Inf", replaced(f"{HEAD}.bias", filled(float("-inf"))), [f"{HEAD}.bias holds NaN or infinite"]),
    ("int8", replaced(QUERY_B, lambda t: t.to(torch.int8)), [f"{QUERY_B} has dtype I8"]),
    ("float64", replaced(f"{HEAD}.weight", lambda t: t.double()), [f"{HEAD}.weight has dtype F64"]),
    ("lora_B gone", removed(QUERY_B), [f"{QUERY} has lora_A without its partner"]),
    ("lora_A gone", removed(VALUE_A), [f"{VALUE} has lora_B without its partner"]),
    (
        "target gone",
        removed(VALUE_A, VALUE_B),
        [f"1 target modules have no LoRA tensors: {VALUE}"],
    ),
    (
        "undeclared LoRA",
        added({f"{PREFIX}{KEY}.lora_A.weight": (8, 32), f"{PREFIX}{KEY}.lora_B.weight": (32, 8)}),
        [f"target_modules does not name: {KEY}"],
    ),
    (
        "LoRA on a module the base lacks",
        added(
            {
                f"{PREFIX}bert.encoder.layer.9.x.lora_A.weight": (8, 32),
                f"{PREFIX}bert.encoder.layer.9.x.lora_B.weight": (32, 8),
            }
        ),
        ["modules this base does not have: bert.encoder.layer.9.x"],
    ),
    ("LoRA on an embedding", added({f"{EMBEDDINGS}.lora_embedding_A": (8, 100)}), [f"{EMBEDDINGS}.lora_embedding_A"]),
    (
        "DoRA magnitude",
        added({f"{PREFIX}{QUERY}.lora_magnitude_vector": (32,)}),
        ["1 tensors have no place", "magnitude"],
    ),
    (
        "base weight",
        added({f"{EMBEDDINGS}.weight": (100, 32)}),
        [f"1 tensors have no place in this base: {EMBEDDINGS}"],
    ),
    ("base bias", added({f"{PREFIX}{QUERY}.bias": (32,)}), [f"no place in this base: {PREFIX}{QUERY}.bias"]),
    ("head tensor too many", added({f"{HEAD}.scale": (3,)}), [f"no place in this base: {HEAD}.scale"]),
    (
        "no prefix",
        renamed(f"{HEAD}.weight", "classifier.weight"),
        ["no place in this base: classifier.weight", "saved module classifier lacks classifier.weight"],
    ),
    ("other prefix", added({"model.bert.pooler.dense.weight": (32, 32)}), ["model.bert.pooler.dense.weight"]),
    (
        "adapter name in the key",
        renamed(QUERY_A, f"{PREFIX}{QUERY}.lora_A.default.weight"),
        [f"no place in this base: {PREFIX}{QUERY}.lora_A.default.weight", "has lora_B without its partner"],
    ),
    (
        "A too narrow",
        replaced(QUERY_A, lambda t: t[:, :31]),
        [f"{QUERY}.lora_A has shape [8, 31], this base and config need [8, 32]"],
    ),
    ("A transposed", replaced(QUERY_A, lambda t: t.t()), ["lora_A has shape [32, 8]"]),
    ("A flat", replaced(QUERY_A, lambda t: t.reshape(-1)), ["lora_A has shape [256]"]),
    ("B too tall", replaced(QUERY_B, lambda t: t.repeat(2, 1)), ["lora_B has shape [64, 8]"]),
    ("A of rank 1", replaced(QUERY_A, lambda t: t[:1]), ["lora_A has shape [1, 32]"]),
    ("head disagrees", replaced(f"{HEAD}.bias", lambda t: t[:2]), ["disagree on the number of labels"]),
    ("head too narrow", replaced(f"{HEAD}.weight", lambda t: t[:, :16]), ["classifier.weight has shape [3, 16]"]),
    ("head a scalar", replaced(f"{HEAD}.bias", lambda t: t[0]), ["classifier.bias has shape []"]),
    ("head without labels", without_labels, ["label"]),
    ("head lacks its bias", removed(f"{HEAD}.bias"), ["saved module classifier lacks classifier.bias"]),
]

CONFIGS: list[tuple[str, Spoil, list[str]]] = [
    ("rank of another", configured(r=4), ["lora_A has shape [8, 32], this base and config need [4, 32]"]),
    ("r=0", configured(r=0), ["r is 0, must be an integer"]),
    ("r=-8", configured(r=-8), ["r is -8"]),
    ("r=1000000", configured(r=1_000_000), ["r is 1000000"]),
    ("r='8'", configured(r="8"), ["r is '8'"]),
    ("r=8.0", configured(r=8.0), ["r is 8.0"]),
    ("r=true", configured(r=True), ["r is True"]),
    ("r=null", configured(r=None), ["r is None"]),
    ("alpha NaN", configured(lora_alpha=float("nan")), ["lora_alpha is nan"]),
    ("alpha Infinity", configured(lora_alpha=float("inf")), ["lora_alpha is inf"]),
    ("alpha beyond any float", configured(lora_alpha=10**400), ["lora_alpha is 1000"]),
    ("alpha a string", configured(lora_alpha="16"), ["lora_alpha is '16'"]),
    ("rank_pattern a list", configured(rank_pattern=["query"]), ["rank_pattern is ['query'], must be an object"]),
    ("rank_pattern of 0", configured(rank_pattern={"query": 0}), ["rank_pattern['query'] is 0"]),
    ("alpha_pattern a number", configured(alpha_pattern=3), ["alpha_pattern is 3, must be an object"]),
    ("alpha_pattern NaN", configured(alpha_pattern={"key": float("nan")}), ["alpha_pattern['key'] is nan"]),
    ("use_rslora a string", configured(use_rslora="no"), ["use_rslora is 'no'"]),
    ("target_modules a number", configured(target_modules=5), ["target_modules is 5"]),
    ("target_modules of numbers", configured(target_modules=[5]), ["target_modules is [5]"]),
    ("targets do not compile", configured(target_modules="(query"), ["pattern '(query' is not a regular expression"]),
    ("excludes do not compile", configured(exclude_modules="*"), ["is not a regular expression"]),
    ("rank key does not compile", configured(rank_pattern={"[": 8}), ["is not a regular expression"]),
    ("alpha key does not compile", configured(alpha_pattern={"(?P<x": 8}), ["is not a regular expression"]),
    ("saved name does not compile", configured(modules_to_save=["classifier", "("]), ["is not a regular expression"]),
    (
        "layers_pattern does not compile",
        configured(layers_to_transform=[0], layers_pattern="("),
        ["is not a regular expression"],
    ),
    # PEFT raises on these, so nothing says what serving them exactly would be.
    ("brackets that only our wrapping closes", configured(target_modules=".*query)|(.*value"), ["regular expression"]),
    ("syntax that re lacks", configured(target_modules=r".*\p{Ll}\.(query|value)"), ["regular expression"]),
    ("layers_pattern alone", configured(layers_pattern=["layer"]), ["layers_pattern"]),
    (
        "layers with a string of targets",
        configured(target_modules=".*(query|value)", layers_to_transform=[0, 1]),
        ["layers_to_transform"],
    ),
    # To re these braces are letters, to regex they allow one wrong letter.
    ("fuzzy targets", configured(target_modules=r".*\.(querx|valux){s<=1}"), ["stray brace"]),
    ("layers a string", configured(layers_to_transform="0"), ["layers_to_transform is '0'"]),
    ("excluded yet present", configured(exclude_modules=["query"]), ["target_modules does not name"]),
    ("saves what the base lacks", configured(modules_to_save=["classifier", "nothing"]), ["names 'nothing'"]),
    (
        "saves what is not there",
        configured(modules_to_save=["classifier", "pooler"]),
        ["saved module bert.pooler lacks"],
    ),
    (
        "head not declared",
        configured(modules_to_save=None, task_type=None),
        ["no place in this base", "neither the base nor the adapter"],
    ),
    ("peft_type IA3", configured(peft_type="IA3"), ["peft_type 'IA3' is not served"]),
    ("peft_type absent", configured(peft_type=None), ["peft_type None is not served"]),
    ("DoRA", configured(use_dora=True), ["use_dora=true is not served"]),
    ("lora_bias", configured(lora_bias=True), ["lora_bias=true is not served"]),
    ("bias all", configured(bias="all"), ["bias='all' is not served"]),
    ("bias lora_only", configured(bias="lora_only"), ["bias='lora_only' is not served"]),
    ("trained tokens", configured(trainable_token_indices=[1, 2]), ["trainable_token_indices=[1, 2] is not served"]),
    ("target_parameters", configured(target_parameters=["x"]), ['target_parameters=["x"] is not served']),
    ("layer_replication", configured(layer_replication=[[0, 2]]), ["layer_replication=[[0, 2]] is not served"]),
    ("aLoRA", configured(alora_invocation_tokens=[5]), ["alora_invocation_tokens=[5] is not served"]),
    ("PiSSA", configured(init_lora_weights="pissa"), ["init_lora_weights='pissa' changes the base"]),
    ("fast PiSSA", configured(init_lora_weights="pissa_niter_4"), ["init_lora_weights='pissa_niter_4'"]),
    ("OLoRA", configured(init_lora_weights="olora"), ["init_lora_weights='olora'"]),
    ("OLoRA in capitals, as PEFT takes it too", configured(init_lora_weights="OLoRA"), ["init_lora_weights='OLoRA'"]),
    ("unknown field", configured(future_gate=0.5), ["future_gate=0.5 is not served"]),
]

HEADS: list[tuple[str, Spoil, list[str]]] = [
    ("not JSON", lambda directory: (directory / "config.json").write_text("{"), ["config.json is not JSON"]),
    ("a list", head_config([]), ["config.json is not a JSON object"]),
    (
        "too large",
        lambda directory: (directory / "config.json").write_bytes(b" " * (2 << 20)),
        ["config.json has 2097152"],
    ),
    ("two names", head_config({"id2label": {"0": "a", "1": "b"}}), ["2 label names for a head of 3 labels"]),
    ("no names", head_config({"id2label": {}}), ["0 label names for a head of 3 labels"]),
    ("names repeat", head_config({"id2label": {"0": "a", "1": "b", "2": "a"}}), ["label names repeat"]),
    ("names in a list", head_config({"id2label": ["a", "b", "c"]}), ["id2label is not an object"]),
    ("names by word", head_config({"id2label": {"one": "a"}}), ["id2label is not an object"]),
    (
        "names with a gap",
        head_config({"id2label": {"0": "a", "1": "b", "3": "c"}}),
        ["id2label has the indices [0, 1, 3]"],
    ),
    ("another model", head_config({"model_type": "roberta"}), ["trained on a 'roberta' model, this base is 'bert'"]),
    ("unknown problem type", head_config({"problem_type": "ranking"}), ["problem_type 'ranking' is none of"]),
    ("problem type a list", head_config({"problem_type": ["regression"]}), ["problem_type ['regression'] is none of"]),
]


def assert_refused(engine: Engine, directory: Path, fragments: list[str], **options: Any) -> AdapterRejected:
    """Loading ``directory`` names every fragment among its problems and leaves everything as it was."""
    witness = random_row(np.random.default_rng(0), "good")
    resident = engine.resident()
    (before,) = engine.infer([witness])
    with pytest.raises(AdapterRejected) as caught:
        engine.load_adapter("bad", directory, **options)
    problems = caught.value.problems
    for fragment in fragments:
        assert any(fragment in problem for problem in problems), f"{fragment!r} is not among {problems}"
    assert all(problem in str(caught.value) for problem in problems)
    assert engine.resident() == resident
    after, unknown = engine.infer([witness, Row(witness.inputs, "bad")])
    assert type(unknown) is AdapterNotFound
    assert isinstance(before, RowResult) and isinstance(after, RowResult)
    assert before.version == after.version and before.output == after.output
    assert before.logits.tobytes() == after.logits.tobytes()
    return caught.value


def assert_equals_peft(engine: Engine, base: TinyBase, directory: Path, num_labels: int = LABELS) -> LoadReport:
    report = engine.load_adapter("odd", directory)
    alone = base.alone(directory, num_labels)
    rng = np.random.default_rng(0)
    for features in [random_features(rng) for _ in range(8)]:
        (result,) = engine.infer([Row(features, "odd")])
        assert isinstance(result, RowResult), result
        np.testing.assert_allclose(result.logits, peft_logits(alone, features), atol=1e-5, rtol=0)
    return report


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        pytest.param(spoil, fragments, id=f"{kind}-{name}")
        for kind, cases in (("files", FILES), ("tensors", TENSORS), ("config", CONFIGS), ("head", HEADS))
        for name, spoil, fragments in cases
    ],
)
def test_spoiled_adapter_is_refused(
    spoil: Spoil, fragments: list[str], engine: Engine, good: Path, adapter: Path
) -> None:
    engine.load_adapter("good", good)
    spoil(adapter)
    assert_refused(engine, adapter, fragments)


@pytest.mark.parametrize(
    ("labels", "fragment"),
    [
        (["a", "b"], "2 label names for a head of 3 labels"),
        (["a", "b", "c", "d"], "4 label names"),
        ([], "0 label names"),
        (["a", "b", "a"], "label names repeat"),
    ],
)
def test_labels_that_do_not_fit_the_head(
    labels: list[str], fragment: str, engine: Engine, good: Path, adapter: Path
) -> None:
    engine.load_adapter("good", good)
    assert_refused(engine, adapter, [fragment], labels=labels)


def test_refused_labels_leave_the_same_content_served_under_another_name(engine: Engine, good: Path) -> None:
    engine.load_adapter("good", good)
    assert_refused(engine, good, ["3 label names for a head of 2 labels"], labels=["a", "b", "c"])


def test_adapter_of_another_architecture(engine: Engine, good: Path, tmp_path: Path) -> None:
    engine.load_adapter("good", good)
    other = TinyBase("distilbert", tmp_path / "base").adapter(tmp_path / "other", LABELS, 1)
    fragments = ["this base does not have: distilbert.transformer.layer.0.attention.q_lin", "pre_classifier.weight"]
    assert_refused(engine, other, fragments)


def test_adapter_of_another_width(engine: Engine, good: Path, tmp_path: Path) -> None:
    engine.load_adapter("good", good)
    wide = BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=100,
        num_labels=LABELS,
    )
    model = AutoModelForSequenceClassification.from_config(wide)
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query"])).save_pretrained(
        tmp_path / "wide"
    )
    fragments = ["0.attention.self.query.lora_A has shape [8, 64]", "classifier.weight has shape [3, 64]"]
    assert_refused(engine, tmp_path / "wide", fragments)


def test_adapter_without_a_head_on_a_base_without_one(
    tiny_bert: TinyBase, engine: Engine, good: Path, tmp_path: Path
) -> None:
    engine.load_adapter("good", good)
    headless = tiny_bert.adapter(tmp_path / "headless", LABELS, 1, task_type=None)
    assert_refused(engine, headless, ["neither the base nor the adapter holds classifier.bias, classifier.weight"])


def test_adapter_larger_than_the_room_for_all(tiny_bert: TinyBase, good: Path, tmp_path: Path) -> None:
    large = tiny_bert.adapter(tmp_path / "large", LABELS, 1, r=64)
    config = EngineConfig(base=str(tiny_bert.directory), device="cpu", adapter_memory_bytes=50_000)
    with Engine(config) as engine:
        engine.load_adapter("good", good)
        assert_refused(engine, large, ["adapter_memory_bytes is 50000"])


EXPONENTIAL = r"((\w|\.|[a-z])+)+\1\1\1\1X?"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"(\w+\.?)+X"},
        {"target_modules": EXPONENTIAL},
        {"exclude_modules": EXPONENTIAL},
        {"rank_pattern": {EXPONENTIAL: 8}},
        {"alpha_pattern": {EXPONENTIAL: 8}},
        {"modules_to_save": ["classifier", EXPONENTIAL]},
        {"layers_pattern": [EXPONENTIAL], "layers_to_transform": [0, 1]},
    ],
    ids=["issue", "targets", "excludes", "ranks", "alphas", "saved", "layers"],
)
def test_exponential_expression_is_refused_within_5_seconds(
    fields: dict[str, Any], engine: Engine, good: Path, adapter: Path
) -> None:
    engine.load_adapter("good", good)
    edit_config(adapter, **fields)
    start = time.monotonic()
    assert_refused(engine, adapter, [])
    assert time.monotonic() - start < 5


def test_many_slow_expressions_do_not_hold_the_loader(engine: Engine, adapter: Path) -> None:
    """Each is far below any limit on one match; whether all are refused or served, it must not take long."""
    slow = [rf"(\w|\w\w|\.){{16}}(?<=[{index}!])" for index in range(1000)]
    edit_config(adapter, alpha_pattern=dict.fromkeys(slow, 8))
    start = time.monotonic()
    with contextlib.suppress(AdapterRejected):
        engine.load_adapter("slow", adapter)
    assert time.monotonic() - start < 5


def test_five_independent_faults_are_listed_together(engine: Engine, good: Path, adapter: Path) -> None:
    engine.load_adapter("good", good)
    configured(use_dora=True, bias="all")(adapter)
    head_config({"model_type": "roberta"})(adapter)
    removed(QUERY_B)(adapter)
    added({f"{EMBEDDINGS}.weight": (100, 32)})(adapter)
    error = assert_refused(
        engine,
        adapter,
        ["use_dora=true", "bias='all'", "trained on a 'roberta' model", "without its partner", f"{EMBEDDINGS}.weight"],
    )
    assert len(error.problems) == 5


@pytest.mark.parametrize(
    ("faults", "fragments"),
    [
        ([truncated, configured(bias="all"), head_config([])], ["damaged", "bias='all'", "config.json is not a JSON"]),
        ([truncated, config_bytes(b"{")], ["damaged", "adapter_config.json is not JSON"]),
        (
            [
                replaced(QUERY_A, filled(float("nan"))),
                replaced(f"{HEAD}.weight", filled(float("inf"))),
                removed(VALUE_B),
            ],
            [f"{QUERY_A} holds NaN", f"{HEAD}.weight holds NaN", "without its partner"],
        ),
        (
            [configured(rank_pattern={"(": 4}), replaced(f"{HEAD}.weight", lambda t: t[:, :16])],
            ["is not a regular expression", "classifier.weight has shape [3, 16]"],
        ),
        (
            [configured(rank_pattern={"(": 4}), head_config({"id2label": {"0": "a"}})],
            ["is not a regular expression", "1 label names for a head of 3 labels"],
        ),
        (
            [configured(target_modules="(", exclude_modules="[")],
            ["pattern '('", "pattern '['"],
        ),
        (
            [
                replaced(QUERY_A, lambda t: t.to(torch.int8)),
                removed(VALUE_A, VALUE_B),
            ],
            ["has dtype I8", "1 target modules have no LoRA tensors"],
        ),
    ],
    ids=[
        "damage+config",
        "both-files",
        "NaN+structure",
        "regex+shape",
        "regex+labels",
        "two-regexes",
        "dtype+structure",
    ],
)
def test_one_fault_does_not_hide_another(
    faults: list[Spoil], fragments: list[str], engine: Engine, good: Path, adapter: Path
) -> None:
    engine.load_adapter("good", good)
    for fault in faults:
        fault(adapter)
    assert_refused(engine, adapter, fragments)


ODD: dict[str, dict[str, Any]] = {
    "regex targets": {"target_modules": r".*layer\.1\..*(query|intermediate\.dense)"},
    "targets in full": {"target_modules": ["bert.encoder.layer.0.attention.self.key", "value"]},
    "excluded tail": {"exclude_modules": ["layer.0.attention.self.query"]},
    "excluded regex": {"target_modules": ["query", "dense"], "exclude_modules": r".*(pooler.*|\.1\..*query)"},
    "layers as a list": {"layers_to_transform": [1], "layers_pattern": ["layer"]},
    "layers as a number": {"layers_to_transform": 0, "layers_pattern": "encoder.layer"},
    "second pattern matches": {"layers_to_transform": [0], "layers_pattern": ["blocks", "layer"]},
    "dotted tails": {
        "rank_pattern": {"layer.0.attention.self.query": 4, "1.attention.self.value": 16},
        "alpha_pattern": {"self.value": 3, "layer.1.attention.self.query": 40},
    },
    "full keys": {
        "rank_pattern": {"^bert.encoder.layer.0.attention.self.query": 4, "^encoder.layer.0.attention.self.value": 2},
        "alpha_pattern": {"^bert.encoder.layer.1.attention.self.value": 40, "^self.query": 1},
    },
    "regex keys with rsLoRA": {
        "use_rslora": True,
        "rank_pattern": {r"layer\.[0].*": 5},
        "alpha_pattern": {".*value": 0.5},
    },
    "tails end at dots": {"target_modules": ["query", "alue"], "alpha_pattern": {"uery": 40, "elf.query": 40}},
    "saved inner module": {"target_modules": ["query", "dense"], "modules_to_save": ["pooler"]},
    "alpha of zero": {"lora_alpha": 0},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_but_valid_configuration_equals_peft(
    name: str, tiny_bert: TinyBase, engine: Engine, tmp_path: Path
) -> None:
    report = assert_equals_peft(engine, tiny_bert, tiny_bert.adapter(tmp_path / "odd", LABELS, 1, **ODD[name]))
    assert report.warnings == ()


OVERLAPS = [{"query": 2, "layer.0.attention.self.query": 60}, {"layer.0.attention.self.query": 60, "query": 2}]


@pytest.mark.parametrize("patterns", OVERLAPS, ids=["general-first", "special-first"])
def test_first_of_overlapping_patterns_wins_with_a_warning(
    patterns: dict[str, int], tiny_bert: TinyBase, engine: Engine, adapter: Path
) -> None:
    edit_config(adapter, alpha_pattern=patterns)
    report = assert_equals_peft(engine, tiny_bert, adapter)
    (warning,) = report.warnings
    assert QUERY in warning and list(patterns)[1] in warning


def test_first_of_overlapping_rank_patterns_wins(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    # PEFT sorts the keys when it saves, so only this order has tensors that fit.
    patterns = {"layer.0.attention.self.query": 16, "query": 4}
    report = assert_equals_peft(engine, tiny_bert, tiny_bert.adapter(tmp_path / "a", LABELS, 1, rank_pattern=patterns))
    assert report.ranks == (4, 8, 16) and len(report.warnings) == 1
    reordered = shutil.copytree(tmp_path / "a", tmp_path / "b")
    edit_config(reordered, rank_pattern=dict(reversed(patterns.items())))
    with pytest.raises(AdapterRejected, match=r"lora_A has shape \[16, 32\], this base and config need \[4, 32\]"):
        engine.load_adapter("b", reordered)


def test_overlapping_patterns_that_agree_need_no_warning(tiny_bert: TinyBase, engine: Engine, adapter: Path) -> None:
    edit_config(adapter, alpha_pattern={"query": 20, "layer.0.attention.self.query": 20})
    assert assert_equals_peft(engine, tiny_bert, adapter).warnings == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_file_equals_peft(
    dtype: torch.dtype, tiny_bert: TinyBase, engine: Engine, adapter: Path
) -> None:
    edit_tensors(adapter, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    assert_equals_peft(engine, tiny_bert, adapter)


def test_good_copy_of_the_spoiled_adapters_is_served(tiny_bert: TinyBase, engine: Engine, adapter: Path) -> None:
    """Guards the table above: what is refused there is refused for its one fault."""
    report = assert_equals_peft(engine, tiny_bert, adapter)
    assert report.tensors_applied == 10 and report.warnings == ()
