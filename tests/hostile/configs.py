"""Configurations that make no sense, lie, hold the loader up, or ask for what is not served."""

from __future__ import annotations

from typing import Any

from tests.hostile.case import Case
from tests.hostile.spoil import HEAD, INITIAL, MANIFEST, WEIGHTS, both, configured, document, file_bytes, without

_NAN, _INF = float("nan"), float("inf")
# Exponential to regex, which sees through the textbook's examples.
_SLOW = r"((\w|\.|[a-z])+)+\1\1\1\1X?"
_SLOW_SAYS = ("takes too long",)
_UNKNOWN_METHODS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "XLORA",
    "POLY",
    "BOFT",
    "HRA",
    "FOURIERFT",
    "VBLORA",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "C3A",
    "MISS",
    "SUPERLORA",
    "lora",
)


def _field(name: str, value: Any, *says: str, of: str = "plain") -> Case:
    return Case(f"{name}={value!r:.40}", configured(**{name: value}), says or (name,), of)


def _blocks(name: str, blocks: dict[str, Any], *says: str) -> Case:
    return Case(f"blocks, {name}", configured(use_bdlora=blocks), says, "blocks")


def _slow(name: str, value: Any, **also: Any) -> Case:
    return Case(f"exponential {name}", configured(**{name: value}, **also), _SLOW_SAYS)


def _large_expressions(count: int) -> dict[str, int]:
    """Expressions that are quickly matched but long to read."""
    return {f"x{index}" + "(a|b|[c-z]{1,9})?" * 40: 8 for index in range(count)}


def _initial_of_itself(directory: Any) -> None:
    (directory / "initial").mkdir()
    (directory / INITIAL).write_bytes((directory / WEIGHTS).read_bytes())


def _manifest(content: dict[str, Any], *says: str, of: str = "plain") -> Case:
    return Case(f"manifest {content!r:.50}", document(MANIFEST, content), says, of)


def _labels(content: Any, *says: str) -> Case:
    return Case(f"labels {content!r:.50}", document(HEAD, content), says)


def _init_without_initial(init: str) -> Case:
    return _field("init_lora_weights", init, f"init_lora_weights='{init}'")


RANKS = (
    _field("r", 1_000_000, "r is 1000000"),
    _field("r", 0, "r is 0"),
    _field("r", -8, "r is -8"),
    _field("r", 8.0, "r is 8.0"),
    _field("r", True, "r is True"),
    _field("r", 4, "lora_A.weight has shape [8, 32], this base and config need [4, 32]"),
    _field("lora_alpha", _NAN, "lora_alpha is nan"),
    _field("lora_alpha", _INF, "lora_alpha is inf"),
    _field("lora_alpha", -_INF, "lora_alpha is -inf"),
    _field("lora_alpha", 10**400, "lora_alpha is 1000"),
    _field("rank_pattern", {"query": 1_000_000}, "rank_pattern['query'] is 1000000"),
    _field("alpha_pattern", {"query": _NAN}, "alpha_pattern['query'] is nan"),
    _field("alpha_pattern", ["query"], "alpha_pattern"),
    _field("use_rslora", "no", "use_rslora is 'no'"),
    _field("init_r", 1_000_000, "init_r is 1000000", of="adalora"),
    _field("alpha", _NAN, "alpha is nan", of="loha"),
    _field("oft_block_size", 10**9, "oft_block_size is 1000000000", of="oft"),
    _field("num_cayley_neumann_terms", 10**9, "num_cayley_neumann_terms is", of="oft"),
    _field("eps", _NAN, "eps is nan", of="oft"),
    _field("decompose_factor", -5, "decompose_factor is -5", of="lokr"),
)

EXPRESSIONS = (
    Case("the issue's expression", configured(target_modules=r"(\w+\.?)+X"), ()),
    _slow("target_modules", _SLOW),
    _slow("exclude_modules", _SLOW),
    _slow("rank_pattern", {_SLOW: 8}),
    _slow("alpha_pattern", {_SLOW: 8}),
    Case("exponential modules_to_save", configured(modules_to_save=["classifier", _SLOW]), ("modules_to_save",)),
    _slow("layers_pattern", [_SLOW], layers_to_transform=[0, 1]),
    Case("exponential feedforward_modules", configured(feedforward_modules=_SLOW), _SLOW_SAYS, of="ia3"),
    Case("a thousand long expressions", configured(alpha_pattern=_large_expressions(1000)), ("alpha_pattern",)),
    Case(
        "a thousand slow expressions",
        configured(alpha_pattern={rf"(\w|\w\w|\.){{16}}(?<=[{index}!])": 8 for index in range(1000)}),
        _SLOW_SAYS,
    ),
    Case("60,000 target_parameters", configured(target_parameters=[f"p{i}" for i in range(60_000)]), ("target_param",)),
    _field("target_modules", "(query", "pattern '(query' is not a regular expression"),
    _field("target_modules", r".*\.(querx|valux){s<=1}", "stray brace"),
    _field("exclude_modules", "*", "pattern '*' is not a regular expression"),
    _field("exclude_modules", ["query"], "target_modules does not name: bert.encoder.layer.0.attention.self.query"),
    _field("target_modules", ["nothing"], "target_modules"),
    _field("target_modules", 5, "target_modules is 5"),
    _field("layers_to_transform", "0", "layers_to_transform is '0'"),
    _field("layers_to_transform", [7], "target_modules"),
)

UNSERVED = (
    _field("layer_replication", [[0, 2], [1, 2]], "layer_replication", "is not served"),
    _field("arrow_config", {"top_k": 2}, "arrow_config", "is not served"),
    _field("use_qalora", True, "use_qalora", "is not served"),
    Case("megatron", configured(megatron_config={"a": 1}, megatron_core="os"), ("megatron_config",)),
    _field("future_gate", 0.5, "future_gate", "is not served"),
    _field("bias", "some", "bias is 'some'"),
    *(_field("peft_type", name, f"peft_type '{name}' is not served") for name in _UNKNOWN_METHODS),
    _field("peft_type", None, "peft_type"),
    Case("no peft_type", without("peft_type"), ("peft_type",)),
    _field("peft_type", ["LORA"], "peft_type"),
    # A method's field under another: PEFT would ignore it.
    _field("use_dora", True, "use_dora", of="adalora"),
    _field("token_indices", [3], "token_indices"),
)

COMBINED = (
    Case("DoRA with lora_bias", configured(lora_bias=True), ("use_dora",), of="dora"),
    Case("KaSA with DoRA", configured(use_dora=True), ("use_dora",), of="kasa"),
    Case("KaSA with PiSSA", configured(init_lora_weights="pissa"), ("kasa_config",), of="kasa"),
    _field("kasa_config", 5, "kasa_config"),
    _field("use_bdlora", True, "use_bdlora"),
    _blocks("none of them", {"target_modules_bd_a": ["query"], "nblocks": 0}, "use_bdlora.nblocks is 0"),
    _blocks("a text of them", {"target_modules_bd_a": ["query"], "nblocks": "2"}, "use_bdlora.nblocks is '2'"),
    _blocks("of no number", {"target_modules_bd_a": ["query"]}, "lora_A.weight has shape [8, 16]"),
    _blocks("of another number", {"target_modules_bd_a": ["query"], "nblocks": 7}, "lora_A.weight has shape [8, 16]"),
    _blocks("of a number for a name", {"target_modules_bd_a": 5, "nblocks": 2}, "use_bdlora.target_modules_bd_a"),
    _blocks("by another field", {"rows": 5}, "use_bdlora"),
    _field("use_dora", "yes", "use_dora is 'yes'"),
    _field("ensure_weight_tying", "yes", "ensure_weight_tying is 'yes'", of="tied head"),
    _field("feedforward_modules", None, "feedforward_modules is None", of="ia3"),
    _field("feedforward_modules", ["value"], "feedforward_modules", of="ia3"),
    _field("save_projection", False, "save_projection=false", of="vera"),
    _field("peft_version", "0.17.0", "use_cayley_neumann", of="oft"),
    _field("target_parameters", 5, "target_parameters"),
    _field("target_parameters", "mlp.experts.down_proj", "target_parameters", of="experts"),
    _field("target_parameters", ["mlp.nothing"], "target_parameters names mlp.nothing"),
    _field("target_parameters", ["mlp.experts.nothing"], "mlp.experts.nothing", of="experts"),
    _field("target_parameters", ["mlp.experts.down_proj"], "experts", of="experts"),
)

INITIALISED = (
    *(_init_without_initial(init) for init in ("pissa_niter_4", "corda", "lora_ga", "loftq")),
    _field("init_lora_weights", "xyz", "init_lora_weights is 'xyz'"),
    _field("init_lora_weights", 5, "init_lora_weights is 5"),
    # PEFT itself knows PiSSA in small letters only, so nothing says what serving this exactly would be.
    _field("init_lora_weights", "PISSA", "init_lora_weights"),
    Case("fast PiSSA without initial", lambda d: (d / INITIAL).unlink(), ("initial/",), of="fast pissa"),
    Case("initial of a plain adapter", _initial_of_itself, ("initial/",)),
    Case("initial of an IA3 adapter", _initial_of_itself, ("initial/",), of="ia3"),
)

TASKS = (
    _field("task_type", "CAUSAL_LM", "text-generation"),
    _field("task_type", "SEQ_2_SEQ_LM", "seq2seq-generation"),
    _field("task_type", "QUESTION_ANS", "qa_outputs"),
    _field("task_type", "RANKING", "task_type 'RANKING' is none of"),
    _field("task_type", ["SEQ_CLS"], "task_type"),
    _field("task_type", 5, "task_type"),
    Case("classifier asked to embed", both(), ("contradictory",), options={"task": "embedding"}),
    Case("asked for a task that no one has", both(), ("'ranking'",), options={"task": "ranking"}),
    Case("asked for an image", both(), ("image-classification",), options={"task": "image-classification"}),
    _field("modules_to_save", ["classifier", "nothing"], "modules_to_save names 'nothing'"),
    _field("modules_to_save", ["classifier", "pooler"], "bert.pooler lacks"),
    Case("head not declared", configured(modules_to_save=None, task_type=None), ("classifier.weight",)),
)

TOKENS = (
    _field("trainable_token_indices", [1, 2], "token"),
    _field("trainable_token_indices", None, "token", of="tokens"),
    _field("trainable_token_indices", {"word_embeddings": [3, 7, 100]}, "0 to 99", of="tokens"),
    _field("trainable_token_indices", {"word_embeddings": [3, 7, -1]}, "0 to 99", of="tokens"),
    _field("trainable_token_indices", {"word_embeddings": [3, 7, 7]}, "different", of="tokens"),
    _field("trainable_token_indices", {"word_embeddings": [3, 7]}, "word_embeddings", of="tokens"),
    _field("trainable_token_indices", {"word_embeddings": [3, 7, 11.0]}, "word_embeddings", of="tokens"),
    _field("trainable_token_indices", {"word_embeddings": [3, 7, True]}, "word_embeddings", of="tokens"),
    _field("trainable_token_indices", {"position_embeddings": [3, 7, 11]}, "word_embeddings", of="tokens"),
    _field("trainable_token_indices", {"word_embeddings": [3, 7, 11], "x": [1]}, "x", of="tokens"),
    _field("trainable_token_indices", "word_embeddings", "token", of="tokens"),
    _field("trainable_token_indices", 3, "token", of="tokens"),
    _field("token_indices", [3, 7, 100], "0 to 99", of="only tokens"),
    _field("token_indices", [3, 3, 7], "different", of="only tokens"),
    _field("target_modules", ["position_embeddings"], "word_embeddings", of="only tokens"),
    _field("alora_invocation_tokens", [5], "alora_invocation_tokens"),
    _field("alora_invocation_tokens", "abc", "alora_invocation_tokens", of="alora"),
    _field("alora_invocation_tokens", [5] * 5000, "alora_invocation_tokens", of="alora"),
)

LABELS = (
    _labels([], "config.json is not a JSON object"),
    _labels({"id2label": {"0": "a", "1": "b"}}, "2 label names for a head of 3 labels"),
    _labels({"id2label": {"0": "a", "1": "b", "2": "a"}}, "label names repeat"),
    _labels({"id2label": {"0": "a", "1": "b", "3": "c"}}, "id2label has the indices [0, 1, 3]"),
    _labels({"id2label": ["a", "b", "c"]}, "id2label"),
    _labels({"id2label": {"one": "a"}}, "id2label"),
    _labels({"id2label": {"0": None, "1": ["b"], "2": {}}}, "id2label"),
    _labels({"id2label": {"0": "a", "1": "b", "2": "\ud800"}}, "surrogate"),
    _labels({"id2label": {str(i): str(i) for i in range(1, 40_000)}}, "id2label"),
    _labels({"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 1, "b": 0, "c": 2}}, "label2id", "id2label"),
    _labels({"model_type": "roberta"}, "trained on a 'roberta' model, this base is 'bert'"),
    _labels({"problem_type": "ranking"}, "problem_type 'ranking' is none of"),
    Case("asked for two labels", both(), ("2 label names",), options={"labels": ["a", "b"]}),
    Case("asked for one label thrice", both(), ("label names repeat",), options={"labels": ["a", "a", "a"]}),
    Case("asked for numbers", both(), ("label",), options={"labels": [0, 1, 2]}),
    Case("labels for vectors", both(), ("labels are given",), of="no head", options={"labels": ["a"]}),
)

MANIFESTS = (
    _manifest({"pool": "mean"}, "unknown field 'pool'"),
    _manifest({"task": "ranking"}, "task is 'ranking'"),
    _manifest({"task": ["embedding"]}, "task is"),
    _manifest({"task": "embedding"}, "contradictory"),
    _manifest({"task": "image-classification"}, "image-classification"),
    _manifest({"pooling": "sum"}, "pooling is 'sum'", of="no head"),
    _manifest({"pooling": ["mean"]}, "pooling is", of="no head"),
    _manifest({"normalize": "yes"}, "normalize is 'yes'", of="no head"),
    _manifest({"dimensions": 0}, "dimensions is 0", of="no head"),
    _manifest({"dimensions": True}, "dimensions is True", of="no head"),
    _manifest({"dimensions": 64}, "dimensions", of="no head"),
    _manifest({"prefix": 5}, "prefix", of="no head"),
    _manifest({"prefix": "\ud800"}, "prefix", of="no head"),
    _manifest({"prefix": "x" * 100_000}, "prefix", of="no head"),
    _manifest({"base_fingerprint": 5}, "base_fingerprint"),
    _manifest({"base_fingerprint": "sha256:0"}, "sha256:0"),
    _manifest({"pooling": "mean"}, "pooling"),
    Case("manifest of two tasks", file_bytes(MANIFEST, b'{"task": 5, "task": "text-classification"}'), (MANIFEST,)),
)

CASES = (
    *RANKS,
    *EXPRESSIONS,
    *UNSERVED,
    *COMBINED,
    *INITIALISED,
    *TASKS,
    *TOKENS,
    *LABELS,
    *MANIFESTS,
)
