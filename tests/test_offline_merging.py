"""What is merged from disk to disk is bitwise what a live model gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import inject_lora, merge_lora, save_adapter
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.export import untied_config
from lightning_lora.offline_merging import merge_on_disk, prepare_merge, write_merge
from tests.models import hugging_face, shake
from tests.test_analysis import checkpoint

CASES: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"bias": "all", "train_layer_norms": True}),
    ("roberta", {"rank_pattern": {"query": 3}, "use_rslora": True}),
    ("electra", {"target_modules": ["query", "word_embeddings"]}),
    ("llama", {}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"], "train_layer_norms": True}),
    ("gemma3", {"target_modules": ["q_proj", "lm_head"]}),
    ("gemma3", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("gemma3", {"target_modules": ["q_proj"], "train_embeddings": True}),
    ("opt", {"modules_to_save": ["final_layer_norm"]}),
    ("gpt2", {"target_modules": "qv"}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}),
    ("gpt_neox", {"target_modules": "qv"}),
    ("falcon, groups", {"target_modules": "qv"}),
    ("phi3", {"target_modules": "qv"}),
    ("wav2vec2", {"target_modules": ["conv", "q_proj"]}),
    ("vit", {"target_modules": ["projection", "q_proj"]}),
    ("modernbert", {"target_modules": "qv"}),
    ("llama", {"use_dora": True}),
    ("gpt2", {"use_dora": True, "target_modules": ["c_attn"]}),
    ("llama", {"init": "pissa"}),
    ("bert", {"init": "olora", "use_dora": True}),
    ("llama", {"freeze_A": True, "layers_to_transform": [-1]}),
    ("bert", {"r": 0, "bias": "all"}),
]


class Around(nn.Module):
    """A module that holds a Hugging Face model, as a LightningModule does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.net = model


def fitted(
    tmp_path: Path, name: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[Any, nn.Module, Path, Path]:
    """The model, what is around it, its base on disk, and an adapter checkpoint."""
    model: Any = hugging_face(name).to(dtype)
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size="5KB")
    model.config._name_or_path = str(base)
    module = Around(model)
    inject_lora(module, **{"r": 2, "alpha": 6, "seed": 1, **settings})
    shake(module)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    return model, module, base, checkpoint(module, tmp_path / "a.ckpt")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def live(model: Any, module: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    merge_lora(module)
    with untied_config(model):
        model.save_pretrained(folder)
    return tensors(folder)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_the_folder_is_bitwise_that_of_a_live_merge(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    model, module, base, path = fitted(tmp_path, name, settings)
    merge = prepare_merge(path)
    assert merge.check == "the same"
    files = write_merge(merge, tmp_path / "merged", shard=3_000)
    expected = live(model, module, tmp_path / "live")
    found = tensors(tmp_path / "merged")
    assert_equal(found, expected)
    before = tensors(base)
    assert any(k not in before or not torch.equal(before[k], v) for k, v in found.items())
    assert merge.size == sum(tensor.nbytes for tensor in found.values())
    assert sum(file.suffix == ".safetensors" for file in files) > 2
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("merged", "live")]
    assert configs[0] == configs[1]
    loaded = type(model).from_pretrained(tmp_path / "merged").state_dict()
    assert_equal(loaded, model.state_dict())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_files_that_join_parameters_are_merged_by_the_models_own_loading(
    tmp_path: Path, name: str
) -> None:
    model, module, _, path = fitted(tmp_path, name, {"target_modules": ["q_proj", "experts"]})
    merge = prepare_merge(path)
    assert "the whole model is in memory" in merge.notes[0] and merge.check == "the same"
    write_merge(merge, tmp_path / "merged", shard=3_000)
    assert_equal(tensors(tmp_path / "merged"), live(model, module, tmp_path / "live"))
    other = hugging_face(name)
    with torch.no_grad():
        other.model.norm.weight.add_(1)  # type: ignore[union-attr]
    other.save_pretrained(tmp_path / "other")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="another base model"):
        prepare_merge(path, tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fit_in_half_precision_gives_what_its_export_holds(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    wide: Any = hugging_face("llama")
    wide.save_pretrained(tmp_path / "wide")
    model, module, _, path = fitted(tmp_path, "llama", {}, dtype)
    # The files are wider than the model was; values are rounded as on loading.
    merge_on_disk(path, tmp_path / "merged", tmp_path / "wide")
    assert_equal(tensors(tmp_path / "merged"), live(model, module, tmp_path / "live"))


def test_the_dtype_that_is_asked_for_is_rounded_to_once(tmp_path: Path) -> None:
    _, module, base, path = fitted(tmp_path, "llama", {})
    folder = save_adapter(module, tmp_path / "peft", "inner.net")
    for source in (path, folder):
        merge_on_disk(source, tmp_path / "merged", base, dtype=torch.bfloat16)
        found = tensors(tmp_path / "merged")
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
        config = json.loads((tmp_path / "merged/config.json").read_text())
        assert config["dtype"] == "bfloat16"
        exact = hugging_face("llama")
        outer = Around(exact)
        inject_lora(outer, r=2, alpha=6, seed=1)
        shake(outer)
        with torch.no_grad():
            for parameter in outer.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        merge_lora(outer)
        expected = {k: v.bfloat16() for k, v in exact.state_dict().items()}
        assert_equal(found, expected)


def test_a_frozen_base_in_another_dtype_stays_so(tmp_path: Path) -> None:
    from lightning_lora.freezing import cast_frozen

    model, module, base, path = fitted(tmp_path, "bert", {"train_layer_norms": True})
    cast_frozen(module, torch.bfloat16)
    path = checkpoint(module, path)
    merge_on_disk(path, tmp_path / "merged", base)
    expected = live(model, module, tmp_path / "live")
    assert {tensor.dtype for tensor in expected.values()} == {torch.bfloat16, torch.float32}
    assert_equal(tensors(tmp_path / "merged"), expected)


def test_folders_in_peft_format_merge_with_the_head_that_they_bring(tmp_path: Path) -> None:
    import transformers

    model, module, _, _ = fitted(tmp_path, "bert", {})
    bare = transformers.BertModel(model.config)
    bare.load_state_dict(hugging_face("bert").bert.state_dict())
    bare.save_pretrained(tmp_path / "bare")
    folder = save_adapter(module, tmp_path / "peft", "inner.net")
    merge = prepare_merge(folder, tmp_path / "bare")
    assert "not checked" in merge.check
    write_merge(merge, tmp_path / "merged")
    assert_equal(tensors(tmp_path / "merged"), live(model, module, tmp_path / "live"))


def test_another_base_is_refused(tmp_path: Path) -> None:
    _, _, base, path = fitted(tmp_path, "bert", {})
    other = tmp_path / "other"
    changed = hugging_face("bert")
    with torch.no_grad():
        changed.bert.embeddings.word_embeddings.weight[3, 3] += 0.1
    changed.save_pretrained(other)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        prepare_merge(path, other)
    hugging_face("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="hold no"):
        prepare_merge(path, tmp_path / "llama")
    with pytest.raises(CheckpointError, match="There is no folder"):
        prepare_merge(path, tmp_path / "nowhere")
    assert base.is_dir()


def test_a_base_that_is_damaged_or_incomplete_is_refused(tmp_path: Path) -> None:
    _, _, base, path = fitted(tmp_path, "bert", {})
    files = sorted(base.glob("*.safetensors"))
    content = files[0].read_bytes()
    files[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="could not be read"):
        prepare_merge(path)
    files[0].unlink()
    with pytest.raises(CheckpointError, match="could not be read"):
        prepare_merge(path)


def test_nothing_is_left_where_a_write_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_lora.strategies import exporting

    _, _, _, path = fitted(tmp_path, "bert", {})
    merge = prepare_merge(path)
    (tmp_path / "there").mkdir()
    written = 0

    def full(*arguments: Any, **options: Any) -> None:
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(28, "No space left on device")
        save_file(*arguments, **options)

    monkeypatch.setattr(exporting, "save_file", full)
    with pytest.raises(CheckpointError, match=r"merged was not written: .* \(No space left"):
        write_merge(merge, tmp_path / "there/merged", shard=3_000)
    assert written == 3 and list((tmp_path / "there").iterdir()) == []
    merge.size = 10**15
    with pytest.raises(CheckpointError, match="GB are free there"):
        write_merge(merge, tmp_path / "there/merged")


def test_an_adapter_that_diverged_is_not_merged(tmp_path: Path) -> None:
    _, module, _, _ = fitted(tmp_path, "llama", {})
    with torch.no_grad():
        next(p for n, p in module.named_parameters() if n.endswith("lora.B"))[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="NaN or infinity"):
        prepare_merge(checkpoint(module, tmp_path / "nan.ckpt"))


def test_a_head_outside_the_model_is_refused(tmp_path: Path) -> None:
    model: Any = hugging_face("bert")
    base = tmp_path / "base"
    model.save_pretrained(base)
    module = Around(model)
    module.head = nn.Linear(16, 3)
    inject_lora(module, r=2, modules_to_save=["head"])
    with pytest.raises(CheckpointError, match="trains something outside"):
        prepare_merge(checkpoint(module, tmp_path / "a.ckpt"), base)


def test_what_cannot_be_placed_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, _, path = fitted(tmp_path, "llama", {})
    content = torch.load(path, weights_only=True)
    content["state_dict"]["inner.net.model.extra"] = torch.ones(2)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"unexpected: inner\.net\.model\.extra"):
        prepare_merge(path)
    monkeypatch.setattr("lightning_lora.skeleton.audit_state", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"not merged on disk: inner\.net\.model\.extra"):
        prepare_merge(path)


def test_an_encoder_that_was_trained_whole_comes_from_the_checkpoint(tmp_path: Path) -> None:
    settings = {"target_modules": ["classifier"], "modules_to_save": ["bert"]}
    model, module, _, path = fitted(tmp_path, "bert", settings)
    merge_on_disk(path, tmp_path / "merged")
    assert_equal(tensors(tmp_path / "merged"), live(model, module, tmp_path / "live"))


def test_rows_of_embeddings_are_merged_in_python(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
    _, module, base, path = fitted(tmp_path, "llama", settings)
    with pytest.raises(CheckpointError, match=r"rows\. Merge it in Python \(load_lightning_module"):
        prepare_merge(path)
    save_adapter(module, tmp_path / "adapter", part="inner.net")
    with pytest.raises(CheckpointError, match=r"rows\. Merge it .* \(load_adapter, merge_lora\)"):
        prepare_merge(tmp_path / "adapter", base)
