"""LoRAPrune (Zhang et al., Findings of ACL 2024): structures are pruned while a LoRA learns, by the LoRA's gradients.

For Llama causal models of transformers, grouped-query attention included, and for BERT with a classification head. A
structure is a neuron of the MLP (its rows of gate and up, its column of down; BERT has no gate) or a key-value head
with all its query heads, in BERT one (rows of q, k and v, columns of o). Before every optimizer step, with the
gradients dA and dB of ``W + s B A``:

    J = |(dB A + B dA - dB dA) * (W + s B A)|            elementwise, one linear layer at a time
    I <- 0.9 I + 0.1 sum over a module's layers of S / |S|_2      S: sums of J over the entries of each structure

Structures of the least I in their layer are masked; their number follows a cubic from none to the target, and a masked
one stays so. After the training the LoRA is merged and the weights are cut.

As in the authors' code where it differs from the paper: J has abs where the paper squares (``power=2``), its gradient
has no scaling s and no learning rate before ``dB dA``, and gradients are taken after clipping to
``TrainingArguments.max_grad_norm`` (the estimate is not linear in them, so 0 makes another one). The first tenth of the
layers and the last one are left whole, unless the others would keep less than half of ``param_ratio`` then.

What it does not take over from that code: masks of q applied to o whatever the number of key-value heads; a head
dimension of 128 and 32 heads; a schedule that stops just before the target; updates skipped in silence for NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from neuron_selection import budget_of, resize, spread
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_svd.errors import NumericalError

DECAY = 0.9


@dataclass(frozen=True)
class Architecture:
    """What there is to prune in a model whose config has its neurons as ``intermediate_size``."""

    task_type: str  # of PEFT
    blocks: str  # name of their list
    heads: str  # field of the config: the number of key-value heads
    attention: dict[str, int]  # linear layer of a block -> the dimension of its weight that is cut
    mlp: dict[str, int]


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        task_type="CAUSAL_LM",
        blocks="model.layers",
        heads="num_key_value_heads",
        attention={"self_attn.q_proj": 0, "self_attn.k_proj": 0, "self_attn.v_proj": 0, "self_attn.o_proj": 1},
        mlp={"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1},
    ),
    "BertForSequenceClassification": Architecture(
        task_type="SEQ_CLS",
        blocks="bert.encoder.layer",
        heads="num_attention_heads",
        attention={f"attention.self.{name}": 0 for name in ("query", "key", "value")} | {"attention.output.dense": 1},
        mlp={"intermediate.dense": 0, "output.dense": 1},
    ),
}


def architecture_of(model: Any) -> Architecture:
    """The entry of the model's class."""
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise ValueError(f"model: got {name}, expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def lora_prune(
    model: Any,
    dataset: Any,
    arguments: TrainingArguments,
    param_ratio: float,
    *,
    prune_every: int = 10,
    warmup: float = 0.1,
    cooldown: float = 0.1,
    power: int = 1,
    kv_heads: int | None = None,
    data_collator: Any = None,
    **lora: Any,
) -> nn.Module:
    """Train and prune a model of ``ARCHITECTURES``, and return the plain pruned one. Its config names the old sizes.

    Args:
        model: is changed; use the returned one.
        dataset, arguments, data_collator: of the ``Trainer``.
        param_ratio: kept / original parameters over the linear layers of all blocks; met to within one neuron, from
            below.
        prune_every: steps between two prunings; the target is reached in any case when the cool-down begins.
        warmup, cooldown: shares of the run before the first and after the last pruning.
        power: of the sensitivities: 1 in the authors' code, 2 in the paper.
        kv_heads: key-value heads that a pruned block keeps, the neurons bear the rest. None: the share that the block
            keeps, rounded, as the authors prune heads and neurons alike.
        lora: of the ``LoraConfig`` for all linear layers of the blocks, beside r and lora_alpha 16, lora_dropout 0.05.

    Raises:
        ValueError: the model is of another class, or the budget leaves no neurons, or more than there are.
        NumericalError: a gradient is not finite.
    """
    kind, use_cache = architecture_of(model), model.config.use_cache
    kept = kept_structures(model, param_ratio, kv_heads)
    config = LoraConfig(
        task_type=kind.task_type,
        target_modules=[*kind.attention, *kind.mlp],
        **{"r": 16, "lora_alpha": 16, "lora_dropout": 0.05, **lora},
    )
    tuned = get_peft_model(model, config)
    structures = find_structures(model, kept)
    pruning = Pruning(structures, prune_every=prune_every, warmup=warmup, cooldown=cooldown, power=power)
    with masked_inputs(structures):
        Trainer(
            model=tuned, args=arguments, data_collator=data_collator, train_dataset=dataset, callbacks=[pruning]
        ).train()
    pruned = merge_and_cut(tuned, structures)
    pruned.config.use_cache = use_cache  # Trainer turns it off
    return pruned.eval()


# -- sizes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Structures that a block keeps."""

    neurons: int
    groups: int


def kept_structures(model: Any, param_ratio: float, kv_heads: int | None = None) -> list[Kept]:
    """What each block keeps: the same number of key-value heads in all pruned ones, at least 1, and the neurons that
    make up the budget."""
    kind = architecture_of(model)
    blocks = model.get_submodule(kind.blocks)
    num_groups, width = getattr(model.config, kind.heads), model.config.intermediate_size
    attention_size, mlp_size = (
        sum(blocks[0].get_submodule(name).weight.numel() for name in cuts) for cuts in (kind.attention, kind.mlp)
    )
    whole = set(range(len(blocks) // 10)) | {len(blocks) - 1}
    share = (param_ratio * len(blocks) - len(whole)) / max(1, len(blocks) - len(whole))
    if share < param_ratio / 2:
        whole, share = set(), param_ratio
    num_pruned = len(blocks) - len(whole)
    available = budget_of(blocks, param_ratio) - len(whole) * (attention_size + mlp_size)
    groups = kv_heads or max(1, round(num_groups * share))
    total = (available - num_pruned * groups * attention_size // num_groups) // (mlp_size // width)
    if not num_pruned <= total <= num_pruned * width:
        raise ValueError(
            f"param_ratio: {param_ratio} leaves {total / num_pruned:.1f} neurons in a pruned block beside {groups} of "
            f"{num_groups} key-value heads, expected 1 to {width}. Choose another param_ratio or kv_heads"
        )
    neurons = iter(spread(torch.full((num_pruned,), total / num_pruned, dtype=torch.float64), total))
    return [Kept(width, num_groups) if i in whole else Kept(next(neurons), groups) for i in range(len(blocks))]


def removed_share(step: int, total_steps: int, warmup: float, cooldown: float) -> float:
    """What is gone at a step (from 0) of all that is to go: ``1 - (1 - t)^3`` between warm-up and cool-down."""
    first, last = warmup * total_steps, total_steps - max(1, round(cooldown * total_steps))
    if step >= last:
        return 1.0
    return 1 - (1 - (step - first) / (last - first)) ** 3 if step > first else 0.0


# -- structures --------------------------------------------------------------------------------------------------------


@dataclass
class Structures:
    """The structures of a block's attention or MLP: equal runs of rows, or of columns, of its linear layers.

    Attributes:
        block: has the linear layers.
        cuts: name of a linear layer -> the dimension of its weight that structures divide.
        target: structures to keep.
        mask: (structures,) bool, what is kept so far.
        importance: (structures,).
    """

    block: nn.Module
    cuts: dict[str, int]
    target: int
    mask: Tensor
    importance: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.importance = torch.zeros(len(self.mask), device=self.mask.device)

    def observe(self, power: int) -> None:
        """Update the importance by the gradients that the LoRA now has."""
        total = torch.zeros_like(self.importance)
        for name, dim in self.cuts.items():
            sums = sensitivity(self.block.get_submodule(name), power).sum(1 - dim)
            sums = sums.unflatten(0, (len(self.mask), -1)).sum(1)
            total += sums / (sums.norm() + 1e-8)
        if not torch.isfinite(total).all():
            raise NumericalError(f"lora_prune: gradients of {', '.join(self.cuts)} are not finite; lower learning_rate")
        self.importance.mul_(DECAY).add_(total, alpha=1 - DECAY)

    def prune(self, count: int) -> None:
        """Keep the ``count`` most important of those that are left."""
        chosen = self.importance.masked_fill(~self.mask, -1.0).topk(count).indices
        self.mask.fill_(False)[chosen] = True

    def mask_input(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the layer that reads the structures: without its input a structure is without effect."""
        (x,) = args
        return (x * self.mask.repeat_interleave(x.shape[-1] // len(self.mask)).to(x.dtype),)

    def cut(self) -> None:
        """Remove what is masked from the weights, once the LoRA is merged."""
        kept = self.mask.nonzero().flatten()
        for name, dim in self.cuts.items():
            linear: Any = self.block.get_submodule(name)
            weight = linear.weight.detach().unflatten(dim, (len(self.mask), -1))
            resize(linear, weight.index_select(dim, kept).flatten(dim, dim + 1))
            if linear.bias is not None and dim == 0:
                bias = linear.bias.detach().unflatten(0, (len(self.mask), -1))
                linear.bias = nn.Parameter(bias[kept].flatten())


def sensitivity(layer: Any, power: int = 1) -> Tensor:
    """``|(dB A + B dA - dB dA) * (W + s B A)| ^ power`` of a linear layer of PEFT's LoRA, (out, in), float32."""
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    (a, b), (grad_a, grad_b) = (
        [tensor.detach().float() for tensor in pair] for pair in ((lora_a, lora_b), (lora_a.grad, lora_b.grad))
    )
    gradient = (grad_b @ (a - grad_a)).addmm_(b, grad_a)
    weight = torch.addmm(layer.base_layer.weight.detach().float(), b, a, alpha=layer.scaling["default"])
    return gradient.mul_(weight).abs_().pow_(power)


def find_structures(model: Any, kept: list[Kept]) -> list[Structures]:
    """The structures of all blocks that are to lose some. model: its linear layers may be wrapped by PEFT."""
    kind, found = architecture_of(model), []
    for block, sizes in zip(model.get_submodule(kind.blocks), kept, strict=True):
        for cuts, count, target in (
            (kind.attention, getattr(model.config, kind.heads), sizes.groups),
            (kind.mlp, model.config.intermediate_size, sizes.neurons),
        ):
            if target < count:
                mask = torch.ones(count, dtype=torch.bool, device=next(block.parameters()).device)
                found.append(Structures(block, cuts, target, mask))
    return found


@contextmanager
def masked_inputs(structures: list[Structures]) -> Iterator[None]:
    """Masks in force in the forward pass."""
    with ExitStack() as stack:
        for part in structures:
            reader = part.block.get_submodule(next(name for name, dim in part.cuts.items() if dim == 1))
            stack.callback(reader.register_forward_pre_hook(part.mask_input).remove)
        yield


def merge_and_cut(tuned: Any, structures: list[Structures]) -> Any:
    """The plain model with the LoRA merged and the masked structures removed.

    Attention runs on as it is: it reads the number of heads off its inputs (BERT's ``num_attention_heads`` only names
    the old one), the dimension of heads does not change, and neither does ``num_key_value_groups``, query heads of a
    key-value head, as they go together.
    """
    model = tuned.merge_and_unload()
    for part in structures:
        part.cut()
    return model.requires_grad_(True)


class Pruning(TrainerCallback):
    """Observes before every optimizer step, and prunes where the schedule says so."""

    def __init__(
        self, structures: list[Structures], *, prune_every: int, warmup: float, cooldown: float, power: int
    ) -> None:
        self.structures = structures
        self.prune_every = prune_every
        self.warmup, self.cooldown = warmup, cooldown
        self.power = power

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        share = removed_share(state.global_step, state.max_steps, self.warmup, self.cooldown)
        due = share == 1 or (share > 0 and state.global_step % self.prune_every == 0)
        for part in self.structures:
            part.observe(self.power)
            if due:
                part.prune(len(part.mask) - round(share * (len(part.mask) - part.target)))
