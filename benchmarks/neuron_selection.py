"""MoDeGPT (Lin et al., ICLR 2025): fewer MLP neurons and smaller heads, refitted to the activations, without training.

For Llama models of transformers, grouped-query attention included. ``y = W x``; C = E[a a^T] over tokens is the Gram
matrix of the input a of ``down_proj``, X = E[x x^T] that of the input of q, k and v, both of the dense model.

- MLP (type I, Nystrom): keep the k neurons of the largest ridge leverage scores ``[C (C + l I)^-1]_ii``; with K their
  indices, ``W_down <- W_down C[:, K] C[K, K]^-1``, which is the least-squares fit of the block's output.
- Value and output (type III, SVD): of a value head V (d, in) and the columns O_h of its query heads, the rank-r V' that
  minimizes ``sum_h tr(O_h (V - V') X (V - V')^T O_h^T)``, stored as r dimensions of the head, without extra factors.
- Query and key (type II, CR): RoPE turns dimensions i and i + d/2 into each other, so a head keeps pairs p of them:
  those of the largest ``(sum_h E|q_hp|^2 E|k_p|^2)^(1/2)`` over the query heads h of a key head.

A head that lost dimensions is filled up with zeros behind the smaller projection, so that the attention of transformers
runs as it is; keys and values in a cache keep their size.

Where it departs from the paper, or public code does, it is stronger (SmolLM2-135M, held-out text, 0.8 to 0.2):

- Query and key are factorized by SVD in the metric X, each for itself, which is better than CR at all ratios, while
  type III is better than SVD. ``query_key="cr"`` is the paper's, with energies before RoPE, which does not change them.
- Attention, which suffers more, stays dense until the MLPs are down to 5/6 of ``param_ratio``, and is compressed beyond
  that. The paper has the same ratio in all modules.
- The ridge l is ``ridge`` times the mean of diag C. Public code has an absolute 1e-4, which puts all scores near 1; a
  relative 1 leaves the smaller error of the refitted output.
- Type III fits O and V jointly for grouped queries too, as the paper does with one query head a value head; public
  code whitens V alone there. Some of it also forgets the refit of ``W_down``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lora_svd.decompositions import balance
from lora_svd.decompositions.svd import weighted_svd
from lora_svd.linalg import Metrics

MLP_FLOOR = 5 / 6  # of param_ratio
JITTER = 1e-6  # of the mean of diag C: below what activations show, above the rounding of a float32 sum


def select_neurons(
    model: Any,
    input_grams: Mapping[str, Tensor],
    param_ratio: float,
    *,
    attention_ratio: float | None = None,
    query_key: str = "svd",
    ridge: float = 1.0,
    block_influence: Sequence[float] | None = None,
    temperature: float = 0.1,
) -> nn.Module:
    """Compress a Llama causal language model in place, and return it. Its config still names the old sizes.

    Args:
        model: linear layers of its blocks must have no bias.
        input_grams: mean Gram matrix (in, in) of the inputs of ``q_proj`` and ``down_proj``, by the layer's full name;
            those of other layers are not used.
        param_ratio: kept / original parameters over the linear layers of all blocks; met to within one neuron, from
            below.
        attention_ratio: the same over the attention layers; the MLPs bear the rest. None: 1, which leaves attention
            dense, or what lets the MLPs keep 5/6 of ``param_ratio``. As published: ``param_ratio``.
        query_key: "svd" or "cr", how query and key are compressed.
        ridge: l in the leverage scores, in units of the mean of diag C.
        block_influence: of every block (:func:`measure_block_influence`), for the paper's allocation: the removed share
            of a block is proportional to ``softmax(-block_influence / temperature)``, except that none keeps less than
            half of the mean. None: the same share in all.
        temperature: of that softmax.

    Raises:
        ValueError: a layer has a bias, or the budget asks for more neurons than there are, or for hardly any.
    """
    blocks = list(model.model.layers)
    influence = torch.tensor(block_influence or [0.0] * len(blocks), dtype=torch.float64)
    if len(influence) != len(blocks):
        raise ValueError(f"block_influence: got {len(influence)} values, expected one for each of {len(blocks)} blocks")
    if any(linear.bias is not None for linear in linears(model.model.layers)):
        raise ValueError("model: a linear layer of a block has a bias, expected none, as in Llama")
    attention_share = dense_attention(model, param_ratio) if attention_ratio is None else attention_ratio
    attention = kept_shares(attention_share, influence, temperature).tolist()
    sizes = [attention_size(block.self_attn, share, query_key) for block, share in zip(blocks, attention, strict=True)]
    neurons = spread_neurons(model, budget_of(model.model.layers, param_ratio) - sum(sizes), influence, temperature)
    for index, (block, share, count) in enumerate(zip(blocks, attention, neurons, strict=True)):
        if share < 1:
            gram = as_float64(input_grams[f"model.layers.{index}.self_attn.q_proj"])
            shrink_attention(block.self_attn, gram, share, query_key)
        if count < block.mlp.gate_proj.out_features:
            shrink_mlp(block.mlp, as_float64(input_grams[f"model.layers.{index}.mlp.down_proj"]), count, ridge)
    return model


@torch.no_grad()
def measure_block_influence(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> list[float]:
    """``1 - E[cos(block input, block output)]`` of every decoder block, over the tokens of batches without padding.

    The last of the ``hidden_states`` that transformers returns is normalized, so blocks are asked themselves.
    """
    blocks = list(model.model.layers)
    sums, tokens = [0.0] * len(blocks), 0
    with ExitStack() as stack:
        for index, block in enumerate(blocks):

            def observe(_: nn.Module, args: tuple[Any, ...], output: Tensor, index: int = index) -> None:
                sums[index] += float((1 - torch.cosine_similarity(args[0].float(), output.float(), dim=-1)).sum())

            stack.callback(block.register_forward_hook(observe).remove)
        for batch in batches:
            tokens += batch["input_ids"].numel()
            model(**batch)
    return [value / tokens for value in sums]


def linears(blocks: nn.Module) -> list[nn.Linear]:
    """All linear layers inside the blocks: what ``param_ratio`` counts."""
    return [module for module in blocks.modules() if isinstance(module, nn.Linear)]


def budget_of(blocks: nn.Module, param_ratio: float) -> int:
    """``param_ratio`` of the weights of the blocks' linear layers."""
    return int(param_ratio * sum(linear.weight.numel() for linear in linears(blocks)) + 1e-6)


def dense_attention(model: Any, param_ratio: float) -> float:
    """The largest share of attention that lets the MLPs keep ``MLP_FLOOR`` of ``param_ratio``."""
    blocks = model.model.layers
    whole, mlp = budget_of(blocks, 1), sum(3 * block.mlp.down_proj.weight.numel() for block in blocks)
    return min(1.0, param_ratio * (whole - MLP_FLOOR * mlp) / (whole - mlp))


def kept_shares(mean: float, influence: Tensor, temperature: float) -> Tensor:
    """Shares ``1 - c softmax(-influence / temperature)`` of that mean, none below half of it; (blocks,) both."""
    weights = torch.softmax(-influence / temperature, 0)
    most, total = 1 - mean / 2, len(influence) * (1 - mean)
    capped = torch.zeros_like(weights, dtype=torch.bool)
    while True:
        scale = (total - most * capped.sum()) / weights[~capped].sum()
        removed = torch.where(capped, most, scale * weights)
        if not (removed > most).any():
            return 1 - removed
        capped |= removed > most


def spread(amounts: Tensor, total: int) -> list[int]:
    """Whole numbers next to ``amounts`` that sum to ``total``: largest remainders are rounded up."""
    counts = amounts.floor().long()
    short = total - int(counts.sum())
    counts[(amounts - counts).sort(descending=True, stable=True).indices[:short]] += 1
    return counts.tolist()


def head_dims(head_dim: int, share: float, multiple: int = 1) -> int:
    """Dimensions that a head keeps, rounded up."""
    return multiple * math.ceil(share * head_dim / multiple - 1e-9)


def svd_rank(linear: nn.Linear, share: float) -> int:
    """The rank whose factors are that share of a weight."""
    return max(1, int(share * linear.weight.numel() / sum(linear.weight.shape)))


def attention_size(attention: Any, share: float, query_key: str) -> int:
    """Weights of an attention module that keeps this share, rounding included."""
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    if share == 1:
        return sum(linear.weight.numel() for linear in projections)
    dimension = sum(linear.weight.numel() for linear in projections[:2]) // attention.head_dim
    size = dimension * head_dims(attention.head_dim, share)
    if query_key == "cr":
        return size + dimension * head_dims(attention.head_dim, share, 2)
    return size + sum(svd_rank(linear, share) * sum(linear.weight.shape) for linear in projections[:2])


def spread_neurons(model: Any, available: int, influence: Tensor, temperature: float) -> list[int]:
    """Neurons of each block, as many as this number of weights is enough for."""
    gate, num_blocks = model.model.layers[0].mlp.gate_proj, len(influence)
    total = available // (3 * gate.in_features)
    if not 2 * num_blocks <= total <= num_blocks * gate.out_features:
        raise ValueError(
            f"param_ratio and attention_ratio: leave {total / num_blocks:.1f} neurons in a block beside its attention, "
            f"expected 2 to {gate.out_features}. Choose another of them"
        )
    shares = kept_shares(total / (num_blocks * gate.out_features), influence, temperature)
    return spread(shares * gate.out_features, total)


def shrink_mlp(mlp: Any, gram: Tensor, count: int, ridge: float) -> None:
    """Type I: keep ``count`` neurons and refit ``down_proj``. gram: C, (neurons, neurons)."""
    size = float(gram.diagonal().mean())
    kept = leverage_scores(gram, ridge * size).topk(count).indices.sort().values
    resize(mlp.down_proj, nystrom(gram, as_float64(mlp.down_proj.weight), kept, JITTER * size))
    for linear in (mlp.gate_proj, mlp.up_proj):
        resize(linear, linear.weight.detach()[kept.to(linear.weight.device)])


def leverage_scores(gram: Tensor, ridge: float) -> Tensor:
    """``diag(C (C + l I)^-1) = 1 - l diag((C + l I)^-1)``, (n,)."""
    root = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return 1 - ridge * torch.cholesky_inverse(root).diagonal()


def nystrom(gram: Tensor, weight: Tensor, kept: Tensor, jitter: float) -> Tensor:
    """``W C[:, K] (C[K, K] + jitter I)^-1``: the (out, k) that minimizes ``E |W a - W' a[K]|^2``."""
    inner = gram[kept][:, kept] + jitter * torch.eye(len(kept), dtype=gram.dtype)
    return torch.linalg.solve(inner, gram[kept] @ weight.T).T


def shrink_attention(attention: Any, gram: Tensor, share: float, query_key: str) -> None:
    """Compress the projections of one module to a share of their weights. gram: X, (hidden, hidden)."""
    if query_key == "cr":
        shrink_query_key(attention, gram, head_dims(attention.head_dim, share, 2))
    else:
        for name in ("q_proj", "k_proj"):
            linear = attention.get_submodule(name)
            factors = balance(weighted_svd(as_float64(linear.weight), Metrics(column=gram), svd_rank(linear, share)))
            first = copy.deepcopy(linear)
            resize(first, factors.right)
            resize(linear, factors.left)
            setattr(attention, name, nn.Sequential(first, linear))
    shrink_value_output(attention, gram, head_dims(attention.head_dim, share))


def shrink_query_key(attention: Any, gram: Tensor, count: int) -> None:
    """Type II: keep ``count`` dimensions, in pairs, of all heads in the group of a key head. gram: X."""
    dim = attention.head_dim
    key = as_float64(attention.k_proj.weight).unflatten(0, (-1, 1, dim))  # (groups, 1, dim, hidden)
    query = as_float64(attention.q_proj.weight).unflatten(0, (len(key), -1, dim))  # (groups, heads, dim, hidden)
    energies = [((weight @ gram) * weight).sum(-1).unflatten(-1, (2, -1)).sum(-2) for weight in (query, key)]
    scores = (energies[0] * energies[1]).sum(1)  # (groups, dim / 2)
    kept = scores.topk(count // 2).indices.sort().values
    kept = torch.cat([kept, kept + dim // 2], dim=1)  # (groups, count)
    for name, weight in (("q_proj", query), ("k_proj", key)):
        linear = attention.get_submodule(name)
        start = dim * torch.arange(weight.shape[0] * weight.shape[1]).view(weight.shape[0], -1, 1)
        rows = (start + kept[:, None]).flatten()
        filled = Fill(rows.to(linear.weight.device), linear.out_features)
        resize(linear, linear.weight.detach()[filled.positions])
        setattr(attention, name, nn.Sequential(linear, filled))


def shrink_value_output(attention: Any, gram: Tensor, rank: int) -> None:
    """Type III: ``rank`` dimensions of each value head and of the output's part for its query heads. gram: X."""
    dim = attention.head_dim
    value = as_float64(attention.v_proj.weight).unflatten(0, (-1, dim))  # (groups, dim, hidden)
    output = as_float64(attention.o_proj.weight).unflatten(1, (len(value), -1, dim))  # (hidden, groups, heads, dim)
    new_value, new_output = [], []
    for group in range(len(value)):
        reads = output[:, group].flatten(0, 1)
        factors = weighted_svd(value[group], Metrics(row=reads.T @ reads, column=gram), rank)
        new_value.append(factors.right)
        new_output.append(output[:, group] @ factors.left)
    positions = [
        torch.arange(linear.weight.shape[side]).view(-1, dim)[:, :rank].flatten().to(linear.weight.device)
        for linear, side in ((attention.v_proj, 0), (attention.o_proj, 1))
    ]
    filled = Fill(positions[0], attention.v_proj.out_features)
    resize(attention.v_proj, torch.cat(new_value))
    resize(attention.o_proj, torch.stack(new_output, 1).flatten(1))
    attention.v_proj = nn.Sequential(attention.v_proj, filled)
    attention.o_proj = nn.Sequential(Pick(positions[1]), attention.o_proj)


class Pick(nn.Module):
    """The features of x (..., n) at ``positions`` (k,)."""

    positions: Tensor

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.positions)


class Fill(Pick):
    """Puts the features x (..., k) at ``positions`` of ``size`` features, the others zero."""

    def __init__(self, positions: Tensor, size: int) -> None:
        super().__init__(positions)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.size).index_copy(-1, self.positions, x)


def resize(linear: nn.Linear, weight: Tensor) -> None:
    """Give a linear layer another weight, of another size, on the device and in the dtype of the old one."""
    linear.weight = nn.Parameter(weight.to(linear.weight).contiguous())
    linear.out_features, linear.in_features = weight.shape


def as_float64(tensor: Tensor) -> Tensor:
    """A copy to compute with, on the CPU: not every accelerator has float64."""
    return tensor.detach().cpu().double()
