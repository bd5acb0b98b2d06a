"""``lora-svd`` on a tiny model: the whole run, the recipes, and one clear line for everything it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftConfig
from tiny_lm import make_text, save_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from lora_svd import LoraSVDConfig
from lora_svd.cli import main
from lora_svd.compact import parameter_report
from lora_svd.evaluation import perplexity
from lora_svd.html_report.figures import FIGURES
from lora_svd.recipe import CompressArguments, read_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
# lm-eval's definitions of the benchmark's tasks are no recipes; test_benchmark_parts.py loads them
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent != FOLDER / "benchmarks/tasks")
NUM_RECIPES = 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with everything that ``write_recipe`` names."""
    monkeypatch.chdir(tmp_path)
    save_tiny_lm(tmp_path / "tiny")
    (tmp_path / "train.txt").write_text(make_text(600))
    (tmp_path / "eval.txt").write_text(make_text(200, seed=1))
    return tmp_path


def write_recipe(folder: Path, **changes: Any) -> str:
    """A complete recipe; a change to None leaves the field out."""
    values = {
        "model": "tiny",
        "train_text": "train.txt",
        "eval_text": "eval.txt",
        "block_length": 16,
        "window": 32,
        "prompt": "w1 w2 w3",
        "max_new_tokens": 4,
        "param_ratio": 0.6,
        "rank_multiple": 1,
        "r": 4,
        "output_dir": "out",
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    return str(path)


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a refused request prints."""
    assert main(words) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("lora-svd: error: ")]
    assert len(lines) == 1, captured.err
    return lines[0].removeprefix("lora-svd: error: ")


class TestCompress:
    def test_whole_run(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        assert main(["compress", write_recipe(folder, logging_steps=1), "--param_ratio", "0.5"]) == 0
        out = capsys.readouterr().out
        compact = folder / "out" / "compact"
        report = json.loads((compact / "report.json").read_text())

        tokenizer, model = (kind.from_pretrained(compact) for kind in (AutoTokenizer, AutoModelForCausalLM))
        size = parameter_report(model)
        assert size.param_ratio <= 0.5
        assert report["size"]["param_ratio"] == size.param_ratio
        assert report["size"]["parameters"] == size.parameters == sum(p.numel() for p in model.parameters())
        assert report["size"]["bytes"] == size.bytes < report["dense_bytes"]

        value = perplexity(model, tokenizer, (folder / "eval.txt").read_text(), 32, progress=False).value
        assert report["perplexity_reloaded"] == pytest.approx(value, rel=1e-6)
        assert report["perplexity_compact"] == pytest.approx(value, rel=1e-5)
        assert report["perplexity_compact"] != pytest.approx(report["perplexity_dense"], rel=1e-3)
        assert report["recipe"]["param_ratio"] == 0.5
        assert list(report["seconds"]) == [
            "load",
            "evaluate dense",
            "train and compress",
            "merge",
            "evaluate compact",
            "save",
            "reload and evaluate",
            "report",
        ]
        assert re.search(rf"parameters +\| +{size.dense_parameters:,} \| +{size.parameters:,} \|", out)
        assert f"{value:.3f}" in out
        assert re.search(r"Dense: +w1 w2 w3 w\d+", out)
        assert re.search(r"Compact: w1 w2 w3 w\d+", out)

        page = (folder / "out" / "report" / "index.html").read_text(encoding="utf-8")
        assert f"{size.parameters:,}" in page
        assert f"{value:.3f}" in page
        assert "w1 w2 w3" in page
        assert {path.stem for path in (folder / "out" / "report").glob("*.png")} == set(FIGURES)
        assert [path.name for path in compact.iterdir() if path.suffix in (".png", ".html")] == []

    def test_model_card_says_how_it_was_made_and_how_to_load_it(self, folder: Path):
        assert main(["compress", write_recipe(folder, prompt=None)]) == 0
        card = (folder / "out" / "compact" / "README.md").read_text()
        report = json.loads((folder / "out" / "compact" / "report.json").read_text())
        front, body = card.removeprefix("---\n").split("---\n", 1)
        assert yaml.safe_load(front)["library_name"] == "transformers"
        assert "import lora_svd" in body
        assert "Warning" in body
        assert f"{report['perplexity_reloaded']:.3f}" in body
        assert f"transformers {report['versions']['transformers']}" in body
        recipe = re.search(r"```yaml\n(.*?)```", body, re.DOTALL)
        assert recipe is not None
        assert yaml.safe_load(recipe[1]) == report["recipe"]

    def test_the_recipe_in_the_card_reproduces_the_model(self, folder: Path):
        assert main(["compress", write_recipe(folder), "--r=2", "--lr-scheduler-type", "cosine"]) == 0
        first = json.loads((folder / "out" / "compact" / "report.json").read_text())
        again = folder / "again.yaml"
        again.write_text(yaml.safe_dump(first["recipe"]))
        assert main(["compress", str(again)]) == 0
        second = json.loads((folder / "out" / "compact" / "report.json").read_text())
        assert second["recipe"] == first["recipe"]
        assert second["perplexity_reloaded"] == first["perplexity_reloaded"]

    def test_own_text_is_trained_on_besides(self, folder: Path):
        (folder / "train.txt").write_text(make_text(16))  # one block
        reports = []
        for words in ([], ["--own_text_blocks", "40"]):
            assert main(["compress", write_recipe(folder), *words]) == 0
            reports.append(json.loads((folder / "out" / "compact" / "report.json").read_text()))
        assert ["own text" in report["seconds"] for report in reports] == [False, True]
        without, with_it = (report["perplexity_reloaded"] for report in reports)
        assert with_it != pytest.approx(without, rel=1e-3)

    @pytest.mark.parametrize("words", [["--report_tokens", "0"], ["--report_sizes", "0.6"]])
    def test_no_other_sizes(self, folder: Path, words: list[str]):
        assert main(["compress", write_recipe(folder), *words]) == 0
        assert "None were tried" in (folder / "out" / "report" / "index.html").read_text(encoding="utf-8")

    def test_bfloat16_with_autocast(self, folder: Path):
        assert main(["compress", write_recipe(folder, dtype="bfloat16", bf16=True)]) == 0
        config = json.loads((folder / "out" / "compact" / "config.json").read_text())
        assert config["dtype"] == "bfloat16"

    def test_the_saved_model_generates_with_a_cache(self, folder: Path):
        """Trainer turns the cache off in the model's config."""
        assert main(["compress", write_recipe(folder)]) == 0
        assert json.loads((folder / "out" / "compact" / "config.json").read_text())["use_cache"] is True

    def test_without_the_import_loading_fails(self, folder: Path):
        assert main(["compress", write_recipe(folder)]) == 0
        code = "from transformers import AutoModelForCausalLM as M; M.from_pretrained('out/compact')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "MISMATCH" in done.stderr

    def test_a_model_that_changed_on_disk_is_refused(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        recipe = write_recipe(folder)

        def save_another_model(_: Any, target: Path, __: Any) -> None:
            save_tiny_lm(target)

        monkeypatch.setattr("lora_svd.run.save_compact", save_another_model)
        assert re.search(r"perplexity is [\d.]+ in memory but [\d.]+ when reloaded", fails(capsys, "compress", recipe))

    def test_a_full_disk_is_said_in_one_line(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        def no_space(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", no_space)
        line = fails(capsys, "compress", write_recipe(folder))
        assert "folder: cannot save to" in line
        assert "No space left on device" in line

    @pytest.mark.parametrize(
        ("changes", "words", "message"),
        [
            ({"parm_ratio": 0.5}, (), "recipe.yaml: unknown field 'parm_ratio'; did you mean param_ratio"),
            ({"xyzzy": 1}, (), "unknown field 'xyzzy'; `lora-svd compress --help` lists all fields"),
            ({}, ("--lerning_rate", "1"), "the command line: unknown field 'lerning_rate'; did you mean learning_rate"),
            ({}, ("--param_rati", "0.5"), "the command line: unknown field 'param_rati'; did you mean param_ratio"),
            ({"model": None}, (), "model: missing; set it in the recipe or give --model"),
            ({"model": "nowhere"}, (), "model: cannot load 'nowhere'"),
            ({"train_text": "no.txt"}, (), "train_text: no file 'no.txt'"),
            ({"eval_text": None}, (), "eval_text: missing"),
            ({"max_steps": "many"}, (), "argument --max_steps/--max-steps: invalid int value: 'many'"),
            ({"param_ratio": 1.5}, (), "param_ratio: got 1.5, expected a number in (0, 1]"),
            ({"importance": "magic"}, (), "importance: unknown value 'magic', expected one of ["),
            ({"dtype": "int8"}, (), "dtype: unknown value 'int8', expected one of ['auto', 'bfloat16'"),
            ({"report_sizes": [0.8, 2]}, (), "report_sizes: got 2, expected numbers in (0, 1]"),
            ({"report_tokens": -1}, (), "report_tokens: got -1, expected an integer >= 0"),
            ({"block_length": 1}, (), "block_length: got 1, expected an integer >= 2"),
            ({"own_text_blocks": -1}, (), "own_text_blocks: got -1, expected an integer >= 0"),
            ({"own_text_blocks": 1, "own_text_start": "<none>"}, (), "own_text: start is '<none>' and bos_token '<s>'"),
            ({"block_length": 65}, (), "block_length is 65, but the model has positions for 64 tokens"),
            ({"block_length": 601}, (), "train.txt: the text has 600 tokens, `block_length` asks for 601"),
            ({"window": 65}, (), "eval.txt: window is 65, but the model has positions for 64 tokens"),
            ({"target_modules": ["nothing"]}, (), "Target modules {'nothing'} not found in the base model"),
            ({"max_steps": 10, "warmup": 20}, (), "the run has only 10"),
            ({"bf16": True, "use_cpu": False}, (), "recipe.yaml: Your setup doesn't support bf16/gpu"),
            ({"lr_scheduler_type": "wavy"}, (), "recipe.yaml: wavy is not a valid SchedulerType"),
            ({}, ("--rank_pattern", "{"), "argument --rank_pattern/--rank-pattern: not a YAML value: '{'"),
        ],
    )
    def test_refuses(
        self,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
        changes: dict[str, Any],
        words: tuple[str, ...],
        message: str,
    ):
        assert message in fails(capsys, "compress", write_recipe(folder, **changes), *words)
        assert not (folder / "out" / "compact").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "recipe: no file 'recipe.yaml'"),
            ("a: [1", "recipe: recipe.yaml is not valid YAML"),
            ("- 1\n", "recipe: recipe.yaml must be a mapping from field names to values, got list"),
            ("", "recipe: recipe.yaml must be a mapping from field names to values, got NoneType"),
        ],
    )
    def test_refuses_a_file_that_is_no_recipe(
        self, folder: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
    ):
        if text is not None:
            (folder / "recipe.yaml").write_text(text)
        assert message in fails(capsys, "compress", "recipe.yaml")


class TestRecipe:
    def test_fields_are_declared_once(self):
        """A name in two of the three dataclasses would be one option with two meanings."""
        ours = {entry.name for entry in dataclasses.fields(LoraSVDConfig)} - {
            entry.name for entry in dataclasses.fields(PeftConfig)
        }
        run = {entry.name for entry in dataclasses.fields(CompressArguments)}
        training = {entry.name for entry in dataclasses.fields(TrainingArguments)}
        assert not ours & run
        assert not ours & training
        assert not run & training

    def test_values_reach_the_three_parts(self, folder: Path):
        path = write_recipe(
            folder,
            target_modules="[a-z]+_proj",
            exclude_modules=["k_proj"],
            rank_pattern={"q_proj": 2},
            learning_rate="1e-3",
            lr_scheduler_kwargs={"num_cycles": 2},
        )
        recipe = read_recipe(Path(path), ["--alpha_pattern", "{q_proj: 8}", "--window=16", "--seed", "-3", "--bf16"])
        assert recipe.config.target_modules == "[a-z]+_proj"  # a regular expression, not the YAML list it looks like
        assert set(recipe.config.exclude_modules or ()) == {"k_proj"}
        assert recipe.config.rank_pattern == {"q_proj": 2}
        assert recipe.config.alpha_pattern == {"q_proj": 8}
        assert recipe.config.task_type == "CAUSAL_LM"
        assert recipe.training.learning_rate == 1e-3
        assert recipe.training.lr_scheduler_kwargs == {"num_cycles": 2}
        assert (recipe.run.window, recipe.training.seed, recipe.training.bf16) == (16, -3, True)
        assert (recipe.chosen["window"], recipe.chosen["seed"]) == (16, -3)

    def test_defaults_are_those_of_the_dataclasses(self, folder: Path):
        recipe = read_recipe(Path(write_recipe(folder, param_ratio=None, rank_multiple=None, r=None)))
        assert recipe.config == LoraSVDConfig(task_type="CAUSAL_LM")

    @pytest.mark.usefixtures("folder")
    def test_all_recipes_are_valid(self):
        assert len(RECIPES) == NUM_RECIPES
        for path in RECIPES:
            recipe = read_recipe(path, ["--train_text", "train.txt", "--eval_text", "eval.txt"])
            assert recipe.config.param_ratio < 1

    @pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # bitsandbytes computes 8 bits in float16
    @pytest.mark.filterwarnings("ignore:merge_and_unload. the compact layers take:UserWarning")
    @pytest.mark.parametrize(("base", "export"), [("nf4", "nf4"), ("int8", "none"), ("none", "fp4")])
    def test_quantized_in_and_out(self, base: str, export: str, folder: Path):
        save_tiny_lm(folder / "tiny", hidden=192, intermediate=384)
        chosen = {"base_quantization": base, "export_quantization": export}
        recipe = write_recipe(folder, factor_format="factors", rank_multiple=64, max_steps=4, **chosen)
        assert main(["compress", recipe]) == 0
        compact = AutoModelForCausalLM.from_pretrained("out/compact")
        layer = compact.model.layers[0].mlp.up_proj
        assert type(layer.right).__name__ == ("Linear" if export == "none" else "Linear4bit")
        report = json.loads(Path("out/compact/report.json").read_text())
        assert report["recipe"] == yaml.safe_load(Path(recipe).read_text())
        assert report["perplexity_reloaded"] == pytest.approx(report["perplexity_compact"], rel=1e-3)
        assert report["size"]["bytes"] == parameter_report(compact).bytes

    def test_rounding_needs_plain_factors(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        assert main(["compress", write_recipe(folder, export_quantization="nf4")]) == 2
        assert "export_quantization: nf4 needs factor_format: factors" in capsys.readouterr().err


class TestEvaluate:
    def test_prints_what_the_function_returns(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        tokenizer, model = (kind.from_pretrained("tiny") for kind in (AutoTokenizer, AutoModelForCausalLM))
        expected = perplexity(model, tokenizer, (folder / "eval.txt").read_text(), 32, progress=False)
        words = ["evaluate", "tiny", "--text", "eval.txt", "--window", "32", "--device", "cpu"]
        assert main(words) == 0
        assert capsys.readouterr().out == f"perplexity {expected}\n"
        assert main([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == pytest.approx(dataclasses.asdict(expected))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("evaluate", "tiny"), "the following arguments are required: --text"),
            (("evaluate", "--text", "eval.txt"), "the following arguments are required: model"),
            (("evaluate", "tiny", "--text", "no.txt"), "text: cannot read 'no.txt' as UTF-8 text"),
            (("evaluate", "tiny", "--text", "eval.txt", "--windw", "8"), "evaluate: unknown option '--windw'"),
            (("evaluate", "tiny", "--text", "eval.txt"), "window is 1024, but the model has positions for 64 tokens"),
            (("evaluate", "nowhere", "--text", "eval.txt"), "model: cannot load 'nowhere'"),
            (("evaluate", "tiny", "--text", "eval.txt", "--device", "abacus"), "device: cannot use 'abacus'"),
            (("stream", "tiny", "--text", "eval.txt", "--output", "o", "--samples", "0"), "samples: got 0"),
            (("stream", "tiny", "--text", "eval.txt", "--output", "o", "--length", "0"), "`length` is 0, expected an"),
            (("stream", "tiny", "--text", "eval.txt", "--output", "o", "--length", "1"), "ids: got shape (64, 1)"),
            (("shrink",), "unknown command 'shrink', expected one of ['analyze', 'compress', 'evaluate', 'stream']"),
            (("compress",), "compress: the first word must be the recipe"),
            (("compress", "--param_ratio", "0.5"), "compress: the first word must be the recipe"),
        ],
    )
    @pytest.mark.usefixtures("folder")
    def test_refuses(self, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str):
        assert message in fails(capsys, *words)


def test_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["compress", "--help"]) == 0
    out = capsys.readouterr().out
    assert "lora-svd compress RECIPE.yaml [--field value ...]" in out
    for name in ("--param_ratio", "--train_text", "--learning_rate"):
        assert name in out


def test_stream_writes_a_compact_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", "train.txt", "--output", "small", "--length", "16", "--samples", "8", "--param_ratio", "0.6"]
    assert main(["stream", "tiny", *options, "--device", "cpu"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained("small"), AutoTokenizer.from_pretrained("small")
    size = parameter_report(model)
    assert 0.5 < size.param_ratio <= 0.6
    assert f"param_ratio {size.param_ratio:.4f}" in capsys.readouterr().out
    assert perplexity(model, tokenizer, (folder / "eval.txt").read_text(), window=32).value > 1
    assert main(["stream", "tiny", *options, "--device", "cpu"]) == 2
    assert "output: " in capsys.readouterr().err
