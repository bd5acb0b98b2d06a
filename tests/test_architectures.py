"""Every architecture becomes a compact model, and what cannot become one is refused or passed over by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from models import (
    ARCHITECTURES,
    LLAMA,
    Architecture,
    assert_bit_equal,
    assert_kept,
    assert_plain,
    logits,
    make_trainer,
    settings,
    tensors,
    trained,
    wrap,
)
from peft import get_peft_model
from torch import Tensor, nn

from lora_svd import LoraSVDError
from lora_svd.compact import densify, parameter_report

MAMBA = ARCHITECTURES["mamba"]
FUSED = "ignore:.* are in 3-D weights:UserWarning"


@pytest.mark.filterwarnings(FUSED)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_comes_out_plain_smaller_equal_after_reloading_and_dense_again(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    classes = {name: type(module) for name, module in architecture.build().named_modules()}
    model = trained(tmp_path / "run", architecture)
    before = logits(model, architecture)
    compact = model.merge_and_unload()
    assert_plain(compact)
    assert_kept(compact, 0.6)
    after = logits(compact, architecture)
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)  # the bypass is absorbed into the same rank
    compact.save_pretrained(tmp_path / "compact")
    reloaded = architecture.model.from_pretrained(tmp_path / "compact")
    assert_bit_equal(tensors(reloaded), tensors(compact))
    # equal tensors at other addresses may be multiplied by other kernels
    torch.testing.assert_close(logits(reloaded, architecture), after, rtol=1e-6, atol=2e-6)
    assert parameter_report(reloaded) == parameter_report(compact)

    densify(reloaded).save_pretrained(tmp_path / "dense")
    dense, info = architecture.model.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    assert {name: type(module) for name, module in dense.named_modules()} == classes
    torch.testing.assert_close(logits(dense, architecture), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_fused_experts_are_named_with_their_share(name: str) -> None:
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    fused = {key: p.numel() for key, p in base.named_parameters() if key.endswith(("gate_up_proj", "down_proj"))}
    fused = {key: size for key, size in fused.items() if base.get_parameter(key).dim() == 3}
    assert len(fused) == 4
    share = sum(fused.values()) / sum(parameter.numel() for parameter in base.parameters())
    with pytest.warns(UserWarning, match=rf"^{share:.1%} of .* 3-D weights .*experts\.gate_up_proj and 3 more\. param"):
        wrap(architecture)


class Reads(nn.Module):
    """Computes with the weight of a linear layer that it does not call."""

    def __init__(self, hidden: int, name: str = "inner") -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.get_submodule(self.name)
        return F.linear(x, inner.weight, inner.bias)


class Router(nn.Linear):
    """A linear layer that does something with its outputs, as in Llama 4."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


class Attends(nn.MultiheadAttention):
    """torch's own attention reads the weight of its ``out_proj``."""

    def forward(self, x: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, x, x, need_weights=False)[0]


def with_mlp(mlp: Callable[[], nn.Module]) -> tf.PreTrainedModel:
    base = LLAMA.build()
    base.model.layers[1].mlp = mlp()
    return base


@pytest.mark.parametrize(
    ("base", "architecture", "bypassed", "suffix"),
    [
        (MAMBA.build, MAMBA, "layers.0.mixer.dt_proj and 1 more", "dt_proj"),
        (lambda: with_mlp(lambda: Reads(32)), LLAMA, "layers.1.mlp.inner", "inner"),
        (lambda: with_mlp(lambda: Attends(32, 4)), LLAMA, "layers.1.mlp.out_proj", "out_proj"),
        (lambda: with_mlp(lambda: nn.Sequential(nn.Linear(32, 32), Reads(32, "0"))), LLAMA, "layers.1.mlp.1.0", "1.0"),
    ],
)
@pytest.mark.parametrize("importance", ["lora_activation", "none"])
def test_layer_that_the_model_goes_round_is_refused_in_the_first_step(
    base: Callable[[], tf.PreTrainedModel],
    architecture: Architecture,
    bypassed: str,
    suffix: str,
    importance: str,
    tmp_path: Path,
) -> None:
    model = get_peft_model(base(), settings(importance=importance))
    trainer = make_trainer(model, tmp_path, architecture)
    with pytest.raises(LoraSVDError, match=rf"weights of \S*{bypassed} .*exclude_modules=\['{suffix}'\]$"):
        trainer.train()
    assert trainer.state.global_step == 0
    left_out = get_peft_model(base(), settings(importance=importance, exclude_modules=[suffix]))
    make_trainer(left_out, tmp_path, architecture).train()
    compact = left_out.merge_and_unload()
    assert torch.isfinite(logits(compact, architecture)).all()
    assert_kept(compact, 0.6)


def test_linear_layer_with_a_forward_of_its_own_is_refused(tmp_path: Path) -> None:
    key = "model.layers.1.mlp"
    with pytest.raises(TypeError, match=rf"{key} is Router, which is not supported.*exclude_modules=\['1\.mlp'\]$"):
        get_peft_model(with_mlp(lambda: Router(32, 32)), settings())
    model = get_peft_model(with_mlp(lambda: Router(32, 32)), settings(exclude_modules=["1.mlp"]))
    make_trainer(model, tmp_path).train()
    assert isinstance(model.merge_and_unload().model.layers[1].mlp, Router)


def test_layer_that_is_called_twice_is_observed_twice(tmp_path: Path) -> None:
    """DeBERTa sends its relative positions, too, through the projections of queries and keys."""
    layers = dict(trained(tmp_path, ARCHITECTURES["deberta"]).base_model._tuner_layers("default"))
    seen = {
        name: layers[f"deberta.encoder.layer.0.attention.self.{name}_proj"].statistics("default")
        for name in ("query", "value")
    }
    assert seen["query"].counts["token"] > seen["value"].counts["token"] > 0
    traces = {name: one.counts["token"] * one.mean("input_gram").trace() for name, one in seen.items()}
    assert traces["query"] > traces["value"]


def with_shared_projection() -> tf.PreTrainedModel:
    base = LLAMA.build()
    base.model.layers[0].self_attn.v_proj = base.model.layers[0].self_attn.k_proj
    return base


def test_module_with_two_names_is_refused() -> None:
    names = ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"]
    with pytest.raises(LoraSVDError, match=rf"{names[0]} is the same module as {names[1]}, expected") as caught:
        get_peft_model(with_shared_projection(), settings())
    assert str(names) in str(caught.value)
    get_peft_model(with_shared_projection(), settings(exclude_modules=names))
