"""How much memory the parts of a run take beyond what they leave."""

from __future__ import annotations

import pytest
import torch
from memory import PeakMemory
from peft import get_peft_model
from torch import nn

from lora_svd import LoraSVDConfig

SIZE = 128


def factorization(num_layers: int, importance: str) -> tuple[int, int]:
    """Bytes at the peak of the factorization of equal layers in bfloat16, and of the factors it leaves."""
    names = [str(index) for index in range(num_layers)]
    base = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in names)).bfloat16()
    config = LoraSVDConfig(
        target_modules=names, importance=importance, allocation="uniform", r=4, param_ratio=0.6, rank_multiple=1
    )
    model = get_peft_model(base, config)
    model(torch.randn(4, 64, SIZE, dtype=torch.bfloat16)).square().sum().backward()
    model.base_model.update_and_allocate(0, total_steps=10)
    with PeakMemory() as memory:
        model.base_model.run().apply(model.base_model.run().compressed_to(0.6))
    left = [factors for layer in model.base_model.run().layers.values() if (factors := layer.factors("default"))]
    return memory.peak, sum(2 * (factors.left.numel() + factors.right.numel()) for factors in left)


@pytest.mark.parametrize("importance", ["lora_activation", "kronecker"])
def test_one_layer_at_a_time_is_factorized(importance: str) -> None:
    one_layer = factorization(1, importance)[0]
    peak, left = factorization(12, importance)
    spectra = 12 * SIZE * 8
    assert left > 10 * SIZE * SIZE
    assert peak < 1.2 * one_layer + left + spectra
