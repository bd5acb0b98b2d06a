"""Over a quantized base, and out to 4-bit factors: trained, evaluated, merged, saved, reloaded, trained further."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LLAMA, assert_bit_equal, logits, make_trainer, settings, tensors
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lora_svd import LoraSVDError, NumericalError
from lora_svd.cli.report import bytes_by_part
from lora_svd.compact import LowRankLinear, bnb, densify, parameter_report
from lora_svd.compact import quantized as quantized_module
from lora_svd.compact.bnb import full_precision
from lora_svd.compact.convert import dense_weight
from lora_svd.compact.quantized import quantize_modules
from lora_svd.compact.rounding import nearest_levels
from lora_svd.tuner.layer import LoraSVDLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt:UserWarning",  # bitsandbytes computes 8 bits in float16
    "ignore:merge_and_unload. the compact layers take:UserWarning",  # tiny layers: the scales outweigh the savings
)
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# Wide enough for ranks that are multiples of 64, what 4-bit kernels take.
SIZES = {"hidden_size": 192, "intermediate_size": 384}
BASES = {
    "none": None,
    "nf4": NF4,
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-double-bfloat16": {**NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    LLAMA.build(**SIZES).save_pretrained(folder)
    return folder


def quantization(**changes: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**{**NF4, "bnb_4bit_use_double_quant": True, **changes})


def load(folder: Path, **changes: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **changes)


def tuned(dense: Path, folder: Path, base: str = "none", **changes: Any) -> PeftModel:
    """Trained over a base of that kind, with an evaluation after every step."""
    given = BASES[base]
    model: Any = load(dense, **({"quantization_config": BitsAndBytesConfig(**given)} if given else {}))
    if given:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(3)
    tuned = get_peft_model(model, settings(**{"factor_format": "factors", "rank_multiple": 64, **changes}))
    make_trainer(tuned, folder, eval_strategy="steps", eval_steps=1, prediction_loss_only=True).train()
    return tuned.eval()


@pytest.mark.parametrize("exported", [False, True], ids=["full", "nf4"])
@pytest.mark.parametrize("base", BASES)
def test_round_trip(base: str, exported: bool, dense: Path, tmp_path: Path) -> None:
    """With a layer left out of the compression, which stays as the base has it, or is rounded like the rest."""
    model = tuned(dense, tmp_path / "run", base, exclude_modules=["gate_proj"])
    compact: Any = model.merge_and_unload(**({"quantization_config": quantization()} if exported else {}))
    assert any(isinstance(module, LowRankLinear) for module in compact.modules())
    expected = logits(compact)
    compact.save_pretrained(tmp_path / "compact")
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(reloaded), expected)
    assert parameter_report(reloaded) == parameter_report(compact)
    reloaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    has_quantized = exported or base != "none"
    assert reloaded.is_quantized == compact.is_quantized == has_quantized
    assert getattr(reloaded, "is_loaded_in_4bit", False) == (exported or "4" in base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("prepared", [False, True])
def test_runs_in_one_type(dtype: torch.dtype, bits: str, prepared: bool, dense: Path, tmp_path: Path) -> None:
    """In that of what the base does not quantize, which ``prepare_model_for_kbit_training`` makes float32."""
    quantization = BitsAndBytesConfig(load_in_4bit=bits == "4", load_in_8bit=bits == "8")
    base: Any = load(dense, quantization_config=quantization, dtype=dtype)
    if prepared:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    expected_dtype = base.get_input_embeddings().weight.dtype
    assert expected_dtype == (torch.float32 if prepared else dtype)
    torch.manual_seed(3)
    model = get_peft_model(base, settings(factor_format="factors", exclude_modules=["gate_proj"], neurons=False))
    make_trainer(model, tmp_path / "run").train()
    expected = logits(model)
    compact: Any = model.merge_and_unload()
    answers = logits(compact)
    torch.testing.assert_close(answers, expected, rtol=0, atol=0.1)
    compact.save_pretrained(tmp_path / "compact")
    for each in (compact, load(tmp_path / "compact")):
        assert {p.dtype for p in each.parameters() if p.is_floating_point()} == {expected_dtype}
        assert torch.equal(logits(each), answers)
        each.train()(**LLAMA.inputs()).loss.backward()
    dense_again = densify(load(tmp_path / "compact"))
    assert {parameter.dtype for parameter in dense_again.parameters()} == {expected_dtype}
    torch.testing.assert_close(logits(dense_again), answers, rtol=0, atol=0.05)


@pytest.mark.filterwarnings("ignore:rank_multiple. got 1 with a quantization_config")
@pytest.mark.parametrize("rank_multiple", [1, 64])  # ranks that are filled up, and such that need not be
def test_rounded_factors_train_further(rank_multiple: int, dense: Path, tmp_path: Path) -> None:
    """QLoRA on the 4-bit compact model, after it was evaluated."""
    model = tuned(dense, tmp_path / "run", rank_multiple=rank_multiple)
    model.merge_and_unload(quantization_config=quantization()).save_pretrained(tmp_path / "compact")
    compact = prepare_model_for_kbit_training(load(tmp_path / "compact"), use_gradient_checkpointing=False)
    logits(compact)
    qlora = get_peft_model(compact, LoraConfig(r=2, target_modules=["left", "right"], init_lora_weights=False))
    before = tensors(qlora)
    loss = qlora(**LLAMA.inputs()).loss
    loss.backward()
    gradients = [p.grad for name, p in qlora.named_parameters() if "lora_A" in name]
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    make_trainer(qlora, tmp_path / "more", callbacks=[]).train()
    after = tensors(qlora)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_gradients_are_those_of_a_base_that_was_never_evaluated(dense: Path) -> None:
    """Before it is wrapped, and between steps; bitsandbytes would repack the weights."""

    def gradients(*, evaluated: bool) -> dict[str, torch.Tensor]:
        model: Any = load(dense, quantization_config=quantization())
        torch.manual_seed(3)
        wrapped = get_peft_model(model, settings(init_weights=False))
        if evaluated:
            logits(wrapped)
        wrapped.train()
        wrapped(**LLAMA.inputs()).loss.backward()
        return {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}

    assert_bit_equal(gradients(evaluated=True), gradients(evaluated=False))


@pytest.mark.parametrize("importance", ["lora", "lora_diagonal", "lora_activation", "kronecker"])
def test_one_dequantized_weight_at_a_time(
    importance: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In observation, factorization, absorption and export, whichever importance."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    original = LoraSVDLinear.dense_weight

    def watched(layer: LoraSVDLinear) -> torch.Tensor:
        nonlocal most
        weight = original(layer)
        alive[:] = [reference for reference in alive if reference() is not None] + [weakref.ref(weight)]
        most = max(most, len(alive))
        return weight

    monkeypatch.setattr(LoraSVDLinear, "dense_weight", watched)
    tuned(dense, tmp_path / "run", "nf4", importance=importance).merge_and_unload(quantization_config=quantization())
    assert most == 1


def test_what_was_switched_off_is_switched_on_again(dense: Path) -> None:
    model: Any = load(dense, quantization_config=quantization())
    layer = model.model.layers[0].mlp.up_proj
    layer.support_avx512bf16_for_cpu = True  # as bitsandbytes sets it on CPUs that have it
    wrapped = get_peft_model(model, settings(target_modules=["q_proj"]))
    assert not layer.support_avx512bf16_for_cpu
    assert wrapped.unload().model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu


def test_observed_inputs_make_the_rounding_better(dense: Path, tmp_path: Path) -> None:
    """The outputs on what was observed, against rounding to nearest."""
    model = tuned(dense, tmp_path / "run", neurons=False)
    model.save_pretrained(tmp_path / "adapter")
    name = "model.layers.0.mlp.down_proj"
    gram = model.base_model.model.get_submodule(name).statistics("default").mean("input_gram")

    def weight(compact: nn.Module) -> torch.Tensor:
        return dense_weight(compact.get_submodule(name))

    full: Any = model.merge_and_unload()
    again = PeftModel.from_pretrained(load(dense), str(tmp_path / "adapter"))
    exact, aware = weight(full), weight(again.merge_and_unload(quantization_config=quantization()))
    quantize_modules(full, quantization())
    costs = [float(((error @ gram) * error).sum()) for error in (aware - exact, weight(full) - exact)]
    assert costs[0] < 0.7 * costs[1]


@pytest.mark.parametrize("shape", [(7, 33), (10, 64)])  # an odd number of weights, blocks across rows; whole blocks
def test_codes_are_packed_as_bitsandbytes_reads_them(shape: tuple[int, int]) -> None:
    """Rounded in a metric without correlations, which is rounding to nearest on the same grid."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = quantized_module._quantized(weight, quantization(), torch.eye(shape[1]), nn.Parameter(weight[:, 0].clone()))
    state = layer.weight.quant_state
    scale = bnb.scale_of_each(state)
    expected = scale * state.code[nearest_levels(weight.double() / scale.double(), state.code.double())]
    torch.testing.assert_close(full_precision(layer), expected)
    assert torch.equal(layer.bias, weight[:, 0])


def test_a_weight_that_comes_back_changed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "full_precision", lambda layer: torch.zeros(layer.out_features, 64))
    with pytest.raises(NumericalError, match=r"relative error of 1\.00, expected 0"):
        quantized_module._quantized(torch.ones(8, 64), quantization(), None, None)


def test_report_counts_numbers_and_bytes(dense: Path, tmp_path: Path) -> None:
    model = tuned(dense, tmp_path / "run", target_modules=["up_proj"])
    compact: Any = model.merge_and_unload(quantization_config=quantization())
    size, numbers = parameter_report(compact), 64 * (192 + 384)
    for layer in size.layers.values():
        assert (layer.rank, layer.parameters) == (64, numbers)
        assert numbers / 2 < layer.bytes < 0.6 * numbers
    assert size.parameters == size.dense_parameters - 2 * (192 * 384 - numbers)
    assert sum(bytes_by_part(compact).values()) == size.bytes


def test_ranks_are_filled_up_where_that_is_smaller(dense: Path, tmp_path: Path) -> None:
    """32 becomes 64; 96 would become 128, which for a square layer is no smaller than the product of the factors."""
    given = {"mlp.up_proj": 32, "self_attn.q_proj": 96}
    ranks = {f"model.layers.{i}.{name}": rank for i in range(2) for name, rank in given.items()}
    model = tuned(dense, tmp_path / "run", target_modules=["up_proj", "q_proj"], compact_ranks=ranks, param_ratio=0.99)
    compact: Any = model.merge_and_unload(quantization_config=quantization())
    layer = compact.model.layers[0]
    assert layer.mlp.up_proj.rank == layer.mlp.up_proj.left.in_features == 64
    assert type(layer.self_attn.q_proj).__name__ == "Linear4bit"
    expected = logits(compact)
    compact.save_pretrained(tmp_path / "compact")
    assert torch.equal(logits(load(tmp_path / "compact")), expected)


def test_says_that_ranks_will_be_filled_up(dense: Path, tmp_path: Path) -> None:
    model = tuned(dense, tmp_path / "run", rank_multiple=8)
    with pytest.warns(UserWarning, match="rank_multiple: got 8 with a quantization_config, expected 64"):
        compact: Any = model.merge_and_unload(quantization_config=quantization())
    assert parameter_report(compact).param_ratio > 0.6


def test_says_when_the_export_is_larger_than_its_base(dense: Path, tmp_path: Path) -> None:
    model = tuned(dense, tmp_path / "run", "nf4")
    with pytest.warns(UserWarning, match=r"compact layers take [\d,]+ bytes, the weights they replace [\d,]+"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    ("config", "compact", "message"),
    [
        ({"load_in_8bit": True}, True, "quantization_config: got load_in_4bit=False"),
        (NF4, False, "quantization_config: got one for a dense model"),
    ],
)
def test_refused(config: dict[str, Any], compact: bool, message: str, dense: Path) -> None:
    model = get_peft_model(load(dense), settings(factor_format="factors"))
    with pytest.raises(LoraSVDError, match=message):
        model.merge_and_unload(compact=compact, quantization_config=BitsAndBytesConfig(**config))


def test_missing_bitsandbytes_is_named(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_module, "is_bitsandbytes_available", lambda: False)
    model = get_peft_model(load(dense), settings(factor_format="factors"))
    with pytest.raises(LoraSVDError, match="pip install bitsandbytes"):
        model.merge_and_unload(quantization_config=quantization())


def test_pivoted_factors_are_refused_before_anything_changes(dense: Path, tmp_path: Path) -> None:
    """With the way out, which the message gives."""
    model = tuned(dense, tmp_path / "run", factor_format="pivoted")
    with pytest.raises(LoraSVDError, match="factor_format: got 'pivoted' with a quantization_config"):
        model.merge_and_unload(quantization_config=quantization())
    model.peft_config["default"].factor_format = "factors"
    model.base_model.set_param_ratio(0.6)
    compact = model.merge_and_unload(quantization_config=quantization())
    assert any(isinstance(module, LowRankLinear) and module.rank == 64 for module in compact.modules())
