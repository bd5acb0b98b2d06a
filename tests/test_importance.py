"""LoRA-guided sensitivities through real backward passes, minimum-norm gradients, and the metrics of every preset."""

import pytest
import reference
import torch
from peft import get_peft_model
from torch import nn

from lora_svd import LoraSVDConfig
from lora_svd.errors import NumericalWarning, in_module
from lora_svd.importance import IMPORTANCES
from lora_svd.linalg import gram
from lora_svd.statistics import STATISTICS, LayerStatistics
from lora_svd.statistics.lora_gradients import StepObservation, gradient_rows, input_sketch, minnorm_gradient
from lora_svd.statistics.sketch import signed_sums

# -- a case small enough for pencil and paper --------------------------------------------------------------------------
#
# W = [1 0; 0 -1], A = [1 -1], B = [1/2; 1], s = lora_alpha / r = 2, and a loss with constant g = dL/dy = [1; 3].
# For the input x = [1; 2]:  A x = -1,  dB = s g (A x)^T = [-2; -6],  dA = s B^T g x^T = 2 (1/2 + 3) [1 2] = [7 14].
#     dB A = [-2 2; -6 6]   B dA = [7/2 7; 7 14]   dB dA = [-14 -28; -42 -84]
#     G = dB A + B dA - dB dA = [31/2 37; 43 104]      W + s B A = [2 -1; 2 -3]
#     J_1 = 31^2 + 37^2,   J_2 = 86^2 + 312^2.
# Clipped to half its norm (the squares of dA and dB sum to 285), both gradients are halved, and dB dA is quartered:
#     G = [17/4 23/2; 11 31],   J_1 = (17/2)^2 + (23/2)^2,   J_2 = 22^2 + 93^2.

G_OUT = torch.tensor([[1.0, 3.0]])
WHOLE = torch.tensor([[1.0, 2.0]])
HALVES = (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))  # the gradients are linear in x: these add up to it
J_WHOLE = torch.tensor([31.0**2 + 37**2, 86**2 + 312**2])
J_CLIPPED = torch.tensor([(17 / 2) ** 2 + (23 / 2) ** 2, 22.0**2 + 93**2])
NORM = 285**0.5


def small_case(importance="lora"):
    config = LoraSVDConfig(r=1, lora_alpha=2, target_modules=["0"], importance=importance, param_ratio=0.9)
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
    layer = model.base_model.model[0]
    layer.base_layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    layer.adapter("default").A.data = torch.tensor([[1.0, -1.0]])
    layer.adapter("default").B.data = torch.tensor([[0.5], [1.0]])
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
    assert torch.equal(reference.sensitivity_rows(G, W, A, B, 2), J_WHOLE)


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
            parameters = (layer.adapter("default").A, layer.adapter("default").B)
            A, B, dA, dB = (t.detach().double() for t in (*parameters, *(p.grad for p in parameters)))
            estimates = {
                "lora_rows": reference.lora_gradient(A, B, dA, dB),
                "minnorm_rows": reference.minnorm_gradient(A, B, dA, dB, 5 / 3),
            }
            if name in estimates:
                W = layer.base_layer.weight.detach().double()
                rows.append(reference.sensitivity_rows(estimates[name], W, A, B, 5 / 3))
            else:
                seen = torch.cat(inputs).double()
                rows.append(reference.gradient_rows(dB, A, seen.T @ seen / len(seen), seen.mean(0), 5 / 3))
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
        "lora_activation": (S["signed_output_gram"], X),
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
        rel = 0.2 if importance == "lora_activation" else 1e-4  # an estimate for the layer that sees 2,560 tokens
        assert found == pytest.approx(exact, rel=rel)


def one_step(tokens, r, mean_x, mean_g, C_root):
    """A step with independent g and x, whose columns are independent with a mean of their own, and its C."""
    A, X_root = torch.randn(r, 9, dtype=torch.float64), torch.logspace(0, 1.5, 9, dtype=torch.float64)
    x = (torch.randn(tokens, 9, dtype=torch.float64) + mean_x) * X_root
    g = torch.randn(tokens, 5, dtype=torch.float64) @ C_root.T + mean_g
    X = X_root.square().diag() + mean_x**2 * torch.outer(X_root, X_root)
    nothing = torch.zeros(5, r, dtype=torch.float64)
    step = StepObservation(
        weight=None, lora_A=A, lora_B=nothing, grad_A=nothing.T, grad_B=2.5 * g.T @ x @ A.T, scaling=2.5,
        input_sketch=input_sketch(A, X), input_mean=mean_x * A @ X_root,
    )  # fmt: skip
    return step, tokens * (C_root @ C_root.T + mean_g**2).diagonal()


@pytest.mark.parametrize(("mean_x", "mean_g"), [(0.0, 0.0), (0.5, 0.3), (2.0, 1.0)])
@pytest.mark.parametrize(("tokens", "r"), [(64, 4), (512, 2), (256, 12)], ids=str)
def test_gradient_rows_estimate_the_diagonal_of_the_gradient_covariance(tokens, r, mean_x, mean_g):
    """For independent g and x, whatever their means, the input's covariance and the sketch A: E[c] = diag C. With r of
    12 there are fewer inputs than rows of A."""
    C_root = torch.randn(5, 5, dtype=torch.float64)
    found, expected = zip(
        *((gradient_rows(step), C) for step, C in (one_step(tokens, r, mean_x, mean_g, C_root) for _ in range(1500))),
        strict=True,
    )
    assert reference.relative_error(torch.stack(found).mean(0), expected[0]) < 0.12


def test_gradient_rows_of_one_row_of_a_are_said_to_hold_the_mean_gradient():
    step, C = one_step(256, 1, 2.0, 1.0, torch.eye(5, dtype=torch.float64))
    with in_module("block.up"), pytest.warns(NumericalWarning, match=r"^block\.up: r = 1 .* set r to 2 or more"):
        assert (gradient_rows(step) > 10 * C).all()


@pytest.mark.parametrize("size", [1, 256, 600])
def test_input_sketch_is_exact_in_any_width(size):
    """In float64, although the Gram matrix is in float32 and of very different scales."""
    rows = torch.randn(40, size) * torch.logspace(0, 3, size)
    A, X = torch.randn(4, size), rows.T @ rows
    assert reference.relative_error(input_sketch(A, X), A.double() @ X.double() @ A.double().T) < 1e-12


# -- sums of a few tokens' gradients -----------------------------------------------------------------------------------


def case(tokens, mean, spread=0.0):
    """Gradients with correlated entries, a mean, and sizes that are log-normal."""
    root = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = torch.exp(spread * torch.randn(tokens, 1, dtype=torch.float64))
    return sizes * (torch.randn(tokens, 5, dtype=torch.float64) @ root + mean)


@pytest.mark.parametrize("tokens", [512, 700])
@pytest.mark.parametrize("mean", [0.0, 0.3, 3.0])
def test_signed_sums_have_the_gram_matrix_of_the_rows_in_expectation(tokens, mean):
    """Whatever the mean is, and of the same rows: it is the signs that make it so, not that rows are independent."""
    g = case(tokens, mean)
    found = sum(gram(signed_sums(g)).double() for _ in range(2000)) / 2000
    assert reference.relative_error(found, gram(g)) < 0.01


def test_signed_sums_are_few_and_the_largest_rows_are_apart():
    g = case(1024, 0.0, spread=2.0)
    sums = signed_sums(g)
    assert sums.shape == (256, 5)
    largest = g[g.norm(dim=1).argsort(descending=True)[:8]]
    nearest = torch.cdist(torch.cat([sums, -sums]).double(), largest.double()).amin(0)
    assert (nearest < 0.05 * largest.norm(dim=1)).all()
    errors = [relative_norm(gram(signed_sums(g)) - gram(g), gram(g)) for _ in range(20)]
    signs = [torch.randn(1024, 256, dtype=torch.float64).sign() / 16 for _ in range(20)]
    plain = [relative_norm(gram(sign.T @ g.double()) - gram(g), gram(g)) for sign in signs]
    assert sum(errors) < 0.2 * sum(plain)


def relative_norm(error, whole):
    return float(error.norm() / whole.norm())


def test_few_rows_stay_alone():
    g = case(255, 0.3)
    assert signed_sums(g) is g
    assert signed_sums(case(256, 0.3)).shape == (128, 5)
    assert signed_sums(g[:0]).shape == (0, 5)


def test_signed_sums_of_half_precision_do_not_overflow():
    g = torch.full((600, 5), 3e4, dtype=torch.float16)
    assert signed_sums(g).isfinite().all()
    assert signed_sums(g.bfloat16()).dtype == torch.bfloat16
    assert not signed_sums(torch.zeros(600, 5)).any()
