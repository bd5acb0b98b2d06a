"""A compact model is compiled and exported like any other, and gives the same logits."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from models import LLAMA, make_trainer, settings
from peft import get_peft_model
from transformers import PreTrainedModel

from lora_svd.compact import LowRankLinear

INPUTS = {"input_ids": LLAMA.inputs()["input_ids"]}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def compact_model(form: str, folder: Path) -> PreTrainedModel:
    """Of one layer, since what a compiler does with a graph takes long."""
    model = get_peft_model(LLAMA.build(num_hidden_layers=1), settings(factor_format=form))
    make_trainer(model, folder).train()
    compact = model.merge_and_unload().eval()
    compact.config.use_cache = False  # a cache is no tensor
    return compact


def test_compile(tmp_path: Path) -> None:
    """In one graph, without a break; and by the default backend, of which one layer must do, since it takes long."""
    model = compact_model("pivoted", tmp_path)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**INPUTS).logits, model(**INPUTS).logits, **CLOSE)
        layer = next(module for module in model.modules() if isinstance(module, LowRankLinear))
        x = torch.randn(3, 5, layer.in_features)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), **CLOSE)


@pytest.mark.parametrize("form", ["pivoted", "factors"])
def test_export(form: str, tmp_path: Path) -> None:
    model, shapes = compact_model(form, tmp_path), {"input_ids": {1: torch.export.Dim("length", min=2, max=32)}}
    with torch.no_grad():
        program = torch.export.export(model, (), INPUTS, dynamic_shapes=shapes)
        for given in (INPUTS, {"input_ids": INPUTS["input_ids"][:, :5]}):
            torch.testing.assert_close(program.module()(**given).logits, model(**given).logits, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")  # torch.onnx asks torch
def test_onnx(tmp_path: Path) -> None:
    """Run by onnxruntime, with another number of rows and another length than it was exported with."""
    model, path = compact_model("pivoted", tmp_path), tmp_path / "model.onnx"
    shapes = {"input_ids": {0: "rows", 1: "length"}}
    torch.onnx.export(model, (), path, kwargs=INPUTS, dynamo=True, dynamic_shapes=shapes, output_names=["logits"])
    session = onnxruntime.InferenceSession(path)
    for rows, length in ((2, 8), (3, 5)):
        given = torch.randint(3, 64, (rows, length))
        (found,) = session.run(["logits"], {"input_ids": given.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(input_ids=given).logits, **CLOSE)
