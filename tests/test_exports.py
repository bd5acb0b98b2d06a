"""A compact model is compiled and exported like any other, and gives the same logits."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from models import ARCHITECTURES, Architecture, logits, trained
from torch import Tensor
from transformers import PreTrainedModel

from lora_svd.compact import LowRankLinear

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def compact_model(name: str, form: str, folder: Path) -> tuple[PreTrainedModel, Architecture]:
    architecture = ARCHITECTURES[name]
    model = trained(folder, architecture, factor_format=form).merge_and_unload().eval()
    model.config.use_cache = False  # a cache is no tensor
    return model, architecture


def inputs_of(architecture: Architecture) -> dict[str, Tensor]:
    return {name: value for name, value in architecture.inputs().items() if name != "labels"}


def test_compile(tmp_path: Path) -> None:
    """In one graph, without a break; and by the default backend, of which one layer must do, since it takes long."""
    model, architecture = compact_model("llama", "pivoted", tmp_path)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs_of(architecture)).logits, logits(model, architecture), **CLOSE)
        layer = next(module for module in model.modules() if isinstance(module, LowRankLinear))
        x = torch.randn(3, 5, layer.in_features)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), **CLOSE)


@pytest.mark.parametrize(("name", "form"), [("llama", "pivoted"), ("gpt2", "factors")])
def test_export(name: str, form: str, tmp_path: Path) -> None:
    model, architecture = compact_model(name, form, tmp_path)
    inputs = inputs_of(architecture)
    length = torch.export.Dim("length", min=2, max=32)
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes={name: {1: length} for name in inputs})
        for given in (inputs, {name: value[:, :5] for name, value in inputs.items()}):
            torch.testing.assert_close(program.module()(**given).logits, model(**given).logits, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")  # torch.onnx asks torch
def test_onnx(tmp_path: Path) -> None:
    """Run by onnxruntime, with another number of rows and another length than it was exported with."""
    model, architecture = compact_model("llama", "pivoted", tmp_path)
    inputs = inputs_of(architecture)
    shapes = {name: {0: "rows", 1: "length"} for name in inputs}
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (), path, kwargs=inputs, dynamo=True, dynamic_shapes=shapes, output_names=["logits"])
    session = onnxruntime.InferenceSession(path)
    for rows, length in ((2, 8), (3, 5)):
        given = torch.randint(3, 64, (rows, length))
        (found,) = session.run(["logits"], {"input_ids": given.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(input_ids=given).logits, **CLOSE)
