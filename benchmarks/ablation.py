"""What each choice buys: ours with one thing changed, without training and with it.

    python benchmarks/ablation.py --model MODEL --train wiki.valid.raw --sizes 0.6 --steps 60 \
        --test wikitext=other_wiki.raw c4=other_c4.jsonl --results benchmarks/ablation.jsonl

prints a table in the end. Its results are what choices are made on, so its texts are not those that
``language_model.py`` reports. Arguments, observation and results are as there. A row is named by what it changes:
fields of ``LoraSVDConfig``, or an idea of the field that is not in the library, which is here beside its measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from figure import table
from language_model import BEST, Arguments, Benchmark, Row, dense, one_shot, ours
from torch import Tensor
from transformers import AutoConfig, HfArgumentParser

from lora_svd import LoraSVDConfig
from lora_svd.linalg import gram, shrink
from lora_svd.statistics import LayerStatistics
from lora_svd.tuner.layer import LoraSVDLinear

Change = Callable[[str, LayerStatistics], LayerStatistics]

IMPORTANCE = LoraSVDConfig().importance
ONE_SHOT: list[dict[str, Any]] = [
    {},
    {"allocation": "uniform"},
    {"factor_format": "factors"},
    {"rank_multiple": 1},
    {"rank_multiple": 32},
    {"row_shrinkage": 1e-4},
    {"row_shrinkage": 0.1},
    {"column_shrinkage": 1e-4},
    {"column_shrinkage": 0.1},
    {"correlation_shrinkage": 0.0},
    {"correlation_shrinkage": 0.1},
    {"correlation_shrinkage": 0.6},
    {"correlation_shrinkage": 1.0},
]
TRAINED: list[dict[str, Any]] = [
    {},
    {"train_factors": False},
    {"distillation": 0.0},
    {"compression": 0.2},
    {"compensation": "keep"},
    {"warmup": 0.2},
    {"r": 4, "lora_alpha": 4},
    {"r": 64, "lora_alpha": 64},
]


def observed_otherwise(bench: Benchmark, size: float, seed: int, *, change: Change) -> Any:
    """One-shot from statistics that are changed before they are used."""
    model = _observed_model(bench)
    _change_statistics(model, change)
    model.base_model.set_param_ratio(size)
    return model.merge_and_unload()


def _observed_model(bench: Benchmark) -> Any:
    model = bench.observed()
    config: Any = model.peft_config["default"]
    config.importance, config.neurons = IMPORTANCE, False  # ranks alone, as all rows here
    return model


def _change_statistics(model: Any, change: Change) -> None:
    for name, layer in _layers(model).items():
        observer = layer.adapter("default").observer
        observer.statistics = lambda name=name, seen=observer.statistics: change(name, seen())


def _layers(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraSVDLinear)}


def _with_mean(seen: LayerStatistics, name: str, mean: Tensor) -> LayerStatistics:
    return replace(seen, sums={**seen.sums, name: mean * seen.counts["token"]})


def by_depth(name: str, seen: LayerStatistics, *, factor: float, blocks: int) -> LayerStatistics:
    """Losses of a block count ``factor ** t``, t from -1/2 in the first block to 1/2 in the last: errors of early
    blocks pass through more of the model (factor < 1), or are mended there (factor > 1)."""
    block = int(next(part for part in name.split(".") if part.isdigit()))
    scale = factor ** (block / max(1, blocks - 1) - 0.5)
    return _with_mean(seen, "signed_output_gram", scale * seen.mean("signed_output_gram"))


def without_rows(name: str, seen: LayerStatistics, *, modules: tuple[str, ...]) -> LayerStatistics:
    """The rows of some modules count alike, as much as they do on average: said to be better for queries and keys."""
    if not name.endswith(modules):
        return seen
    rows = seen.mean("signed_output_gram")
    return _with_mean(seen, "signed_output_gram", torch.eye(len(rows), dtype=rows.dtype) * rows.diagonal().mean())


def clipped(name: str, seen: LayerStatistics, *, statistic: str, limit: float) -> LayerStatistics:
    """Eigenvalues of a Gram matrix of at most ``limit`` times their mean: few tokens are few witnesses of outliers."""
    values, vectors = torch.linalg.eigh(seen.mean(statistic))
    return _with_mean(seen, statistic, (vectors * values.clamp(max=limit * values.mean())) @ vectors.T)


def mean_corrected(bench: Benchmark, size: float, seed: int, *, centred: bool) -> Any:
    """A bias mends what truncation does to the mean output, as in atomic feature mimicking: ``b = (W - W') E[x]``; the
    metric of the inputs is then that of ``x - E[x]``, if ``centred``. The bias is not counted in the size."""
    model = _observed_model(bench)
    layers, windows = _layers(model), _observed(bench)
    means: dict[str, Any] = dict.fromkeys(layers, 0.0)
    grams = means.copy()
    with _inputs(model) as seen, model.disable_adapter():
        for window in windows:
            _forward(model, window)
            means = {name: mean + seen[name].double().mean(0) / len(windows) for name, mean in means.items()}
            if centred:
                tokens = window.numel() * len(windows)
                grams = {name: total + gram(seen[name]).double() / tokens for name, total in grams.items()}
    with torch.no_grad(), model.disable_adapter():
        outputs = {name: layer(means[name][None].float()) for name, layer in layers.items()}
    if centred:  # the mean of the same tokens, or what is left of the Gram matrix is no Gram matrix
        left = {name: grams[name] - torch.outer(mean, mean) for name, mean in means.items()}
        _change_statistics(model, lambda name, x: _with_mean(x, "input_gram", left[name]))
    model.base_model.set_param_ratio(size)
    compact = model.merge_and_unload()
    for name, output in outputs.items():
        module = compact.get_submodule(name.removeprefix("base_model.model."))
        with torch.no_grad():
            bias = output - module(means[name][None].float())
        module.register_forward_hook(lambda _module, _given, output, bias=bias: output + bias)
    return compact


def refitted(bench: Benchmark, size: float, seed: int, *, weight: bool) -> Any:
    """Factorized again in the metric of the inputs x' that layers have in the compact model; with ``weight`` after a
    refit of the weights to these inputs, which corrects the error from upstream."""
    model = _observed_model(bench)
    model.base_model.set_param_ratio(size)
    layers = _layers(model)
    grams: dict[str, Any] = dict.fromkeys(layers, 0.0)
    crosses = grams.copy()
    with _inputs(model) as seen:
        for window in (windows := _observed(bench)):
            before: dict[str, Tensor] = {}
            if weight:
                with model.disable_adapter():
                    _forward(model, window)
                before = dict(seen)
            _forward(model, window)
            tokens = window.numel() * len(windows)
            grams = {name: total + gram(seen[name]) / tokens for name, total in grams.items()}
            if weight:
                crosses = {name: total + before[name].T @ seen[name] / tokens for name, total in crosses.items()}
    _change_statistics(model, lambda name, seen: _with_mean(seen, "input_gram", grams[name].double()))
    for name, layer in layers.items() if weight else ():
        mended = refit(layer.dense_weight().double(), grams[name].double(), crosses[name].double())
        layer.set_base_weight(mended.to(layer.weight.dtype))
    model.base_model.set_param_ratio(size)
    return model.merge_and_unload()


def refit(weight: Tensor, gram: Tensor, cross: Tensor, shrinkage: float = 1e-2) -> Tensor:
    """``W + W E[(x - x') x'^T] (E[x' x'^T] + c I)^-1``, (out, in): ridge regression of W x on x', towards W.

    Args:
        weight: W (out, in); gram: E[x' x'^T]; cross: E[x x'^T], both (in, in).
        shrinkage: of the Gram matrix towards its mean, which sets c.
    """
    metric = shrink(gram, shrinkage)
    assert metric is not None
    return weight + weight @ torch.linalg.solve(metric, (cross - gram).T).T


@contextmanager
def _inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """What came into every layer in the last forward pass, (tokens, in), float32; without autograd."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, x, name=name: seen.update({name: x[0].flatten(0, -2).float()}))
        for name, layer in _layers(model).items()
    ]
    try:
        with torch.no_grad():
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _forward(model: Any, window: Tensor) -> None:
    with torch.autocast(model.device.type, dtype=torch.bfloat16):  # sums over what it shows are taken outside
        model(input_ids=window)


def _observed(bench: Benchmark) -> list[Tensor]:
    """As many windows as were observed, (1, window)."""
    windows = bench.texts.examples[: bench.given.observed_steps * bench.given.batch]
    return [torch.tensor([list(window["input_ids"])]) for window in windows]


def rows(blocks: int) -> dict[str, Row]:
    """By name, of a model of so many decoder blocks."""
    changes: dict[str, Change] = {
        "late blocks count 2 x early ones": partial(by_depth, factor=2.0, blocks=blocks),
        "early blocks count 2 x late ones": partial(by_depth, factor=0.5, blocks=blocks),
        "rows of queries and keys count alike": partial(without_rows, modules=("q_proj", "k_proj")),
        "inputs clipped at 30 x their mean": partial(clipped, statistic="input_gram", limit=30.0),
        "gradients clipped at 30 x their mean": partial(clipped, statistic="signed_output_gram", limit=30.0),
    }
    default = partial(one_shot, importance=IMPORTANCE, neurons=False)
    return {
        "dense": Row(dense, dense=True),
        **{_name("one-shot", given): Row(partial(default, **given)) for given in ONE_SHOT},
        **{f"one-shot, {name}": Row(partial(observed_otherwise, change=change)) for name, change in changes.items()},
        "one-shot, mean output mended": Row(partial(mean_corrected, centred=False)),
        "one-shot, mean output mended, inputs centred": Row(partial(mean_corrected, centred=True)),
        "one-shot, inputs of the compact model": Row(partial(refitted, weight=False)),
        "one-shot, inputs of the compact model, weights refitted": Row(partial(refitted, weight=True)),
        **{
            _name("recovery", given): Row(partial(ours, **BEST | {"neurons": False} | given), trains=True)
            for given in TRAINED
        },
    }


def _name(start: str, given: Mapping[str, Any]) -> str:
    return ", ".join([start, *(f"{field}={value!r}" for field, value in given.items())])


def main() -> None:
    parser: Any = HfArgumentParser(Arguments)  # pyright: ignore[reportArgumentType]
    (given,) = parser.parse_args_into_dataclasses()
    bench = Benchmark(given)
    known = rows(AutoConfig.from_pretrained(given.model).num_hidden_layers)
    for name in dict.fromkeys(["dense", *(given.rows or known)]):
        bench.run(name, known[name])
    print(table(bench.results.read(), list(bench.texts.held_out)))


if __name__ == "__main__":
    main()
