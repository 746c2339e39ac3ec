"""What a base's checkpoint says about itself: its digest and fingerprint, its tokenizer, the inputs it takes."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from adapter_router.engine.inputs import TEXT_FEATURES, InputLimits
from adapter_router.quantization.scratch import one_at_a_time
from adapter_router.quantization.weights import ServedTensors

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
_WEIGHTS = "model.safetensors"


def check_digest(source: str, expected: str | None) -> None:
    """Raises ValueError when the weights in ``source`` are not those ``expected`` names."""
    if expected is None:
        return
    path = Path(source) / _WEIGHTS
    if not path.is_file():
        raise ValueError(f"base {source!r} has no {_WEIGHTS} to compare with base_sha256")
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise ValueError(f"base {source!r}: {_WEIGHTS} has sha256 {actual}, expected {expected}")


def device_of(name: str) -> torch.device:
    """The device that a configuration names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def read_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer; None where it has none."""
    # Without this look transformers builds an empty tokenizer for a directory that has none.
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in _TOKENIZER_FILES):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    return tokenizer


def input_limits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> InputLimits:
    """What the base's configuration, tables and tokenizer let in."""
    config: PretrainedConfig = model.config
    positions = getattr(config, "max_position_embeddings", None) or 0
    max_tokens = positions if positions > 0 else 1 << 30
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from padding_idx + 1, so that many rows of its table are never used.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            max_tokens = min(max_tokens, module.num_embeddings - unused)
    if tokenizer is not None:
        max_tokens = min(max_tokens, tokenizer.model_max_length)
    accepted = inspect.signature(model.forward).parameters
    features = tuple(name for name in TEXT_FEATURES if name in accepted)
    type_vocab_size = getattr(config, "type_vocab_size", None) or 1
    return InputLimits(
        config.vocab_size, max_tokens, features, config.pad_token_id, type_vocab_size, _long_from(config)
    )


def _long_from(config: PretrainedConfig) -> int:
    """From how many tokens on rotary positions are scaled: the longest row of a batch decides for all of it."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "dynamic"):
        return 1 << 62
    own = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(own or config.max_position_embeddings) + 1


def fingerprint_of(model: PreTrainedModel, untrained: frozenset[str]) -> str:
    """sha256 over names and bytes of all weights that came from the checkpoint, as they are served.

    Of a quantised base these are the dequantised ones: whoever holds them written out has the same base.
    """
    hasher = hashlib.sha256(model.config.model_type.encode())
    tensors = ServedTensors(model, model.state_dict())
    for name in sorted(set(tensors) - untrained):
        with one_at_a_time():
            tensor = tensors[name]
            hasher.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return "sha256:" + hasher.hexdigest()
