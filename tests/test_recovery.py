"""Recovery beyond the bypass: self-distillation, and training of the factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, LLAMA, assert_bit_equal, logits, make_trainer, tensors, wrap
from peft import PeftModel
from test_resume import SCHEDULES, assert_resumes

from lora_svd import LoraSVDError
from lora_svd.decompositions.svd import weighted_svd
from lora_svd.inputs import layer_metrics
from lora_svd.tuner.distillation import distillation_loss, label_positions

LOOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.mark.parametrize("num_items", [None, 10])
def test_distillation_loss_is_the_divergence_of_the_selected_positions(num_items: int | None) -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1)[mask].sum() / (3 if num_items is None else num_items)
    assert float(distillation_loss(student, teacher, mask, num_items)) == pytest.approx(float(expected), rel=1e-5)
    assert float(distillation_loss(student, student, mask)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("classes", [5, 700_000])  # many positions in a slice, and one
def test_gradient_of_the_distillation_loss(classes: int) -> None:
    student, teacher = torch.randn(2, 2, classes, requires_grad=True), torch.randn(2, 2, classes)
    mask = torch.tensor([[True, False], [False, True]])
    with torch.no_grad():
        student[1, 0], teacher[0, 1] = torch.inf, torch.nan  # what is not selected has no say
    distillation_loss(student, teacher, mask).backward()
    exact = student.detach().double()[mask].requires_grad_()
    p = teacher.double()[mask].softmax(-1)
    ((p * (p.log() - exact.log_softmax(-1))).sum() / 2).backward()
    torch.testing.assert_close(student.grad[mask].double(), exact.grad, rtol=1e-4, atol=1e-9)
    assert not student.grad[~mask].any()


def test_positions_are_those_with_a_label() -> None:
    values = torch.zeros(1, 3, 5)
    assert label_positions(values, torch.tensor([[-100, 2, -100]])).tolist() == [[False, True, False]]
    assert label_positions(values, torch.tensor([[1, -100, 2]]), shifted=True).tolist() == [[False, True, False]]
    for shifted in (False, True):
        assert label_positions(values, torch.tensor([1]), shifted=shifted).all()  # one label a sequence
    classes = label_positions(torch.zeros(2, 5), torch.tensor([1, -100]), shifted=True)
    assert classes.tolist() == [True, False]


def compressed(tmp_path: Path, **changes: object):
    model = wrap(warmup=2, **changes)
    make_trainer(model, tmp_path, steps=2).train()
    return model.train()


def test_teacher_is_the_model_without_its_adapter(tmp_path: Path) -> None:
    model, inputs = compressed(tmp_path, distillation=0.3), LLAMA.inputs()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    mixed = model(**inputs).loss.detach()
    with torch.no_grad():
        plain = model(**inputs)  # no distillation where nothing is trained
        with model.disable_adapter():
            teacher = model(**inputs).logits
    distance = distillation_loss(plain.logits, teacher, label_positions(teacher, inputs["labels"], shifted=True))
    assert distance > 0
    assert float(mixed) == pytest.approx(float(0.7 * plain.loss + 0.3 * distance), rel=1e-4)
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_teacher_has_its_own_head_and_no_dropout(tmp_path: Path) -> None:
    bert = ARCHITECTURES["bert"]
    model = wrap(bert, warmup=2, distillation=1.0, task_type="SEQ_CLS", modules_to_save=["classifier"])
    make_trainer(model, tmp_path, bert, steps=3).train()
    modes = {name: module.training for name, module in model.train().named_modules()}
    outputs = model(**bert.inputs())
    with torch.no_grad():
        teacher = bert.build().eval()(**bert.inputs()).logits
    expected = distillation_loss(outputs.logits, teacher, torch.ones(len(teacher), dtype=torch.bool))
    assert expected > 0
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-5, atol=1e-7)
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_answers_are_distilled_and_not_what_follows_them(tmp_path: Path) -> None:
    model, inputs = compressed(tmp_path, distillation=1.0), LLAMA.inputs()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["labels"][:, -1] = 7
    outputs = model(**inputs)
    outputs.logits.retain_grad()
    outputs.loss.backward()
    assert outputs.logits.grad is not None
    assert outputs.logits.grad.any(-1).nonzero()[:, 1].unique().tolist() == [inputs["labels"].shape[1] - 2]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_teacher_of_an_encoder_decoder_is_given_the_same(kind: str, tmp_path: Path) -> None:
    given = ARCHITECTURES[kind]
    model = wrap(given, warmup=2, distillation=1.0, **given.settings)
    make_trainer(model, tmp_path, given, steps=2).train()
    inputs = given.inputs()
    inputs["labels"] = inputs["labels"].flip(-1)
    outputs = model.train()(**inputs)
    with torch.no_grad():
        teacher = given.build()(**inputs).logits
    expected = distillation_loss(outputs.logits, teacher, label_positions(teacher, inputs["labels"]))
    assert expected > 0
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-5, atol=1e-7)


def test_distillation_without_a_loss_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(wrap(warmup=2, distillation=0.5), tmp_path, steps=3, label_smoothing_factor=0.1)
    with pytest.raises(LoraSVDError, match=r"distillation: got an output without loss.*label_smoothing_factor"):
        trainer.train()


def test_teacher_leaves_switched_off_adapters_off(tmp_path: Path) -> None:
    model, inputs = compressed(tmp_path, distillation=0.5), LLAMA.inputs()
    with model.disable_adapter():
        first, second = model(**inputs), model(**inputs)
    dense = LLAMA.build()(**inputs)
    for outputs in (first, second):
        torch.testing.assert_close(outputs.loss, dense.loss)


def test_factors_are_trained_if_asked(tmp_path: Path) -> None:
    moved = {}
    for train_factors in (False, True):
        torch.manual_seed(0)
        model = wrap(warmup=2, train_factors=train_factors)
        make_trainer(model, tmp_path / "short", steps=2).train()
        start = {name: value for name, value in tensors(model).items() if ".factors.left" in name}
        torch.manual_seed(0)
        model = wrap(warmup=2, train_factors=train_factors)
        make_trainer(model, tmp_path / "long", steps=6).train()
        found = tensors(model)
        moved[train_factors] = [not torch.equal(found[name], value) for name, value in start.items()]
        assert torch.isfinite(logits(model.merge_and_unload())).all()
    assert not any(moved[False])
    assert all(moved[True])


@pytest.mark.parametrize("head_first", [False, True])
def test_optimizer_keeps_what_is_not_the_models(head_first: bool) -> None:
    model = wrap(train_factors=True, warmup=1, compression=2, compression_interval=1, total_steps=4)
    head = torch.nn.Linear(4, 4)
    parts = [p for p in model.parameters() if p.requires_grad], [*head.parameters()]
    optimizer = torch.optim.AdamW([p for part in (reversed(parts) if head_first else parts) for p in part])
    for step in range(4):
        (model(**LLAMA.inputs()).loss + head.weight.square().sum()).backward()
        model.base_model.update_and_allocate(step, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()
    factors = [p for p in model.parameters() if p.requires_grad], [*head.parameters()]
    expected = [p for part in (reversed(factors) if head_first else factors) for p in part]
    assert len(expected) > sum(map(len, parts))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in expected]
    assert set(optimizer.state) <= set(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_run_with_trained_factors_ends_bit_equal(schedule: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, train_factors=True, distillation=0.5, **SCHEDULES[schedule])


def test_trained_factors_need_the_optimizer() -> None:
    model = wrap(train_factors=True, warmup=1, total_steps=3)
    model(**LLAMA.inputs()).loss.backward()
    with pytest.raises(LoraSVDError, match="train_factors: got no optimizer"):
        model.base_model.update_and_allocate(0)


def test_compressed_adapter_with_trained_factors_reloads(tmp_path: Path) -> None:
    model = compressed(tmp_path, train_factors=True)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "adapter", is_trainable=True)
    assert_bit_equal(tensors(again), tensors(model))


def weights(model) -> dict[str, torch.Tensor]:
    """What the factors stand for, by layer."""
    layers = model.base_model.run().layers
    return {name: factors.product().detach() for name, layer in layers.items() if (factors := layer.factors("default"))}


def test_trained_factors_are_carried_to_other_sizes(tmp_path: Path) -> None:
    """From the size that was trained, whatever sizes were tried before; dense layers get what was learned, too."""
    torch.manual_seed(0)
    model = wrap(param_ratio=0.4, warmup=2, train_factors=True, row_shrinkage=0.1, column_shrinkage=0.1, neurons=False)
    make_trainer(model, tmp_path, steps=6, learning_rate=3e-2).train()
    tuner, trained = model.base_model, weights(model)
    frozen = {name: layer.dense_weight().double() for name, layer in tuner.run().layers.items()}
    tuner.set_param_ratio(0.8)
    larger = weights(model)
    tuner.set_param_ratio(1.0)
    inputs, settings = tuner.run().inputs(), tuner.run().settings
    for name, weight in weights(model).items():  # full rank: nothing is cut
        start = inputs[name]
        metrics = layer_metrics(name, start, settings)
        truncated = weighted_svd(frozen[name], metrics, start.trained.rank).product()
        torch.testing.assert_close(weight.double(), frozen[name] + trained[name].double() - truncated, **LOOSE)
    dense = logits(model)
    tuner.set_param_ratio(0.8)
    torch.testing.assert_close(weights(model), larger, **LOOSE)
    tuner.set_param_ratio(0.4)
    torch.testing.assert_close(weights(model), trained, **LOOSE)
    tuner.set_param_ratio(0.999)
    torch.testing.assert_close(logits(model.merge_and_unload()), dense, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_distillation_of_what_is_no_choice_is_refused(problem: str, tmp_path: Path) -> None:
    bert = ARCHITECTURES["bert"]
    model = wrap(bert, warmup=2, distillation=0.5)
    model.config.problem_type = problem
    labels = torch.zeros(16, 3)
    trainer = make_trainer(model, tmp_path, bert, steps=3)
    trainer.train_dataset = [{**row, "labels": labels[i]} for i, row in enumerate(bert.data())]
    with pytest.raises(LoraSVDError, match=f"distillation: got problem_type='{problem}' and logits of 3 classes"):
        trainer.train()


def test_another_size_of_an_adapter_loaded_for_inference(tmp_path: Path) -> None:
    """Trained factors go over to it as they do in memory."""
    model = wrap(warmup=2, train_factors=True, param_ratio=0.4)
    make_trainer(model, tmp_path / "run", steps=6).train()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "adapter")
    for ratio in (0.6, 0.4):
        for one in (model, loaded):
            one.base_model.set_param_ratio(ratio)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
