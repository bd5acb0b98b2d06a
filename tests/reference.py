"""Every formula of the method in dense float64, as slow and as literal as the mathematics. Nothing of lora_svd is used.

Letters: W (out, in) weight, C (out, out) row metric, X (in, in) column metric, x (samples, tokens, in) input of a
layer, g (samples, tokens, out) gradient of its output, A (r, in) and B (out, r) LoRA factors with gradients dA and dB,
s their scale.
"""

import itertools

import torch


def relative_error(actual, expected):
    """Largest deviation relative to the largest expected magnitude; 0 = 0 counts as exact."""
    deviation = (actual.double() - expected.double()).abs().max()
    return float(deviation / expected.double().abs().max().clamp_min(1e-300))


# -- weighted SVD ------------------------------------------------------------------------------------------------------


def dense(metric, size):
    """A metric that is None (identity), a vector (diagonal) or a matrix, as a matrix."""
    if metric is None:
        return torch.eye(size, dtype=torch.float64)
    return metric.double().diag() if metric.dim() == 1 else metric.double()


def symmetric_power(matrix, power):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp_min(0).pow(power).diag() @ vectors.T


def loss(error, C, X):
    """tr(D^T C D X)."""
    return float(torch.trace(error.T @ dense(C, error.shape[0]) @ error @ dense(X, error.shape[1])))


def spectrum(W, C, X):
    """Squared singular values of C^1/2 W X^1/2, descending."""
    left, right = symmetric_power(dense(C, W.shape[0]), 0.5), symmetric_power(dense(X, W.shape[1]), 0.5)
    return torch.linalg.svdvals(left @ W.double() @ right).square()


def truncate(W, C, X, rank):
    """C^-1/2 [C^1/2 W X^1/2]_rank X^-1/2."""
    C, X = dense(C, W.shape[0]), dense(X, W.shape[1])
    scaled = symmetric_power(C, 0.5) @ W.double() @ symmetric_power(X, 0.5)
    U, S, Vh = torch.linalg.svd(scaled, full_matrices=False)
    return symmetric_power(C, -0.5) @ (U[:, :rank] * S[:rank]) @ Vh[:rank] @ symmetric_power(X, -0.5)


def truncate_with_transpose_trap(W, C, X, rank):
    """The published mistake: Lc W Lx instead of Lc^T W Lx, with lower Cholesky factors."""
    left, right = (torch.linalg.cholesky(dense(M, n)) for M, n in zip((C, X), W.shape, strict=True))
    U, S, Vh = torch.linalg.svd(left @ W.double() @ right, full_matrices=False)
    return torch.linalg.inv(left) @ (U[:, :rank] * S[:rank]) @ Vh[:rank] @ torch.linalg.inv(right)


def elementwise_objective(W, F, left, right, ridge):
    """sum_ij F_ij (w_ij - a_i . b_j)^2 + lambda (sum |a_i|^2 + sum |b_j|^2)."""
    errors = [F[i, j] * (W[i, j] - left[i] @ right[:, j]) ** 2 for i in range(W.shape[0]) for j in range(W.shape[1])]
    return float(sum(errors) + ridge * (left.square().sum() + right.square().sum()))


def rearranged(W, m1, n1):
    """M[(i1, j1), (i2, j2)] = W[i1 m2 + i2, j1 n2 + j2]: one row for each of the m1 n1 blocks (m2, n2) of W."""
    m2, n2 = W.shape[0] // m1, W.shape[1] // n1
    blocks = [W[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2] for i in range(m1) for j in range(n1)]
    return torch.stack([torch.cat(list(block)) for block in blocks])


# -- allocation and schedule -------------------------------------------------------------------------------------------


def stored(m, n, rank, factor_format, extra=0):
    """Numbers stored: dense from the rank on at which nothing is saved."""
    total = rank + extra
    if total >= min(m, n):
        return m * n
    return total * (m + n) - (total**2 if factor_format == "pivoted" else 0)


def options(squares, m, n, factor_format, multiple, extra=0):
    """rank -> (cost, error) of one layer: rank 1, multiples that save parameters, dense."""
    ranks = [k for k in range(1, min(m, n)) if k == 1 or k % multiple == 0]
    costs = {k: stored(m, n, k, factor_format, extra) for k in ranks}
    return {k: (costs[k], float(squares[k:].sum())) for k in ranks if costs[k] < m * n} | {min(m, n): (m * n, 0.0)}


def least_error(layers, budget):
    """The least summed error within a budget, by trying everything. layers: a list of :func:`options`."""
    feasible = (
        sum(error for _, error in choice)
        for choice in itertools.product(*(layer.values() for layer in layers))
        if sum(cost for cost, _ in choice) <= budget
    )
    return min(feasible, default=float("inf"))


def largest_jump(layers):
    """The largest difference in cost along the lower convex hull of a layer's (cost, error) curve.

    A choice by one common price can only be on the hulls, so it may leave this much of a budget unspent.
    """
    jump = 0
    for layer in layers:
        points = sorted(layer.values())
        cost, error = points[0]
        while rest := [(c, e) for c, e in points if c > cost and e < error]:
            best = max(rest, key=lambda point: ((error - point[1]) / (point[0] - cost), -point[0]))
            jump, (cost, error) = max(jump, best[0] - cost), best
    return jump


def cubic(done, target):
    """Budget after the share ``done`` of the compression phase."""
    return target + (1 - target) * (1 - done) ** 3


# -- statistics --------------------------------------------------------------------------------------------------------


def token_statistics(pairs):
    """Means over the tokens whose gradient is not zero, up to rounding, which a softmax over one key, at the first
    token, leaves or not. pairs: [(x, g)], one a micro-batch."""
    tokens = [
        (x_t.double(), g_t.double())
        for x, g in pairs
        for x_t, g_t in zip(x.flatten(0, -2), g.flatten(0, -2), strict=True)
        if g_t.abs().sum() > 1e-6 * g.abs().sum(-1).max()
    ]
    count = len(tokens)
    return {
        "count": count,
        "input_gram": sum(torch.outer(x, x) for x, _ in tokens) / count,
        "input_abs": sum(x.abs() for x, _ in tokens) / count,
        "input_sum": sum(x for x, _ in tokens) / count,
        "output_gram": (output := sum(torch.outer(g, g) for _, g in tokens) / count),
        "signed_output_gram": output,  # of so few tokens each stands alone
        "output_square": sum(g.square() for _, g in tokens) / count,
    }


class Recorder:
    """Inputs of the named layers of a dense model and, after the backward pass, the gradients of their outputs."""

    def __init__(self, model, names):
        self._seen = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name):
        def keep(_, inputs, output):
            output.retain_grad()
            self._seen[name].append((inputs[0].detach().clone(), output))

        return keep

    def pairs(self, name):
        return [(x, y.grad) for x, y in self._seen[name]]


def lora_gradient(A, B, dA, dB):
    """dB A + B dA - dB dA."""
    return dB @ A + B @ dA - dB @ dA


def minnorm_gradient(A, B, dA, dB, s):
    """(1/s) [dB (A A^T)^+ A + B (B^T B)^+ dA - B (B^T B)^+ (B^T dB) (A A^T)^+ A], with pinv(A) = A^T (A A^T)^+."""
    to_A, to_B = torch.linalg.pinv(A).T, torch.linalg.pinv(B).T
    return (dB @ to_A + to_B @ dA - to_B @ (B.T @ dB) @ to_A) / s


def projected_gradient(G, A, B):
    """P_B G + G P_A - P_B G P_A with the orthogonal projections on the columns of B and the rows of A."""
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    return P_B @ G + G @ P_A - P_B @ G @ P_A


def sensitivity_rows(G, W, A, B, s):
    """J_i = sum_j ( G_ij (w_ij + s (BA)_ij) )^2."""
    return torch.stack(
        [sum((G[i, j] * (W[i, j] + s * B[i] @ A[:, j])) ** 2 for j in range(len(W.T))) for i in range(len(W))]
    )


def gradient_rows(dB, A, X, mean, s):
    """c_i = (dB Q dB^T)_ii / (s^2 (r - 1)), Q = M^-1 - M^-1 m m^T M^-1 / (m^T M^-1 m), M = A X A^T, m = A E[x]."""
    inverse, m = torch.linalg.inv(A @ X @ A.T), A @ mean
    Q = inverse - torch.outer(inverse @ m, inverse @ m) / (m @ inverse @ m)
    return (dB @ Q @ dB.T).diagonal() / (s**2 * (len(A) - 1))
