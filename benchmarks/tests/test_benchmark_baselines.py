"""The published baselines of the benchmarks: formulas against slow references, sizes, and what they return."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lora_prune as lp
import neuron_selection as ns
import pytest
import torch
from models import ARCHITECTURES, LLAMA, assert_plain, logits, tensors
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainingArguments

from lora_svd.compact import parameter_report
from lora_svd.errors import NumericalError

HIDDEN, WIDTH, HEADS, GROUPS, DIM, LAYERS = 48, 64, 6, 3, 8, 3
ATTENTION = HIDDEN * DIM * (2 * HEADS + 2 * GROUPS)
MLP = 3 * HIDDEN * WIDTH


def tiny(**changes: Any) -> Any:
    """Three layers of six query heads and three key-value heads, their weights large beside rounding."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "initializer_range": 0.2}
    return LLAMA.build(**sizes, **heads, **changes)


def tiny_bert() -> Any:
    """The same sizes, every head with a key and a value of its own."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
    return ARCHITECTURES["bert"].build(**sizes, num_attention_heads=HEADS, initializer_range=0.2)


def kept_parameters(model: Any) -> int:
    """Weights of the linear layers of the blocks: ``layers`` of Llama, ``layer`` of BERT."""
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layer" in name
    )


@torch.no_grad()
def input_grams(model: Any) -> dict[str, Tensor]:
    """Mean Gram matrices of the inputs of all linear layers of the blocks, over 512 tokens."""
    grams, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("model.layers"):

            def observe(_: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                x = args[0].flatten(0, 1)
                grams[name] = x.T @ x / len(x)

            handles.append(module.register_forward_pre_hook(observe))
    model(torch.randint(3, 64, (64, 8)))
    for handle in handles:
        handle.remove()
    return grams


def assert_ordinary(model: Any) -> None:
    """It generates with a cache as without one, and every parameter learns."""
    prompt = torch.tensor([[5, 9, 20]])
    with torch.no_grad():
        whole = model(model.generate(prompt, max_new_tokens=4, do_sample=False)).logits
        cached = model(prompt, use_cache=True)
        step = model(whole[:, 2:3].argmax(-1), past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(step[:, 0], whole[:, 3], rtol=1e-4, atol=1e-4)
    batch = torch.randint(3, 64, (4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0] < 100


class TestSelectNeurons:
    @pytest.mark.parametrize("query_key", ["svd", "cr"])
    @pytest.mark.parametrize("attention_ratio", [None, 1.0, 0.75])
    @pytest.mark.parametrize("param_ratio", [0.85, 0.7, 0.6])
    def test_budget_is_met_to_within_one_neuron(self, param_ratio, attention_ratio, query_key):
        model = tiny()
        budget = int(param_ratio * kept_parameters(model))
        choices = {"attention_ratio": attention_ratio, "query_key": query_key}
        result = ns.select_neurons(model, input_grams(model), param_ratio, **choices)
        assert budget - 3 * HIDDEN < kept_parameters(result) <= budget

    @pytest.mark.parametrize(
        "choices", [{"attention_ratio": 0.7}, {"attention_ratio": 0.7, "query_key": "cr"}, {"attention_ratio": 1.0}]
    )
    def test_the_result_is_an_ordinary_model(self, choices):
        model = tiny()
        assert_ordinary(ns.select_neurons(model, input_grams(model), 0.7, **choices))

    def test_nothing_changes_at_full_size(self):
        model = tiny()
        before = logits(model)
        assert torch.equal(logits(ns.select_neurons(model, input_grams(model), 1.0)), before)

    def test_nothing_changes_if_it_is_refused(self):
        model = tiny()
        before, grams = logits(model), input_grams(model)
        for arguments, words in (
            ({"param_ratio": 0.1, "attention_ratio": 1.0}, "leave -.* neurons in a block"),
            ({"param_ratio": 0.9, "attention_ratio": 0.5}, "leave 76.7 neurons in a block .* expected 2 to 64"),
            ({"param_ratio": 0.5, "block_influence": [0.1]}, "got 1 values, expected one for each of 3 blocks"),
        ):
            with pytest.raises(ValueError, match=words):
                ns.select_neurons(model, grams, **arguments)
        assert torch.equal(logits(model), before)
        with pytest.raises(ValueError, match="has a bias, expected none"):
            ns.select_neurons(tiny(attention_bias=True), grams, 0.5)

    def test_neurons_that_say_the_same_are_dropped_without_loss(self):
        model = tiny()
        with torch.no_grad():
            for layer in model.model.layers:  # the last 16 neurons are a half of the first 16
                layer.mlp.gate_proj.weight[48:] = layer.mlp.gate_proj.weight[:16]
                layer.mlp.up_proj.weight[48:] = layer.mlp.up_proj.weight[:16] / 2
        before = logits(model)
        ratio = (ATTENTION + 0.75 * MLP) / (ATTENTION + MLP)
        result = ns.select_neurons(model, input_grams(model), ratio, attention_ratio=1.0, ridge=1e-4)
        assert [layer.mlp.up_proj.out_features for layer in result.model.layers] == [48] * LAYERS
        torch.testing.assert_close(logits(result), before, rtol=1e-3, atol=1e-3)

    def test_heads_with_idle_dimensions_are_shrunk_without_loss(self):
        model = tiny()
        with torch.no_grad():
            for layer in model.model.layers:
                for group in range(GROUPS):
                    rows = DIM * group + torch.tensor([group, group + DIM // 2])
                    layer.self_attn.k_proj.weight[rows] = 0  # another pair in each group
                value = layer.self_attn.v_proj.weight.view(GROUPS, DIM, HIDDEN)
                value[:, 6:] = value[:, :2] - value[:, 2:4]
        before = logits(model)
        ratio = (0.75 * ATTENTION + MLP) / (ATTENTION + MLP)
        result = ns.select_neurons(model, input_grams(model), ratio, attention_ratio=0.75, query_key="cr")
        assert kept_parameters(result) == 0.75 * LAYERS * ATTENTION + LAYERS * MLP
        torch.testing.assert_close(logits(result), before, rtol=1e-4, atol=1e-4)

    def test_query_and_key_of_low_rank_are_factorized_without_loss(self):
        model = tiny()
        with torch.no_grad():
            for layer in model.model.layers:
                for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                    linear.weight.copy_(torch.randn(len(linear.weight), 10) @ torch.randn(10, HIDDEN) / 10)
                value = layer.self_attn.v_proj.weight.view(GROUPS, DIM, HIDDEN)
                value[:, 6:] = value[:, :2] - value[:, 2:4]
        before, grams = logits(model), input_grams(model)
        for index, layer in enumerate(model.model.layers):
            gram = grams[f"model.layers.{index}.self_attn.q_proj"].double()
            ns.shrink_attention(layer.self_attn, gram, 0.75, "svd")
        assert [part.weight.shape for part in model.model.layers[0].self_attn.k_proj] == [(12, HIDDEN), (24, 12)]
        torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)

    def test_attention_stays_dense_while_the_neurons_suffice(self):
        model = tiny()
        grams, before = input_grams(model), logits(model)
        ns.select_neurons(model, grams, 1 - 0.2 * MLP / (ATTENTION + MLP))
        assert type(model.model.layers[0].self_attn.v_proj) is nn.Linear
        assert not torch.equal(logits(model), before)
        ns.select_neurons(model := tiny(), grams, 0.5)
        neurons = sum(layer.mlp.up_proj.out_features for layer in model.model.layers)
        assert neurons / (LAYERS * WIDTH) == pytest.approx(0.5 * 5 / 6, abs=0.05)  # heads are rounded up
        assert model.model.layers[0].self_attn.v_proj[0].out_features < GROUPS * DIM

    def test_block_influence(self):
        model = tiny()
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight.zero_()
            model.model.layers[1].mlp.down_proj.weight.zero_()
            states = model(**LLAMA.inputs(), output_hidden_states=True).hidden_states
        hooks = [len(layer._forward_hooks) for layer in model.model.layers]  # transformers has its own
        found = ns.measure_block_influence(model, [LLAMA.inputs()])
        assert hooks == [len(layer._forward_hooks) for layer in model.model.layers]
        assert found[0] == pytest.approx(1 - float(torch.cosine_similarity(*states[:2], dim=-1).mean()), rel=1e-5)
        assert found[1] == pytest.approx(0, abs=1e-6)

    def test_allocation_spares_blocks_of_influence(self):
        model = tiny()
        result = ns.select_neurons(model, input_grams(model), 0.85, block_influence=[0.3, 0.2, 0.25])
        widths = [layer.mlp.gate_proj.out_features for layer in result.model.layers]
        assert widths[0] > widths[2] > widths[1]


class TestNeuronSelectionFormulas:
    def test_leverage_scores(self):
        x = torch.randn(40, 12, dtype=torch.float64)
        gram = x.T @ x / 40
        dense = (gram @ torch.linalg.inv(gram + 0.3 * torch.eye(12, dtype=torch.float64))).diagonal()
        torch.testing.assert_close(ns.leverage_scores(gram, 0.3), dense)

    def test_refit_is_least_squares_and_beats_dropping_columns(self):
        x = torch.randn(200, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
        weight, kept = torch.randn(5, 12, dtype=torch.float64), torch.tensor([0, 3, 4, 7, 8, 11])
        refit = ns.nystrom(x.T @ x / 200, weight, kept, 0.0)
        solution = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
        torch.testing.assert_close(refit, solution)
        assert (x[:, kept] @ refit.T - x @ weight.T).norm() < (x[:, kept] @ weight[:, kept].T - x @ weight.T).norm()

    def test_value_and_output_are_the_best_of_their_rank_together(self):
        attention = tiny().model.layers[0].self_attn
        x = torch.randn(300, HIDDEN, dtype=torch.float64)
        value = attention.v_proj.weight.detach().double().view(GROUPS, DIM, HIDDEN)
        output = attention.o_proj.weight.detach().double().view(HIDDEN, GROUPS, HEADS // GROUPS, DIM)
        ns.shrink_value_output(attention, x.T @ x / 300, 5)
        new_value = attention.v_proj[0].weight.detach().double().view(GROUPS, 5, HIDDEN)
        new_output = attention.o_proj[1].weight.detach().double().view(HIDDEN, GROUPS, HEADS // GROUPS, 5)
        for g in range(GROUPS):
            whole = torch.cat([x @ (output[:, g, h] @ value[g]).T for h in range(HEADS // GROUPS)], dim=1)
            found = torch.cat([x @ (new_output[:, g, h] @ new_value[g]).T for h in range(HEADS // GROUPS)], dim=1)
            best = torch.linalg.svdvals(whole)[5:].square().sum()
            torch.testing.assert_close((whole - found).square().sum(), best, rtol=1e-5, atol=0)

    def test_pairs_of_least_energy_are_dropped(self):
        attention = tiny().model.layers[0].self_attn
        query = attention.q_proj.weight.detach().clone().view(GROUPS, 2, DIM, HIDDEN)
        key = attention.k_proj.weight.detach().clone().view(GROUPS, DIM, HIDDEN)
        x = torch.randn(300, HIDDEN)
        ns.shrink_query_key(attention, (x.T @ x / 300).double(), 6)
        for g in range(GROUPS):
            scores = []
            for p in range(4):
                pair = [p, p + 4]
                energy = (x @ key[g, pair].T).square().sum(1).mean()
                scores.append(sum((x @ query[g, h, pair].T).square().sum(1).mean() * energy for h in range(2)))
            dropped = int(torch.stack(scores).argmin())
            outputs = attention.k_proj(x).view(300, GROUPS, DIM)[:, g]
            assert (outputs == 0).all(0).nonzero().flatten().tolist() == [dropped, dropped + 4]

    @pytest.mark.parametrize("mean", [0.9, 0.5, 0.2])
    def test_shares_have_their_mean_and_a_floor(self, mean):
        shares = ns.kept_shares(mean, torch.tensor([0.9, 0.1, 0.2, 0.05, 0.8], dtype=torch.float64), 0.1)
        assert float(shares.mean()) == pytest.approx(mean)
        assert float(shares.min()) >= mean / 2 - 1e-12
        assert float(shares.max()) <= 1
        same = ns.kept_shares(mean, torch.zeros(5, dtype=torch.float64), 0.1)
        assert same.tolist() == pytest.approx([mean] * 5)

    def test_shares_are_the_papers_where_no_floor_is_met(self):
        influence = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
        expected = 1 - 3 * 0.2 * torch.softmax(-influence / 0.5, 0)
        torch.testing.assert_close(ns.kept_shares(0.8, influence, 0.5), expected)

    def test_spread_sums_to_the_total(self):
        assert ns.spread(torch.tensor([1.5, 2.7, 3.8], dtype=torch.float64), 8) == [1, 3, 4]


# -- LoRAPrune ---------------------------------------------------------------------------------------------------------


BUILD = {"llama": tiny, "bert": tiny_bert}


def tuned_model(name: str = "llama", param_ratio: float = 0.6, **changes: Any) -> tuple[Any, list[lp.Structures]]:
    """A model with a LoRA of random factors and the gradients of one batch, and its structures."""
    model = BUILD[name](**changes)
    kept, kind = lp.kept_structures(model, param_ratio), lp.architecture_of(model)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=[*kind.attention, *kind.mlp]))
    for parameter_name, parameter in tuned.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    tuned(**ARCHITECTURES[name].inputs()).loss.backward()
    return tuned, lp.find_structures(model, kept)


def train(model: Any, folder: Path, param_ratio: float, steps: int, *, data: Any = None, **changes: Any) -> Any:
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no"}
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, **quiet
    )
    return lp.lora_prune(model, data or LLAMA.data(), arguments, param_ratio, r=4, **changes)


def dense_sensitivity(layer: Any, power: int) -> Tensor:
    """The formula as it is written, float64; the scaling of the tuned model is 2."""
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    a, b = (parameter.detach().double() for parameter in parameters)
    grad_a, grad_b = (parameter.grad.double() for parameter in parameters)
    gradient = grad_b @ a + b @ grad_a - grad_b @ grad_a
    return (gradient * (layer.base_layer.weight.detach().double() + 2 * b @ a)).abs() ** power


class TestLoraPruneFormulas:
    @pytest.mark.parametrize("power", [1, 2])
    def test_sensitivity_is_the_formula(self, power):
        _, structures = tuned_model()
        layer = structures[0].block.self_attn.k_proj
        found = lp.sensitivity(layer, power)
        torch.testing.assert_close(found.double(), dense_sensitivity(layer, power), rtol=1e-4, atol=1e-9)

    def test_importance_sums_normalized_structures(self):
        _, structures = tuned_model()
        attention, mlp = structures[:2]
        expected = torch.zeros(GROUPS, dtype=torch.float64)
        for name, heads in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1), ("o_proj", 2)):
            dense = dense_sensitivity(getattr(attention.block.self_attn, name), 1)
            dense = dense.T if name == "o_proj" else dense
            sums = torch.stack([dense[g * heads * DIM : (g + 1) * heads * DIM].sum() for g in range(GROUPS)])
            expected += sums / sums.norm()
        attention.observe(1)
        torch.testing.assert_close(attention.importance.double(), 0.1 * expected, rtol=1e-4, atol=1e-7)
        attention.observe(1)
        torch.testing.assert_close(attention.importance.double(), 0.19 * expected, rtol=1e-4, atol=1e-7)
        neurons = torch.zeros(WIDTH, dtype=torch.float64)
        for name, dim in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
            sums = dense_sensitivity(getattr(mlp.block.mlp, name), 1).sum(dim)
            neurons += sums / sums.norm()
        mlp.observe(1)
        torch.testing.assert_close(mlp.importance.double(), 0.1 * neurons, rtol=1e-4, atol=1e-7)

    def test_importance_in_bert_is_of_heads_and_of_neurons_without_a_gate(self):
        _, structures = tuned_model("bert")
        attention, mlp = structures[:2]
        block: Any = attention.block
        own = block.attention.self
        for part, rows, reader, size in (
            (attention, [own.query, own.key, own.value], block.attention.output.dense, DIM),
            (mlp, [block.intermediate.dense], block.output.dense, 1),
        ):
            dense = [dense_sensitivity(layer, 1) for layer in rows] + [dense_sensitivity(reader, 1).T]
            sums = [torch.stack([run.sum() for run in entries.split(size)]) for entries in dense]
            expected = sum(values / values.norm() for values in sums)
            part.observe(1)
            torch.testing.assert_close(part.importance.double(), 0.1 * expected, rtol=1e-4, atol=1e-7)

    def test_gradients_that_are_not_finite_are_an_error(self):
        _, structures = tuned_model()
        structures[1].block.mlp.up_proj.lora_B["default"].weight.grad[3, 1] = torch.nan
        with pytest.raises(NumericalError, match=r"mlp.gate_proj, mlp.up_proj, mlp.down_proj are not finite"):
            structures[1].observe(1)

    def test_schedule(self):
        shares = [lp.removed_share(step, 100, 0.1, 0.1) for step in range(100)]
        assert shares[:11] == [0.0] * 11
        assert shares[90:] == [1.0] * 10
        assert shares[50] == pytest.approx(1 - 0.5**3)
        assert all(a <= b for a, b in pairwise(shares))
        for steps in (1, 2, 7):  # the last update still adapts to the last cut
            assert lp.removed_share(steps - 1, steps, 0.1, 0.1) == 1
        assert [lp.removed_share(step, 10, 0.5, 0.5) for step in range(10)] == [0.0] * 5 + [1.0] * 5

    def test_sizes_of_smollm2(self):
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 100}
        config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        attention, mlp = 884_736, 2_654_208
        for ratio, groups, whole in ((0.8, 2, 4), (0.6, 2, 4), (0.4, 1, 4), (0.2, 1, 0)):
            kept = lp.kept_structures(model, ratio)
            assert sum(sizes.neurons == 1536 and sizes.groups == 3 for sizes in kept) == whole
            assert (kept[0].groups, kept[3].groups, kept[28].groups, kept[29].groups) == (
                (3, groups, groups, 3) if whole else (1, 1, 1, 1)
            )
            used = sum(sizes.groups * attention // 3 + sizes.neurons * mlp // 1536 for sizes in kept)
            budget = ratio * 30 * (attention + mlp)
            assert budget - 3 * 576 < used <= budget + 1e-6
        assert lp.kept_structures(model, 1.0) == [lp.Kept(1536, 3)] * 30
        assert {sizes.groups for sizes in lp.kept_structures(model, 0.6, kv_heads=3)} == {3}
        with pytest.raises(ValueError, match="beside 1 of 3 key-value heads"):
            lp.kept_structures(model, 0.05)

    def test_sizes_of_minilm(self):
        config = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
        with torch.device("meta"):
            model = BertForSequenceClassification(config)
        attention, mlp = 589_824, 1_179_648
        for ratio, heads, whole in ((0.6, 6, 1), (0.33, 2, 1), (0.16, 2, 0), (0.1, 1, 0)):
            kept = lp.kept_structures(model, ratio)
            assert [sizes.groups for sizes in kept] == [heads] * (6 - whole) + [12] * whole
            assert [sizes.neurons == 1536 for sizes in kept] == [False] * (6 - whole) + [True] * whole
            used = sum(sizes.groups * attention // 12 + sizes.neurons * mlp // 1536 for sizes in kept)
            budget = ratio * 6 * (attention + mlp)
            assert budget - 2 * 384 < used <= budget + 1e-6
        assert lp.kept_structures(model, 1.0) == [lp.Kept(1536, 12)] * 6
        with pytest.raises(ValueError, match="beside 1 of 12 key-value heads"):
            lp.kept_structures(model, 0.02)

    def test_other_models_are_refused(self):
        with pytest.raises(ValueError, match="got GPT2LMHeadModel, expected one of LlamaForCausalLM, Bert"):
            lp.kept_structures(ARCHITECTURES["gpt2"].build(), 0.5)


class TestLoraPrune:
    @pytest.mark.parametrize(
        ("name", "changes"),
        [("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("bert", {})],
        ids=["llama", "llama with biases", "bert"],
    )
    def test_cut_model_answers_as_the_masked_one(self, name, changes):
        kind = ARCHITECTURES[name]
        tuned, structures = tuned_model(name, **changes)
        for parameter_name, parameter in tuned.named_parameters():
            if parameter_name.endswith("bias"):
                nn.init.normal_(parameter)
        whole = logits(tuned, kind)
        for part in structures:
            part.observe(1)
            part.prune(part.target)
        with lp.masked_inputs(structures):
            masked = logits(tuned, kind)
        assert torch.equal(logits(tuned, kind), whole)  # the hooks are gone
        cut = logits(lp.merge_and_cut(tuned, structures), kind)
        assert (masked - whole).abs().max() > 0.1
        torch.testing.assert_close(cut, masked, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("param_ratio", [0.8, 0.6, 0.4])
    def test_end_to_end(self, param_ratio, tmp_path):
        model = tiny()
        budget = param_ratio * kept_parameters(model)
        pruned = train(model, tmp_path, param_ratio, steps=6, prune_every=2)
        assert budget - 3 * HIDDEN < kept_parameters(pruned) <= budget
        assert type(pruned) is LlamaForCausalLM
        assert not [name for name, _ in pruned.named_parameters() if "lora" in name]
        assert pruned.config.use_cache
        last = pruned.model.layers[-1]
        assert (last.mlp.up_proj.out_features == WIDTH) == (param_ratio > 0.5)
        assert torch.isfinite(logits(pruned)).all()
        assert_ordinary(pruned)

    @pytest.mark.parametrize("param_ratio", [0.8, 0.6, 0.16])
    def test_end_to_end_with_a_classifier(self, param_ratio, tmp_path):
        model, before = tiny_bert(), tensors(tiny_bert())
        budget, size = param_ratio * kept_parameters(model), parameter_report(model).parameters
        beside = ["bert.embeddings", "output.LayerNorm", "pooler", "classifier"]
        pruned = train(
            model,
            tmp_path,
            param_ratio,
            steps=6,
            prune_every=2,
            data=ARCHITECTURES["bert"].data(),
            bias="all",
            modules_to_save=beside,
        )
        kept = kept_parameters(pruned)
        assert budget - 2 * HIDDEN < kept <= budget
        assert_plain(pruned)
        first = pruned.bert.encoder.layer[0]
        heads = first.attention.self.key.out_features // DIM
        assert heads == {0.8: 4, 0.6: 2, 0.16: 1}[param_ratio]
        biases = sum(
            3 * (HIDDEN - layer.attention.self.key.out_features) + WIDTH - layer.intermediate.dense.out_features
            for layer in pruned.bert.encoder.layer
        )
        assert parameter_report(pruned).parameters == size - (kept_parameters(tiny_bert()) - kept) - biases
        same = [name for name, tensor in tensors(pruned).items() if torch.equal(tensor, before[name])]
        assert not [name for name in same if any(part in name for part in beside) or name.endswith("bias")]
        assert torch.isfinite(logits(pruned, ARCHITECTURES["bert"])).all()

    def test_what_is_pruned_stays_so_and_the_number_falls(self, tmp_path, monkeypatch):
        model, masks = tiny(), []
        prune = lp.Structures.prune

        def record(part: lp.Structures, count: int) -> None:
            prune(part, count)
            if part.block is model.model.layers[0] and "mlp.up_proj" in part.cuts:
                masks.append(part.mask.clone())

        monkeypatch.setattr(lp.Structures, "prune", record)
        pruned = train(model, tmp_path, 0.6, steps=12, prune_every=3)
        assert len(masks) == 4  # steps 3, 6, 9 and, because the cool-down begins, 11
        counts = [int(mask.sum()) for mask in masks]
        assert WIDTH > counts[0] > counts[1] > counts[2] >= counts[3] == pruned.model.layers[0].mlp.up_proj.out_features
        assert all((later & ~earlier).sum() == 0 for earlier, later in pairwise(masks))

    def test_what_does_not_matter_goes_first(self, tmp_path):
        model = tiny()
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[:, 7] = 0
            model.model.layers[1].mlp.gate_proj.weight[7] = 100.0  # marks the neuron
            model.model.layers[0].self_attn.o_proj.weight[:, 2 * DIM : 4 * DIM] = 0
            model.model.layers[0].self_attn.v_proj.weight[DIM] = 100.0
        pruned = train(model, tmp_path, 0.8, steps=1)
        first, second = pruned.model.layers[0], pruned.model.layers[1]
        assert second.mlp.gate_proj.out_features < WIDTH
        assert float(second.mlp.gate_proj.weight.detach().max()) < 50
        assert first.self_attn.k_proj.out_features == 2 * DIM
        assert float(first.self_attn.v_proj.weight.detach().max()) < 50
