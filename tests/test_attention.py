"""LoRA on ``nn.MultiheadAttention``, whose projections are never called: the module runs with changed weights.

PEFT adds the output projection's change twice; an adapter trained with it must be served so.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapter_router.adapters.delta import ModuleDelta
from adapter_router.engine.placing import attention_changes
from adapter_router.engine.resident import ChangedModule


class Pooling(nn.Module):
    """As in SigLIP's head: one query asks all tokens."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, bias=bias)
        self.query = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.attention(self.query.expand(len(x), 1, -1), x, x)[0]
        return answer


@pytest.mark.parametrize("bias", [True, False])
def test_equals_peft_and_leaves_the_base_as_it_was(bias: bool) -> None:
    torch.manual_seed(0)
    base = Pooling(bias).eval()
    x = torch.randn(3, 5, 16)
    untouched = base(x)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = LoraConfig(target_modules=["attention"], r=4, lora_alpha=6, init_lora_weights=False)
    saved = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    peft = Pooling(bias).eval()
    peft.load_state_dict(saved)
    model = get_peft_model(peft, config).eval()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    inner = "base_model.model.attention.base_layer.out_proj.lora_{}.default.weight"
    outer = "base_model.model.attention.lora_{}.default.weight"
    delta = ModuleDelta(
        a=tensors[outer.format("A")],
        b=tensors[outer.format("B")],
        scaling=6 / 4,
        a2=tensors[inner.format("A")],
        b2=tensors[inner.format("B")],
    )
    changed = ChangedModule(base.attention, attention_changes(delta))
    with torch.inference_mode():
        expected = model(x)
        answer = changed(base.query.expand(len(x), 1, -1), x, x)[0]
        assert (expected - untouched).abs().max() > 0.1
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(base(x), untouched, atol=0, rtol=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
