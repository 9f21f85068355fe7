"""A step metered without memory holds what the same step holds on real tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_lora import functional, inject_lora, scratch
from lightning_lora.kernels import kernels_of
from lightning_lora.metering import LiveStorages, StepMemory, fake_model, meter_step
from tests.models import TiedHead, hugging_face

ROWS, TOKENS = 3, 8
MODELS = ("bert", "llama", "gpt2", "roberta", "opt")


@pytest.fixture(autouse=True)
def no_memory_from_earlier_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_scratch", lambda like, dtype: None)


def _model(name: str, device: str, lora: float | None, checkpointing: bool) -> nn.Module:
    reference: Any = hugging_face(name)
    with torch.device(device):
        model = type(reference)(reference.config)
    if lora is not None:
        inject_lora(model, r=4, alpha=8, dropout=lora)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _loss(model: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    shape = (ROWS, TOKENS)
    inputs = {
        "input_ids": torch.ones(shape, dtype=torch.long),
        "attention_mask": (torch.arange(TOKENS) < TOKENS - 1).long().repeat(ROWS, 1),
    }
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        outputs = model(**inputs)
        first: Tensor = outputs["start_logits" if "start_logits" in outputs else "logits"]
        return (first.float() ** 2).mean()


def _real(name: str, *settings: Any, dtype: torch.dtype | None = None) -> StepMemory:
    model = _model(name, "cpu", *settings)
    return meter_step(model, lambda: _loss(model, dtype))


def _fake(name: str, *settings: Any, dtype: torch.dtype | None = None) -> StepMemory:
    model = _model(name, "meta", *settings)
    with fake_model(model, "cpu"):
        return meter_step(model, lambda: _loss(model, dtype))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, 0.0])
@pytest.mark.parametrize("name", MODELS)
def test_fake_tensors_hold_what_real_ones_do(
    name: str, lora: float | None, checkpointing: bool
) -> None:
    assert _fake(name, lora, checkpointing) == _real(name, lora, checkpointing)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("lora", [None, 0.0])
def test_autocast_copies_the_same_weights(name: str, lora: float | None) -> None:
    settings = (name, lora, False)
    fake, real = (meter(*settings, dtype=torch.bfloat16) for meter in (_fake, _real))
    assert fake == real
    assert fake != _fake(*settings)


def test_checkpointing_and_lora_change_what_is_held() -> None:
    plain = _fake("llama", None, False)
    assert _fake("llama", None, True).activations < plain.activations
    lora = _fake("llama", 0.0, False)
    assert lora.gradients < plain.gradients
    assert lora.backward_with_gradients < plain.backward_with_gradients


def test_the_dropout_of_adapters_is_drawn_as_on_the_device() -> None:
    """Positions on a CPU; a byte an element on a GPU."""
    assert _fake("llama", 0.1, False).activations == _real("llama", 0.1, False).activations
    held = []
    for dropout in (0.0, 0.1):
        model = _model("llama", "meta", dropout, False)
        with fake_model(model, "cuda"):
            held.append(meter_step(model, lambda model=model: _loss(model)).activations)
    layers, hidden, inner = 2, 16, 24
    inputs = 4 * hidden + 2 * hidden + inner  # of q, k, v and o, of gate and up, of down
    assert held[1] - held[0] == layers * ROWS * TOKENS * inputs


def test_peaks_agree_with_pytorch_s_tracker() -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    model = _model("bert", "cpu", None, False)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        _loss(model).backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    states = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    found = _fake("bert", None, False)
    predicted = states + max(found.forward, found.backward_with_gradients)
    assert predicted == pytest.approx(peak, rel=0.02)


def test_a_storage_counts_once_and_until_its_last_view_is_gone() -> None:
    weight = torch.ones(10)
    with LiveStorages([weight]) as storages:
        doubled = weight * 2
        view = doubled[:5].view(5, 1)
        weight.add_(1)
        assert (storages.live, storages.peak) == (40, 40)
        del doubled
        assert storages.live == 40
        view = view + 1
        assert (storages.live, storages.peak) == (20, 60)
        storages.reset_peak()
        assert storages.peak == 20


def test_the_model_comes_back_as_it_was() -> None:
    with torch.device("meta"):
        model = TiedHead()
    before = dict(model.named_parameters(remove_duplicate=False))
    with fake_model(model, "cpu"):
        assert model.head.weight is model.embedding.weight
        assert not model.head.weight.is_meta
        found = meter_step(model, lambda: model(torch.zeros(2, 3, dtype=torch.long)).sum())
    assert found.gradients == 4 * sum(p.numel() for p in model.parameters())
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before)
    assert all(parameter.grad is None for parameter in after.values())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_functions_come_back_after_an_error(device: str) -> None:
    names = ("scaled_dot_product_attention", "dropout", "layer_norm", "softmax")
    before = [getattr(F, name) for name in names], functional.draw_dropped
    with pytest.raises(RuntimeError, match="on the way"), kernels_of(device):
        assert F.scaled_dot_product_attention is not before[0][0]
        raise RuntimeError("on the way")
    assert ([getattr(F, name) for name in names], functional.draw_dropped) == before


def _attention_bytes(device: str, dropout: float) -> int:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, device="meta"))

        def forward(self) -> Tensor:
            query = torch.zeros(1, 2, 64, 4) * self.weight
            return F.scaled_dot_product_attention(query, query, query, dropout_p=dropout).sum()

    model = Attention()
    with fake_model(model, device):
        return meter_step(model, model).activations


def test_only_dropout_on_a_cpu_keeps_the_attention_matrix() -> None:
    matrix = 2 * 64 * 64 * 4
    assert _attention_bytes("cpu", 0.1) > matrix
    for device, dropout in (("cpu", 0.0), ("cuda", 0.0), ("cuda", 0.1)):
        assert _attention_bytes(device, dropout) < matrix


def test_a_gpt_s_layers_keep_what_korthikanti_counts() -> None:
    """34 s b h a layer (arXiv:2205.05198, equation 1 without the attention matrix), in bf16."""
    from transformers import GPT2Config, GPT2Model

    rows, tokens, hidden = 2, 64, 256
    held = []
    for layers in (2, 3):
        config = GPT2Config(
            n_embd=hidden, n_layer=layers, n_head=4, vocab_size=40, activation_function="gelu"
        )
        with torch.device("meta"):
            model = GPT2Model(config).to(torch.bfloat16).train()
        ids = (rows, tokens)
        with fake_model(model, "cuda"):
            step = meter_step(
                model,
                lambda model=model, ids=ids: model(
                    torch.zeros(ids, dtype=torch.long), use_cache=False
                ).last_hidden_state.sum(),
            )
        held.append(step.activations)
    assert held[1] - held[0] == pytest.approx(34 * rows * tokens * hidden, rel=0.05)
