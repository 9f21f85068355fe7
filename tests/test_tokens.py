"""Some rows of an embedding train, new tokens for instance."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    adapter_per_row,
    adapter_state_dict,
    add_adapter,
    add_weighted_adapter,
    inject_lora,
    load_adapter,
    load_adapter_state_dict,
    load_lightning_module,
    merge_lora,
    remove_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
)
from lightning_lora.errors import CheckpointError, ConfigError, TargetError
from lightning_lora.injection import injection_of
from lightning_lora.metadata import base_fingerprint
from tests.models import TiedHead, assert_same, hugging_face, snapshot
from tests.modules import PlainClassifier, make_lora, make_trainer

IDS = torch.tensor([[5, 9, 2, 7], [7, 7, 11, 3]])
NEW = [9, 7]
TARGETS: dict[str, Any] = {"r": 2, "alpha": 6, "target_modules": ["q_proj"]}


def tied_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def rows(model: nn.Module) -> Any:
    found = [p for name, p in model.named_parameters() if name.endswith("trainable_tokens.rows")]
    assert len(found) == 1
    return found[0]


def train_a_little(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                shift = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * shift)


@pytest.mark.parametrize("make", [tied_llama, lambda: hugging_face("llama")])
def test_the_model_starts_bitwise_as_it_was_and_gets_the_original_back(make: Any) -> None:
    model = make()
    before, kinds, expected = snapshot(model), list(map(type, model.modules())), logits(model)
    plan = inject_lora(model, trainable_token_indices=NEW, **TARGETS)
    # A head computes its columns for the rows anew, in another order of sums.
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-6)
    assert plan.counts()["token"] == rows(model).numel() == 2 * 16
    assert plan.trainable_parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert plan.total_parameters == sum(p.numel() for p in model.parameters())
    assert "rows of model.embed_tokens" in str(plan)
    assert not model.get_input_embeddings().weight.requires_grad
    train_a_little(model)
    remove_lora(model)
    assert_same(before, snapshot(model))
    assert list(map(type, model.modules())) == kinds
    assert "trainable_tokens" not in dir(model.get_input_embeddings())


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_rows_in_a_whole_table(tied: bool) -> None:
    whole = tied_llama() if tied else hugging_face("llama")
    other = copy.deepcopy(whole)
    inject_lora(other, trainable_token_indices=NEW, **TARGETS)
    for model in (whole, other):
        model(input_ids=IDS, labels=IDS).loss.backward()
    table = whole.get_input_embeddings().weight
    torch.testing.assert_close(rows(other).grad, table.grad[NEW], atol=1e-6, rtol=1e-4)
    assert rows(other).grad.any(1).all()


@pytest.mark.parametrize("make", [tied_llama, lambda: hugging_face("llama")])
def test_a_merge_writes_the_rows_and_an_unmerge_takes_them_out(make: Any) -> None:
    model = make()
    base = model.get_input_embeddings().weight.detach().clone()
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    inject_lora(model, trainable_token_indices=NEW, **TARGETS)
    train_a_little(model)
    trained, expected = rows(model).detach().clone(), logits(model)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    merge_lora(model)
    table = model.get_input_embeddings().weight
    assert torch.equal(table[NEW], trained)
    others = [n for n in range(len(table)) if n not in NEW]
    assert torch.equal(table[others], base[others])
    assert (model.lm_head.weight is table) == tied
    assert not any("trainable_tokens" in name for name in model.state_dict())
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, logits(make()), atol=1e-3)
    assert_same(state, adapter_state_dict(model))
    unmerge_lora(model)
    assert torch.equal(table, base)
    assert torch.equal(logits(model), expected)


def test_a_checkpoint_holds_the_rows_alone_and_new_rows_are_no_other_base() -> None:
    prints, state = set(), {}
    for seed in (0, 1):
        model = tied_llama()
        with torch.no_grad():
            torch.manual_seed(seed)
            model.get_input_embeddings().weight[NEW] = torch.randn(2, 16)
        inject_lora(model, trainable_token_indices=NEW, **TARGETS)
        prints.add(base_fingerprint(model))
        merge_lora(model)
        record = injection_of(model)
        assert record is not None
        record.fingerprint = None
        prints.add(base_fingerprint(model))
        state = adapter_state_dict(model)
    assert len(prints) == 1
    assert state["model.embed_tokens.trainable_tokens.rows"].shape == (2, 16)
    assert {name.rpartition(".")[2] for name in state} == {"A", "B", "rows"}
    other = tied_llama()
    with torch.no_grad():
        other.get_input_embeddings().weight[0] += 1
    inject_lora(other, trainable_token_indices=NEW, **TARGETS)
    assert base_fingerprint(other) not in prints


@pytest.mark.parametrize("name", ["gemma3", "bert", "gpt2", "t5"])
def test_embeddings_of_every_kind(name: str, tmp_path: Path) -> None:
    model = hugging_face(name)
    batch: dict[str, Any] = {"input_ids": IDS}
    if name == "t5":
        batch["decoder_input_ids"] = IDS
    with torch.no_grad():
        expected = model(**batch).logits
    inject_lora(model, r=2, trainable_token_indices=NEW, target_modules="qv")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-5)
        rows(model).add_(torch.linspace(-1, 1, rows(model).numel()).view_as(rows(model)))
        changed = model(**batch).logits
        assert not torch.allclose(changed, expected, atol=1e-4)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(copied(**batch).logits, changed)
        merge_lora(model)
        torch.testing.assert_close(model(**batch).logits, changed, atol=1e-5, rtol=1e-4)


def test_models_of_ones_own(tmp_path: Path) -> None:
    model = TiedHead()
    tokens = torch.tensor([1, 5, 10])
    before = model(tokens)
    inject_lora(model, r=0, modules_to_save=None, trainable_token_indices=[5])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "embedding.trainable_tokens.rows"
    ]
    torch.testing.assert_close(model(tokens), before)
    with torch.no_grad():
        rows(model).mul_(-2)
    after = model(tokens)
    # Of the other tokens the logit of the trained one alone moves.
    assert torch.equal(after[0, :5], before[0, :5]) and after[0, 5] != before[0, 5]
    assert not torch.allclose(after[1], before[1])
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert rows(half).dtype == torch.float32 and half(tokens).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(tokens).float(), after, atol=0.05, rtol=0.05)
    with torch.no_grad():
        rows(model)[0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"embedding.trainable_tokens.rows holds NaN"):
        merge_lora(model)


class Reader(PlainClassifier):
    """Reads token numbers out of its inputs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embedding = nn.Embedding(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.embedding((x.abs() * 6).long().clamp(max=11)).mean(1))
        return out


LIFE: dict[str, Any] = {"trainable_token_indices": [3, 0], "bias": "all"}


@pytest.mark.parametrize("r", [0, 4])
def test_life_cycle(tmp_path: Path, r: int) -> None:
    seed_everything(1)
    model = Reader()
    base = model.embedding.weight.detach().clone()
    trainer = make_trainer(tmp_path, make_lora(**LIFE, r=r))
    trainer.fit(model)
    merged = model.embedding.weight
    changed = (merged != base).any(1)
    assert changed.nonzero().flatten().tolist() == [0, 3]
    after = trainer.test(model, verbose=False)[0]["test_loss"]
    last = str(tmp_path / "last.ckpt")
    again = trainer.test(model, ckpt_path=last, verbose=False)[0]["test_loss"]
    assert again == pytest.approx(after, abs=1e-6)
    fresh = load_lightning_module(Reader, last)
    assert torch.equal(fresh.embedding.weight, merged)
    other = make_trainer(tmp_path / "o", make_lora(**{**LIFE, "trainable_token_indices": [3]}, r=r))
    with pytest.raises(CheckpointError, match=r"trainable_token_indices: \[3, 0\] in the check"):
        other.test(Reader(), ckpt_path=last)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    fits = {}
    for name, path in (("whole", None), ("resumed", tmp_path / "whole" / "epoch=0.ckpt")):
        seed_everything(3)
        fits[name] = Reader()
        trainer = make_trainer(tmp_path / name, make_lora(**LIFE), max_epochs=3)
        trainer.checkpoint_callback.save_top_k = -1  # type: ignore[union-attr]
        trainer.fit(fits[name], ckpt_path=None if path is None else str(path))
    assert_same(snapshot(fits["whole"]), snapshot(fits["resumed"]))


@pytest.mark.parametrize("tied", [True, False])
def test_peft_trains_the_same_rows(tied: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    make: Any = tied_llama if tied else lambda: hugging_face("llama")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=NEW
    )
    theirs = peft.get_peft_model(make(), config)
    theirs.save_pretrained(tmp_path / "start")
    load_adapter(ours := make(), tmp_path / "start")
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model.eval()(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    expected = logits(theirs)
    assert not torch.allclose(expected, logits(make()), atol=1e-3)
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        loaded = peft.PeftModel.from_pretrained(make(), tmp_path / folder)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)
        load_adapter(other := make(), tmp_path / folder)
        torch.testing.assert_close(logits(other), expected, atol=1e-5, rtol=1e-4)


def test_what_peft_cannot_express_is_refused(tmp_path: Path) -> None:
    model = TiedHead()
    inject_lora(model, r=2, target_modules=["body"], trainable_token_indices=[5])
    with pytest.raises(CheckpointError, match="'head' shares the rows of 'embedding'"):
        save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trainable_token_indices": [40, 3]}, r"has the rows 0 to 39, and not 40"),
        ({"trainable_token_indices": {"embed": [1]}}, "'embed' matched nothing.*embed_tokens"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "is a Linear, and rows of embeddings alone"),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed_tokens", "q_proj"]},
            "gets factors",
        ),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "trains whole",
        ),
    ],
)
def test_wrong_tokens_are_refused(settings: dict[str, Any], said: str) -> None:
    model = hugging_face("llama")
    before = list(map(type, model.modules()))
    with pytest.raises(TargetError, match=said):
        inject_lora(model, **{**TARGETS, **settings})
    assert list(map(type, model.modules())) == before


def test_padding_rows_and_several_embeddings_are_refused() -> None:
    padded = nn.Sequential(nn.Embedding(5, 4, padding_idx=2), nn.Linear(4, 4))
    with pytest.raises(TargetError, match="padding row at 2, which gets no gradient"):
        inject_lora(padded, r=2, trainable_token_indices=[2])
    several = nn.Sequential(nn.Embedding(5, 4), nn.Embedding(5, 4), nn.Linear(4, 4))
    with pytest.raises(TargetError, match=r"several embeddings \(0, 1\)"):
        inject_lora(several, r=2, trainable_token_indices=[2])
    inject_lora(several, r=2, trainable_token_indices={"1": [2]})


@pytest.mark.parametrize("wrong", [[], [1, 1], [-1], [True], 3, {"a": [1.5]}, {}, {1: [2]}])
def test_wrong_settings_are_named(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        LoRAConfig(trainable_token_indices=wrong)
    with pytest.raises(ConfigError, match="set one"):
        LoRAConfig(trainable_token_indices=[1], train_embeddings=True)


def test_the_command_line_takes_them() -> None:
    from jsonargparse import ArgumentParser

    from lightning_lora import LoRACallback

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LoRACallback, "lora")
    for text, wanted in (("[5, 6]", [5, 6]), ("{embed_tokens: [5]}", {"embed_tokens": [5]})):
        parsed = parser.parse_string(f"lora: {{trainable_token_indices: {text}}}")
        built = parser.instantiate_classes(parsed).lora
        assert built.config.trainable_token_indices == wanted


def test_adapters_with_rows_take_turns(tmp_path: Path) -> None:
    model = tied_llama()
    base = logits(model)
    outputs = {}
    for name, tokens in (("first", NEW), ("second", [2]), ("none", None)):
        add_adapter(model, name, trainable_token_indices=tokens, **TARGETS)
        set_adapter(model, name)
        train_a_little(model)
        outputs[name] = logits(model)
    for name, expected in outputs.items():
        set_adapter(model, name)
        assert torch.equal(logits(model), expected)
        merge_lora(model)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
        unmerge_lora(model)
    set_adapter(model, None)
    assert torch.equal(logits(model), base)
    with pytest.raises(ConfigError, match="trains rows of embeddings"):
        add_weighted_adapter(model, ["first", "none"], [0.5, 0.5], "both", "cat")
    with pytest.raises(ConfigError, match="'first' trains"), adapter_per_row(model, ["first"] * 2):
        pass


def test_rows_of_a_table_with_several_names(tmp_path: Path) -> None:
    # Of these the list means the second that shares the table.
    model: Any = marian()
    plan = inject_lora(model, r=2, alpha=6, target_modules="qv", trainable_token_indices=[3, 5])
    (target,) = plan.tokens
    assert target.name == "model.encoder.embed_tokens" and "model.shared" in target.tied
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    state = adapter_state_dict(model)
    assert state[f"{target.name}.trainable_tokens.rows"].shape == (2, 16)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(value.numel() for value in state.values()) == trained
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = model(ids, decoder_input_ids=ids).logits
    other: Any = marian()
    inject_lora(other, r=2, alpha=6, target_modules="qv", trainable_token_indices=[3, 5])
    load_adapter_state_dict(other, state)
    assert torch.equal(other(ids, decoder_input_ids=ids).logits, expected)
    save_adapter(model, tmp_path)
    loaded: Any = marian()
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(loaded(ids, decoder_input_ids=ids).logits, expected)


def marian() -> nn.Module:
    from transformers import MarianConfig, MarianMTModel

    sizes = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MarianConfig(vocab_size=40, d_model=16, pad_token_id=0, **sizes)
        return MarianMTModel(config).eval()
