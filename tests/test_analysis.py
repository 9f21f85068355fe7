"""The paper's analysis on matrices whose answers are known, and on studies of small adapters."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora import adapter_state_dict, save_adapter
from lightning_lora.adapters import Factors, labels_of, read_adapter
from lightning_lora.analysis import (
    against_base,
    decompose,
    decompose_product,
    directions_for,
    effective_rank,
    inner_product,
    projected_norm,
    random_directions,
    random_similarity,
    stable_rank,
    subspace_similarity,
)
from lightning_lora.base_weights import BaseWeights
from lightning_lora.errors import CheckpointError
from lightning_lora.metadata import checkpoint_metadata
from lightning_lora.names import corresponding
from lightning_lora.study import SIDES, make_study
from lightning_lora.study_files import mean_rows, write_study
from tests.models import AttentionNet, TiedHead, adapted, hugging_face, mlp


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(size: int, count: int, seed: int = 0) -> Tensor:
    return random_directions(size, count, generator(seed))


def checkpoint(model: nn.Module, path: Path, **more: Any) -> Path:
    """What LoRACallback keeps of an adapted model."""
    content = {
        "state_dict": adapter_state_dict(model),
        "lightning_lora": checkpoint_metadata(model),
    }
    torch.save({**content, **more}, path)
    return path


@pytest.mark.parametrize(("out", "r", "width"), [(12, 3, 9), (4, 6, 20), (5, 8, 3)])
def test_the_decomposition_of_the_factors_is_that_of_their_product(
    out: int, r: int, width: int
) -> None:
    A, B = (
        torch.randn(r, width, generator=generator(1)),
        torch.randn(out, r, generator=generator(2)),
    )
    found = decompose_product(A, B, scaling=0.5)
    product = 0.5 * B.double() @ A.double()
    k = min(out, r, width)
    assert found.U.shape == (out, k) and found.V.shape == (width, k)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(product)[:k])
    torch.testing.assert_close(found.U @ found.S.diag() @ found.V.t(), product)
    torch.testing.assert_close(found.U.t() @ found.U, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(found.V.t() @ found.V, torch.eye(k, dtype=torch.float64))
    assert found.norm == pytest.approx(float(product.norm()))


def test_directions_of_rounding_errors_are_cut_off() -> None:
    A = torch.randn(2, 9, generator=generator(1))
    found = decompose_product(torch.cat([A, A]), torch.ones(7, 4))
    assert len(found.S) == 1
    nothing = decompose_product(A, torch.zeros(7, 2))
    assert nothing.U.shape == (7, 0) and nothing.norm == 0
    assert (
        effective_rank(nothing.S) == stable_rank(nothing.S) == directions_for(nothing.S, 0.9) == 0
    )


def test_phi_of_equal_subspaces_is_one_and_of_orthogonal_ones_zero() -> None:
    basis = orthonormal(20, 10)
    rotation = orthonormal(4, 4, seed=3)
    same = subspace_similarity(basis[:, :4], basis[:, :4] @ rotation)
    assert float(same[3, 3]) == pytest.approx(1)
    assert float(same[0, 0]) < 0.99  # one direction of a rotated basis is another direction
    assert (same[:, 3] > 1 - 1e-9).all()  # and lies in the whole all the same
    assert subspace_similarity(basis[:, :4], basis[:, 4:]).abs().max() < 1e-12


def test_phi_counts_what_is_shared() -> None:
    basis = torch.eye(6)
    phi = subspace_similarity(basis[:, [0, 1, 2]], basis[:, [0, 5, 1, 4]])
    expected = torch.tensor([[1, 1, 1, 1], [1, 0.5, 1, 1], [1, 0.5, 2 / 3, 2 / 3]])
    torch.testing.assert_close(phi, expected.double())


def test_phi_of_random_matrices_is_about_its_expectation() -> None:
    size, draws = 40, 60
    total = torch.zeros(4, 10, dtype=torch.float64)
    for seed in range(draws):
        first, second = orthonormal(size, 4, 2 * seed), orthonormal(size, 10, 2 * seed + 1)
        total += subspace_similarity(first, second)
    for i, j in ((1, 1), (4, 4), (2, 10), (4, 10)):
        found = float(total[i - 1, j - 1]) / draws
        assert found == pytest.approx(random_similarity(i, j, size), rel=0.35)


def test_a_planted_direction_is_found_to_be_amplified() -> None:
    U, V = orthonormal(16, 16, 1), orthonormal(12, 12, 2)
    values = torch.arange(12, 0, -1, dtype=torch.float64)
    weight = U[:, :12] @ values.diag() @ V.t()
    # The tenth direction of W, with a singular value of 3, is raised by 21.
    delta = decompose_product(V[:, 9:10].t(), U[:, 9:10], scaling=21)
    found = against_base(delta, weight, decompose(weight), generator())
    assert found.directions == 1
    assert found.on_delta == pytest.approx(3)
    assert found.on_weight == pytest.approx(12)
    assert found.amplification == pytest.approx(7)
    assert found.weight_norm == pytest.approx(float(weight.norm()))
    assert 0 < found.on_random < 6
    assert found.random_amplification == pytest.approx(21 / found.on_random)
    nowhere = decompose_product(V[:, :1].t(), U[:, 15:16], scaling=2)
    amplified = against_base(nowhere, weight, decompose(weight), generator()).amplification
    assert amplified > 1e12


def test_the_projection_is_the_papers_formula() -> None:
    weight = torch.randn(9, 7, generator=generator(4))
    U, V = orthonormal(9, 3, 5), orthonormal(7, 3, 6)
    # ||U^T W V||_F is the norm of the projection U U^T W V V^T.
    projection = U @ U.t() @ weight.double() @ V @ V.t()
    assert projected_norm(weight, U, V) == pytest.approx(float(projection.norm()))


def test_ranks_of_known_spectra() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0])) == pytest.approx(1)
    skewed = effective_rank(torch.tensor([3.0, 1.0]))
    assert skewed == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert stable_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(1.5)
    assert directions_for(torch.tensor([3.0, 1.0, 0.1]), 0.9) == 2
    assert directions_for(torch.tensor([4.0, 1.0]), 0.9) == 1
    assert directions_for(torch.ones(4), 1.0) == 4


def test_the_inner_product_is_that_of_the_products() -> None:
    A1, B1 = torch.randn(2, 8, generator=generator(1)), torch.randn(5, 2, generator=generator(2))
    A2, B2 = torch.randn(3, 8, generator=generator(3)), torch.randn(5, 3, generator=generator(4))
    expected = float(((B1 @ A1) * (B2 @ A2)).sum())
    assert inner_product(A1, B1, A2, B2) == pytest.approx(expected, rel=1e-4)


def test_names_are_matched_whatever_stands_in_front() -> None:
    inner = ["layer.0.q", "layer.1.q"]
    outer = ["model.bert.layer.0.q", "model.bert.layer.1.q", "model.head"]
    assert corresponding(outer, inner) == dict(zip(outer[:2], inner, strict=True))
    assert corresponding(inner, outer) == dict(zip(inner, outer[:2], strict=True))
    other = ["net.layer.0.q", "net.layer.1.q"]
    assert corresponding(other, outer) == dict(zip(other, outer[:2], strict=True))
    # One prefix for all names: a layer that is not there is not matched to another one.
    assert corresponding(["a.0.q", "a.1.q", "a.2.q"], ["b.0.q", "b.1.q", "c.2.q"]) == {
        "a.0.q": "b.0.q",
        "a.1.q": "b.1.q",
    }
    assert corresponding(["x"], ["y"]) == {}


def test_labels_tell_paths_apart() -> None:
    assert labels_of([Path("runs/a/best.ckpt"), Path("runs/b/last.ckpt")]) == ["best", "last"]
    assert labels_of([Path("x/adapter"), Path("y/adapter")]) == ["x/adapter", "y/adapter"]


@pytest.mark.parametrize(
    ("make", "targets", "names"),
    [
        (mlp, ["fc1", "fc2"], {"fc1": "fc1.weight", "fc2": "fc2.weight"}),
        (TiedHead, ["embedding", "body"], {"embedding": "embedding.weight", "body": "body.weight"}),
        (
            AttentionNet,
            ["attention"],
            {"attention": "attention.in_proj_weight"},
        ),
        (
            lambda: nn.Sequential(nn.MultiheadAttention(8, 2, kdim=6, vdim=4)),
            ["0"],
            {f"0[{part}]": f"0.{part}_proj_weight" for part in "qkv"},
        ),
        (
            lambda: hugging_face("gpt2"),
            "qv",
            {
                f"transformer.h.{layer}.attn.c_attn[{part}]": (
                    f"transformer.h.{layer}.attn.c_attn.weight"
                )
                for layer in range(2)
                for part in "qv"
            },
        ),
        (
            lambda: hugging_face("gpt_neox"),
            "qv",
            {
                f"gpt_neox.layers.{layer}.attention.query_key_value[{part}]": (
                    f"gpt_neox.layers.{layer}.attention.query_key_value.weight"
                )
                for layer in range(2)
                for part in "qv"
            },
        ),
    ],
)
def test_factors_of_a_file_are_those_that_the_model_merges(
    tmp_path: Path, make: Any, targets: Any, names: dict[str, str]
) -> None:
    model = adapted(make, target_modules=targets)
    found = read_adapter(checkpoint(model, tmp_path / "a.ckpt")).factors
    assert {name: factors.weight for name, factors in found.items()} == names
    for factors in found.values():
        layer, _, leaf = factors.weight.rpartition(".")
        update = model.get_submodule(layer).delta_weights()[leaf].detach()  # type: ignore[operator]
        part = factors.of_base(update)
        assert part is not None
        torch.testing.assert_close(part, factors.scaling * factors.B @ factors.A)
        assert part.norm() > 0


def test_square_weights_that_are_kept_transposed_are_turned(tmp_path: Path) -> None:
    model = adapted(lambda: hugging_face("gpt2"), target_modules=["attn.c_proj"])
    path = checkpoint(model, tmp_path / "a.ckpt")
    save_adapter(model, tmp_path / "peft")
    for source in (path, tmp_path / "peft"):
        factors = read_adapter(source).factors["transformer.h.1.attn.c_proj"]
        update = model.get_submodule("transformer.h.1.attn.c_proj").delta_weight()  # type: ignore[operator]
        part = factors.of_base(update.detach())
        torch.testing.assert_close(part, factors.scaling * factors.B @ factors.A)
        assert not torch.allclose(part, update)


def test_what_is_no_product_of_two_matrices_is_left_out_with_the_reason(tmp_path: Path) -> None:
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2))
    model = adapted(lambda: convolutions, target_modules=["0", "2"])
    found = read_adapter(checkpoint(model, tmp_path / "a.ckpt"))
    assert list(found.factors) == ["2"]
    assert found.left_out == {"0": "a convolution: A has 4 dimensions"}

    experts = adapted(lambda: hugging_face("mixtral"), target_modules=["experts", "q_proj"])
    for source in (checkpoint(experts, tmp_path / "b.ckpt"), save_adapter(experts, tmp_path / "b")):
        found = read_adapter(source)
        assert set(found.left_out.values()) == {"experts: their weights have 3 dimensions"}
        assert all(name.endswith("q_proj") for name in found.factors) and len(found.factors) == 2


def test_the_two_formats_of_one_adapter_are_the_same(tmp_path: Path) -> None:
    model = adapted(
        lambda: hugging_face("bert"),
        target_modules=["query", "value"],
        rank_pattern={"layer.0.attention.self.query": 3},
        alpha_pattern={"value": 5},
        use_rslora=True,
    )
    ours = read_adapter(checkpoint(model, tmp_path / "a.ckpt", epoch=2, global_step=7))
    theirs = read_adapter(save_adapter(model, tmp_path / "a"))
    assert ours.position == {"epoch": 2, "global_step": 7} and not theirs.position
    assert list(ours.factors) == list(theirs.factors)
    for name, factors in ours.factors.items():
        assert torch.equal(factors.A, theirs.factors[name].A)
        assert factors.scaling == pytest.approx(theirs.factors[name].scaling)
    assert len({factors.scaling for factors in ours.factors.values()}) == 3


def test_a_sharded_folder_is_the_checkpoint_that_one_process_writes(tmp_path: Path) -> None:
    model = adapted(target_modules=["fc1", "fc2"])
    whole = read_adapter(checkpoint(model, tmp_path / "whole.ckpt"))
    folder = tmp_path / "parts.ckpt"
    folder.mkdir()
    state = {f"state_dict/{name}": tensor for name, tensor in whole.state.items()}
    frame = {
        "state_dict": {name: {"\0tensor": f"state_dict/{name}"} for name in whole.state},
        "lightning_lora": checkpoint_metadata(model),
    }
    torch.save({"frame": frame, "parts": 2}, folder / "meta.pt")
    for rank in range(2):
        half = {key: tensor.chunk(2)[rank].clone() for key, tensor in state.items()}
        places = {
            key: [list(tensor.shape), [rank * len(tensor.chunk(2)[0]), 0]]
            for key, tensor in state.items()
        }
        save_file(half, folder / f"part-{rank:05d}.safetensors", {"places": json.dumps(places)})
    found = read_adapter(folder)
    assert found.form == "sharded Lightning checkpoint"
    assert list(found.factors) == list(whole.factors)
    for name, factors in whole.factors.items():
        assert torch.equal(found.factors[name].A, factors.A)
        assert torch.equal(found.factors[name].B, factors.B)


def study_of(tmp_path: Path, base: bool = True, **options: Any) -> Any:
    """Adapters of ranks 2 and 4, of which the first direction is the same."""
    made, paths = {}, {}
    for name, r in (("small", 2), ("large", 4)):
        model = adapted(r=r, seed=r, target_modules=["fc1", "fc2"])
        with torch.no_grad():
            for layer in (model.fc1, model.fc2):
                layer.lora.A[0] = 40 * torch.nn.functional.one_hot(
                    torch.tensor(1), layer.in_features
                )
                for row in layer.lora.A[1:]:
                    row[1] = 0
        made[name] = model
        paths[name] = checkpoint(model, tmp_path / f"{name}.ckpt")
    folder = tmp_path / "base"
    folder.mkdir(exist_ok=True)
    weights = {f"net.{k}": v.contiguous() for k, v in copy.deepcopy(mlp()).state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    adapters = {name: read_adapter(path) for name, path in paths.items()}
    return make_study(adapters, BaseWeights(folder) if base else None, **options)


def test_a_study_finds_the_direction_that_two_ranks_share(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    assert [each.layer for each in study.similarities] == ["fc1", "fc2"]
    for each in study.similarities:
        assert each.grid.shape == each.random.shape == (2, 4)
        assert each.at(1, 1) == pytest.approx(1)
        assert each.at(2, 2) < 0.95
        assert each.at(9, 9) == each.at(2, 4)
    assert {row.label for row in study.base} == {"small", "large"}
    for row in study.base:
        weight = getattr(mlp(), row.layer).weight
        assert row.numbers.weight_norm == pytest.approx(float(weight.detach().norm()), rel=1e-5)
        assert row.overlap.grid.shape[1] == row.numbers.directions
    mean = mean_rows(study)["small", "large"]
    assert mean["phi_1_1"] == pytest.approx(1) and mean["expected_1_1"] == pytest.approx(2 / 15)


@pytest.mark.parametrize("side", SIDES)
def test_every_side_is_compared_in_its_own_space(tmp_path: Path, side: str) -> None:
    study = study_of(tmp_path, base=False, side=side, directions=1)
    sizes = [6, 10] if side in ("A", "input") else [10, 8]
    assert [each.size for each in study.similarities] == sizes
    assert all(each.grid.shape == (1, 1) for each in study.similarities)
    assert any("--base" in note for note in study.notes) and not study.base


def test_an_untrained_layer_and_a_weight_that_is_not_there_are_left_out(tmp_path: Path) -> None:
    model = adapted(target_modules=["fc1", "fc2"])
    with torch.no_grad():
        model.fc1.lora.B.zero_()
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"fc1.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    adapter = read_adapter(checkpoint(model, tmp_path / "a.ckpt"))
    study = make_study({"a": adapter}, BaseWeights(folder))
    assert [(layer, reason) for _, layer, reason in study.left_out] == [
        ("fc1", "its update is zero"),
        ("fc2", f"dW against W: no tensor of {folder} is its fc2.weight"),
    ]
    save_file({"fc2.weight": torch.ones(8, 9)}, folder / "model.safetensors")
    reasons = [reason for *_, reason in make_study({"a": adapter}, BaseWeights(folder)).left_out]
    assert "dW against W: its base weight has shape (8, 9)" in reasons
    save_file({"fc2.weight": torch.ones(8, 10, dtype=torch.uint8)}, folder / "model.safetensors")
    reasons = [reason for *_, reason in make_study({"a": adapter}, BaseWeights(folder)).left_out]
    assert "dW against W: its base weight is stored as torch.uint8" in reasons


def test_adapters_of_different_models_are_refused(tmp_path: Path) -> None:
    def read(model: nn.Module, name: str) -> Any:
        return read_adapter(checkpoint(model, tmp_path / name))

    one = read(adapted(target_modules=["fc1"]), "a.ckpt")
    with pytest.raises(CheckpointError, match="no layer in common"):
        make_study({"a": one, "b": read(adapted(target_modules=["fc2"]), "b.ckpt")})
    wide = nn.Sequential()
    wide.add_module("fc1", nn.Linear(7, 10))
    with pytest.raises(CheckpointError, match=r"fc1 has other sizes .*10 x 6 in a, 10 x 7 in b"):
        make_study({"a": one, "b": read(adapted(lambda: wide, target_modules=["fc1"]), "c.ckpt")})
    convolution = nn.Sequential(nn.Conv1d(2, 3, 2))
    alone = read(adapted(lambda: convolution, target_modules=["0"]), "d.ckpt")
    with pytest.raises(CheckpointError, match=r"no layer by a product .* a convolution"):
        make_study({"a": alone})
    with pytest.raises(CheckpointError, match=r"no \.safetensors files"):
        BaseWeights(tmp_path)


def test_what_is_written_holds_what_was_found(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    written = write_study(study, tmp_path / "out")
    assert {path.name for path in written} == {path.name for path in (tmp_path / "out").iterdir()}
    found = json.loads((tmp_path / "out/analysis.json").read_text())
    first = study.spectra["small"][0]
    assert found["spectra"]["small"][0]["delta_norm"] == first.delta_norm
    assert first.delta_norm == pytest.approx(math.hypot(*first.singular_values))
    with (tmp_path / "out/similarity_grid.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 2 * 4
    assert float(rows[0]["phi"]) == study.similarities[0].at(1, 1)
    for name in ("spectra", "similarity_small_large", "amplification", "base_small", "base_large"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_parts_without_their_places_are_left_out(tmp_path: Path) -> None:
    model = adapted(lambda: hugging_face("gpt2"), target_modules="qv")
    content = torch.load(checkpoint(model, tmp_path / "a.ckpt"), weights_only=True)
    for target in content["lightning_lora"]["targets"].values():
        del target["slices"]
    torch.save(content, tmp_path / "a.ckpt")
    found = read_adapter(tmp_path / "a.ckpt")
    assert not found.factors and "does not say which" in next(iter(found.left_out.values()))


def test_a_base_of_another_shape_gives_no_matrix() -> None:
    factors = Factors(torch.ones(2, 6), torch.ones(4, 2), 1.0, "w", transposed=None)
    assert factors.of_base(torch.ones(6, 4)).shape == (4, 6)  # type: ignore[union-attr]
    assert factors.of_base(torch.ones(4, 5)) is None
    assert factors.of_base(torch.ones(24)) is None
