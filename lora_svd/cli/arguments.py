"""Options of the commands. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LoraSVDError
from ..options import one_of, option, whole

QUANTIZATIONS = ("none", "nf4", "fp4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BOS_HELP = "Whether every sequence begins with the BOS token; unset: as the tokenizer does by itself."
_CHECKS = {
    "dtype": one_of(DTYPES),
    "base_quantization": one_of(QUANTIZATIONS),
    "export_quantization": one_of(QUANTIZATIONS[:3]),
    "block_length": whole(2),
    "own_text_blocks": whole(0),
    "window": whole(2),
    "max_new_tokens": whole(1),
    "report_tokens": whole(0),
}


@dataclass
class CompressArguments:
    """Options of a run: what it reads, measures and shows. Paths are relative to the working directory."""

    _argument_group_name = "run"

    model: str = option("", "The causal language model to compress: a local folder or a name on the Hub.")
    text: str = option("", "UTF-8 text file to train on and to take the statistics from.")
    eval_text: str = option(
        "",
        "UTF-8 text file, not trained on, whose perplexity is measured before and after; empty: the end of text, held "
        "out for it.",
    )
    output: str = option("", "Folder for the compact model; empty: compact in output_dir.")
    dtype: str = option("auto", f"Type the model is loaded, evaluated and saved in: {', '.join(DTYPES)}.")
    base_quantization: str = option("none", f"Form the dense weights are loaded in: {', '.join(QUANTIZATIONS)}.")
    export_quantization: str = option(
        "none", "Form the compact weights are saved in: none, nf4, fp4; needs factor_format: factors."
    )
    block_length: int = option(512, "Tokens in one training sequence.")
    bos: bool | None = option(None, BOS_HELP)
    own_text_blocks: int = option(0, "Training sequences that the dense model writes itself, added to those of text.")
    own_text_start: str = option("", "Token that its documents begin with; empty: the tokenizer's bos_token.")
    window: int = option(1024, "Tokens in one window of the perplexity evaluation.")
    prompt: str = option("", "Text that the dense and the compact model continue; empty: none.")
    max_new_tokens: int = option(48, "Tokens to continue the prompt by.")
    report_sizes: list[float] = field(
        default_factory=lambda: [0.9, 0.75],
        metadata={"help": "Further values of param_ratio whose perplexity the report shows; none if empty."},
    )
    report_tokens: int = option(2048, "Tokens that those are measured on, in whole windows; 0: not at all.")

    def __post_init__(self) -> None:
        for name in ("model", "text"):
            if not getattr(self, name):
                raise LoraSVDError(f"{name}: missing; give --{name}, or set it in the recipe")
        for name in ("text", "eval_text"):
            if (path := getattr(self, name)) and not Path(path).is_file():
                raise LoraSVDError(f"{name}: no file {path!r} (working directory: {Path.cwd()})")
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        for size in self.report_sizes:
            if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size <= 1:
                raise LoraSVDError(f"report_sizes: got {size!r}, expected numbers in (0, 1]")


@dataclass
class EvaluateArguments:
    """Options of ``lora-svd evaluate``."""

    text: str = field(metadata={"help": "UTF-8 text file."})
    window: int = field(default=1024, metadata={"help": "Tokens in one window."})
    bos: bool | None = field(default=None, metadata={"help": BOS_HELP})
    dtype: str = field(default="auto", metadata={"help": "Type to load the model in; auto: as it was saved."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto: an accelerator if there is one."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object instead of a line of text."})


@dataclass
class StreamArguments:
    """Options of ``lora-svd stream``."""

    text: str = field(metadata={"help": "UTF-8 text file to take the statistics from."})
    output: str = field(metadata={"help": "Folder for the compact model, which does not exist yet."})
    param_ratio: float = field(default=0.8, metadata={"help": "Kept / original parameters of the blocks' layers."})
    importance: str = field(default="kronecker", metadata={"help": "One that needs no LoRA, see LoraSVDConfig."})
    allocation: str = field(default="global", metadata={"help": "'global' or 'uniform'."})
    neurons: bool = field(default=True, metadata={"help": "Whether neurons of MLPs may go as well."})
    heads: bool = field(default=True, metadata={"help": "Whether key-value heads may go as well, with neurons."})
    factor_format: str = field(default="pivoted", metadata={"help": "'pivoted' or 'factors'."})
    statistics_limit: int = field(default=0, metadata={"help": "Bytes for the statistics of one block; 0: no limit."})
    length: int = field(default=512, metadata={"help": "Tokens in one sequence."})
    bos: bool | None = field(default=None, metadata={"help": BOS_HELP})
    samples: int = field(default=64, metadata={"help": "Sequences to read at most."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto: an accelerator if there is one."})


@dataclass
class AnalyzeArguments:
    """Options of ``lora-svd analyze``."""

    before: str = field(default="", metadata={"help": "Folder of the model that MODEL was made from, to show both."})
    output: str = field(default="", metadata={"help": "JSON file for the numbers of every layer."})
    figures: str = field(default="", metadata={"help": "Folder for PNG figures."})
    spectra: bool = field(default=False, metadata={"help": "Write all singular values to the JSON file."})
