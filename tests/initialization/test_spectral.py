"""Factors that start from the principal part of the weight (PiSSA, OLoRA)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from lightning_lora import (
    adapter_state_dict,
    inject_lora,
    load_adapter,
    load_lightning_module,
    merge_lora,
    remove_lora,
    save_adapter,
    swap_adapter,
    unmerge_lora,
)
from lightning_lora.adapters import read_adapter
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.initialization.spectral import sketched_factors
from lightning_lora.layers import LoRAFactors, LoRALayer, register_layer
from lightning_lora.metadata import base_fingerprint
from tests.models import assert_same, hugging_face, snapshot
from tests.modules import PlainClassifier, base_network, make_lora, make_trainer
from tests.quantized import quantized_mlp

IDS = torch.arange(2, 22).reshape(2, 10)
INITS = ["pissa", "olora"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": "qv"},
    "bert": {"target_modules": "all-linear", "use_rslora": True},
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def lively(name: str) -> nn.Module:
    """A model whose outputs depend on what is in its middle."""
    model = hugging_face(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def train_a_little(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                shift = torch.randn(parameter.shape, generator=generator)
                parameter.add_(shift, alpha=0.05 if "lora" in name else 0.02)


@pytest.mark.parametrize("init", [*INITS, "pissa_niter_8"])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_starts_as_it_was_and_the_base_stays(name: str, init: str) -> None:
    model = hugging_face(name)
    before, expected = snapshot(model), logits(model)
    inject_lora(other := hugging_face(name), r=4, alpha=12)
    inject_lora(model, r=4, alpha=12, init=init, **MODELS[name])
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    for module in model.modules():
        if isinstance(module, LoRAFactors):
            assert module.A.any() and module.B.any()
            assert module.A.requires_grad and not module.A_init.requires_grad
    assert base_fingerprint(model) == base_fingerprint(other)
    train_a_little(model)
    trained = logits(model)
    assert not torch.allclose(trained, expected, atol=1e-3)
    merge_lora(model)
    torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=1e-4)
    unmerge_lora(model)
    torch.testing.assert_close(logits(model), trained)
    trained_in_place = {"classifier.weight", "classifier.bias"}
    remove_lora(model)
    for key, tensor in snapshot(model).items():
        if key not in trained_in_place:
            assert torch.equal(tensor, before[key]), key
    assert list(snapshot(model)) == list(before)


def test_the_start_is_the_best_approximation() -> None:
    model = hugging_face("llama")
    plan = inject_lora(model, r=4, alpha=12, init="pissa")
    for target in plan.targets:
        layer: Any = model.get_submodule(target.name)
        left = layer.weight - 3 * layer.lora.B @ layer.lora.A
        best = torch.linalg.svdvals(layer.weight)[4:].norm()
        torch.testing.assert_close(left.norm(), best, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.lora.A.norm(), layer.lora.B.norm())


def test_a_sketch_comes_near_and_is_the_same_each_time() -> None:
    W = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    A, B = sketched_factors(W, 3, 2.0, 16)
    left, best = (W - 2.0 * B @ A).norm(), torch.linalg.svdvals(W)[3:].norm()
    assert best <= left < 1.01 * best
    state = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        inject_lora(model := hugging_face("llama"), r=2, alpha=6, init="pissa_niter_2", seed=5)
        state.append(adapter_state_dict(model))
    assert_same(*state)


def test_ranks_beyond_the_weight_leave_the_rest_empty() -> None:
    for init in INITS:
        net = nn.Sequential(nn.Linear(3, 5))
        x = torch.randn(2, 3)
        expected = net(x)
        inject_lora(net, r=4, alpha=8, init=init)
        torch.testing.assert_close(net(x), expected)
        assert not net[0].lora.A[3].any() and not net[0].lora.B[:, 3].any()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_starts_alike_trains_alike_and_converts_to_the_same(
    rslora: bool, init: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    name, targets = "llama", ["q_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, init_lora_weights=init, use_rslora=rslora
    )
    theirs = peft.get_peft_model(lively(name), config)
    theirs.save_pretrained(tmp_path / "start")
    ours = lively(name)
    settings: dict[str, Any] = {"target_modules": targets, "modules_to_save": None}
    inject_lora(ours, r=4, alpha=12, init=init, use_rslora=rslora, **settings)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(5):
            optimizer.zero_grad()
            model.eval()(input_ids=IDS).logits.square().sum(-1).mean().backward()
            optimizer.step()
    expected = logits(theirs)
    assert (expected - logits(lively(name))).abs().max() > 0.05
    torch.testing.assert_close(logits(ours), expected, atol=2e-5, rtol=1e-4)

    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    save_adapter(ours, tmp_path / "ours")
    # Both are right on the original base, to PEFT and here.
    for folder in ("theirs", "ours"):
        loaded = peft.PeftModel.from_pretrained(lively(name), tmp_path / folder)
        torch.testing.assert_close(logits(loaded), expected, atol=2e-5, rtol=1e-4)
        plan = load_adapter(other := lively(name), tmp_path / folder)
        assert {target.r for target in plan.targets} == {8}
        torch.testing.assert_close(logits(other), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_an_adapter_that_peft_did_not_convert_loads_too(init: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=init
    )
    theirs = peft.get_peft_model(lively("llama"), config)
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs)
    load_adapter(ours := lively("llama"), tmp_path)
    torch.testing.assert_close(logits(ours), expected, atol=1e-4, rtol=1e-3)
    assert (expected - logits(lively("llama"))).abs().max() > 0.05
    # Another adapter of the kind takes its place.
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-3)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values["init_lora_weights"] = "corda"
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"belongs to a base that .*'corda' changed"):
        load_adapter(lively("llama"), tmp_path)


def test_parts_of_a_fused_projection_are_exported_right(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = hugging_face("gpt2")
    inject_lora(model, r=2, alpha=6, init="pissa", target_modules="qv")
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(hugging_face("gpt2"), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(model), logits(hugging_face("gpt2")), atol=1e-3)


@pytest.mark.parametrize("init", INITS)
def test_life_cycle(tmp_path: Path, init: str) -> None:
    seed_everything(1)
    model = PlainClassifier("attention", dropout=0.0)
    lora = make_lora(init=init, export_dir=str(tmp_path / "out"))
    trainer = make_trainer(tmp_path, lora)
    first = trainer.validate(model, verbose=False)[0]["val_loss"]
    bare = make_trainer(tmp_path / "bare").validate(PlainClassifier("attention"), verbose=False)
    assert first == pytest.approx(bare[0]["val_loss"], abs=1e-5)
    trainer.fit(model)
    assert sum(model.losses[-8:]) < sum(model.losses[:8])
    after = trainer.test(model, verbose=False)[0]["test_loss"]
    assert after != pytest.approx(first, abs=1e-3)
    last = str(tmp_path / "last.ckpt")
    again = trainer.test(model, ckpt_path=last, verbose=False)[0]["test_loss"]
    assert again == pytest.approx(after, abs=1e-6)
    seed_everything(2)
    fresh = make_trainer(tmp_path / "other", make_lora(init=init))
    elsewhere = fresh.test(PlainClassifier("attention"), ckpt_path=last, verbose=False)
    assert elsewhere[0]["test_loss"] == pytest.approx(after, abs=1e-6)
    x = torch.randn(4, 5, 16)
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(load_lightning_module(PlainClassifier, last)(x), expected)
        for source in (last, tmp_path / "out/adapter"):
            net = PlainClassifier("attention").eval()
            load_adapter(net, source)
            torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-4)
    # Read without a model, the update is that on the original base.
    found = read_adapter(last)
    base = {f"net.{k}": v for k, v in base_network("attention", 0.0).state_dict().items()}
    assert found.factors and not found.left_out
    for factors in found.factors.values():
        merged = model.state_dict()[factors.weight]
        delta = factors.scaling * factors.B @ factors.A
        torch.testing.assert_close(merged - base[factors.weight], delta, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, init: str) -> None:
    fits = {}
    for name, path in (("whole", None), ("resumed", tmp_path / "whole" / "epoch=0.ckpt")):
        seed_everything(3)
        fits[name] = PlainClassifier("mlp", dropout=0.1)
        lora = make_lora(init=init, dropout=0.1)
        trainer = make_trainer(tmp_path / name, lora, max_epochs=3)
        trainer.checkpoint_callback.save_top_k = -1  # type: ignore[union-attr]
        trainer.fit(fits[name], ckpt_path=None if path is None else str(path))
    assert_same(snapshot(fits["whole"]), snapshot(fits["resumed"]))


def test_another_initialisation_and_another_base_are_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, make_lora(init="pissa"), max_epochs=1).fit(PlainClassifier("mlp"))
    last = str(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="init: 'pissa' in the checkpoint, 'kaiming' now"):
        make_trainer(tmp_path / "a", make_lora()).fit(PlainClassifier("mlp"), ckpt_path=last)
    other = PlainClassifier("mlp")
    with torch.no_grad():
        other.net[0].weight.mul_(2)
    with pytest.raises(CheckpointError, match="another base model"):
        make_trainer(tmp_path / "b", make_lora(init="pissa")).fit(other, ckpt_path=last)


def test_adapters_of_both_kinds_take_turns(tmp_path: Path) -> None:
    model = hugging_face("llama")
    inject_lora(model, r=2, alpha=6, init="pissa")
    train_a_little(model)
    save_adapter(model, tmp_path / "pissa")
    expected = logits(model)
    plain = hugging_face("llama")
    inject_lora(plain, r=4, alpha=6)
    train_a_little(plain)
    save_adapter(plain, tmp_path / "plain")
    merge_lora(model)
    swap_adapter(model, tmp_path / "plain")
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-4)
    swap_adapter(model, tmp_path / "pissa")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_half_precision_keeps_the_start_as_masters() -> None:
    model = hugging_face("llama")
    inject_lora(model, r=4, alpha=12, init="pissa")
    before = snapshot(model)
    model.to(torch.bfloat16)
    for name, tensor in snapshot(model).items():
        if ".lora." in name:
            assert torch.equal(tensor, before[name])
    torch.testing.assert_close(
        logits(model).float(), logits(hugging_face("llama")), atol=0.05, rtol=0.05
    )
    assert copy.deepcopy(model).model.layers[0].mlp.up_proj.lora.A_init.dtype == torch.float32


def test_a_quantized_base_stays_quantized() -> None:
    model, x = quantized_mlp("nf4"), torch.linspace(-1, 1, 128).reshape(2, 64)
    with torch.no_grad():
        expected = model(x)
        inject_lora(model, r=4, alpha=12, init="pissa", target_modules=["fc1", "fc2"])
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-3)
        train_a_little(model)
        trained = model(x)
        assert not torch.allclose(trained, expected, atol=1e-3)
        merge_lora(model)
        torch.testing.assert_close(model(x), trained, atol=1e-4, rtol=1e-3)
        unmerge_lora(model)
        assert torch.equal(model(x), trained)


@pytest.mark.parametrize("init", [*INITS, "orthogonal", "eva"])
def test_layers_that_are_no_matrices_are_refused(init: str) -> None:
    model = hugging_face("bert")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=r"word_embeddings \(Embedding\).*exclude_modules"):
        inject_lora(model, r=2, init=init, target_modules=["word_embeddings", "query"])
    assert before == {name: type(module) for name, module in model.named_modules()}
    net = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"0 \(Conv1d\)"):
        inject_lora(net, r=2, init=init, target_modules=["0", "1"])


@pytest.mark.parametrize("init", INITS)
def test_layers_of_ones_own_say_how_their_weight_lies(init: str) -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    class LoRATransposed(LoRALayer, Transposed):
        base_class = Transposed

        @classmethod
        def factor_shapes(cls, module: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
            return (r, 6), (4, r)

        def forward(self, x: Tensor) -> Tensor:
            return self.lora(self.updated, x)  # type: ignore[no-any-return]

        def updated(self, x: Tensor, A: Tensor, B: Tensor, scaling: float, _: float) -> Tensor:
            return super().forward(x) + scaling * x @ A.t() @ B.t()

        def delta_weight(self) -> Tensor:
            A, B = self.lora.pair()
            return self.lora.scaling * (B @ A).t()

    register_layer(LoRATransposed)
    with pytest.raises(ConfigError, match=r"'0' \(6, 4\) does not fit .*Set out_dim of LoRATr"):
        inject_lora(nn.Sequential(Transposed()), r=2, alpha=6, init=init)
    LoRATransposed.out_dim = 1
    net, x = nn.Sequential(Transposed()), torch.randn(3, 6)
    expected = net(x)
    inject_lora(net, r=2, alpha=6, init=init)
    assert net[0].lora.B.any()  # type: ignore[union-attr]
    torch.testing.assert_close(net(x), expected)


def test_weights_that_are_not_there_are_asked_for() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="not loaded yet"):
        inject_lora(net, r=2, init="pissa")
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("init", ["pissa_niter_0", "pissa_niter_", "pisa", "pissa-4"])
def test_wrong_names_are_refused(init: str) -> None:
    with pytest.raises(ConfigError, match=f"init must be one of .*got {init!r}"):
        inject_lora(nn.Linear(2, 2), init=init)
