"""Odd but valid adapters are served exactly as by PEFT alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRejected
from adapter_router.types import LoadReport, Row, RowResult
from tests.tiny import TinyBase, edit_config, edit_tensors, peft_logits, random_features

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore:.*_pattern keys did not match:RuntimeWarning:peft"
)

LABELS = 3
PREFIX = "base_model.model."
QUERY = "bert.encoder.layer.0.attention.self.query"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def engine(tiny_bert: TinyBase) -> Iterator[Engine]:
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu")) as engine:
        yield engine


@pytest.fixture(scope="module")
def saved(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as PEFT saves it."""
    return tiny_bert.adapter(tmp_path_factory.mktemp("saved") / "adapter", LABELS, 1)


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A private copy of ``saved``."""
    return shutil.copytree(saved, tmp_path / "adapter")


def assert_equals_peft(engine: Engine, base: TinyBase, directory: Path, alone: Path | None = None) -> LoadReport:
    """``alone``: what PEFT is given in its place."""
    report = engine.load_adapter("odd", directory)
    oracle = base.alone(alone or directory, LABELS)
    rng = np.random.default_rng(0)
    rows = [random_features(rng) for _ in range(6)]
    results = engine.infer([Row(features, "odd") for features in rows])
    engine.unload_adapter("odd")
    for features, result in zip(rows, results, strict=True):
        assert isinstance(result, RowResult), result
        np.testing.assert_allclose(result.logits, peft_logits(oracle, features), atol=1e-5, rtol=0)
    return report


# Everything here is known when PEFT makes the adapter.
MADE: dict[str, dict[str, Any]] = {
    "as ever": {},
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
    "head named twice": {"modules_to_save": ["classifier", "score", "classifier"]},
    "negative alpha": {"lora_alpha": -2.5},
}

# And this only when it is loaded: the file stays as it was.
EDITED: dict[str, dict[str, Any]] = {
    "OLoRA in capitals, as PEFT takes it too": {"init_lora_weights": "OLoRA"},
    "Gaussian in capitals": {"init_lora_weights": "Gaussian"},
    "PiSSA after all": {"init_lora_weights": "pissa"},
    "trained with dropout": {"lora_dropout": 0.5},
    "another base's name": {"base_model_name_or_path": "somebody/else", "revision": "main"},
    "a key that matches nothing": {"rank_pattern": {"": 4, "nothing": 2}, "alpha_pattern": {"quer": 99}},
    "fields of training": {
        "eva_config": {"rho": 2.0},
        "corda_config": None,
        "loftq_config": {},
        "inference_mode": False,
    },
    "fields of later versions, off": {"future_gate": None, "future_flag": False, "future_names": []},
    "targets in another order": {"target_modules": ["value", "query", "value"]},
    "fan_in_fan_out of no effect": {"fan_in_fan_out": True},
}


@pytest.mark.parametrize("name", MADE)
def test_odd_but_valid_configuration_equals_peft(
    name: str, tiny_bert: TinyBase, engine: Engine, tmp_path: Path
) -> None:
    report = assert_equals_peft(engine, tiny_bert, tiny_bert.adapter(tmp_path / "odd", LABELS, 1, **MADE[name]))
    assert report.warnings == ()


@pytest.mark.parametrize("name", EDITED)
def test_edited_configuration_equals_peft(name: str, tiny_bert: TinyBase, engine: Engine, adapter: Path) -> None:
    peft = shutil.copytree(adapter, adapter.parent / "peft")
    edit_config(adapter, **EDITED[name])
    edit_config(peft, **{field: value for field, value in EDITED[name].items() if not field.startswith("future")})
    assert assert_equals_peft(engine, tiny_bert, adapter, peft).warnings == ()


def test_an_adapter_without_effect_is_served_with_a_warning(tiny_bert: TinyBase, engine: Engine, adapter: Path) -> None:
    edit_config(adapter, lora_alpha=0)
    (warning,) = assert_equals_peft(engine, tiny_bert, adapter).warnings
    assert "4 of 5 modules have no effect" in warning


OVERLAPS = [{"query": 2, "layer.0.attention.self.query": 60}, {"layer.0.attention.self.query": 60, "query": 2}]


@pytest.mark.parametrize("patterns", OVERLAPS, ids=["general-first", "special-first"])
def test_first_of_overlapping_patterns_wins_with_a_warning(
    patterns: dict[str, int], tiny_bert: TinyBase, engine: Engine, adapter: Path
) -> None:
    edit_config(adapter, alpha_pattern=patterns)
    (warning,) = assert_equals_peft(engine, tiny_bert, adapter).warnings
    assert QUERY in warning and list(patterns)[1] in warning


def test_first_of_overlapping_rank_patterns_wins(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    # PEFT sorts the keys when it saves, so only this order has tensors that fit.
    patterns = {"layer.0.attention.self.query": 16, "query": 4}
    directory = tiny_bert.adapter(tmp_path / "a", LABELS, 1, rank_pattern=patterns)
    report = assert_equals_peft(engine, tiny_bert, directory)
    assert report.ranks == (4, 8, 16) and len(report.warnings) == 1
    edit_config(directory, rank_pattern=dict(reversed(patterns.items())))
    with pytest.raises(AdapterRejected, match=r"query.lora_A.weight has shape \[16, 32\], .* need \[4, 32\]"):
        engine.load_adapter("reordered", directory)


def test_overlapping_patterns_that_agree_need_no_warning(tiny_bert: TinyBase, engine: Engine, adapter: Path) -> None:
    edit_config(adapter, alpha_pattern={"query": 20, "layer.0.attention.self.query": 20})
    assert assert_equals_peft(engine, tiny_bert, adapter).warnings == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_file_equals_peft(
    dtype: torch.dtype, tiny_bert: TinyBase, engine: Engine, adapter: Path
) -> None:
    edit_tensors(adapter, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    assert_equals_peft(engine, tiny_bert, adapter)


def test_precisions_may_be_mixed(tiny_bert: TinyBase, engine: Engine, adapter: Path) -> None:
    key = f"{PREFIX}{QUERY}.lora_A.weight"
    edit_tensors(adapter, lambda tensors: tensors.update({key: tensors[key].half()}))
    assert_equals_peft(engine, tiny_bert, adapter)


def _words(base: TinyBase) -> torch.Tensor:
    return load_file(base.directory / "model.safetensors")["embeddings.word_embeddings.weight"]


EXTRA: dict[str, Callable[[TinyBase], torch.Tensor]] = {
    # PEFT itself puts the first into a file when embeddings are trained.
    "bert.embeddings.word_embeddings.base_layer.weight": _words,
    f"{QUERY}.lora_velora_embed": lambda _: torch.ones(32, 1),
    f"{QUERY}.lora_monteclora_sampler.std": lambda _: torch.ones(8),
}


@pytest.mark.parametrize("name", EXTRA)
def test_a_tensor_without_effect_changes_nothing(
    name: str, tiny_bert: TinyBase, engine: Engine, adapter: Path, saved: Path
) -> None:
    edit_tensors(adapter, lambda tensors: tensors.update({PREFIX + name: EXTRA[name](tiny_bert)}))
    assert_equals_peft(engine, tiny_bert, adapter, saved)


def test_a_copy_of_base_weights_may_be_rounded(tiny_bert: TinyBase, engine: Engine, adapter: Path, saved: Path) -> None:
    key = f"{PREFIX}bert.embeddings.word_embeddings.base_layer.weight"
    edit_tensors(adapter, lambda tensors: tensors.update({key: _words(tiny_bert).bfloat16()}))
    assert_equals_peft(engine, tiny_bert, adapter, saved)


def test_tensors_may_stand_in_any_order(tiny_bert: TinyBase, engine: Engine, adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file(dict(reversed(tensors.items())), adapter / WEIGHTS)  # and without PEFT's metadata
    assert_equals_peft(engine, tiny_bert, adapter)


def test_an_adapter_of_the_bare_backbone_is_found_under_a_head(
    tiny_bert: TinyBase, engine: Engine, adapter: Path, saved: Path
) -> None:
    edit_tensors(adapter, _without_backbones_name)
    assert_equals_peft(engine, tiny_bert, adapter, saved)


def test_all_that_is_in_the_file_is_applied(tiny_bert: TinyBase, engine: Engine, saved: Path) -> None:
    report = assert_equals_peft(engine, tiny_bert, saved)
    assert report.tensors_applied == 10 and report.warnings == ()


def _without_backbones_name(tensors: dict[str, torch.Tensor]) -> None:
    for key in list(tensors):
        tensors[key.replace(f"{PREFIX}bert.", PREFIX)] = tensors.pop(key)
