"""Mixed == alone: the engine against PEFT with each adapter alone on a fresh base, on tiny random models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterExists, AdapterNotFound, InputTooLong, InvalidRequest, TaskMismatch
from adapter_router.types import Row, RowResult
from tests.tiny import TinyBase, peft_logits, random_features, random_row, weights_digest

# name -> (labels, LoRA fields); every family serves all of them in the same batches.
ADAPTERS = {
    "plain": (3, {"r": 4}),
    "wide": (50, {"r": 64, "lora_alpha": 32}),
    "two-labels": (2, {"r": 16, "lora_alpha": 8}),
    "rslora": (7, {"r": 8, "use_rslora": True, "lora_alpha": 5}),
    "first-layer": (4, {"r": 8, "layers_to_transform": [0]}),
    "patterns": (9, {"r": 8, "rank_pattern": {"1.*": 32, "0.attention.*": 4}, "alpha_pattern": {".*0.*": 3}}),
}
ALL_LINEAR = (5, {"r": 8, "target_modules": "all-linear"})
FAMILIES = {
    "bert": {"all-linear": ALL_LINEAR, "saved-pooler": (6, {"modules_to_save": ["pooler"]})},
    "roberta": {"all-linear": ALL_LINEAR, "saved-norm": (6, {"modules_to_save": ["embeddings.LayerNorm"]})},
    # PEFT always saves DistilBERT's pre_classifier (its name ends in "classifier") and cannot target it as well.
    "distilbert": {"all-linear": (5, {"target_modules": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]})},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_200_random_mixed_batches_equal_peft_alone(kind: str, tmp_path: Path) -> None:
    base = TinyBase(kind, tmp_path / "base")
    cases = {**ADAPTERS, **FAMILIES[kind]}
    rng = np.random.default_rng(0)
    with Engine(EngineConfig(base=str(base.directory), device="cpu")) as engine:
        before = weights_digest(engine.base.model)
        alone = {}
        for seed, (name, (num_labels, lora)) in enumerate(cases.items()):
            directory = base.adapter(tmp_path / name, num_labels, seed, **lora)
            engine.load_adapter(name, directory)
            alone[name] = base.alone(directory, num_labels)
        names = list(cases)
        for _ in range(200):
            rows = [random_row(rng, names[i]) for i in rng.integers(0, len(names), rng.integers(1, 17))]
            results = engine.infer(rows)
            for row, result in zip(rows, results, strict=True):
                assert isinstance(result, RowResult), result
                expected = peft_logits(alone[str(row.adapter)], row.inputs)  # type: ignore[arg-type]
                assert result.logits.shape == (cases[str(row.adapter)][0],)
                # Products of float32 differ by more than 1e-5 where numbers are larger than 1, on some CPUs.
                np.testing.assert_allclose(result.logits, expected, atol=1e-5, rtol=1e-5)
        assert weights_digest(engine.base.model) == before
        fresh = weights_digest(base.fresh(2))
        # The shared backbone has every part that some head may want; this task's own model need not have them all.
        backbone = {name for name in fresh if name not in engine.base.spec.untrained}
        assert {n: before[n] for n in backbone} == {n: fresh[n] for n in backbone}


def test_adapters_differ_from_each_other_and_from_the_base(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    """Guards the oracle: if adapters had no effect, equality would prove nothing."""
    for seed in (1, 2):
        engine.load_adapter(str(seed), tiny_bert.adapter(tmp_path / str(seed), 3, seed))
    features = random_features(np.random.default_rng(0))
    one, two = engine.infer([Row(features, "1"), Row(features, "2")])
    assert np.abs(one.logits - two.logits).max() > 0.1  # type: ignore[union-attr]


def test_a_base_with_its_own_head_answers_bare_rows(tmp_path: Path) -> None:
    base = TinyBase("bert", tmp_path / "base", num_labels=4)
    features = random_features(np.random.default_rng(0))
    with Engine(EngineConfig(base=str(base.directory), device="cpu")) as engine:
        engine.load_adapter("a", base.adapter(tmp_path / "a", 6, 1))
        # Without a saved classifier the adapter uses the base's own head.
        lora_only = base.adapter(tmp_path / "b", 4, 2, task_type=None)
        engine.load_adapter("b", lora_only)
        bare, a, b = engine.infer([Row(features), Row(features, "a"), Row(features, "b")])
    assert isinstance(bare, RowResult) and isinstance(a, RowResult) and isinstance(b, RowResult)
    np.testing.assert_allclose(bare.logits, peft_logits(base.fresh(4).eval(), features), atol=1e-5)
    np.testing.assert_allclose(a.logits, peft_logits(base.alone(tmp_path / "a", 6), features), atol=1e-5)
    np.testing.assert_allclose(b.logits, peft_logits(base.alone(lora_only, 4), features), atol=1e-5)


def test_lora_inside_a_module_that_another_adapter_replaces(
    tiny_bert: TinyBase, engine: Engine, tmp_path: Path
) -> None:
    engine.load_adapter("saves", tiny_bert.adapter(tmp_path / "saves", 3, 1, modules_to_save=["pooler"]))
    engine.load_adapter("targets", tiny_bert.adapter(tmp_path / "targets", 4, 2, target_modules=["dense"]))
    engine.load_adapter("neither", tiny_bert.adapter(tmp_path / "neither", 5, 3))
    rng = np.random.default_rng(0)
    rows = [random_row(rng, name) for name in ["targets", "saves", "neither", "targets", "saves"]]
    labels = {"saves": 3, "targets": 4, "neither": 5}
    for row, result in zip(rows, engine.infer(rows), strict=True):
        expected = peft_logits(tiny_bert.alone(tmp_path / str(row.adapter), labels[str(row.adapter)]), row.inputs)
        np.testing.assert_allclose(result.logits, expected, atol=1e-5)  # type: ignore[union-attr]


def test_labels_and_activation_belong_to_the_adapter(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    named = tiny_bert.adapter(tmp_path / "named", 3, 1)
    (named / "config.json").write_text(
        '{"id2label": {"0": "no", "1": "maybe", "2": "yes"}, "problem_type": "multi_label_classification"}'
    )
    engine.load_adapter("named", named)
    engine.load_adapter("renamed", named, labels=["x", "y", "z"])
    engine.load_adapter("unnamed", tiny_bert.adapter(tmp_path / "unnamed", 2, 2))
    features = random_features(np.random.default_rng(0))
    raw = Row(features, "unnamed", parameters={"use_activation": False})
    rows = [Row(features, name) for name in ("named", "renamed", "unnamed")] + [raw]
    multi, renamed, single, logits = [result.output for result in engine.infer(rows)]  # type: ignore[union-attr]
    assert multi["label"] in {"no", "maybe", "yes"} and renamed["label"] in {"x", "y", "z"}
    assert multi["probs"] == pytest.approx(renamed["probs"]) and abs(sum(multi["probs"]) - 1) > 1e-3
    assert single["label"] in {"LABEL_0", "LABEL_1"} and sum(single["probs"]) == pytest.approx(1)
    assert logits["probs"] != single["probs"] and logits["num_classes"] == 2


def test_bad_rows_fail_alone(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    engine.load_adapter("a", tiny_bert.adapter(tmp_path / "a", 3, 1))
    ids = np.arange(5, 10)
    bad: dict[int, tuple[Row, type[Exception]]] = {
        0: (Row({"input_ids": ids}, "unknown"), AdapterNotFound),
        2: (Row({"input_ids": np.full(41, 7)}, "a"), InputTooLong),
        3: (Row({"input_ids": np.array([], dtype=np.int64)}, "a"), InvalidRequest),
        4: (Row({"input_ids": np.array([5, 100])}, "a"), InvalidRequest),
        5: (Row({"input_ids": ids, "attention_mask": np.ones(4, dtype=np.int64)}, "a"), InvalidRequest),
        6: (Row({"input_ids": ids, "pixels": ids}, "a"), InvalidRequest),
        7: (Row({"input_ids": ids.astype(float)}, "a"), InvalidRequest),
        8: (Row("text without a tokenizer", "a"), InvalidRequest),
        9: (Row({"input_ids": ids}, None), TaskMismatch),
        10: (Row({"input_ids": ids}, "a", task="embedding"), TaskMismatch),  # type: ignore[arg-type]
        11: (Row({"input_ids": ids, "attention_mask": np.zeros(5, dtype=np.int64)}, "a"), InvalidRequest),
        12: (Row({"input_ids": ids, "token_type_ids": np.full(5, 99)}, "a"), InvalidRequest),
        13: (Row({"input_ids": [[1], [2, 3]]}, "a"), InvalidRequest),  # type: ignore[dict-item]
    }
    good = Row({"input_ids": ids}, "a")
    results = engine.infer([bad[i][0] if i in bad else good for i in range(15)])
    (reference,) = engine.infer([good])
    for index, result in enumerate(results):
        if index in bad:
            assert type(result) is bad[index][1], (index, result)
        else:
            np.testing.assert_allclose(result.logits, reference.logits, atol=1e-6)  # type: ignore[union-attr]


def test_a_row_that_breaks_the_forward_fails_alone(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    engine.load_adapter("a", tiny_bert.adapter(tmp_path / "a", 3, 1))
    poison = Row({"input_ids": np.array([5, 66, 7])}, "a")
    good = Row({"input_ids": np.arange(5, 10)}, "a")

    def raise_on_66(_: object, __: object, kwargs: dict[str, torch.Tensor]) -> None:
        if (kwargs["input_ids"] == 66).any():
            raise RuntimeError("a fault in the model")

    engine.base.model.register_forward_pre_hook(raise_on_66, with_kwargs=True)
    results = engine.infer([good, poison, good, good])
    assert [isinstance(r, RowResult) for r in results] == [True, False, True, True]
    assert results[1].code == "internal_error"  # type: ignore[union-attr]


def test_names_are_registered_once_and_forgotten(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    directory = tiny_bert.adapter(tmp_path / "a", 3, 1)
    report = engine.load_adapter("a", directory)
    assert report.tensors_applied == 10 and report.ranks == (8,) and report.num_bytes > 0
    with pytest.raises(AdapterExists):
        engine.load_adapter("a", directory)
    engine.unload_adapter("a")
    assert engine.resident() == []
    with pytest.raises(AdapterNotFound):
        engine.unload_adapter("a")
    (gone,) = engine.infer([random_row(np.random.default_rng(0), "a")])
    assert isinstance(gone, AdapterNotFound)
    assert engine.load_adapter("a", directory).version == report.version


def test_a_row_that_cannot_be_encoded_is_no_end_of_the_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a tokenizer throws."""

    def broken(*_: object) -> None:
        raise RuntimeError("a fault in the tokenizer")

    monkeypatch.setattr(engine.base.encoder, "encode", broken)
    rows = [Row("x", task="embedding"), Row("y", "unknown")]
    codes = ["internal_error", "model_not_found"]
    assert [outcome.code for outcome in engine.infer(rows)] == codes  # type: ignore[union-attr]
    assert [event.error.code for event in engine.generate(rows)] == codes  # type: ignore[union-attr]
