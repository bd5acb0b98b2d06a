"""Analysis of every layer of a model: in memory, in a folder, or with a LoraSVD adapter that has observed it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from peft import PeftConfig, PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..compression import compute_spectra
from ..config import LORA_SVD
from ..errors import LoraSVDError
from ..tuner.model import LoraSVDModel
from .summary import LayerAnalysis, analyze_layer
from .weights import LayerWeight, folder_weights, model_weights


def analyze_model(model: nn.Module) -> dict[str, LayerAnalysis]:
    """Analyze every linear layer of a model in memory, by module name."""
    return analyze_weights(model_weights(model))


def analyze_folder(folder: str | Path) -> dict[str, LayerAnalysis]:
    """Analyze every linear layer of a model folder, by module name, with one layer in memory at a time.

    A LoraSVD adapter folder is loaded on its base model and given to :func:`analyze_adapter`.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        return analyze_adapter(load_adapter(folder))
    return analyze_weights(folder_weights(folder))


def analyze_weights(weights: Mapping[str, LayerWeight]) -> dict[str, LayerAnalysis]:
    """Analyze every weight of :func:`lora_svd.analysis.weights.folder_weights` or ``model_weights``."""
    return {
        name: analyze_layer(name, weight.read(), rank=weight.rank)
        for name, weight in tqdm(weights.items(), desc="analyze", leave=False, delay=2)
    }


@torch.no_grad()
def analyze_adapter(model: PeftModel, adapter_name: str | None = None) -> dict[str, LayerAnalysis]:
    """Analyze the layers of a LoraSVD adapter: their frozen weights, their inputs where the importance preset collects
    ``input_gram``, and the spectra of the weights in their metrics, which decide the ranks.

    Args:
        model: from ``get_peft_model``, trained for a step at least, or loaded.
        adapter_name: None: the active adapter.

    Raises:
        LoraSVDError: it is another kind of adapter, or the layers were not observed.
    """
    tuner = model.base_model
    if not isinstance(tuner, LoraSVDModel):
        raise LoraSVDError(f"model: its adapter is {type(tuner).__name__}, expected LoraSVDModel; use analyze_model")
    run = tuner.run(adapter_name)
    adapters, inputs = run.adapters(), run.inputs()
    energies = compute_spectra(inputs, run.settings)
    layers = {}
    for layer_name, layer in tqdm(inputs.items(), desc="analyze", leave=False, delay=2):
        statistics, factors = layer.statistics(), adapters[layer_name].factors
        layers[layer_name] = analyze_layer(
            layer_name,
            layer.weight(),
            input_gram=statistics.mean("input_gram") if "input_gram" in statistics.sums else None,
            weighted_energies=energies[layer_name],
            rank=None if factors is None else factors.rank,
        )
    return layers


def load_adapter(folder: str | Path) -> PeftModel:
    """Load a saved LoraSVD adapter on the base model that it names.

    Raises:
        LoraSVDError: it is another kind of adapter, or its base model cannot be loaded.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != LORA_SVD:
        raise LoraSVDError(f"model: {folder} is an adapter of type {config.peft_type}, expected LORA_SVD")
    auto_classes = {
        "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
        "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
        "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
        "TOKEN_CLS": peft.AutoPeftModelForTokenClassification,
        "QUESTION_ANS": peft.AutoPeftModelForQuestionAnswering,
        "FEATURE_EXTRACTION": peft.AutoPeftModelForFeatureExtraction,
    }
    auto_class = auto_classes.get(str(config.task_type), peft.AutoPeftModel)
    try:
        return auto_class.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise LoraSVDError(f"model: cannot load {folder} on {config.base_model_name_or_path!r}: {error}") from error
