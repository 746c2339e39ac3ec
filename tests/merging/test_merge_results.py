"""What a merge writes: served by us, loaded by PEFT, with the head that was chosen."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRejected, AdapterUnavailable, InternalError
from adapter_router.merging import peft_directory
from adapter_router.merging.merge import merge
from adapter_router.merging.request import HeadPolicy, MergeRequest, Part
from adapter_router.merging.weight_change import WeightChange
from adapter_router.types import Row, RowResult
from deployments.cli import main
from deployments.demo.tenants import SAMPLES
from tests.merging.bases import MergeBase
from tests.merging.oracle import alone, relative, request, weighted
from tests.merging.test_merge_parity import COMBINATIONS, options_of
from tests.tiny import edit_config, edit_tensors, peft_logits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*tie_word_embeddings:UserWarning")

WEIGHTS = (0.7, -0.3)
HEADED = {"task_type": "SEQ_CLS", "modules_to_save": ["bert.pooler"]}


def features(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    length = int(rng.integers(2, 16))
    return {"input_ids": rng.integers(5, 50, length), "attention_mask": np.ones(length, dtype=np.int64)}


def served(base: MergeBase, directory: Path) -> list[np.ndarray]:
    with Engine(EngineConfig(base=base.path, device="cpu")) as engine:
        engine.load_adapter("merged", directory)
        results = engine.infer([Row(features(seed), "merged") for seed in range(4)])
    assert all(isinstance(result, RowResult) for result in results), results
    return [result.logits for result in results]  # type: ignore[union-attr]


def document(directory: Path, name: str = "adapter_config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / name).read_text())
    return found


@pytest.mark.parametrize("name", COMBINATIONS)
def test_served_and_loaded_by_peft_the_result_answers_alike(bert: MergeBase, name: str) -> None:
    paths = [bert.adapter(seed, **HEADED) for seed in (1, 2)]
    mine, _ = options_of(COMBINATIONS[name], 1)  # type: ignore[index]
    out = bert.new()
    report = merge(request(paths, WEIGHTS, name, head="keep=1", **mine), bert.loaded, out)
    model = PeftModel.from_pretrained(bert.fresh(), out).eval()
    for seed, logits in enumerate(served(bert, out)):
        np.testing.assert_allclose(logits, peft_logits(model, features(seed)), atol=1e-5)
    kept, found = load_file(paths[1] / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    heads = {key for key in kept if "classifier" in key or "pooler" in key}
    assert len(heads) == 4 and all(torch.equal(found[key], kept[key]) for key in heads)
    assert report.saved == ("bert.pooler", "classifier") and report.out == str(out)


def test_peft_knows_every_field_and_finds_every_key(bert: MergeBase, recwarn: pytest.WarningsRecorder) -> None:
    paths = [bert.adapter(1, **HEADED, r=2), bert.adapter(2, lora_bias=True, target_modules=["key", "query"])]
    out = bert.new()
    merge(request(paths, WEIGHTS, "cat", head="keep=0"), bert.loaded, out)
    recwarn.clear()
    loading = PeftModel.from_pretrained(bert.fresh(), out).load_adapter(str(out), "again")
    assert not loading.unexpected_keys and not [key for key in loading.missing_keys if "again" in key]
    assert [str(w.message) for w in recwarn if "peft" in str(w.filename)] == []


def test_the_average_is_the_weighted_mean_of_equal_heads(bert: MergeBase) -> None:
    paths, out = [bert.adapter(seed, **HEADED) for seed in (1, 2)], bert.new()
    merge(request(paths, (3.0, 1.0), "svd", head="average"), bert.loaded, out)
    a, b, found = (load_file(path / "adapter_model.safetensors") for path in (*paths, out))
    key = "base_model.model.classifier.weight"
    torch.testing.assert_close(found[key], 0.75 * a[key] + 0.25 * b[key])


def label(directory: Path, *names: str, problem: str = "single_label_classification") -> None:
    id2label = dict(enumerate(names))
    (directory / "config.json").write_text(json.dumps({"id2label": id2label, "problem_type": problem}))


def test_labels_and_activation_are_the_kept_ones(bert: MergeBase) -> None:
    paths = [bert.adapter(seed, **HEADED) for seed in (1, 2)]
    label(paths[0], "x", "y", "z")
    label(paths[1], "z", "y", "x", problem="multi_label_classification")
    with pytest.raises(AdapterRejected, match="same labels, in the same order"):
        merge(request(paths, (1.0, 1.0), "cat", head="average"), bert.loaded, bert.new())
    out = bert.new()
    report = merge(request(paths, WEIGHTS, "cat", head="keep=1"), bert.loaded, out)
    assert report.labels == ("z", "y", "x")
    with Engine(EngineConfig(base=bert.path, device="cpu")) as engine:
        version = engine.load_adapter("merged", out).version
    assert version.labels == ("z", "y", "x") and version.activation == "sigmoid"


def test_heads_that_are_only_labels_of_the_bases_own_need_a_policy_too(bert: MergeBase) -> None:
    paths = [bert.adapter(1), bert.adapter(2)]
    label(paths[0], "x", "y", "z")
    with pytest.raises(AdapterRejected, match="same labels"):
        merge(request(paths, WEIGHTS, "cat"), bert.loaded, bert.new())


def test_embedding_settings_are_the_kept_ones(bert: MergeBase) -> None:
    paths = [bert.adapter(1), bert.adapter(2)]
    for path, pooling in zip(paths, ("cls", "max"), strict=True):
        (path / "adapter_router.json").write_text(json.dumps({"task": "embedding", "pooling": pooling, "prefix": "q "}))
    with pytest.raises(AdapterRejected, match="same embedding"):
        merge(request(paths, WEIGHTS, "cat"), bert.loaded, bert.new())
    out = bert.new()
    merge(request(paths, WEIGHTS, "cat", head="keep=1"), bert.loaded, out)
    manifest = document(out, "adapter_router.json")
    assert manifest == {"task": "embedding", "pooling": "max", "normalize": True, "dimensions": None, "prefix": "q "}
    assert document(out)["task_type"] == "FEATURE_EXTRACTION" and not (out / "config.json").exists()


def test_the_metadata_says_where_the_result_comes_from(bert: MergeBase) -> None:
    paths, out = [bert.adapter(1), bert.adapter(2)], bert.new()
    report = merge(request(paths, WEIGHTS, "dare_linear", density=0.5), bert.loaded, out)
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    provenance = json.loads(metadata["adapter_router_merge"])
    assert metadata["format"] == "pt" and provenance == report.provenance
    assert [(p["name"], p["weight"]) for p in provenance["parents"]] == [("0", 0.7), ("1", -0.3)]
    assert all(p["digest"].startswith("sha256:") for p in provenance["parents"])
    assert (provenance["type"], provenance["seed"], provenance["density"]) == ("dare_linear", 11, 0.5)
    assert provenance["base_fingerprint"] == bert.loaded.fingerprint


def test_one_seed_gives_one_result_byte_for_byte(bert: MergeBase) -> None:
    paths = [bert.adapter(1), bert.adapter(2)]

    def digest(seed: int) -> str:
        asked = request(paths, WEIGHTS, "dare_ties", density=0.5, seed=seed)
        return merge(asked, bert.loaded, bert.new()).digest

    assert digest(3) == digest(3) != digest(4)


def test_a_dry_run_says_the_same_and_writes_nothing(bert: MergeBase, tmp_path: Path) -> None:
    asked = request([bert.adapter(1), bert.adapter(2)], WEIGHTS, "linear")
    dry = merge(asked, bert.loaded, tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == [] and dry.out is None
    wet = merge(asked, bert.loaded, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and dry.digest == wet.digest


def test_a_type_that_distorts_is_warned_about(bert: MergeBase) -> None:
    paths = [bert.adapter(1), bert.adapter(2)]
    steps: list[tuple[int, int, str]] = []
    report = merge(
        request(paths, WEIGHTS, "linear"), bert.loaded, bert.new(), progress=lambda *step: steps.append(step)
    )
    assert report.error > 0.3 and any(
        "linear is" in warning and "merge by cat" in warning for warning in report.warnings
    )
    assert [done for done, _, _ in steps] == [0, 1] and {total for _, total, _ in steps} == {2}
    assert all(layer.path == path for layer, (_, _, path) in zip(report.layers, steps, strict=True))


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_what_cancels_is_no_distortion(bert: MergeBase, kind: str) -> None:
    """What is left of it is rounding, however many times larger than nothing."""
    path = bert.adapter(1)
    report = merge(request([path, path], (0.7, -0.7), kind), bert.loaded, bert.new())
    assert report.error < 1e-3 and not any("off the weighted sum" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("kind", "fields", "advice"),
    [
        ("svd", {"use_dora": True}, "test the result, or raise --rank"),
        ("svd", {}, "or raise --rank, or merge by cat, which is exact"),
        ("ties_svd", {"use_dora": True}, "or merge by svd, and raise --rank until it is near enough"),
        ("ties", {}, "test the result, or merge by cat, which is exact"),
    ],
)
def test_advice_is_what_would_be_accepted(bert: MergeBase, kind: str, fields: dict[str, Any], advice: str) -> None:
    paths = [bert.adapter(1, **fields), bert.adapter(2)]
    options = {"density": 0.5} if "ties" in kind else {}
    report = merge(request(paths, WEIGHTS, kind, **options), bert.loaded, bert.new())
    assert any(warning.endswith(advice) for warning in report.warnings)


def test_modules_without_effect_are_warned_about(bert: MergeBase) -> None:
    idle = bert.adapter(1)
    edit_tensors(idle, lambda tensors: [t.zero_() for name, t in tensors.items() if "query.lora_B" in name])
    report = merge(request([idle, bert.adapter(2)], WEIGHTS, "cat"), bert.loaded, bert.new())
    assert any(warning.startswith("0: 1 of 2 modules have no effect") for warning in report.warnings)
    gone = merge(request([idle, idle], (0.7, -0.7), "linear"), bert.loaded, bert.new())
    assert any(warning.startswith("2 of 2 modules have no effect") for warning in gone.warnings)


def test_a_sum_of_nothing_is_reported_without_nonsense(bert: MergeBase) -> None:
    path = bert.adapter(1)
    report = merge(request([path, path], (1.0, -1.0), "ties", density=0.5), bert.loaded, bert.new())
    assert math.isinf(report.error) or report.error >= 0
    json.dumps(report.document(), allow_nan=False)


def test_different_ranks_are_written_as_short_patterns(bases: dict[str, MergeBase]) -> None:
    base = bases["llama"]
    paths, out = [base.adapter(1), base.adapter(2, r=2, target_modules=["q_proj", "up_proj"])], base.new()
    merge(request(paths, WEIGHTS, "cat"), base.loaded, out)
    config = document(out)
    assert config["rank_pattern"] == config["alpha_pattern"]
    ranks = {"q_proj": 6, "v_proj": 4, "up_proj": 2}
    assert {**dict.fromkeys(ranks, config["r"]), **config["rank_pattern"]} == ranks


def test_the_fingerprint_that_a_part_demands_is_kept(bert: MergeBase) -> None:
    path, out = bert.adapter(1), bert.new()
    manifest = {"task": "text-classification", "base_fingerprint": bert.loaded.fingerprint}
    (path / "adapter_router.json").write_text(json.dumps(manifest))
    merge(request([path, bert.adapter(2)], WEIGHTS, "cat"), bert.loaded, out)
    assert document(out, "adapter_router.json") == manifest


def test_the_base_that_a_revision_pins_is_kept(bert: MergeBase) -> None:
    path, out, again = bert.adapter(1), bert.new(), bert.new()
    edit_config(path, revision=bert.loaded.fingerprint)
    merge(request([bert.adapter(2), path], WEIGHTS, "cat"), bert.loaded, out)
    assert document(out, "adapter_router.json")["base_fingerprint"] == bert.loaded.fingerprint
    merge(request([out], (1.0,), "svd", rank=8), bert.loaded, again)
    assert document(again, "adapter_router.json")["base_fingerprint"] == bert.loaded.fingerprint


def test_heads_saved_as_wholes_and_in_pieces_are_averaged(bert: MergeBase) -> None:
    whole = bert.adapter(1, modules_to_save=["classifier", "bert.pooler"])
    pieces = bert.adapter(2, modules_to_save=["classifier", "bert.pooler.dense"])
    for paths in ([whole, pieces], [pieces, whole]):
        out = bert.new()
        merge(request(paths, (3.0, 1.0), "cat", head="average"), bert.loaded, out)
        a, b, found = (load_file(path / "adapter_model.safetensors") for path in (*paths, out))
        for key in ("base_model.model.bert.pooler.dense.weight", "base_model.model.classifier.bias"):
            torch.testing.assert_close(found[key], 0.75 * a[key] + 0.25 * b[key])


@pytest.mark.parametrize("fields", [{"target_modules": ["query", "classifier"]}, {"bias": "all"}])
def test_what_adds_to_a_head_is_summed_with_a_warning(bert: MergeBase, fields: dict[str, Any]) -> None:
    """As in a mix: only saved modules are chosen."""
    paths = [bert.adapter(1, **fields), bert.adapter(2)]
    for head, warned in (("keep=1", True), ("average", True), ("refuse", False)):
        out = bert.new()
        report = merge(request(paths, (0.7, 0.3), "cat", head=head), bert.loaded, out)
        assert relative(alone(bert, out), weighted(bert, paths, (0.7, 0.3))) < 1e-5
        told = [warning for warning in report.warnings if "0 changes the head" in warning]
        assert bool(told) == warned and all(f"--head {head}" in warning for warning in told)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "o_proj"]])
def test_biases_are_written_so_that_peft_can_fold_them(tmp_path: Path, targets: list[str]) -> None:
    base = MergeBase("qwen2", tmp_path)
    paths = [base.adapter(1, bias="lora_only", target_modules=targets), base.adapter(2)]
    out = base.new()
    report = merge(request(paths, WEIGHTS, "cat"), base.loaded, out)
    config = document(out)
    assert (config["lora_bias"], config["bias"]) == ((True, "none") if targets == ["q_proj"] else (False, "all"))
    assert relative(alone(base, out), weighted(base, paths, WEIGHTS)) < 1e-5 and not report.warnings


def test_biases_that_peft_cannot_fold_are_warned_about(bases: dict[str, MergeBase]) -> None:
    base = bases["llama"]
    out = base.new()
    report = merge(request([base.adapter(1, lora_bias=True)], (0.7,), "cat"), base.loaded, out)
    assert any("cannot fold lora_bias" in warning for warning in report.warnings)
    with pytest.raises(RuntimeError, match="no bias"):
        alone(base, out)


def test_a_saved_name_that_is_others_end_brings_them_along(tmp_path: Path) -> None:
    """The file spells ``model.norm`` what this base calls ``norm``: PEFT then saves all that ends so."""
    base = MergeBase("trunk", tmp_path)
    path = base.adapter(1, modules_to_save=["norm"], task_type="FEATURE_EXTRACTION")
    edit_config(path, modules_to_save=["model.norm"])

    def respell(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensor = tensors.pop(name)
            if "layernorm" not in name:
                tensors[name.replace("base_model.model.", "base_model.model.model.")] = tensor

    edit_tensors(path, respell)
    own = load_file(path / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    paths, out = [path, base.adapter(2, task_type="FEATURE_EXTRACTION")], base.new()
    merge(request(paths, WEIGHTS, "cat"), base.loaded, out)
    changes, before = alone(base, out), base.fresh().state_dict()
    np.testing.assert_allclose(changes["norm.weight"], 0.7 * (own - before["norm.weight"]).numpy(), atol=1e-6)
    layernorms = [change for name, change in changes.items() if "layernorm" in name]
    assert len(layernorms) == 4 and not np.any(layernorms)


def test_a_merge_can_be_merged_again(bert: MergeBase) -> None:
    paths, once, twice = [bert.adapter(1), bert.adapter(2)], bert.new(), bert.new()
    merge(request(paths, WEIGHTS, "cat"), bert.loaded, once)
    report = merge(request([once], (1.0,), "svd", rank=8), bert.loaded, twice)
    assert report.error < 1e-6


@pytest.mark.parametrize("name", COMBINATIONS)
def test_real_adapters_merge_by_every_type(real_engine: Engine, tmp_path: Path, name: str) -> None:
    parts = tuple(
        Part(tenant, f"package:deployments/demo/adapters/{tenant}", weight)
        for tenant, weight in (("smart-home", 0.9), ("helpdesk", 0.2))
    )
    mine, _ = options_of(COMBINATIONS[name], 5)  # type: ignore[index]
    asked = MergeRequest(parts, name, head=HeadPolicy("keep", "smart-home"), **mine)  # type: ignore[arg-type]
    report = merge(asked, real_engine.base, tmp_path / "out")
    real_engine.load_adapter("merged", tmp_path / "out")
    results = real_engine.infer([Row(text, "merged") for text in SAMPLES["smart-home"]])
    alone = real_engine.infer([Row(text, "smart-home") for text in SAMPLES["smart-home"]])
    real_engine.unload_adapter("merged")
    outputs = [[r.output for r in rows if isinstance(r, RowResult)] for rows in (results, alone)]
    assert [len(found) for found in outputs] == [8, 8]
    if name == "cat":  # most of smart-home and its head: it still understands what it is told
        same = sum(m["label"] == a["label"] for m, a in zip(*outputs, strict=True))  # type: ignore[typeddict-item]
        assert same >= 7 and report.error < 1e-6


def test_the_command_merges_refuses_and_says_why(
    bert: MergeBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(bert.adapter(seed)) for seed in (1, 2)]
    both = ["--adapter", "a", paths[0], "0.7", "--adapter", "b", paths[1], "-0.3"]
    merging = ["merge", "--base", bert.path, *both, "--out", str(tmp_path / "out")]
    assert main([*merging, "--type", "linear", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert (
        captured.out.startswith("OK 0.7 a + -0.3 b merged by linear: dry run") and "warning: linear is" in captured.out
    )
    assert captured.err.splitlines()[-1].startswith("2/2 bert.encoder")
    assert main([*merging, "--type", "cat", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["merged"] and told["relative_error"] < 1e-6 and (tmp_path / "out" / "adapter_config.json").exists()
    assert main([*merging, "--type", "ties", "--head", "keep=c", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["merged"] and len(told["problems"]) == 3
    assert main([*merging, "--adapter", "c", paths[0], "heavy"]) == 1
    assert "REFUSED: 2 problems" in capsys.readouterr().out
    assert main(["merge", "--base", str(tmp_path / "nowhere"), *both, "--out", str(tmp_path / "new")]) == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.fixture
def merging(bert: MergeBase, tmp_path: Path) -> list[str]:
    """A command that would merge into ``tmp_path / "out"``."""
    both = ["--adapter", "ä", str(bert.adapter(1)), "0.7", "--adapter", "b", str(bert.adapter(2)), "0.3"]
    return ["merge", "--base", bert.path, *both, "--type", "svd", "--out", str(tmp_path / "out")]


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), torch.linalg.LinAlgError("no"), InternalError("no"), AdapterUnavailable("no")]
)
def test_only_refusals_end_with_1(
    merging: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(WeightChange, "truncated", fail)
    assert main(merging) == 2 and not list(tmp_path.iterdir())
    assert capfd.readouterr().err.endswith(": no\n")


def test_a_full_disk_is_told_by_the_place(
    merging: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(peft_directory, "_dump", full)
    assert main(merging) == 2 and not list(tmp_path.iterdir())
    (told,) = capfd.readouterr().err.splitlines()[2:]
    assert told == f"{tmp_path / 'out'} cannot be written: No space left on device"


def run(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    code = "import sys; from deployments.cli import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-W", "ignore", "-c", code, *command]
    return subprocess.Popen(line, text=True, stderr=subprocess.PIPE, **options)


def test_a_report_is_told_in_any_alphabet_or_not_at_all(merging: list[str], tmp_path: Path) -> None:
    """A stdout of ASCII and adapters that are not; a stdout that takes nothing."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    told, _ = (process := run(merging, stdout=subprocess.PIPE, env=environment)).communicate(timeout=120)
    assert process.returncode == 0 and told.startswith(r"OK 0.7 \xe4 + 0.3 b merged by svd")
    with Path("/dev/full").open("w") as full:
        _, why = (process := run([*merging[:-1], str(tmp_path / "new")], stdout=full)).communicate(timeout=120)
    assert process.returncode == 2 and why.splitlines()[-1].startswith("the report cannot be written")
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(merging: list[str], tmp_path: Path, number: signal.Signals) -> None:
    """Sent as soon as the staging directory is there; the result stands beside it whole, or not at all."""
    process = run(merging, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.iterdir()):
        time.sleep(0.0005)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode != 1 and {path.name for path in tmp_path.iterdir()} <= {"out"}
    assert process.returncode in (0, 128 + number, -number)
