"""A transformers model -> what validation needs to know of it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapter_router.adapters.base_spec import Shape, TargetSpec

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def target_specs(model: nn.Module) -> dict[str, TargetSpec]:
    """Modules that adapters can act on, by path."""
    specs: dict[str, TargetSpec] = {}
    for path, module in model.named_modules():
        spec = _target_spec(module)
        if spec is not None:
            specs[path] = spec
    return specs


def shiftable_modules(model: nn.Module) -> frozenset[str]:
    """Modules whose last step is to add their bias to the last dimension (a convolution's: to its channels)."""
    kinds = (nn.Linear, Conv1D, nn.LayerNorm, *_CONVOLUTIONS)
    return frozenset(
        path
        for path, module in model.named_modules()
        if isinstance(module, kinds) and getattr(module, "bias", None) is not None
    )


def label_axes(fewer: nn.Module, more: nn.Module) -> dict[str, int]:
    """Parameters whose shape differs between two models that differ in their number of labels -> the axis."""
    shapes = {name: tensor.shape for name, tensor in more.state_dict().items()}
    return {
        name: next(axis for axis, size in enumerate(tensor.shape) if size != shapes[name][axis])
        for name, tensor in fewer.state_dict().items()
        if tensor.shape != shapes[name]
    }


def parameter_shapes(model: nn.Module) -> dict[str, Shape]:
    """Shapes of all parameters and buffers that a checkpoint holds, and of tied ones under each of their names."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def transposed_experts(model: nn.Module) -> frozenset[str]:
    """Modules that say their stacked weights are stored as (experts, in, out)."""
    return frozenset(path for path, module in model.named_modules() if getattr(module, "is_transposed", False))


def input_embedding(model: PreTrainedModel) -> str | None:
    """Path of the table that turns token ids into vectors."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    paths = [path for path, module in model.named_modules() if module is table]
    return paths[0] if paths and isinstance(table, nn.Embedding) else None


def tied_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Other modules whose weight is the input embedding's own: output layers, an encoder-decoder's tables."""
    embedding = input_embedding(model)
    if embedding is None:
        return ()
    weight = model.get_submodule(embedding).weight
    return tuple(
        path
        for path, module in model.named_modules()
        if path != embedding and module._parameters.get("weight") is weight  # a quantised one would be dequantised
    )


def _target_spec(module: nn.Module) -> TargetSpec | None:
    has_bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return TargetSpec("attention", module.embed_dim, 3 * module.embed_dim, module.in_proj_bias is not None)
    if isinstance(module, nn.Linear | Conv1D):
        transposed = isinstance(module, Conv1D)
        shape = reversed(module.weight.shape) if transposed else module.weight.shape
        out_features, in_features = shape
        return TargetSpec("linear", in_features, out_features, has_bias, transposed=transposed)
    if isinstance(module, nn.Embedding):
        return TargetSpec("embedding", module.num_embeddings, module.embedding_dim)
    if isinstance(module, _CONVOLUTIONS) and _is_plain(module):
        return TargetSpec(
            "conv", module.in_channels, module.out_channels, has_bias, tuple(module.kernel_size), module.groups
        )
    return None


def _is_plain(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """PEFT passes neither dilation nor the padding mode on to its own convolutions."""
    return set(module.dilation) == {1} and module.padding_mode == "zeros"
