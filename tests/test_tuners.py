"""Every method computes what PEFT alone computes from the same files, and refuses what it cannot."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapter_router.adapters.adapter_config import COMMON_FIELDS, parse_adapter_config
from adapter_router.adapters.base_spec import TargetSpec
from adapter_router.adapters.delta import ModuleDelta
from adapter_router.adapters.tuners import adalora, ia3, loha, lokr, oft, vera
from adapter_router.adapters.tuners.tuner import Target, Tuner, Weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*rank_pattern:RuntimeWarning:peft")

PREFIX = "base_model.model."
LINEARS = ["block.up", "block.down", "square"]
ALL = [*LINEARS, "conv1d"]
TUNERS: dict[type[PeftConfig], Tuner] = {
    AdaLoraConfig: adalora.TUNER,
    IA3Config: ia3.TUNER,
    LoHaConfig: loha.TUNER,
    LoKrConfig: lokr.TUNER,
    OFTConfig: oft.TUNER,
    VeraConfig: vera.TUNER,
}
WITHOUT_CONV1D = [LoHaConfig, LoKrConfig, OFTConfig]


class Words(nn.Module):
    """Linear layers with and without bias and transformers' Conv1D, no two shapes alike."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12, bias=False)})
        self.square = nn.Linear(12, 12)
        self.conv1d = Conv1D(18, 12)
        nn.init.normal_(self.conv1d.weight)
        nn.init.normal_(self.conv1d.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block["down"](torch.tanh(self.block["up"](x)))
        return self.conv1d(torch.tanh(self.square(x)))


class Image(nn.Module):
    """Convolutions: padded, grouped, and with as many channels in as out."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, (3, 1), stride=2, groups=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.grouped(torch.tanh(self.wide(x)))


class Changed(nn.Module):
    """The formula of ``ModuleDelta`` around ``f``, in float64."""

    def __init__(self, f: nn.Module, delta: ModuleDelta) -> None:
        super().__init__()
        self.f = f
        self.delta = delta
        self.at = (1, -1, 1, 1) if isinstance(f, nn.Conv2d) else (-1,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = {name: tensor.double() for name, tensor in self.delta.tensors().items()}
        y = self.f(x * part["input_scale"].view(self.at) if "input_scale" in part else x)
        if "a" in part:
            y = y + self.delta.scaling * (x @ part["a"].T) @ part["b"].T
        if "dense" in part:
            y = y + x @ part["dense"].T
        if "gain" in part:
            y = part["gain"].view(self.at) * y
        return y


class ModuleWeights(Weights):
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def weight(self, path: str) -> torch.Tensor:
        module = self.model.get_submodule(path)
        return module.weight.T if isinstance(module, Conv1D) else module.weight


@dataclass(frozen=True)
class Case:
    kind: type[PeftConfig]
    fields: Mapping[str, Any]
    model: Callable[[], nn.Module] = Words
    scale: float = 0.5

    def base(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.model()

    def inputs(self) -> torch.Tensor:
        return torch.randn(2, 3, 8, 8) if self.model is Image else torch.randn(2, 5, 12)

    def save(self, directory: Path, seed: int) -> None:
        """A random adapter, saved by PEFT after training pruned what ``rank_pattern`` leaves out."""
        settings = dict(self.fields)
        pruned = settings.pop("rank_pattern", None) if self.kind is AdaLoraConfig else None
        model = get_peft_model(self.base(seed), self.kind(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * self.scale)
        if pruned is not None:
            model.peft_config["default"].rank_pattern = pruned
        model.save_pretrained(directory)


def case(name: str, kind: type[PeftConfig], **settings: Any) -> Any:
    outer = {key: settings.pop(key) for key in ("model", "scale") if key in settings}
    return pytest.param(Case(kind, settings, **outer), id=f"{kind.__name__.removesuffix('Config')}-{name}")


def ada(name: str, **settings: Any) -> Any:
    return case(name, AdaLoraConfig, **{"target_modules": ALL, "total_step": 10, "init_r": 3, **settings})


PRUNED = {
    "block.up.lora_E.default": [True, False, True],
    "block.down.lora_E.default": [False, False, False],
    "conv1d.lora_E.default": [True, True, True],
}
CASES = [
    case("output", IA3Config, target_modules=ALL, feedforward_modules=[]),
    case("mixed", IA3Config, target_modules=ALL, feedforward_modules=["block.down", "conv1d"]),
    case("ending", IA3Config, target_modules=["up", "down", "wn"], feedforward_modules=["wn"]),
    case("expression", IA3Config, target_modules=ALL, feedforward_modules=r"block\.(up|down)"),
    case("tail-expression", IA3Config, target_modules=ALL, feedforward_modules="down|square"),
    case("gain", IA3Config, target_modules=["wide", "grouped"], feedforward_modules=[], model=Image),
    case("input", IA3Config, target_modules=["wide", "grouped"], feedforward_modules=["wide", "grouped"], model=Image),
    ada("plain"),
    ada("pruned", rank_pattern=PRUNED, lora_alpha=5),
    ada("no-alpha", rank_pattern=PRUNED, lora_alpha=0),
    ada("negative-alpha", lora_alpha=-3),
    ada("ignored", r=5, use_rslora=True, alpha_pattern={"up": 100}, init_lora_weights="pissa", lora_dropout=0.5),
    case("plain", VeraConfig, target_modules=ALL, r=7),
    case("one-target", VeraConfig, target_modules=["down"], r=2, d_initial=0.5, projection_prng_key=3),
    case("dropout", VeraConfig, target_modules=ALL, r=5, vera_dropout=0.5),
    case("low-rank", LoHaConfig, target_modules=LINEARS, r=2, alpha=3),
    case("dense", LoHaConfig, target_modules=LINEARS, r=4, alpha=1.5, rank_dropout=0.5, module_dropout=0.5),
    case("patterns", LoHaConfig, target_modules=LINEARS, rank_pattern={"down": 1}, alpha_pattern={"block.up": 4}),
    case("full", LoKrConfig, target_modules=LINEARS, r=8, alpha=3),
    case("right", LoKrConfig, target_modules=LINEARS, r=1, alpha=2),
    case("both", LoKrConfig, target_modules=LINEARS, r=1, decompose_both=True, decompose_factor=4, scale=0.9),
    case("left", LoKrConfig, target_modules=LINEARS, r=2, decompose_both=True, decompose_factor=12, scale=0.9),
    case("factor", LoKrConfig, target_modules=LINEARS, r=3, alpha=2, decompose_factor=3, rank_dropout_scale=True),
    case("patterns", LoKrConfig, target_modules=LINEARS, rank_pattern={"up": 1}, alpha_pattern={"square": 20}),
    case("plain", OFTConfig, target_modules=LINEARS, oft_block_size=4, scale=0.2),
    case("cayley", OFTConfig, target_modules=LINEARS, oft_block_size=4, use_cayley_neumann=False),
    case("blocks", OFTConfig, target_modules=LINEARS, oft_block_size=0, r=3, use_cayley_neumann=False),
    case("shared", OFTConfig, target_modules=LINEARS, oft_block_size=4, block_share=True, scale=0.2),
    case("nearest", OFTConfig, target_modules=LINEARS, oft_block_size=7, scale=0.2, module_dropout=0.5),
    case("coft", OFTConfig, target_modules=LINEARS, oft_block_size=4, coft=True, eps=2.0, use_cayley_neumann=False),
    case("coft-shared", OFTConfig, target_modules=LINEARS, oft_block_size=4, coft=True, eps=0.3, block_share=True),
    *[
        case(f"{n}-terms", OFTConfig, target_modules=LINEARS, oft_block_size=4, num_cayley_neumann_terms=n, scale=0.2)
        for n in (2, 3, 4, 6, 9)
    ],
]


def spec_of(module: nn.Module) -> TargetSpec:
    if isinstance(module, Conv1D):
        return TargetSpec("linear", *module.weight.shape, has_bias=True, transposed=True)
    if isinstance(module, nn.Conv2d):
        return TargetSpec("conv", module.in_channels, module.out_channels, kernel=module.kernel_size)
    return TargetSpec("linear", module.in_features, module.out_features)


def read(directory: Path, tuner: Tuner, model: nn.Module) -> list[tuple[Target, dict[str, torch.Tensor]]]:
    """The saved adapter by target and role, every tensor in its place."""
    config, problems = parse_adapter_config((directory / "adapter_config.json").read_bytes())
    assert config is not None
    assert problems + tuner.config_problems(config.document) == []
    tensors = load_file(directory / "adapter_model.safetensors")
    shared = {name: tensors.pop(f"base_model.{name}") for name in tuner.shared}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        (suffix,) = (suffix for suffix in tuner.roles if name.endswith("." + suffix))
        found.setdefault(name.removesuffix("." + suffix), dict(shared))[tuner.roles[suffix]] = tensor
    targets = [Target(path, path, spec_of(model.get_submodule(path)), config) for path in found]
    return [(target, found[target.path]) for target in targets]


def changed(directory: Path, tuner: Tuner, model: nn.Module) -> nn.Module:
    """``model`` with the formula at every target, in float64."""
    weights = ModuleWeights(model)
    deltas = {}
    for target, tensors in read(directory, tuner, model):
        present = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
        assert tuner.shapes(target, present) == present
        assert target.spec.kind in tuner.kinds
        deltas[target.path] = tuner.delta(target, tensors, weights)
    model.double()
    for path, delta in deltas.items():
        model.set_submodule(path, Changed(model.get_submodule(path), delta))
    return model


def alone(case: Case, directory: Path, seed: int) -> PeftModel:
    return PeftModel.from_pretrained(case.base(seed), directory).eval()


def assert_as_alone(case: Case, directory: Path, seed: int) -> None:
    x = case.inputs()
    with torch.no_grad():
        expected = alone(case, directory, seed)(x)
        without = case.base(seed)(x)
        actual = changed(directory, TUNERS[case.kind], case.base(seed))(x.double())
    scale = expected.abs().max()
    assert (expected - without).abs().max() > 0.05 * scale  # the adapter is loud enough to be missed
    assert (actual - expected).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_computes_what_peft_alone_does(case: Case, seed: int, tmp_path: Path) -> None:
    case.save(tmp_path, seed)
    assert_as_alone(case, tmp_path, seed)


@pytest.mark.parametrize("case", [next(c for c in CASES if c.values[0].kind is kind) for kind in TUNERS])
def test_a_file_in_bfloat16_is_computed_in_float32(case: Case, tmp_path: Path) -> None:
    case.save(tmp_path, 0)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    assert_as_alone(case, tmp_path, 0)


def test_a_module_pruned_away_is_left_alone(tmp_path: Path) -> None:
    settings = {"target_modules": ALL, "total_step": 10, "init_r": 3, "rank_pattern": PRUNED}
    Case(AdaLoraConfig, settings).save(tmp_path, 0)
    for target, tensors in read(tmp_path, adalora.TUNER, Words()):
        delta = adalora.TUNER.delta(target, tensors, ModuleWeights(Words()))
        assert (delta == ModuleDelta()) == (target.path == "block.down")


@pytest.mark.parametrize(("kind", "r", "rank"), [(LoHaConfig, 1, 1), (LoHaConfig, 4, 16), (LoKrConfig, 1, 3)])
def test_takes_the_smaller_of_the_dense_and_the_low_rank_form(
    kind: type[PeftConfig], r: int, rank: int, tmp_path: Path
) -> None:
    Case(kind, {"target_modules": LINEARS, "r": r}).save(tmp_path, 0)
    for target, tensors in read(tmp_path, TUNERS[kind], Words()):
        delta = TUNERS[kind].delta(target, tensors, ModuleWeights(Words()))
        size = sum(tensor.numel() for tensor in delta.tensors().values())
        features = (target.spec.in_features, target.spec.out_features)
        assert size == min(rank * sum(features), features[0] * features[1])


OPTIONS: dict[type[PeftConfig], list[dict[str, Any]]] = {
    LoHaConfig: [{"r": 1}, {"r": 5}],
    LoKrConfig: [
        {"r": r, "decompose_both": both, "decompose_factor": factor}
        for r in (1, 2, 5)
        for both in (False, True)
        for factor in (-1, 0, 1, 2, 3, 4, 7, 100)
    ],
    OFTConfig: [
        {"r": r, "oft_block_size": size, "block_share": shared}
        for r, size in ((0, 1), (0, 2), (0, 5), (0, 7), (0, 40), (1, 0), (4, 0), (9, 0), (99, 0))
        for shared in (False, True)
    ],
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("features", [(1, 7), (12, 36), (13, 64), (24, 50), (30, 97), (60, 8)])
def test_expects_the_shapes_that_peft_makes(kind: type[PeftConfig], features: tuple[int, int]) -> None:
    for options in OPTIONS[kind]:
        peft_config = kind(target_modules=["0"], **options)
        model = get_peft_model(nn.Sequential(nn.Linear(*features)), peft_config)
        document = json.dumps(peft_config.to_dict() | {"target_modules": ["0"]}, default=list)
        config, problems = parse_adapter_config(document.encode())
        assert config is not None
        tuner = TUNERS[kind]
        target = Target("0", "0", TargetSpec("linear", *features), config)
        assert [*problems, *tuner.config_problems(config.document)] == []
        names = {name.replace(".default", ""): p.shape for name, p in model.named_parameters() if p.requires_grad}
        made = {tuner.roles[name.removeprefix(PREFIX + "0.")]: tuple(shape) for name, shape in names.items()}
        assert tuner.shapes(target, made) == made, options


@pytest.mark.parametrize("kind", WITHOUT_CONV1D)
def test_a_transposed_layer_has_no_place_where_peft_has_none(kind: type[PeftConfig], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not supported"):
        get_peft_model(Words(), kind(target_modules=["conv1d"]))
    Case(kind, {"target_modules": LINEARS}).save(tmp_path, 0)
    config, _ = parse_adapter_config((tmp_path / "adapter_config.json").read_bytes())
    assert config is not None
    target = Target("conv1d", "conv1d", spec_of(Words().conv1d), config)
    assert TUNERS[kind].shapes(target, {}) == {}


def test_vera_without_its_projections_is_served_once_they_are_added(tmp_path: Path) -> None:
    case = Case(VeraConfig, {"target_modules": ALL, "r": 4, "save_projection": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.save(tmp_path, 0)
        model = alone(case, tmp_path, 0)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    (problem,) = vera.TUNER.config_problems(document)
    assert "set save_projection to true" in problem
    (tmp_path / "adapter_config.json").write_text(json.dumps(document | {"save_projection": True}))
    path = tmp_path / "adapter_model.safetensors"
    added = {f"base_model.{name}": getattr(model.base_model, name)["default"] for name in ("vera_A", "vera_B")}
    save_file(load_file(path) | added, path)
    assert_as_alone(case, tmp_path, 0)


REFUSED_FIELDS: dict[type[PeftConfig], set[str]] = {
    AdaLoraConfig: {
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "kasa_config",
        "layer_replication",
        "loftq_config",
        "lora_bias",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "velora_config",
    },
}


@pytest.mark.parametrize("kind", TUNERS)
def test_every_field_is_served_harmless_or_refused(kind: type[PeftConfig]) -> None:
    tuner = TUNERS[kind]
    own = {field.name for field in fields(kind)} - COMMON_FIELDS
    assert not tuner.served & tuner.harmless
    assert tuner.served | tuner.harmless == own - REFUSED_FIELDS.get(kind, set())


NAN = float("nan")
MASK = {"up.lora_E": [True, False, True]}
NEW = {"peft_version": "0.21.2", "oft_block_size": 32, "r": 0}
REFUSED = [
    (ia3, {}, "feedforward_modules is None"),
    (ia3, {"feedforward_modules": None}, "PEFT guesses by the model type"),
    (ia3, {"feedforward_modules": 5}, "must be an expression or a list of module names"),
    (ia3, {"feedforward_modules": ["up", 5]}, "must be an expression or a list of module names"),
    (ia3, {"feedforward_modules": [""]}, "must be an expression or a list of module names"),
    (ia3, {"feedforward_modules": "x" * 3000}, "must be an expression or a list of module names"),
    (ia3, {"feedforward_modules": "(up"}, "is not a regular expression"),
    (ia3, {"feedforward_modules": ["up"], "target_modules": ["down"]}, "which target_modules does not"),
    (adalora, {"init_r": 0}, "init_r is 0, must be an integer from 1 to 4096"),
    (adalora, {"init_r": True}, "init_r is True"),
    (adalora, {"init_r": "3"}, "init_r is '3'"),
    (adalora, {"init_r": 10**6}, "init_r is 1000000"),
    (adalora, {"rank_pattern": [3]}, "rank_pattern is [3], must be an object or null"),
    (adalora, {"init_r": 3, "rank_pattern": {"up": MASK["up.lora_E"]}}, "must be a list of 3 booleans and end in"),
    (adalora, {"init_r": 3, "rank_pattern": {"up.lora_E": 2}}, "rank_pattern['up.lora_E'] must be a list of 3"),
    (adalora, {"init_r": 3, "rank_pattern": {"up.lora_E": [1, 0, 1]}}, "must be a list of 3 booleans"),
    (adalora, {"init_r": 4, "rank_pattern": MASK}, "must be a list of 4 booleans"),
    (vera, {"r": 0}, "r is 0, must be an integer from 1 to 4096"),
    (vera, {"r": 2.5}, "r is 2.5"),
    (vera, {"save_projection": False}, "load the adapter with PEFT, add its base_model.vera_A"),
    (vera, {"save_projection": "no"}, "save_projection is 'no', must be true"),
    (vera, {"save_projection": 0}, "save_projection is 0, must be true"),
    (lokr, {"decompose_both": 1}, "decompose_both is 1, must be true or false"),
    (lokr, {"decompose_factor": 1.5}, "decompose_factor is 1.5, must be an integer from -1 to 1000000"),
    (lokr, {"decompose_factor": -2}, "decompose_factor is -2"),
    (lokr, {"decompose_factor": 10**9}, "decompose_factor is 1000000000"),
    (oft, {"peft_version": "0.21.2"}, "oft_block_size is missing, as before PEFT 0.14"),
    (oft, NEW | {"oft_block_size": -4}, "oft_block_size is -4, must be an integer from 0 to 1000000"),
    (oft, NEW | {"r": None}, "r is None"),
    (oft, NEW | {"r": 3}, "one of r and oft_block_size must be 0"),
    (oft, NEW | {"oft_block_size": 0}, "one of r and oft_block_size must be 0"),
    (oft, NEW | {"coft": "yes"}, "coft is 'yes', must be true or false"),
    (oft, NEW | {"block_share": 1}, "block_share is 1"),
    (oft, NEW | {"use_cayley_neumann": None}, "use_cayley_neumann is None"),
    (oft, NEW | {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is 0, must be an integer from 1 to 64"),
    (oft, NEW | {"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms is 1000000000"),
    (oft, NEW | {"eps": NAN}, "eps is nan, must be a number from 0 to 1e+09"),
    (oft, NEW | {"eps": -1.0}, "eps is -1.0"),
    (oft, NEW | {"peft_version": None}, "use_cayley_neumann has another series before PEFT 0.18"),
    (oft, NEW | {"peft_version": "0.17.1"}, "train the adapter again"),
    (oft, NEW | {"peft_version": "newest"}, "train the adapter again"),
]


@pytest.mark.parametrize(("method", "document", "message"), REFUSED)
def test_a_faulty_field_is_refused_by_name(method: Any, document: dict[str, Any], message: str) -> None:
    assert any(message in problem for problem in method.TUNER.config_problems(document))


@pytest.mark.parametrize(("method", "document", "message"), REFUSED)
def test_a_faulty_field_does_not_hide_other_problems(method: Any, document: dict[str, Any], message: str) -> None:
    """All problems are to be listed at once, so shapes are asked for all the same."""
    config, _ = parse_adapter_config(json.dumps(document).encode())
    assert config is not None
    for transposed in (False, True):
        target = Target("up", "up", TargetSpec("linear", 12, 20, transposed=transposed), config)
        assert isinstance(method.TUNER.shapes(target, {"vera_A": (), "vera_B": (3,)}), dict), message


def test_any_peft_version_will_do_where_the_series_is_not_used() -> None:
    assert oft.TUNER.config_problems({"oft_block_size": 32, "use_cayley_neumann": False}) == []


def test_a_slow_expression_is_cut_short() -> None:
    config, _ = parse_adapter_config(json.dumps({"feedforward_modules": "((a|aa|b)+c?)+[d-f]"}).encode())
    assert config is not None
    target = Target("a" * 60, "up", TargetSpec("linear", 12, 20), config)
    assert ia3.TUNER.shapes(target, {}) == {"l": (20, 1)}
    assert "takes too long" in str(config.matcher.problems)
