"""What the code of commit c96039f saved and computed, to hold later code to it.

``python tests/saved/make.py`` wrote every other file of this folder at that commit, and is to be run there only: files
that later code writes show nothing. ``tests/test_saved_before.py`` has the functions below compute everything anew.

All of it is tiny, seeded, and made through what users call: adapters saved while they train and afterwards, compact
checkpoints of format version 1, a Trainer's checkpoint, and runs of presets. ``lora``, ``lora_minnorm``,
``lora_activation`` and ``lora_diagonal`` are not among the runs, since their formulas were about to change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_svd import LoraSVDCallback, LoraSVDConfig

FOLDER = Path(__file__).parent  # the working directory of all functions, so that no file names a path of a machine
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WIDE = {"hidden_size": 128, "num_hidden_layers": 1, "intermediate_size": 192}  # 4-bit factors have ranks of 64
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
STEPS = 10
CHECKPOINT_STEP = 4
OTHER_SIZES = (0.8, 0.4)

SETTINGS = {"r": 4, "lora_alpha": 8, "param_ratio": 0.6, "rank_multiple": 1, "observed_tokens": 1.0, "warmup": 5}
FALLING = {"warmup": 3, "compression": 5, "compression_interval": 2}
FACTORS = {"factor_format": "factors"}
PRODUCTS = {"decomposition": "kronecker", **FACTORS}
TIED = {"target_modules": ["embed_tokens", "v_proj", "up_proj", "down_proj"]}
# A query of a first token sees one key and has no gradient, or one of 1e-9, as a processor rounds: whether the token
# is observed there, and with it what a run gives, depends on the processor.
NO_QUERIES = {"exclude_modules": ["q_proj"]}

# Neurons were not priced then.
RANKS_ALONE = {"neurons": False} if "neurons" in LoraSVDConfig.__dataclass_fields__ else {}
# Steps done of STEPS, and settings.
ADAPTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "adapter-warmup": (4, {"importance": "kronecker"}),
    "adapter-falling": (6, {"importance": "gradient_activation", **FALLING}),
    "adapter-factors": (
        10,
        {"importance": "kronecker", "train_factors": True, "target_modules": ["q_proj", "up_proj"]},
    ),
    "adapter-tied": (10, {"importance": "kronecker", **TIED}),
    "adapter-products": (
        10,
        {"importance": "activation", **PRODUCTS, "exclude_modules": ["k_proj", "v_proj", "up_proj"]},
    ),
    "adapter-sketches": (4, {"importance": "kronecker", "statistics_limit": 40_000}),
    "adapter-default": (10, {"target_modules": ["gate_proj", "up_proj"]}),
}
# The statistics of the default importance are read by a formula that was about to change; its factors are not.
AS_LOADED = ("adapter-default",)

# Kind of base, settings, and how it is saved: by save_pretrained, or by save_compact with these arguments.
COMPACTS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "compact-pivoted": ("llama", {"importance": "kronecker"}, {}),
    "compact-factors": ("llama", {"importance": "gradient_activation", **FACTORS, **FALLING}, None),
    "compact-products": ("llama", {"importance": "kronecker", **PRODUCTS}, {}),
    "compact-tied": ("llama", {"importance": "kronecker", **TIED}, {}),
    "compact-keep": ("llama", {"importance": "activation", "compensation": "keep", **FACTORS}, None),
    "compact-nf4": ("wide", {"importance": "kronecker", **FACTORS, "rank_multiple": 64}, {}),
    "compact-self-contained": ("llama", {"importance": "none"}, {"self_contained": True}),
    "compact-gpt2": ("gpt2", {"importance": "fisher"}, None),
    "compact-bert": ("bert", {"importance": "activation_scale"}, {}),
}

# Settings of the adapter, and arguments of the Trainer.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kronecker": ({"importance": "kronecker", "train_factors": True, "distillation": 0.5, **FALLING}, {}),
    "kronecker-no-queries": ({"importance": "kronecker", **NO_QUERIES}, {"max_grad_norm": 0.5}),
    "gradient_activation": (
        {"importance": "gradient_activation", "train_factors": True, **FACTORS, **NO_QUERIES},
        {"gradient_accumulation_steps": 2},
    ),
    "activation": (
        {"importance": "activation", "distillation": 0.3, "lora_dropout": 0.1, **FALLING, **NO_QUERIES},
        {},
    ),
    "activation_scale": (
        {
            "importance": "activation_scale",
            "allocation": "uniform",
            "compensation": "keep",
            **FACTORS,
            **NO_QUERIES,
        },
        {},
    ),
    "fisher": ({"importance": "fisher", "train_factors": True, **FALLING}, {}),
    "fisher_elementwise": (
        {"importance": "fisher_elementwise", "decomposition": "elementwise", "distillation": 0.5},
        {},
    ),
    "none": ({"importance": "none", **FALLING}, {"learning_rate": 3e-3}),
    "products": (
        {"importance": "kronecker", "train_factors": True, "distillation": 0.5, **PRODUCTS, **NO_QUERIES},
        {},
    ),
    "tied": ({"importance": "kronecker", **TIED}, {}),
}
ONLY_THERE = ("kronecker",)  # compared where the files were made, and nowhere else
BY_HAND = {"importance": "gradient_activation", "train_factors": True, "total_steps": STEPS, **FALLING, **NO_QUERIES}
RESUMED = {
    "importance": "kronecker",
    "train_factors": True,
    "lora_dropout": 0.1,
    "layers_to_transform": [1],
    **NO_QUERIES,
    **FALLING,
    "warmup": 6,
    "compression": 2,
}


# -- models and data ---------------------------------------------------------------------------------------------------


def llama() -> tf.PreTrainedModel:
    """The saved base of all adapters."""
    return tf.AutoModelForCausalLM.from_pretrained("llama")


def new_base(kind: str) -> tf.PreTrainedModel:
    """A model whose random weights are large enough for its layers to matter."""
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
        return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **TOKENS, initializer_range=0.2))
    if kind == "bert":
        config = tf.BertConfig(
            **{**SIZES, "num_hidden_layers": 1}, max_position_embeddings=16, num_labels=3, initializer_range=0.2
        )
        return tf.BertForSequenceClassification(config)
    sizes = {**SIZES, **(WIDE if kind == "wide" else {}), "num_key_value_heads": 2, "tie_word_embeddings": True}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **TOKENS, initializer_range=0.2))


def new_rows() -> dict[str, Tensor]:
    """Tokens to train on, in which each mostly follows from the one before, and tokens to answer."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 64, (18, 8), generator=generator)
    follows = torch.rand(18, 8, generator=generator) < 0.7
    for i in range(1, 8):
        rows[:, i] = torch.where(follows[:, i], 3 + (rows[:, i - 1] * 5) % 61, rows[:, i])
    return {"training": rows[:16].clone(), "answered": rows[16:, :4].clone()}


def batch(rows: Tensor, *, classes: bool = False) -> dict[str, Tensor]:
    return {"input_ids": rows, "labels": rows[:, 0] % 3 if classes else rows}


@torch.no_grad()
def answers(model: Any) -> Tensor:
    """Logits of the fixed rows."""
    return model.eval()(input_ids=load_file("rows.safetensors")["answered"]).logits.float()


def begin(base: tf.PreTrainedModel, **settings: Any) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(base, LoraSVDConfig(**{**SETTINGS, **RANKS_ALONE, **settings}))


def make_trainer(model: PeftModel, folder: str | Path, *, classes: bool = False, **arguments: Any) -> tf.Trainer:
    given = batch(load_file("rows.safetensors")["training"], classes=classes)
    data = [{name: values[i] for name, values in given.items()} for i in range(16)]
    fixed = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True}
    quiet = {"report_to": [], "save_strategy": "no", "logging_steps": 1, "max_steps": STEPS}
    return tf.Trainer(
        model=model,
        args=tf.TrainingArguments(output_dir=str(folder), **{**fixed, **quiet, **arguments}),
        train_dataset=data,
        callbacks=[LoraSVDCallback()],
    )


def train_by_hand(model: PeftModel, steps: int) -> None:
    """A loop as a user writes one, which stops before the run ends."""
    rows = load_file("rows.safetensors")["training"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        first = 2 * step % 16
        model(**batch(rows[first : first + 2])).loss.backward()
        model.base_model.update_and_allocate(step, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()


# -- what is compared --------------------------------------------------------------------------------------------------


def ranks_of(model: PeftModel) -> dict[str, int]:
    return model.peft_config["default"].compact_ranks


def at_other_sizes(model: PeftModel) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for size in OTHER_SIZES:
        model.base_model.set_param_ratio(size)
        found |= {f"at {size}": answers(model), f"ranks at {size}": dict(ranks_of(model))}
    return found


def of_adapter(name: str) -> dict[str, Any]:
    """Of a saved adapter: what it answers, merged to a compact model, and at other sizes."""
    model = PeftModel.from_pretrained(llama(), name)
    found = {"loaded": answers(model)}
    if name in AS_LOADED:
        return found
    found["merged"] = answers(PeftModel.from_pretrained(llama(), name).merge_and_unload())
    return found | at_other_sizes(model)


def load_compact(name: str, **arguments: Any) -> tf.PreTrainedModel:
    kind = tf.AutoModelForSequenceClassification if name == "compact-bert" else tf.AutoModelForCausalLM
    return kind.from_pretrained(name, **arguments)


def of_compact(name: str) -> dict[str, Any]:
    return {"loaded": answers(load_compact(name))}


def of_end(model: PeftModel) -> dict[str, Any]:
    found = {"ranks": dict(ranks_of(model)), "trained": answers(model)}
    return found | {"merged": answers(model.merge_and_unload())}


def of_trained(trainer: tf.Trainer, model: PeftModel) -> dict[str, Any]:
    """Of a run: its log, the ranks it chose, and what it answers before and after the merge."""
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {name: [entry[name] for entry in log] for name in ("loss", "grad_norm", "param_ratio")}
    return found | of_end(model)


def of_run(name: str, folder: Path) -> dict[str, Any]:
    settings, arguments = RUNS[name]
    model = begin(llama(), **settings)
    trainer = make_trainer(model, folder, **arguments)
    trainer.train()
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(llama(), folder / "adapter")
    return of_trained(trainer, model) | at_other_sizes(again)


def of_resumed(folder: Path, start: str | None = "checkpoint", **arguments: Any) -> dict[str, Any]:
    """Of the run that the saved checkpoint is of, taken up from there."""
    model = begin(llama(), **RESUMED)
    trainer = make_trainer(model, folder, **arguments)
    trainer.train(resume_from_checkpoint=start)
    return of_trained(trainer, model)


def of_run_by_hand() -> dict[str, Any]:
    model = begin(llama(), **BY_HAND)
    train_by_hand(model, STEPS)
    return of_end(model)


def environment() -> dict[str, str]:
    """What decides on the last bits: versions, the kernels that they choose, and what some of these compute."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, 32, generator=generator) for size in (48, 80))
    q = a.view(2, 4, 6, 32)
    computed = [F.linear(a, b), F.gelu(a), F.softmax(a, 0), F.scaled_dot_product_attention(q, q, q, is_causal=True)]
    double = a.double() @ a.double().T + torch.eye(48)
    computed += [torch.linalg.cholesky(double), *torch.linalg.eigh(double), *torch.linalg.svd(a.double())]
    digest = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in computed))
    return {
        "torch": torch.__version__,
        "transformers": tf.__version__,
        "peft": peft.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "computed": digest.hexdigest(),
    }


# -- making the files --------------------------------------------------------------------------------------------------


def save_adapter(name: str) -> None:
    steps, settings = ADAPTERS[name]
    model = begin(llama(), **settings, total_steps=STEPS)
    train_by_hand(model, steps)
    model.save_pretrained(name)
    (Path(name) / "README.md").unlink()  # PEFT's


def save_one_compact(name: str) -> None:
    from lora_svd.compact import save_compact

    kind, settings, saving = COMPACTS[name]
    model = begin(llama() if kind == "llama" else new_base(kind), **settings)
    make_trainer(model, "run", classes=kind == "bert").train()
    nf4 = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    compact = model.merge_and_unload(**({"quantization_config": nf4} if name == "compact-nf4" else {}))
    if saving is None:
        compact.save_pretrained(name)
    else:
        save_compact(compact, name, **saving)


def main() -> None:
    os.chdir(FOLDER)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for path in (path for path in Path().iterdir() if path.suffix not in (".py", ".toml")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    new_base("llama").save_pretrained("llama")
    save_file(new_rows(), "rows.safetensors")
    expected: dict[str, dict[str, Any]] = {}
    for name in ADAPTERS:
        save_adapter(name)
        expected[name] = of_adapter(name)
    for name in COMPACTS:
        save_one_compact(name)
        expected[name] = of_compact(name)
    whole = of_resumed(Path("run"), None, save_strategy="steps", save_steps=CHECKPOINT_STEP)
    Path(f"run/checkpoint-{CHECKPOINT_STEP}").rename("checkpoint")
    expected["checkpoint"] = of_resumed(Path("run"))
    assert str(whole) == str(expected["checkpoint"])
    for name in RUNS:
        expected[f"run-{name}"] = of_run(name, Path("run"))
    expected["run-by-hand"] = of_run_by_hand()
    shutil.rmtree("run")
    tensors = {f"{name}/{key}": v for name, found in expected.items() for key, v in found.items() if torch.is_tensor(v)}
    save_file(tensors, "expected.safetensors")
    numbers: dict[str, Any] = {
        name: {key: v for key, v in found.items() if not torch.is_tensor(v)} for name, found in expected.items()
    }
    text = json.dumps({"environment": environment(), **numbers}, indent=1)
    Path("expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
