"""What cannot be served exactly is refused with every reason, each once and in words that say what to mend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRejected
from tests.hostile.harness import Site, Sites, refusal
from tests.hostile.spoil import (
    CONFIG,
    HEAD,
    MANIFEST,
    PREFIX,
    Spoil,
    added,
    both,
    changed,
    configured,
    cut,
    document,
    file_bytes,
    filled,
    removed,
    renamed,
    without,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = "bert.encoder.layer.0.attention.self.key"
VALUE = "bert.encoder.layer.1.attention.self.value"
WORDS = "bert.embeddings.word_embeddings"
A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"
NAN = float("nan")
NOT_AN_EXPRESSION = "is not a regular expression"

Table = list[tuple[str, Spoil, list[str]]]

CONFIGS: Table = [
    ("another rank", configured(r=4), ["has shape [8, 32], this base and config need [4, 32]", "need [32, 4]"]),
    ("alpha a text", configured(lora_alpha="16"), ["lora_alpha is '16', must be a number"]),
    ("alpha NaN", configured(lora_alpha=NAN), ["lora_alpha is nan, must be a number"]),
    ("patterns in a list", configured(rank_pattern=["query"]), ["rank_pattern is ['query'], must be an object"]),
    ("alpha_pattern a number", configured(alpha_pattern=3), ["alpha_pattern is 3, must be an object"]),
    ("alpha_pattern NaN", configured(alpha_pattern={"key": NAN}), ["alpha_pattern['key'] is nan"]),
    ("use_rslora a text", configured(use_rslora="no"), ["use_rslora is 'no', must be true or false"]),
    ("targets do not compile", configured(target_modules="(query"), [f"pattern '(query' {NOT_AN_EXPRESSION}"]),
    ("excludes do not compile", configured(exclude_modules="*"), [f"pattern '*' {NOT_AN_EXPRESSION}"]),
    ("rank key does not compile", configured(rank_pattern={"[": 8}), [f"pattern '[' {NOT_AN_EXPRESSION}"]),
    ("alpha key does not compile", configured(alpha_pattern={"(?P<x": 8}), [NOT_AN_EXPRESSION]),
    ("layer key does not compile", configured(layers_to_transform=[0], layers_pattern="("), [NOT_AN_EXPRESSION]),
    # PEFT raises on these, so nothing says what serving them exactly would be.
    ("brackets that only our wrapping closes", configured(target_modules=".*query)|(.*value"), [NOT_AN_EXPRESSION]),
    ("syntax that re lacks", configured(target_modules=r".*\p{Ll}\.(query|value)"), [NOT_AN_EXPRESSION]),
    ("layers_pattern alone", configured(layers_pattern=["layer"]), ["layers_pattern needs layers_to_transform"]),
    (
        "layers with a text of targets",
        configured(target_modules=".*(query|value)", layers_to_transform=[0, 1]),
        ["layers_to_transform needs target_modules to be a list"],
    ),
    # To re these braces are letters, to regex they allow one wrong letter.
    ("fuzzy targets", configured(target_modules=r".*\.(querx|valux){s<=1}"), ["stray brace"]),
    ("excluded yet there", configured(exclude_modules=["query"]), ["target_modules does not name: bert.encoder"]),
    ("fewer layers", configured(layers_to_transform=[0]), ["target_modules does not name: bert.encoder.layer.1"]),
    (
        "more targets",
        configured(target_modules=["query", "value", "key"]),
        [f"2 target modules have no tensors: {KEY}"],
    ),
    ("saves what is not there", configured(modules_to_save=["nothing"]), ["modules_to_save names 'nothing'"]),
    (
        "saves what it lacks",
        configured(modules_to_save=["pooler"]),
        ["saved module bert.pooler lacks bert.pooler.dense"],
    ),
    ("unknown method", configured(peft_type="BOFT"), ["peft_type 'BOFT' is not served; served are LORA"]),
    ("no method", without("peft_type"), ["peft_type"]),
    ("unknown field", configured(future_gate=0.5), ["future_gate"]),
    ("unknown bias", configured(bias="some"), ["bias is 'some', must be one of none, all, lora_only"]),
    ("layer_replication", configured(layer_replication=[[0, 2]]), ["layer_replication"]),
    ("DoRA without magnitudes", configured(use_dora=True), ["lora_magnitude_vector"]),
    ("lora_bias without biases", configured(lora_bias=True), ["lora_B.bias"]),
    ("KaSA without diagonals", configured(kasa_config={"a": 1}), ["lora_diag"]),
    ("tokens without rows", configured(trainable_token_indices=[1, 2]), ["token"]),
    ("target_parameters of no base", configured(target_parameters=["x"]), ["target_parameters names x"]),
    ("aLoRA of a classifier", configured(alora_invocation_tokens=[5]), ["alora_invocation_tokens belong to causal"]),
    ("aLoRA of no tokens", configured(alora_invocation_tokens="five"), ["alora_invocation_tokens", "belong to causal"]),
    ("fast PiSSA", configured(init_lora_weights="pissa_niter_4"), ["initial/adapter_model.safetensors"]),
    ("LoftQ", configured(init_lora_weights="loftq"), ["was trained on a quantised base"]),
    ("unknown task", configured(task_type="RANKING"), ["task_type 'RANKING' is none of SEQ_CLS"]),
    ("task of others", configured(task_type="CAUSAL_LM"), ["task text-generation is not served by this base"]),
]

TENSORS: Table = [
    ("NaN", changed(A, filled(NAN)), [f"{A} holds NaN"]),
    ("int8", changed(B, lambda t: t.to(torch.int8)), [f"{B} has dtype I8, served are BF16, F16, F32"]),
    ("lora_B gone", removed(B), [f"lora_B.weight is missing on 1 module: {QUERY}"]),
    ("lora_A gone", removed(f"{VALUE}.lora_A.weight"), [f"lora_A.weight is missing on 1 module: {VALUE}"]),
    ("target gone", removed(A, B), [f"1 target module has no tensors: {QUERY}"]),
    ("half a target too many", added({f"{KEY}.lora_A.weight": (8, 32)}), ["does not name: " + KEY, KEY]),
    ("LoRA on what is not there", added({"bert.x.lora_A.weight": (8, 32)}), ["no place in this base: bert.x"]),
    ("base weight", added({f"{WORDS}.weight": (100, 32)}), [f"nothing declares: {WORDS}.weight"]),
    ("base bias", added({f"{QUERY}.bias": (32,)}), [f"nothing declares: {QUERY}.bias"]),
    (
        "magnitude",
        added({f"{QUERY}.lora_magnitude_vector": (32,)}),
        [f"lora_magnitude_vector is there on 1 module: {QUERY}"],
    ),
    ("head tensor too many", added({"classifier.scale": (3,)}), ["nothing declares: classifier.scale"]),
    (
        "no prefix",
        renamed(f"{PREFIX}classifier.weight", "classifier.weight"),
        ["no place in this base: classifier.weight", "saved module classifier lacks classifier.weight"],
    ),
    (
        "adapter's name in a key",
        renamed("query.lora_A.weight", "query.lora_A.default.weight"),
        ["lora_A.default", QUERY],
    ),
    ("A too narrow", changed(A, cut), [f"{A} has shape [8, 31], this base and config need [8, 32]"]),
    ("A transposed", changed(A, lambda t: t.t()), [f"{A} has shape [32, 8]"]),
    ("B too tall", changed(B, lambda t: t.repeat(2, 1)), [f"{B} has shape [64, 8]"]),
    ("head of two sizes", changed("classifier.bias", cut), ["disagree on the number of labels", "has shape"]),
    ("head too narrow", changed("classifier.weight", cut), ["classifier.weight has shape [3, 31]"]),
    ("head lacks its bias", removed("classifier.bias"), ["saved module classifier lacks classifier.bias"]),
    (
        "head not declared",
        configured(modules_to_save=None, task_type=None),
        ["2 tensors that nothing declares: classifier.", "add the module to modules_to_save and train it"],
    ),
    (
        "no head at all",
        both(configured(modules_to_save=None, task_type=None), removed("classifier.bias", "classifier.weight")),
        ["neither the base nor the adapter holds classifier.bias, classifier.weight"],
    ),
]

BESIDE: Table = [
    ("labels not JSON", file_bytes(HEAD, b"{"), ["config.json is not JSON"]),
    ("labels in a list", document(HEAD, {"id2label": ["a"]}), ["id2label is not an object"]),
    ("two labels of three", document(HEAD, {"id2label": {"0": "a", "1": "b"}}), ["2 label names for a head of 3"]),
    ("no labels", document(HEAD, {"id2label": {}}), ["0 label names for a head of 3 labels"]),
    ("labels repeat", document(HEAD, {"id2label": {"0": "a", "1": "b", "2": "a"}}), ["label names repeat"]),
    (
        "labels with a gap",
        document(HEAD, {"id2label": {"0": "a", "1": "b", "3": "c"}}),
        ["indices [0, 1, 3], expected 0 to 2"],
    ),
    ("another model", document(HEAD, {"model_type": "roberta"}), ["on a 'roberta' model, this base is 'bert'"]),
    ("unknown problem type", document(HEAD, {"problem_type": "ranking"}), ["problem_type 'ranking' is none of"]),
    (
        "manifest of another base",
        document(MANIFEST, {"base_fingerprint": "sha256:0"}),
        ["trained on the base sha256:0"],
    ),
    ("manifest misspelt", document(MANIFEST, {"pool": "mean"}), ["unknown field 'pool'; known are task, pooling"]),
    ("manifest of another task", document(MANIFEST, {"task": "embedding"}), ["task is contradictory", "classifier"]),
]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    sites = Sites(tmp_path_factory.mktemp("sites"))
    yield sites
    sites.close()


@pytest.fixture(scope="module")
def site(sites: Sites) -> Site:
    return sites.site("bert")


@pytest.fixture
def adapter(sites: Sites, tmp_path: Path) -> Path:
    """A good adapter, to be spoiled."""
    return sites.copy("plain", tmp_path / "adapter")


def assert_says(error: AdapterRejected, fragments: Sequence[str]) -> None:
    """Every fragment is in some problem, and no problem is about anything else."""
    for fragment in fragments:
        assert any(fragment in problem for problem in error.problems), f"{fragment!r} is not among {error.problems}"
    for problem in error.problems:
        assert any(fragment in problem for fragment in fragments), f"{problem!r} was not to be expected"


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        pytest.param(spoil, fragments, id=f"{kind}-{name}")
        for kind, table in (("config", CONFIGS), ("tensors", TENSORS), ("beside", BESIDE))
        for name, spoil, fragments in table
    ],
)
def test_each_fault_is_named_and_no_other(spoil: Spoil, fragments: list[str], site: Site, adapter: Path) -> None:
    spoil(adapter)
    assert_says(refusal(site, adapter), fragments)


@pytest.mark.parametrize("rank", ["8", None, 8.0, True, 0, -8, 1_000_000])
def test_a_rank_that_is_none_is_named(rank: Any, site: Site, adapter: Path) -> None:
    configured(r=rank)(adapter)
    assert f"r is {rank!r}, must be an integer from 1 to 4096" in refusal(site, adapter).problems


@pytest.mark.parametrize("value", [5, [5], {"query": 1}, [""], "x" * 3000])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
def test_names_that_are_none_are_named(field: str, value: Any, site: Site, adapter: Path) -> None:
    configured(**{field: value})(adapter)
    assert any(problem.startswith(f"{field} is ") for problem in refusal(site, adapter).problems)


@pytest.mark.parametrize(
    ("labels", "fragment"),
    [
        (["a", "b"], "2 label names for a head of 3 labels"),
        (["a", "b", "c", "d"], "4 label names"),
        ([], "0 label names"),
        (["a", "b", "a"], "label names repeat"),
    ],
)
def test_labels_that_do_not_fit_the_head(labels: list[str], fragment: str, site: Site, adapter: Path) -> None:
    assert_says(refusal(site, adapter, labels=labels), [fragment])


def test_refused_labels_leave_the_same_content_served_under_another_name(site: Site, sites: Sites) -> None:
    """The witness itself, asked for with labels that it has not."""
    assert_says(refusal(site, sites.adapter("dora"), labels=["a"]), ["1 label names for a head of 3 labels"])


def test_adapter_larger_than_the_room_for_all(site: Site, adapter: Path) -> None:
    config = EngineConfig(base=site.engine.config.base, device="cpu", adapter_memory_bytes=8000)
    with Engine(config) as engine, pytest.raises(AdapterRejected) as caught:
        engine.load_adapter("large", adapter)
    assert_says(caught.value, ["bytes on the device, adapter_memory_bytes is 8000"])


def test_faults_of_all_kinds_are_listed_together(site: Site, adapter: Path) -> None:
    configured(future_gate=1, bias="some")(adapter)
    document(HEAD, {"model_type": "roberta", "id2label": {"0": "a"}})(adapter)
    document(MANIFEST, {"base_fingerprint": "sha256:0"})(adapter)
    removed(B)(adapter)
    added({f"{WORDS}.weight": (100, 32)})(adapter)
    changed("classifier.weight", filled(NAN))(adapter)
    fragments = [
        "future_gate",
        "bias is 'some'",
        "'roberta'",
        "1 label names",
        "sha256:0",
        f"lora_B.weight is missing on 1 module: {QUERY}",
        f"{WORDS}.weight",
        "classifier.weight holds NaN",
    ]
    error = refusal(site, adapter)
    assert_says(error, fragments)
    assert len(error.problems) == len(fragments)


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (
            both(file_bytes("adapter_model.safetensors", b"1"), configured(bias="some"), document(HEAD, [])),
            ["is damaged", "bias is 'some'", "config.json is not a JSON object"],
        ),
        (
            both(file_bytes("adapter_model.safetensors", b"1"), file_bytes(CONFIG, b"{")),
            ["is damaged", "adapter_config.json is not JSON"],
        ),
        (
            both(file_bytes(HEAD, b"{"), file_bytes(MANIFEST, b"{"), configured(peft_type="BOFT")),
            ["config.json is not JSON", "adapter_router.json is not JSON", "peft_type 'BOFT'"],
        ),
        (
            both(configured(rank_pattern={"(": 4}), changed("classifier.weight", cut)),
            [NOT_AN_EXPRESSION, "classifier.weight has shape [3, 31]"],
        ),
        (
            both(configured(rank_pattern={"(": 4}), document(HEAD, {"id2label": {"0": "a"}})),
            [NOT_AN_EXPRESSION, "1 label names for a head of 3 labels"],
        ),
        (configured(target_modules="(", exclude_modules="["), ["pattern '('", "pattern '['"]),
        (
            both(changed(A, lambda t: t.to(torch.int8)), removed(f"{VALUE}.lora_A.weight", f"{VALUE}.lora_B.weight")),
            ["has dtype I8", f"1 target module has no tensors: {VALUE}"],
        ),
        (
            both(changed(A, filled(NAN)), removed(f"{VALUE}.lora_B.weight")),
            [f"{A} holds NaN", f"lora_B.weight is missing on 1 module: {VALUE}"],
        ),
    ],
    ids=["damage", "both-files", "all-documents", "shape", "labels", "expressions", "dtype", "NaN"],
)
def test_one_fault_does_not_hide_another(spoil: Spoil, fragments: list[str], site: Site, adapter: Path) -> None:
    spoil(adapter)
    assert_says(refusal(site, adapter), fragments)


def test_problems_come_in_the_same_order_every_time(site: Site, adapter: Path) -> None:
    configured(r=4)(adapter)
    assert len({refusal(site, adapter).problems for _ in range(5)}) == 1
