"""Where PEFT merges wrongly, we are right; should PEFT be mended, a test says so."""

from __future__ import annotations

import builtins
import shutil

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    VeraConfig,
    get_peft_model,
)

from adapter_router.errors import AdapterRejected
from adapter_router.merging.combination import COMBINATIONS
from adapter_router.merging.merge import merge
from tests.merging.bases import MergeBase, several
from tests.merging.faults import FAULTS, Fault, expected_of, ours_of, parts_of, peft_of
from tests.merging.oracle import alone, distance, exact_sum, ours, relative, request, theirs, weighted

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_we_are_right_where_peft_is_wrong(bases: dict[str, MergeBase], fault: Fault) -> None:
    base = bases[fault.base]
    paths = parts_of(fault, base)
    expected = expected_of(fault, base, paths)
    assert relative(ours_of(fault, base, paths), expected) < 1e-5
    if fault.raises:
        with pytest.raises(getattr(builtins, fault.raises)):
            peft_of(fault, base, paths)
    else:
        assert relative(peft_of(fault, base, paths), expected) > 0.01


@pytest.mark.parametrize("name", COMBINATIONS)
def test_rslora_on_the_first_adapter_is_pefts_over_the_root_of_the_rank(bert: MergeBase, name: str) -> None:
    """Of every type: the result inherits ``use_rslora``, which multiplies it by sqrt(rank)."""
    paths = [bert.adapter(1, use_rslora=True), bert.adapter(2)]
    combination = COMBINATIONS[name]  # type: ignore[index]
    options = {"density": 0.5} if combination.drops else {}
    wrong = theirs(several(bert, paths), (0.7, -0.3), name, **options)
    found, report = ours(bert, paths, (0.7, -0.3), name, **options)
    rank = {"cat": 8}.get(name, report.layers[0].rank)
    assert distance(found, {path: change / rank**0.5 for path, change in wrong.items()}) < 1e-5


def test_one_adapter_is_merged_by_the_type_asked_for(bert: MergeBase) -> None:
    """PEFT takes "linear" for any type, so its rank of 2 is a rank of 4."""
    path = bert.adapter(1)
    uncut = theirs(several(bert, [path]), [0.7], "svd", svd_rank=2)
    assert distance(uncut, exact_sum(several(bert, [path]), [0.7])) < 1e-6
    _, report = ours(bert, [path], [0.7], "svd", rank=2)
    assert report.error > 0.1 and {layer.rank for layer in report.layers} == {2}


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["query", "value"], feedforward_modules=[]),
        LoHaConfig(r=3, target_modules=["query", "value"]),
        LoKrConfig(r=3, target_modules=["query", "value"]),
        OFTConfig(oft_block_size=4, target_modules=["query", "value"]),
        VeraConfig(r=4, target_modules=["query", "value"]),
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["query", "value"]),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_other_methods_are_merged_with_lora(bert: MergeBase, config: PeftConfig) -> None:
    """PEFT merges only LoRA; here whatever changes a weight. IA3 scales biases, too."""
    torch.manual_seed(1)
    model = get_peft_model(bert.fresh(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    other = bert.new()
    model.save_pretrained(other)
    paths, out = [bert.adapter(2), other], bert.new()
    merge(request(paths, (0.7, -0.3), "svd", rank=24), bert.loaded, out)
    assert relative(alone(bert, out), weighted(bert, paths, (0.7, -0.3))) < 1e-5


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"use_dora": True}])
def test_what_trained_on_a_changed_base_is_merged_by_every_type(bert: MergeBase, fields: dict[str, object]) -> None:
    """But by those that take A and B apart; DoRA, which changes whole weights, by those that end in svd."""
    paths = [bert.adapter(1, **fields), bert.adapter(2, **fields)]
    for name, combination in COMBINATIONS.items():
        if combination.on == "factors" or ("use_dora" in fields and combination.on != "delta"):
            continue
        options = {"density": 1.0} if combination.drops else {}
        rank = {"rank": 24} if combination.cuts_rank else {}
        found, _ = ours(bert, paths, (0.7, -0.3), name, **options, **rank)
        if not combination.elects:
            parts = weighted(bert, paths, (0.7, -0.3))
            expected = {path: parts[f"{path}.weight"] for path in found}
            assert distance(found, expected) < 2e-5, name


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_only_factors_that_are_known_are_merged_apart(bert: MergeBase, init: str) -> None:
    """Derived from the base, they have arbitrary signs; PEFT's conversion and ``initial/`` say which they had."""
    paths = [bert.adapter(1, init_lora_weights=init), bert.adapter(2, r=8)]
    for name, combination in COMBINATIONS.items():
        if combination.on == "factors":
            options = {"density": 0.5} if combination.drops else {}
            with pytest.raises(AdapterRejected, match=f"0: {name} merges A and B apart.*merge by cat, svd"):
                ours(bert, paths, (0.7, -0.3), name, **options)
    torch.manual_seed(1)
    fields = {"r": 4, "target_modules": ["query", "value"], "init_lora_weights": init}
    model, initial = get_peft_model(bert.fresh(), LoraConfig(**fields)), bert.new()
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it
    model.save_pretrained(initial)
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    told = bert.new()
    model.save_pretrained(told)
    (told / "initial").mkdir()
    shutil.copy(initial / "adapter_model.safetensors", told / "initial")
    _, report = ours(bert, [told, paths[1]], (0.7, -0.3), "linear")
    assert {layer.rank for layer in report.layers} == {8}
