"""PEFT and transformers know the tuner, its config survives JSON and pickling, and the private names we use exist."""

from __future__ import annotations

import copy
import inspect
import json
import multiprocessing.reduction
from pathlib import Path
from typing import Any

import pytest
from models import LLAMA, assert_bit_equal, settings, tensors, wrap
from peft import PeftConfig, mapping
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, PreTrainedModel, core_model_loading
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from lora_svd import LoraSVDConfig, LoraSVDError, LoraSVDModel
from lora_svd.compact.description import LoraSVDCompactConfig
from lora_svd.compact.loader import LoraSVDCompactQuantizer
from lora_svd.config import LORA_SVD
from lora_svd.registration import register

TABLES = [
    (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "LORA_SVD", LoraSVDConfig),
    (mapping.PEFT_TYPE_TO_TUNER_MAPPING, "LORA_SVD", LoraSVDModel),
    (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, "LORA_SVD", "lora_svd_"),
    (AUTO_QUANTIZATION_CONFIG_MAPPING, "lora_svd", LoraSVDCompactConfig),
    (AUTO_QUANTIZER_MAPPING, "lora_svd", LoraSVDCompactQuantizer),
]
EVERY_FIELD = {
    "param_ratio": 0.45,
    "importance": "kronecker",
    "allocation": "uniform",
    "factor_format": "factors",
    "compensation": "keep",
    "compact_ranks": {"model.layers.0.mlp.up_proj": 3},
    "warmup": 7,
    "compression": 0.25,
    "compression_interval": 3,
    "total_steps": 50,
    "rank_multiple": 4,
    "row_shrinkage": 0.5,
    "column_shrinkage": 0.25,
    "r": 3,
    "lora_alpha": 6,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "up_proj"],
    "exclude_modules": ["v_proj"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 4},
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "init_weights": False,
}


@pytest.mark.parametrize(("table", "key", "value"), TABLES)
def test_tables_hold_us_and_registering_again_changes_nothing(table: dict[str, Any], key: str, value: object) -> None:
    before = dict(table)
    register()
    assert table == before
    assert table[key] is value
    assert [str(name.value) if hasattr(name, "value") else name for name in table].count(key) == 1


@pytest.mark.parametrize(("table", "key"), [(table, key) for table, key, _ in TABLES])
def test_name_taken_by_another_package(table: dict[str, Any], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table, key, dict)
    with pytest.raises(LoraSVDError, match=rf"{key}: <class 'dict'> .*import only one"):
        register()
    assert table[key] is dict


def test_config_survives_json(tmp_path: Path) -> None:
    config = LoraSVDConfig(**EVERY_FIELD)
    defaults = LoraSVDConfig()
    assert all(getattr(config, name) != getattr(defaults, name) for name in EVERY_FIELD)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA_SVD"
    for cls in (PeftConfig, LoraSVDConfig):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is LoraSVDConfig
        assert again.peft_type == "LORA_SVD"
        assert {name: getattr(again, name) for name in EVERY_FIELD} == {
            name: getattr(config, name) for name in EVERY_FIELD
        }


def test_config_survives_copying_and_pickling() -> None:
    config = LoraSVDConfig(**EVERY_FIELD)
    pickled = multiprocessing.reduction.ForkingPickler.dumps(config)  # what a spawned worker receives
    for again in (copy.deepcopy(config), copy.copy(config), multiprocessing.reduction.ForkingPickler.loads(pickled)):
        assert again == config
        assert type(again.peft_type) is type(LORA_SVD)


def test_filled_ranks_and_state_survive_json(tmp_path: Path) -> None:
    config = settings(compact_ranks={"a": 1}, compressed=True)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).compressed is True


def test_copied_model_is_independent() -> None:
    model = wrap(warmup=1, total_steps=2)
    before, other = tensors(model), copy.deepcopy(model)
    other(**LLAMA.inputs()).loss.backward()
    other.base_model.update_and_allocate(0)
    assert other.peft_config["default"].compressed
    assert not model.peft_config["default"].compressed
    assert_bit_equal(tensors(model), before)


def test_private_names_of_the_hosts() -> None:
    """What the tuner, distillation and ``compact`` rely on beyond documented names."""
    for method in (
        "_pre_injection_hook", "_prepare_model", "_create_and_replace", "_replace_module",
        "_remap_adapter_state_dict_for_load", "_check_merge_allowed", "_unload_and_optionally_merge",
    ):  # fmt: skip
        assert callable(getattr(BaseTuner, method))
    for method in ("_move_adapter_to_device_of_base_layer", "_cast_input_dtype", "get_base_weight", "set_base_weight"):
        assert callable(getattr(BaseTunerLayer, method))
    assert "unload_and_optionally_merge_module" in inspect.getsource(BaseTuner._unload_and_optionally_merge)
    assert [*inspect.signature(_maybe_include_all_linear_layers).parameters] == ["peft_config", "model"]
    remap = inspect.signature(BaseTuner._remap_adapter_state_dict_for_load).parameters
    assert [*remap] == ["model", "config", "adapter_name", "state_dict"]
    assert BufferDict(persistent=True).persistent
    for method in ("_process_model_before_weight_loading", "_process_model_after_weight_loading"):
        assert callable(getattr(HfQuantizer, method))
    assert "checkpoint_files" in inspect.getsource(PreTrainedModel.from_pretrained)
    model = LLAMA.build()
    assert isinstance(model.all_tied_weights_keys, dict)
    assert {"_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_save"} <= set(dir(model))
    assert type(model.config) in AutoModelForCausalLM._model_mapping
    assert "_weight_conversions" in inspect.getsource(core_model_loading)
    switches: list[Any] = [BaseTunerLayer.disable_adapters, ModulesToSaveWrapper.disable_adapters]
    assert all("self._disable_adapters" in inspect.getsource(switch.fget) for switch in switches)
