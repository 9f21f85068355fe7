from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForQuestionAnswering,
)

from lightning_lora import (
    inject_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    swap_adapter,
    unmerge_lora,
)
from lightning_lora.errors import CheckpointError
from lightning_lora.injection import injection_of
from tests.models import shake
from tests.modules import mlp

peft = pytest.importorskip(
    "peft", reason="PEFT is a peer to compare with, installed by the test extra"
)

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
}


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))


def roberta() -> nn.Module:
    return RobertaForQuestionAnswering(RobertaConfig(**SIZES))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def fresh(make: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model: nn.Module = make()
    return model.eval()


def outputs(model: nn.Module) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        if isinstance(model, nn.Sequential) or isinstance(
            getattr(model, "base_model", None), nn.Sequential
        ):
            return [model(torch.linspace(-1, 1, 48).reshape(3, 16))]
        if "Sequential" in repr(type(getattr(getattr(model, "base_model", None), "model", None))):
            return [model(torch.linspace(-1, 1, 48).reshape(3, 16))]
        result = model(input_ids=torch.arange(2, 22).reshape(2, 10))
    return [value for value in result.values() if isinstance(value, Tensor)]


def train_a_little(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shift = torch.randn(parameter.shape, generator=generator) * (
                    0.3 if "lora" in name else 0.05
                )
                parameter.add_(shift)


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


SETTINGS = [
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "use_rslora": True},
    {"target_modules": "all-linear", "bias": "all", "train_layer_norms": True},
    {"target_modules": "all-linear", "bias": "lora_only"},
    {"target_modules": "all-linear", "train_embeddings": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", [bert, roberta, llama, mlp])
def test_peft_loads_what_we_write(tmp_path: Path, make: Any, settings: dict[str, Any]) -> None:
    model = fresh(make)
    base = outputs(model)
    inject_lora(model, r=4, alpha=12, seed=0, **settings)
    train_a_little(model)
    expected = outputs(model)
    assert not torch.allclose(expected[0], base[0], atol=1e-3)
    save_adapter(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(fresh(make), tmp_path / "adapter")
    from safetensors.torch import load_file

    ours = set(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    theirs = set(peft.get_peft_model_state_dict(loaded))
    # Of "lora_only" PEFT saves nothing; with "all" it saves the biases of wrapped modules several
    # times over.
    theirs = {
        key for key in theirs if ".original_module." not in key and ".modules_to_save." not in key
    }
    if settings.get("bias") != "lora_only":
        assert theirs == ours
    assert_same(outputs(loaded), expected)


@pytest.mark.parametrize("make", [bert, llama, mlp])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_we_load_what_peft_writes(tmp_path: Path, make: Any, bias: str) -> None:
    targets = ["0", "3"] if make is mlp else ["query", "value", "q_proj", "down_proj", "dense"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=targets,
        bias=bias,
        modules_to_save=["classifier"] if make is bert else None,
        rank_pattern={"query": 2} if make is bert else {},
        init_lora_weights=False,
        use_rslora=True,
    )
    theirs = peft.get_peft_model(fresh(make), config)
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = fresh(make)
    base = outputs(model)
    plan = load_adapter(model, tmp_path / "adapter")
    assert plan.trainable_parameters == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )
    assert_same(outputs(model), outputs(theirs))
    merge_lora(model)
    assert_same(outputs(model), outputs(theirs))
    remove_lora(model)
    if bias == "none" and make is not bert:
        assert_same(outputs(model), base)


def test_round_trip_of_rank_and_alpha_patterns(tmp_path: Path) -> None:
    model = fresh(llama)
    inject_lora(
        model, r=4, alpha=12, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\.mlp\..*": 5}
    )
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    again = fresh(llama)
    load_adapter(again, tmp_path / "adapter")
    assert_same(outputs(again), outputs(model))
    assert_same(
        outputs(peft.PeftModel.from_pretrained(fresh(llama), tmp_path / "adapter")), outputs(model)
    )


def test_swap_adapter_on_a_merged_model(tmp_path: Path) -> None:
    expected = {}
    for name, r in (("first", 2), ("second", 4)):
        model = fresh(llama)
        inject_lora(model, r=r, alpha=8, seed=1)
        train_a_little(model)
        save_adapter(model, tmp_path / name)
        expected[name] = outputs(model)
    model = fresh(llama)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    load_adapter(model, tmp_path / "first")
    merge_lora(model)
    for name in ("second", "first", "second"):
        swap_adapter(model, tmp_path / name)
        assert_same(outputs(model), expected[name])
    unmerge_lora(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_is_bitwise_a_fresh_merge(tmp_path: Path, dtype: torch.dtype) -> None:
    merged = {}
    for name, settings in {"first": {"r": 2}, "second": {"r": 4, "use_dora": True}}.items():
        model = fresh(llama)
        inject_lora(model, alpha=8, **settings)
        train_a_little(model)
        save_adapter(model, tmp_path / name)
        model = fresh(llama).to(dtype)
        load_adapter(model, tmp_path / name)
        merge_lora(model)
        merged[name] = dict(model.state_dict())
    model = fresh(llama).to(dtype)
    load_adapter(model, tmp_path / "first")
    merge_lora(model)
    for name in ("second", "first", "second"):
        swap_adapter(model, tmp_path / name)
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in merged[name].items())


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = fresh(llama)
    inject_lora(model, r=4, alpha=12)
    save_adapter(model, tmp_path / "adapter")
    other = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 16}, num_key_value_heads=2))
    with pytest.raises(CheckpointError, match=r"nothing was loaded.*wrong shape"):
        try:
            load_adapter(other, tmp_path / "adapter")
        except CheckpointError as error:
            raise CheckpointError(str(error).replace("\n", " ")) from None
    assert injection_of(other) is None
    assert not any("lora" in key for key in other.state_dict())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("r", [4, 2])
def test_a_refused_adapter_leaves_the_present_one(tmp_path: Path, merged: bool, r: int) -> None:
    other = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 16}, num_key_value_heads=2))
    inject_lora(other, r=r, alpha=12, target_modules=["q_proj"])
    save_adapter(other, tmp_path / "other")
    model = fresh(llama)
    inject_lora(model, r=4, alpha=12, target_modules=["q_proj"], modules_to_save=[])
    train_a_little(model)
    if merged:
        merge_lora(model)
    before = outputs(model)
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        swap_adapter(model, tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))
    record = injection_of(model)
    assert record is not None and record.merged is merged and record.config.r == 4


def test_bad_adapter_folders(tmp_path: Path) -> None:
    model = fresh(mlp)
    with pytest.raises(CheckpointError, match="no adapter folder"):
        load_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match="not found"):
        load_adapter(model, tmp_path / "none.ckpt")
    inject_lora(model, target_modules=["0"])
    save_adapter(model, tmp_path / "adapter")
    config_file = tmp_path / "adapter/adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(CheckpointError, match=r"missing: 0\.lora\.magnitude"):
        load_adapter(fresh(mlp), tmp_path / "adapter")
    config_file.write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="IA3"):
        load_adapter(fresh(mlp), tmp_path / "adapter")
    config_file.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_adapter(fresh(mlp), tmp_path / "adapter")
    config_file.write_text(json.dumps(config))
    weights = tmp_path / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_adapter(fresh(mlp), tmp_path / "adapter")


def test_saving_replaces_the_folder_as_a_whole(tmp_path: Path) -> None:
    model = fresh(mlp)
    inject_lora(model, target_modules=["0"])
    folder = save_adapter(model, tmp_path / "adapter")
    (folder / "stale.txt").write_text("old")
    save_adapter(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc, self.q_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.attn(x, x, x, need_weights=False)[0]
        return self.fc(out) + self.q_proj(x) * self.v_proj(x)


@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {"attn": 32}},
        {"rank_pattern": {"attn": 2}},
        {"rank_pattern": {"attn": 2}, "alpha_pattern": {"attn": 4}},
        {"alpha_pattern": {"out_proj": 32}},
    ],
)
def test_patterns_of_peft_for_attention_are_for_its_output_too(
    tmp_path: Path, patterns: dict[str, Any]
) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["attn", "fc"], **patterns)
    theirs = peft.get_peft_model(WithAttention(), config)
    theirs.save_pretrained(tmp_path)
    ours = WithAttention()
    load_adapter(ours, tmp_path)
    wrapped = theirs.base_model.model.attn
    assert ours.attn.lora.scaling == wrapped.scaling["default"]
    assert ours.attn.out_proj.lora.scaling == wrapped.base_layer.out_proj.scaling["default"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "qv"},
        {"target_modules": ["attn", "out_proj", "fc"], "alpha_pattern": {"attn|out_proj": 32}},
        {"target_modules": ["attn", "out_proj", "fc"], "rank_pattern": {"attn|out_proj": 3}},
    ],
)
def test_attention_comes_back_from_a_folder_of_our_own(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = WithAttention()
    inject_lora(model, r=2, alpha=4, **settings)
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    again = WithAttention()
    load_adapter(again, tmp_path / "adapter")
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(again(x), model(x))


def test_statistics_that_peft_does_not_save_are_those_of_the_base(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        model(torch.randn(20, 6))
        return model.eval()

    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], bias="all")
    theirs = peft.get_peft_model(make(), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = make()
    load_adapter(ours, tmp_path)
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "draws at random.*path_initial_model"),
        ({"velora_config": {"a": 1}}, "uses velora_config of PEFT"),
        ({"use_bdlora": {"a": 1}}, "uses use_bdlora of PEFT"),
    ],
)
def test_what_peft_computes_otherwise_is_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    model = fresh(mlp)
    inject_lora(model, target_modules=["0"])
    folder = save_adapter(model, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(fresh(mlp), folder)


def test_the_working_directory_can_be_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh(mlp)
    inject_lora(model, target_modules=["0"])
    folder = tmp_path / "adapter"
    folder.mkdir()
    monkeypatch.chdir(folder)
    save_adapter(model, ".")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_an_adapter_that_diverged_is_not_handed_on(tmp_path: Path) -> None:
    model = fresh(mlp)
    inject_lora(model, target_modules=["0"])
    save_adapter(model, tmp_path / "adapter")
    before = (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        model[0].lora.B[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"Not written: 0\.lora\.B holds NaN"):
        save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").read_bytes() == before
