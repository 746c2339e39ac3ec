"""Quantised bases: what a width stores, that everything served on one is exact, and what is refused at the start."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from scipy.stats import norm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    ViTConfig,
)
from transformers.pytorch_utils import Conv1D

from adapter_router.config import EngineConfig, QuantizationConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRejected
from adapter_router.quantization import normal_float, schemes, scratch
from adapter_router.quantization.schemes import pack, unpack
from adapter_router.quantization.weights import INNER, ServedTensors, attach, quantizable, quantized_modules
from adapter_router.types import Row, RowResult
from deployments.app import AppArgs
from deployments.demo.tenants import ADAPTERS, BASE
from examples.tenant_data import TENANTS
from tests.tiny import TinyBase, peft_logits, random_features, weights_digest

WIDTHS = (2, 3, 4, 8)
THREE_WIDTHS = QuantizationConfig(4, {r"layer\.0\.attention\..*": 8, r"layer\.1\..*": 2})


# -- what a width stores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3])
def test_levels_are_those_of_the_published_rule(bits: int) -> None:
    count = 2**bits
    above = norm.ppf(np.linspace(0.9677083, 0.5, count // 2 + 1)[:-1])
    below = -norm.ppf(np.linspace(0.9677083, 0.5, count // 2)[:-1])
    levels = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(normal_float.LEVELS[bits], levels / levels.max(), atol=2e-7)


@pytest.mark.parametrize("bits", [2, 3])
def test_every_weight_becomes_the_nearest_level_of_its_block(bits: int) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(bits))
    largest = weight.double().abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(normal_float.LEVELS[bits]).double()
    nearest = levels[(weight.double()[..., None] / largest[..., None] - levels).abs().argmin(dim=-1)]
    assert torch.allclose(unpack(pack(weight, bits), torch.float64), nearest * largest, atol=1e-6)


def test_nf4_and_int8_are_bitsandbytes_own() -> None:
    weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    assert torch.equal(unpack(pack(weight, 4), torch.float32), bnb.dequantize_4bit(codes, state))
    rows, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    assert torch.equal(unpack(pack(weight, 8), torch.float32), bnb.int8_vectorwise_dequant(rows, scales))


def test_nf4_blocks_run_across_rows() -> None:
    """Where bitsandbytes' own kernel for the CPU (0.50) gives rows that are no whole blocks the wrong scales."""
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    levels = state.code[torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], dim=1).view(-1).long()]
    expected = (levels.view(-1, 64) * state.absmax[:, None]).view(weight.shape)
    assert torch.equal(unpack(pack(weight, 4), torch.float32), expected)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (5, 64), (33, 50)])
def test_any_shape_comes_back_and_takes_its_bits(bits: int, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed = pack(weight, bits)
    assert (tuple(packed.codes.shape), tuple(packed.scales.shape)) == schemes.stored_shapes(bits, shape)
    blocks = shape[0] if bits == 8 else math.ceil(weight.numel() / 64)
    assert packed.num_bytes == (weight.numel() if bits == 8 else blocks * 8 * bits) + 4 * blocks
    again = unpack(packed, torch.float32)
    assert again.shape == shape
    scale = weight.abs().amax(dim=1, keepdim=True) if bits == 8 else weight.abs().max()
    assert bool(((again - weight).abs() <= scale * {2: 0.51, 3: 0.27, 4: 0.16, 8: 0.006}[bits]).all())
    assert torch.equal(unpack(pack(again, bits), torch.float32), again) or bits == 8


@pytest.mark.parametrize("bits", WIDTHS)
def test_half_precision_is_rounded_once_and_zeros_stay_zero(bits: int) -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    weight[3] = 0
    packed = pack(weight, bits)
    full = unpack(packed, torch.float32)
    assert bool((full[3] == 0).all())
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(unpack(packed, dtype), full.to(dtype))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(bits: int, value: float) -> None:
    weight = torch.ones(4, 64)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        pack(weight, bits)


def test_a_weight_too_large_for_int8s_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite in float16"):
        pack(torch.full((2, 2), 1e6), 8)


def large_layers(bits: int, count: int = 3) -> list[tuple[torch.nn.Linear, torch.Tensor]]:
    """Quantised layers too large to be dequantised in one piece, and what their weights are."""
    layers = []
    for seed in range(count):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(1025, 1030 + seed).requires_grad_(False)
        packed = pack(layer.weight, bits)
        attach(layer, packed)
        dequantize = schemes._SCHEMES[bits].dequantize
        whole = dequantize(packed.codes, packed.scales).reshape(-1)[: 1025 * (1030 + seed)].view(-1, 1025)
        layers.append((layer, whole))
    return layers


@pytest.mark.parametrize("bits", WIDTHS)
def test_products_of_large_layers_share_one_buffer_and_weights_read_side_by_side_do_not(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, used = large_layers(bits), []
    linear = torch.nn.functional.linear

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        used.append(weight.data_ptr())
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    x = torch.randn(2, 1025)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            for layer, weight in layers:
                assert torch.equal(layer(x), linear(x, weight, layer.bias))
    assert len(used) == 6 and len(set(used[1:])) <= 2, "a larger layer may need a larger buffer, once"
    together = [layer.weight for layer, _ in layers]
    assert all(torch.equal(read, weight) for read, (_, weight) in zip(together, layers, strict=True))


def test_large_transposed_layers_multiply_by_their_weight() -> None:
    x = torch.randn(2, 1025)
    for bits in WIDTHS:
        torch.manual_seed(bits)
        layer = Conv1D(1100, 1025).requires_grad_(False)
        attach(layer, pack(layer.weight.t(), bits))
        weight = layer.weight
        assert weight.shape == (1025, 1100) and weight.is_contiguous()
        assert torch.equal(layer(x), torch.addmm(layer.bias, x, weight))


def test_a_weight_may_be_read_while_another_thread_multiplies() -> None:
    layers = large_layers(4)
    stop = threading.Event()

    def multiply() -> None:
        while not stop.is_set():
            for layer, _ in layers:
                layer(torch.ones(1, 1025))

    thread = threading.Thread(target=multiply)
    thread.start()
    try:
        assert all(torch.equal(layer.weight, weight) for _ in range(20) for layer, weight in layers)
    finally:
        stop.set()
        thread.join()


# -- served on quantised bases -------------------------------------------------------------------------------------


def served_base(model: Any, engine: Engine) -> Any:
    """``model`` with the weights that ``engine`` serves."""
    served = ServedTensors(engine.base.model, engine.base.model.state_dict())
    model.load_state_dict({f"{path}.weight": served[f"{path}.weight"] for path in served.quantized}, strict=False)
    return model


def check_alone_mixed_reloaded(engine: Engine, rows: list[Row], expected: list[np.ndarray] | None = None) -> None:
    """Mixed as alone, as PEFT where known, after eviction; not a bit of the base changes."""
    before = weights_digest(engine.base.model)
    mixed = engine.infer(rows)
    alone = [engine.infer([row])[0] for row in rows]
    for digest in engine.resident():
        engine.evict(digest)
    again = engine.infer(rows)
    for place, results in enumerate(zip(mixed, alone, again, strict=True)):
        for result in results:
            assert isinstance(result, RowResult), result
            wanted = results[0].logits if expected is None else expected[place]  # type: ignore[union-attr]
            np.testing.assert_allclose(result.logits, wanted, atol=1e-4)
    assert weights_digest(engine.base.model) == before


@pytest.mark.parametrize(
    "quantization", [*(QuantizationConfig(bits) for bits in WIDTHS), THREE_WIDTHS], ids=[*map(str, WIDTHS), "three"]
)
def test_adapters_on_a_quantised_bert_are_peft_on_the_dequantised(
    quantization: QuantizationConfig, tiny_bert: TinyBase, tmp_path: Path
) -> None:
    kinds: Mapping[str, Any] = {
        "plain": {},
        "dora": {"use_dora": True, "target_modules": "all-linear"},
        "pooler": {"modules_to_save": ["pooler"]},
    }
    folders = {name: tiny_bert.adapter(tmp_path / name, 3, seed, **k) for seed, (name, k) in enumerate(kinds.items())}
    rng = np.random.default_rng(0)
    rows = [Row(random_features(rng), name) for _ in range(3) for name in kinds]
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu", quantization=quantization)) as engine:
        expected = {}
        for name, folder in folders.items():
            engine.load_adapter(name, folder)
            expected[name] = PeftModel.from_pretrained(served_base(tiny_bert.fresh(3), engine), folder).eval()
        check_alone_mixed_reloaded(engine, rows, [peft_logits(expected[str(row.adapter)], row.inputs) for row in rows])
        assert set(engine.base.quantized.values()) == {quantization.bits, *quantization.bits_pattern.values()}


def test_three_widths_are_where_the_patterns_say_and_the_first_that_matches_decides(tiny_bert: TinyBase) -> None:
    patterns = {
        "query": 8,
        r"bert\.encoder\.layer\.0\..*": 2,
        r"layer\.1\.attention\.self\.(query|key)": 3,
        "dense": 16,
    }
    config = EngineConfig(base=str(tiny_bert.directory), device="cpu", quantization=QuantizationConfig(4, patterns))
    with Engine(config) as engine:
        bits = engine.base.quantized
        inside = "bert.encoder.layer"
        assert bits[f"{inside}.0.attention.self.query"] == bits[f"{inside}.1.attention.self.query"] == 8
        assert bits[f"{inside}.0.attention.self.key"] == bits[f"{inside}.0.output.dense"] == 2
        assert bits[f"{inside}.1.attention.self.key"] == 3
        assert bits[f"{inside}.1.attention.self.value"] == 4
        assert not any(path.startswith((f"{inside}.1.output", "bert.pooler", "classifier")) for path in bits)
        assert engine.base.num_bytes < engine.base.full_bytes


def tiny(kind: str, directory: Path) -> Path:
    """A random base on disk whose layers are not those of BERT."""
    torch.manual_seed(0)
    llama: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    builders: Mapping[str, Callable[[], Any]] = {
        "gpt2": lambda: AutoModelForCausalLM.from_config(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=40)
        ),
        "llama": lambda: AutoModelForCausalLM.from_config(
            LlamaConfig(num_attention_heads=4, num_key_value_heads=2, eos_token_id=3, **llama)
        ),
        "vit": lambda: AutoModelForImageClassification.from_config(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=8,
                patch_size=4,
                num_labels=3,
            )
        ),
    }
    model = builders[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(directory)
    return directory


def random_adapter(model: Any, directory: Path, seed: int, **fields: Any) -> Path:
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(r=4, **fields))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    peft.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("kind", "targets"), [("gpt2", ["c_attn", "c_fc"]), ("llama", ["q_proj", "down_proj"])])
def test_decoders_score_and_generate_as_peft_on_the_dequantised(kind: str, targets: list[str], tmp_path: Path) -> None:
    base = tiny(kind, tmp_path / "base")
    folders = {
        name: random_adapter(
            AutoModelForCausalLM.from_pretrained(base),
            tmp_path / name,
            seed,
            task_type="CAUSAL_LM",
            target_modules=targets,
            use_dora=name == "b",
        )
        for seed, name in enumerate("ab")
    }
    quantization = QuantizationConfig(4, {r"0\..*": 3})
    rng = np.random.default_rng(0)
    prompts = [random_features(rng, 12) for _ in range(4)]
    with Engine(EngineConfig(base=str(base), device="cpu", quantization=quantization)) as engine:
        assert not any("lm_head" in path for path in engine.base.quantized)
        rows, expected, texts = [], [], []
        for name, folder in folders.items():
            engine.load_adapter(name, folder)
            peft = PeftModel.from_pretrained(
                served_base(AutoModelForCausalLM.from_pretrained(base), engine), folder
            ).eval()
            for prompt in prompts:
                rows.append(Row(prompt, name))
                expected.append(peft_logits(peft, prompt))
                batch = {key: torch.from_numpy(array)[None] for key, array in prompt.items()}
                with torch.inference_mode():
                    ids = peft.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
                texts.append(ids[len(prompt["input_ids"]) :].tolist())
        check_alone_mixed_reloaded(engine, rows, expected)
        longer = [Row(row.inputs, row.adapter, parameters={"max_new_tokens": 6}) for row in rows]
        for event in engine.generate(longer):
            assert event.error is None and list(event.token_ids) == texts[event.index]


def test_images_are_answered_as_by_peft_on_the_dequantised(tmp_path: Path) -> None:
    base = tiny("vit", tmp_path / "base")
    fresh = AutoModelForImageClassification.from_pretrained
    folder = random_adapter(fresh(base), tmp_path / "a", 0, target_modules="all-linear", modules_to_save=["classifier"])
    pixels = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    with Engine(EngineConfig(base=str(base), device="cpu", quantization=QuantizationConfig(3))) as engine:
        engine.load_adapter("a", folder)
        models: dict[str | None, Any] = {None: served_base(fresh(base), engine).eval()}
        models["a"] = PeftModel.from_pretrained(served_base(fresh(base), engine), folder).eval()
        rows = [Row({"pixel_values": image}, name) for image in pixels for name in models]
        check_alone_mixed_reloaded(engine, rows, [peft_logits(models[row.adapter], row.inputs) for row in rows])


@pytest.fixture(scope="module")
def wide_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of whole blocks: bitsandbytes' own 4-bit kernel for the CPU (0.50) is wrong for others."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=100,
        max_position_embeddings=40,
    )
    directory = tmp_path_factory.mktemp("wide-bert")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    return directory


def test_four_bits_are_peft_on_transformers_own_four_bit_model(wide_bert: Path, tmp_path: Path) -> None:
    fresh = AutoModelForSequenceClassification.from_pretrained
    folder = random_adapter(fresh(wide_bert), tmp_path / "a", 0, task_type="SEQ_CLS", target_modules=["query", "value"])
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier"],
    )
    model = fresh(wide_bert, quantization_config=theirs, dtype=torch.float32, device_map={"": "cpu"})
    peft = PeftModel.from_pretrained(model, folder).eval()
    ids = np.random.default_rng(0).integers(5, 100, (6, 12))
    for module in peft.modules():  # where the CPU can, bitsandbytes multiplies in bfloat16: 3e-3 off
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    with torch.inference_mode():
        expected = peft(input_ids=torch.from_numpy(ids)).logits.float().numpy()
    with Engine(EngineConfig(base=str(wide_bert), device="cpu", quantization=QuantizationConfig(4))) as engine:
        engine.load_adapter("a", folder)
        results = engine.infer([Row({"input_ids": row}, "a") for row in ids])
    logits = np.stack([result.logits for result in results if isinstance(result, RowResult)])
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_bases_are_quantised_too(dtype: str, tiny_bert: TinyBase, tmp_path: Path) -> None:
    config = EngineConfig(base=str(tiny_bert.directory), device="cpu", dtype=dtype, quantization=THREE_WIDTHS)
    folder = tiny_bert.adapter(tmp_path / "a", 3, 0, modules_to_save=["pooler"])
    rng = np.random.default_rng(0)
    rows = [Row(random_features(rng), "a") for _ in range(4)]
    with Engine(config) as engine:
        engine.load_adapter("a", folder)
        model = tiny_bert.fresh(3).to(getattr(torch, dtype))
        peft = PeftModel.from_pretrained(served_base(model, engine), folder).eval()
        for row, result in zip(rows, engine.infer(rows), strict=True):
            assert isinstance(result, RowResult), result
            np.testing.assert_allclose(result.logits, peft_logits(peft, row.inputs), atol=0.15)


def test_weights_that_are_shared_or_read_by_kernels_are_left_alone(tiny_bert: TinyBase) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny_bert.directory)
    first, second = model.bert.encoder.layer
    second.attention.self.query.weight = first.attention.self.query.weight
    first.attention.joint = torch.nn.MultiheadAttention(32, 4)
    paths = set(quantizable(model, "bert", frozenset({"bert.encoder.layer.1.output.dense.weight"}), has_head=True))
    inside = [path for path, module in model.bert.named_modules() if isinstance(module, torch.nn.Linear)]
    left = {f"encoder.layer.{index}.attention.self.query" for index in (0, 1)}
    assert set(inside) - paths == left | {"encoder.layer.0.attention.joint.out_proj", "encoder.layer.1.output.dense"}
    assert paths <= set(inside)


def test_the_full_weights_are_gone(tiny_bert: TinyBase) -> None:
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu", quantization=THREE_WIDTHS)) as engine:
        model = engine.base.model
        quantized = quantized_modules(model)
        assert len(quantized) == len(engine.base.quantized) == 13
        assert not any("weight" in module._parameters for module in quantized.values())
        assert sum(p.nbytes for p in model.parameters()) == engine.base.num_bytes
        saved = sum(module.weight.nbytes for module in quantized.values()) - sum(  # type: ignore[union-attr,misc]
            p.nbytes for module in quantized.values() for n, p in module.named_parameters() if n != "bias"
        )
        assert engine.base.full_bytes - engine.base.num_bytes == saved > 0
        # Watching a weight's own parts would keep copies of all weights at the start.
        assert not any(INNER in path for path in engine.base.spec.called)


def test_a_base_has_another_fingerprint_at_every_width(tiny_bert: TinyBase) -> None:
    fingerprints = []
    for quantization in (None, QuantizationConfig(16), QuantizationConfig(4), QuantizationConfig(4), THREE_WIDTHS):
        config = EngineConfig(base=str(tiny_bert.directory), device="cpu", quantization=quantization)
        with Engine(config) as engine:
            fingerprints.append(engine.base.fingerprint)
    assert fingerprints[0] == fingerprints[1] and fingerprints[2] == fingerprints[3]
    assert len(set(fingerprints)) == 3


def test_tasks_share_one_quantised_backbone(tiny_bert: TinyBase) -> None:
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu", quantization=THREE_WIDTHS)) as engine:
        first = engine.base.task("text-classification").model
        for task in ("token-classification", "embedding"):
            other = engine.base.task(task).model  # type: ignore[arg-type]
            assert other.backbone is first.backbone
        features = random_features(np.random.default_rng(0))
        rows = [Row(features, task="embedding"), Row(features, task="embedding")]
        one, two = engine.infer(rows)
        assert isinstance(one, RowResult) and isinstance(two, RowResult)
        assert np.array_equal(one.logits, two.logits)


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_was_taken_from_the_pristine_base_is_refused(init: str, tiny_bert: TinyBase, tmp_path: Path) -> None:
    folder = tiny_bert.adapter(tmp_path / "a", 3, 0, init_lora_weights=init)
    quantization = QuantizationConfig(4, {r"layer\.1\..*": 16})
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu", quantization=quantization)) as engine:
        with pytest.raises(AdapterRejected, match=r"initial/") as refusal:
            engine.load_adapter("a", folder)
        assert len(refusal.value.problems) == 2  # query and value of the quantised layer, not of the other
        assert all("layer.0" in problem and "quantised" in problem for problem in refusal.value.problems)


def test_a_parameter_of_a_quantised_module_is_refused(tiny_bert: TinyBase, tmp_path: Path) -> None:
    name = "encoder.layer.0.attention.self.query.weight"
    folder = tiny_bert.adapter(tmp_path / "a", 3, 0, target_modules=[], target_parameters=[name], bias="none")
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu")) as engine:
        engine.load_adapter("a", folder)
    with (
        Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu", quantization=THREE_WIDTHS)) as engine,
        pytest.raises(AdapterRejected, match="quantised on this base: train it with target_modules"),
    ):
        engine.load_adapter("a", folder)


def test_a_configuration_is_refused_with_every_problem() -> None:
    with pytest.raises(ValueError, match="bits is 5") as refusal:
        QuantizationConfig(5, {"(": 4, "query": 7, "key": True})
    assert all(part in str(refusal.value) for part in ("'('", "not a regular expression", "'query'", "is 7", "is True"))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (QuantizationConfig(4, {"no_such": 8, "nor.this": 2}), "'no_such' matches none of 13.*'nor.this' matches none"),
        (QuantizationConfig(4, {r"((\w|.)+x?)+[A-F]": 8}), "takes too long"),
    ],
)
def test_patterns_that_do_nothing_are_refused_at_the_start(
    quantization: QuantizationConfig, message: str, tiny_bert: TinyBase
) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu", quantization=quantization))


def test_a_pattern_may_name_a_part_that_only_some_heads_have(tmp_path: Path) -> None:
    base = TinyBase("roberta", tmp_path)  # its classifier has no use for the pooler
    quantization = QuantizationConfig(4, {"pooler.dense": 8})
    with Engine(EngineConfig(base=str(base.directory), device="cpu", quantization=quantization)) as engine:
        assert engine.base.tasks[0] == "text-classification"
        assert all("pooler" not in path for path in engine.base.quantized)


def test_tasks_whose_backbone_the_checkpoint_spells_otherwise_share_the_quantised_one(tmp_path: Path) -> None:
    base = tiny("llama", tmp_path / "base")
    with Engine(EngineConfig(base=str(base), device="cpu", quantization=QuantizationConfig(3))) as engine:
        first = engine.base.task("text-generation").model
        for task in engine.base.tasks:
            assert engine.base.task(task).model.backbone is first.backbone


def test_a_base_that_is_quantised_already_is_refused(wide_bert: Path, tmp_path: Path) -> None:
    four = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        wide_bert, quantization_config=four, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="quantised already, in a format of its own"):
        Engine(EngineConfig(base=str(tmp_path / "base"), device="cpu", quantization=QuantizationConfig()))


def test_a_missing_library_is_named_with_its_extra(tiny_bert: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "LIBRARY", "no_such_library")
    base = str(tiny_bert.directory)
    with pytest.raises(ValueError, match=r"adapter-router\[quantization\]"):
        Engine(EngineConfig(base=base, device="cpu", quantization=QuantizationConfig(3, {"query": 8})))
    with Engine(EngineConfig(base=base, device="cpu", quantization=QuantizationConfig(3))) as engine:
        assert set(engine.base.quantized.values()) == {3}  # packed here, without it


def test_a_serve_config_may_quantise() -> None:
    document = {"base": "x", "quantization": {"bits": 3, "bits_pattern": {"query": 8}}}
    args = AppArgs.model_validate(json.loads(json.dumps(document)))
    assert args.quantization is not None and args.quantization.bits_pattern == {"query": 8}
    with pytest.raises(ValueError, match="bit"):
        AppArgs.model_validate({"base": "x", "quantization": {"bit": 3}})


# -- the real base -------------------------------------------------------------------------------------------------


def test_the_real_tenants_on_a_base_of_three_widths() -> None:
    rng = np.random.default_rng(0)
    rows = [Row(text, name) for name in ADAPTERS for text, _ in TENANTS[name]()[1][:8]]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    quantization = QuantizationConfig(4, {r"attention\..*": 8, r"layer\.5\..*": 3})
    with Engine(EngineConfig(base=BASE, device="cpu", quantization=quantization)) as engine:
        for name, folder in ADAPTERS.items():
            engine.load_adapter(name, folder)
        check_alone_mixed_reloaded(engine, rows)
        assert set(engine.base.quantized.values()) == {3, 4, 8}
        assert engine.base.num_bytes < 0.65 * engine.base.full_bytes


def test_the_order_of_patterns_is_part_of_a_configuration() -> None:
    patterns = {"query": 8, r"layer\.0\..*": 2}
    config = QuantizationConfig(4, patterns)
    turned = QuantizationConfig(4, dict(reversed(patterns.items())))
    assert config != turned and config == QuantizationConfig(4, dict(patterns))
    assert len({EngineConfig(base="b", quantization=q) for q in (config, turned)}) == 2
    patterns["("] = 5  # the caller's, not the configuration's
    assert "(" not in config.bits_pattern
    for wrong in ({"bits": 4.0}, {"bits_pattern": None}, {"bits_pattern": {1: 4}}, {"bits_pattern": {"a": True}}):
        with pytest.raises(ValueError, match="QuantizationConfig: "):
            QuantizationConfig(**wrong)  # type: ignore[arg-type]


def test_room_for_dequantised_weights_is_handed_on(tiny_bert: TinyBase) -> None:
    """Threads that take turns need one buffer, however many they are."""
    scratch._idle.clear()
    config = EngineConfig(base=str(tiny_bert.directory), device="cpu", quantization=QuantizationConfig(8))
    with Engine(config) as engine:
        rows = [Row(random_features(np.random.default_rng(0)), None, "embedding")]
        for _ in range(6):
            thread = threading.Thread(target=engine.infer, args=(rows,))
            thread.start()
            thread.join()
    assert len(scratch._idle) == 1


def test_what_kasa_truncated_has_no_remedy_but_full_precision(tiny_bert: TinyBase, tmp_path: Path) -> None:
    directory = tiny_bert.adapter(tmp_path / "kasa", 3, 0, kasa_config=KasaConfig())
    config = EngineConfig(base=str(tiny_bert.directory), device="cpu", quantization=QuantizationConfig(8))
    with Engine(config) as engine, pytest.raises(AdapterRejected) as refusal:
        engine.load_adapter("kasa", directory)
    assert "leave the module at 16 bits" in str(refusal.value) and "initial/" not in str(refusal.value)
