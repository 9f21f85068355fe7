"""`lora_linear` against its formula, in every mode in which autograd can run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from lightning_lora.dropout import draw_dropped, zero_dropped
from lightning_lora.functional import delta_weight, lora_linear

IN, OUT, R, SCALING = 7, 5, 3, 2.5
SHAPES = [(IN,), (4, IN), (2, 3, IN), (2, 1, 3, IN), (0, IN), (2, 0, IN)]
DROPOUTS = [0.0, 0.1, 0.6]


@pytest.fixture(params=[0, 2**16], ids=["one node", "ordinary operations"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lora.functional.SMALL_INPUT", request.param)


def draw(
    shape: tuple[int, ...] = (4, IN),
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    trains: str = "xAB",
) -> dict[str, Tensor | None]:
    """The tensor arguments; ``trains`` names those that require gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": shape, "W": (OUT, IN), "b": (OUT,), "A": (R, IN), "B": (OUT, R)}
    arguments: dict[str, Tensor | None] = {}
    for name, size in shapes.items():
        value = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        arguments[name] = value.requires_grad_(name in trains)
    if not bias:
        arguments["b"] = None
    return arguments


def formula(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, p: float) -> Tensor:
    """Equation 3 of the paper with the mask that `lora_linear` draws next."""
    adapter_in = x if p == 0 else zero_dropped(x, draw_dropped(x, p)) / (1 - p)
    out = x @ W.T + SCALING * (adapter_in @ A.T) @ B.T
    return out if b is None else out + b


def run(function: Callable[..., Tensor], p: float, **tensors: Any) -> dict[str, Tensor]:
    """Output and gradients, under a fixed seed and an uneven loss."""
    torch.manual_seed(5)
    out = function(*tensors.values(), p)
    results = {"out": out}
    if out.requires_grad:
        weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
        wanted = {k: t for k, t in tensors.items() if t is not None and t.requires_grad}
        grads = torch.autograd.grad((out * weights).sum(), list(wanted.values()))
        results |= dict(zip(wanted, grads, strict=True))
    return results


def ours(*args: Any) -> Tensor:
    *tensors, p = args
    return lora_linear(*tensors, SCALING, p)


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        message = f"{name}: {{}}".format
        torch.testing.assert_close(actual[name], value, **tolerance, msg=message)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("p", DROPOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], p: float, bias: bool
) -> None:
    tensors = draw(shape, bias=bias)
    assert_close(run(ours, p, **tensors), run(formula, p, **tensors))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("trains", ["A", "B", "AB", "x", "bAB", "xbAB", "xWbAB", "WA", "W", ""])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_any_selection_of_trained_tensors(trains: str, p: float) -> None:
    tensors = draw(trains=trains)
    results = run(ours, p, **tensors)
    assert set(results) == {"out", *trains}
    assert_close(results, run(formula, p, **tensors))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("p", DROPOUTS)
@pytest.mark.parametrize("trains", ["xAB", "xbAB", "xWbAB"])
def test_first_and_second_derivatives(p: float, trains: str) -> None:
    tensors = draw((2, 2, IN), trains=trains)

    def function(*wanted: Tensor) -> Tensor:
        torch.manual_seed(5)
        arguments = {**tensors, **dict(zip(trains, wanted, strict=True))}
        return ours(*arguments.values(), p)

    inputs = tuple(tensors[name] for name in trains)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("p", DROPOUTS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Callable[[], Any], p: float) -> None:
    tensors = draw()
    with context():
        out = run(ours, p, **tensors)["out"]
    torch.testing.assert_close(out, run(formula, p, **tensors)["out"], check_stride=False)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        strided,
        lambda x: x[:, :1].expand(-1, 5, -1),
        lambda x: x[:, 1:],
    ],
    ids=["transposed", "transposed memory", "strided", "expanded", "narrowed"],
)
@pytest.mark.parametrize("p", DROPOUTS)
def test_inputs_that_are_not_contiguous(arrange: Callable[[Tensor], Tensor], p: float) -> None:
    tensors = draw((3, 4, IN))

    def arranged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *rest: function(arrange(x), *rest)

    assert_close(run(arranged(ours), p, **tensors), run(arranged(formula), p, **tensors))


@pytest.mark.usefixtures("way")
def test_gradients_that_are_not_contiguous() -> None:
    tensors = draw((3, 4, IN))
    assert_close(
        run(lambda *a: ours(*a).transpose(0, 2), 0.1, **tensors),
        run(lambda *a: formula(*a).transpose(0, 2), 0.1, **tensors),
    )


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout_acts_on_the_input_of_the_adapter_alone(p: float) -> None:
    x, W, b, _, B = draw((400, IN)).values()
    assert x is not None and W is not None and B is not None and b is not None
    A = torch.eye(IN, dtype=torch.float64)
    torch.manual_seed(0)
    update = lora_linear(x, W, b, A, torch.eye(IN, dtype=torch.float64)[:OUT], 1.0, p) - (
        x @ W.T + b
    )
    kept = update.abs() > 1e-9
    torch.testing.assert_close(update[kept], (x[:, :OUT] / (1 - p))[kept])
    assert abs((~kept).double().mean().item() - p) < 0.06


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("p", [0.1, 0.6])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(p: float, use_reentrant: bool) -> None:
    tensors = draw()

    def recomputed(*args: Any) -> Tensor:
        out = checkpoint(ours, *args, use_reentrant=use_reentrant)
        assert isinstance(out, Tensor)
        return out

    def backward(function: Callable[..., Tensor]) -> list[Tensor | None]:
        torch.manual_seed(5)
        leaves = {k: None if t is None else t.detach().clone() for k, t in tensors.items()}
        for name in "xAB":
            leaves[name].requires_grad_()  # type: ignore[union-attr]
        function(*leaves.values(), p).square().sum().backward()
        return [leaves[name].grad for name in "xAB"]  # type: ignore[union-attr]

    for actual, expected in zip(backward(recomputed), backward(ours), strict=True):
        assert actual is not None and expected is not None
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("p", DROPOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_saved_for_the_backward_pass(p: float, bias: bool) -> None:
    rows = 31
    tensors = draw((rows, IN), torch.float32, bias)
    saved: list[Tensor] = []
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(*tensors.values(), p)
    sizes = sorted(t.numel() for t in saved if t.is_floating_point())
    assert sizes == sorted([rows * IN, OUT * IN, R * IN, OUT * R, rows * R])
    x = tensors["x"]
    assert x is not None
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1
    masks = [t for t in saved if not t.is_floating_point()]
    assert len(masks) == (p > 0)
    assert all(t.numel() * t.element_size() <= 2 * p * 8 * rows * IN for t in masks)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_inputs_of_few_elements_run_in_ordinary_operations(
    p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_lora.functional.SMALL_INPUT", 10 * IN)

    def nodes(rows: int, autocast: bool = False) -> set[str]:
        tensors = draw((rows, IN), torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = ours(*tensors.values(), p)
        found, left = set(), [out.grad_fn]
        while left:
            node: Any = left.pop()
            found.add(type(node).__name__)
            left += [each for each, _ in node.next_functions if each is not None]
        return found

    one_node = "JoinedProjectionsBackward"
    assert one_node not in nodes(9) and "AddmmBackward0" in nodes(9)
    assert one_node in nodes(10)
    # Ordinary operations would keep a cast copy of the weight.
    assert one_node in nodes(9, autocast=True)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_half_precision_input_with_float32_masters(p: float) -> None:
    exact = draw((64, IN))
    tensors = {
        name: None
        if t is None
        else t.detach().to(torch.bfloat16 if name in "xWb" else torch.float32)
        for name, t in exact.items()
    }
    for name in "xAB":
        tensors[name].requires_grad_()  # type: ignore[union-attr]
    results = run(ours, p, **tensors)
    dtypes = {name: value.dtype for name, value in results.items()}
    half = torch.bfloat16
    assert dtypes == {"out": half, "x": half, "A": torch.float32, "B": torch.float32}
    for name, value in run(formula, p, **exact).items():
        error = (results[name].double() - value).norm() / value.norm()
        assert error < 0.02, name


@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_under_autocast(
    p: float, input_dtype: torch.dtype, weight_dtype: torch.dtype, backward_inside: bool
) -> None:
    exact = draw((64, IN))
    dtypes = {"x": input_dtype, "W": weight_dtype, "b": torch.float32, "A": torch.float32}
    tensors = {
        name: t.detach().to(dtypes.get(name, torch.float32)).requires_grad_(name in "xbAB")
        for name, t in exact.items()
        if t is not None
    }
    grads: dict[str, Tensor] = {}
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(*tensors.values(), p)
        weights = torch.linspace(-1, 2, out.numel()).reshape(out.shape)
        if backward_inside:
            (out.float() * weights).sum().backward()
    if not backward_inside:
        (out.float() * weights).sum().backward()
    assert out.dtype == torch.bfloat16
    grads = {name: t.grad for name, t in tensors.items() if t.grad is not None}
    assert {name: g.dtype for name, g in grads.items()} == {
        name: tensors[name].dtype for name in "xbAB"
    }
    exact["b"].requires_grad_()  # type: ignore[union-attr]
    for name, value in run(formula, p, **exact).items():
        actual = out if name == "out" else grads[name]
        assert (actual.double() - value).norm() / value.norm() < 0.02, name


def test_autocast_leaves_double_precision_alone() -> None:
    tensors = draw()
    with torch.autocast("cpu", torch.bfloat16):
        results = run(ours, 0.0, **tensors)
    assert_close(results, run(formula, 0.0, **tensors))


def test_autocast_saves_no_cast_copy_of_the_weight() -> None:
    tensors = draw((64, IN), torch.float32)
    saved: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        ours(*tensors.values(), 0.0)
    half = [t.numel() for t in saved if t.dtype == torch.bfloat16]
    assert half == [64 * IN, 64 * R, R * IN, OUT * R], "what was computed with, but no weight"
    full = sorted(t.numel() for t in saved if t.dtype == torch.float32)
    assert full == sorted([OUT * IN, R * IN, OUT * R]), "the parameters themselves"


# The backend "aot_eager" traces the whole graph like the default one, but needs no C++ compiler.
@pytest.mark.parametrize("trains", ["xAB", "bAB", "xWAB"])
def test_compiled_whole(trains: str) -> None:
    torch._dynamo.reset()
    tensors = draw((2, 3, IN), torch.float32, trains=trains)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = run(ours, 0.0, **tensors)
    assert_close(run(compiled, 0.0, **tensors), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        out = compiled(*tensors.values(), 0.0)
    torch.testing.assert_close(out, expected["out"].detach(), rtol=1e-5, atol=1e-5)


def test_compiled_with_dropout_and_changing_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 400, 500):
        tensors = draw((rows, IN), torch.float32)
        results = run(compiled, 0.1, **tensors)
        exact = run(ours, 0.0, **tensors)
        assert not torch.equal(results["out"], exact["out"])
    # Means agree where the noise of dropout averages out.
    assert (results["out"] - exact["out"]).detach().mean().abs() < 0.5
    assert (results["B"] - exact["B"]).norm() / exact["B"].norm() < 0.3


def test_compiled_under_autocast() -> None:
    torch._dynamo.reset()
    tensors = draw((2, 3, IN), torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = run(compiled, 0.0, **tensors), run(ours, 0.0, **tensors)
    assert actual["out"].dtype == torch.bfloat16
    assert_close(actual, expected, rtol=0.02, atol=0.05)


TRANSFORMED = {
    "grad": lambda f, x, A: torch.func.grad(lambda A: f(x, A).square().sum())(A),
    "vmap": lambda f, x, A: torch.func.vmap(f, (0, None))(x, A),
    "a gradient for each row": lambda f, x, A: torch.func.vmap(
        torch.func.grad(lambda A, row: f(row[None], A).square().sum()), (None, 0)
    )(A, x),
    "jvp": lambda f, x, A: torch.func.jvp(lambda A: f(x, A), (A,), (A + 1,))[1],
    "jacrev": lambda f, x, A: torch.func.jacrev(lambda A: f(x, A))(A),
    "hessian": lambda f, x, A: torch.func.hessian(lambda A: f(x, A).square().sum())(A),
}


@pytest.mark.parametrize("transform", TRANSFORMED)
def test_transforms_of_torch_func(transform: str) -> None:
    x, W, b, A, B = draw(trains="").values()
    found, expected = (
        TRANSFORMED[transform](lambda x, A, f=f: f(x, W, b, A, B, 0.0), x, A)
        for f in (ours, formula)
    )
    torch.testing.assert_close(found, expected)


def test_dropout_inside_a_transform() -> None:
    x, W, b, A, B = draw((400, IN), trains="").values()
    assert x is not None and W is not None and A is not None and B is not None

    def found() -> Tensor:
        torch.manual_seed(0)
        each = torch.func.vmap(lambda row: ours(row, W, b, A, B, 0.1), randomness="different")
        return each(x)

    out = found()
    assert torch.equal(out, found())
    base = formula(x, W, b, A, 0 * B, 0.0)
    kept = base + (formula(x, W, b, A, B, 0.0) - base) / 0.9
    changed = ((out - kept).abs() > 1e-9).any(1).double().mean()
    assert abs(changed - (1 - 0.9**IN)) < 0.1


def test_changes_of_the_output_in_place() -> None:
    tensors = draw()

    def changed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inner(*args: Any) -> Tensor:
            out = function(*args)
            out += 1
            out.mul_(3).relu_()
            return out

        return inner

    assert_close(run(changed(ours), 0.0, **tensors), run(changed(formula), 0.0, **tensors))


def test_changes_of_a_saved_tensor_in_place_are_noticed() -> None:
    tensors = draw(trains="AB")
    out = ours(*tensors.values(), 0.0)
    tensors["x"].add_(1)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_delta_weight_is_the_update_of_the_function() -> None:
    x, W, b, A, B = draw().values()
    assert x is not None and W is not None and A is not None and B is not None
    delta = delta_weight(A, B, SCALING)
    assert delta.shape == W.shape
    assert delta.dtype == A.dtype
    torch.testing.assert_close(ours(x, W, b, A, B, 0.0), ours(x, W + delta, b, A, 0 * B, 0.0))
