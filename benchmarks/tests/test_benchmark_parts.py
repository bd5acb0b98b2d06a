"""The accuracy tasks ask what lm-eval's own ask, and the benchmark's figure and tables show what was measured."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from ablation import by_depth, clipped, refit, without_rows
from accuracy import load_tasks, task_accuracies
from common import CostArguments, TextArguments, Texts
from cost_growth import costs, exponent, extrapolated, growth, tables
from figure import draw, plot, table, with_mean
from peft import get_peft_model
from tiny_lm import make_text, save_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaForCausalLM

from lora_svd import LoraSVDConfig
from lora_svd.compact import LowRankLinear
from lora_svd.errors import NumericalError
from lora_svd.evaluation import perplexity
from lora_svd.statistics import LayerStatistics


class CountingLM(LlamaForCausalLM):
    """Expects the next word of the list after each word, so that the right answers are known."""

    autocast: Any = None
    scale = 3.0
    firsts: frozenset[int] = frozenset()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        self.firsts = self.firsts.union(input_ids[:, 0].tolist())
        self.autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        following = (input_ids + 1) % self.config.vocab_size
        logits = self.scale * torch.nn.functional.one_hot(following, self.config.vocab_size)
        return SimpleNamespace(logits=logits.to(self.dtype))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


def counting_lm(folder: Path) -> tuple[CountingLM, Any]:
    return CountingLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def arc(stem: str, choices: list[str], answer: str, labels: str = "ABCD") -> dict[str, Any]:
    listed = [{"text": text, "label": label} for text, label in zip(choices, labels, strict=False)]
    return {"id": stem, "question": {"stem": stem, "choices": listed}, "answerKey": answer}


# Two documents of each task: CountingLM is right about the first and wrong about the second.
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "arc_easy/test.jsonl": [
        arc("What follows?", ["w7 w9 w4", "w7 w8 w9", "w7 w6 w5"], "B"),
        arc("What doesn't?", ["w3 w4", "it's w3"], "2", labels="12"),
    ],
    "hellaswag/validation_1000.jsonl": [
        # one surprise in each choice: the long one is less likely as a whole and likelier by character
        {"ind": 1, "query": "w1 w2", "choices": ["w9", "w20 w21 w22 w23 w24", "w50", "w40"], "gold": 1},
        {"ind": 2, "query": "w1 w2", "choices": ["w9", "w20 w21 w22 w23 w24", "w50", "w40"], "gold": 0},
    ],
    "lambada/test.jsonl": [{"text": "w1 w2,\n\nw3 w4 w5"}, {"text": "w1 w2 w3 w9"}],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, documents in DOCUMENTS.items():
        path = tmp_path / "data [of] a user" / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return tmp_path / "data [of] a user"


def test_requests_are_those_of_lm_eval(data: Path) -> None:
    asked = {}
    for name, task in load_tasks(data)["tasks"].items():
        task.build_all_requests()
        asked[name] = [(*request.args, task.doc_to_target(request.doc)) for request in task.instances]
    follows, not_follows = "Question: What follows?\nAnswer:", "Question: What doesn't?\nAnswer:"
    assert asked["arc_easy"] == [
        (follows, " w7 w9 w4", 1),
        (follows, " w7 w8 w9", 1),
        (follows, " w7 w6 w5", 1),
        (not_follows, " w3 w4", 1),
        (not_follows, " it's w3", 1),
    ]
    choices = [" w9", " w20 w21 w22 w23 w24", " w50", " w40"]
    assert asked["hellaswag"] == [("w1 w2", choice, gold) for gold in (1, 0) for choice in choices]
    assert asked["lambada"] == [("w1 w2,\n\nw3 w4", " w5", " w5"), ("w1 w2 w3", " w9", " w9")]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_right_answers_are_counted_up_to_the_limit(data: Path, model_folder: Path, batch_size: int) -> None:
    model, tokenizer = counting_lm(model_folder)
    names = ("arc_easy", "hellaswag", "lambada")
    assert task_accuracies(model, tokenizer, data, limit=1, batch_size=batch_size) == dict.fromkeys(names, 1.0)
    assert task_accuracies(model, tokenizer, data, batch_size=batch_size) == dict.fromkeys(names, 0.5)


BOS, EOS = 1, 2


@pytest.mark.parametrize(
    ("template", "bos", "front"),
    [
        ("", None, None),
        ("", True, BOS),
        ("<s> $A", None, BOS),
        ("<s> $A", False, None),
        ("<s> $A </s>", None, BOS),
        ("$A </s>", None, None),
        ("</s> $A", None, EOS),
    ],
)
def test_questions_begin_with_what_the_tokenizer_puts_in_front(
    data: Path, tmp_path: Path, template: str, bos: bool | None, front: int | None
) -> None:
    """What it puts behind a text is neither in a question nor a part of the answer."""
    model, tokenizer = counting_lm(save_tiny_lm(tmp_path / "model", template=template))
    accuracies = task_accuracies(model, tokenizer, data, bos=bos)
    assert accuracies == dict.fromkeys(("arc_easy", "hellaswag", "lambada"), 0.5)
    assert ({BOS, EOS} & model.firsts) == ({front} - {None})
    assert len(model.firsts) > 1 or front is not None


@pytest.mark.parametrize(("words", "front"), [([], "<s>"), (["--bos", "false"], None)])
def test_windows_of_a_benchmark_begin_with_bos(tmp_path: Path, words: list[str], front: str | None) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_lm(tmp_path / "model", template="<s> $A"))
    for name in ("train", "test"):
        (tmp_path / name).write_text(make_text(200))
    given = ["--model", tmp_path / "model", "--train", tmp_path / "train", "--test", f"words={tmp_path / 'test'}"]
    parser: Any = HfArgumentParser(TextArguments)
    (arguments,) = parser.parse_args_into_dataclasses([*map(str, given), "--results", "", "--window", "16", *words])
    texts = Texts(arguments)
    assert {example["input_ids"][0].item() == BOS for example in texts.examples} == {front is not None}
    assert len(texts.examples) == 200 // (15 if front else 16)
    found, options = texts.perplexities(model), {"window": 16, "bos": front is not None, "progress": False}
    expected = perplexity(model, texts.tokenizer, make_text(200), **options)
    assert (found.pop("words"), found) == (round(expected.value, 4), {"bos": front} if front else {})


def test_nothing_is_left_changed_printed_cached_or_asked_for(
    data: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    connections: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: connections.append(address))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of a user")
    model, tokenizer = counting_lm(model_folder)
    model.train()
    model.lm_head.eval()
    tokenizer.pad_token = tokenizer.unk_token = None
    level, state = logging.getLogger().level, torch.get_rng_state()
    task_accuracies(model, tokenizer, data)
    assert [module for module in model.modules() if not module.training] == [model.lm_head]
    assert tokenizer.pad_token is None
    assert logging.getLogger().level == level
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr().out == ""
    assert not (tmp_path / "cache of a user").exists()
    assert connections == []


def test_training_mode_is_restored_after_an_error(
    data: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = counting_lm(model_folder)
    model.train()
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(TypeError, match="not callable"):
        task_accuracies(model, tokenizer, data)
    assert all(module.training for module in model.modules())


def test_autocast_of_the_caller_reaches_the_model(data: Path, model_folder: Path) -> None:
    model, tokenizer = counting_lm(model_folder)
    task_accuracies(model, tokenizer, data, limit=1)
    assert model.autocast is False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        task_accuracies(model, tokenizer, data, limit=1)
    assert model.autocast is torch.bfloat16


def test_adapted_and_compact_models_in_any_dtype(data: Path, model_folder: Path) -> None:
    dense, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    expected = task_accuracies(dense, tokenizer, data)
    tuned = get_peft_model(dense, LoraSVDConfig(param_ratio=0.5, importance="none", warmup=1))
    assert task_accuracies(tuned, tokenizer, data) == expected  # the adapter is zero
    compact = tuned.merge_and_unload()
    assert any(isinstance(module, LowRankLinear) for module in compact.modules())
    for dtype in (torch.float32, torch.bfloat16):
        first = task_accuracies(compact.to(dtype), tokenizer, data)
        assert first == task_accuracies(compact, tokenizer, data)
        assert set(first) == set(expected)


def test_errors_say_what_to_do(data: Path, model_folder: Path) -> None:
    model, tokenizer = counting_lm(model_folder)
    with pytest.raises(ValueError, match="limit is 0; it must be at least 1 document, or None for all of them"):
        task_accuracies(model, tokenizer, data, limit=0)
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        task_accuracies(model, tokenizer, data, batch_size=0)
    model.scale = float("nan")
    with pytest.raises(NumericalError, match=r"document 0 of arc_easy has log-likelihoods .*: the weights hold NaN"):
        task_accuracies(model, tokenizer, data)
    (data / "lambada/test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"lambada/test\.jsonl is missing: lambada reads lambada/test\.jsonl"):
        load_tasks(data)


RESULTS: list[dict[str, Any]] = [
    {"row": "dense", "param_ratio": 1.0, "seed": 0, "words": 20.0, "arc_easy": 0.5},
    {"row": "svd", "param_ratio": 0.8, "seed": 0, "words": 100.0, "arc_easy": 0.3},
    {"row": "svd", "param_ratio": 0.6, "seed": 0, "words": float("inf")},
    {"row": "fwsvd", "param_ratio": 0.6, "seed": 0, "words": 123456.0},
    {"row": "ours", "param_ratio": 0.8, "seed": 0, "words": 24.0, "arc_easy": 0.44},
    {"row": "ours", "param_ratio": 0.8, "seed": 1, "words": 26.0, "arc_easy": 0.46},
    {"row": "ours", "param_ratio": 0.6, "seed": 0, "words": 30.0},
]


def test_figure_shows_each_row_relative_to_dense() -> None:
    asvd = {"row": "asvd", "seed": 0}
    more = [asvd | {"param_ratio": 0.8, "words": 40.0}, asvd | {"param_ratio": 0.6, "words": 2001.0}]
    figure = plot(RESULTS + more, "words")
    (axes,) = figure.axes
    (legend,) = figure.legends
    labels = ["dense, perplexity 20", "svd", "ours", "asvd", "more than 100 times dense"]
    labels += ["more than 100 at every size: fwsvd"]
    assert [text.get_text() for text in legend.get_texts()] == labels
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert list(lines["ours"].get_xdata()) == [0.8, 0.6]
    assert list(lines["ours"].get_ydata()) == [1.25, 1.5]
    assert lines["ours"].get_linewidth() > 2 * lines["svd"].get_linewidth()
    arrows = [line for line in axes.get_lines() if line.get_marker() == "^"]
    assert [list(line.get_ydata()) for line in arrows] == [[100], [100]]
    assert len({line.get_xdata()[0] for line in arrows}) == 2  # side by side
    (bar,) = axes.collections
    assert [segment.tolist() for segment in bar.get_segments()] == [[[0.8, 1.2], [0.8, 1.3]]]
    assert (axes.get_yscale(), axes.get_ylim()[1]) == ("log", 100)


def test_rows_are_told_apart_and_keep_their_style() -> None:
    rows = [f"{kind} {index}" for index in range(7) for kind in ("ours", "published")]
    results = [{"row": row, "param_ratio": 0.8, "seed": 0, "words": 30.0, "news": 30.0} for row in rows]
    del results[0]["news"]
    dense = {"row": "dense", "param_ratio": 1.0, "seed": 0, "words": 20.0, "news": 20.0}
    styles = []
    for text in ("words", "news"):
        lines = {line.get_label(): line for line in plot([dense, *results], text).axes[0].get_lines()}
        styles.append(
            {
                row: (lines[row].get_color(), lines[row].get_marker(), lines[row].get_linestyle())
                for row in rows
                if row in lines
            }
        )
    assert len(set(styles[0].values())) == len(rows)
    assert styles[1] == {row: styles[0][row] for row in rows[1:]}


def test_figure_is_written_as_png(tmp_path: Path) -> None:
    draw(RESULTS, "words", tmp_path / "figures/words.png")
    written = (tmp_path / "figures/words.png").read_bytes()
    assert written[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(written[16:20]) == 1800  # width in pixels


def test_table() -> None:
    assert table(RESULTS, ["words", "arc_easy"]) == (
        "| row | words 1.0 | words 0.8 | words 0.6 | arc_easy 1.0 | arc_easy 0.8 |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| dense | 20.00 (1.000) | - | - | 0.500 | - |\n"
        "| svd | - | 100.00 (5.000) | inf (inf) | - | 0.300 |\n"
        "| fwsvd | - | - | 123,456 (6,173) | - | - |\n"
        "| ours | - | 25.00 ± 1.41, n=2 (1.250) | 30.00 (1.500) | - | 0.450 ± 0.014, n=2 |\n"
    )


def test_results_without_the_dense_model_are_refused() -> None:
    for show in (plot, lambda results, text: table(results, [text])):
        with pytest.raises(ValueError, match=r"no result of row 'dense' at param_ratio 1\.0 has 'words'"):
            show(RESULTS[1:], "words")


def test_mean_accuracy_is_that_of_results_with_all_tasks() -> None:
    results = [
        {"row": "dense", "param_ratio": 1.0, "seed": 0, "arc_easy": 0.5, "lambada": 0.25},
        {"row": "ours", "param_ratio": 0.6, "seed": 0, "arc_easy": 0.5},
    ]
    assert table(with_mean(results, ["arc_easy", "lambada"]), ["mean accuracy", "lambada"]) == (
        "| row | mean accuracy 1.0 | lambada 1.0 |\n|---|---:|---:|\n| dense | 0.375 | 0.250 |\n"
    )


def test_costs_of_a_block() -> None:
    hidden, width = 32, 88  # 11008 / 4096 as wide, to a multiple of 8
    row = growth(CostArguments(model="", results="", batch=1, window=16, repetitions=1), hidden)
    assert row["weight_bytes"] == 4 * (4 * hidden**2 + 3 * hidden * width)
    # Gram matrices of the inputs of six layers and of down_proj, which they may share; the diagonal of each output's
    shared, single = (4 * (count * hidden**2 + width**2 + 5 * hidden + 2 * width) for count in (3, 6))
    assert shared <= row["statistics_bytes"] <= single
    assert row["factorization"] > 0 < row["whole_svds"]
    assert row["export"] > 0
    assert len(row["inference"]) == 4
    compared = [row["observing"], row["recovering"], *row["inference"].values()]
    assert all(pair["wall_ratio"] > 0 and pair["cpu_ratio"] > 0 for pair in compared)


def test_costs_follow_the_power_law_of_the_two_largest_sizes() -> None:
    cube = {256: 1.0, 4096: 1.5 * 4096**3, 1024: 1.5 * 1024**3}
    assert exponent(cube) == pytest.approx(3)
    assert extrapolated(cube, 8192) == pytest.approx(1.5 * 8192**3)
    assert extrapolated(cube, 4096) == 1.5 * 4096**3
    assert extrapolated({1024: 1.25, 2048: 1.25}, 8192) == 1.25


def test_growth_tables() -> None:
    def row(hidden: int) -> dict[str, Any]:
        size = hidden // 1024
        return {
            "hidden": hidden,
            "observing": {"cpu_ratio": 1.25},
            "recovering": {"cpu_ratio": 1.0},
            "factorization": 9.0 * size**3,
            "export": 4.5 * size**2,
            "statistics_bytes": 25_000_000 * size**2,
            "weight_bytes": 50_000_000 * size**2,
            "inference": {"prefill, pivoted": {"cpu_ratio": 0.5}},
        } | ({"whole_svds": 18.0 * size**3} if hidden < 4096 else {})

    block, models = tables(costs(map(row, (2048, 1024, 4096)))).split("\n\n")
    assert cells(block) == {
        "one block, hidden size": ["1024", "2048", "4096", "exponent", "8192, extrapolated"],
        "factorization, seconds": ["9.00", "72.0", "576", "3.00", "4,608"],
        "whole SVDs and roots, seconds": ["18.0", "144", "-", "3.00", "9,216"],
        "export, seconds": ["4.50", "18.0", "72.0", "2.00", "288"],
        "statistics, GB": ["0.0250", "0.100", "0.400", "2.00", "1.60"],
        "weight, GB": ["0.0500", "0.200", "0.800", "2.00", "3.20"],
        "step, observing / LoRA": ["1.25", "1.25", "1.25", "0.00", "1.25"],
        "step, recovering / LoRA": ["1.00", "1.00", "1.00", "0.00", "1.00"],
        "speed at 0.4, prefill, pivoted / dense": ["2.00", "2.00", "2.00", "-", "-"],
    }
    assert cells(models) == {
        "whole model": ["7B, 32 x 4096", "70B, 80 x 8192"],
        "factorization, core-hours": ["5.12", "102"],
        "whole SVDs and roots, core-hours": ["10.2", "205"],
        "export, core-hours": ["0.640", "6.40"],
        "statistics, GB": ["12.8", "128"],
        "weight, GB": ["25.6", "256"],
    }


def cells(markdown: str) -> dict[str, list[str]]:
    """Of a table, by first column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    return {name: entries for name, *entries in lines if not name.startswith("---")}


def test_ablations_change_what_they_say() -> None:
    rows, tokens = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64), 10
    seen = LayerStatistics({"signed_output_gram": tokens * rows}, {"token": tokens, "sample": 1, "step": 1})

    def changed(statistics: LayerStatistics) -> torch.Tensor:
        return statistics.mean("signed_output_gram")

    depths = [by_depth(f"model.layers.{block}.mlp.up_proj", seen, factor=4.0, blocks=3) for block in range(3)]
    for statistics, scale in zip(depths, (0.5, 1.0, 2.0), strict=True):
        torch.testing.assert_close(changed(statistics), scale * rows)
    alike = without_rows("layers.0.q_proj", seen, modules=("q_proj",))
    torch.testing.assert_close(changed(alike), 3 * torch.eye(2, dtype=torch.float64))
    assert without_rows("layers.0.v_proj", seen, modules=("q_proj",)) is seen
    limit = 1.2 * 3  # of eigenvalues 3 +- sqrt(2)
    values = torch.linalg.eigvalsh(changed(clipped("", seen, statistic="signed_output_gram", limit=1.2)))
    torch.testing.assert_close(values, torch.tensor([3 - 2**0.5, limit], dtype=torch.float64))


def test_weights_are_refitted_to_the_inputs_they_get() -> None:
    torch.manual_seed(0)
    dense, weight = torch.randn(50, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    compact = dense @ torch.randn(4, 4, dtype=torch.float64)
    mended = refit(weight, compact.T @ compact / 50, dense.T @ compact / 50, shrinkage=0.0)
    torch.testing.assert_close(compact @ mended.T, dense @ weight.T)
    gram = dense.T @ dense / 50
    torch.testing.assert_close(refit(weight, gram, gram), weight)
