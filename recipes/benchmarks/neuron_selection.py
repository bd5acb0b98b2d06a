"""MoDeGPT (Lin et al., ICLR 2025): fewer MLP neurons and smaller heads, refitted to the activations, without training.

For Llama models of transformers, grouped-query attention included. ``y = W x``; C = E[a a^T] over tokens is the Gram
matrix of the input a of ``down_proj``, X = E[x x^T] that of the input of q, k and v, both of the dense model.

- MLP (type I, Nystrom): keep the k neurons of the largest ridge leverage scores ``[C (C + l I)^-1]_ii``; with K their
  indices, ``W_down <- W_down C[:, K] C[K, K]^-1``, which is the least-squares fit of the block's output.
- Query and key (type II, CR): RoPE turns dimensions i and i + d/2 into each other, so a head keeps pairs p of them:
  those of the largest ``(sum_h E|q_hp|^2 E|k_p|^2)^(1/2)`` over the query heads h of a key head.
- Value and output (type III, SVD): of a value head V (d, in) and the columns O_h of its query heads, the rank-r V' that
  minimizes ``sum_h tr(O_h (V - V') X (V - V')^T O_h^T)``, stored as r dimensions of the head, without extra factors.

A head that lost dimensions is filled up with zeros behind the smaller projection, so that the attention of transformers
runs as it is; keys and values in a cache keep their size.

Where this is not the paper or the public code to the letter:

- The energies of pairs are taken before RoPE, which leaves them as they are.
- Type III fits O and V jointly for grouped queries too, as the paper does with one query head a value head; public
  code whitens V alone there. Some of it also forgets the refit of ``W_down``.
- The ridge l is ``ridge`` times the mean of diag C. Public code has an absolute 1e-4, which puts all scores near 1;
  with a relative 1 the error of the refitted output was the smaller one in SmolLM2-135M, so the baseline gains by it.
- Attention, which suffers more, stays dense until the MLPs are down to two thirds of ``param_ratio``, and is compressed
  beyond that; the same ratio in all modules, as published, was worse at 0.4 and 0.2 of SmolLM2-135M.
- Widths of heads are rounded up, and the number of neurons makes up the budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lora_svd.decompositions.svd import weighted_svd
from lora_svd.linalg import Metrics

MLP_FLOOR = 2 / 3  # of param_ratio
JITTER = 1e-6  # of the mean of diag C: below what activations show, above the rounding of a float32 sum


def select_neurons(
    model: Any,
    input_grams: Mapping[str, Tensor],
    param_ratio: float,
    *,
    attention_ratio: float | None = None,
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
            dense, or what lets the MLPs keep two thirds of ``param_ratio``. As published: ``param_ratio``.
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
    if any(linear.bias is not None for linear in linears(model)):
        raise ValueError("model: a linear layer of a block has a bias, expected none, as in Llama")
    attention_share = dense_attention(model, param_ratio) if attention_ratio is None else attention_ratio
    attention = kept_shares(attention_share, influence, temperature).tolist()
    widths = [head_widths(block.self_attn.head_dim, share) for block, share in zip(blocks, attention, strict=True)]
    neurons = spread_neurons(model, param_ratio, widths, influence, temperature)
    for index, (block, (pairs, rank), count) in enumerate(zip(blocks, widths, neurons, strict=True)):
        layer = f"model.layers.{index}"
        if 2 * pairs < block.self_attn.head_dim:
            shrink_query_key(block.self_attn, as_float64(input_grams[f"{layer}.self_attn.q_proj"]), pairs)
        if rank < block.self_attn.head_dim:
            shrink_value_output(block.self_attn, as_float64(input_grams[f"{layer}.self_attn.q_proj"]), rank)
        if count < block.mlp.gate_proj.out_features:
            shrink_mlp(block.mlp, as_float64(input_grams[f"{layer}.mlp.down_proj"]), count, ridge)
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


# -- sizes -------------------------------------------------------------------------------------------------------------


def linears(model: Any) -> list[nn.Linear]:
    """All linear layers inside the decoder blocks: what ``param_ratio`` counts."""
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]


def budget_of(model: Any, param_ratio: float) -> int:
    """``param_ratio`` of the weights of the decoder blocks' linear layers."""
    return int(param_ratio * sum(linear.weight.numel() for linear in linears(model)) + 1e-6)


def dense_attention(model: Any, param_ratio: float) -> float:
    """The largest share of attention that lets the MLPs keep ``MLP_FLOOR`` of ``param_ratio``."""
    whole, mlp = budget_of(model, 1), sum(3 * block.mlp.down_proj.weight.numel() for block in model.model.layers)
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


def head_widths(head_dim: int, share: float) -> tuple[int, int]:
    """Query-key pairs and value-output dimensions that a head keeps."""
    return math.ceil(share * head_dim / 2 - 1e-9), math.ceil(share * head_dim - 1e-9)


def spread_neurons(
    model: Any, param_ratio: float, widths: list[tuple[int, int]], influence: Tensor, temperature: float
) -> list[int]:
    """Neurons of each block, as many as the budget leaves beside attention of these head widths."""
    first = model.model.layers[0]
    hidden, width = first.mlp.gate_proj.in_features, first.mlp.gate_proj.out_features
    heads = (first.self_attn.q_proj.out_features + first.self_attn.k_proj.out_features) // first.self_attn.head_dim
    attention = sum(heads * hidden * (2 * pairs + rank) for pairs, rank in widths)
    total, most = (budget_of(model, param_ratio) - attention) // (3 * hidden), len(widths) * width
    if not 2 * len(widths) <= total <= most:
        raise ValueError(
            f"param_ratio: {param_ratio} leaves {total / len(widths):.1f} neurons in a block beside this attention, "
            f"expected 2 to {width}. Choose another param_ratio or attention_ratio"
        )
    return spread(kept_shares(total / most, influence, temperature) * width, total)


# -- modules -----------------------------------------------------------------------------------------------------------


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


def shrink_query_key(attention: Any, gram: Tensor, pairs: int) -> None:
    """Type II: keep ``pairs`` pairs of dimensions in the heads of a key head's group. gram: X, (hidden, hidden)."""
    dim = attention.head_dim
    key = as_float64(attention.k_proj.weight).unflatten(0, (-1, 1, dim))  # (groups, 1, dim, hidden)
    query = as_float64(attention.q_proj.weight).unflatten(0, (len(key), -1, dim))  # (groups, heads, dim, hidden)
    energies = [((weight @ gram) * weight).sum(-1).unflatten(-1, (2, -1)).sum(-2) for weight in (query, key)]
    scores = (energies[0] * energies[1]).sum(1)  # (groups, dim / 2)
    kept = scores.topk(pairs).indices.sort().values
    kept = torch.cat([kept, kept + dim // 2], dim=1)  # (groups, 2 pairs)
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


class Fill(nn.Module):
    """Puts the features x (..., k) at ``positions`` (k,) of ``size`` features, the others zero."""

    positions: Tensor

    def __init__(self, positions: Tensor, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.size).index_copy(-1, self.positions, x)


class Pick(nn.Module):
    """The features of x (..., n) at ``positions`` (k,)."""

    positions: Tensor

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.positions)


def resize(linear: nn.Linear, weight: Tensor) -> None:
    """Give a linear layer another weight, of another size, on the device and in the dtype of the old one."""
    linear.weight = nn.Parameter(weight.to(linear.weight).contiguous())
    linear.out_features, linear.in_features = weight.shape


def as_float64(tensor: Tensor) -> Tensor:
    """A copy to compute with, on the CPU: not every accelerator has float64."""
    return tensor.detach().cpu().double()
