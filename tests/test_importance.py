"""LoRA-guided sensitivities through real backward passes, minimum-norm gradients, and the metrics of every preset."""

import pytest
import reference
import torch
from peft import get_peft_model
from torch import nn

from lora_svd import LoraSVDConfig, LoraSVDError
from lora_svd.importance import IMPORTANCES
from lora_svd.linalg import gram
from lora_svd.statistics import (
    STATISTICS,
    LayerStatistics,
    StepObservation,
    gradient_rows,
    input_sketch,
    minnorm_gradient,
    segment_gradients,
)

# -- a case small enough for pencil and paper --------------------------------------------------------------------------
#
# W = [1 0; 0 -1], A = [1 -1], B = [1/2; 1], s = lora_alpha / r = 2, and a loss with constant g = dL/dy = [1; 3].
# For the input x = [1; 2]:  A x = -1,  dB = s g (A x)^T = [-2; -6],  dA = s B^T g x^T = 2 (1/2 + 3) [1 2] = [7 14].
#     dB A = [-2 2; -6 6]   B dA = [7/2 7; 7 14]   dB dA = [-14 -28; -42 -84]
#     G = dB A + B dA - dB dA = [31/2 37; 43 104]      BA + W = [3/2 -1/2; 1 -2]
#     J_1 = (93/4)^2 + (37/2)^2,   J_2 = 43^2 + 208^2.
# Clipped to half its norm (the squares of dA and dB sum to 285), both gradients are halved, and dB dA is quartered:
#     G = [17/4 23/2; 11 31],   J_1 = (51/8)^2 + (23/4)^2,   J_2 = 11^2 + 62^2.

G_OUT = torch.tensor([[1.0, 3.0]])
WHOLE = torch.tensor([[1.0, 2.0]])
HALVES = (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))  # the gradients are linear in x: these add up to it
J_WHOLE = torch.tensor([(93 / 4) ** 2 + (37 / 2) ** 2, 43**2 + 208**2])
J_CLIPPED = torch.tensor([(51 / 8) ** 2 + (23 / 4) ** 2, 11.0**2 + 62**2])
NORM = 285**0.5


def small_case(importance="lora"):
    config = LoraSVDConfig(r=1, lora_alpha=2, target_modules=["0"], importance=importance, param_ratio=0.9)
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
    layer = model.base_model.model[0]
    layer.base_layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    layer.lora_svd_A["default"].data = torch.tensor([[1.0, -1.0]])
    layer.lora_svd_B["default"].data = torch.tensor([[0.5], [1.0]])
    return model, layer


def step(model, inputs, max_norm=None, number=0):
    for x in inputs:
        (model(x) * G_OUT).sum().backward()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    model.base_model.update_and_allocate(number, total_steps=100)
    model.zero_grad()


@pytest.mark.parametrize(
    ("inputs", "max_norm", "expected"),
    [
        ([WHOLE], None, J_WHOLE),
        (HALVES, None, J_WHOLE),
        (HALVES, 2 * NORM, J_WHOLE),
        ([WHOLE], NORM / 2, J_CLIPPED),
        (HALVES, NORM / 2, J_CLIPPED),
    ],
    ids=["plain", "accumulated", "not clipped", "clipped", "accumulated and clipped"],
)
def test_lora_rows_by_hand(inputs, max_norm, expected):
    """What counts are the gradients that the optimizer is about to use, not those of single micro-batches."""
    model, layer = small_case()
    step(model, inputs, max_norm)
    seen = layer.statistics("default")
    assert reference.relative_error(seen.mean("lora_rows"), expected) < 1e-5
    assert seen.counts["step"] == 1


def test_lora_rows_are_the_mean_over_steps():
    model, layer = small_case()
    step(model, [WHOLE])
    step(model, HALVES, NORM / 2, number=1)
    assert reference.relative_error(layer.statistics("default").mean("lora_rows"), (J_WHOLE + J_CLIPPED) / 2) < 1e-5


def test_reference_agrees_with_the_hand():
    A, B, W = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5], [1.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    G = reference.lora_gradient(A, B, torch.tensor([[7.0, 14.0]]), torch.tensor([[-2.0], [-6.0]]))
    assert torch.equal(G, torch.tensor([[15.5, 37.0], [43.0, 104.0]]))
    assert torch.equal(reference.sensitivity_rows(G, W, A, B), J_WHOLE)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["lora_rows", "minnorm_rows", "gradient_rows"])
def test_step_statistics_equal_the_formula_on_the_gradients_of_a_run(name, autocast):
    """Several steps with an optimizer in between; W, A and B are those that the gradients belong to."""
    preset = {"lora_rows": "lora", "minnorm_rows": "lora_minnorm", "gradient_rows": "lora_diagonal"}[name]
    config = LoraSVDConfig(r=3, lora_alpha=5, target_modules=["0"], importance=preset)
    model = get_peft_model(nn.Sequential(nn.Linear(9, 6)), config)
    layer, optimizer, rows = model.base_model.model[0], torch.optim.SGD(model.parameters(), lr=0.1), []
    inputs = []
    for number in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for _ in range(2):
                inputs.append(torch.randn(8, 9).bfloat16().float())  # as the layer takes them under autocast
                (model(inputs[-1]) - torch.randn(8, 6)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            parameters = (layer.lora_svd_A["default"], layer.lora_svd_B["default"])
            A, B, dA, dB = (t.detach().double() for t in (*parameters, *(p.grad for p in parameters)))
            estimates = {
                "lora_rows": reference.lora_gradient(A, B, dA, dB),
                "minnorm_rows": reference.minnorm_gradient(A, B, dA, dB, 5 / 3),
            }
            if name in estimates:
                W = layer.base_layer.weight.detach().double()
                rows.append(reference.sensitivity_rows(estimates[name], W, A, B))
            else:
                seen = torch.cat(inputs).double()
                rows.append(reference.gradient_rows(dB, A, seen.T @ seen / len(seen), 5 / 3))
            model.base_model.update_and_allocate(number, total_steps=100)
        optimizer.step()
        optimizer.zero_grad()
    assert reference.relative_error(layer.statistics("default").mean(name), sum(rows) / 4) < 1e-4


# -- the gradient of least norm ----------------------------------------------------------------------------------------


def observation(kind, scaling=2.5):
    """Gradients of a bypass that belong to one arbitrary G = dL/dW."""
    G, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((7, 9), (3, 9), (7, 3)))
    if kind == "start":
        B.zero_()
    if kind == "rank deficient":
        A[2], B[:, 1] = A[0] - 2 * A[1], 3 * B[:, 0]
    grads = {"grad_A": scaling * B.T @ G, "grad_B": scaling * G @ A.T}
    return G, StepObservation(weight=torch.zeros(7, 9).double(), lora_A=A, lora_B=B, scaling=scaling, **grads)


@pytest.mark.parametrize("kind", ["generic", "start", "rank deficient"])
def test_minnorm_explains_both_gradients_exactly_and_is_the_shortest(kind):
    G, seen = observation(kind)
    estimate, A, B = minnorm_gradient(seen), seen.lora_A, seen.lora_B
    assert reference.relative_error(seen.scaling * estimate @ A.T, seen.grad_B) < 1e-9
    assert torch.allclose(seen.scaling * B.T @ estimate, seen.grad_A, atol=1e-9)
    assert reference.relative_error(estimate, reference.projected_gradient(G, A, B)) < 1e-9
    assert reference.relative_error(estimate, reference.minnorm_gradient(A, B, seen.grad_A, seen.grad_B, 2.5)) < 1e-9
    for _ in range(5):  # every other matrix that explains them is longer: add what neither A nor B sees
        other = torch.randn_like(G)
        assert estimate.norm() < (estimate + other - reference.projected_gradient(other, A, B)).norm()


def test_minnorm_drops_the_terms_of_b_while_b_is_zero():
    G, seen = observation("start")
    on_A = torch.linalg.pinv(seen.lora_A) @ seen.lora_A
    assert reference.relative_error(minnorm_gradient(seen), G @ on_A) < 1e-10


def test_minnorm_is_closer_to_the_gradient_than_the_published_estimate():
    cosines = []
    for _ in range(20):
        G, seen = observation("generic")
        published = reference.lora_gradient(seen.lora_A, seen.lora_B, seen.grad_A, seen.grad_B)
        cosines.append(
            [float(torch.cosine_similarity(e.flatten(), G.flatten(), 0)) for e in (minnorm_gradient(seen), published)]
        )
    exact, approximate = torch.tensor(cosines).mean(0)
    assert exact > approximate + 0.1


# -- presets -----------------------------------------------------------------------------------------------------------

COUNTS = {"token": 10, "sample": 4, "step": 2}


@pytest.fixture
def seen():
    sums = {name: torch.rand(statistic.shape(4, 6)) for name, statistic in STATISTICS.items()}
    return LayerStatistics(sums, COUNTS)


def test_presets_are_the_formulas(seen):
    S = {name: total.double() for name, total in seen.sums.items()}
    X = S["input_gram"] / 10
    expected = {
        "lora": (S["lora_rows"] / 2, None),
        "lora_minnorm": (S["minnorm_rows"] / 2, None),
        "lora_diagonal": (S["gradient_rows"] / 2, X),
        "lora_activation": (S["lora_gradient_gram"], X),
        "fisher": (S["weight_gradient_rows"] / 4, None),
        "fisher_elementwise": (None, None),
        "activation_scale": (None, S["input_abs"] / 10),
        "activation": (None, X),
        "gradient_activation": (S["output_square"], X),
        "kronecker": (S["output_gram"], X),
        "none": (None, None),
    }
    assert expected.keys() == IMPORTANCES.keys()
    for name, (row, column) in expected.items():
        needed = {k: v for k, v in seen.sums.items() if k in IMPORTANCES[name].statistics}
        metrics = IMPORTANCES[name].metrics(LayerStatistics(needed, COUNTS))
        for found, wanted in ((metrics.row, row), (metrics.column, column)):
            assert (found is None) == (wanted is None)
            assert found is None or reference.relative_error(found, wanted) < 1e-12
        assert (metrics.elements is not None) == IMPORTANCES[name].elementwise
    elements = IMPORTANCES["fisher_elementwise"].metrics(seen).elements
    assert torch.equal(elements, S["weight_gradient_square"] / 4)


class Pooled(nn.Module):
    """A layer that sees every token, and one that sees the mean of each sample's; inputs have one length in both."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.pooled = nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)

    def forward(self, x):
        hidden = self.token(nn.functional.normalize(x, dim=-1))
        return self.pooled(nn.functional.normalize(hidden.mean(1), dim=-1))


@pytest.mark.parametrize("importance", ["kronecker", "gradient_activation", "lora_activation"])
def test_metrics_are_comparable_between_layers_that_see_more_and_fewer_tokens(importance):
    """``tr(C) tr(X) = sum |g|^2 |x|^2``, the trace of the Fisher matrix of single tokens, if all |x| are equal."""
    config = LoraSVDConfig(r=2, target_modules=["token", "pooled"], importance=importance, total_steps=9)
    model = get_peft_model(Pooled(), config)
    layers = {name: model.base_model.model.get_submodule(name) for name in ("token", "pooled")}
    gradients = {}
    for name, layer in layers.items():
        layer.register_full_backward_hook(lambda _, __, g, name=name: gradients.update({name: g[0]}))
    model(torch.randn(128, 20, 6, requires_grad=True)).square().sum().backward()
    model.base_model.update_and_allocate(0)
    for name, layer in layers.items():
        metrics = IMPORTANCES[importance].metrics(layer.statistics("default"))
        row = metrics.row.sum() if metrics.row.dim() == 1 else metrics.row.trace()
        found, exact = float(row * metrics.column.trace()), float(gradients[name].square().sum())
        if importance == "lora_activation":  # an estimate, of gradients that are not independent; the mean is 1/20
            assert exact / 4 < found < 4 * exact
        else:
            assert found == pytest.approx(exact, rel=1e-4)


def test_gradient_rows_estimate_the_diagonal_of_the_gradient_covariance():
    """For independent g and x, whatever the input's covariance and the random sketch A: E[c] = T diag C."""
    tokens, X_root = 64, torch.randn(9, 9, dtype=torch.float64) * torch.logspace(0, 1.5, 9, dtype=torch.float64)
    C_root, rows = torch.randn(5, 5, dtype=torch.float64), []
    for _ in range(400):
        A = torch.randn(4, 9, dtype=torch.float64)
        x = torch.randn(tokens, 9, dtype=torch.float64) @ X_root.T
        g = torch.randn(tokens, 5, dtype=torch.float64) @ C_root.T
        nothing = torch.zeros(5, 4, dtype=torch.float64)
        seen = StepObservation(
            weight=torch.zeros(5, 9), lora_A=A, lora_B=nothing, grad_A=nothing.T, grad_B=2.5 * g.T @ x @ A.T,
            scaling=2.5, input_sketch=input_sketch(A, X_root @ X_root.T),
        )  # fmt: skip
        rows.append(gradient_rows(seen))
    expected = tokens * (C_root @ C_root.T).diagonal()
    assert reference.relative_error(torch.stack(rows).mean(0), expected) < 0.1


@pytest.mark.parametrize("size", [1, 256, 600])
def test_input_sketch_is_exact_in_any_width(size):
    """In float64, although the Gram matrix is in float32 and of very different scales."""
    rows = torch.randn(40, size) * torch.logspace(0, 3, size)
    A, X = torch.randn(4, size), rows.T @ rows
    assert reference.relative_error(input_sketch(A, X), A.double() @ X.double() @ A.double().T) < 1e-12


def test_gradient_rows_ask_for_the_input_gram():
    empty = torch.zeros(2, 2)
    with pytest.raises(LoraSVDError, match="gradient_rows: collect input_gram"):
        gradient_rows(StepObservation(empty, empty, empty, empty, empty, 1.0))


# -- LoRA's gradients of segments of tokens ----------------------------------------------------------------------------


def case(tokens=64, r=4):
    """What a bypass sees of inputs of very different scales, and gradients with correlated entries."""
    x = torch.randn(tokens, 9, dtype=torch.float64) * torch.logspace(0, 1.5, 9, dtype=torch.float64)
    return x @ torch.randn(9, r, dtype=torch.float64), torch.randn(tokens, 5, dtype=torch.float64) @ C_ROOT


C_ROOT = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_segment_gradients_estimate_the_gradient_covariance():
    """Whatever the input's covariance and A is, and where large inputs have large gradients."""
    found, sought = torch.zeros(5, 5).double(), torch.zeros(5, 5).double()
    for _ in range(2000):
        hidden, g = case()
        g[:, 0] *= hidden.norm(dim=1)
        found, sought = found + gram(segment_gradients(hidden, g)), sought + gram(g)
    assert reference.relative_error(found, sought) < 0.03


def test_segment_gradients_bear_neighbours_that_are_alike():
    """Tokens that follow each other and have one gradient and one input are in different segments."""
    hidden, g = case(16)
    found = segment_gradients(hidden.repeat_interleave(4, 0), g.repeat_interleave(4, 0))
    assert reference.relative_error(gram(found), 4 * gram(segment_gradients(hidden, g))) < 1e-6


@pytest.mark.parametrize("tokens", [1, 15, 16, 50])
def test_segment_gradients_depend_on_what_a_sees_alone(tokens):
    """Not on its basis nor its scale; with tokens that fill no segment, or do not span what it sees."""
    hidden, g = case(tokens)
    other = hidden @ torch.randn(4, 4, dtype=torch.float64) * 1e-3
    found, same = (gram(segment_gradients(h, g)) for h in (hidden, other))
    assert reference.relative_error(same, found) < 1e-4


def test_segment_gradients_are_few():
    hidden, g = case(160, r=4)
    assert segment_gradients(hidden, g).shape == (40, 5)
    assert not segment_gradients(torch.zeros_like(hidden), g).any()
