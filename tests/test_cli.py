"""``lora-svd`` on a tiny model: the whole run, the recipes, and one clear line for everything it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftConfig
from tiny_lm import make_text, save_tiny_lm
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaModel, TrainingArguments

from lora_svd import LoraSVDConfig
from lora_svd.cli.arguments import CompressArguments
from lora_svd.cli.help import FOLDER as HELP_TEXTS
from lora_svd.cli.help import help_texts
from lora_svd.cli.recipe import read_recipe
from lora_svd.cli.report.figures import FIGURES
from lora_svd.compact import parameter_report
from lora_svd.evaluation import perplexity
from lora_svd.streaming.observe import Observation
from lora_svd_command import main

BOS = 1
FOLDER = Path(__file__).parents[1] / "recipes"
PACKAGE = Path(__file__).parents[1] / "lora_svd"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
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
        "text": "train.txt",
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


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with the descriptions of the progress bars."""
    shown: list[str] = []

    class Recorded(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            shown.append(options.get("desc", ""))
            super().__init__(*args, **options)

    for module in ("compression", "tuner.export", "evaluation", "cli.report.trained", "cli.report.page"):
        monkeypatch.setattr(f"lora_svd.{module}.tqdm", Recorded)
    monkeypatch.setattr("lora_svd.generation.trange", lambda n, **options: Recorded(range(n), **options))
    return shown


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a refused request prints."""
    assert main(words) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("lora-svd: error: ")]
    assert len(lines) == 1, captured.err
    return lines[0].removeprefix("lora-svd: error: ")


def windows_read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Filled with the token ids of every sequence that a model reads from its beginning."""
    read: list[list[int]] = []
    forward = LlamaModel.forward

    def spy(self: LlamaModel, input_ids: Tensor, *args: Any, **options: Any) -> Any:
        cache = options.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            read.extend(input_ids.tolist())
        return forward(self, input_ids, *args, **options)

    monkeypatch.setattr(LlamaModel, "forward", spy)
    return read


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

    def test_options_are_enough(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        sizes = ["--param_ratio", "0.6", "--block_length", "16", "--window", "32", "--r", "4", "--rank_multiple", "1"]
        assert main(["compress", "tiny", "--text", "train.txt", "--output", "small", *sizes]) == 0
        captured = capsys.readouterr()
        plan = captured.out.splitlines()[:3]
        assert plan[0].startswith("tiny: 14 layers with 15,360 parameters to 9,216 at most (param_ratio 0.6), the ")
        assert plan[1] == "30 steps of 64 tokens, 3.64 passes over the text: 12 observe, 18 recover."
        assert plan[2].startswith("Memory, at least: ")

        held_out = Path("small-run", "held_out.txt")
        assert (folder / "train.txt").read_text().endswith(held_out.read_text())
        assert f"The perplexities are those of {held_out}." in captured.out
        report = json.loads((folder / "small" / "report.json").read_text())
        page = Path("small-run", "report", "index.html")
        assert page.exists()
        assert f"The compact model is in small, a report with figures in {page}." in captured.out
        assert main(["evaluate", "small", "--text", str(held_out), "--window", "32"]) == 0
        assert f"perplexity {report['perplexity_reloaded']:.3f} (" in capsys.readouterr().out
        assert report["size"]["param_ratio"] <= 0.6
        assert report["recipe"] == {
            "model": "tiny",
            "text": "train.txt",
            "output": "small",
            "param_ratio": 0.6,
            "block_length": 16,
            "window": 32,
            "r": 4,
            "rank_multiple": 1,
        }
        assert [path.name for path in (folder / "small-run").iterdir() if path.name.startswith("checkpoint")] == []

    def test_every_wait_has_a_name(self, folder: Path, capsys: pytest.CaptureFixture[str], bars: list[str]):
        assert main(["compress", write_recipe(folder, own_text_blocks=2)]) == 0
        phases = re.findall(r"^lora-svd: (.*)$", capsys.readouterr().err, re.MULTILINE)
        assert phases == list(json.loads((folder / "out" / "compact" / "report.json").read_text())["seconds"])
        waits = {"own text", "spectra", "factors", "merge", "perplexity", "other sizes for the report", "figures"}
        assert waits == set(bars)

    def test_too_little_memory_is_said_before_weights_are_loaded(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("lora_svd.cli.plan.device_memory", lambda device: {"cpu": 100_000}[device.type])
        monkeypatch.setattr("lora_svd.cli.compress.load_model", lambda *_: pytest.fail("weights were loaded"))
        line = fails(capsys, "compress", write_recipe(folder))
        assert re.match(
            r"memory: the run takes at least 0.\d MB on cpu \(weights 0.1 MB, .*\), which has 0.1 MB\. Set", line
        )
        assert "`lora-svd stream`" in line

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

    @pytest.mark.parametrize(("words", "first"), [([], "<s>"), (["--bos", "false"], None)])
    def test_everything_begins_with_bos_where_the_tokenizer_puts_it(
        self, folder: Path, words: list[str], first: str | None, monkeypatch: pytest.MonkeyPatch
    ):
        save_tiny_lm(folder / "tiny", template="<s> $A")
        recipe = write_recipe(folder, own_text_blocks=3, own_text_start="w3", report_sizes=[0.9])
        read = windows_read(monkeypatch)
        assert main(["compress", recipe, *words]) == 0
        front = int(first is not None)  # in training, perplexity, behind the start of own text and the prompt
        assert {len(window) for window in read} == {16, 32, front + 1, front + 3}
        assert {window[0] == BOS for window in read} == {first is not None}
        assert all(window[1:2] != [BOS] for window in read)
        compact = folder / "out" / "compact"
        report = json.loads((compact / "report.json").read_text())
        assert report["bos"] == first
        assert report["perplexity_tokens"] == (200 // 31 if first else 200 // 32) * 31
        assert report["perplexity_reloaded"] == pytest.approx(report["perplexity_compact"], rel=1e-5)
        convention = f"{report['perplexity_tokens']} tokens, window 32, {'`<s>`' if first else 'no BOS'} in front"
        assert convention in (compact / "README.md").read_text()
        page = (folder / "out" / "report" / "index.html").read_text(encoding="utf-8")
        assert convention.replace("<s>", "&lt;s&gt;") in page

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

        monkeypatch.setattr("lora_svd.cli.compress.save_compact", save_another_model)
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
            ({"model": None}, (), "model: missing; give --model, or set it in the recipe"),
            ({"text": None}, (), "text: missing; give --text, or set it in the recipe"),
            ({"output_dir": None}, (), "output: missing; give --output FOLDER, or set it in the recipe"),
            ({"output": "tiny/.."}, (), "holds something else than a model (no config.json); name another folder"),
            ({"model": "nowhere"}, (), "model: cannot load 'nowhere'"),
            ({"text": "no.txt"}, (), "text: no file 'no.txt'"),
            ({"eval_text": "no.txt"}, (), "eval_text: no file 'no.txt'"),
            ({"eval_text": None, "window": 301}, (), "train.txt: eval_text: none given, and 600 tokens are too few"),
            ({}, ("0.5",), "the command line: got '0.5' without a field, expected --field value"),
            ({"max_steps": "many"}, (), "max_steps: invalid int value: 'many'"),
            ({"max_steps": 1.5}, (), "max_steps: invalid int value: '1.5'"),
            ({}, ("--max-steps",), "max_steps: expected one argument"),
            ({"r": 2.5}, (), "r: got 2.5, expected a positive integer"),
            ({}, ("--r", "many"), "r: got 'many', expected a positive integer"),
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
            ({}, ("--rank_pattern", "{"), "rank_pattern: not a YAML value: '{'"),
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

    def test_numbers_with_an_exponent_are_numbers(self, folder: Path):
        """YAML 1.1, which PyYAML reads, takes 1e-3 for a text."""
        path = Path(write_recipe(folder, learning_rate=None))
        path.write_text(path.read_text() + "row_shrinkage: 1e-3\nlearning_rate: 2E-4\nrun_name: 1e-3 again\n")
        recipe = read_recipe(path, ["--column_shrinkage", "5e-3", "--weight_decay=1e-2"])
        assert (recipe.config.row_shrinkage, recipe.config.column_shrinkage) == (1e-3, 5e-3)
        assert (recipe.training.learning_rate, recipe.training.weight_decay) == (2e-4, 1e-2)
        assert recipe.training.run_name == "1e-3 again"
        assert recipe.chosen["row_shrinkage"] == 1e-3

    def test_flags_stand_alone_or_have_a_value(self, folder: Path):
        recipe = read_recipe(Path(write_recipe(folder)), ["--train_factors", "--init-weights", "false", "--bf16"])
        assert recipe.config.train_factors
        assert recipe.training.bf16
        assert not recipe.config.init_weights
        assert recipe.chosen["train_factors"] is True

    def test_what_the_trainer_is_told_by_itself(self, folder: Path):
        given = {"learning_rate": None, "save_strategy": None, "use_cpu": None}
        training = read_recipe(write_recipe(folder, **given)).training
        assert (training.learning_rate, training.save_strategy, training.bf16) == (1e-3, "no", False)
        assert training.use_cpu != torch.accelerator.is_available()
        training = read_recipe(write_recipe(folder, **given, dtype="bfloat16", save_steps=2)).training
        assert (training.save_strategy, training.bf16) == ("steps", True)
        training = read_recipe(write_recipe(folder, **given, dtype="bfloat16"), ["--bf16", "false"]).training
        assert not training.bf16

    def test_defaults_are_those_of_the_dataclasses(self, folder: Path):
        recipe = read_recipe(Path(write_recipe(folder, param_ratio=None, rank_multiple=None, r=None)))
        assert recipe.config == LoraSVDConfig(task_type="CAUSAL_LM")

    @pytest.mark.usefixtures("folder")
    def test_all_recipes_are_valid(self):
        assert len(RECIPES) == NUM_RECIPES
        for path in RECIPES:
            recipe = read_recipe(path, ["--text", "train.txt", "--eval_text", "eval.txt"])
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
        part = getattr(layer, "right", layer)  # a layer without some neurons may be dense
        assert type(part).__name__ == ("Linear" if export == "none" else "Linear4bit")
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

    def test_bos_as_the_tokenizer_does_or_as_asked(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        save_tiny_lm(folder / "beginning", template="<s> $A")
        words = ["--text", "eval.txt", "--window", "32", "--device", "cpu"]
        asked = {("tiny", ""): False, ("tiny", "true"): True, ("beginning", ""): True, ("beginning", "false"): False}
        read = windows_read(monkeypatch)
        for (model, bos), begins in asked.items():
            read.clear()
            assert main(["evaluate", model, *words, *(["--bos", bos] if bos else [])]) == 0
            assert {window[0] == BOS for window in read} == {begins}
            assert capsys.readouterr().out.endswith(f" window 32, {'`<s>`' if begins else 'no BOS'} in front)\n")
        refused = fails(capsys, "evaluate", "tiny", *words, "--bos", "maybe")
        assert refused.startswith("bos: Truthy value expected: got maybe")

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
            (("compress",), "compress: the first word is missing, expected a model or a recipe"),
            (("compress", "--param_ratio", "0.5"), "compress: the first word is --param_ratio, expected a model or a"),
            (("compress", "nowhere", "--text", "eval.txt", "--output", "o"), "model: cannot load 'nowhere'"),
            (("compress", "tiny", "--output", "o"), "text: missing; give --text"),
            (("compress", "tiny", "--text", "eval.txt"), "output: missing; give --output FOLDER"),
            (("compress", "tiny", "--txt", "eval.txt"), "the command line: unknown field 'txt'; did you mean text"),
        ],
    )
    @pytest.mark.usefixtures("folder")
    def test_refuses(self, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str):
        assert message in fails(capsys, *words)


def test_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    for name, text in help_texts().items():
        assert f"lora-svd {name} " in usage
        assert main([name, "--help"]) == main([name, "MODEL", "-h"]) == 0
        assert capsys.readouterr().out == 2 * text, "run `python -m lora_svd.cli.help`"


def test_help_has_our_fields_and_help_all_every_field(capsys: pytest.CaptureFixture[str]):
    assert main(["compress", "--help"]) == 0
    ours = capsys.readouterr().out
    for text in ("--text\n", "--param_ratio (0.8)\n", "--learning_rate (0.001)\n", "`lora-svd compress --help-all`"):
        assert text in ours
    assert "--adam_beta1" not in ours
    assert main(["compress", "--help-all"]) == 0
    every = capsys.readouterr().out
    fields = dataclasses.fields(TrainingArguments)
    assert [entry.name for entry in fields if entry.init and f"--{entry.name}" not in every] == []


@pytest.mark.parametrize(("words", "begins"), [([], True), (["--bos", "no"], False)])
def test_stream_reads_bos_in_front(
    folder: Path, words: list[str], begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_lm(folder / "tiny", template="<s> $A")
    read: list[Tensor] = []
    run = Observation.run
    monkeypatch.setattr(Observation, "run", lambda self: (read.append(self.ids), run(self))[1])
    options = ["--text", "train.txt", "--output", "small", "--length", "16", "--samples", "8", "--device", "cpu"]
    assert main(["stream", "tiny", *options, *words]) == 0
    (ids,) = read
    assert ids.shape == (8, 16)
    assert ((ids == BOS).sum(1) == begins).all()
    assert (ids[:, 0] == BOS).all() == begins


def test_help_of_the_command_loads_nothing():
    code = "import sys, lora_svd_command as c; print(c.main({}), *sys.modules)"
    for words in (["--help"], ["compress", "--help"], ["stream", "-h"]):
        done = subprocess.run([sys.executable, "-c", code.format(words)], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("usage: lora-svd ")
        code_and_modules = done.stdout.splitlines()[-1].split()
        assert code_and_modules[0] == "0"
        assert {"torch", "transformers", "peft", "lora_svd"} & set(code_and_modules) == set()


def test_the_command_is_installed_with_the_package():
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"lora-svd": f"{main.__module__}:{main.__name__}"}
    assert main.__module__ in project["tool"]["setuptools"]["py-modules"]
    packaged = {
        path for glob in project["tool"]["setuptools"]["package-data"]["lora_svd"] for path in PACKAGE.glob(glob)
    }
    assert set(HELP_TEXTS.iterdir()) <= packaged


def test_stream_writes_a_compact_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", "train.txt", "--output", "small", "--length", "16", "--samples", "8", "--param_ratio", "0.6"]
    assert main(["stream", "tiny", *options, "--device", "cpu"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained("small"), AutoTokenizer.from_pretrained("small")
    size = parameter_report(model)
    assert 0.5 < size.param_ratio <= 0.6
    assert f"param_ratio {size.param_ratio:.4f}" in capsys.readouterr().out
    assert model.config.quantization_config.shapes
    assert perplexity(model, tokenizer, (folder / "eval.txt").read_text(), window=32).value > 1
    assert main(["stream", "tiny", *options, "--device", "cpu"]) == 2
    assert "output: " in capsys.readouterr().err
    options[3] = "ranks"
    assert main(["stream", "tiny", *options, "--device", "cpu", "--neurons", "no"]) == 0
    assert not AutoModelForCausalLM.from_pretrained("ranks").config.quantization_config.shapes
