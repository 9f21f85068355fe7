"""Factors that start from the principal components of the layers' inputs (EVA)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, initialize_from_inputs, inject_lora, load_adapter
from lightning_lora.errors import ConfigError
from lightning_lora.initialization.inputs import Components
from tests.models import assert_same, hugging_face, shake, snapshot
from tests.modules import Classifier, PlainClassifier, dataset, make_lora, make_trainer

IDS = torch.randint(3, 40, (6, 12), generator=torch.Generator().manual_seed(0))


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("lora.A")}


def overlap(first: Tensor, second: Tensor) -> float:
    """The smallest cosine of the angles between two subspaces with orthonormal rows."""
    return float(torch.linalg.svdvals(first @ second.t()).min())


def test_components_are_those_of_all_vectors_together() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator) * torch.linspace(4, 0.1, 12) + 3
    whole = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:4]
    one, first, second = Components(12), Components(12), Components(12)
    for batch in x.split(30):
        one.add(batch)
    first.add(x[:70])
    second.add(x[70:])
    first.join(second)
    first.join(Components(12))
    for found in (one, first):
        assert found.count == 200
        torch.testing.assert_close(found.mean, x.mean(0))
        directions = found.leading(4)
        torch.testing.assert_close(directions @ directions.t(), torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close((directions * whole).sum(1).abs(), torch.ones(4))
    torch.testing.assert_close(one.leading(4), first.leading(4), atol=1e-4, rtol=0)


def test_many_wide_vectors_are_sketched() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 200, generator=generator) * 0.9 ** torch.arange(200)
    found = Components(16)
    for batch in x.split(100):
        found.add(batch)
    best = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:6]
    assert overlap(found.leading(6), best) > 0.99


def test_peft_finds_the_same_components() -> None:
    peft = pytest.importorskip("peft")
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    batch["attention_mask"][0, 7:] = 0
    batch["labels"] = IDS.clone()
    batch["labels"][1, :5] = -100
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(hugging_face("llama"), config)
    peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    ours = hugging_face("llama")
    inject_lora(ours, r=4, init="eva", target_modules=["q_proj", "v_proj", "down_proj"])
    expected = ours(**batch).logits
    initialize_from_inputs(ours, [batch], lambda b: ours(**b))
    torch.testing.assert_close(ours(**batch).logits, expected, atol=0, rtol=0)
    found = factors(ours)
    assert len(found) == 6
    for name, A in found.items():
        layer = theirs.base_model.model.get_submodule(name.removesuffix(".lora.A"))
        other = layer.lora_A.default.weight
        torch.testing.assert_close((A * other).sum(1).abs(), torch.ones(4), atol=1e-3, rtol=0)


def test_layers_side_by_side_get_the_same() -> None:
    model = hugging_face("llama").train()
    modes = {name: module.training for name, module in model.named_modules()}
    inject_lora(model, r=4, init="eva", rank_pattern={"k_proj": 2})
    initialize_from_inputs(model, IDS.split(2), lambda ids: model(input_ids=ids))
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    assert torch.equal(attention.q_proj.lora.A, attention.v_proj.lora.A)
    assert attention.k_proj.lora.A.shape[0] == 2
    torch.testing.assert_close(
        attention.k_proj.lora.A, attention.q_proj.lora.A[:2], atol=1e-4, rtol=0
    )
    other: Any = model.get_submodule("model.layers.1.self_attn")
    assert overlap(attention.q_proj.lora.A, other.q_proj.lora.A) < 0.99
    assert all(model.get_submodule(name).training == mode for name, mode in modes.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_parts_of_a_fused_projection_get_the_same() -> None:
    model = hugging_face("gpt2")
    inject_lora(model, r=2, init="eva", target_modules="qv")
    initialize_from_inputs(model, [IDS], lambda ids: model(input_ids=ids))
    for A in factors(model).values():
        first, second = A.chunk(2)
        assert torch.equal(first, second)
        torch.testing.assert_close(first @ first.t(), torch.eye(2), atol=1e-5, rtol=0)


def test_layers_that_are_called_by_keyword() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    net: Any = Net()
    inject_lora(net, r=2, init="eva")
    initialize_from_inputs(net, [torch.randn(8, 6)], net)
    A = net.fc.lora.A.detach()
    torch.testing.assert_close(A @ A.t(), torch.eye(2), atol=1e-5, rtol=0)


def test_what_cannot_be_is_said() -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    inject_lora(net, r=4, init="eva")
    with pytest.raises(ConfigError, match=r"0 \(r=4, 1 directions\).*init_batches"):
        initialize_from_inputs(net, [torch.randn(2, 6)], net)
    with pytest.raises(ConfigError, match=r"0 \(r=4, 0 directions\)"):
        initialize_from_inputs(net, [torch.full((8, 6), 0.1)], net)
    with pytest.raises(ConfigError, match="inputs of '0' hold NaN or infinite values"):
        initialize_from_inputs(net, [torch.full((8, 6), torch.nan)], net)
    with pytest.warns(UserWarning, match="never reached 0"):
        initialize_from_inputs(net, [], net)
    shake(net)
    with pytest.raises(ConfigError, match="some of B is not zero"):
        initialize_from_inputs(net, [torch.randn(8, 6)], net)
    with pytest.raises(ConfigError, match="init_batches must be a whole number of at least 1"):
        LoRACallback(init_batches=0)


class Watched(PlainClassifier):
    """Keeps the factors it starts from and counts its steps."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.start: dict[str, Tensor] = {}
        self.steps = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("seen", 1.0)
        loss = super().training_step(batch, batch_idx)
        self.steps += 1
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not self.start:
            self.start = factors(self)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(), batch_size=8, shuffle=True)


def test_the_callback_starts_from_the_first_batches(tmp_path: Path) -> None:
    seed_everything(1)
    model = Watched(dropout=0.1)
    make_trainer(tmp_path, make_lora(init="eva", init_batches=8), max_epochs=1).fit(model)
    # The whole of the data in eight batches: the same components whatever the order.
    other = PlainClassifier()
    inject_lora(other, r=4, alpha=12, init="eva")
    initialize_from_inputs(other, [dataset()[:][0]], other)
    for name, A in factors(other).items():
        assert overlap(A, model.start[name]) > 0.999
    # The fit itself saw neither more steps nor more batches, and the same dropout.
    assert model.steps == len(model.losses) == 8
    assert "log" not in vars(model) and not any(m._forward_hooks for m in model.modules())
    seed_everything(1)
    plain = Watched(dropout=0.1)
    make_trainer(tmp_path / "plain", make_lora(), max_epochs=1).fit(plain)
    assert plain.losses[0] == model.losses[0] and plain.losses != model.losses
    assert not any(map(torch.equal, plain.start.values(), model.start.values()))


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, workers: dict[str, Any]) -> None:
    class WithWorkers(PlainClassifier):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(dataset(), batch_size=8, shuffle=True, **workers)

    fits = {}
    for name, path in (("whole", None), ("resumed", tmp_path / "whole" / "epoch=0.ckpt")):
        seed_everything(3)
        fits[name] = WithWorkers("mlp", dropout=0.1)
        trainer = make_trainer(tmp_path / name, make_lora(init="eva"), max_epochs=3)
        trainer.checkpoint_callback.save_top_k = -1  # type: ignore[union-attr]
        trainer.fit(fits[name], ckpt_path=None if path is None else str(path))
    assert_same(snapshot(fits["whole"]), snapshot(fits["resumed"]))


def test_a_second_fit_goes_on_from_the_first(tmp_path: Path) -> None:
    model = Watched()
    lora = make_lora(init="eva")
    make_trainer(tmp_path, lora, max_epochs=1).fit(model)
    model.start = {}
    make_trainer(tmp_path / "again", lora, max_epochs=1).fit(model)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(A, checkpoint[name]) for name, A in model.start.items())
    load_adapter(fresh := PlainClassifier(), tmp_path / "last.ckpt")
    assert all(torch.equal(A, checkpoint[name]) for name, A in factors(fresh).items())


def test_manual_optimization_and_sharding_are_refused(tmp_path: Path) -> None:
    manual = PlainClassifier()
    manual.automatic_optimization = False
    with pytest.raises(ConfigError, match="optimizes manually"):
        make_trainer(tmp_path, make_lora(init="eva")).fit(manual)
    # As the message says.
    before = PlainClassifier()
    inject_lora(before, make_lora(init="eva").config)
    initialize_from_inputs(before, [dataset()[:][0]], before)
    start = factors(before)
    before.training_step = lambda batch, batch_idx: None  # type: ignore[method-assign, assignment]
    before.automatic_optimization = False
    make_trainer(tmp_path / "manual", make_lora(init="eva"), max_epochs=1).fit(before)
    assert_same(start, factors(before))
    trainer = make_trainer(tmp_path, make_lora(init="eva"), strategy="fsdp2")
    with pytest.raises(ConfigError, match="this strategy shards it"):
        trainer.fit(PlainClassifier())
    # Not where nothing starts.
    make_trainer(tmp_path, make_lora(init="eva"), max_epochs=1).fit(PlainClassifier())
    last = str(tmp_path / "last.ckpt")
    make_trainer(tmp_path, make_lora(init="eva"), strategy="fsdp2").test(
        PlainClassifier(), ckpt_path=last, verbose=False
    )


def test_models_with_layers_of_their_own_and_a_network(tmp_path: Path) -> None:
    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__("attention")
            self.extra = nn.ModuleList([nn.Linear(3, 3)])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.extra[0](self.net(x))
            return out

    model = Two()
    lora = make_lora(init="eva", exclude_modules=["out_proj"], target_modules=["linear1", "0"], r=2)
    make_trainer(tmp_path, lora, max_epochs=1, precision="bf16-mixed").fit(model)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name for name in state if "extra" in name} == {"extra.0.lora.A", "extra.0.lora.B"}
