"""Quantized layers and paged 8-bit optimizers on a CUDA device."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from torch import nn

from lightning_lora import inject_lora, merge_lora, unmerge_lora
from lightning_lora.quantization import dequantized, quantized_layers
from tests.models import shake
from tests.modules import PlainClassifier, make_lora
from tests.quantized import KINDS, any_bits, quantized_mlp

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_formula_and_its_gradients(kind: str, dtype: torch.dtype) -> None:
    settings = {} if kind == "int8" else {"compute_dtype": dtype}
    model = quantized_mlp(kind, **settings).cuda()
    inject_lora(model, r=4, alpha=10, target_modules=["fc1"])
    shake(model)
    layer = model.fc1
    W = dequantized(layer, torch.float32)
    A, B = layer.lora.A.detach(), layer.lora.B.detach()
    x = torch.randn(7, 5, 64, device="cuda", dtype=dtype, requires_grad=True)
    y = x.detach().float().requires_grad_()
    out = layer(x)
    expected = F.linear(y, W, layer.bias.float()) + 2.5 * y @ A.T @ B.T
    assert out.dtype == dtype
    assert (out.float() - expected).norm() < 0.03 * expected.norm()
    out.float().sum().backward()
    expected.sum().backward()
    assert (x.grad.float() - y.grad).norm() < 0.03 * y.grad.norm()
    assert layer.lora.A.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_near_and_the_base_exact_again(kind: str) -> None:
    model = quantized_mlp(kind).cuda()
    inject_lora(model, r=2, alpha=6, target_modules=["fc1", "fc2"])
    shake(model)
    packed, x = any_bits(model.fc1.weight), torch.randn(4, 64, device="cuda")
    expected = model.train()(x)
    merge_lora(model)
    assert not quantized_layers(model) and type(model.fc1) is nn.Linear
    assert (model(x) - expected).norm() < 0.05 * expected.norm()
    model.cpu()
    unmerge_lora(model)
    assert torch.equal(any_bits(model.fc1.weight).cpu(), packed.cpu())


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "int8"])
def test_bitsandbytes_precision_as_lightning_gives_it(mode: str, tmp_path: object) -> None:
    plugin = BitsandbytesPrecision(
        mode,  # type: ignore[arg-type]
        dtype=torch.float16 if mode == "int8" else torch.bfloat16,
    )
    model = PlainClassifier()
    lora = make_lora(target_modules=["net.0", "net.3"])
    Trainer(
        accelerator="gpu",
        devices=1,
        plugins=[plugin],
        max_epochs=2,
        callbacks=[lora],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    ).fit(model)
    assert lora.merge_report is not None and len(lora.merge_report.errors) == 3
    assert all(loss == loss for loss in model.losses)


def test_a_paged_8_bit_optimizer() -> None:
    model = quantized_mlp("nf4").cuda()
    inject_lora(model, r=64, alpha=128, target_modules=["fc1", "fc2"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.PagedAdamW8bit(trained, lr=1e-3)
    x = torch.randn(16, 64, device="cuda")
    losses = []
    for _ in range(20):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert {s["state1"].dtype for s in optimizer.state.values()} == {torch.uint8}
