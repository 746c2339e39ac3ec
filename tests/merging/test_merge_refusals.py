"""Merges that are refused: with every problem at once, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_router.catalog import copying
from adapter_router.errors import AdapterRejected, InternalError
from adapter_router.merging import merge as merging
from adapter_router.merging import peft_directory
from adapter_router.merging.loading import WriteFailed
from adapter_router.merging.merge import merge
from adapter_router.merging.request import HeadPolicy, MergeRequest, Part
from tests.merging.bases import MergeBase
from tests.tiny import edit_config, edit_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*tie_word_embeddings:UserWarning")

Edit = Callable[[MergeRequest], MergeRequest]


@pytest.fixture(scope="module")
def plain(bases: dict[str, MergeBase]) -> MergeRequest:
    base = bases["bert"]
    parts = (Part("a", str(base.adapter(1)), 0.7), Part("b", str(base.adapter(2)), -0.3))
    return MergeRequest(parts, "cat")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where results go; a refused merge leaves nothing in it."""
    folder = tmp_path / "results"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def refused(request: MergeRequest, base: MergeBase, out: Path) -> tuple[str, ...]:
    with pytest.raises(AdapterRejected) as caught:
        merge(request, base.loaded, out)
    return caught.value.problems


def weighing(*weights: Any) -> Edit:
    return lambda request: replace(
        request, parts=tuple(replace(p, weight=w) for p, w in zip(request.parts, weights, strict=True))
    )


def headed(text: str) -> Edit:
    return lambda request: replace(request, head=HeadPolicy.parse(text))


def fields(**values: Any) -> Edit:
    return lambda request: replace(request, **values)


def named(*names: Any) -> Edit:
    return lambda request: replace(
        request, parts=tuple(replace(p, name=n) for p, n in zip(request.parts, names, strict=True))
    )


BAD_REQUESTS: list[tuple[Edit, str]] = [
    (fields(parts=()), "no adapters"),
    (weighing(float("nan"), 1.0), "a: its weight is nan"),
    (weighing(1.0, float("inf")), "b: its weight is inf"),
    (weighing(1.0, "much"), "b: its weight is 'much'"),
    (weighing(1.0, True), "b: its weight is True"),
    (weighing(1.0, 10**400), "b: its weight is 1000"),
    (weighing(0, 0.0), "all weights are 0"),
    (named("a", "a"), "several adapters are named a"),
    (named("", "b"), "an adapter is named ''"),
    (named("a=b", "b"), "an adapter is named 'a=b'"),
    (fields(type="mean"), "type is 'mean'"),
    (fields(type="ties"), "density is missing"),
    (fields(type="ties", density=0.0), "density is 0.0"),
    (fields(type="dare_linear", density=1.5), "density is 1.5"),
    (fields(type="dare_ties_svd", density=float("nan")), "density is nan"),
    (fields(density=0.5), "cat does not"),
    (fields(rank=4), "rank is for types that cut it"),
    (fields(type="svd", rank=0), "rank is 0"),
    (fields(type="svd", rank=2.0), "rank is 2.0"),
    (fields(type="svd", rank=5000), "rank is 5000"),
    (fields(sign="total"), "sign is for types that elect one"),
    (fields(type="ties", density=0.5, sign="loudest"), "sign is 'loudest'"),
    (fields(seed=-1), "seed is -1"),
    (fields(seed=0.5), "seed is 0.5"),
    (fields(task="poetry"), "task is 'poetry'"),
    (headed("best"), "head policy is 'best'"),
    (headed("keep=c"), "keep=c names none"),
    (headed("keep"), "names none"),
    (headed("refuse=a"), "takes no name"),
    (headed("average"), "average needs weights of at least 0"),
]


@pytest.mark.parametrize(("edit", "problem"), BAD_REQUESTS, ids=lambda value: str(value)[:40])
def test_a_bad_request_is_refused(bert: MergeBase, plain: MergeRequest, folder: Path, edit: Edit, problem: str) -> None:
    problems = refused(edit(plain), bert, folder / "out")
    assert len(problems) == 1 and problem in problems[0]


PARTS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "heads and no policy": ({"modules_to_save": ["classifier"]}, "b (classifier); choose a head policy", {}),
    "heads of one only, averaged": (
        {"modules_to_save": ["classifier"]},
        "differ in names or shapes: classifier.bias",
        {"head": HeadPolicy("average"), "positive": True},
    ),
    "ranks differ": ({"r": 2}, "needs equal ranks, they differ on 2 modules", {"type": "linear"}),
    "a pattern's rank differs": ({"rank_pattern": {"query": 2}}, "differ on 1 modules", {"type": "linear"}),
    "KaSA by linear": (
        {"kasa_config": {"beta": 1e-4, "gemma": 1e-3}},
        "b: linear merges A and B apart",
        {"type": "linear"},
    ),
    "DoRA by cat": ({"use_dora": True}, "b: cat merges low-rank factors", {}),
    "DoRA by ties": ({"use_dora": True}, "merge by svd", {"type": "ties", "density": 0.5}),
    "replaced rows": ({"trainable_token_indices": [3]}, "replaced token rows", {}),
    "a saved module that the other changes": (
        {"target_modules": ["value"], "modules_to_save": ["query"]},
        "is replaced as a whole",
        {},
    ),
    "another task": ({"task_type": "TOKEN_CLS"}, "the adapters serve different tasks", {}),
}


@pytest.mark.parametrize("case", PARTS)
def test_adapters_that_cannot_be_merged_are_refused(
    bert: MergeBase, plain: MergeRequest, folder: Path, case: str
) -> None:
    lora, problem, changes = PARTS[case]
    changes = dict(changes)
    weight = 0.3 if changes.pop("positive", False) else -0.3
    part = Part("b", str(bert.adapter(3, **lora)), weight)
    request = replace(plain, parts=(plain.parts[0], part), **changes)
    assert any(problem in line for line in refused(request, bert, folder / "out"))


def test_an_adapter_without_any_rank_needs_one(bert: MergeBase, plain: MergeRequest, folder: Path) -> None:
    part = plain.parts[0]
    directory = bert.adapter(5)
    config = {"peft_type": "IA3", "target_modules": ["query", "value"], "feedforward_modules": []}
    (directory / "adapter_config.json").write_text(json.dumps(config))

    def rescale(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors.pop(name)
            if "lora_A" in name:
                tensors[name.replace("lora_A.weight", "ia3_l")] = torch.full((24, 1), 1.5)

    edit_tensors(directory, rescale)
    scaled = replace(part, directory=str(directory))
    assert "say which rank" in refused(replace(plain, parts=(scaled,), type="svd"), bert, folder / "out")[0]
    edit_config(directory, feedforward_modules=["query", "value"])
    edit_tensors(directory, lambda tensors: tensors.update({name: t.t() for name, t in tensors.items()}))
    assert "scaled inputs (IA3)" in refused(replace(plain, parts=(scaled,), type="svd"), bert, folder / "out")[0]


def test_a_bias_that_peft_has_no_place_for_is_refused(bases: dict[str, MergeBase], folder: Path) -> None:
    """Llama's layers have no bias to be stored as, and PEFT has no lora_bias beside an embedding."""
    base = bases["llama"]
    paths = base.adapter(1, lora_bias=True), base.adapter(2, target_modules=["embed_tokens"])
    parts = tuple(Part(name, str(path), 1.0) for name, path in zip("ab", paths, strict=True))
    assert "PEFT has no form" in refused(MergeRequest(parts, "cat"), base, folder / "out")[0]


def test_an_alora_is_refused(bases: dict[str, MergeBase], folder: Path) -> None:
    base = bases["llama"]
    path = base.adapter(1, task_type="CAUSAL_LM", alora_invocation_tokens=[3, 4])
    assert "(aLoRA)" in refused(MergeRequest((Part("a", str(path), 1.0),), "cat"), base, folder / "out")[0]


def link_weights(directory: Path) -> None:
    weights = directory / "adapter_model.safetensors"
    shutil.move(weights, directory.parent / f"{directory.name}.outside")
    weights.symlink_to(directory.parent / f"{directory.name}.outside")


def pipe_weights(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    os.mkfifo(directory / "adapter_model.safetensors")


def pickle_weights(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def lose_half(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(next(iter(tensors))))


def poison(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({k: t * float("nan") for k, t in tensors.items()}))


@pytest.mark.parametrize("spoil", [shutil.rmtree, link_weights, pipe_weights, pickle_weights, lose_half, poison])
def test_hostile_adapters_are_refused_as_in_serving(
    bert: MergeBase, plain: MergeRequest, folder: Path, spoil: Callable[[Path], None]
) -> None:
    directory = bert.adapter(4)
    spoil(directory)
    request = replace(plain, parts=(plain.parts[0], Part("b", str(directory), 1.0)))
    assert all(problem.startswith("b: ") for problem in refused(request, bert, folder / "out"))


def test_everything_wrong_is_told_at_once(bert: MergeBase, plain: MergeRequest, folder: Path) -> None:
    half = bert.adapter(6, r=2)
    lose_half(half)
    other = bert.adapter(7, r=3, modules_to_save=["classifier"])
    parts = (*plain.parts, Part("b", str(half), float("nan")), Part("c", str(other), 1.0), Part("d", "/nowhere", 1.0))
    request = MergeRequest(parts, "ties", rank=3, sign="no", seed=-1)  # type: ignore[arg-type]
    told = "\n".join(refused(request, bert, folder / "absent" / "out"))
    expected = ("weight is nan", "named b", "density is missing", "rank is for", "sign is 'no'", "seed is -1")
    expected += ("absent is not a directory", "b: lora_A", "d: ", "equal ranks", "choose a head policy")
    assert [text for text in expected if text not in told] == []


def test_what_is_found_on_the_way_to_the_sum_is_told_with_the_rest(
    bert: MergeBase, plain: MergeRequest, folder: Path
) -> None:
    """Conflicts of whole modules beside ranks, weights and heads that cannot be merged either."""
    saving = bert.adapter(8, target_modules=["value"], modules_to_save=["query", "classifier"], r=2, use_dora=True)
    rows = bert.adapter(9, target_modules=["query"], trainable_token_indices=[3])
    parts = (plain.parts[0], Part("b", str(saving), float("nan")), Part("c", str(rows), 1.0))
    told = "\n".join(refused(MergeRequest(parts, "linear"), bert, folder / "out"))
    expected = ("b: its weight is nan", "b: linear merges low-rank factors", "b (classifier); choose a head policy")
    expected += ("c: replaced token rows", "a changes bert.encoder.layer.0.attention.self.query, and")
    assert [text for text in expected if text not in told] == []
    assert "weighted sum" not in told, "said once, of the part"


def test_biases_without_a_form_are_told_with_the_rest(bases: dict[str, MergeBase], folder: Path) -> None:
    base = bases["llama"]
    paths = base.adapter(1, lora_bias=True), base.adapter(2, target_modules=["embed_tokens", "q_proj"], use_dora=True)
    parts = tuple(Part(name, str(path), 1.0) for name, path in zip("ab", paths, strict=True))
    told = "\n".join(refused(MergeRequest(parts, "cat"), base, folder / "out"))
    assert "PEFT has no form" in told and "b: cat merges low-rank factors" in told


def test_a_base_copy_of_what_the_merge_changes_is_refused() -> None:
    saved: dict[str, dict[str, torch.Tensor]] = {"norm": {}}
    written: dict[str, dict[str, torch.Tensor]] = {**saved, "layers.0.norm": {}}
    assert merging._copy_problems(saved, written, {"layers.0.normal", "q_proj"}) == []
    (problem,) = merging._copy_problems(saved, written, {"layers.0.norm", "q_proj"})
    assert "the merge changes layers.0.norm: there is no file of both" in problem


def test_adapters_of_different_tasks_are_asked_what_else_is_wrong(
    bert: MergeBase, plain: MergeRequest, folder: Path
) -> None:
    tagger = bert.adapter(3, task_type="TOKEN_CLS", use_dora=True)
    rows = bert.adapter(4, target_modules=["query"], trainable_token_indices=[3], modules_to_save=["classifier"])
    parts = (Part("a", str(rows), 0.7), Part("b", str(tagger), 0.3))
    told = "\n".join(refused(replace(plain, parts=parts), bert, folder / "out"))
    expected = (
        "different tasks",
        "a: replaced token rows",
        "b: cat merges low-rank",
        "a (classifier)",
        "b (classifier)",
    )
    assert [text for text in expected if text not in told] == []


def test_average_weights_that_are_left_may_be_nothing(bert: MergeBase, plain: MergeRequest, folder: Path) -> None:
    """The only part of weight above 0 cannot be read: the others' heads have no mean."""
    head = bert.adapter(5, modules_to_save=["classifier"])
    parts = (Part("a", str(head), 0.0), Part("b", "/nowhere", 1.0))
    (problem,) = refused(replace(plain, parts=parts, head=HeadPolicy("average")), bert, folder / "out")
    assert problem.startswith("b: ")


def test_averages_of_unlike_heads_are_refused(bert: MergeBase, plain: MergeRequest, folder: Path) -> None:
    paths = bert.adapter(1, modules_to_save=["classifier", "pooler"]), bert.adapter(2, modules_to_save=["classifier"])
    parts = tuple(Part(name, str(path), 1.0) for name, path in zip("ab", paths, strict=True))
    (problem,) = refused(replace(plain, parts=parts, head=HeadPolicy("average")), bert, folder / "out")
    assert "differ in names or shapes: bert.pooler.dense.bias" in problem


@pytest.mark.parametrize("inside", ["initial", "../{name}/out", "new/out"])
def test_a_result_inside_an_adapter_is_refused(bert: MergeBase, plain: MergeRequest, inside: str) -> None:
    home = Path(plain.parts[1].directory)
    before = sorted(home.iterdir())
    told = "\n".join(refused(plain, bert, home / inside.format(name=home.name)))
    assert "lies inside the adapter b" in told
    assert "lies inside the adapter b" in "\n".join(refused(plain, bert, home))
    assert sorted(home.iterdir()) == before


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_what_exists_is_never_overwritten(bert: MergeBase, plain: MergeRequest, tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    {"file": out.touch, "folder": out.mkdir, "link": lambda: out.symlink_to(tmp_path / "dangling")}[there]()
    assert "exists; a merge never overwrites" in refused(plain, bert, out)[0]
    assert list(tmp_path.iterdir()) == [out]


def test_numbers_that_overflow_are_refused(bert: MergeBase, folder: Path) -> None:
    loud = Part("a", str(bert.adapter(8, std=1e18)), 1e9)
    for kind, options in (("linear", {}), ("svd", {}), ("cat", {}), ("magnitude_prune_svd", {"density": 0.5})):
        request = MergeRequest((loud,), kind, **options)  # type: ignore[arg-type]
        try:
            merge(request, bert.loaded, folder / kind)
        except AdapterRejected as error:
            assert len(error.problems) == 2 and all("overflow" in problem for problem in error.problems)
        else:
            shutil.rmtree(folder / kind)


def test_a_merge_that_fails_midway_leaves_nothing(
    bert: MergeBase, plain: MergeRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging.peft_directory, "_dump", full)
    with pytest.raises(WriteFailed, match="No space left") as caught:
        merge(plain, bert.loaded, folder / "out")
    assert caught.value.filename == str(folder / "out")


def test_a_full_disk_is_no_fault_of_an_adapters(
    bert: MergeBase, plain: MergeRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copying, "_copy", full)
    with pytest.raises(WriteFailed, match="No space left") as caught:
        merge(plain, bert.loaded, folder / "out")
    assert plain.parts[0].directory not in str(caught.value)


def test_files_that_do_not_say_what_was_meant_are_noticed(
    bert: MergeBase, plain: MergeRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own faults: a wrong scale, a lost tensor."""
    config, tensors = peft_directory._config, peft_directory._tensors
    monkeypatch.setattr(peft_directory, "_config", lambda *args: {**config(*args), "lora_alpha": 1})
    with pytest.raises(InternalError, match="do not say what they should"):
        merge(plain, bert.loaded, folder / "out")
    monkeypatch.setattr(peft_directory, "_config", config)
    monkeypatch.setattr(peft_directory, "_tensors", lambda *args: {n: t * 1.001 for n, t in tensors(*args).items()})
    with pytest.raises(InternalError, match="do not say what they should"):
        merge(plain, bert.loaded, folder / "out")
    monkeypatch.setattr(peft_directory, "_tensors", lambda *args: dict(list(tensors(*args).items())[1:]))
    with pytest.raises(AdapterRejected, match=r"the result: .*lora_A"):
        merge(plain, bert.loaded, folder / "out")


def test_a_lost_fingerprint_is_noticed(
    bert: MergeBase, plain: MergeRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = bert.adapter(10)
    edit_config(pinned, revision=bert.loaded.fingerprint)
    monkeypatch.setattr(peft_directory, "_manifest", lambda adapter: {"task": adapter.task})
    with pytest.raises(InternalError, match="base_fingerprint"):
        merge(replace(plain, parts=(Part("a", str(pinned), 1.0),)), bert.loaded, folder / "out")
