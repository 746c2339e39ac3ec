"""LoftQ: the published algorithm as PEFT runs it, a base and its initial adapter on disk, and adapters held to both."""

from __future__ import annotations

import inspect
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import loftq_utils
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
)

from adapter_router.config import EngineConfig, QuantizationConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRejected
from adapter_router.quantization.loftq import loftq
from adapter_router.quantization.packed_file import FILE
from adapter_router.quantization.schemes import pack, unpack
from adapter_router.quantize import InvalidOrder, Order, Report, quantize
from adapter_router.types import Row, RowResult
from deployments.cli import main
from deployments.demo.tenants import ADAPTERS, BASE
from examples.saving import fit, save_labels
from examples.tenant_data import TENANTS
from tests.tiny import TinyBase, edit_config, random_features

SHAPES = [(96, 64), (64, 192), (128, 128)]
THREE_WIDTHS = {r"layer\.0\.attention\..*": 8, r"layer\.1\..*": 2}
INITIAL = "initial_adapter"


# -- the algorithm -------------------------------------------------------------------------------------------------


def peft_loftq(weight: torch.Tensor, bits: int, rank: int, iterations: int) -> tuple[torch.Tensor, ...]:
    """PEFT's own function, which computes on CUDA only, on the CPU."""
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    source = source.replace("if is_bnb_available():", "if True:").replace("not is_bnb_4bit_available()", "False")
    names = dict(vars(loftq_utils))
    exec(source, names)
    result: tuple[torch.Tensor, ...] = names["loftq_init"](weight, bits, rank, iterations)
    return result


def published_loftq(weight: np.ndarray, bits: int, rank: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """arXiv:2310.08659, algorithm 1 with NormalFloat in blocks of 64; Q and B A. PEFT dropped it after 0.19."""
    count = 2**bits
    above = norm.ppf(np.linspace(0.9677083, 0.5, count // 2 + 1)[:-1])
    below = -norm.ppf(np.linspace(0.9677083, 0.5, count // 2)[:-1])
    levels = np.sort([*above, 0.0, *below])
    levels /= levels.max()
    product = np.zeros_like(weight)
    for _ in range(iterations):
        blocks = (weight - product).reshape(-1, 64)
        largest = np.abs(blocks).max(axis=1, keepdims=True)
        codes = np.abs((blocks / largest)[..., None] - levels).argmin(axis=-1)
        rounded = (levels[codes] * largest).reshape(weight.shape)
        left, sizes, right = np.linalg.svd(weight - rounded, full_matrices=False)
        product = left[:, :rank] * sizes[:rank] @ right[:rank]
    return rounded, product


def random_weight(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pefts_loftq_init(bits: int, iterations: int, shape: tuple[int, int]) -> None:
    weight = random_weight(shape, seed=bits)
    rounded, a, b = peft_loftq(weight, bits, 8, iterations)
    ours = loftq(weight, bits, 8, iterations)
    assert float((unpack(ours.packed, torch.float32) - rounded).abs().max()) <= 1e-6
    assert float((ours.a - a).abs().max()) <= 1e-6 and float((ours.b - b).abs().max()) <= 1e-6


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_published_algorithm(bits: int, iterations: int, shape: tuple[int, int]) -> None:
    weight = random_weight(shape, seed=bits)
    rounded, product = published_loftq(weight.double().numpy(), bits, 8, iterations)
    ours = loftq(weight, bits, 8, iterations)
    assert np.abs(unpack(ours.packed, torch.float32).numpy() - rounded).max() <= 1e-6
    # Where two singular values lie close together, what float32 makes of their vectors depends on the CPU.
    assert np.abs((ours.b @ ours.a).numpy() - product).max() <= 5e-6
    # What is left does not: no product of that rank comes closer.
    rest = weight.double() - unpack(ours.packed, torch.float64)
    best = torch.linalg.svdvals(rest)[8:].norm()
    assert (rest - ours.b.double() @ ours.a.double()).norm() <= best * (1 + 1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("iterations", [1, 5])
def test_is_nearer_to_the_weight_than_plain_rounding(bits: int, iterations: int) -> None:
    for seed in range(4):
        weight = random_weight((96, 128), seed)
        ours = loftq(weight, bits, 8, iterations)
        plain = (weight - unpack(pack(weight, bits), torch.float32)).norm()
        assert (weight - unpack(ours.packed, torch.float32) - ours.b @ ours.a).norm() < plain


# -- what is written -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A LoftQ base of three widths, and layers left as they are."""
    out = tmp_path_factory.mktemp("loftq") / "base"
    patterns = {**THREE_WIDTHS, "pooler.dense": 16}
    order = Order(str(tiny_bert.directory), out, 4, patterns, rank=4, task="text-classification")
    return out, quantize(order)


def as_embedding(base: Path) -> Path:
    """The initial adapter of a base without a head, as one that needs none."""
    directory = base.parent / "as-embedding"
    if not directory.exists():
        shutil.copytree(base / INITIAL, directory)
        edit_config(directory, task_type="FEATURE_EXTRACTION")
    return directory


def fingerprint(base: Path, **config: Any) -> str:
    with Engine(EngineConfig(base=str(base), device="cpu", **config)) as engine:
        return engine.base.fingerprint


def test_every_layer_is_nearer_than_plain_rounding(written: tuple[Path, Report], tiny_bert: TinyBase) -> None:
    out, report = written
    own, other = tiny_bert.fresh(2).state_dict(), AutoModelForSequenceClassification.from_pretrained(out).state_dict()
    factors = load_peft_weights(out / INITIAL, device="cpu")
    assert {layer.bits for layer in report.layers} == {2, 4, 8, 16} and len(report.layers) == 13
    for layer in report.layers:
        name = f"base_model.model.{layer.module}.lora_"
        change = factors[f"{name}B.weight"] @ factors[f"{name}A.weight"]
        weight = f"{layer.module}.weight"
        error = float((own[weight] - other[weight] - change).norm())
        assert layer.error == pytest.approx(error, abs=1e-5)
        plain = (
            0.0
            if layer.bits == 16
            else float((own[weight] - unpack(pack(own[weight], layer.bits), torch.float32)).norm())
        )
        assert layer.plain_error == pytest.approx(plain, abs=1e-5)
        assert layer.error < plain or (layer.bits == 16 and torch.equal(own[weight], other[weight]))
        assert bool(factors[f"{name}A.weight"].any()), "A and B that are both zero would get no gradient"
    assert report.worse == ()


def test_the_base_is_the_same_read_plain_or_packed(written: tuple[Path, Report], tmp_path: Path) -> None:
    out, report = written
    plain = tmp_path / "plain"
    shutil.copytree(out, plain)
    (plain / FILE).unlink()
    features = [random_features(np.random.default_rng(seed)) for seed in range(4)]
    answers = []
    for base in (out, plain):
        with Engine(EngineConfig(base=str(base), device="cpu")) as engine:
            engine.load_adapter("a", as_embedding(out))
            assert engine.base.fingerprint == report.fingerprint
            assert (engine.base.num_bytes < engine.base.full_bytes) == (base == out)
            results = engine.infer([Row(f, adapter, "embedding") for f in features for adapter in (None, "a")])
            answers.append([result.logits for result in results if isinstance(result, RowResult)])
    assert len(answers[0]) == len(answers[1]) == 8
    assert all(np.array_equal(one, two) for one, two in zip(*answers, strict=True))


def test_the_initial_adapter_brings_the_base_back_towards_the_original(
    written: tuple[Path, Report], tiny_bert: TinyBase
) -> None:
    features = random_features(np.random.default_rng(0))
    vectors = {}
    for name, base in (("original", tiny_bert.directory), ("rounded", written[0])):
        with Engine(EngineConfig(base=str(base), device="cpu")) as engine:
            adapters: list[str | None] = [None]
            if name == "rounded":
                engine.load_adapter("initial", as_embedding(written[0]))
                adapters.append("initial")
            for adapter in adapters:
                (result,) = engine.infer([Row(features, adapter, "embedding")])
                assert isinstance(result, RowResult), result
                vectors[adapter or name] = result.logits
    rounded, restored = (np.linalg.norm(vectors[name] - vectors["original"]) for name in ("rounded", "initial"))
    assert restored < rounded


def test_the_original_is_not_written_to(tiny_bert: TinyBase, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in tiny_bert.directory.iterdir()}
    quantize(Order(str(tiny_bert.directory), tmp_path / "out", 2, rank=2, iterations=1))
    assert {file.name: file.read_bytes() for file in tiny_bert.directory.iterdir()} == before


def test_transposed_layers_are_decomposed_as_out_by_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=40)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    report = quantize(Order(str(tmp_path / "base"), tmp_path / "out", 3, {"c_proj": 4}, rank=4, targets=("c_attn",)))
    assert {layer.module: (layer.bits, layer.rank) for layer in report.layers} == {
        "transformer.h.0.attn.c_attn": (3, 4),
        "transformer.h.0.attn.c_proj": (4, None),
        "transformer.h.0.mlp.c_fc": (3, None),
        "transformer.h.0.mlp.c_proj": (4, None),
    }
    fresh = AutoModelForCausalLM.from_pretrained
    own = fresh(tmp_path / "base").state_dict()["transformer.h.0.attn.c_attn.weight"].t()
    expected = loftq(own, 3, 4, 5)
    peft = PeftModel.from_pretrained(fresh(tmp_path / "out"), tmp_path / "out" / INITIAL).eval()
    layer = peft.base_model.model.transformer.h[0].attn.c_attn
    assert torch.equal(layer.lora_A["default"].weight, expected.a)
    assert torch.equal(layer.base_layer.weight, unpack(expected.packed, torch.float32).t())
    row = Row(random_features(np.random.default_rng(0)), "a")
    for plain in (False, True):
        if plain:
            (tmp_path / "out" / FILE).unlink()
        with Engine(EngineConfig(base=str(tmp_path / "out"), device="cpu")) as engine:
            engine.load_adapter("a", tmp_path / "out" / INITIAL)
            (result,) = engine.infer([row])
        with torch.inference_mode():
            logits = peft(**{k: torch.from_numpy(v)[None] for k, v in row.inputs.items()}).logits[0]  # type: ignore[union-attr]
        assert isinstance(result, RowResult)
        np.testing.assert_allclose(result.logits, logits, atol=1e-4)


def test_weights_that_the_checkpoint_lacks_are_not_made_up(tiny_bert: TinyBase, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_bert.directory)
    state = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name}
    model.save_pretrained(tmp_path / "base", state_dict=state)
    report = quantize(Order(str(tmp_path / "base"), tmp_path / "out", rank=2, iterations=1))
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(state)
    assert len(report.layers) == 12 and fingerprint(tmp_path / "out") == report.fingerprint


@pytest.mark.parametrize("bits", [2, 8])
def test_a_bfloat16_base_stays_one(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=40)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    report = quantize(Order(str(tmp_path / "base"), tmp_path / "out", bits, rank=4, iterations=2))
    assert fingerprint(tmp_path / "out") == report.fingerprint
    (tmp_path / "out" / FILE).unlink()
    assert fingerprint(tmp_path / "out") == report.fingerprint


def test_a_packed_file_of_another_checkpoint_is_refused(written: tuple[Path, Report], tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(written[0], mixed)
    model = AutoModelForSequenceClassification.from_pretrained(mixed)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] += 1e-6
    model.bert.save_pretrained(mixed)
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense differs from the checkpoint beside it"):
        Engine(EngineConfig(base=str(mixed), device="cpu"))


@pytest.mark.parametrize("cut", [0, 20, 400, -8])
def test_a_damaged_packed_file_is_named(cut: int, written: tuple[Path, Report], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(written[0], broken)
    (broken / FILE).write_bytes((broken / FILE).read_bytes()[:cut])
    with pytest.raises(ValueError, match=FILE):
        Engine(EngineConfig(base=str(broken), device="cpu"))


def test_a_written_base_is_not_quantised_twice(written: tuple[Path, Report], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantised already"):
        Engine(EngineConfig(base=str(written[0]), device="cpu", quantization=QuantizationConfig(4)))
    with pytest.raises(InvalidOrder, match="quantised already"):
        quantize(Order(str(written[0]), tmp_path / "out"))


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_a_base_and_says_what_it_did(
    tiny_bert: TinyBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    arguments = ["quantize", str(tiny_bert.directory), "--method", "loftq", "--bits", "4", "--rank", "4"]
    arguments += ["--bits-pattern", r"layer\.0\..*=2", "dense=8", "--target-modules", "query", "value"]
    assert main([*arguments, "--iterations", "2", "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert len(printed.err.splitlines()) == len(document["layers"]) == 13
    assert document["base_fingerprint"] == fingerprint(out)
    assert document["bytes_after"] < document["bytes_before"] and document["worse_than_plain"] == []
    assert [layer["bits"] for layer in document["layers"]].count(2) == 6
    assert sum(layer["rank"] == 4 for layer in document["layers"]) == 4
    assert json.loads((out / INITIAL / "adapter_config.json").read_text())["revision"] == document["base_fingerprint"]
    assert main([*arguments, "--out", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_the_command_refuses_with_every_reason_and_leaves_nothing(
    tiny_bert: TinyBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(tiny_bert.directory), "--bits", "5", "--bits-pattern", "(=4", "nowhere=8"]
    arguments += [
        "--rank",
        "64",
        "--iterations",
        "0",
        "--target-modules",
        "query",
        "nothing",
        "--task",
        "question-answering",
    ]
    assert main([*arguments, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    for part in ("bits is 5", "not a regular expression", "rank 64", "iterations is 0", "'nothing' is no linear layer"):
        assert part in error
    assert main(["quantize", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    with pytest.raises(SystemExit):
        main(["quantize", str(tiny_bert.directory), "--bits-pattern", "query", "--out", str(out)])
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_base_that_cannot_be_finished(
    tiny_bert: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("adapter_router.quantize.write_packed", fail)
    with pytest.raises(OSError, match="no space"):
        quantize(Order(str(tiny_bert.directory), tmp_path / "out", rank=2, iterations=1))
    assert list(tmp_path.iterdir()) == []


# -- trained on it, served on it -----------------------------------------------------------------------------------


def trained(base: Path, out: Path, num_labels: int) -> Path:
    """What a user's training leaves, but with random steps: PEFT loads the initial adapter and saves it again."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    peft = with_heads(model, base / INITIAL, ["classifier"])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    peft.save_pretrained(out)
    before, after = load_peft_weights(base / INITIAL, device="cpu"), load_peft_weights(out, device="cpu")
    assert all(name in after and not torch.equal(tensor, after[name]) for name, tensor in before.items())
    return out


def with_heads(model: Any, initial: Path, saved: list[str]) -> Any:
    """The recipe of docs/quantization.md: the initial adapter, with modules that are trained as a whole beside it."""
    config = LoraConfig.from_pretrained(initial)
    config.task_type, config.modules_to_save = "SEQ_CLS", saved
    peft = get_peft_model(model, config)
    state = get_peft_model_state_dict(peft) | load_peft_weights(initial, device="cpu")
    set_peft_model_state_dict(peft, state)
    return peft


def test_an_adapter_is_served_on_its_base_and_refused_on_others(
    written: tuple[Path, Report], tiny_bert: TinyBase, tmp_path: Path
) -> None:
    out, report = written
    adapter = trained(out, tmp_path / "a", 3)
    assert json.loads((adapter / "adapter_config.json").read_text())["revision"] == report.fingerprint
    fresh = AutoModelForSequenceClassification.from_pretrained
    peft = PeftModel.from_pretrained(fresh(out, num_labels=3), adapter).eval()
    rows = [Row(random_features(np.random.default_rng(seed)), "a") for seed in range(4)]
    with Engine(EngineConfig(base=str(out), device="cpu")) as engine:
        engine.load_adapter("a", adapter)
        for row, result in zip(rows, engine.infer(rows), strict=True):
            assert isinstance(result, RowResult), result
            batch = {k: torch.from_numpy(v)[None] for k, v in row.inputs.items()}  # type: ignore[union-attr]
            with torch.inference_mode():
                np.testing.assert_allclose(result.logits, peft(**batch).logits[0], atol=1e-4)
    quantization = QuantizationConfig(4, {**THREE_WIDTHS, "pooler.dense": 16})
    for others in ({}, {"quantization": quantization}):  # the original, and one rounded without LoftQ
        config = EngineConfig(base=str(tiny_bert.directory), device="cpu", **others)  # type: ignore[arg-type]
        with Engine(config) as engine, pytest.raises(AdapterRejected, match="serve it on that base") as refusal:
            engine.load_adapter("a", adapter)
        assert report.fingerprint in str(refusal.value)


def test_pefts_own_revision_is_no_fingerprint(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    directory = tiny_bert.adapter(tmp_path / "a", 3, 0)
    edit_config(directory, revision="main")
    engine.load_adapter("a", directory)


def test_pefts_own_loftq_needs_a_base_by_name(
    written: tuple[Path, Report], tiny_bert: TinyBase, tmp_path: Path
) -> None:
    """PEFT rounds the base in memory; only its trainer can say which written base is the same."""
    out, report = written
    adapter = trained(out, tmp_path / "a", 3)
    edit_config(adapter, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 5}, revision=None)
    with Engine(EngineConfig(base=str(out), device="cpu")) as engine:
        with pytest.raises(AdapterRejected, match=r"adapter-router quantize --method loftq.*base_fingerprint"):
            engine.load_adapter("a", adapter)
        (adapter / "adapter_router.json").write_text(json.dumps({"base_fingerprint": report.fingerprint}))
        engine.load_adapter("a", adapter)
    with (
        Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu")) as engine,
        pytest.raises(AdapterRejected, match="serve it on that base"),
    ):
        engine.load_adapter("a", adapter)


# -- a real tenant on a real base ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM at 2, 4 and 8 bits."""
    out = tmp_path_factory.mktemp("real") / "base"
    order = Order(
        BASE,
        out,
        4,
        {r"layer\.1\..*": 2, r"layer\.5\..*": 8},
        rank=8,
        iterations=2,
        targets=("query", "value"),
        task="text-classification",
    )
    report = quantize(order)
    assert {layer.bits for layer in report.layers} == {2, 4, 8}
    assert all(layer.error < layer.plain_error for layer in report.layers if layer.rank)
    return out


def batches(tokenizer: Any, rows: list[tuple[str, str]], labels: list[str]) -> Iterator[tuple[Any, torch.Tensor]]:
    for start in range(0, len(rows), 32):
        chunk = rows[start : start + 32]
        encoded = tokenizer([text for text, _ in chunk], padding=True, return_tensors="pt")
        yield encoded, torch.tensor([labels.index(label) for _, label in chunk])


def test_a_real_tenant_keeps_its_accuracy_beside_others(real_base: Path, tmp_path: Path) -> None:
    train, held_out = TENANTS["smart-home"]()
    train.sort(key=lambda row: len(row[0]))  # batches of near-equal length: less padding
    labels = sorted({label for _, label in train})
    tokenizer = AutoTokenizer.from_pretrained(real_base)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(real_base, num_labels=len(labels))
    peft = with_heads(model, real_base / INITIAL, ["classifier", "pooler"])

    def losses() -> Iterator[torch.Tensor]:
        rng, steps = random.Random(0), list(batches(tokenizer, train, labels))
        while True:
            for encoded, target in rng.sample(steps, len(steps)):
                yield torch.nn.functional.cross_entropy(peft(**encoded).logits, target)

    fit(peft, losses(), steps=87, peak_rate=2e-3)
    with torch.inference_mode():
        right = sum(
            int((peft(**encoded).logits.argmax(-1) == target).sum())
            for encoded, target in batches(tokenizer, held_out, labels)
        )
    at_training = right / len(held_out)
    peft.save_pretrained(tmp_path / "tenant")
    save_labels(tmp_path / "tenant", "bert", labels)
    assert at_training > 0.8  # it learnt something: chance is 10 %
    with Engine(EngineConfig(base=str(real_base), device="cpu")) as engine:
        engine.load_adapter("tenant", tmp_path / "tenant")
        for name, folder in ADAPTERS.items():
            engine.load_adapter(name, folder)
        neighbours = [Row(text, name) for name in ADAPTERS for text, _ in TENANTS[name]()[1][: len(held_out) // 4]]
        rows = [Row(text, "tenant") for text, _ in held_out] + neighbours
        order = np.random.default_rng(0).permutation(len(rows))
        results = dict(zip(order.tolist(), engine.infer([rows[i] for i in order]), strict=True))
    answers = [results[index] for index in range(len(held_out))]
    good = sum(
        isinstance(result, RowResult) and result.output["label"] == label  # type: ignore[index,call-overload]
        for result, (_, label) in zip(answers, held_out, strict=True)
    )
    assert abs(good / len(held_out) - at_training) <= 0.01


# -- after a review ------------------------------------------------------------------------------------------------


def tiny_config() -> BertConfig:
    return BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100, num_labels=3
    )


@pytest.mark.parametrize(
    ("kind", "named"),
    [(BertForPreTraining, ["BertForMaskedLM"]), (BertForSequenceClassification, None), (BertModel, ["pipeline"])],
)
def test_every_trained_weight_is_written(kind: Any, named: list[str] | None, tmp_path: Path) -> None:
    """Checkpoints hold more than the class that they name reads: bert-base-uncased's pooler, a head of no name."""
    kind(tiny_config()).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = named
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    quantize(Order(str(tmp_path / "base"), tmp_path / "out", 4, rank=4))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert {name.removeprefix("bert.") for name in before} == {name.removeprefix("bert.") for name in after}
    mode = (tmp_path / "out" / "config.json").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "out").rglob("*.safetensors")} == {mode}


def test_weights_that_no_class_reads_are_named(tmp_path: Path) -> None:
    BertModel(tiny_config()).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.ones(2)}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidOrder, match=r"left over: extra\.weight"):
        quantize(Order(str(tmp_path / "base"), tmp_path / "out", 4, rank=4))
    assert not (tmp_path / "out").exists()


def test_an_order_is_refused_before_any_work(tiny_bert: TinyBase, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_bert.directory, tmp_path / "base")
    order = Order(str(base), base / "inner", 4, rank=5000, iterations=0, device="bogus", seed=-1)
    lines: list[str] = []
    with pytest.raises(InvalidOrder) as refusal:
        quantize(order, lines.append)
    for says in ("lies inside the base", "rank is 5000", "iterations is 0", "device 'bogus'", "seed is -1"):
        assert any(says in problem for problem in refusal.value.problems), refusal.value.problems
    assert lines == [] and not (base / "inner").exists()


def test_options_may_be_repeated_but_not_contradict(
    tiny_bert: TinyBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(tiny_bert.directory), "--rank", "4", "--json"]
    twice = ["--bits-pattern", "query=2", "--bits-pattern", "query=8"]
    assert main([*command, *twice, "--out", str(tmp_path / "a")]) == 1
    assert "bits-pattern names twice: query" in capsys.readouterr().err and not (tmp_path / "a").exists()
    both = ["--target-modules", "query", "--target-modules", "value"]
    assert main([*command, *both, "--out", str(tmp_path / "b")]) == 0
    config = json.loads((tmp_path / "b" / INITIAL / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"query", "value"}


def test_a_packed_base_has_one_dtype(tmp_path: Path, tiny_bert: TinyBase) -> None:
    quantize(Order(str(tiny_bert.directory), tmp_path / "out", 4, rank=4))
    with pytest.raises(ValueError, match=r"made for torch\.float32: leave dtype at auto, not bfloat16"):
        Engine(EngineConfig(base=str(tmp_path / "out"), device="cpu", dtype="bfloat16"))
