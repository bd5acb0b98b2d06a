"""``lora-svd analyze``: its tables, JSON and figures for models on disk, before and after, and for an adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from models import ARCHITECTURES, LLAMA, trained
from PIL import Image

from lora_svd.analysis.models import analyze_folder
from lora_svd.analysis.summary import by_projection
from lora_svd_command import main

NUM_LAYERS = 14


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a dense model, an adapter of it and the compact model."""
    monkeypatch.chdir(tmp_path)
    LLAMA.build().save_pretrained("dense")
    model = trained(tmp_path / "run", task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "dense")
    model.save_pretrained("adapter")
    model.merge_and_unload().save_pretrained("compact")
    return tmp_path


def out_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(("analyze", *words)) == 0
    return capsys.readouterr().out


def column(out: str, title: str) -> dict[str, float]:
    """A column of the first table that has it, by projection."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    heading = next(row for row in rows if title in row)
    table = rows[rows.index(heading) + 2 :]
    return {row[0]: float(row[heading.index(title)]) for row in table[:7]}


def test_tables_say_what_the_functions_return(folder: Path, capsys: pytest.CaptureFixture[str]):
    out = out_of(capsys, "dense")
    layers = analyze_folder(folder / "dense")
    assert out.startswith(f"dense: {NUM_LAYERS} linear layers\n")
    for title, name in (("effective rank", "weight.effective_rank"), ("90 % energy at", "weight.rank_90_share")):
        expected = {projection: means[name] for projection, means in by_projection(layers).items()}
        assert column(out, title) == pytest.approx(expected, rel=0.01)
    assert column(out, "layers") == dict.fromkeys(by_projection(layers), 2)
    lowest = min(layers.values(), key=lambda layer: layer.weight.effective_rank / layer.weight.size)
    share = lowest.weight.effective_rank / lowest.weight.size
    assert f"lowest effective rank of a weight / full rank\n  {share:.3f}  {lowest.name}\n" in out


@pytest.mark.usefixtures("folder")
def test_before_and_after(capsys: pytest.CaptureFixture[str]):
    out = out_of(capsys, "compact", "--before", "dense", "--output", "both.json", "--figures", "figures")
    before, after = out.split(f"compact: {NUM_LAYERS} linear layers\n")
    assert before.startswith(f"dense: {NUM_LAYERS} linear layers\n")
    ranks = {text: sum(column(text, "effective rank").values()) for text in (before, after)}
    assert ranks[after] < 0.9 * ranks[before]
    written = json.loads(Path("both.json").read_text())
    assert written["before"]["model"] == "dense"
    for name, layer in written["layers"].items():
        assert layer["rank"] is None or layer["rank"] <= min(layer["shape"])
        assert layer["weight"]["effective_rank"] < 1.01 * written["before"]["layers"][name]["weight"]["effective_rank"]
    assert Path("figures/effective_rank_weight_before.png").is_file()


def test_an_adapter_has_features_and_weighted_spectra(folder: Path, capsys: pytest.CaptureFixture[str]):
    out = out_of(capsys, "adapter", "--output", "adapter.json", "--spectra", "true", "--figures", "figures")
    mean = re.search(r"energy / full rank, mean: weight ([\d.]+), features ([\d.]+), weighted ([\d.]+)\n", out)
    assert mean is not None
    weight, features, weighted = map(float, mean.groups())
    assert weighted < weight > features
    for kind in ("weight", "features", "weighted"):
        assert f"\n{kind}, means by projection\n" in out
        assert Path(f"figures/effective_rank_{kind}.png").is_file()
    written = json.loads(Path("adapter.json").read_text())
    layers = analyze_folder(folder / "adapter")
    assert written["layers"].keys() == layers.keys()
    assert list(written["by_depth"]) == ["0", "1"]
    for name, layer in layers.items():
        assert layer.features is not None
        assert written["layers"][name]["features"]["singular_values"] == layer.features.singular_values.tolist()
        assert written["layers"][name]["entries"]["kurtosis"] == layer.entries.kurtosis


@pytest.mark.usefixtures("folder")
def test_figures_and_json_of_one_model(capsys: pytest.CaptureFixture[str]):
    out_of(capsys, "dense", "--output", "dense.json", "--figures", "new/figures")
    names = {path.stem for path in Path("new/figures").iterdir()}
    assert names == {"energy", "energy_by_projection", "effective_rank_weight", "kurtosis", "stable_rank"}
    for path in Path("new/figures").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
    written = json.loads(Path("dense.json").read_text())
    assert "before" not in written
    assert "singular_values" not in written["layers"]["model.layers.0.mlp.up_proj"]["weight"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: model"),
        (("nowhere",), "nowhere is not a folder with a model of transformers"),
        (("dense", "--befor", "x"), "analyze: unknown option '--befor'; `lora-svd analyze --help` lists them"),
        (("dense", "--spectra", "true"), "spectra: they go to the JSON file; name it with --output"),
        (("dense", "--output", "no/such/folder.json"), "analyze: cannot write:"),
        (("dense", "--before", "other"), "before: other has no layer in common with dense"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_refuses(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str):
    ARCHITECTURES["bert"].build().save_pretrained("other")
    assert main(("analyze", *words)) == 2
    assert message in capsys.readouterr().err
