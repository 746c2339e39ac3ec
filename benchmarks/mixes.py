"""What does a mix cost? Batches of mixes against batches of single adapters of the mixes' summed rank.

    python -m benchmarks.mixes [--json PATH] [--rounds 9]

MiniLM's size, 32 rows x 32 tokens, one thread, 8 different names in a batch. A mix is two adapters of rank 8; the peer
is one of rank 16, as a merge beforehand would make it. The bare base is in the run, too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.types import Array, Row, RowResult
from benchmarks.grouped_forward import ROWS, TARGETS, TOKENS, Case, build
from benchmarks.harness import Result, interleaved, ratio, write_json

_NAMES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = [result for target in TARGETS for result in measure(target, args.rounds)]
    if args.json:
        write_json(args.json, "mixes", results)


def measure(target: str, rounds: int) -> list[Result]:
    """Ratios on one choice of target modules."""
    with tempfile.TemporaryDirectory() as folder:
        base, narrow = build(Path(folder) / "narrow", Case("minilm", target, "r8", 2 * _NAMES))
        _, wide = build(Path(folder) / "wide", Case("minilm", target, "r16", _NAMES))
        bare = AutoModelForSequenceClassification.from_pretrained(base).eval()
        with Engine(EngineConfig(base=str(base), device="cpu", dtype="float32")) as engine:
            for prefix, adapters in (("narrow", narrow), ("wide", wide)):
                for adapter in adapters:
                    engine.load_adapter(f"{prefix}{adapter.name}", adapter)
            pairs = [{f"narrow{index}": 0.7, f"narrow{index + _NAMES}": -0.3} for index in range(_NAMES)]
            mixes = _rows(pairs, heads=[f"narrow{index}" for index in range(_NAMES)])
            singles = _rows([f"wide{index}" for index in range(_NAMES)], heads=[None] * _NAMES)
            batch = {"input_ids": torch.from_numpy(_ids()), "attention_mask": torch.ones(ROWS, TOKENS)}

            def run_base() -> Any:
                with torch.inference_mode():
                    return bare(**batch).logits

            assert all(isinstance(result, RowResult) for result in engine.infer([*mixes, *singles]))
            seconds = interleaved(
                {"base": run_base, "mixes": lambda: engine.infer(mixes), "singles": lambda: engine.infer(singles)},
                rounds,
            )
    results = [
        ratio(f"{target}/mixes_over_summed_rank", seconds["singles"], seconds["mixes"]),
        ratio(f"{target}/mixes_over_base", seconds["base"], seconds["mixes"]),
    ]
    figures = "  ".join(f"{r.name.rsplit('/', 1)[1]} {r.value:.3f}±{r.spread:.3f}" for r in results)
    print(f"{target:12} base {np.median(seconds['base']) * 1e3:7.1f} ms  {figures}", flush=True)
    return results


def _rows(adapters: Sequence[str | Mapping[str, float]], heads: Sequence[str | None]) -> list[Row]:
    return [
        Row({"input_ids": ids}, adapters[row % len(adapters)], head=heads[row % len(adapters)])
        for row, ids in enumerate(_ids())
    ]


def _ids() -> Array:
    """(ROWS, TOKENS)"""
    return np.random.default_rng(0).integers(1000, 30000, (ROWS, TOKENS))


if __name__ == "__main__":
    main()
