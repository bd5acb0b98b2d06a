"""The page of a run: well-formed, self-contained, escaped, with the numbers that were measured; and what feeds it."""

from __future__ import annotations

import base64
import copy
import logging
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, LLAMA, TIED, assert_bit_equal, logits, make_trainer, tensors, wrap
from PIL import Image
from torch import nn

from lora_svd.cli.report import Measured, ReportData, TrainedRun, bytes_by_part, recorded_messages, write_report
from lora_svd.cli.report.figures import FIGURES, draw_figures, examples
from lora_svd.cli.results import RunResults
from lora_svd.compact import parameter_report
from lora_svd.evaluation import Perplexity

SECTIONS = ["results", "sizes", "ranks", "importance", "training", "bytes", "samples", "warnings", "recipe"]
EVIL = '</pre><script>alert("x")</script>&amp;$\\frac'
VOID = {"meta", "img", "link", "br"}


@dataclass
class Page(HTMLParser):
    """What a browser would find."""

    text: str
    sections: dict[str, str] = field(default_factory=dict)
    tags: Counter[str] = field(default_factory=Counter)
    references: list[str] = field(default_factory=list)
    images: list[tuple[str, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections[given["id"] or ""] = ""
        if tag == "img":
            kind, data = (given["src"] or "").split(",", 1)
            assert kind == "data:image/png;base64"
            self.images.append((given["alt"] or "", base64.b64decode(data, validate=True)))
        elif given.keys() & {"src", "href", "srcset", "action", "data"}:
            self.references.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.sections:
            self.sections[[*self.sections][-1]] += data


def train(folder: Path, **changes: Any) -> tuple[Any, TrainedRun]:
    model = wrap(**changes)
    trainer = make_trainer(model, folder, logging_strategy="steps", logging_steps=1)
    trainer.train()
    return model.eval(), TrainedRun(model.base_model, trainer.state)


def measured(model: nn.Module, value: float, says: str = "") -> Measured:
    return Measured(parameter_report(model), bytes_by_part(model), Perplexity(value, 1234, 32), says)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    """Of a real, tiny run, with hostile texts."""
    tuned, trained = train(tmp_path_factory.mktemp("run"), train_factors=True)
    dense, compact = measured(LLAMA.build(), 12.3456, EVIL), measured(tuned.merge_and_unload(), 14.5678, EVIL)
    run = RunResults(
        model=f"models/{EVIL}",
        dense_bytes=dense.size.bytes,
        size=compact.size,
        perplexity_dense=dense.perplexity.value,
        perplexity_compact=compact.perplexity.value,
        perplexity_reloaded=14.5679,
        perplexity_tokens=1234,
        window=32,
        seconds={"load": 1.5},
        recipe={"prompt": EVIL, "param_ratio": 0.6},
    )
    layer = "model.layers.1.mlp.up_proj"
    messages = Counter({("UserWarning", f"{layer}: {EVIL}"): 3, ("transformers", "a log line"): 1})
    perplexities = {None: dense.perplexity, 0.5999: compact.perplexity, 0.7999: Perplexity(13.579, 992, 32)}
    return ReportData(run, dense, compact, trained.summary(), perplexities, EVIL, messages)


@pytest.fixture(scope="module")
def folder(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(data, tmp_path_factory.mktemp("report") / "new").parent


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


class TestPage:
    def test_sections_and_nothing_from_elsewhere(self, page: Page):
        assert list(page.sections) == SECTIONS
        assert page.references == []
        assert not page.tags.keys() & {"script", "link", "iframe", "object"}
        assert not re.search(r"https?:|@import|url\(", page.text)

    def test_numbers_are_those_of_the_run(self, page: Page, data: ReportData):
        size = data.run.size
        for number in (size.parameters, size.dense_parameters, size.bytes, data.run.dense_bytes):
            assert f"{number:,}" in page.sections["results"]
        for text in (f"param_ratio {size.param_ratio:.4f}", "12.346", "14.568", "1,234 tokens"):
            assert text in page.sections["results"]
        for text in ("dense", "0.5999", "14.568", "0.7999", "13.579", "992"):
            assert text in page.sections["sizes"]
        for parts in (data.dense.bytes_by_part, data.compact.bytes_by_part):
            assert all(f"{count:,}" in page.sections["bytes"] for count in parts.values())

    def test_text_of_users_is_text(self, page: Page):
        assert page.sections["samples"].count(EVIL) == 3
        assert EVIL in page.sections["warnings"]
        assert 'alert("x")' in page.sections["recipe"]
        assert page.text.count("alert(") == page.text.count("&lt;script&gt;alert(") > 5

    def test_warnings_have_count_module_and_source(self, page: Page):
        cells = page.sections["warnings"].split("\n")
        assert any(line.startswith("3model.layers.1.mlp.up_projUserWarning") for line in cells)
        assert any(line == "1transformersa log line" for line in cells)

    def test_figures_are_drawn_and_equal_to_the_files(self, page: Page, folder: Path):
        files = {path.stem: path.read_bytes() for path in folder.glob("*.png")}
        assert set(files) == set(FIGURES)
        assert sorted(png for _, png in page.images) == sorted(files.values())
        assert all(alt for alt, _ in page.images)
        for png in files.values():
            with Image.open(BytesIO(png)) as image:
                assert len(image.convert("RGB").getcolors(maxcolors=1_000_000) or ()) > 20

    def test_nothing_to_show(self, data: ReportData, tmp_path: Path):
        for name in FIGURES:
            (tmp_path / f"{name}.png").write_bytes(b"of an earlier run")
        training = replace(data.training, layers={}, log=[])
        bare = replace(data, training=training, perplexities={}, prompt="", messages=Counter())
        page = Page(write_report(bare, tmp_path).read_text(encoding="utf-8"))
        assert list(page.sections) == SECTIONS
        assert [path.stem for path in tmp_path.glob("*.png")] == ["bytes"]
        assert "None were tried" in page.sections["sizes"]
        assert "Nothing was compressed." in page.sections["ranks"]
        assert "No prompt was given." in page.sections["samples"]
        assert "None." in page.sections["warnings"]


class TestFigures:
    def test_size_falls_at_the_factorization(self, data: ReportData):
        (line,) = draw_figures(data)["size"].axes[0].lines
        end = data.training.schedule.warmup_end
        assert list(line.get_xdata()) == [0, end, end, 5]
        assert list(line.get_ydata()) == [1, 1, 0.6, 0.6]

    def test_importance_is_the_sum_over_a_depth(self, data: ReportData):
        whole, discarded = draw_figures(data)["importance"].axes[0].lines
        layers = data.training.layers
        first = {name: layer for name, layer in layers.items() if name.startswith("model.layers.0.")}
        expected = sum(float(layer.spectrum.sum()) for layer in first.values())
        cut = sum(float(layer.spectrum[layer.rank :].sum()) for layer in first.values() if layer.kept_share < 1)
        assert whole.get_ydata()[0] == pytest.approx(expected)
        assert discarded.get_ydata()[0] == pytest.approx(cut)

    def test_spectra_are_cut_at_the_kept_rank(self, data: ReportData):
        figure = draw_figures(data)["spectra"]
        chosen = examples(data.training.layers)
        lines = figure.axes[0].lines
        assert [line.get_xdata()[0] for line in lines[len(chosen) :]] == [layer.rank for layer in chosen.values()]
        shares = [layer.kept_share for layer in chosen.values()]
        assert shares == sorted(shares, reverse=True)

    def test_loss_is_what_the_trainer_logged(self, data: ReportData):
        line = draw_figures(data)["loss"].axes[0].lines[0]
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
        assert list(line.get_ydata()) == [entry["loss"] for entry in data.training.log if "loss" in entry]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bert"])
def test_parts_add_up_to_the_bytes_of_the_model(name: str):
    model = ARCHITECTURES[name].build()
    parts = bytes_by_part(model)
    assert sum(parts.values()) == parameter_report(model).bytes
    assert min(parts["embeddings"], parts["attention"], parts["MLP"], parts["other"]) > 0


def test_parts_of_a_llama():
    tied, untied = bytes_by_part(LLAMA.build()), bytes_by_part(LLAMA.build(tie_word_embeddings=False))
    assert tied["embeddings"] == untied["embeddings"] == untied["head"] == 64 * 32 * 4
    assert tied["head"] == 0
    assert tied["attention"] == 2 * 3 * 32 * 32 * 4  # keys and values have half the heads
    assert tied["MLP"] == 2 * 3 * 32 * 48 * 4


class TestTrainedRun:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"train_factors": True},
            {"compensation": "keep"},
            {"factor_format": "factors"},
            {"factor_format": "factors", "decomposition": "kronecker"},
            {"importance": "fisher_elementwise"},
            {"target_modules": ["embed_tokens", "up_proj"]},
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore:alternating least squares")
    @TIED
    def test_another_size_is_that_of_set_param_ratio(self, changes: dict[str, Any], tmp_path: Path):
        model, trained = train(tmp_path, **changes)
        others = {ratio: copy.deepcopy(model) for ratio in (0.8, 0.9, 0.5)}
        compact = model.merge_and_unload()
        before, seen = tensors(compact), {}

        def measure(asked: nn.Module) -> Perplexity:
            ratio = parameter_report(asked).param_ratio
            seen[ratio] = logits(asked)
            return Perplexity(ratio, 1, 2)

        found = trained.perplexities(compact, [0.8, 0.6, 0.9, 0.5], measure)
        assert_bit_equal(tensors(compact), before)
        own = parameter_report(compact).param_ratio
        assert torch.equal(seen[own], logits(compact))
        assert torch.equal(seen[1.0], logits(LLAMA.build()))
        for (ratio, other), kept in zip(others.items(), list(found)[2:], strict=True):
            other.base_model.set_param_ratio(ratio)
            expected = other.merge_and_unload()
            assert parameter_report(expected).param_ratio == kept
            torch.testing.assert_close(seen[kept], logits(expected), rtol=1e-4, atol=1e-5)
        assert list(found)[:2] == [None, own]

    def test_the_merge_is_the_same_with_it(self, tmp_path: Path):
        plain = wrap(train_factors=True)
        make_trainer(plain, tmp_path).train()
        model, trained = train(tmp_path, train_factors=True)
        trained.summary()
        assert_bit_equal(tensors(model.merge_and_unload()), tensors(plain.eval().merge_and_unload()))

    def test_ranks_are_those_of_the_compact_model(self, tmp_path: Path):
        model, trained = train(tmp_path)
        compact = model.merge_and_unload()
        layers = trained.summary().layers
        assert {name: layer.rank for name, layer in layers.items()} == compact.config.quantization_config.ranks

    def test_a_size_out_of_reach_is_left_out_with_a_warning(self, tmp_path: Path):
        model, trained = train(tmp_path)
        compact = model.merge_and_unload()
        with pytest.warns(UserWarning, match=r"^report_sizes: 0\.01 is left out of the report: param_ratio"):
            found = trained.perplexities(compact, [0.01], lambda _: Perplexity(1.0, 1, 2))
        assert list(found) == [None, parameter_report(compact).param_ratio]

    def test_nothing_to_try(self, tmp_path: Path):
        model, trained = train(tmp_path, param_ratio=1.0)
        assert trained.perplexities(model, [0.8], lambda _: pytest.fail("measured")) == {}
        assert trained.summary().layers == {}


class TestMessages:
    @pytest.mark.filterwarnings("always::UserWarning")
    def test_counts_and_shows(self):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            with recorded_messages() as messages:
                for _ in range(2):
                    warnings.warn("layer: fell back", UserWarning, stacklevel=1)
            warnings.warn("afterwards", UserWarning, stacklevel=1)
        assert messages == {("UserWarning", "layer: fell back"): 2}
        assert [str(entry.message) for entry in shown] == ["layer: fell back"] * 2 + ["afterwards"]

    def test_counts_log_lines(self):
        with recorded_messages() as messages:
            logging.getLogger("some.host").warning("value %s", 3)
            logging.getLogger("some.host").info("not this")
            logging.getLogger("transformers.trainer").warning("of transformers")
        logging.getLogger("some.host").warning("afterwards")
        assert messages == {("some.host", "value 3"): 1, ("transformers.trainer", "of transformers"): 1}
