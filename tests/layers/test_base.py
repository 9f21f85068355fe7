from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import inject_lora, merge_lora, unmerge_lora
from lightning_lora.errors import TargetError
from lightning_lora.layers import (
    LoRALayer,
    LoRALinear,
    adapted_class,
    base,
    register_layer,
    supported_layers,
)
from tests.models import assert_same, shake, snapshot


class Renamed(nn.Linear):
    """A user's subclass that keeps the forward of its base."""

    def extra_repr(self) -> str:
        return "mine"


class Doubling(nn.Linear):
    """A user's subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class LoRADoubling(LoRALinear, Doubling):
    base_class = Doubling

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    monkeypatch.setattr(base, "_DERIVED", dict(base._DERIVED))
    yield


def adapted(layer: type[nn.Module] = Renamed) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(layer(6, 4), nn.Tanh(), layer(4, 4))  # type: ignore[call-arg]
    inject_lora(model, r=2, alpha=5)
    shake(model)
    return model


def test_classes_that_can_be_adapted() -> None:
    assert adapted_class(nn.Linear) is LoRALinear
    assert adapted_class(Doubling) is None
    assert adapted_class(nn.ReLU) is None
    assert adapted_class(LoRALinear) is None
    known = {
        "torch.nn.modules.linear.Linear",
        "transformers.pytorch_utils.Conv1D",
        "bitsandbytes.nn.modules.Linear4bit",
        "bitsandbytes.nn.modules.Linear8bitLt",
    }
    assert known <= set(supported_layers())


def test_a_subclass_keeps_what_it_is() -> None:
    cls = adapted_class(Renamed)
    assert cls is not None
    assert cls is adapted_class(Renamed), "one class, however often it is asked for"
    assert issubclass(cls, Renamed) and issubclass(cls, LoRALinear)
    assert cls.base_class is Renamed
    layer = adapted()[0]
    assert type(layer) is cls
    assert layer.extra_repr() == "mine"
    x = torch.randn(3, 6)
    expected = nn.functional.linear(x, layer.weight + layer.delta_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.usefixtures("registry")
def test_a_layer_class_of_ones_own() -> None:
    assert register_layer(LoRADoubling) is LoRADoubling
    model = adapted(Doubling)
    x = torch.randn(3, 6)
    before = model(x)
    merge_lora(model)
    assert type(model[0]) is Doubling
    torch.testing.assert_close(model(x), before)
    unmerge_lora(model)
    assert torch.equal(model(x), before)
    assert "tests.layers.test_base.Doubling" in supported_layers()


@pytest.mark.usefixtures("registry")
def test_the_example_of_the_documents() -> None:
    page = (Path(__file__).parents[2] / "docs/layers.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n((?:(?!```).)*LoRAScaled.*?)```", page, re.DOTALL)
    before, after = example.split("merge_lora(model)\n")
    names: dict[str, Any] = {}
    exec(before, names)
    model, x = names["model"], torch.randn(3, 8)
    base = 0.5 * nn.functional.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model(x), base)
    shake(model)
    adapted = model(x)
    weight = model[0].weight + model[0].delta_weight()
    torch.testing.assert_close(adapted, 0.5 * nn.functional.linear(x, weight, model[0].bias))
    names["merge_lora"](model)
    assert type(model[0]) is names["Scaled"] and not after
    torch.testing.assert_close(model(x), adapted)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "wrong",
    [
        type("NoBase", (LoRALayer,), {}),
        type("NotDerived", (LoRALayer,), {"base_class": nn.Linear}),
        type("NotALayer", (nn.Linear,), {"base_class": nn.Linear}),
    ],
)
def test_a_class_that_cannot_be_swapped_in_is_refused(wrong: type[LoRALayer]) -> None:
    with pytest.raises(TargetError, match=f"{wrong.__name__} must set base_class"):
        register_layer(wrong)
    assert adapted_class(nn.Linear) is LoRALinear


def through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("layer", [nn.Linear, Renamed])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_whole_and_independent(layer, merged, duplicate) -> None:  # type: ignore[no-untyped-def]
    model = adapted(layer)
    x = torch.randn(3, 6)
    base_tensors, expected = snapshot(model), model(x)
    if merged:
        merge_lora(model)
    twin = duplicate(model)
    before = snapshot(model)
    if merged:
        unmerge_lora(twin)
    assert [type(m) for m in twin] == [adapted_class(layer), nn.Tanh, adapted_class(layer)]
    assert_same(base_tensors, snapshot(twin))
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(before, snapshot(model))
    assert [p.requires_grad for p in twin.parameters()] == [False, False, True, True] * 2


def test_a_saved_model_is_read_by_a_fresh_process(tmp_path: Path) -> None:
    model = adapted()
    x = torch.randn(3, 6)
    saved = {"x": x, "out": model(x).detach(), "live": copy.deepcopy(model)}
    merge_lora(model)
    torch.save({**saved, "merged": model}, tmp_path / "models.pt")
    code = (
        "import torch; saved = torch.load('models.pt', weights_only=False)\n"
        "from lightning_lora import unmerge_lora; unmerge_lora(saved['merged'])\n"
        "for model in (saved['live'], saved['merged']):\n"
        "    print(torch.allclose(model(saved['x']), saved['out']), type(model[0]).__name__)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["True", "LoRARenamed"] * 2, done.stderr
