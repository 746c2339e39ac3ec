"""Mixes: what they cost, who answers with which head, what they are cached as, and what is refused.

That they are the weighted sum is proven for every kind of adapter in ``tests/parity/test_mixing.py``.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from adapter_router.adapters.delta import AdapterDelta
from adapter_router.adapters.weighted_sum import Part, weighted_sum
from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.engine.reading import admitted_copy
from adapter_router.errors import (
    AdapterNotFound,
    AdapterRejected,
    AdapterRouterError,
    AdapterUnavailable,
    InvalidRequest,
)
from adapter_router.types import AdapterVersion, Row, RowOutcome, RowResult
from tests.tiny import TinyBase, edit_config, random_features

RANKS = {"a": 4, "b": 12, "c": 8}
LABELS = {"a": ("no", "yes"), "b": ("red", "green", "blue"), "c": ("x", "y")}
FEATURES = random_features(np.random.default_rng(3))


@pytest.fixture(scope="module")
def adapters(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixed")
    return {
        name: tiny_bert.adapter(folder / name, len(LABELS[name]), seed, r=rank)
        for seed, (name, rank) in enumerate(RANKS.items())
    }


@pytest.fixture
def engine(tiny_bert: TinyBase, adapters: dict[str, Path]) -> Iterator[Engine]:
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu")) as engine:
        for name, directory in adapters.items():
            engine.load_adapter(name, directory, labels=LABELS[name])
        yield engine


def answer(engine: Engine, mix: str | Mapping[str, float] | None, head: str | None = None) -> RowResult:
    result = refused(engine, mix, head)
    assert isinstance(result, RowResult), result
    return result


def refused(engine: Engine, mix: Any, head: str | None = None) -> RowOutcome:
    (result,) = engine.infer([Row(FEATURES, mix, head=head)])
    return result


def test_the_chosen_head_answers_with_its_labels(engine: Engine) -> None:
    with_a, with_b = (answer(engine, {"a": 0.7, "b": -0.3}, head) for head in "ab")
    assert with_a.output["label"] in LABELS["a"] and with_a.logits.shape == (2,)  # type: ignore[typeddict-item]
    assert with_b.output["label"] in LABELS["b"] and with_b.logits.shape == (3,)  # type: ignore[typeddict-item]
    assert with_a.adapter == "0.7 a + -0.3 b"
    assert with_a.version != with_b.version


def test_weights_of_one_and_nothing_are_the_adapter_itself(engine: Engine) -> None:
    alone = answer(engine, "a").logits
    for mix in ({"a": 1}, {"a": 1.0, "b": 0.0}, {"b": 0, "c": 0, "a": 1}):
        np.testing.assert_allclose(answer(engine, mix, "a").logits, alone, atol=1e-6)
    doubled = answer(engine, {"a": 2}).logits
    assert np.abs(doubled - alone).max() > 1e-2


def test_a_mix_costs_the_ranks_of_its_parts(engine: Engine) -> None:
    """Ranks lie side by side: nothing is multiplied out, padded or computed twice."""
    mix = answer(engine, {"a": 0.5, "c": 0.5}, "a")
    resident = engine._residency._tiers.lease(mix.version)
    assert resident is not None
    engine._residency.release(mix.version)
    for delta in resident.deltas.values():
        assert delta.rank == RANKS["a"] + RANKS["c"] and delta.is_plain
    sizes = {name: engine._residency._tiers.lease(answer(engine, name).version) for name in "ac"}
    own = sum(part.num_bytes for part in sizes.values() if part)
    head = (2 * 32 + 2) * 4  # of c, which stays behind
    assert resident.num_bytes == own - head
    for part in sizes.values():
        engine._residency.release(part.digest)  # type: ignore[union-attr]


def test_a_mix_is_one_version_whatever_its_spelling(engine: Engine) -> None:
    first, again = answer(engine, {"a": 0.7, "b": -0.3}, "a"), answer(engine, {"b": -0.3, "a": 0.7}, "a")
    assert first.version == again.version
    assert first.logits.tobytes() == again.logits.tobytes()
    others = [answer(engine, {"a": 0.7, "b": -0.31}, "a"), answer(engine, {"a": 0.7, "c": -0.3}, "a")]
    assert len({first.version, *(other.version for other in others)}) == 3
    parents = {name: answer(engine, name).version for name in "ab"}
    assert set(first.parts) == {("a", parents["a"], 0.7), ("b", parents["b"], -0.3)}
    assert answer(engine, {"a": 0.7, "b": 0.0}, "a").version == answer(engine, {"a": 0.7, "b": -0.0}, "a").version
    assert answer(engine, "a").parts == ()


def test_a_mix_is_cached_evicted_and_read_again(engine: Engine) -> None:
    def loads() -> float:
        return engine.metrics.registry.get_sample_value("adapter_router_adapter_loads_total") or 0.0

    mix = {"a": 0.7, "b": -0.3, "c": 0.1}
    first = answer(engine, mix, "b")
    before = loads()
    assert answer(engine, mix, "b").logits.tobytes() == first.logits.tobytes()
    assert loads() == before
    engine.evict(first.version)
    assert first.version not in engine.resident()
    assert answer(engine, mix, "b").logits.tobytes() == first.logits.tobytes()
    assert loads() == before + 1


def test_a_mix_goes_with_its_parts(engine: Engine) -> None:
    mix, other = answer(engine, {"a": 0.7, "b": 1}, "a"), answer(engine, {"c": 0.5})
    engine.unload_adapter("b")
    assert mix.version not in engine.resident() and other.version in engine.resident()
    error = refused(engine, {"a": 0.7, "b": 1}, "a")
    assert isinstance(error, AdapterNotFound) and "'b'" in str(error)


def test_a_flood_of_mixes_evicts_no_adapter(tiny_bert: TinyBase, adapters: dict[str, Path]) -> None:
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu", adapter_memory_bytes=80_000)) as engine:
        for name, directory in adapters.items():
            engine.load_adapter(name, directory)
        own = {answer(engine, name).version for name in adapters}
        load_s = engine.load_s
        for step in range(20):
            mix = answer(engine, {"a": 1.0, "b": step / 10}, "a")
            assert set(engine.resident()) >= own | {mix.version}
        assert (engine.metrics.registry.get_sample_value("adapter_router_adapter_evictions_total") or 0) > 10
        assert engine.load_s == load_s  # what routing takes for the price of an adapter
        assert set(engine._residency._loads._tasks) == own


def test_mixes_have_half_of_the_room(tiny_bert: TinyBase, adapters: dict[str, Path]) -> None:
    reads = mock.Mock(side_effect=admitted_copy)
    config = EngineConfig(base=str(tiny_bert.directory), device="cpu", adapter_memory_bytes=40_000)
    with Engine(config, reads) as engine:
        for name, directory in adapters.items():
            engine.load_adapter(name, directory)
        for _ in range(2):
            error = refused(engine, {"a": 1, "b": 1, "c": 1}, "a")
            assert isinstance(error, AdapterRejected) and "mixes have 20000 of adapter_memory_bytes" in str(error)
    assert reads.call_count == 0


def test_a_refused_mix_is_read_once(tiny_bert: TinyBase, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Its parts never change, and loaders have better things to do."""
    reads = mock.Mock(side_effect=admitted_copy)
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu"), reads) as engine:
        engine.load_adapter("a", adapters["a"])
        engine.load_adapter("tokens", tiny_bert.adapter(tmp_path / "tokens", 2, 9, trainable_token_indices=[7, 9]))
        for _ in range(3):
            error = refused(engine, {"a": 0.5, "tokens": 0.5}, "a")
            assert isinstance(error, AdapterRejected) and "trainable_token_indices" in str(error)
    assert reads.call_count == 2  # its two parts


def test_a_refusal_names_nobody_elses_adapters(
    engine: Engine, tiny_bert: TinyBase, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The same content under two names makes one version, but not one message."""
    fields: dict[str, Any] = {"modules_to_save": ["attention"], "target_modules": ["intermediate.dense"]}
    engine.load_adapter("whole", tiny_bert.adapter(tmp_path / "whole", 2, 9, **fields))
    engine.load_adapter("other", adapters["a"])
    for name in ("a", "other"):
        error = refused(engine, {"whole": 0.5, name: 0.5}, "whole")
        assert isinstance(error, AdapterRejected)
        assert all(problem.startswith(f"{name} changes ") for problem in error.problems), error.problems


def test_a_mix_is_told_which_part_is_gone(engine: Engine, tmp_path: Path) -> None:
    mix = answer(engine, {"a": 0.5, "b": 0.25}, "a")
    version = engine._catalog.find("b")
    assert isinstance(version, AdapterVersion) and version.directory is not None
    engine.evict(mix.version)
    shutil.move(version.directory, tmp_path / "gone")
    error = refused(engine, {"a": 0.5, "b": 0.25}, "a")
    assert isinstance(error, AdapterUnavailable) and str(error).startswith("b: stored adapter")
    shutil.move(tmp_path / "gone", version.directory)
    while isinstance(outcome := refused(engine, {"a": 0.5, "b": 0.25}, "a"), AdapterUnavailable):
        assert str(outcome) == str(error), "what was found is answered for a second"
    assert isinstance(outcome, RowResult) and outcome.logits.tobytes() == mix.logits.tobytes()


def test_the_same_files_may_serve_another_task_in_mixes_too(tiny_bert: TinyBase, tmp_path: Path) -> None:
    directory = tiny_bert.adapter(tmp_path / "t", 3, 1)
    edit_config(directory, task_type=None, modules_to_save=["classifier"])
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu")) as engine:
        versions = []
        for task in ("text-classification", "token-classification"):
            engine.load_adapter("t", directory, task=task)  # type: ignore[arg-type]
            alone, half = answer(engine, "t"), answer(engine, {"t": 0.5})
            versions += [half.version]
            assert alone.logits.shape == half.logits.shape
            engine.unload_adapter("t")
        assert len(set(versions)) == 2


def test_unknown_names_are_looked_up_once_a_call(engine: Engine) -> None:
    with mock.patch("difflib.get_close_matches", wraps=difflib.get_close_matches) as guesses:
        mix = {f"unknown {index}": 1 for index in range(16)}
        outcomes = engine.infer([Row(FEATURES, mix)] * 50 + [Row(FEATURES, "x" * 100_000)] * 50)
    assert guesses.call_count == len(mix) + 1
    assert all(isinstance(outcome, AdapterNotFound) and len(str(outcome)) < 2000 for outcome in outcomes)


def test_what_a_name_means_is_looked_up_for_every_row(engine: Engine, adapters: dict[str, Path]) -> None:
    before = answer(engine, {"a": 1, "c": 1}, "a")
    engine.unload_adapter("c")
    engine.load_adapter("c", adapters["b"])
    after = answer(engine, {"a": 1, "c": 1}, "a")
    assert after.version != before.version and np.abs(after.logits - before.logits).max() > 1e-3


def test_a_head_must_be_chosen_where_there_is_a_choice(engine: Engine) -> None:
    error = refused(engine, {"a": 0.5, "b": 0.5})
    assert isinstance(error, InvalidRequest) and error.param == "head"
    assert "name one of a, b as head" in str(error)
    (outcome,) = engine.infer([Row(FEATURES, "a", head="a")])
    assert isinstance(outcome, InvalidRequest) and outcome.param == "head"


@pytest.mark.parametrize(
    ("mix", "head", "says"),
    [
        ({}, None, ["0 adapters, must have 1 to 16"]),
        ({f"x{i}": 1 for i in range(17)}, None, ["17 adapters"]),
        (
            {"a": float("nan"), "b": float("inf"), "c": 1e9},
            "a",
            ["'a' is nan", "'b' is inf", "'c' is 1000000000.0, must be a number from -10000 to 10000"],
        ),
        ({"a": "0.5", "b": True, "c": None}, "a", ["'a' is 0.5", "'b' is True", "'c' is None"]),
        ({"a": 10**400, "b": 10**5000}, "a", ["'a' is 1000", "'b' is a huge number"]),
        ({"a": 1, 5: 1, "": 1}, None, ["5 cannot name an adapter", "'' cannot name an adapter"]),
        ({"a": 1, "b": float("nan")}, "d", ["'b' is nan", "head 'd' is not among"]),
    ],
)
def test_a_bad_mix_is_refused_with_every_reason(engine: Engine, mix: Any, head: str | None, says: list[str]) -> None:
    error = refused(engine, mix, head)
    assert isinstance(error, InvalidRequest)
    assert len(error.problems) >= len(says)
    assert all(any(text in problem for problem in error.problems) for text in says), error.problems


def test_unknown_parts_are_all_named(engine: Engine) -> None:
    error = refused(engine, {"a": 1, "aa": 1, "zz": 1}, "a")
    assert isinstance(error, AdapterNotFound)
    assert "'aa'; did you mean" in str(error) and "'zz'" in str(error)


def test_parts_must_serve_one_task(engine: Engine, adapters: dict[str, Path], tmp_path: Path) -> None:
    tagged = tmp_path / "tags"
    tagged.mkdir()
    for file in adapters["a"].iterdir():
        if file.is_file():
            (tagged / file.name).write_bytes(file.read_bytes())
    config = (tagged / "adapter_config.json").read_text().replace("SEQ_CLS", "TOKEN_CLS")
    (tagged / "adapter_config.json").write_text(config)
    engine.load_adapter("tags", tagged)
    error = refused(engine, {"a": 0.5, "tags": 0.5}, "a")
    assert isinstance(error, InvalidRequest)
    assert "different tasks: a text-classification, tags token-classification" in str(error)


def test_a_refused_mix_hurts_nobody_in_its_batch(engine: Engine, tiny_bert: TinyBase, tmp_path: Path) -> None:
    """Replaced token rows have no weighted sum."""
    tokens = tiny_bert.adapter(tmp_path / "tokens", 2, 9, trainable_token_indices=[7, 9])
    engine.load_adapter("tokens", tokens)
    alone = answer(engine, "a").logits
    mixes = [{"a": 0.5, "tokens": 0.5}, {"a": 0.5, "b": 0.5}, "a", {"a": 1, "b": 0}]
    results = engine.infer([Row(FEATURES, mix, head=None if mix == "a" else "a") for mix in mixes])
    assert isinstance(results[0], AdapterRejected) and "trainable_token_indices" in str(results[0])
    for result in results[1:]:
        assert not isinstance(result, AdapterRouterError), result
    np.testing.assert_allclose(results[2].logits, alone, atol=1e-5)  # type: ignore[union-attr]
    np.testing.assert_allclose(results[3].logits, alone, atol=1e-5)  # type: ignore[union-attr]


def test_opposite_magnitudes_cannot_cancel_the_base(engine: Engine, tiny_bert: TinyBase, tmp_path: Path) -> None:
    """A weight can take the base's own output to nothing, where what is served could not be scaled back."""
    engine.load_adapter("dora", tiny_bert.adapter(tmp_path / "dora", 2, 9, use_dora=True))
    resident = engine._residency._tiers.lease(answer(engine, "dora").version)
    assert resident is not None
    gain = next(iter(resident.deltas.values())).gain
    assert gain is not None
    engine._residency.release(resident.digest)
    error = refused(engine, {"dora": float(1 / (1 - gain[0].item()))})
    assert isinstance(error, AdapterRejected) and "cancel the base's output" in str(error)


def test_only_parameters_of_saved_modules_have_a_sum(engine: Engine) -> None:
    prepared = engine.base.task("text-classification")
    norm = "bert.embeddings.LayerNorm"
    saved = {norm: {**prepared.weights.parameters_of(norm), "running_mean": torch.zeros(32)}}
    with pytest.raises(AdapterRejected, match="saved with running_mean: only parameters of the base have a sum"):
        weighted_sum([Part("a", AdapterDelta(saved=saved), 0.5)], 0, prepared.spec, prepared.weights)


def test_generation_takes_mixes_too(tmp_path: Path) -> None:
    from tests.parity.build import RECIPES, build  # noqa: PLC0415 - only here is a decoder needed
    from tests.parity.world import make_base  # noqa: PLC0415

    base = make_base("llama", "text-generation", 1, tmp_path)
    built = [build(base, RECIPES[name], tmp_path / name) for name in ("plain", "dora")]
    with Engine(EngineConfig(base=str(base.directory), device="cpu")) as engine:
        for adapter in built:
            assert adapter is not None
            engine.load_adapter(adapter.name, adapter.directory)
        ids = {"input_ids": np.array([7, 8, 9])}
        names: list[Any] = ["plain", {"plain": 1.0, "dora": 0.0}, {"plain": 0.5, "dora": 2.0}]
        events = {event.index: event for event in engine.generate([Row(ids, name, head=None) for name in names])}
    assert events[0].token_ids == events[1].token_ids != events[2].token_ids
    assert events[2].adapter == "0.5 plain + 2.0 dora" and events[2].error is None


def test_what_runs_as_a_whole_has_no_sum_with_what_is_inside(tmp_path: Path) -> None:
    """LoRA of a parameter, and modules saved around one another, run in the module's place."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: PLC0415

    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        vocab_size=100,
        max_position_embeddings=40,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    kinds: dict[str, dict[str, Any]] = {
        "linear": {"target_modules": ["q_proj"]},
        "parameter": {"target_parameters": ["q_proj.weight"], "target_modules": []},
        "outer": {"target_modules": ["lm_head"], "modules_to_save": ["self_attn"]},
        "inner": {"target_modules": ["lm_head"], "modules_to_save": ["k_proj"]},
    }
    with Engine(EngineConfig(base=str(tmp_path / "base"), device="cpu")) as engine:
        for name, fields in kinds.items():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields)
            get_peft_model(model, lora).save_pretrained(tmp_path / name)
            engine.load_adapter(name, tmp_path / name)
        for mix in ({"linear": 1, "parameter": 0}, {"outer": 1, "inner": 1}, {"outer": 1, "linear": 1}):
            error = refused(engine, mix)
            assert isinstance(error, AdapterRejected), (mix, error)
            assert "is replaced as a whole: there is no sum of the two" in str(error)
        for mix in ({"linear": 1}, {"parameter": 0.5}, {"outer": 0.5}, {"inner": 0.5}, {"linear": 1, "inner": 1}):
            assert isinstance(refused(engine, mix), RowResult)
