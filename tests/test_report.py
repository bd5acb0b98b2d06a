"""The size that is reported is the size that is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import ARCHITECTURES, linear_sizes, trained

from lora_svd.compact import parameter_report


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("form", ["pivoted", "factors"])
def test_report_equals_the_hand_count(name: str, form: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    dense = architecture.build()
    sizes = {key: size for key, size in linear_sizes(dense).items() if key != "lm_head"}
    model = trained(tmp_path, architecture, factor_format=form, compensation="absorb", neurons=False)
    ranks = model.peft_config["default"].compact_ranks
    shapes = {key: layer.dense_weight().shape for key, layer in model.base_model.run().layers.items()}
    report = parameter_report(model.merge_and_unload())
    saved, low_rank = 0, {key: rank for key, rank in ranks.items() if rank < min(shapes[key])}
    for key, rank in low_rank.items():
        (rows, columns), layer = shapes[key], report.layers[key]
        numbers = rank * (rows + columns) - (rank * rank if form == "pivoted" else 0)
        index = 4 * rows if form == "pivoted" else 0  # int32 order
        expected = ((rows, columns), rank, numbers, rows * columns, 4 * numbers + index + 4)  # and the marker
        assert (layer.shape, layer.rank, layer.parameters, layer.dense_parameters, layer.bytes) == expected
        saved += rows * columns - numbers
    assert report.layers.keys() == low_rank.keys()
    total, targeted = sum(parameter.numel() for parameter in dense.parameters()), sum(sizes.values())
    assert (report.dense_parameters, report.parameters) == (total, total - saved)
    assert (report.dense_targeted_parameters, report.targeted_parameters) == (targeted, targeted - saved)
    assert report.param_ratio == (targeted - saved) / targeted
    assert report.model_param_ratio == (total - saved) / total
    before, overhead = parameter_report(dense), sum(x.bytes - 4 * x.parameters for x in report.layers.values())
    assert before.bytes == 4 * total + sum(4 * buffer.numel() for buffer in dense.buffers())
    assert report.bytes == before.bytes - 4 * saved + overhead
    assert before.param_ratio == before.model_param_ratio == 1
