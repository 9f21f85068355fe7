"""LoRA on raw bitsandbytes layers, on the CPU; nothing of Hugging Face."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from functools import partial
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import inject_lora, remove_lora
from lightning_lora.errors import TargetError
from lightning_lora.layers.quantized import LoRALinear4bit, LoRALinear8bitLt
from lightning_lora.quantization import dequantized
from tests.models import shake
from tests.quantized import KINDS, any_bits, plain_mlp, quantized, quantized_mlp

# Sums in another order, of numbers near 100.
NEAR = {"rtol": 1e-4, "atol": 1e-4}
CLASSES = {"nf4": LoRALinear4bit, "fp4": LoRALinear4bit, "int8": LoRALinear8bitLt}


def pair(kind: str, bias: bool = True, **settings: Any) -> tuple[nn.Module, Any]:
    """A quantized layer and its adapted copy, the factors as they are at first."""
    torch.manual_seed(0)
    base = quantized(nn.Linear(64, 96, bias=bias), kind, **settings)
    adapted = nn.Sequential(copy.deepcopy(base))
    inject_lora(adapted, r=4, alpha=10)
    assert type(adapted[0]) is CLASSES[kind]
    # Else the base would be repacked in evaluation, which is a test of its own.
    base.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return base, adapted[0]


INPUTS = {
    "2-d": lambda x: x[0],
    "3-d": lambda x: x,
    "4-d": lambda x: x[None],
    "transposed": lambda x: x.transpose(0, 1),
    "empty": lambda x: x[0, :0],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arrange", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_at_first_the_output_is_bitwise_that_of_the_base(
    kind: str, arrange: Any, dtype: torch.dtype, autocast: bool, training: bool
) -> None:
    base, layer = pair(kind)
    base.train(training), layer.train(training)
    if kind == "int8" and arrange is INPUTS["4-d"] and not training:
        pytest.skip("bitsandbytes itself takes no such input")
    x = arrange(torch.randn(3, 5, 64, dtype=dtype))
    y = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            expected, plain = base(x), layer(x)
        tracked = layer(y)
    for out in (plain, tracked):
        assert out.dtype == expected.dtype
        assert torch.equal(out, expected)
    shake(layer)
    assert x.numel() == 0 or not torch.allclose(layer(x).to(expected), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_formula_and_its_gradients(kind: str, double: bool, bias: bool) -> None:
    settings = {} if kind == "int8" else {"compress_statistics": double}
    _, layer = pair(kind, bias, **settings)
    shake(layer)
    if bias:
        layer.bias.requires_grad_()
    W = dequantized(layer, torch.float32)
    values = [layer.lora.A, layer.lora.B, *([layer.bias] if bias else [])]
    A, B, *b = (value.detach().clone().requires_grad_() for value in values)
    x = torch.randn(3, 5, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected = F.linear(y, W, *b) + 2.5 * y @ A.T @ B.T
    out = layer(x)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(3, 5, 96)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for value, reference in zip(values, (A, B, *b), strict=True):
        torch.testing.assert_close(value.grad, reference.grad, **NEAR)
    torch.testing.assert_close(layer.delta_weight(), 2.5 * layer.lora.B @ layer.lora.A)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_weight_is_near_the_plain_one(kind: str) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 96)
    W = dequantized(quantized(plain, kind), torch.float32)
    error = (W - plain.weight).norm() / plain.weight.norm()
    assert 0 < error < (0.01 if kind == "int8" else 0.15)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapted", ["0", "1"])
def test_training_goes_on_after_an_evaluation(kind: str, bias: bool, adapted: str) -> None:
    """On a CPU with AVX512-BF16 a layer that is left to itself is repacked by its first
    evaluation, and then raises (with a bias) or loses its input's gradient, adapted or not.
    """
    torch.manual_seed(0)
    layers = [quantized(nn.Linear(64, 64, bias=bias), kind) for _ in range(2)]
    model = nn.Sequential(*layers, nn.Linear(64, 3))
    for layer in layers:
        # Whatever this CPU has: then the repacked layout would be used, not only chosen.
        layer.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    inject_lora(model, r=2, alpha=6, target_modules=[adapted])
    shake(model)
    packed = [any_bits(layer.weight) for layer in layers]
    x = torch.randn(5, 64, requires_grad=True)
    model.train()(x).sum().backward()
    assert x.grad is not None
    first, x.grad = x.grad, None
    with torch.no_grad():
        model.eval()(x.detach())
    model.train()(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, first)
    assert all(torch.equal(any_bits(la.weight), p) for la, p in zip(layers, packed, strict=True))
    remove_lora(model)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16"
)
def test_a_base_that_was_evaluated_before_it_is_adapted() -> None:
    layer = quantized(nn.Linear(64, 64), "nf4", compress_statistics=False)
    model = nn.Sequential(layer, nn.Linear(64, 3))
    x = torch.randn(5, 64)
    before = dequantized(layer, torch.float32)
    with torch.no_grad():
        model.eval()(x)
    assert layer.weight.quant_state.packing_format_for_cpu
    inject_lora(model, r=2, alpha=6, target_modules=["0"])
    # The scales have been rounded to bfloat16 by then.
    torch.testing.assert_close(dequantized(layer, torch.float32), before, rtol=0.01, atol=0)
    x.requires_grad_()
    model.train()(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind: str) -> None:
    _, layer = pair(kind)
    shake(layer)
    layer.lora.dropout = 0.25
    x = torch.randn(400, 64)
    expected = layer.eval()(x)
    layer.train()
    assert not torch.allclose(layer(x), expected)
    # An elementwise mean over draws tends to the output without dropout.
    mean = torch.stack([layer(x).detach() for _ in range(200)]).mean(0)
    base = F.linear(x, dequantized(layer, torch.float32), layer.bias)
    assert (mean - expected).norm() < 0.1 * (expected - base).norm()
    x.requires_grad_()
    layer(x).sum().backward()
    assert bool(x.grad.isfinite().all()) and layer.lora.A.grad is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_gradient_checkpointing(kind: str, use_reentrant: bool, autocast: bool) -> None:
    model = quantized_mlp(kind)
    inject_lora(model, r=2, alpha=6, dropout=0.2, target_modules=["fc1", "fc2"])
    shake(model)
    x = torch.randn(4, 64, requires_grad=True)

    def grads(checkpointed: bool) -> list[Tensor | None]:
        model.zero_grad()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            run = partial(checkpoint, model, use_reentrant=use_reentrant) if checkpointed else model
            out = run(x)
        out.float().square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    expected = [g.clone() for g in grads(False) if g is not None]
    actual = [g for g in grads(True) if g is not None]
    assert len(actual) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_input_is_kept_for_backward(kind: str) -> None:
    _, layer = pair(kind)
    shake(layer)
    x = torch.randn(512, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    assert sum(kept.values()) == x.numel() + 4 * 512 + layer.lora.A.numel() + layer.lora.B.numel()
    out.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")]
)
def test_factors_are_never_quantized_or_rounded(kind: str, convert: Any) -> None:
    model = quantized_mlp(kind)
    inject_lora(model, r=2, alpha=6, target_modules=["fc1", "fc2"])
    shake(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
    packed = any_bits(model.fc1.weight)
    convert(model)
    for name, value in before.items():
        parameter = model.get_parameter(name)
        assert type(parameter) is nn.Parameter and parameter.dtype == torch.float32
        assert torch.equal(parameter, value)
    assert torch.equal(any_bits(model.fc1.weight), packed)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_stay_plain_where_the_base_is_quantized_by_a_later_move(kind: str) -> None:
    plain, model = plain_mlp(), plain_mlp()
    layer: Any = (
        bitsandbytes.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
        if kind == "int8"
        else bitsandbytes.nn.Linear4bit(64, 96, quant_type=kind)
    )
    layer.load_state_dict(plain.fc1.state_dict())
    model.fc1 = layer
    plan = inject_lora(model, r=2, alpha=6, target_modules=["fc1"])
    assert plan.base_parameters == sum(p.numel() for p in plain.parameters())
    model.to("cpu")
    assert model.fc1.weight.dtype in (torch.uint8, torch.int8)
    assert model.fc1.lora.A.dtype == model.fc1.lora.B.dtype == torch.float32
    shake(model)
    model(torch.randn(2, 64)).sum().backward()
    assert model.fc1.lora.A.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_what_is_packed_as_if_it_were_not(kind: str) -> None:
    plain, model = plain_mlp(), quantized_mlp(kind)
    expected = inject_lora(plain, r=2, alpha=6)
    plan = inject_lora(model, r=2, alpha=6)
    assert plan.base_parameters == expected.base_parameters
    assert [t.name for t in plan.targets] == [t.name for t in expected.targets]
    assert plan.trainable_parameters == expected.trainable_parameters


@pytest.mark.parametrize("kind", KINDS)
def test_removal_gives_the_very_base_back(kind: str) -> None:
    model = quantized_mlp(kind)
    objects = dict(model.named_parameters())
    packed = {n: any_bits(p) for n, p in objects.items()}
    classes = [type(m) for m in model]
    inject_lora(model, r=2, alpha=6)
    shake(model)
    with torch.no_grad():
        model(torch.randn(2, 64))
    remove_lora(model)
    assert [type(m) for m in model] == classes
    assert list(objects) == [n for n, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert parameter is objects[name]
        assert torch.equal(any_bits(parameter), packed[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(kind: str, duplicate: Any) -> None:
    model = quantized_mlp(kind)
    inject_lora(model, r=2, alpha=6, target_modules=["fc1", "fc2"])
    shake(model)
    x = torch.randn(2, 64)
    # int8 layers cannot be copied once they have run: bitsandbytes moves their scales away.
    again = duplicate(model)
    assert type(again.fc1) is type(model.fc1)
    torch.testing.assert_close(again(x), model(x))


def test_a_base_of_8_bits_whose_weights_are_to_train() -> None:
    model = plain_mlp()
    model.fc1 = bitsandbytes.nn.Linear8bitLt(64, 96)
    with pytest.raises(TargetError, match="has_fp16_weights=False"):
        inject_lora(model, r=2, alpha=6, target_modules=["fc1"])


def test_a_quantized_layer_cannot_train_whole() -> None:
    model = quantized_mlp("nf4")
    with pytest.raises(TargetError, match=r"'fc2' is quantized.*llm_int8_skip_modules"):
        inject_lora(model, r=2, alpha=6, target_modules=["fc1"], modules_to_save=["fc2"])


@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_peft(kind: str) -> None:
    model, reference = quantized_mlp(kind), quantized_mlp(kind)
    # PEFT knows a quantized model by its Hugging Face flags.
    reference.is_loaded_in_8bit = kind == "int8"
    reference.is_loaded_in_4bit = kind != "int8"
    for layer in (reference.fc1, reference.fc2):
        layer.support_avx512bf16_for_cpu = False
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["fc1", "fc2"])
    theirs = peft.get_peft_model(reference, config).base_model.model
    inject_lora(model, r=4, alpha=10, target_modules=["fc1", "fc2"])
    shake(model)
    for name in ("fc1", "fc2"):
        ours, their = getattr(model, name), getattr(theirs, name)
        assert isinstance(their, nn.Module) and "bnb" in type(their).__module__
        with torch.no_grad():
            their.lora_A["default"].weight.copy_(ours.lora.A)
            their.lora_B["default"].weight.copy_(ours.lora.B)
    x = torch.randn(7, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = model(x), theirs(y)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, **NEAR)
    for name in ("fc1", "fc2"):
        ours, their = getattr(model, name), getattr(theirs, name)
        torch.testing.assert_close(ours.lora.A.grad, their.lora_A["default"].weight.grad, **NEAR)
        torch.testing.assert_close(ours.lora.B.grad, their.lora_B["default"].weight.grad, **NEAR)


def test_bitsandbytes_is_not_imported_before_a_model_brings_it() -> None:
    code = (
        "import sys; from torch import nn; import lightning_lora as l;"
        "m = nn.Sequential(nn.Linear(4, 4)); l.inject_lora(m, r=2); l.merge_lora(m);"
        "l.remove_lora(m); sys.exit('bitsandbytes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
