"""Hypothesis strategies: tiny models, every field of ``LoraSVDConfig`` with good and bad values, and what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from lora_svd.allocation import ALLOCATIONS, FACTOR_FORMATS, LayerShape, stored_parameters
from lora_svd.config import COMPENSATIONS
from lora_svd.decompositions import DECOMPOSITIONS
from lora_svd.importance import IMPORTANCES


@dataclass(frozen=True)
class Net:
    """A tiny model. ``weights``: what its linear layers hold; ``family`` "net" is ``TinyNet``."""

    family: str
    width: int
    blocks: tuple[dict[str, Any], ...]
    tied: bool
    weights: str
    dtype: str

    @property
    def layers(self) -> dict[str, LayerShape]:
        """Every layer in a block by its name."""
        widths, found = [self.width, *(block["out"] for block in self.blocks)], {}
        for index, block in enumerate(self.blocks):
            for name in ("proj", *(["gate"] if block["gate"] else [])):
                found[f"blocks.{index}.{name}"] = LayerShape(block["out"], widths[index])
        return found


@dataclass(frozen=True)
class Case:
    """A model, a configuration, and what is done with them."""

    net: Net
    fields: dict[str, Any]
    seed: int = 0
    trainer: bool = False
    resumed: bool = False
    resized: float | None = None
    compact: bool = True
    expected: tuple[str, Any] | None = None  # the field that is wrong, and the value that is


SIZES = st.one_of(st.integers(1, 4), st.integers(1, 16))


@st.composite
def nets(draw: st.DrawFn, family: str = "net") -> Net:
    if family != "net":
        return Net(family, 8, (), draw(st.booleans()), "random", "float32")
    width, tied = draw(SIZES), draw(st.booleans())
    blocks = draw(
        st.lists(
            st.fixed_dictionaries(
                {"out": SIZES | st.just(width)} | {name: st.booleans() for name in ("conv1d", "bias", "gate", "twice")},
            ),
            min_size=1,
            max_size=2,
        )
    )
    if tied:
        blocks[-1]["out"] = width
    weights = draw(st.sampled_from(["random"] * 6 + ["zero", "rank one", "tiny", "large"]))
    return Net("net", width, tuple(blocks), tied, weights, draw(st.sampled_from(["float32"] * 5 + ["bfloat16"])))


SHARES = st.sampled_from([0, 0.0, 0.01, 0.3, 0.5, 1, 1.0]) | st.floats(0, 1)
PHASES = st.sampled_from([0, 0.0, 0.4, 1, 1.5]) | st.floats(0, 0.5)
NAMES = [r"blocks\.0\.proj", "proj", r"blocks\.\d\.gate", "nothing", "lm_head", "c_attn", "q_proj"]
TARGETS = ["all-linear"] * 6 + [["proj"], ["proj", "gate", "nothing"], ["lm_head", "proj"], r".*\.proj", "lm_head"]
TARGETS_OF_LM = ["all-linear"] * 4 + [["q_proj", "c_attn"], r".*(up_proj|c_fc)", ["lm_head"]]


@st.composite
def configurations(draw: st.DrawFn, net: Net) -> dict[str, Any]:
    """Fields of ``LoraSVDConfig``, each valid by itself; they may not fit each other or the model."""
    number = {"r": st.integers(1, 20), "lora_alpha": st.integers(1, 64) | st.floats(0.1, 64)}
    patterns = {
        name: st.none() | st.just({}) | st.dictionaries(st.sampled_from(NAMES), number[of], max_size=2)
        for name, of in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    }
    targets = draw(st.sampled_from(TARGETS if net.family == "net" else TARGETS_OF_LM))
    is_regex = isinstance(targets, str) and targets != "all-linear"
    layer = st.integers(0, max(0, len(net.blocks) - 1)) | st.just([]) | st.just([0, 1])
    index = st.none() if is_regex else st.none() | st.none() | layer
    given = {name: st.integers(1, shape.full_rank // 3 + 1) for name, shape in net.layers.items()}
    fields = {
        **{name: st.sampled_from(sorted(table)) for name, table in CHOICES.items()},
        "warmup": PHASES,
        "compression": st.just(0) | PHASES,
        "compression_interval": st.integers(1, 4),
        "total_steps": st.integers(2, 5) | st.integers(1, 5),
        "distillation": st.just(0) | SHARES,
        "train_factors": st.booleans(),
        "rank_multiple": st.just(1) | st.integers(1, 64),
        **dict.fromkeys(("row_shrinkage", "correlation_shrinkage", "column_shrinkage"), SHARES),
        "observed_tokens": st.floats(0, 1, exclude_min=True),
        **number,
        "lora_dropout": st.sampled_from([0, 0, 0.1, 0.5, 1]),
        **patterns,
        "target_modules": st.just(targets),
        "exclude_modules": st.none() | st.none() | st.sampled_from([["gate", "k_proj"], r".*\.0\.proj", []]),
        "layers_to_transform": index,
        "layers_pattern": st.none() if is_regex or net.family != "net" else st.sampled_from(["blocks", ["blocks"]]),
        "modules_to_save": st.none() | st.none() | st.sampled_from([["lm_head"], ["embed_tokens", "wte"]]),
        "init_weights": st.booleans(),
        "neurons": st.sampled_from([True, True, False]),
    }
    if given and draw(st.sampled_from([False] * 7 + [True])):
        fields["compact_ranks"] = st.fixed_dictionaries(given)
    chosen = draw(st.fixed_dictionaries(fields))
    if chosen["layers_to_transform"] is None:
        chosen["layers_pattern"] = None
    chosen |= draw(fitting(chosen["decomposition"]))
    return {"param_ratio": draw(ratios(net, chosen)), **chosen}


def fitting(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """What a decomposition needs of other fields."""
    decomposition = DECOMPOSITIONS[name]
    kinds = [name for name, preset in IMPORTANCES.items() if preset.elementwise == decomposition.elementwise]
    stored = {} if decomposition.is_low_rank else {"factor_format": "factors", "compensation": "absorb"}
    return st.fixed_dictionaries(
        {"importance": st.sampled_from(sorted(kinds)), **{k: st.just(v) for k, v in stored.items()}}
    )


def ratios(net: Net, fields: dict[str, Any]) -> st.SearchStrategy[float]:
    """Mostly shares that rank 1 fits into, which is a large part of so small a layer."""
    extra = fields["r"] if fields["compensation"] == "keep" else 0
    split = DECOMPOSITIONS[fields["decomposition"]].split
    shapes = [LayerShape(*split(shape.out_features, shape.in_features).shape, extra) for shape in net.layers.values()]
    least = sum(min(stored_parameters(shape, 1, fields["factor_format"]), shape.parameters) for shape in shapes)
    share = least / sum(shape.parameters for shape in shapes) if shapes else 0.3
    return st.floats(min(1, share + 1e-6), 1) | st.floats(min(1, share + 0.1), 1) | st.sampled_from([1, 0.7, 0.5, 1e-9])


CHOICES = {
    "importance": IMPORTANCES,
    "allocation": ALLOCATIONS,
    "decomposition": DECOMPOSITIONS,
    "factor_format": FACTOR_FORMATS,
    "compensation": COMPENSATIONS,
    "bias": ("none", "all", "lora_svd_only"),
}


@st.composite
def cases(draw: st.DrawFn, families: tuple[str, ...] = ("net",)) -> Case:
    net = draw(nets(draw(st.sampled_from(families))))
    fields = draw(configurations(net))
    if draw(st.sampled_from([False] * 19 + [True])):  # which may not fit the rest
        fields["decomposition"] = draw(st.sampled_from(sorted(DECOMPOSITIONS)))
    return Case(
        net,
        fields,
        seed=draw(st.integers(0, 3)),
        trainer=draw(st.sampled_from([False] * 19 + [True])),
        resumed=draw(st.sampled_from([False] * 6 + [True])),
        resized=draw(ratios(net, fields)) if draw(st.sampled_from([False] * 4 + [True])) else None,
        compact=draw(st.sampled_from([True] * 9 + [False])),
    )


def patterns(*bad: Any) -> list[tuple[Any, Any]]:
    """Wrong values in a dictionary by module name, with what the message has to show; and no dictionaries."""
    return [({"proj": value}, value) for value in bad] + [(["proj"], ["proj"]), ("proj", "proj"), ({3: 1}, 3)]


NO_INTEGER = [0, -3, 2.5, "8", None, True, math.inf]
NO_SHARE = [-0.1, 1.1, math.nan, -math.inf, "0.5", None, True]
NO_PHASE = [-1, -0.1, math.nan, math.inf, "0.4", None, True]
NO_ALPHA = [0, -1, math.nan, math.inf, "16", None, True]
NO_CHOICE = ["nothing", None, 3, ["global"], ""]
NO_FLAG = ["yes", None, 2, 0.5]
BAD: dict[str, list[Any]] = {
    "param_ratio": [0, -0.5, 1.0001, math.nan, math.inf, "0.5", None, True],
    **dict.fromkeys(CHOICES, NO_CHOICE),
    **dict.fromkeys(("r", "rank_multiple", "compression_interval"), NO_INTEGER),
    "total_steps": [value for value in NO_INTEGER if value is not None],
    **dict.fromkeys(("warmup", "compression"), NO_PHASE),
    **dict.fromkeys(("row_shrinkage", "correlation_shrinkage", "column_shrinkage"), NO_SHARE),
    "observed_tokens": [0, *NO_SHARE],
    **dict.fromkeys(("distillation", "lora_dropout"), NO_SHARE),
    **dict.fromkeys(("train_factors", "init_weights", "compressed", "neurons"), NO_FLAG),
    "lora_alpha": NO_ALPHA,
    "rank_pattern": [*patterns(*NO_INTEGER), ({"(": 2}, "(")],
    "alpha_pattern": [*patterns(*NO_ALPHA), ({"(": 2}, "(")],
    **dict.fromkeys(("compact_ranks", "compact_widths"), patterns(*NO_INTEGER)),
    "neuron_groups": [({"proj": "up"}, "up"), ({"proj": [3]}, 3), (["proj"], ["proj"]), ({3: ["up"]}, 3)],
    "target_modules": ["", "(", "nothing", [], 3, [3], ["nothing"], {"proj": 1}, True],
    "exclude_modules": ["(", 3, [3], {"proj": 1}, False],
    "layers_to_transform": [-1, 1.5, "0", ["0"], 99, [99], True],
    "layers_pattern": ["nothing", ["nothing"], "(", 3],
    "modules_to_save": [3, [3], "lm_head", (["("], "(")],
}


@st.composite
def refusals(draw: st.DrawFn) -> Case:
    """A valid configuration of a model with one field spoilt."""
    net = draw(nets())
    name = draw(st.sampled_from(sorted(BAD)))
    value = draw(st.sampled_from(BAD[name]))
    value, shown = value if isinstance(value, tuple) else (value, value)
    fields = {**draw(configurations(net)), "target_modules": "all-linear", "param_ratio": 0.9}
    fields |= {"layers_pattern": None, "layers_to_transform": 0 if name == "layers_pattern" else None, name: value}
    return Case(net, fields, expected=(name, shown))
