"""A state dict, and accelerate's ``load_state``, put an adapter back as it was, in whatever phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from models import LLAMA, TIED, Architecture, assert_bit_equal, logits, tensors, trained, wrap
from peft import PeftModel
from safetensors.torch import load_file

from lora_svd.compact import parameter_report

TIED_PAIR = {"target_modules": ["embed_tokens", "up_proj"], "importance": "lora_diagonal"}
CHOICES = {"default": {}, "trained factors": {"train_factors": True}, "tied": TIED_PAIR}
EMPTY = {"compressed": False, "compact_ranks": None}


def said(model: PeftModel) -> dict[str, Any]:
    config = model.peft_config["default"]
    return {name: getattr(config, name) for name in EMPTY}


def started(*, steps: int, **changes: Any) -> PeftModel:
    """In the warm-up after 2 steps of 5, recovering after 5."""
    model = wrap(**changes, warmup=3)
    loop(model, range(steps))
    return model


def loop(model: PeftModel, steps: range, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in steps:
        torch.manual_seed(step)
        rows = torch.randint(3, 64, (2, 8))
        model.train()(input_ids=rows, labels=rows).loss.backward()
        model.base_model.update_and_allocate(step, 6, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@TIED
@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("steps", [2, 5], ids=["warm-up", "recovery"])
@pytest.mark.parametrize("into", [0, 2, 5], ids=["a fresh model", "one in its warm-up", "one in its recovery"])
def test_load_state_dict(choices: str, strict: bool, steps: int, into: int) -> None:
    model = started(steps=steps, **CHOICES[choices])
    other = started(steps=into, **{**CHOICES[choices], "r": 4})
    assert not any(other.load_state_dict(model.state_dict(), strict=strict))
    assert_bit_equal(tensors(other), tensors(model))
    assert said(other) == said(model)
    assert torch.equal(logits(other), logits(model))
    for each in (model, other):
        loop(each, range(steps, 6))
    assert_bit_equal(tensors(other), tensors(model))
    for each in (model, other):
        each.base_model.set_param_ratio(0.4)
    smaller = [each.merge_and_unload() for each in (model, other)]
    assert_bit_equal(tensors(smaller[1]), tensors(smaller[0]))
    assert parameter_report(smaller[1]) == parameter_report(smaller[0])


def test_a_state_dict_of_the_base_leaves_the_adapter_alone(tmp_path: Path) -> None:
    model = trained(tmp_path)
    before, of_adapter = tensors(model), [name for name in tensors(model) if "lora_svd" in name]
    state = {name: value + 1 for name, value in before.items() if name not in of_adapter}
    found = model.load_state_dict(state, strict=False)
    assert set(found.missing_keys) == set(of_adapter)
    assert not found.unexpected_keys
    after = tensors(model)
    assert_bit_equal({name: after[name] for name in of_adapter}, {name: before[name] for name in of_adapter})
    assert said(model)["compressed"]


def test_a_state_dict_of_another_shape_is_refused(tmp_path: Path) -> None:
    model, state = wrap(), trained(tmp_path).state_dict()
    name = next(name for name in state if "lora_svd" in name and state[name].dim() == 2 and len(state[name]) != 4)
    with pytest.raises((ValueError, RuntimeError), match=r"has shape \(|size mismatch"):
        model.load_state_dict({**state, name: state[name][:-1]})


@pytest.mark.parametrize("steps", [2, 4])
def test_accelerate_goes_on_to_the_bit(steps: int, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    whole = wrap(warmup=3)
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], 1e-2)
    model, optimizer = accelerator.prepare(whole, optimizer)
    loop(model, range(steps), optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    loop(model, range(steps, 6), optimizer)

    accelerator = Accelerator(cpu=True)
    resumed = wrap(warmup=3)
    optimizer = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], 1e-2)
    model, optimizer = accelerator.prepare(resumed, optimizer)
    accelerator.load_state(str(tmp_path / "state"))
    loop(model, range(steps, 6), optimizer)
    assert_bit_equal(tensors(resumed), tensors(whole))


def test_factors_that_are_loaded_after_the_optimizer_was_made_are_trained() -> None:
    """Into a fresh model, and into one that has others."""
    state = started(steps=4, train_factors=True).state_dict()
    for steps in (0, 4):
        model = wrap(train_factors=True, warmup=3)
        optimizer = loop(model, range(steps))
        model.load_state_dict(state)
        before = tensors(model)
        loop(model, range(4, 6), optimizer)
        factors = [name for name in before if name.endswith(("factors.left", "factors.right"))]
        assert factors
        assert not any(torch.equal(before[name], value) for name, value in tensors(model).items() if name in factors)


def test_accelerate_goes_on_with_trained_factors_if_they_are_there_before_the_optimizer(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    whole = wrap(warmup=3, train_factors=True)
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], 1e-2)
    model, optimizer = accelerator.prepare(whole, optimizer)
    loop(model, range(4), optimizer.optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    loop(model, range(4, 6), optimizer.optimizer)

    accelerator = Accelerator(cpu=True)
    resumed = wrap(warmup=3, train_factors=True)
    resumed.load_state_dict(load_file(tmp_path / "state" / "model.safetensors"), strict=False)
    optimizer = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], 1e-2)
    model, optimizer = accelerator.prepare(resumed, optimizer)
    accelerator.load_state(str(tmp_path / "state"))
    loop(model, range(4, 6), optimizer.optimizer)
    assert_bit_equal(tensors(resumed), tensors(whole))


def test_an_untied_model_goes_on_to_the_bit() -> None:
    """What safetensors leaves out of doubles is put back."""
    untied = Architecture(lambda **changes: LLAMA.config(**{"tie_word_embeddings": False, **changes}), LLAMA.model)
    model, other = (wrap(untied, warmup=3) for _ in range(2))
    loop(model, range(4))
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        loop(each, range(4, 6))
    assert_bit_equal(tensors(other), tensors(model))
