"""Layers of one input run as one, and everything that must not change by it."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import functional, inject_lora, merge_lora, remove_lora, unmerge_lora
from lightning_lora.layers.siblings import join_layers, joined_layers
from lightning_lora.names import modules_by_name
from tests.models import hugging_face, shake


class Attention(nn.Module):
    """Query, key and value read x; the output projection something else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 4), nn.Linear(12, 4, bias=False)
        self.o = nn.Linear(8, 12)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        return self.o(torch.tanh(q) * torch.cat([k, v], -1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def adapted(**settings: Any) -> Net:
    torch.manual_seed(0)
    model = Net()
    inject_lora(model, seed=1, **{"r": 2, "alpha": 6, **settings})
    shake(model)
    return model


def apart(model: Net) -> Net:
    """A copy whose layers run alone."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__dict__.pop("siblings", None)
    return model


def leaf() -> Tensor:
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))
    return x.requires_grad_()


def inputs() -> Tensor:
    """What other layers may have made: there is a graph behind it."""
    return leaf() * 1


def grads(model: nn.Module, x: Tensor, passes: int = 1) -> dict[str, Tensor]:
    """Gradients of the last of some passes, and its output."""
    for _ in range(passes):
        model.zero_grad()
        x = x.detach().requires_grad_()
        out = model(x * 1)
        (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "x": x.grad, "out": out.detach()}  # type: ignore[dict-item]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(expected) > 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of `lora_linears` computes."""
    counts: list[int] = []
    original = functional.lora_linears

    def counting(x: Tensor, projections: Any) -> Any:
        counts.append(len(projections))
        return original(x, projections)

    monkeypatch.setattr(functional, "lora_linears", counting)
    monkeypatch.setattr("lightning_lora.layers.siblings.lora_linears", counting)
    return counts


def test_layers_of_one_input_are_found_and_give_the_same(joined: list[int]) -> None:
    model = adapted(bias="all")
    expected = grads(apart(model), inputs())
    assert joined == [1] * 8
    joined.clear()
    for passes, counts in ((1, [1] * 8), (1, [3, 1] * 2), (2, [3, 1] * 4)):
        assert_same(grads(model, inputs(), passes), expected)
        assert joined == counts
        joined.clear()


def test_a_part_of_the_layers_is_adapted(joined: list[int]) -> None:
    model = adapted(target_modules=["q", "v"])
    expected = grads(apart(model), inputs())
    joined.clear()
    assert_same(grads(model, inputs(), 3), expected)
    assert joined == [1] * 4 + [2] * 4


def test_another_input_for_some_of_them(joined: list[int]) -> None:
    model = adapted().blocks[0]
    memory = 2 * inputs()
    expected = [apart(model)(inputs(), each) for each in (None, memory)]  # type: ignore[arg-type]
    for _ in range(3):
        torch.testing.assert_close(model(inputs(), memory), expected[1])
    joined.clear()
    model(inputs(), memory)
    assert joined == [1, 2, 1]
    # The query's input is that of the others too, this time.
    torch.testing.assert_close(model(inputs()), expected[0])


def test_outputs_that_nobody_asks_for_are_let_go(joined: list[int]) -> None:
    model, x = adapted().blocks[0], inputs()
    expected = apart(model).q(x)  # type: ignore[arg-type, operator]
    model(x)
    model(x)
    joined.clear()
    for _ in range(3):
        torch.testing.assert_close(model.q(x), expected)  # type: ignore[operator]
    assert joined == [3] * 3
    torch.testing.assert_close(model(x), apart(model)(x))  # type: ignore[arg-type]
    assert not model.q.siblings.ready  # type: ignore[union-attr]


def test_two_forward_passes_before_their_backward_passes(joined: list[int]) -> None:
    """What was computed alone is computed alone again inside its backward pass."""
    model = adapted()

    def run(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x.sum()

    for counts in ([1] * 8, [3, 1, 3, 1]):
        joined.clear()
        losses = [run(inputs()), run(2 * inputs())]
        assert joined == counts * 2
        sum(losses).backward()  # type: ignore[union-attr]
        assert joined == counts * 4


def test_an_input_that_was_changed_in_between() -> None:
    block = adapted().blocks[0]
    block(inputs())
    block(inputs())
    x = inputs()
    block.q(x)  # type: ignore[operator]
    x.mul_(2)
    torch.testing.assert_close(block.k(x), apart(block).k(x))  # type: ignore


def test_a_layer_that_was_not_used_gets_no_gradient(joined: list[int]) -> None:
    model = adapted()
    attention: Any = model.blocks[0]
    grads(model, inputs(), passes=2)
    model.zero_grad()
    joined.clear()
    attention.q(inputs()).sum().backward()
    assert joined == [3]
    assert attention.q.lora.A.grad.any() and attention.q.lora.B.grad.any()
    for unused in (attention.k, attention.v):
        # Zeros would let an optimizer's momentum and decay move it.
        assert unused.lora.A.grad is None and unused.lora.B.grad is None


def test_parameters_that_were_changed_in_between(joined: list[int]) -> None:
    model = adapted()
    attention: Any = model.blocks[0]
    x = inputs()
    grads(model, x, passes=2)
    joined.clear()
    attention.q(x)
    with torch.no_grad():
        attention.k.lora.B += 1
        attention.v.weight *= 2
    for layer in (attention.k, attention.v):
        expected = copy.deepcopy(layer)
        expected.__dict__.pop("siblings", None)
        torch.testing.assert_close(layer(x), expected(x))
    assert joined[0] == 3


@pytest.mark.parametrize("change", ["scaling", "data", "mode"])
def test_settings_that_were_changed_in_between(change: str, joined: list[int]) -> None:
    model = adapted(dropout=0.5)
    attention: Any = model.blocks[0]
    x = inputs()
    grads(model, x, passes=2)
    attention.q(x)
    layer = attention.k
    if change == "scaling":
        layer.lora.scaling = 0.0
    elif change == "data":
        layer.weight.data = 2 * layer.weight.data
    if change != "scaling":
        layer.eval()
    expected = copy.deepcopy(layer)
    expected.__dict__.pop("siblings", None)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, expected(x))


class Branches(nn.Module):
    """Two layers of one input, of which one or each may be checkpointed by itself."""

    def __init__(self, out: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(12, 12), nn.Linear(12, out)
        inject_lora(self, r=2, alpha=6, seed=1, target_modules=["fc1", "fc2"])
        shake(self)
        self.drop = nn.Dropout(0.5)
        self.checkpointed: tuple[str, ...] = ()

    def branch(self, name: str, x: Tensor) -> Tensor:
        return torch.tanh(getattr(self, name)(x))

    def forward(self, x: Tensor) -> Tensor:
        outs = [
            checkpoint(self.branch, name, x, use_reentrant=False)
            if name in self.checkpointed
            else self.branch(name, x)
            for name in ("fc1", "fc2")
        ]
        return torch.cat(outs, -1)


@pytest.mark.parametrize("checkpointed", [("fc1",), ("fc2",), ("fc1", "fc2")])
@pytest.mark.parametrize("out", [12, 5])
def test_checkpointed_branches(checkpointed: tuple[str, ...], out: int) -> None:
    model = Branches(out)
    expected = grads(model, inputs(), 3)
    model.checkpointed = checkpointed
    assert_same(grads(model, inputs(), 3), expected)


def test_a_backward_pass_for_each_layer() -> None:
    model = Branches()
    expected = {n: g for n, g in grads(model, inputs()).items() if ".lora." in n}
    for _ in range(3):
        model.zero_grad()
        x = inputs().detach()
        weights = torch.linspace(-1, 2, 2 * 120).reshape(2, 5, 24).split(12, -1)
        for name, own in zip(("fc1", "fc2"), weights, strict=True):
            (model.branch(name, x) * own).sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert_same(found, expected)


@pytest.mark.parametrize("first", [False, True])
def test_a_backward_pass_for_each_layer_after_both_have_run(first: bool) -> None:
    model = Branches()
    for _ in range(3):
        model.zero_grad()
        x = leaf().detach().requires_grad_(first)
        outs = [model.branch(name, x) for name in ("fc1", "fc2")]
        for out in outs:
            out.square().sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(leaf().detach()).square().sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(found, expected)


def test_an_input_that_requires_a_gradient_from_the_second_layer_on() -> None:
    model = Branches()
    for _ in range(2):
        model(inputs()).sum().backward()
    x = inputs().detach()
    model.fc1(x)
    model.fc2(x.requires_grad_()).sum().backward()
    assert x.grad is not None and x.grad.any()


def test_reentrant_checkpoints_draw_the_same_dropout_again() -> None:
    model, seen = Branches().train(), []
    for layer in (model.fc1, model.fc2):
        layer.lora.dropout = 0.5  # type: ignore[union-attr]

    def forward(x: Tensor) -> Tensor:
        x = x * 1
        out: Tensor = model.drop(model.fc1(x)) * model.drop(model.fc2(x))
        seen.append(out.detach())
        return out

    for _ in range(3):
        seen.clear()
        out: Any = checkpoint(forward, inputs(), use_reentrant=True)
        out.square().mean().backward()
        torch.testing.assert_close(*seen)
        forward(inputs()).sum().backward()


def test_a_pass_without_gradients_lets_go_of_what_nobody_asked_for() -> None:
    model = Branches()
    for _ in range(2):
        model(inputs()).sum().backward()
    x = inputs()
    model.fc1(x).sum().backward()
    reference = weakref.ref(x)
    del x
    with torch.no_grad():
        model(inputs())
    assert reference() is None


def test_hooks_of_every_layer_run_and_may_replace_input_and_output() -> None:
    model, seen = adapted(), []
    for name, module in model.named_modules():
        if name.endswith((".q", ".k", ".v")):
            module.register_forward_hook(lambda m, a, out, name=name: seen.append(name) or 2 * out)
            if name.endswith("k"):
                module.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    expected = grads(apart(model), inputs())
    seen.clear()
    assert_same(grads(model, inputs(), 3), expected)
    assert len(seen) == 3 * 6


def test_hooks_on_the_factors_run(joined: list[int]) -> None:
    model, seen = adapted(), []
    model(inputs())
    model.blocks[0].k.lora.register_forward_hook(lambda *_: seen.append(1))  # type: ignore
    joined.clear()
    model(inputs())
    assert seen and joined == [1] * 4 + [3, 1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    model = adapted()
    expected = grads(apart(model), inputs())

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            for block in self.net.blocks:
                x = x + checkpoint(block, x, use_reentrant=reentrant)  # type: ignore[operator]
            return x

    found = grads(Checkpointed(), inputs(), 3)
    assert_same({name.removeprefix("net."): value for name, value in found.items()}, expected)
    assert not any(block.q.siblings.ready for block in model.blocks)  # type: ignore


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_that_are_called_in_another_order(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(12, 12) for name in "abc"})
    inject_lora(model, r=2, alpha=6, seed=1, target_modules=["a", "b", "c"])
    shake(model)

    def forward(order: str, x: Tensor) -> Tensor:
        return sum(torch.tanh(model[name](x)) * (ord(name) - 95) for name in order)  # type: ignore[misc]

    for order in ("abc", "abc", "cab", "bca", "cb", "ab", "abc"):
        found: list[dict[str, Any]] = []
        for checkpointed in (True, False):
            model.zero_grad()
            x = leaf()
            if checkpointed:
                out = checkpoint(forward, order, x * 1, use_reentrant=reentrant)
            else:
                out = forward(order, x * 1)
            out.sum().backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            found[-1]["x"] = x.grad
        assert_same(*found)


def test_dropout_draws_a_mask_for_each_layer(joined: list[int]) -> None:
    model = adapted(dropout=0.3)
    x = inputs()
    outs = []
    for _ in range(300):
        outs.append(model(x).detach())
    assert 3 in joined
    # On average it is the model without dropout; the update of each layer varies.
    block, evaluated = model.blocks[0], apart(model).eval().blocks[0]
    means = {}
    for name in ("q", "k", "v"):
        layer, plain = getattr(block, name), getattr(evaluated, name)
        draws = torch.stack([layer(x).detach() for _ in range(400)])
        means[name] = draws.mean(0)
        assert (draws - draws[0]).abs().max() > 0.01
        error = (means[name] - plain(x)).abs().max()
        assert error < 0.2 * (draws.std(0).max() + 1e-3) + 0.05


def test_copies_and_pickles_are_on_their_own() -> None:
    model = adapted()
    model(inputs())
    model(inputs())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        expected = grads(apart(other), inputs())
        assert_same(grads(other, inputs(), 3), expected)
        assert other.blocks[0].q.siblings.layers[0] is other.blocks[0].q
        assert other.blocks[0].q.siblings is not model.blocks[0].q.siblings  # type: ignore


def test_merging_removing_and_training_again() -> None:
    model = adapted()
    expected = grads(model, inputs(), 3)
    merge_lora(model)
    torch.testing.assert_close(model(inputs()), expected["out"], rtol=1e-5, atol=1e-5)
    unmerge_lora(model)
    assert_same(grads(model, inputs(), 2), expected)
    remove_lora(model)
    assert not any("siblings" in module.__dict__ for module in model.modules())


def test_without_gradients_every_layer_computes_for_itself(joined: list[int]) -> None:
    model = adapted()
    model(inputs())
    model(inputs())
    joined.clear()
    for _ in range(2):
        with torch.no_grad():
            model(inputs())
    assert joined == [1] * 16


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hugging_face_model(name: str, dtype: torch.dtype, joined: list[int]) -> None:
    model = hugging_face(name).to(dtype)
    inject_lora(model, r=2, alpha=6, seed=0)
    shake(model)
    alone = copy.deepcopy(model)
    for module in alone.modules():
        module.__dict__.pop("siblings", None)
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    found = []
    for each in (alone, model, model):
        each.zero_grad()
        joined.clear()
        each(input_ids=ids)[0].float().pow(2).mean().backward()
        found.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert 3 in joined
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for key, expected in found[0].items():
        error = (found[2][key] - expected).norm() / (expected.norm() + 1e-6)
        assert error < tolerance, key


def test_a_compiled_model_is_one_graph(joined: list[int]) -> None:
    model = adapted()
    expected = grads(model, inputs(), 3)
    joined.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = grads(compiled, inputs(), 2)  # type: ignore[arg-type]
    assert_same({n.removeprefix("_orig_mod."): value for n, value in found.items()}, expected)
    # The compiler sees each layer by itself.
    assert 3 not in joined


def test_a_run_that_goes_on_elsewhere_joins_the_same_layers_at_once(joined: list[int]) -> None:
    model = adapted()
    assert joined_layers(modules_by_name(model)) == []
    model(inputs()).sum().backward()
    groups = [[f"blocks.{n}.{leaf}" for leaf in "qkv"] for n in range(2)]
    assert joined_layers(modules_by_name(model)) == groups
    expected = grads(model, inputs())
    assert joined_layers(modules_by_name(model)) == groups
    other = adapted()
    join_layers(modules_by_name(other), [*groups, ["blocks.0.o", "gone"], ["blocks.0.q", "x"]])
    joined.clear()
    found = grads(other, inputs())
    assert joined == [3, 1] * 2
    assert all(torch.equal(found[name], value) for name, value in expected.items())
