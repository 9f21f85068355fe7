"""`lightning-lora convert` as its users run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora import inject_lora, load_adapter, merge_lora, save_adapter
from lightning_lora.adapters import read_adapter
from lightning_lora.cli import main
from lightning_lora.errors import CheckpointError
from lightning_lora.foreign import read_foreign
from tests.commands import imported, run_command
from tests.models import hugging_face, shake
from tests.test_cli import CONFIG
from tests.test_offline_merging import Around, assert_equal, fitted, live, tensors

IDS = torch.arange(2, 22).reshape(2, 10)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out = model.eval()(input_ids=IDS)
    return torch.stack([v for k, v in out.items() if "logits" in k])


class FromScratch(nn.Linear):
    """The layer of the article: factors beside the weight, scaled by alpha / r."""

    def __init__(self, plain: nn.Linear, r: int, alpha: float) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.weight, self.bias = plain.weight, plain.bias
        self.scaling = alpha / r
        self.lora_matrix_A = nn.Parameter(torch.randn(r, plain.in_features))
        self.lora_matrix_B = nn.Parameter(torch.randn(plain.out_features, r) / 4)

    def forward(self, x: Tensor) -> Tensor:
        update = self.lora_matrix_B @ self.lora_matrix_A * self.scaling
        return F.linear(x, self.weight + update, self.bias)


def article(tmp_path: Path, r: int = 3, alpha: float = 5) -> tuple[Any, Path, Path]:
    """A RoBERTa adapted as in the article, its base, and a file of what it trained."""
    model: Any = hugging_face("roberta")
    base = tmp_path / "base"
    model.save_pretrained(base)
    torch.manual_seed(3)
    for layer in model.roberta.encoder.layer:
        attention = layer.attention.self
        attention.query = FromScratch(attention.query, r, alpha)
        attention.value = FromScratch(attention.value, r, alpha)
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if "lora" in name or "bias" in name or "LayerNorm" in name or "qa_outputs" in name
    }
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora" not in name:
                parameter.add_(torch.randn_like(parameter) / 10)
    path = tmp_path / "lora.pt"
    torch.save({name: parameter.detach() for name, parameter in trained.items()}, path)
    return model, base, path


def test_the_articles_file_becomes_a_checkpoint_that_computes_the_same(tmp_path: Path) -> None:
    model, base, path = article(tmp_path)
    done = run_command(
        tmp_path, "convert", "lora.pt", "a.ckpt", "--base", str(base), "--alpha", "5", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["layers"] == 4 and found["class"] == "RobertaForQuestionAnswering"
    assert found["settings"]["bias"] == "all" and found["settings"]["train_layer_norms"]
    fresh = hugging_face("roberta")
    assert not torch.allclose(logits(fresh), logits(model), atol=1e-2)
    plan = load_adapter(fresh, tmp_path / "a.ckpt")
    assert plan.trainable_parameters == sum(
        p.numel() for p in torch.load(path, weights_only=True).values()
    )
    torch.testing.assert_close(logits(fresh), logits(model), atol=1e-5, rtol=1e-4)
    main(["merge", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "merged")])
    merged = type(fresh).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_files_of_loralib_with_factors_alone_or_the_whole_model(
    tmp_path: Path, whole: bool
) -> None:
    _, _, base, path = fitted(tmp_path, "gpt2", {"target_modules": "qv"})
    state = torch.load(path, weights_only=True)["state_dict"]
    content = {} if not whole else dict(hugging_face("gpt2").state_dict())
    content.pop("lm_head.weight", None)
    content |= {
        name.removeprefix("inner.net.").replace(".lora.", ".lora_"): tensor
        for name, tensor in state.items()
    }
    torch.save({"state_dict": {f"module.{k}": v for k, v in content.items()}}, tmp_path / "l.pt")
    arguments = ["--base", str(base), "--scaling", "3", "--part", "inner.net"]
    main(["convert", str(tmp_path / "l.pt"), str(tmp_path / "b.ckpt"), *arguments])
    converted = torch.load(tmp_path / "b.ckpt", weights_only=True)
    original = torch.load(path, weights_only=True)
    assert_equal(converted["state_dict"], original["state_dict"])
    for key in ("targets", "base"):
        ours, theirs = converted["lightning_lora"][key], original["lightning_lora"][key]
        assert ours == theirs or (key == "base" and ours["fingerprint"] == theirs["fingerprint"])


def test_a_peft_folder_is_tested_by_the_command(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(model=tiny_model, data=tiny_data))
    fit = ("fit", "--config", "tiny.yaml", "--trainer.max_epochs", "1")
    assert run_command(tmp_path, *fit).returncode == 0
    run = Path("outputs/tiny/version_0")
    done = run_command(tmp_path, "convert", str(run / "adapter"), "c.ckpt")
    assert done.returncode == 0, done.stderr
    names = "[neg,neutral,pos]"
    scores = [
        run_command(tmp_path, "test", "--config", "tiny.yaml", "--ckpt_path", ckpt, *more)
        for ckpt, more in (
            (str(run / "checkpoints/best.ckpt"), ()),
            ("c.ckpt", ("--model.class_names", names)),
        )
    ]
    for done in scores:
        assert done.returncode == 0, done.stderr
    tables = [
        [line.split()[1:3] for line in done.stdout.splitlines() if "test/" in line]
        for done in scores
    ]
    assert tables[0] == tables[1] != []


def test_ranks_alphas_and_rslora_of_peft_come_over(tmp_path: Path) -> None:
    settings = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}, "use_rslora": True}
    model, module, base, path = fitted(tmp_path, "llama", settings)
    folder = save_adapter(module, tmp_path / "peft", "inner.net")
    main(["convert", str(folder), str(tmp_path / "b.ckpt"), "--base", str(base)])
    ours, theirs = read_adapter(tmp_path / "b.ckpt"), read_adapter(path)
    scalings = [
        {name.split("layers")[-1]: (f.scaling, f.A.shape) for name, f in each.factors.items()}
        for each in (ours, theirs)
    ]
    assert scalings[0] == scalings[1] and len({s for s, _ in scalings[0].values()}) == 3
    main(["merge", str(tmp_path / "b.ckpt"), "--output", str(tmp_path / "merged")])
    assert_equal(tensors(tmp_path / "merged"), live(model, module, tmp_path / "live"))


def test_the_scaling_is_read_where_the_file_says_it(tmp_path: Path) -> None:
    factors = {"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(4, 2)}
    factors |= {"b.lora_A": torch.ones(4, 2), "b.lora_B": torch.ones(2, 4)}  # transposed
    path = tmp_path / "f.pt"
    for more, expected in (
        ({"lora_alpha": 8}, {"a": 4, "b": 4}),
        ({"a.scaling": torch.tensor(0.5), "b.lora_alpha": 3.0}, {"a": 0.5, "b": 1.5}),
    ):
        torch.save({**factors, **more}, path)
        found = read_foreign(path)
        assert found.scaling == expected and found.plain == {} and found.r == {"a": 2, "b": 2}
        assert found.A["b"].shape == (2, 4) and found.B["b"].shape == (4, 2)
    assert read_foreign(path, alpha=1).scaling == {"a": 0.5, "b": 0.5}


def test_mistakes_end_with_code_2_and_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, base, path = article(tmp_path)
    content = torch.load(path, weights_only=True)
    half = {
        k: v for k, v in content.items() if "layer.1.attention.self.query.lora_matrix_A" not in k
    }
    torch.save(half, tmp_path / "half.pt")
    torch.save({**content, "finetune_head.weight": torch.ones(2, 2)}, tmp_path / "head.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "plain.pt")
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    torch.save({**content, name: torch.ones(16, 16)}, tmp_path / "other.pt")
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "bad.pt").write_bytes(path.read_bytes()[:500])
    out = str(tmp_path / "out.ckpt")
    given = ["--base", str(base), "--alpha", "4"]
    capsys.readouterr()
    for arguments, expected in (
        ([str(path)], "the following arguments are required: DST"),
        ([str(tmp_path / "none.pt"), out, *given], "not found"),
        ([str(tmp_path / "bad.pt"), out, *given], "could not be read"),
        ([str(tmp_path / "plain.pt"), out, *given], "holds no LoRA factors"),
        ([str(tmp_path / "x.safetensors"), out, *given], "holds no LoRA factors"),
        ([str(tmp_path / "half.pt"), out, *given], "one factor of two"),
        ([str(tmp_path / "head.pt"), out, *given], "no place for: finetune_head.weight"),
        ([str(tmp_path / "other.pt"), out, *given], "differs from the base's"),
        ([str(path), out, "--base", str(base)], "Give --alpha"),
        ([str(path), out, "--alpha", "4"], "does not name its base"),
        ([str(path), out, *given, "--scaling", "4"], "not both"),
        ([str(path), out, *given, "--class", "RobertaForWhatever"], "which transformers has not"),
        ([str(path), str(base), *given], "is a folder"),
        ([str(path), str(path), *given], "is there already"),
        ([str(path), str(path / "x.ckpt"), *given], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", *arguments])
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        assert expected in printed.err and printed.err.count("\n") == 1, printed.err
    assert not list(tmp_path.glob("*.ckpt")) and not list(tmp_path.glob(".*"))
    main(["convert", str(tmp_path / "head.pt"), out, *given, "--skip", "finetune", "--dry_run"])
    assert "Nothing was written" in capsys.readouterr().out and not Path(out).exists()


def test_an_adapter_merged_by_hand_is_what_the_conversion_gives(tmp_path: Path) -> None:
    model = hugging_face("llama")
    base = tmp_path / "base"
    model.save_pretrained(base)
    outer = Around(model)
    inject_lora(outer, r=2, alpha=4, seed=1, target_modules=["q_proj"])
    shake(outer)
    content = {
        name.removeprefix("inner.net.").replace(".lora.", ".lora_"): p.detach().clone()
        for name, p in outer.named_parameters()
        if ".lora." in name
    }
    save_file(content, tmp_path / "f.safetensors")
    arguments = ["--base", str(base), "--alpha", "4"]
    main(["convert", str(tmp_path / "f.safetensors"), str(tmp_path / "c.ckpt"), *arguments])
    fresh = hugging_face("llama")
    load_adapter(fresh, tmp_path / "c.ckpt")
    merge_lora(fresh)
    merge_lora(outer)
    assert_equal(fresh.state_dict(), model.state_dict())


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy, done = imported(tmp_path, ("torch", "lightning", "numpy"), "convert", "--help")
    assert heavy == [] and "usage: lightning-lora convert" in done.stdout


@pytest.mark.parametrize("targets", [["q_proj"], ["experts", "q_proj"]])
def test_a_base_whose_files_hold_experts_one_by_one_is_loaded(
    tmp_path: Path, targets: list[str]
) -> None:
    model: Any = hugging_face("mixtral")
    base = tmp_path / "base"
    model.save_pretrained(base)
    model.config._name_or_path = str(base)
    inject_lora(model, r=2, alpha=6, target_modules=targets)
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    done = run_command(tmp_path, "convert", "adapter", "again.ckpt")
    assert done.returncode == 0, done.stderr
    content = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert content["lightning_lora"]["base"]["name_or_path"] == str(base)
    again = type(model).from_pretrained(base)
    # The fingerprint of the base is compared.
    load_adapter(nn.ModuleDict({"model": again}), tmp_path / "again.ckpt")
    torch.testing.assert_close(logits(again), logits(model))
    other = hugging_face("mixtral")
    with torch.no_grad():
        other.model.layers[0].mlp.gate.weight.add_(1)
    with pytest.raises(CheckpointError, match="another base model"):
        load_adapter(nn.ModuleDict({"model": other}), tmp_path / "again.ckpt")
