"""What cannot be served exactly is refused with its reasons, and leaves no trace."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from adapter_router.errors import AdapterRejected
from adapter_router.types import Row, RowResult
from tests.parity.bases import Base
from tests.parity.build import RECIPES, build
from tests.parity.configs import edit_config, generator
from tests.parity.oracle import random_inputs, run
from tests.parity.world import close, make_base, start, unchanged


def _saved(base: Base, directory: Path, config: PeftConfig, **fields: Any) -> None:
    get_peft_model(base.fresh(base.labels), config).save_pretrained(directory)
    if fields:
        edit_config(directory, **fields)


def _without_initial(recipe: str) -> Callable[[Base, Path], None]:
    def make(base: Base, directory: Path) -> None:
        assert build(base, RECIPES[recipe], directory) is not None
        shutil.rmtree(directory / "initial")

    return make


def _plain(**fields: Any) -> Callable[[Base, Path], None]:
    config = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return lambda base, directory: _saved(base, directory, LoraConfig(**config), **fields)


def _prompt(kind: Any) -> Callable[[Base, Path], None]:
    return lambda base, directory: _saved(base, directory, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))


REFUSALS: dict[str, tuple[Callable[[Base, Path], None], str]] = {
    "pissa_niter alone": (_without_initial("pissa-niter"), "init"),
    "CorDA alone": (_without_initial("corda"), "init"),
    "LoRA-GA alone": (_without_initial("lora-ga"), "init"),
    "LoftQ": (_plain(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}), "loftq"),
    "layer_replication": (_plain(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "QA-LoRA": (_plain(use_qalora=True), "use_qalora"),
    "Arrow": (_plain(arrow_config={"arrow_top_k": 1}), "arrow_config"),
    "prompt tuning": (_prompt(PromptTuningConfig), "PROMPT_TUNING"),
    "p-tuning": (_prompt(PromptEncoderConfig), "P_TUNING"),
    "prefix tuning": (_prompt(PrefixTuningConfig), "PREFIX_TUNING"),
    "a field of tomorrow": (_plain(use_tomorrow=True), "use_tomorrow"),
    "an infinite alpha": (_plain(lora_alpha=float("inf")), "lora_alpha"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_it_is_refused_by_name_and_nothing_changes(name: str, tmp_path: Path) -> None:
    make, word = REFUSALS[name]
    base = make_base("llama", "text-generation", 0, tmp_path)
    make(base, tmp_path / "adapter")
    features = random_inputs(base, generator(name))
    with start(base) as engine, unchanged(engine.base.model):
        with pytest.raises(AdapterRejected) as caught:
            engine.load_adapter("a", tmp_path / "adapter")
        (result,) = engine.infer([Row(features, None)])
    assert word in "\n".join(caught.value.problems)
    assert isinstance(result, RowResult)
    assert close(result.logits, run(base.pristine(base.labels), [features], base.task)[0])
