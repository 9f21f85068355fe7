from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    active_adapter,
    adapter_names,
    add_adapter,
    add_weighted_adapter,
    inject_lora,
    merge_lora,
    save_adapter,
    set_adapter,
    task_arithmetic,
    unmerge_lora,
)
from lightning_lora.errors import ConfigError
from lightning_lora.injection import require_injection
from lightning_lora.names import modules_by_name
from lightning_lora.task_arithmetic import combine
from tests.models import TiedLinears, hugging_face, mlp, shake

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(8, 6, (1, 3), padding=(0, 1))
        self.fc = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)[:, :, None]).tanh()[:, :, 0]
        out: Tensor = self.fc(x.transpose(1, 2))
        return out


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)


IDS = torch.arange(20).reshape(2, 10)
MODELS: dict[str, tuple[Any, list[str]]] = {
    "net": (Net, ["embed", "conv", "fc"]),
    "llama": (lambda: hugging_face("llama"), ["q_proj", "down_proj"]),
    "gpt2": (lambda: hugging_face("gpt2"), ["c_attn", "c_fc"]),
}


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, Tensor) else out.logits


def saved(folder: Path, make: Any, targets: list[str], ranks: dict[str, int]) -> None:
    for seed, (name, r) in enumerate(ranks.items()):
        model = make()
        inject_lora(model, r=r, alpha=7 + seed, target_modules=targets)
        shake(model, seed)
        save_adapter(model, folder / name)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.5, -0.6)])
def test_as_peft_combines(
    tmp_path: Path, kind: str, combination: str, weights: tuple[float, float]
) -> None:
    make, targets = MODELS[kind]
    ranks = {"one": 3, "two": 3 if combination == "linear" else 2}
    saved(tmp_path, make, targets, ranks)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", adapter_name="two")
    theirs.add_weighted_adapter(["one", "two"], list(weights), "both", combination, svd_rank=4)
    theirs.set_adapter("both")
    model = make().eval()
    for name in ranks:
        add_adapter(model, name, tmp_path / name)
    base = run(model)
    plan = add_weighted_adapter(
        model, ["one", "two"], list(weights), "both", combination, svd_rank=4
    )
    assert {target.r for target in plan.targets} == {{"linear": 3, "cat": 5, "svd": 4}[combination]}
    assert torch.equal(run(model), base)
    set_adapter(model, "both")
    torch.testing.assert_close(run(model), run(theirs.eval()), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(run(model), base, atol=1e-3)
    save_adapter(model, tmp_path / "both")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "both").eval()
    torch.testing.assert_close(run(again), run(model), rtol=1e-3, atol=1e-4)


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    set_adapter(model, name)
    modules = modules_by_name(model)
    found = {}
    for target in require_injection(model).plan.targets:
        layer: Any = modules[target.name]
        updates = layer.delta_weights().items()
        found |= {f"{target.name}.{leaf}": update.detach() for leaf, update in updates}
    return found


PRUNING = ["ties", "magnitude_prune", "dare_linear", "dare_ties"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("svd", [False, True])
@pytest.mark.parametrize("combination", PRUNING)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_as_peft_prunes_and_combines(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    svd: bool,
    combination: str,
    sign: str,
) -> None:
    # What DARE drops is drawn; here it drops what is negative.
    def positive(tensor: Tensor, density: float, **_: bool) -> Tensor:
        return tensor.clamp(min=0) / density

    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", positive)
    monkeypatch.setattr(task_arithmetic, "_some", positive)
    make, targets = MODELS[kind]
    ranks = {"one": 3, "two": 2 if svd else 3, "three": 3}
    saved(tmp_path, make, targets, ranks)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "one", adapter_name="one")
    model = make().eval()
    add_adapter(model, "one", tmp_path / "one")
    for name in ("two", "three"):
        theirs.load_adapter(tmp_path / name, adapter_name=name)
        add_adapter(model, name, tmp_path / name)
    name = f"{combination}_svd" if svd else combination
    weights = [0.7, -0.4, 1.2]
    options: dict[str, Any] = {"density": 0.6, "majority_sign_method": sign, "svd_rank": 4}
    theirs.add_weighted_adapter(list(ranks), weights, "all", name, **options)
    theirs.set_adapter("all")
    add_weighted_adapter(model, list(ranks), weights, "all", name, **options)
    set_adapter(model, "all")
    torch.testing.assert_close(run(model), run(theirs.eval()), rtol=1e-3, atol=1e-4)
    add_weighted_adapter(model, list(ranks), weights, "sum", "svd")
    set_adapter(model, "sum")
    assert not torch.allclose(run(model), run(theirs), atol=1e-2)


@pytest.mark.parametrize("combination", ["ties", "magnitude_prune"])
def test_a_wide_svd_is_what_the_updates_are_combined_into(combination: str) -> None:
    model = hugging_face("gpt2")
    for seed, name in enumerate(("one", "two")):
        add_adapter(model, name, r=2, alpha=6, target_modules="qv")
        set_adapter(model, name)
        shake(model, seed)
    add_weighted_adapter(
        model, ["one", "two"], [0.5, 2.0], "new", f"{combination}_svd", svd_rank=16, density=0.5
    )
    one, two = deltas(model, "one"), deltas(model, "two")
    for layer, update in deltas(model, "new").items():
        # Each part of the projection by itself: W_q and W_v, of a weight that is kept transposed.
        for columns in (slice(0, 16), slice(32, 48)):
            pair = [each[layer][:, columns] for each in (one, two)]
            expected = combine(combination, pair, [0.5, 2.0], 0.5, "total")
            torch.testing.assert_close(update[:, columns], expected, rtol=1e-4, atol=1e-4)
        assert not update[:, 16:32].any()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_cat_and_a_wide_svd_are_the_sum_on_any_layer(use_rslora: bool) -> None:
    gpt2 = hugging_face("gpt2")
    models: list[tuple[nn.Module, list[Any]]] = [
        (Grouped(), [["conv", "attention"]] * 2),
        (gpt2, ["qv"] * 2),
        (mlp(), [["fc1", "fc2"], ["fc2", "head"]]),
    ]
    for model, targets in models:
        for seed, (name, wanted) in enumerate(zip(("one", "two"), targets, strict=True)):
            settings = {"r": 2 + seed, "alpha": 7, "use_rslora": use_rslora}
            add_adapter(model, name, target_modules=wanted, **settings)
            set_adapter(model, name)
            shake(model, seed)
        add_weighted_adapter(model, ["one", "two", "one"], [0.5, -2.0, 0.25], "cat", "cat")
        add_weighted_adapter(model, ["one", "two"], [0.75, -2.0], "svd", svd_rank=5)
        add_weighted_adapter(model, ["one"], [0.75], "linear", "linear")
        one, two = deltas(model, "one"), deltas(model, "two")
        for name in ("cat", "svd"):
            found = deltas(model, name)
            assert found.keys() == one.keys() | two.keys()
            for layer, update in found.items():
                zero = torch.zeros_like(update)
                expected = 0.75 * one.get(layer, zero) - 2 * two.get(layer, zero)
                torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-4)
        for layer, update in deltas(model, "linear").items():
            torch.testing.assert_close(update, 0.75 * one[layer], rtol=1e-4, atol=1e-5)


def test_a_narrow_svd_is_the_best_approximation() -> None:
    model = mlp()
    for seed, name in enumerate(("one", "two")):
        add_adapter(model, name, r=3, alpha=7, target_modules=["fc1"])
        set_adapter(model, name)
        shake(model, seed)
    add_weighted_adapter(model, ["one", "two"], [1.0, 1.0], "svd", svd_rank=2)
    total = deltas(model, "one")["fc1.weight"] + deltas(model, "two")["fc1.weight"]
    U, S, Vh = torch.linalg.svd(total)
    best = U[:, :2] * S[:2] @ Vh[:2]
    torch.testing.assert_close(deltas(model, "svd")["fc1.weight"], best, rtol=1e-4, atol=1e-5)


def test_mistakes() -> None:
    model = mlp()
    settings: dict[str, Any] = {"alpha": 6, "target_modules": ["fc1"]}
    add_adapter(model, "one", r=2, **settings)
    add_adapter(model, "wide", r=3, **settings)
    add_adapter(model, "scaled", r=2, use_dora=True, **settings)
    add_adapter(model, "biased", r=2, bias="all", **settings)

    def join(*names: str, weights: Any = None, kind: str = "cat", **options: Any) -> None:
        weights = [1.0] * len(names) if weights is None else weights
        add_weighted_adapter(model, names, weights, "new", kind, **options)

    with pytest.raises(ConfigError, match=r"must be one of 'linear', .*did you mean 'ties'"):
        join("one", kind="tise")
    with pytest.raises(ConfigError, match=r"density must be a number above 0.*'ties', got None"):
        join("one", kind="ties")
    with pytest.raises(ConfigError, match=r"density must be .* got 1\.5"):
        join("one", kind="dare_ties_svd", density=1.5)
    with pytest.raises(ConfigError, match=r"majority_sign_method must be one of 'total', 'freq"):
        join("one", kind="ties", density=0.5, majority_sign_method="mean")
    with pytest.raises(ConfigError, match=r"combination_type='ties' needs adapters of one rank"):
        join("one", "wide", kind="ties", density=0.5)
    with pytest.raises(ConfigError, match="got 2 adapters and 1 weights"):
        join("one", "wide", weights=[1.0])
    with pytest.raises(ConfigError, match=r"adapters of one rank; they differ in fc1.*Use 'cat'"):
        join("one", "wide", kind="linear")
    with pytest.raises(ConfigError, match=r"weights must be finite numbers, got \[1.0, nan"):
        join("one", "wide", weights=[1.0, float("nan")])
    with pytest.raises(ConfigError, match=r"svd_rank must be .* got 2\.5"):
        join("one", kind="svd", svd_rank=2.5)
    with pytest.raises(ConfigError, match="'scaled' has magnitudes"):
        join("one", "scaled")
    with pytest.raises(ConfigError, match="'biased' trains base parameters in place"):
        join("one", "biased")
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        join("one", "other")
    with pytest.raises(ConfigError, match="svd_rank must be a whole number of at least 1"):
        join("one", kind="svd", svd_rank=0)
    with pytest.raises(ConfigError, match="'one' is taken"):
        add_weighted_adapter(model, ["one"], [1.0], "one")


def gpt2(**settings: dict[str, Any]) -> Any:
    """GPT-2 with an adapter of each name."""
    model: Any = hugging_face("gpt2").eval()
    for seed, (name, own) in enumerate(settings.items()):
        add_adapter(model, name, r=2, alpha=6, **own)
        set_adapter(model, name)
        shake(model, seed)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_fused_projections_in_some_blocks_alone(combination: str) -> None:
    model = gpt2(
        one={"target_modules": "qv", "layers_to_transform": [0]},
        two={"target_modules": "qv", "layers_to_transform": [1]},
    )
    plan = add_weighted_adapter(model, ["one", "two"], [1.0, 1.0], "both", combination)
    assert [target.name for target in plan.targets] == [
        f"transformer.h.{block}.attn.c_attn" for block in range(2)
    ]
    one = gpt2(one={"target_modules": "qv", "layers_to_transform": [0]})
    set_adapter(model, "one")
    assert torch.equal(logits(model), logits(one))
    alone = add_weighted_adapter(model, ["one"], [1.0], "again", combination)
    assert [target.name for target in alone.targets] == ["transformer.h.0.attn.c_attn"]
    set_adapter(model, "again")
    torch.testing.assert_close(logits(model), logits(one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [["fused", "plain"], ["plain", "fused"]])
def test_fused_projections_and_other_layers_make_no_one_adapter(order: list[str]) -> None:
    model = gpt2(fused={"target_modules": "qv"}, plain={"target_modules": ["attn.c_proj"]})
    active, before = active_adapter(model), logits(model)
    with pytest.raises(ConfigError, match=r"make no one adapter.*same target_modules"):
        add_weighted_adapter(model, order, [1.0, 1.0], "both", "cat")
    assert adapter_names(model) == ("fused", "plain") and active_adapter(model) == active
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_layers_with_one_weight_have_the_same_adapters(kind: str, merged: bool) -> None:
    model = TiedLinears()
    targets = {"both": ["first", "second"], "again": ["first", "second"]}
    targets |= {"one": ["first"], "other": ["second"]}
    for seed, (name, wanted) in enumerate(targets.items()):
        add_adapter(model, name, r=2, alpha=6, target_modules=wanted)
        set_adapter(model, name)
        shake(model, seed)
    if merged:
        set_adapter(model, "both")
        merge_lora(model)
    for names in (["both", "one"], ["one", "both"], ["one", "other"]):
        with pytest.raises(ConfigError, match=r"share one weight .* not all of the adapters"):
            add_weighted_adapter(model, names, [1.0, 1.0], "new", kind, svd_rank=2)
    assert adapter_names(model) == tuple(targets)
    add_weighted_adapter(model, ["both", "again"], [0.5, 2.0], "new", kind, svd_rank=4)
    if merged:
        unmerge_lora(model)
    found, parts = deltas(model, "new"), [deltas(model, name) for name in ("both", "again")]
    for layer, update in found.items():
        expected = 0.5 * parts[0][layer] + 2 * parts[1][layer]
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)


def test_attention_beside_an_adapter_with_dropout() -> None:
    model = Grouped()
    add_adapter(model, "one", r=2, alpha=6, target_modules=["conv"], dropout=0.1)
    add_adapter(model, "two", r=2, alpha=6, target_modules=["attention"])
    plan = add_weighted_adapter(model, ["one", "two"], [1.0, 1.0], "both", "cat")
    assert [target.name for target in plan.targets] == ["conv", "attention"]


def test_a_layer_with_the_name_of_a_preset() -> None:
    model = nn.ModuleDict({"attention": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    for name in ("one", "two"):
        add_adapter(model, name, r=2, alpha=6, target_modules=["attention"])
    plan = add_weighted_adapter(model, ["one", "two"], [1.0, 1.0], "both", "cat")
    assert [(target.name, target.r) for target in plan.targets] == [("attention", 4)]
