"""The grammar of an adapter file's keys: every tensor has exactly one role, or the adapter is refused.

A key is ``base_model.model.<module><suffix>``; the suffix tells the role. PEFT passes keys that it does not know
through to the model, where they overwrite the base or another tenant's adapter.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from adapter_router.adapters.adapter_config import AdapterConfig
from adapter_router.adapters.tuners.tuner import Tuner

PREFIX = "base_model.model."
_BASE_LAYER = re.compile(r"\.base_layer(?=\.|$)")
_TRAINING_ONLY = re.compile(r".+\.(lora_velora_embed|lora_monteclora_sampler)(\..+)?")
_TOKENS = re.compile(r"(?P<path>.+?)(\.token_adapter)?\.trainable_tokens_delta")
_WRAPPED = re.compile(r"(?P<path>.+?)\.(?P<wrapper>original_module|modules_to_save(\.default)?)\.(?P<name>.+)")

_LONGEST_NAME = 200

Tensors = dict[str, torch.Tensor]


@dataclass
class SortedTensors:
    """Tensors by role; paths are the adapter's own spelling.

    ``targets``: the method's tensors by module path and role. ``expert_layers``: those under nested ``base_layer``s,
    by how deep. ``copies``: of base weights that PEFT adds to a file, by parameter name.
    ``biases``: of modules, by path. ``named``: whole parameters by name. ``shared``: the method's own by name.
    """

    targets: dict[str, Tensors] = field(default_factory=lambda: defaultdict(dict))
    expert_layers: dict[str, dict[int, Tensors]] = field(default_factory=lambda: defaultdict(dict))
    tokens: Tensors = field(default_factory=dict)
    copies: Tensors = field(default_factory=dict)
    biases: Tensors = field(default_factory=dict)
    named: Tensors = field(default_factory=dict)
    shared: Tensors = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)

    def module_paths(self) -> set[str]:
        """Modules that the file speaks of, as it spells them."""
        owners = (name.rpartition(".")[0] for name in (*self.named, *self.copies))
        return {*self.targets, *self.expert_layers, *self.tokens, *self.biases, *owners}


def sort_tensors(tensors: Mapping[str, torch.Tensor], config: AdapterConfig, method: Tuner) -> SortedTensors:
    """Give every tensor its role. Whether the base has the places they name is not looked at here."""
    found = SortedTensors()
    suffixes = sorted(method.roles, key=len, reverse=True)
    shared_prefix = PREFIX.partition(".")[0] + "."
    for key, tensor in sorted(tensors.items()):
        if not key.startswith(PREFIX):
            name = key.removeprefix(shared_prefix)
            target = found.shared if name in method.shared and key != name else None
            _put(found, target, name, tensor, key)
            continue
        name = key.removeprefix(PREFIX)
        suffix = next((s for s in suffixes if name.endswith("." + s)), None)
        if suffix is not None:
            _put_role(found, config, name.removesuffix("." + suffix), method.roles[suffix], tensor, key)
        else:
            _put_named(found, config, name, tensor, key)
    return found


def _put(found: SortedTensors, group: Tensors | None, name: str, tensor: torch.Tensor, key: str) -> None:
    if group is None:
        found.unknown.append(key)
    elif name in group and not torch.equal(group[name], tensor):
        found.repeated.append(key)
    else:
        group[name] = tensor


def _put_role(
    found: SortedTensors, config: AdapterConfig, name: str, role: str, tensor: torch.Tensor, key: str
) -> None:
    path, depth = _BASE_LAYER.subn("", name)
    attention = path.removesuffix(".out_proj")
    if depth == 1 and attention != path and name == f"{attention}.base_layer.out_proj":
        _put(found, found.targets[attention], role + "2", tensor, key)
    elif depth and config.document.get("target_parameters"):
        _put(found, found.expert_layers[path].setdefault(depth, {}), role, tensor, key)
    elif depth:
        found.unknown.append(key)
    else:
        _put(found, found.targets[path], role, tensor, key)


def _put_named(found: SortedTensors, config: AdapterConfig, name: str, tensor: torch.Tensor, key: str) -> None:
    if config.peft_type == "LN_TUNING":
        name = name.replace(".ln_tuning_layers.", ".")
    plain, depth = _BASE_LAYER.subn("", name)
    path, _, leaf = plain.rpartition(".")
    tokens = _TOKENS.fullmatch(plain)
    wrapped = _WRAPPED.fullmatch(plain)
    if _TRAINING_ONLY.fullmatch(name):
        found.ignored.append(key)
    elif tokens:
        _put(found, found.tokens, tokens["path"], tensor, key)
    elif wrapped and "bias" in wrapped["name"] and config.bias == "all":
        # PEFT repeats a saved module's biases, and the untouched ones they replace.
        if wrapped["wrapper"] == "original_module":
            found.ignored.append(key)
        else:
            _put(found, found.named, f"{wrapped['path']}.{wrapped['name']}", tensor, key)
    elif depth and leaf == "weight":
        _put(found, found.copies, plain.replace(".token_adapter.", "."), tensor, key)
    elif depth and not (leaf == "bias" and config.bias != "none"):
        found.unknown.append(key)
    elif depth and leaf == "bias":
        _put(found, found.biases, path, tensor, key)
    else:
        _put(found, found.named, plain, tensor, key)


def listed(names: Iterable[str], most: int = 8) -> str:
    """A few names of many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    shown = (name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…" for name in names[:most])
    return ", ".join(name or "''" for name in shown) + more
