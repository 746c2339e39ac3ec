"""Adapters of a form that passed: each with numbers, labels and faults of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adapter_router.adapters import validate as validation
from adapter_router.adapters.adapter_tensors import AdapterTensors
from adapter_router.adapters.forms import Forms
from adapter_router.adapters.validate import Bases, Request, validate
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRejected
from adapter_router.types import AdapterFiles, Row, RowResult
from tests.tiny import TinyBase, edit_config, edit_tensors, peft_logits, random_features

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "tokens": {"trainable_token_indices": [7, 9]},
    "pooler": {"modules_to_save": ["pooler"]},
    "pattern": {"rank_pattern": {"query": 2}, "alpha_pattern": {"layer.0": 3}},
    "pissa": {"init_lora_weights": "pissa"},
}
FEATURES = random_features(np.random.default_rng(0))


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Configurations that were looked at."""
    seen: list[bytes] = []
    parse = validation.parse_adapter_config

    def counted(raw: bytes) -> Any:
        seen.append(raw)
        return parse(raw)

    monkeypatch.setattr(validation, "parse_adapter_config", counted)
    return seen


def files(directory: Path) -> AdapterFiles:
    optional = {name: directory / name for name in ("config.json", "adapter_router.json")}
    found = {name: path.read_bytes() if path.exists() else None for name, path in optional.items()}
    return AdapterFiles(
        (directory / "adapter_config.json").read_bytes(),
        (directory / "adapter_model.safetensors").read_bytes(),
        found["config.json"],
        found["adapter_router.json"],
    )


def bases(engine: Engine) -> Bases:
    return Bases(engine.base.tasks, lambda task: engine.base.task(task).spec)


def flat(adapter: AdapterTensors) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    adapter.mapped(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return tensors


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bias"])  # whose file repeats some tensors
def test_the_second_of_a_form_is_not_looked_at_and_answers_as_itself(
    tiny_bert: TinyBase, engine: Engine, tmp_path: Path, kind: str, parses: list[bytes]
) -> None:
    directories = [tiny_bert.adapter(tmp_path / str(seed), 3, seed, **KINDS[kind]) for seed in range(3)]
    for directory in directories:
        engine.load_adapter(directory.name, directory)
    assert len(parses) == 1
    for directory in directories:
        (result,) = engine.infer([Row(FEATURES, directory.name)])
        assert isinstance(result, RowResult), result
        expected = peft_logits(tiny_bert.alone(directory, 3), FEATURES)
        np.testing.assert_allclose(result.logits, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_by_form_is_what_looking_finds(
    tiny_bert: TinyBase, engine: Engine, tmp_path: Path, kind: str
) -> None:
    forms = Forms()
    first, second = (files(tiny_bert.adapter(tmp_path / str(seed), 3, seed, **KINDS[kind])) for seed in range(2))
    validate(first, bases(engine), Request(), forms)
    looked, known = (validate(second, bases(engine), Request(), known_forms) for known_forms in (None, forms))
    assert [t.equal(k) for t, k in zip(flat(looked), flat(known), strict=True)] == [True] * len(flat(looked))
    assert {target.base_path for target in looked.targets} == {target.base_path for target in known.targets}
    blank = {name: {} for name in ("targets", "experts", "tokens", "biases", "saved", "replaced", "copies", "shared")}
    assert validation.replace(looked, **blank) == validation.replace(known, **blank)


def _nan(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: next(iter(tensors.values())).view(-1)[3].fill_(float("nan")))


def _shorter(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _foreign(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "roberta"}')


def _labels(directory: Path) -> None:
    (directory / "config.json").write_text('{"id2label": {"0": "a", "1": "b"}}')


def _renamed(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"base_model.model.odd": tensors.pop(min(tensors))}))


def _task(directory: Path) -> None:
    (directory / "adapter_router.json").write_text('{"task": "image-classification"}')


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_nan, "NaN"),
        (_shorter, "damaged"),
        (_foreign, "'roberta' model"),
        (_labels, "2 label names for a head of 3"),
        (_renamed, "no tensors|lora_A"),
        (_task, "image-classification"),
        (lambda directory: edit_config(directory, target_modules=["query"]), "target_modules does not name"),
    ],
)
def test_a_fault_is_seen_in_a_known_form(
    tiny_bert: TinyBase, engine: Engine, tmp_path: Path, spoil: Callable[[Path], None], says: str
) -> None:
    engine.load_adapter("good", tiny_bert.adapter(tmp_path / "good", 3, 0))
    bad = tiny_bert.adapter(tmp_path / "bad", 3, 1)
    spoil(bad)
    with pytest.raises(AdapterRejected, match=says):
        engine.load_adapter("bad", bad)


def test_labels_are_each_adapters_own(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    for seed, labels in enumerate((["a", "b"], ["c", "d"], None)):
        directory = tiny_bert.adapter(tmp_path / str(seed), 2, seed)
        version = engine.load_adapter(str(seed), directory, labels=labels).version
        assert version.labels == (tuple(labels) if labels else ("LABEL_0", "LABEL_1"))
    (tmp_path / "0" / "config.json").write_text('{"id2label": {"0": "x", "1": "y"}, "problem_type": "regression"}')
    version = engine.load_adapter("named", tmp_path / "0").version
    assert version.labels == ("x", "y") and version.activation == "none"


def test_a_repeated_tensor_is_compared_each_time(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    """Under two names: equal ones are one, others contradict each other, and both files look alike."""
    directories = [tiny_bert.adapter(tmp_path / str(seed), 3, seed, bias="all") for seed in range(2)]
    head = "base_model.model.classifier"
    for directory, change in zip(directories, (0.0, 1.0), strict=True):

        def edit(tensors: dict[str, torch.Tensor], change: float = change) -> None:
            del tensors[f"{head}.original_module.bias"]
            tensors[f"{head}.modules_to_save.bias"] = tensors[f"{head}.bias"] + change

        edit_tensors(directory, edit)
    engine.load_adapter("same", directories[0])
    with pytest.raises(AdapterRejected, match="contradict each other"):
        engine.load_adapter("other", directories[1])


def test_what_differs_between_trainings_is_no_other_form(
    tiny_bert: TinyBase, engine: Engine, tmp_path: Path, parses: list[bytes]
) -> None:
    lists = (["query", "value", "key"], ["key", "value", "query"])
    for seed, names in enumerate(lists):
        directory = tiny_bert.adapter(tmp_path / str(seed), 3, seed, target_modules=names)
        edit_config(directory, target_modules=names, base_model_name_or_path=f"/home/{seed}")
        engine.load_adapter(str(seed), directory)
    assert len(parses) == 1


def test_tied_weights_are_compared_each_time(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - only here is a tied base needed
    from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: PLC0415

    from adapter_router.config import EngineConfig  # noqa: PLC0415

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    config = LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=40, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    for name in ("good", "bad"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora).save_pretrained(tmp_path / name)
    head = next(name for name in load_file(tmp_path / "good" / "adapter_model.safetensors") if "lm_head" in name)
    edit_tensors(tmp_path / "bad", lambda tensors: tensors.update({head: tensors[head] + 1}))
    with Engine(EngineConfig(base=str(tmp_path / "base"), device="cpu")) as engine:
        engine.load_adapter("good", tmp_path / "good")
        with pytest.raises(AdapterRejected, match="are tied, but their saved weights differ"):
            engine.load_adapter("bad", tmp_path / "bad")


def test_files_from_before_training_are_looked_at(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    directory = tiny_bert.adapter(tmp_path / "plain", 3, 0)
    engine.load_adapter("plain", directory)
    (directory / "initial").mkdir()
    shutil.copy(directory / "adapter_model.safetensors", directory / "initial")
    with pytest.raises(AdapterRejected, match="initial/ is for initialisations that change the base"):
        engine.load_adapter("with initial", directory)


def test_forms_are_bounded(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    forms = Forms(remembered=2)
    for rank in (1, 2, 3, 4):
        validate(files(tiny_bert.adapter(tmp_path / str(rank), 3, 0, r=rank)), bases(engine), Request(), forms)
    assert len(forms._forms) == 2
