"""Analysis of a matrix against dense float64 references; of a model in memory, on disk and with an adapter."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES, LLAMA, SIZES, trained, wrap
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_svd import LoraSVDError, NumericalError
from lora_svd.analysis import summary as analysis
from lora_svd.analysis.models import analyze_adapter, analyze_folder, analyze_model
from lora_svd.analysis.summary import (
    analyze_layer,
    depth_and_projection,
    feature_spectrum,
    summarize_entries,
    weight_spectrum,
)
from lora_svd.analysis.weights import folder_weights, model_weights
from lora_svd.compact import LowRankLinear, tensors
from lora_svd.compact.convert import dense_weight
from lora_svd.compression import compute_spectra

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes quantizes rows of 32 numbers badly
NF4 = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


class TestSpectrum:
    @pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
    def test_against_the_singular_values(self, shape: tuple[int, int]):
        weight = torch.randn(shape) @ torch.diag(torch.linspace(0.01, 3, shape[1]))
        s = torch.linalg.svdvals(weight.double())
        p = s / s.sum()
        found = weight_spectrum(weight)
        torch.testing.assert_close(found.singular_values, s, rtol=1e-9, atol=1e-9)
        assert found.size == 12
        assert found.energy == pytest.approx(float(weight.double().square().sum()))
        assert found.largest == pytest.approx(float(torch.linalg.matrix_norm(weight.double(), 2)))
        assert found.nuclear_norm == pytest.approx(float(torch.linalg.matrix_norm(weight.double(), "nuc")))
        assert found.stable_rank == pytest.approx(float((s**2).sum() / s[0] ** 2))
        assert found.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())))
        for rank, share in ((found.rank_90, 0.9), (found.rank_95, 0.95), (found.rank_99, 0.99)):
            kept = (s**2).cumsum(0) / (s**2).sum()
            assert kept[rank - 1] >= share > (kept[rank - 2] if rank > 1 else 0)

    def test_of_known_matrices(self):
        flat, single, zero = (weight_spectrum(m) for m in (torch.eye(10), torch.ones(5, 8), torch.zeros(4, 6)))
        assert flat.stable_rank == pytest.approx(10)
        assert flat.effective_rank == pytest.approx(10)
        assert (flat.rank_90, flat.rank_95, flat.rank_99) == (9, 10, 10)
        assert single.effective_rank == pytest.approx(1, abs=1e-5)
        assert (single.rank_90, single.rank_99) == (1, 1)
        assert (zero.stable_rank, zero.effective_rank, zero.rank_99, zero.energy_kept(1)) == (0, 0, 0, 0)

    def test_does_not_depend_on_scale(self):
        weight = torch.randn(8, 10)
        one, other = (weight_spectrum(c * weight).numbers() for c in (1, 1e-3))
        for name in ("stable_rank", "effective_rank", "rank_90", "effective_rank_share"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)

    def test_features_are_those_of_the_data_not_squared_again(self):
        """The Gram matrix of rows x is a spectrum of the matrix of rows."""
        x = torch.randn(200, 7, dtype=torch.float64) * torch.linspace(0.1, 2, 7)
        found, data = feature_spectrum(x.T @ x / 200), weight_spectrum(x)
        assert found.effective_rank == pytest.approx(data.effective_rank)
        assert found.stable_rank == pytest.approx(data.stable_rank)
        torch.testing.assert_close(found.singular_values, data.singular_values / math.sqrt(200))

    def test_energy_kept(self):
        found = weight_spectrum(torch.diag(torch.tensor([3.0, 4.0])))
        assert [found.energy_kept(share) for share in (0, 0.5, 1)] == pytest.approx([0, 16 / 25, 1])

    @pytest.mark.parametrize(
        ("energies", "message"),
        [
            (torch.tensor([]), "got no values, expected squared singular values"),
            (torch.tensor([1.0, float("nan")]), "expected finite numbers, none negative"),
            (torch.tensor([-0.1, 1.0]), "got energies from -0.1 to 1, expected finite numbers, none negative"),
        ],
    )
    def test_refuses(self, energies: Tensor, message: str):
        with pytest.raises((LoraSVDError, NumericalError), match=message):
            analysis.summarize_spectrum(energies)


class TestEntries:
    def test_against_the_moments(self):
        weight = torch.distributions.Laplace(0.1, 2.0).sample((400, 500))
        w = weight.double()
        found = summarize_entries(weight)
        assert found.variance == pytest.approx(float(((w - w.mean()) ** 2).mean()))
        assert found.kurtosis == pytest.approx(float(((w - w.mean()) ** 4).mean()) / found.variance**2 - 3)
        assert found.kurtosis == pytest.approx(3, abs=0.3)
        # P(|w - m| > 6 deviations) = exp(-6 sqrt(2)) for Laplace's distribution
        assert found.outliers == pytest.approx(math.exp(-6 * math.sqrt(2)), rel=0.5)
        assert found.largest_deviation == pytest.approx(float(w.abs().max()) / found.variance**0.5)

    def test_of_a_normal_distribution(self):
        found = summarize_entries(torch.randn(500, 500))
        assert found.kurtosis == pytest.approx(0, abs=0.05)
        assert found.outliers == 0

    def test_sparsity_counts_zeros_and_what_is_next_to_nothing(self):
        weight = torch.ones(4, 4)
        weight[0] = 0
        weight[1, :2] = 1e-4
        assert summarize_entries(weight).sparsity == 6 / 16
        assert summarize_entries(torch.zeros(3, 3)).sparsity == 1

    def test_of_equal_entries(self):
        found = summarize_entries(torch.full((3, 3), 0.5))
        assert (found.variance, found.kurtosis, found.largest_deviation) == (0, 0, 0)

    def test_a_value_that_is_not_finite_is_named(self):
        weight = torch.ones(2, 3)
        weight[0, 0] = float("inf")
        with pytest.raises(NumericalError, match=r"layers\.3\.up: 1 of 6 values are not finite"):
            analyze_layer("layers.3.up", weight)


class TestGroups:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("model.layers.3.mlp.up_proj", (3, "up_proj")),
            ("encoder.block.11.layer.0.SelfAttention.q", (11, "q")),
            ("transformer.h.0.attn.c_attn", (0, "c_attn")),
            ("lm_head", (None, "lm_head")),
        ],
    )
    def test_depth_and_projection(self, name: str, expected: tuple[int | None, str]):
        assert depth_and_projection(name) == expected

    def test_means(self):
        names = ("head", "layers.1.up", "layers.0.up", "layers.0.down")
        layers = {name: analyze_layer(name, torch.randn(6, 8)) for name in names}
        depths, projections = analysis.by_depth(layers), analysis.by_projection(layers)
        assert list(depths) == [0, 1, None]
        assert list(projections) == ["head", "up", "down"]
        ranks = [layers[f"layers.{depth}.up"].weight.effective_rank for depth in (0, 1)]
        assert projections["up"]["layers"] == 2
        assert projections["up"]["weight.effective_rank"] == pytest.approx(sum(ranks) / 2)
        assert depths[1] == pytest.approx({"layers": 1, **layers["layers.1.up"].numbers()})


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two analyses agree but for rounding."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name].shape, found[name].rank) == (expected[name].shape, expected[name].rank)
        assert found[name].numbers() == pytest.approx(expected[name].numbers(), rel=1e-6, abs=1e-6)


class TestModels:
    @pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
    def test_a_folder_says_what_the_model_in_memory_says(self, tmp_path: Path, architecture: Any):
        model = architecture.build()
        model.save_pretrained(tmp_path)
        found, expected = analyze_folder(tmp_path), analyze_model(model)
        same(found, expected)
        tied = {key.removesuffix(".weight") for key in model.all_tied_weights_keys}
        linear = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, tf.pytorch_utils.Conv1D))}
        assert set(expected) == set(linear) - tied
        for name, layer in expected.items():
            weight = linear[name].weight if isinstance(linear[name], nn.Linear) else linear[name].weight.T
            assert layer.shape == tuple(weight.shape)
            assert layer.weight.largest == pytest.approx(float(torch.linalg.matrix_norm(weight.detach().double(), 2)))

    def test_shards_and_half_precision(self, tmp_path: Path):
        model = LLAMA.build().to(torch.bfloat16)
        model.save_pretrained(tmp_path, max_shard_size="8KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        same(analyze_folder(tmp_path), analyze_model(model))

    @pytest.mark.parametrize("factor_format", ["pivoted", "factors"])
    def test_a_compact_model_is_the_product_of_its_factors(self, tmp_path: Path, factor_format: str):
        compact = trained(tmp_path / "run", factor_format=factor_format).merge_and_unload().to(torch.bfloat16)
        compact.save_pretrained(tmp_path / "compact")
        found = analyze_folder(tmp_path / "compact")
        same(found, analyze_model(compact))
        low_rank = {name: module for name, module in compact.named_modules() if isinstance(module, LowRankLinear)}
        assert low_rank
        for name, module in low_rank.items():
            assert found[name].rank == module.rank
            assert found[name].shape == (module.out_features, module.in_features)
            # the product is taken in float64, so that it has no more singular values than the rank
            assert found[name].weight.singular_values[module.rank :].max() < 1e-6 * found[name].weight.largest
            expected = float(dense_weight(module).square().sum())
            assert found[name].weight.energy == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_a_4bit_folder_is_dequantized(self, tmp_path: Path, name: str):
        architecture = ARCHITECTURES[name]
        architecture.build(**WIDE if name == "llama" else {}).save_pretrained(tmp_path / "dense")
        model = architecture.model.from_pretrained(tmp_path / "dense", quantization_config=NF4, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "nf4")
        assert any(".quant_state." in key for key in load_file(tmp_path / "nf4" / "model.safetensors"))
        found, dense = analyze_folder(tmp_path / "nf4"), analyze_folder(tmp_path / "dense")
        same(found, analyze_model(model))
        assert {n: layer.shape for n, layer in found.items()} == {n: layer.shape for n, layer in dense.items()}
        if name == "llama":
            for layer in found:
                assert found[layer].weight.energy == pytest.approx(dense[layer].weight.energy, rel=0.05)

    def test_4bit_weights_that_an_evaluation_pass_has_repacked(self, tmp_path: Path):
        """As bitsandbytes does on some CPUs, rounding the scales to bfloat16."""
        LLAMA.build(**WIDE).save_pretrained(tmp_path)
        model = LLAMA.model.from_pretrained(tmp_path, quantization_config=NF4, dtype=torch.bfloat16)
        before = analyze_model(model)
        with torch.no_grad():
            model.eval()(**LLAMA.inputs())
        after = analyze_model(model)
        for name, layer in before.items():
            assert after[name].weight.numbers() == pytest.approx(layer.weight.numbers(), rel=0.02)

    def test_4bit_without_bitsandbytes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        LLAMA.build().save_pretrained(tmp_path / "dense")
        model = LLAMA.model.from_pretrained(tmp_path / "dense", quantization_config=NF4)
        model.save_pretrained(tmp_path / "nf4")
        monkeypatch.setattr(tensors, "find_spec", lambda _: None)
        with pytest.raises(LoraSVDError, match="in 4 bit by bitsandbytes, which is missing; pip install bitsandbytes"):
            analyze_folder(tmp_path / "nf4")

    def test_a_model_without_its_head(self, tmp_path: Path):
        model = LLAMA.build()
        model.model.save_pretrained(tmp_path)
        found = folder_weights(tmp_path)
        assert set(found) == {name.removeprefix("model.") for name in model_weights(model)}

    def test_layers_that_are_not_stored_are_named(self, tmp_path: Path):
        LLAMA.build().save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.warns(UserWarning, match=r"name of 1 linear layers, .*: model\.layers\.1\.mlp\.up_proj"):
            assert "model.layers.0.mlp.up_proj" in folder_weights(tmp_path)

    def test_refuses_what_it_cannot_read(self, tmp_path: Path):
        with pytest.raises(LoraSVDError, match="nowhere is not a folder with a model"):
            analyze_folder(tmp_path / "nowhere")
        model = LLAMA.build()
        model.save_pretrained(tmp_path)
        tensors = {key: tensor.to(torch.int8) for key, tensor in load_file(tmp_path / "model.safetensors").items()}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(LoraSVDError, match=r"q_proj\.weight: stored as torch\.int8, expected a floating-point"):
            analyze_folder(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"no tensors")
        with pytest.raises(LoraSVDError, match=r"cannot read .*model\.safetensors"):
            analyze_folder(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(LoraSVDError, match=r"has neither model\.safetensors nor"):
            analyze_folder(tmp_path)

    def test_code_of_a_folder_is_not_run(self, tmp_path: Path):
        LLAMA.build().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"model_type": "unknown", "auto_map": {"AutoConfig": "evil.Config"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
        with pytest.raises(LoraSVDError, match="is not a folder with a model of transformers"):
            analyze_folder(tmp_path)
        assert not (tmp_path / "ran").exists()


class LiveBytes(torch.overrides.TorchFunctionMode):
    """Bytes of the tensors that are alive, by their storages, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._holders: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (result, *args):
            self.see(tensor)
        return result

    def see(self, tensor: Any) -> Any:
        if type(tensor) is Tensor and tensor.device.type == "cpu" and not hasattr(tensor, "_seen"):
            tensor._seen = True
            pointer, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            if not self._holders.get(pointer):
                self.now += size
                self.most = max(self.most, self.now)
            self._holders[pointer] = self._holders.get(pointer, 0) + 1
            weakref.finalize(tensor, self._forget, pointer, size)
        return tensor

    def _forget(self, pointer: int, size: int) -> None:
        self._holders[pointer] -= 1
        if not self._holders[pointer]:
            self.now -= size


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tensors read from the files and everything computed from them, together, against the largest layer in float64."""
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 12}
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(tmp_path)
    monitor = LiveBytes()
    read = tensors.Tensors._read
    monkeypatch.setattr(tensors.Tensors, "_read", lambda *args: monitor.see(read(*args)))
    with monitor:
        found = analyze_folder(tmp_path)
    largest = max(math.prod(layer.shape) for layer in found.values()) * 8
    whole = sum(math.prod(layer.shape) for layer in found.values()) * 8
    assert largest < monitor.most < 6 * largest < whole / 5
    # what remains are the spectra
    assert monitor.now <= sum(layer.weight.size for layer in found.values()) * 8 + 1024


class TestAdapter:
    @pytest.mark.parametrize("importance", ["lora_activation", "kronecker"])
    def test_features_and_weighted_spectra(self, tmp_path: Path, importance: str):
        model = trained(tmp_path, importance=importance)
        found = analyze_adapter(model)
        run = model.base_model.run()
        layers, inputs, chosen = run.layers, run.inputs(), run.settings
        assert found.keys() == layers.keys() == model_weights(LLAMA.build()).keys()
        dense = analyze_model(LLAMA.build())
        energies = compute_spectra(inputs, chosen)
        for name, layer in found.items():
            assert layer.weight.numbers() == pytest.approx(dense[name].weight.numbers(), rel=1e-6)
            gram = inputs[name].statistics().mean("input_gram")
            assert layer.features is not None
            assert layer.features.size == layer.shape[1]
            assert layer.features.energy == pytest.approx(float(gram.trace()))
            assert layer.weighted is not None
            torch.testing.assert_close(layer.weighted.singular_values**2, energies[name])
        assert {name: layer.rank or min(layer.shape) for name, layer in found.items()} == model.peft_config[
            "default"
        ].compact_ranks

    def test_features_only_where_the_preset_collects_them(self, tmp_path: Path):
        found = analyze_adapter(trained(tmp_path, importance="lora"))
        assert all(layer.features is None and layer.weighted is not None for layer in found.values())

    def test_a_saved_adapter(self, tmp_path: Path):
        LLAMA.build().save_pretrained(tmp_path / "base")
        model = trained(tmp_path / "run", task_type="CAUSAL_LM")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter")
        same(analyze_folder(tmp_path / "adapter"), analyze_adapter(model))

    def test_refuses(self, tmp_path: Path):
        with pytest.raises(LoraSVDError, match=r"q_proj: nothing was observed"):
            analyze_adapter(wrap())
        other = get_peft_model(LLAMA.build(), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(LoraSVDError, match="its adapter is LoraModel, expected LoraSVDModel; use analyze_model"):
            analyze_adapter(other)
        other.save_pretrained(tmp_path)
        with pytest.raises(LoraSVDError, match=r"is an adapter of type .*LORA, expected LORA_SVD"):
            analyze_folder(tmp_path)
