from __future__ import annotations

import copy
import pickle
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    adapter_state_dict,
    inject_lora,
    load_adapter,
    load_adapter_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.adapters import read_adapter
from lightning_lora.dora import dora_linear, weight_norm
from lightning_lora.errors import CheckpointError, ConfigError, TargetError
from lightning_lora.inspection import diff_adapters, inspect_adapter
from lightning_lora.layers import LoRAFactors, LoRALayer
from lightning_lora.study import make_study
from tests.models import AttentionNet, TiedLinears, assert_same, hugging_face, mlp, shake, snapshot
from tests.modules import Classifier, PlainClassifier, make_lora, make_trainer
from tests.quantized import KINDS, quantized_mlp

peft = pytest.importorskip("peft")


def stir(model: nn.Module) -> None:
    """As `shake`, and magnitudes that differ from the norms."""
    shake(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRAFactors) and module.magnitude is not None:
                module.magnitude *= 1 + 0.3 * torch.randn(
                    module.magnitude.shape, generator=generator, dtype=module.magnitude.dtype
                )


def one(layer: nn.Module, **settings: Any) -> nn.Sequential:
    model = nn.Sequential(layer)
    inject_lora(model, r=4, alpha=10, use_dora=True, target_modules=["0"], **settings)
    return model


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 12, bias=bias, dtype=dtype)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = Conv1D(12, 16)
    nn.init.normal_(layer.bias)
    return layer


LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (linear, lambda: torch.randn(3, 5, 16)),
    "no bias": (lambda: linear(bias=False), lambda: torch.randn(3, 5, 16)),
    "Conv1D": (conv1d, lambda: torch.randn(3, 5, 16)),
    "embedding": (lambda: nn.Embedding(20, 12, padding_idx=3), lambda: torch.arange(20)[None]),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False), lambda: torch.randn(2, 4, 9, 9)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3)), lambda: torch.randn(2, 4, 4, 5, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 9, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_at_first_the_output_is_bitwise_that_of_the_base(
    kind: str, dtype: torch.dtype, dropout: float
) -> None:
    make, inputs = LAYERS[kind]
    torch.manual_seed(0)
    plain, x = make().to(dtype).requires_grad_(False), inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    expected = plain(x)
    model = one(copy.deepcopy(plain), dropout=dropout)
    out = model(x)
    assert out.dtype == expected.dtype and torch.equal(out, expected)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), expected)
    assert model[0].lora.magnitude.dtype == torch.float32
    stir(model)
    assert not torch.allclose(model(x), expected, atol=0.05)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_unmerged_and_not_the_base(kind: str, dtype: torch.dtype) -> None:
    make, inputs = LAYERS[kind]
    torch.manual_seed(0)
    plain, x = make().to(dtype).requires_grad_(False), inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    model = one(copy.deepcopy(plain)).eval()
    stir(model)
    base, tolerance = snapshot(model), 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        before = model(x)
        merge_lora(model)
        torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(before, plain(x), atol=0.1)
        assert type(model[0]) is type(plain) and list(model[0].state_dict()) == list(
            plain.state_dict()
        )
    unmerge_lora(model)
    assert_same(base, snapshot(model))
    remove_lora(model)
    assert type(model[0]) is type(plain)
    assert_same(snapshot(plain), snapshot(model[0]))


def test_the_formula() -> None:
    plain = linear(torch.float64)
    model = one(copy.deepcopy(plain))
    stir(model)
    lora, x = model[0].lora, torch.randn(7, 16, dtype=torch.float64)
    assert lora.magnitude.dtype == torch.float64
    V = plain.weight + 2.5 * lora.B @ lora.A
    W = lora.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model(x), F.linear(x, W, plain.bias))
    merge_lora(model)
    torch.testing.assert_close(model[0].weight, W.detach(), check_stride=False)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_treat_the_norm_as_a_constant(dropout: float, bias: bool) -> None:
    torch.manual_seed(0)
    x, W = torch.randn(9, 16, dtype=torch.float64), torch.randn(12, 16, dtype=torch.float64)
    A, B = torch.randn(4, 16, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    b, m = torch.randn(12, dtype=torch.float64), torch.rand(12, dtype=torch.float64) + 0.5
    leaves = [t.requires_grad_() for t in ((x, A, B, m, b) if bias else (x, A, B, m))]
    grads = []
    # A weight that trains takes the way through ordinary operations.
    for weight in (W, W.clone().requires_grad_()):
        torch.manual_seed(1)
        out = dora_linear(x, weight, b if bias else None, A, B, m, 2.5, dropout)
        grads.append(torch.autograd.grad(out.sin().sum(), leaves))
    torch.testing.assert_close(*grads)
    norm = (W + 2.5 * B @ A).norm(dim=1).detach()
    if dropout == 0:
        V = W + 2.5 * B @ A
        out = F.linear(x, (m / norm)[:, None] * V, b if bias else None)
        torch.testing.assert_close(grads[0], torch.autograd.grad(out.sin().sum(), leaves))


@pytest.mark.parametrize("kind", ["table", "Conv2d", "Conv3d", "groups"])
def test_gradients_of_other_layers_treat_the_norm_as_a_constant(kind: str) -> None:
    table = lambda: nn.Embedding(20, 12), LAYERS["embedding"][1]
    make, inputs = {**LAYERS, "table": table}[kind]
    torch.manual_seed(0)
    model, x = one(make()).double(), inputs()
    x = x.double() if x.is_floating_point() else x
    stir(model)
    layer, leaves = model[0], list(model[0].lora.parameters())
    found = torch.autograd.grad(model(x).sin().sum(), leaves)
    weight = (layer.weight + layer.delta_weight()) * layer.merge_scale(layer.weight)
    values = dict(layer.named_parameters(recurse=False)) | {"weight": weight}
    out = torch.func.functional_call(make().double(), values, (x,))
    torch.testing.assert_close(found, torch.autograd.grad(out.sin().sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_the_whole_weight_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    W = torch.randn(300, 64).to(dtype)
    A, B = torch.randn(4, 64), torch.randn(300, 4)
    expected = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
    found = weight_norm(W, A, B, 0.7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)


def test_large_weights_are_measured_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    W, A, B = torch.randn(30, 64).bfloat16(), torch.randn(4, 64), torch.randn(30, 4)
    whole = weight_norm(W, A, B, 0.7)
    monkeypatch.setattr("lightning_lora.dora._BLOCK", 500)
    torch.testing.assert_close(weight_norm(W, A, B, 0.7), whole, rtol=1e-6, atol=0)


def test_a_row_of_zeros_has_no_direction() -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight[2] = 0
    expected = copy.deepcopy(layer)(torch.ones(1, 16))
    model = one(layer)
    out = model(torch.ones(1, 16))
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in model[0].lora.parameters())
    merge_lora(model)
    assert model[0].weight.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_quantized_layers(kind: str, dropout: float) -> None:
    torch.manual_seed(0)
    base = quantized_mlp(kind)
    x = torch.randn(6, 64)
    expected = base(x)
    model = copy.deepcopy(base)
    inject_lora(model, r=4, alpha=10, use_dora=True, dropout=dropout, target_modules=["fc1", "fc2"])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    stir(model)
    inputs = x.clone().requires_grad_()
    model(inputs).square().sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        before = model(x)
        merge_lora(model)
        # Activations are rounded on the way into int8.
        tolerance = 0.05 if kind == "int8" else 1e-3
        torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(before, expected, atol=0.2)
        unmerge_lora(model)
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_a_quantized_layer_computes_as_a_plain_one_with_its_weight() -> None:
    torch.manual_seed(0)
    model = quantized_mlp("nf4")
    inject_lora(model, r=4, alpha=10, use_dora=True, target_modules=["fc1"])
    stir(model)
    layer, lora = model.fc1, model.fc1.lora
    plain = nn.Linear(64, 96)
    plain.weight.data, plain.bias.data = layer.base_weight(torch.float32), layer.bias.data
    other = nn.Sequential(plain)
    inject_lora(other, r=4, alpha=10, use_dora=True, target_modules=["0"])
    other[0].lora.load_state_dict(lora.state_dict())
    x = torch.randn(5, 64, requires_grad=True)
    results = []
    for each in (layer, other[0]):
        out = each(x)
        results.append((out, *torch.autograd.grad(out.sin().sum(), [x, *each.lora.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_state_of_an_adapter(tmp_path: Path) -> None:
    model = mlp()
    plan = inject_lora(model, r=2, alpha=6, use_dora=True, target_modules=["fc1", "fc2"])
    assert plan.lora_parameters == 2 * (6 + 10) + 10 + 2 * (10 + 8) + 8
    assert plan.trainable_parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    stir(model)
    state = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    leaves = [
        f"{layer}.lora.{leaf}" for layer in ("fc1", "fc2") for leaf in ("A", "B", "magnitude")
    ]
    assert list(state) == leaves
    again = mlp()
    inject_lora(again, r=2, alpha=6, use_dora=True, target_modules=["fc1", "fc2"])
    with pytest.raises(CheckpointError, match=r"missing: fc1\.lora\.magnitude"):
        load_adapter_state_dict(again, {k: v for k, v in state.items() if k != leaves[2]})
    load_adapter_state_dict(again, state)
    x = torch.randn(3, 6)
    assert torch.equal(again(x), model(x))
    with torch.no_grad():
        again.fc1.lora.magnitude[0] = float("nan")
    with pytest.raises(ConfigError, match=r"fc1\.lora\.magnitude holds NaN"):
        merge_lora(again)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("bias", [True, False])
def test_second_derivatives(dropout: float, bias: bool) -> None:
    model = one(linear(torch.float64, bias), dropout=dropout)
    stir(model)
    layer: Any = model[0]
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    wanted = (layer.lora.A, layer.lora.B, layer.lora.magnitude)

    def found(train_weight: bool) -> list[Tensor]:
        # A weight that trains runs in ordinary operations.
        layer.weight.requires_grad_(train_weight)
        torch.manual_seed(3)
        out = model(x).square().sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), wanted))

    for actual, expected in zip(found(False), found(True), strict=True):
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(actual, expected)


def test_second_derivatives_through_a_quantized_base_are_refused() -> None:
    model = quantized_mlp("nf4")
    inject_lora(model, r=2, alpha=6, use_dora=True)
    x = torch.randn(3, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="No second derivative through DoRA on a quantized"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_batched_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5))
    inject_lora(model, r=2, alpha=6, use_dora=True)
    shake(model)
    x = torch.randn(3, 4)
    found, expected = (
        torch.autograd.functional.jacobian(model, x, vectorize=vectorize)
        for vectorize in (True, False)
    )
    torch.testing.assert_close(found, expected)


def test_transforms_of_torch_func() -> None:
    model = one(linear(torch.float64))
    stir(model)
    x = torch.randn(5, 16, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    loss({}, x).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(each[name].sum(0), parameter.grad)


def test_what_has_no_magnitude_is_refused() -> None:
    model = AttentionNet()
    plan = inject_lora(model, r=2, alpha=6, use_dora=True)
    assert any("MultiheadAttention" in why for _, why in plan.skipped)
    assert not any(
        "attention" in target.name or "self_attn" in target.name for target in plan.targets
    )
    with pytest.raises(TargetError, match="DoRA is not available for MultiheadAttention"):
        inject_lora(AttentionNet(), use_dora=True, target_modules=["attention"])
    with pytest.raises(TargetError, match="use_dora: target_modules='qv' adapts parts"):
        inject_lora(hugging_face("gpt2"), use_dora=True, target_modules="qv")
    with pytest.raises(TargetError, match="DoRA is not available for MixtralExperts"):
        inject_lora(hugging_face("mixtral"), use_dora=True, target_modules=["experts"])


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = mlp()
    inject_lora(model, r=2, alpha=6, use_dora=True)
    stir(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6)
    compiled(x).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(grads, [p.grad for p in model.parameters() if p.grad is not None])


def test_outputs_may_be_changed_in_place() -> None:
    model = one(linear())
    stir(model)
    x = torch.randn(3, 16)
    plain = model(x).relu().sum()
    expected = torch.autograd.grad(plain, model[0].lora.magnitude)
    changed = torch.relu_(model(x)).sum()
    torch.testing.assert_close(torch.autograd.grad(changed, model[0].lora.magnitude), expected)


def peft_model(model: nn.Module, **settings: Any) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=10, use_dora=True, **settings)
    theirs = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise)
    return theirs.eval()


class Net(nn.Module):
    """Every kind of layer that PEFT gives magnitudes to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.embed(ids).transpose(1, 2)).tanh()
        x = self.conv2(x[:, :, None]).tanh()[:, :, 0]
        out: Tensor = self.fc(x.transpose(1, 2))
        return out


IDS = torch.arange(20).reshape(2, 10)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, Tensor) else out.logits


TARGETS = {
    "net": (Net, ["embed", "conv1", "conv2", "fc"]),
    "gpt2": (lambda: hugging_face("gpt2"), ["c_attn", "c_fc"]),
    "llama": (lambda: hugging_face("llama"), ["q_proj", "down_proj", "embed_tokens"]),
    "falcon": (lambda: hugging_face("falcon"), ["query_key_value", "dense"]),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_we_load_what_peft_writes(tmp_path: Path, kind: str) -> None:
    make, targets = TARGETS[kind]
    theirs = peft_model(make(), target_modules=targets)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = make().eval()
    base = run(model)
    plan = load_adapter(model, tmp_path / "adapter")
    assert all(target.dora for target in plan.targets)
    torch.testing.assert_close(run(model), run(theirs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(model), base, atol=1e-2)
    merge_lora(model)
    torch.testing.assert_close(run(model), run(theirs.merge_and_unload()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", TARGETS)
def test_peft_loads_what_we_write(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file

    make, targets = TARGETS[kind]
    model = make().eval()
    inject_lora(model, r=4, alpha=10, use_dora=True, target_modules=targets)
    stir(model)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    torch.testing.assert_close(run(model), run(theirs), rtol=1e-4, atol=1e-5)
    ours = load_file(tmp_path / "adapter/adapter_model.safetensors")
    saved = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in saved.items()}
    assert sum("lora_magnitude_vector" in key for key in ours) == len(
        [m for m in model.modules() if isinstance(m, LoRALayer)]
    )


def test_grouped_convolutions_are_not_exported(tmp_path: Path) -> None:
    model = one(nn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(CheckpointError, match="PEFT has no DoRA for grouped convolutions"):
        save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("layer", ["linear", "Conv1d"])
def test_training_is_that_of_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float, layer: str
) -> None:
    make, inputs = LAYERS[layer]
    base = nn.Sequential(make())
    theirs = peft_model(copy.deepcopy(base), target_modules=["0"], lora_dropout=dropout)
    theirs.save_pretrained(tmp_path / "adapter")
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "adapter")
    x = inputs()
    mask = torch.rand(x.shape) < dropout
    monkeypatch.setattr("lightning_lora.dora.draw_dropped", lambda x, p: mask.reshape(x.shape))
    monkeypatch.setattr("lightning_lora.layers.conv.draw_dropped", lambda x, p: mask)
    monkeypatch.setattr(
        nn.Dropout, "forward", lambda self, x: x.masked_fill(mask, 0) / (1 - self.p)
    )
    model.train()
    theirs.train()
    results = []
    for each in (model, theirs):
        out = each(x)
        out.square().sum().backward()
        gradients = {
            n: p.grad.reshape(-1) for n, p in each.named_parameters() if p.grad is not None
        }
        results.append((out, list(gradients.values())))
    (out, ours), (expected, wanted) = results
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert len(ours) == len(wanted) == 3
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


def test_half_precision_is_about_as_accurate_as_peft(tmp_path: Path) -> None:
    base, targets = hugging_face("llama").bfloat16(), ["q_proj", "v_proj", "up_proj", "down_proj"]
    theirs = peft_model(copy.deepcopy(base), target_modules=targets)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, exact = copy.deepcopy(base), copy.deepcopy(base).double()
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (8, 32))
    results = []
    for each in (ours, theirs, exact):
        if each is not theirs:
            load_adapter(each, tmp_path / "adapter")
        out = each(input_ids=ids, labels=ids)
        out.loss.backward()
        grads = [p.grad.double().flatten() for p in each.parameters() if p.grad is not None]
        results.append([out.logits.detach().double().flatten(), *grads])
    errors = [
        [float((a - b).norm() / b.norm()) for a, b in zip(found, results[2], strict=True)]
        for found in results[:2]
    ]
    # PEFT computes the factors' products in float32, which takes longer.
    assert len(errors[0]) == 25 and errors[0][0] < 1.3 * errors[1][0]
    assert statistics.median(errors[0][1:]) < 1.6 * statistics.median(errors[1][1:])


def test_an_analysis_says_that_it_is_about_the_direction(tmp_path: Path) -> None:
    adapters = {}
    for label, factor in (("first", 1.0), ("second", 1.5)):
        model = mlp()
        inject_lora(model, r=2, alpha=6, use_dora=True, seed=1, target_modules=["fc1", "fc2"])
        stir(model)
        with torch.no_grad():
            model.fc1.lora.magnitude *= factor
        adapters[label] = read_adapter(save_adapter(model, tmp_path / label))
    found = inspect_adapter(adapters["first"])
    assert found["parameters"] == {"factors": plan_size(model), "trained_whole": 0}
    assert [row["name"] for row in found["other_tensors"]] == [
        "fc1.lora.magnitude",
        "fc2.lora.magnitude",
    ]
    difference = diff_adapters(adapters["first"], adapters["second"])
    assert not difference["identical"] and all(
        row["difference_norm"] == 0 for row in difference["layers"]
    )
    study = make_study(adapters)
    for notes in (found["notes"], difference["notes"], study.notes):
        assert sum("the update of the direction alone" in note for note in notes) == 1
    assert len(study.spectra["first"]) == 2


def plan_size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def fit(root: Path, epochs: int, resume: Path | None = None) -> Classifier:
        seed_everything(3, verbose=False)
        module, lora = PlainClassifier(), make_lora(use_dora=True, dropout=0.1)
        make_trainer(root, lora, max_epochs=epochs).fit(module, ckpt_path=resume)
        return module

    whole = fit(tmp_path / "whole", 3)
    fit(tmp_path / "half", 1)
    resumed = fit(tmp_path / "resumed", 3, tmp_path / "half/last.ckpt")
    assert resumed.losses == whole.losses[-len(resumed.losses) :] and len(resumed.losses) == 16
    assert_same(adapter_state_dict(whole), adapter_state_dict(resumed))
    saved = torch.load(tmp_path / "whole/last.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(adapter_state_dict(whole))
    first = PlainClassifier()
    inject_lora(first, r=4, alpha=12, use_dora=True, dropout=0.1)
    for name, tensor in adapter_state_dict(first).items():
        assert not torch.equal(tensor, saved["state_dict"][name]), name
    with pytest.raises(CheckpointError, match="use_dora: True in the checkpoint, False now"):
        make_trainer(tmp_path / "other", make_lora(dropout=0.1)).fit(
            PlainClassifier(), ckpt_path=tmp_path / "whole/last.ckpt"
        )


def test_tied_layers_share_a_magnitude() -> None:
    torch.manual_seed(0)
    model, x = TiedLinears().eval(), torch.randn(4, 6)
    expected = model(x)
    inject_lora(model, r=2, alpha=6, use_dora=True)
    assert torch.equal(model(x), expected) and model.first.lora is model.second.lora
    stir(model)
    base, before = snapshot(model), model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    assert_same(base, snapshot(model))


def test_magnitudes_are_measured_on_the_quantized_weight() -> None:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4")
    with pytest.raises(TargetError, match="measured on the quantized one: move the model first"):
        inject_lora(nn.Sequential(layer), use_dora=True, target_modules=["0"])
    model = quantized_mlp("nf4")
    inject_lora(model, use_dora=True, target_modules=["fc1"])
    expected = model.fc1.base_weight(torch.float32).norm(dim=1)
    torch.testing.assert_close(model.fc1.lora.magnitude.detach(), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(autocast: bool, dropout: float) -> None:
    model = mlp()
    inject_lora(model, r=2, alpha=6, use_dora=True, dropout=dropout)
    stir(model)
    x, grads = torch.randn(4, 6, requires_grad=True), []
    for run_model in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run_model(x)
        out.float().square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == 9
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_autocast_is_near_to_full_precision() -> None:
    model = one(nn.Linear(64, 48))
    stir(model)
    x = torch.randn(20, 64)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 0.01 * exact.norm()
    (out.float() - exact).square().sum().backward()
    assert model[0].lora.magnitude.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies(duplicate: Any) -> None:
    model = mlp()
    inject_lora(model, r=2, alpha=6, use_dora=True)
    stir(model)
    twin, x = duplicate(model), torch.randn(3, 6)
    expected = model(x)
    stir(model)
    assert torch.equal(twin(x), expected) and not torch.equal(model(x), expected)
    twin = twin.bfloat16()
    assert twin.fc1.lora.magnitude.dtype == torch.float32 and twin.fc1.weight.dtype != torch.float32


def test_a_scaled_embedding_scales_its_magnitudes_too(tmp_path: Path) -> None:
    model = hugging_face("gemma3")
    inject_lora(model, r=4, alpha=10, use_dora=True, target_modules=["embed_tokens"])
    stir(model)
    layer, ids = model.model.embed_tokens, torch.arange(2, 9)[None]
    assert layer.embed_scale != 1
    with torch.no_grad():
        found = layer(ids)
        weight = (layer.weight + layer.delta_weight()) * layer.merge_scale(layer.weight)
        torch.testing.assert_close(found, weight[ids] * layer.embed_scale)
        base = run(hugging_face("gemma3"))
    theirs = peft.PeftModel.from_pretrained(
        hugging_face("gemma3"), save_adapter(model, tmp_path / "adapter")
    )
    torch.testing.assert_close(run(model), run(theirs.eval()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(model), base, atol=1e-2)
