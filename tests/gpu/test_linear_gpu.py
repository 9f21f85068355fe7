"""The adapted linear layer on a CUDA device, against the CPU and against the plain formula."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_lora import inject_lora, merge_lora, unmerge_lora
from lightning_lora.fingerprint import position_sums
from lightning_lora.functional import lora_linear
from lightning_lora.layers import LoRALinear
from tests.models import assert_same, mlp, shake, snapshot

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
IN, OUT, R, SCALING = 256, 192, 8, 2.5


def draw(rows: int = 512, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Input, frozen weight and bias in ``dtype``, and float32 factors, on the device."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (rows, IN), "W": (OUT, IN), "b": (OUT,), "A": (R, IN), "B": (OUT, R)}
    values = {n: torch.randn(s, generator=generator) / s[-1] ** 0.5 for n, s in shapes.items()}
    return {
        name: value.to("cuda", dtype if name in "xWb" else torch.float32).requires_grad_(
            name in "xAB"
        )
        for name, value in values.items()
    }


def formula(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return F.linear(x, W, b) + SCALING * F.linear(F.linear(x, A), B)


def grads(out: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 2, out.numel(), device=out.device).reshape(out.shape)
    trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    found = torch.autograd.grad((out.float() * weights).sum(), list(trained.values()))
    return {"out": out, **dict(zip(trained, found, strict=True))}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm() / value.double().norm()
        assert error < tolerance, (name, error)


def test_parity_with_the_formula_and_the_cpu() -> None:
    tensors = draw()
    actual = grads(lora_linear(*tensors.values(), SCALING), tensors)
    assert_near(actual, grads(formula(*tensors.values()), tensors), 1e-3)
    on_cpu = {n: t.detach().cpu().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    expected = grads(lora_linear(*on_cpu.values(), SCALING), on_cpu)
    assert_near({n: t.cpu() for n, t in actual.items()}, expected, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
def test_autocast(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    tensors = draw()
    expected = grads(formula(*tensors.values()), tensors)
    if weight_dtype is None:
        tensors["W"] = tensors["W"].to(dtype)
    with torch.autocast("cuda", dtype):
        out = lora_linear(*tensors.values(), SCALING)
    assert out.dtype == dtype
    actual = grads(out, tensors)
    assert all(actual[name].dtype == torch.float32 for name in "xAB")
    assert_near(actual, expected, 0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_base_with_float32_masters(dtype: torch.dtype) -> None:
    expected_tensors, tensors = draw(), draw(dtype=dtype)
    expected = grads(formula(*expected_tensors.values()), expected_tensors)
    actual = grads(lora_linear(*tensors.values(), SCALING), tensors)
    assert actual["out"].dtype == actual["x"].dtype == dtype
    assert actual["A"].dtype == actual["B"].dtype == torch.float32
    assert_near(actual, expected, 0.02)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(p: float) -> None:
    tensors = draw()
    torch.cuda.manual_seed(0)
    first = grads(lora_linear(*tensors.values(), SCALING, p), tensors)
    second = lora_linear(*tensors.values(), SCALING, p)
    assert not torch.equal(first["out"], second)
    torch.cuda.manual_seed(0)
    keep = torch.rand(tensors["x"].shape, device="cuda", dtype=torch.float32) >= p
    assert abs(keep.double().mean().item() - (1 - p)) < 0.01
    dropped = tensors["x"] * keep / (1 - p)
    x, W, b, A, B = tensors.values()
    expected = F.linear(x, W, b) + SCALING * F.linear(F.linear(dropped, A), B)
    assert_near(first, grads(expected, tensors), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compiled(p: float) -> None:
    torch._dynamo.reset()
    tensors = draw()
    compiled = torch.compile(
        lambda *args: lora_linear(*args, SCALING, p), fullgraph=True, dynamic=False
    )
    actual = grads(compiled(*tensors.values()), tensors)
    if p == 0:
        assert_near(actual, grads(formula(*tensors.values()), tensors), 1e-3)
    else:
        assert all(bool(tensor.isfinite().all()) for tensor in actual.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_first_the_output_is_bitwise_that_of_the_base(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, device="cuda", dtype=dtype).requires_grad_(False)
    model = nn.Sequential(copy.deepcopy(plain))
    inject_lora(model, r=4, alpha=10)
    x = torch.randn(3, 5, IN, device="cuda", dtype=dtype)
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_saved_activations() -> None:
    rows = 4096
    tensors = draw(rows, torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = lora_linear(*tensors.values(), SCALING)
    kept = torch.cuda.memory_allocated() - before
    expected = out.numel() * out.element_size() + rows * R * 2
    # The allocator rounds every block up to 512 bytes.
    assert expected <= kept <= expected + 8 * 512


def test_factors_are_the_same_on_every_device() -> None:
    on_cpu, on_gpu = mlp(), mlp().cuda()
    for model in (on_cpu, on_gpu):
        inject_lora(model, r=2, alpha=6, seed=3)
    assert isinstance(on_gpu.fc1, LoRALinear)
    assert on_gpu.fc1.lora.A.is_cuda
    assert torch.equal(on_gpu.fc1.lora.A.cpu(), on_cpu.fc1.lora.A)


def test_merging_is_exact_and_survives_a_move() -> None:
    model = mlp().cuda()
    inject_lora(model, r=2, alpha=6)
    shake(model)
    base, x = snapshot(model), torch.randn(4, 6, device="cuda")
    expected = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    unmerge_lora(model)
    assert_same(base, snapshot(model))
    merge_lora(model)
    model.cpu()
    unmerge_lora(model)
    assert_same({name: tensor.cpu() for name, tensor in base.items()}, snapshot(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_is_the_same_on_every_device(dtype: torch.dtype) -> None:
    weight = torch.randn(300, 101, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert position_sums(weight.cuda()) == position_sums(weight)
