"""Where PEFT 0.21.2 merges wrongly, measured: ``python -m tests.merging.faults``.

Each case merges two adapters of weights 0.7 and -0.3, or the one there is, and compares what becomes of every
parameter of the base with ``W + sum_i w_i (W_i - W)``, ``W_i`` from PEFT with that adapter alone on a fresh base.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel

from adapter_router.merging.merge import merge
from tests.merging.bases import MergeBase, several
from tests.merging.oracle import Changes, alone, folded, relative, request, weighted

WEIGHTS = (0.7, -0.3)
_DORA = {"use_dora": True}
_FULL = {"svd_rank": 24}


@dataclass(frozen=True)
class Fault:
    """``parts``: fields of the adapters' configurations. ``kept``: the part whose head the result has.

    ``raises``: PEFT fails with this; else its result is off.
    """

    name: str
    parts: tuple[Mapping[str, Any], ...]
    base: str = "bert"
    type: str = "cat"
    options: Mapping[str, Any] = field(default_factory=dict)
    kept: int | None = None
    raises: str = ""

    @property
    def weights(self) -> tuple[float, ...]:
        return WEIGHTS[: len(self.parts)]


FAULTS = (
    Fault("rsLoRA on the first adapter: the result is scaled by sqrt(rank)", ({"use_rslora": True}, {})),
    Fault("one adapter has a head: the result has the base's", ({"modules_to_save": ["classifier"]}, {}), kept=0),
    Fault(
        "both adapters have heads", ({"task_type": "SEQ_CLS"}, {"task_type": "SEQ_CLS"}), kept=1, raises="ValueError"
    ),
    Fault(
        "a saved module inside the backbone is the base's", ({"modules_to_save": ["attention.output.LayerNorm"]}, {})
    ),
    Fault("lora_bias is dropped", ({"lora_bias": True}, {"lora_bias": True})),
    Fault("lora_bias of a convolution is dropped", ({"lora_bias": True, "target_modules": ["projection"]}, {}), "vit"),
    Fault("lora_bias beside an embedding", ({"lora_bias": True}, {"target_modules": ["query", "word_embeddings"]}),
          raises="ValueError"),
    Fault("bias='all'", ({"bias": "all"}, {"bias": "all"}), raises="ValueError"),
    Fault("bias='lora_only' of the second adapter", ({}, {"bias": "lora_only"})),
    Fault("DoRA: magnitudes start anew", (_DORA, _DORA), type="svd", options=_FULL),
    Fault("DoRA of the second adapter only", ({}, _DORA), type="svd", options=_FULL),
    Fault("DoRA of a convolution", ({**_DORA, "target_modules": ["projection", "q_proj"]}, {}), "vit", "svd",
          {"svd_rank": 16}),
    Fault("DoRA of an embedding", ({**_DORA, "target_modules": ["word_embeddings"]}, {}), type="svd", options=_FULL),
    Fault("DoRA of a transposed layer", (_DORA, {}), "gpt2", "svd", {"svd_rank": 16}),
    Fault("PiSSA on the first adapter: the base is changed again", ({"init_lora_weights": "pissa"}, {})),
    Fault("PiSSA on the second adapter", ({}, {"init_lora_weights": "pissa"})),
    Fault("PiSSA on both", ({"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"})),
    Fault("OLoRA on both", ({"init_lora_weights": "olora"}, {"init_lora_weights": "olora"})),
    Fault("KaSA beside plain LoRA", ({"kasa_config": {"beta": 1e-4, "gemma": 1e-3}}, {}), raises="ValueError"),
    Fault("block-diagonal LoRA",
          ({"use_bdlora": {"target_modules_bd_a": ["query"], "nblocks": 2, "match_strict": False}}, {}),
          raises="RuntimeError"),
    Fault("layers_to_transform of the first adapter cuts the others", ({"layers_to_transform": [0]}, {}), "llama"),
    Fault("layers_to_transform of the second adapter",
          ({}, {"layers_to_transform": [0], "target_modules": ["up_proj"]}), "llama", raises="ValueError"),
    Fault("exclude_modules of the first adapter cuts the others",
          ({"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, {}), "llama"),
    Fault("target_modules an expression here, a list there", ({"target_modules": ".*query"}, {}), raises="ValueError"),
    Fault("svd of a rank above a layer's size", ({}, {}), "gpt2", "svd", {"svd_rank": 64}, raises="RuntimeError"),
)  # fmt: skip


def parts_of(fault: Fault, base: MergeBase) -> list[Path]:
    return [base.adapter(seed, **fields) for seed, fields in enumerate(fault.parts, 1)]


def expected_of(fault: Fault, base: MergeBase, paths: list[Path]) -> Changes:
    total = weighted(base, paths, fault.weights)
    if fault.kept is not None:
        kept = alone(base, paths[fault.kept])
        total |= {name: change for name, change in kept.items() if name.startswith("classifier")}
    return total


def peft_of(fault: Fault, base: MergeBase, paths: list[Path]) -> Changes:
    model: PeftModel = several(base, paths)
    names = [str(index) for index in range(len(paths))]
    model.add_weighted_adapter(names, list(fault.weights), "merged", combination_type=fault.type, **fault.options)
    model.set_adapter("merged")
    return folded(base, model)


def ours_of(fault: Fault, base: MergeBase, paths: list[Path]) -> Changes:
    out = base.new()
    head = "refuse" if fault.kept is None else f"keep={fault.kept}"
    rank = {"rank": fault.options["svd_rank"]} if fault.options else {}
    merge(request(paths, fault.weights, fault.type, head=head, **rank), base.loaded, out)
    return alone(base, out)


def main() -> None:
    """Print the table of docs/merging.md."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        bases = {kind: MergeBase(kind, Path(scratch) / kind) for kind in {fault.base for fault in FAULTS}}
        for fault in FAULTS:
            base = bases[fault.base]
            paths = parts_of(fault, base)
            expected = expected_of(fault, base, paths)
            try:
                theirs = f"{relative(peft_of(fault, base, paths), expected):.2g}"
            except Exception as error:
                theirs = type(error).__name__
            own = relative(ours_of(fault, base, paths), expected)
            sys.stdout.write(f"| {fault.name} | {fault.type} | {theirs} | {own:.0e} |\n")


if __name__ == "__main__":
    main()
