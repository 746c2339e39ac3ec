"""What does a mixed batch cost? Ours against the bare base and against PEFT, in one interleaved run.

    python -m benchmarks.grouped_forward [--json PATH] [--rounds 9] [--only minilm/qv/r8/32]

Batch of 32 rows x 32 tokens, one thread. Ours is the engine's public ``infer`` (checks, collation and heads included)
on token ids; the base is transformers' bare model on a ready batch; PEFT is one forward with ``adapter_names``
(mixed) or one forward per adapter on its own rows (loop). Random weights: the arithmetic does not depend on them.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.types import Row, RowResult
from benchmarks.harness import Result, interleaved, ratio, write_json

ROWS, TOKENS = 32, 32
SIZES: dict[str, dict[str, int]] = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
TARGETS: dict[str, list[str] | str] = {"qv": ["query", "value"], "all-linear": "all-linear"}
RANKS: dict[str, tuple[int, ...]] = {"r8": (8,), "r16": (16,), "r8-16-32-64": (8, 16, 32, 64)}
MEASURED = ("r8", "r8-16-32-64")
ADAPTERS = (1, 4, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="run only cases whose name starts with this")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results: list[Result] = []
    for case in [Case(*parts) for parts in itertools.product(SIZES, TARGETS, MEASURED, ADAPTERS)]:
        if case.name.startswith(args.only):
            results += measure(case, args.rounds, args.device)
    if args.json:
        write_json(args.json, "grouped_forward", results)


@dataclass(frozen=True)
class Case:
    """Keys of the tables above, and the number of distinct adapters in the batch."""

    size: str
    target: str
    ranks: str
    num_adapters: int

    @property
    def name(self) -> str:
        return f"{self.size}/{self.target}/{self.ranks}/{self.num_adapters}"


def measure(case: Case, rounds: int, device: str) -> list[Result]:
    """Ratios of one case."""
    with tempfile.TemporaryDirectory() as folder:
        base, adapters = build(Path(folder), case)
        contenders = _contenders(base, adapters, device)
        seconds = interleaved(contenders, rounds)
    results = [
        ratio(f"{case.name}/ours_over_base", seconds["base"], seconds["ours"]),
        ratio(f"{case.name}/peft_mixed_over_base", seconds["base"], seconds["peft_mixed"]),
        ratio(f"{case.name}/ours_over_peft_mixed", seconds["peft_mixed"], seconds["ours"]),
        ratio(f"{case.name}/ours_over_peft_loop", seconds["peft_loop"], seconds["ours"]),
    ]
    figures = "  ".join(f"{r.name.rsplit('/', 1)[1]} {r.value:.3f}±{r.spread:.3f}" for r in results)
    print(f"{case.name:34} base {np.median(seconds['base']) * 1e3:7.1f} ms  {figures}", flush=True)
    return results


def build(folder: Path, case: Case) -> tuple[Path, list[Path]]:
    """A random base with a two-label head and random adapters with heads of their own, on disk."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES[case.size], num_labels=2)
    base = folder / "base"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(base)
    ranks, adapters = RANKS[case.ranks], []
    for index in range(case.num_adapters):
        model = AutoModelForSequenceClassification.from_pretrained(base)
        lora = LoraConfig(
            task_type="SEQ_CLS",
            r=ranks[index % len(ranks)],
            target_modules=TARGETS[case.target],
            init_lora_weights=False,
        )
        adapters.append(folder / str(index))
        get_peft_model(model, lora).save_pretrained(adapters[-1])
    return base, adapters


def _contenders(base: Path, adapters: list[Path], device: str) -> dict[str, Callable[[], object]]:
    names = [adapter.name for adapter in adapters]
    row_names = [names[row % len(names)] for row in range(ROWS)]
    ids = np.random.default_rng(0).integers(1000, 30000, (ROWS, TOKENS))
    batch = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.ones(ROWS, TOKENS, device=device)}
    bare = AutoModelForSequenceClassification.from_pretrained(base).eval().to(device)
    engine = Engine(EngineConfig(base=str(base), device=device, dtype="float32"))
    for adapter in adapters:
        engine.load_adapter(adapter.name, adapter)
    rows = [Row({"input_ids": ids[row]}, row_names[row]) for row in range(ROWS)]
    peft = _peft(base, adapters).to(device)
    by_adapter = {name: [r for r in range(ROWS) if row_names[r] == name] for name in names}

    def run_base() -> Any:
        with torch.inference_mode():
            return bare(**batch).logits.cpu()

    def run_mixed() -> Any:
        with torch.inference_mode():
            return peft(**batch, adapter_names=row_names).logits.cpu()

    def run_loop() -> list[Any]:
        outputs = []
        with torch.inference_mode():
            for name, own in by_adapter.items():
                peft.set_adapter(name)
                outputs.append(peft(**{key: value[own] for key, value in batch.items()}).logits.cpu())
        return outputs

    ours = np.stack([r.logits for r in engine.infer(rows) if isinstance(r, RowResult)])
    np.testing.assert_allclose(ours, run_mixed().numpy(), atol=1e-4)  # the contenders compute the same thing
    return {"base": run_base, "ours": lambda: engine.infer(rows), "peft_mixed": run_mixed, "peft_loop": run_loop}


def _peft(base: Path, adapters: list[Path]) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(base)
    peft = PeftModel.from_pretrained(model, adapters[0], adapter_name=adapters[0].name)
    for adapter in adapters[1:]:
        peft.load_adapter(adapter, adapter_name=adapter.name)
    return peft.eval()


if __name__ == "__main__":
    main()
