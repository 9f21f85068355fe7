from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    active_adapter,
    adapter_per_row,
    add_adapter,
    inject_lora,
    merge_lora,
    save_adapter,
    set_adapter,
)
from lightning_lora.errors import ConfigError
from lightning_lora.layers import LoRALayer
from tests.models import AttentionNet, assert_same, hugging_face, mlp, shake, snapshot
from tests.quantized import KINDS, quantized_mlp

peft = pytest.importorskip("peft")
NAMES = ["one", "__base__", "two", "one", "two"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, (1, 3), groups=2)
        self.conv3 = nn.Conv3d(6, 6, (1, 1, 2))
        self.fc = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.embed(ids).transpose(1, 2)).tanh()
        x = self.conv3(self.conv2(x[:, :, None]).tanh()[:, :, None])[:, :, 0, 0]
        out: Tensor = self.fc(x.transpose(1, 2))
        return out


def ids(vocabulary: int = 20) -> Tensor:
    return torch.randint(0, vocabulary, (5, 10), generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Any, Any, list[Any]]] = {
    "net": (Net, ids, [["embed", "conv1", "fc"], ["conv1", "conv2", "conv3", "fc"]]),
    "mlp": (mlp, lambda: torch.randn(5, 6), [["fc1", "fc2"], ["fc2", "head"]]),
    "llama": (lambda: hugging_face("llama"), ids, [["q_proj", "down_proj"], ["q_proj", "o_proj"]]),
    "gpt2": (lambda: hugging_face("gpt2"), ids, ["qv", ["c_fc", "wte"]]),
    "gemma3": (lambda: hugging_face("gemma3"), ids, [["embed_tokens", "q_proj"], ["v_proj"]]),
    "falcon": (lambda: hugging_face("falcon"), ids, [["query_key_value"], ["dense"]]),
    **{
        kind: (
            lambda kind=kind: quantized_mlp(kind),
            lambda: torch.randn(5, 64),
            [["fc1", "fc2"], ["fc2", "head"]],
        )
        for kind in KINDS
    },
}


def with_two(make: Any, targets: list[Any], **settings: Any) -> nn.Module:
    model: nn.Module = make().train()
    for seed, (name, wanted) in enumerate(zip(("one", "two"), targets, strict=True)):
        add_adapter(model, name, r=2 + seed, alpha=7, target_modules=wanted, **settings)
        set_adapter(model, name)
        shake(model, seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def run(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("kind", MODELS)
def test_each_row_is_as_if_it_ran_alone(kind: str) -> None:
    make, inputs, targets = MODELS[kind]
    torch.manual_seed(0)
    model, x = with_two(make, targets), inputs()
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    with torch.no_grad():
        with adapter_per_row(model, NAMES):
            assert active_adapter(model) is None
            together = run(model, x)
        assert active_adapter(model) == "two"
        assert [type(m) for m in model.modules()] == classes
        assert_same(before, snapshot(model))
        for name in ("one", "__base__", "two"):
            set_adapter(model, name)
            rows = [row for row, own in enumerate(NAMES) if own == name]
            # int8 rounds activations by the largest of the batch.
            tolerance = 0.05 if kind == "int8" else 1e-4
            alone = run(model, x[rows])
            torch.testing.assert_close(together[rows], alone, rtol=tolerance, atol=tolerance)
            set_adapter(model, None)
            if name != "__base__":
                assert not torch.allclose(run(model, x[rows]), alone, atol=0.05)


@pytest.mark.parametrize("kind", ["mlp", "net", "nf4"])
def test_gradients_reach_the_factors_of_each_row(kind: str) -> None:
    make, inputs, targets = MODELS[kind]
    torch.manual_seed(0)
    model, x = with_two(make, targets), inputs()
    factors = {}
    for name in ("one", "two"):
        set_adapter(model, name)
        factors[name] = [p for p in model.parameters() if p.requires_grad]
        assert len(factors[name]) == 2 * len(
            [m for m in model.modules() if isinstance(m, LoRALayer)]
        )
    with adapter_per_row(model, NAMES):
        assert len([p for p in model.parameters() if p.requires_grad]) == sum(
            map(len, factors.values())
        )
        run(model, x).square().sum().backward()
    found = {name: [p.grad.clone() for p in own] for name, own in factors.items()}
    for name, own in factors.items():
        set_adapter(model, name)
        for parameter in own:
            parameter.grad = None
        rows = [row for row, each in enumerate(NAMES) if each == name]
        run(model, x[rows]).square().sum().backward()
        for grad, parameter in zip(found[name], own, strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-3)


def test_as_peft_runs_a_mixed_batch(tmp_path: Path) -> None:
    model = with_two(lambda: hugging_face("llama"), [["q_proj", "down_proj"], ["q_proj", "v_proj"]])
    model.eval()
    theirs = None
    for name in ("one", "two"):
        set_adapter(model, name)
        folder = save_adapter(model, tmp_path / name)
        if theirs is None:
            base = hugging_face("llama")
            theirs = peft.PeftModel.from_pretrained(base, folder, adapter_name=name)
        else:
            theirs.load_adapter(folder, adapter_name=name)
    with torch.no_grad(), adapter_per_row(model, NAMES):
        expected = theirs.eval()(input_ids=ids(), adapter_names=NAMES).logits
        found = model(input_ids=ids()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_generation_with_an_adapter_per_row() -> None:
    model: Any = with_two(lambda: hugging_face("llama"), [["q_proj"], ["down_proj"]]).eval()
    options: dict[str, Any] = {
        "min_new_tokens": 5,
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
    }
    with adapter_per_row(model, NAMES):
        together = model.generate(ids(40), **options)
    for row, name in enumerate(NAMES):
        set_adapter(model, name)
        assert torch.equal(model.generate(ids(40)[row : row + 1], **options)[0], together[row])


def test_beams_need_a_name_each() -> None:
    model: Any = with_two(lambda: hugging_face("llama"), [["q_proj"], ["down_proj"]]).eval()
    options: dict[str, Any] = {
        "min_new_tokens": 5,
        "max_new_tokens": 5,
        "do_sample": False,
        "num_beams": 2,
        "pad_token_id": 0,
    }
    with (
        adapter_per_row(model, NAMES),
        pytest.raises(ConfigError, match=r"names 5 rows, .* has 10 .*num_beams .* multiplies"),
    ):
        model.generate(ids(40), **options)
    with adapter_per_row(model, [name for name in NAMES for _ in range(2)]):
        together = model.generate(ids(40), **options)
    for row, name in enumerate(NAMES):
        set_adapter(model, name)
        assert torch.equal(model.generate(ids(40)[row : row + 1], **options)[0], together[row])


def test_dropout_is_that_of_training() -> None:
    model = with_two(mlp, [["fc1"], ["fc2"]], dropout=0.5)
    x = torch.randn(5, 6)
    with adapter_per_row(model, NAMES):
        torch.manual_seed(0)
        first, second = model(x), model(x)
        assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])
        model.eval()
        assert torch.equal(model(x), model(x))


def test_mistakes() -> None:
    model = with_two(mlp, [["fc1"], ["fc2"]])
    x = torch.randn(4, 6)
    with (
        pytest.raises(ConfigError, match=r"names 5 rows, and the input of 'fc1' has 4"),
        adapter_per_row(model, NAMES),
    ):
        model(x)
    assert active_adapter(model) == "two"
    with pytest.raises(ConfigError, match="no adapter 'three'"), adapter_per_row(model, ["three"]):
        pass
    with adapter_per_row(model, ["one"]), pytest.raises(ConfigError, match="no adapter of its own"):
        merge_lora(model)
    with adapter_per_row(model, ["one"]), pytest.raises(ConfigError, match="no adapter of its own"):
        set_adapter(model, "one")
    active = model(x)
    with adapter_per_row(model, ["__base__"] * 4):
        assert torch.equal(model(x), mlp()(x)) and not torch.equal(model(x), active)
    assert torch.equal(model(x), active)
    settings: dict[str, Any] = {"r": 2, "alpha": 6, "target_modules": ["fc1"]}
    add_adapter(model, "scaled", use_dora=True, **settings)
    add_adapter(model, "biased", bias="all", **settings)
    embedding = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    add_adapter(embedding, "rows", target_modules=["1"], trainable_token_indices=[1])
    with (
        pytest.raises(ConfigError, match=r"trains rows of embeddings \(trainable_token_indices"),
        adapter_per_row(embedding, ["rows"]),
    ):
        pass
    for name, why in {"scaled": "has magnitudes", "biased": "trains base parameters"}.items():
        with pytest.raises(ConfigError, match=why), adapter_per_row(model, [name]):
            pass
    merge_lora(model)
    for name in ("one", "__base__"):
        with pytest.raises(ConfigError, match="model is merged"), adapter_per_row(model, [name]):
            pass
    attention = AttentionNet()
    inject_lora(attention, r=2, alpha=6, target_modules=["attention"])
    with (
        pytest.raises(ConfigError, match="adapts 'attention', whose weights are read"),
        adapter_per_row(attention, ["default"]),
    ):
        pass
