"""Every notebook is executed on a tiny model and with few steps; warnings are errors there, too."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from tiny_lm import POSITIONS, make_text, save_tiny_lm, save_tiny_task

from conftest import HOST_WARNINGS

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
SHORT = {"steps": 4, "batch_size": 2, "block_length": POSITIONS // 2, "eval_tokens": 128}
STRICT = f"""
import builtins, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("error")
for line in {HOST_WARNINGS}:
    action, message, category = line.split(":")
    warnings.filterwarnings(action, message, getattr(builtins, category))
"""


def read(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def execute(name: str, parameters: dict[str, Any], answer: str) -> tuple[dict[str, Any], int]:
    """Run a notebook with other parameters; the dict that the expression ``answer`` gives at its end, and the number of
    figures shown. As papermill does, the parameters come in a cell of their own after the tagged one."""
    notebook = read(name)
    tagged = [index for index, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) == 1
    known = {node.id for node in ast.walk(ast.parse(notebook.cells[tagged[0]].source)) if isinstance(node, ast.Name)}
    assert set(parameters) <= known
    given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell(given))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    lenient = "warnings.resetwarnings()"  # the kernel's own shutdown warns
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\n{lenient}\nprint(json.dumps({answer}))"))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    figures = sum("image/png" in output.get("data", ()) for output in outputs)
    return json.loads(notebook.cells[-1].outputs[-1].text), figures


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A cache in which the notebooks find model and text made already, and a place for what they save."""
    cache = tmp_path / "cache"
    save_tiny_lm(cache / "SmolLM2-135M-Instruct")
    (cache / "text").mkdir()
    (cache / "text" / "train.txt").write_text(make_text(2000))
    (cache / "text" / "eval.txt").write_text(make_text(300, seed=1))
    return {"cache": str(cache), "output": str(tmp_path / "output")}


def test_every_notebook_is_executed_here():
    executed = {"choose_size.ipynb", "classifier.ipynb", "four_bit.ipynb", "importance.ipynb", "quickstart.ipynb"}
    assert set(NOTEBOOKS) == executed


def test_recipe_index_leads_to_every_notebook():
    recipes = FOLDER.parent / "recipes"
    links = set(re.findall(r"\]\(([^)]+)\)", (recipes / "README.md").read_text(encoding="utf-8")))
    assert [link for link in links if not (recipes / link).exists()] == []
    assert {Path(link).name for link in links if link.endswith(".ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stripped(name: str):
    nbformat.validate(read(name))
    strip = [sys.executable, "-m", "nbstripout", "--verify", FOLDER / name]
    assert subprocess.run(strip, check=False).returncode == 0, "strip it: nbstripout notebooks/*.ipynb"


def test_quickstart(folders: dict[str, str], tmp_path: Path):
    answer = """{
        "param_ratio": size.param_ratio, "dense": dense_perplexity.value, "losses": len(losses), "cut": cut,
        "compact": compact_perplexity.value, "reloaded": reloaded_perplexity.value, "kept": kept.tolist(),
    }"""
    found, figures = execute("quickstart.ipynb", {**SHORT, **folders, "new_tokens": 4}, answer)
    assert figures == 2
    assert 0.5 < found["param_ratio"] <= 0.6
    assert (found["losses"], found["cut"]) == (4, 2)
    assert found["reloaded"] == pytest.approx(found["compact"], rel=1e-5)
    assert 1 < found["compact"] != pytest.approx(found["dense"], rel=1e-3)
    kept = [share for row in found["kept"] for share in row]
    assert len(kept) == 7 * 2
    assert min(kept) < 0.6 < max(kept) <= 1
    assert (tmp_path / "output" / "tokenizer.json").exists()


def test_classifier(tmp_path: Path):
    save_tiny_task(cache := tmp_path / "cache")
    (cache / "movie_reviews").mkdir()
    for name in ("train.jsonl", "dev.jsonl"):
        (cache / name).rename(cache / "movie_reviews" / name)
    (cache / "encoder").rename(cache / "all-MiniLM-L6-v2")
    answer = """{
        "accuracies": list(accuracies.values()), "sizes": list(accuracies), "reloaded": reloaded_accuracy,
        "kept": size.param_ratio, "faster": fastest["dense"] / fastest["compact"],
    }"""
    given = {"cache": str(cache), "output": str(tmp_path / "output"), "dense_steps": 20, "steps": 10, "batch_size": 8}
    found, figures = execute("classifier.ipynb", {**given, "param_ratio": 0.3, "other_sizes": [0.5]}, answer)
    assert figures == 1
    assert found["sizes"] == [0.3, 0.5]
    assert found["reloaded"] == found["accuracies"][0]
    assert all(0.4 < accuracy <= 1 for accuracy in found["accuracies"])
    assert 0.2 < found["kept"] <= 0.3
    assert found["faster"] > 0


def test_importance(folders: dict[str, str]):
    answer = """{
        "across": across, "results": results, "dense": dense_perplexity, "presets": presets,
        "within": {preset: float(np.median(list(values.values()))) for preset, values in correlation.items()},
        "share": {preset: float(np.mean(list(values.values()))) for preset, values in rank_share.items()},
    }"""
    given = {**SHORT, "steps": 12, "cache": folders["cache"], "shown_layer": "layers.1.mlp.up_proj"}
    found, figures = execute("importance.ipynb", given, answer)
    assert figures == 6
    assert found["across"]["lora_diagonal"] > 0.9
    assert found["within"]["lora_diagonal"] > 0.7
    assert found["within"]["lora_diagonal"] > found["within"]["lora"]
    assert set(found["results"]) == set(found["share"]) == set(found["presets"])
    assert all(1 < value < 1000 and value != found["dense"] for value in found["results"].values())
    # Each preset was in force; so few tokens are not added up, and what is a sketch of "kronecker" is all of it.
    assert found["results"]["lora_activation"] == found["results"]["kronecker"]
    assert len(set(found["results"].values())) == len(found["presets"]) - 1
    assert all(0 < share < 1 for share in found["share"].values())


def test_choose_size(folders: dict[str, str], tmp_path: Path):
    answer = """{
        "fronts": fronts, "chosen": chosen["name"], "reloaded": results.perplexity_reloaded,
        "points": {c["name"]: [c["size"].parameters, c["size"].bytes, c["perplexity"]] for c in candidates},
    }"""
    given = {**SHORT, **folders, "sizes": [0.5, 0.8]}
    found, figures = execute("choose_size.ipynb", given, answer)
    assert figures == 1
    points = found["points"]
    assert set(points) == {"dense", "0.5 pivoted", "0.8 pivoted", "0.5 factors", "0.8 factors"}
    dense = points["dense"]
    assert all(point[0] < dense[0] for name, point in points.items() if name != "dense")
    for index, quantity in enumerate(("parameters", "bytes")):
        pairs = {name: (point[index], point[2]) for name, point in points.items()}
        best = {
            name
            for name, (size, value) in pairs.items()
            if all(size < other or value < worse or (size, value) == (other, worse) for other, worse in pairs.values())
        }
        assert set(found["fronts"][quantity]) == best
    assert points[found["chosen"]][2] <= 1.2 * dense[2]
    assert found["reloaded"] == pytest.approx(points[found["chosen"]][2], rel=1e-5)
    card = (tmp_path / "output" / "compact" / "README.md").read_text(encoding="utf-8")
    assert f"| perplexity, reloaded | | {found['reloaded']:.3f}" in " ".join(card.split())


def test_four_bit(folders: dict[str, str]):
    save_tiny_lm(Path(folders["cache"]) / "SmolLM2-135M-Instruct", hidden=192, intermediate=384)
    found, figures = execute(
        "four_bit.ipynb", {**SHORT, **folders}, '{"sizes": sizes, "perplexities": perplexities, "same": same}'
    )
    assert figures == 1
    assert found["same"] is True
    assert found["sizes"]["compact NF4"] < 0.8 * found["sizes"]["dense NF4"]
    assert found["sizes"]["dense NF4"] < 0.4 * found["sizes"]["dense bfloat16"]
    assert all(1 < value < 1000 for value in found["perplexities"].values())
