"""Every architecture becomes a compact model, and what cannot become one is refused or passed over by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from models import (
    ARCHITECTURES,
    LABELS,
    LLAMA,
    SIZES,
    TOKENS,
    VISION,
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
from lora_svd.compact import LowRankLinear, densify, parameter_report
from lora_svd.compact.convert import is_plain_linear
from lora_svd.tuner.layer import LoraSVDLinear

MAMBA = ARCHITECTURES["mamba"]
FUSED = "ignore:.* are in 3-D weights:UserWarning"
SPLIT = "ignore:.*mixer.x_proj and 1 more. takes neurons one by one, but the model does not run without:UserWarning"


@pytest.mark.filterwarnings(FUSED, SPLIT)
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


class Scales(nn.Linear):
    """Computes a product in training, and something else in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * (1 if self.training else 2)


class Splits(nn.Linear):
    """Needs inputs of a certain shape."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).unflatten(-1, (4, 8)).flatten(-2)


class Multiplies(nn.Linear):
    """A plain product in other words, with an argument of its own."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        product = x.matmul(self.weight.mT) * scale
        return product if self.bias is None else product.add(self.bias)


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
@pytest.mark.filterwarnings(SPLIT)
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


def _captioner() -> tf.PreTrainedModel:
    """As in LLaVA, the language model is given what comes out of the last layer but one of the vision tower."""
    text = tf.LlamaConfig(**SIZES, num_key_value_heads=2, **TOKENS)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=text, image_token_index=63, vision_feature_layer=-2
    )
    return tf.LlavaForConditionalGeneration(config)


def _long(kind: type[tf.PreTrainedModel]) -> tf.PreTrainedModel:
    sizes = {**SIZES, "attention_window": 4, "max_position_embeddings": 64, "num_labels": LABELS}
    return kind(tf.LongformerConfig(**sizes, pad_token_id=1))


def _captions(num_images: int) -> list[dict[str, Tensor]]:
    rows = torch.randint(3, 60, (16, 12), generator=torch.Generator().manual_seed(1))
    rows[:, 1 : 1 + 4 * num_images] = 63
    images = {"pixel_values": torch.rand(3, 8, 8)} if num_images else {}
    return [{"input_ids": row, "labels": row.where(row != 63, -100), **images} for row in rows]


WITHOUT_A_PART = {
    "no images": (_captioner, lambda: _captions(0), "vision_tower.encoder.layers.0.self_attn.k_proj and 13 more"),
    "images": (_captioner, lambda: _captions(1), "vision_tower.encoder.layers.1.self_attn.k_proj and 5 more"),
    "no global tokens": (
        lambda: _long(tf.LongformerForMaskedLM),
        LLAMA.data,
        "longformer.encoder.layer.0.attention.self.query_global and 5 more",
    ),
    # of its last layer only the first token is used, which is a global one: gradients are there, and zero
    "global tokens": (
        lambda: _long(tf.LongformerForSequenceClassification),
        ARCHITECTURES["bert"].data,
        "longformer.encoder.layer.1.attention.self.query and 2 more",
    ),
    "pooler": (lambda: tf.BertModel(tf.BertConfig(**SIZES)), lambda: ARCHITECTURES["bert"].data(), "pooler.dense"),
}


@pytest.mark.parametrize("case", WITHOUT_A_PART)
def test_layers_without_a_part_in_the_loss_are_refused_in_the_first_step(case: str, tmp_path: Path) -> None:
    """By name, with what leaves these out and no others."""
    build, data, named = WITHOUT_A_PART[case]
    torch.manual_seed(0)
    base = build()
    if case == "pooler":
        base.register_forward_hook(_with_loss)
    model = get_peft_model(base, settings())
    trainer = make_trainer(model, tmp_path)
    trainer.train_dataset = data()
    with pytest.raises(LoraSVDError, match=rf"target_modules: \S*{named} had no part in the loss") as caught:
        trainer.train()
    assert trainer.state.global_step == (case == "global tokens")
    (advice,) = re.findall(r"exclude_modules=(.*); or let", str(caught.value))
    torch.manual_seed(0)
    base = build()
    if case == "pooler":
        base.register_forward_hook(_with_loss)
    left_out = get_peft_model(base, settings(exclude_modules=ast.literal_eval(advice)))
    num_left_out = int((re.findall(r"and (\d+) more", named) or [0])[0]) + 1
    counts = [sum(isinstance(m, LoraSVDLinear) for m in each.modules()) for each in (model, left_out)]
    assert counts[0] - counts[1] == num_left_out
    trainer = make_trainer(left_out, tmp_path)
    trainer.train_dataset = data()
    trainer.train()
    assert_kept(left_out.merge_and_unload(), 0.6)


def _with_loss(_model: nn.Module, _args: Any, outputs: Any) -> Any:
    outputs["loss"] = outputs.last_hidden_state.square().mean()
    return outputs


@pytest.mark.parametrize("importance", ["lora_activation", "lora"])
def test_layers_that_only_some_batches_use_are_named_in_a_warning(importance: str) -> None:
    """Experts without tokens, and a block that is dropped at random, as LayerDrop does."""

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([Expert() for _ in range(3)])
            self.spare = nn.Linear(8, 8)

        def forward(self, x: Tensor, which: list[int]) -> Tensor:
            for index in which:
                x = x + self.experts[index](x)
            return x + self.spare(x[:0]).sum() if 2 not in which else x + self.spare(x)

    torch.manual_seed(0)
    config = settings(importance=importance, target_modules=["inner", "spare"], total_steps=4, warmup=2)
    model = get_peft_model(Mixture(), config)
    model.train()(torch.randn(4, 8), [0]).square().sum().backward()
    with pytest.warns(UserWarning, match=r"^experts\.1\.inner and 1 more had no part in the loss of the first batch"):
        model.base_model.update_and_allocate(0)
    for step in (1, 2):
        model.zero_grad()
        model(torch.randn(4, 8), [0, 1, 2]).square().sum().backward()
        model.base_model.update_and_allocate(step)
    assert model.base_model.current_param_ratio() <= 0.6


@pytest.mark.parametrize("kind", [Router, Scales, Splits])
def test_linear_layer_that_computes_something_else_is_refused(kind: type[nn.Linear], tmp_path: Path) -> None:
    key, name = "model.layers.1.mlp", kind.__name__
    with pytest.raises(TypeError, match=rf"{key} is {name}, which is not supported.*exclude_modules=\['1\.mlp'\]$"):
        get_peft_model(with_mlp(lambda: kind(32, 32)), settings())
    model = get_peft_model(with_mlp(lambda: kind(32, 32)), settings(exclude_modules=["1.mlp"]))
    make_trainer(model, tmp_path).train()
    assert isinstance(model.merge_and_unload().model.layers[1].mlp, kind)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_layer_that_writes_the_product_itself_is_compressed(bias: bool, tmp_path: Path) -> None:
    """Also without memory, as streaming has it."""
    with torch.device("meta"):
        layer, before = Multiplies(32, 32, bias=bias), torch.get_rng_state()
        assert is_plain_linear(layer)
        assert torch.equal(torch.get_rng_state(), before)  # which the start of the bypasses is drawn with
        assert not is_plain_linear(Router(32, 32, bias=bias))
    model = get_peft_model(with_mlp(lambda: Multiplies(32, 32, bias=bias)), settings(target_modules=["1.mlp"]))
    make_trainer(model, tmp_path).train()
    compact = model.merge_and_unload()
    layer = compact.model.layers[1].mlp
    assert isinstance(layer, LowRankLinear)
    assert (layer.bias is not None) == bias


def test_layer_that_is_called_twice_is_observed_twice(tmp_path: Path) -> None:
    """DeBERTa sends its relative positions, too, through the projections of queries and keys."""
    layers = trained(tmp_path, ARCHITECTURES["deberta"]).base_model.run().layers
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
