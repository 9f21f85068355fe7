"""The module: its loss, perplexity, generation and scores, on tiny decoders with LoRA."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import seed_everything

from lightning_lora import inject_lora
from lightning_lora.errors import ConfigError
from lightning_lora.recipes.causal_lm import CausalLM, CausalLMDataModule
from lightning_lora.recipes.causal_lm.attention import BY_ONE_ROW
from lightning_lora.recipes.causal_lm.batches import ExampleCollator, PromptCollator
from tests.models import shake
from tests.recipes.causal_lm.material import (
    CHAT_TEMPLATE,
    make_tokenizer,
    make_trainer,
    save_model,
    write_lines,
)

PAIRS: dict[str, Any] = {"prompt_column": "mr", "completion_column": "ref"}


def _pairs(folder: Path, *splits: str, **settings: Any) -> CausalLMDataModule:
    files = {f"{split}_file": str(folder / f"{split}.csv") for split in splits}
    return CausalLMDataModule(**{**files, **PAIRS, "max_length": 64, "batch_size": 8, **settings})


@pytest.fixture(scope="module")
def fitted(lm_model: Path, lm_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that has learnt the pairs, what it logged before and after, and its checkpoint."""
    root = tmp_path_factory.mktemp("fitted")
    seed_everything(1)
    data = _pairs(lm_data, "train", "validation", "test")
    model = CausalLM(str(lm_model), learning_rate=1e-2, max_new_tokens=24)
    (before,) = make_trainer(default_root_dir=root).validate(model, data, verbose=False)
    trainer = make_trainer(max_epochs=8, default_root_dir=root)
    trainer.fit(model, data)
    trainer.save_checkpoint(root / "model.ckpt")
    return model, before, dict(trainer.callback_metrics), root


# ---- loss and perplexity ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_packed_examples_have_the_loss_and_gradient_that_they_have_apart(
    kind: str, tmp_path: Path, lm_data: Path
) -> None:
    folder = save_model(tmp_path / kind, kind, attention_dropout=0.0)
    results = []
    for packing in (False, True):
        data = _pairs(lm_data, "test", packing=packing, tokenizer=str(folder))
        model = CausalLM(str(folder))
        model.configure_model()
        model.model.eval()
        rows = list(data.encoded("test"))
        losses, targets = model._losses(ExampleCollator(0, packing)(rows), smoothing=0.1)
        (losses.sum() / targets.sum()).backward()
        gradient = {name: p.grad for name, p in model.named_parameters()}
        results.append((len(rows), int(targets.sum()), losses.sum().detach(), gradient))
    apart, packed = results
    assert packed[0] < apart[0] / 1.5
    assert packed[1] == apart[1]
    torch.testing.assert_close(packed[2], apart[2], rtol=1e-5, atol=1e-5)
    for name, gradient in apart[3].items():
        torch.testing.assert_close(packed[3][name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_models_that_compute_all_logits_have_the_same_loss(
    packing: bool, lm_model: Path, lm_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _pairs(lm_data, "test", packing=packing, tokenizer=str(lm_model))
    model = CausalLM(str(lm_model))
    model.configure_model()
    batch = ExampleCollator(0, packing)(list(data.encoded("test")))
    expected = model._losses(batch)[0]
    if packing:
        model._way = BY_ONE_ROW
    else:
        monkeypatch.setattr(
            "lightning_lora.recipes.causal_lm.module.accepts", lambda model, name: False
        )
    torch.testing.assert_close(model._losses(batch)[0], expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(lm_model: Path, lm_data: Path) -> None:
    data = _pairs(lm_data, "test", packing=True, tokenizer=str(lm_model))
    batch = ExampleCollator(0, True)(list(data.encoded("test")))
    gradients = []
    for checkpointing in (False, True):
        model = CausalLM(str(lm_model), gradient_checkpointing=checkpointing)
        model.configure_model()
        assert model.model.is_gradient_checkpointing == checkpointing
        inject_lora(model, r=4, alpha=8, seed=1)
        shake(model)
        model._losses(batch)[0].sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_perplexity_is_over_tokens_and_not_over_batches(lm_model: Path, tmp_path: Path) -> None:
    """By hand: each example alone through the model, lengths as unequal as can be."""
    answers = ["Cocum", "food " * 20, "Strada serves", "Aromi serves Chinese food near the city."]
    file = write_lines(tmp_path / "a.jsonl", *({"prompt": "Hi", "completion": a} for a in answers))
    data = CausalLMDataModule(validation_file=file, batch_size=1, max_length=100)
    model = CausalLM(str(lm_model))
    (scores,) = make_trainer().validate(model, data, verbose=False)
    total, count, means = 0.0, 0, []
    for answer in answers:
        given = model.tokenizer("Hi\n")["input_ids"]
        ids = [*given, *model.tokenizer(answer)["input_ids"], model.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids])).logits[0].double()
        targets = torch.tensor(ids[len(given) :])
        loss = F.cross_entropy(logits[len(given) - 1 : -1], targets, reduction="sum").item()
        total, count = total + loss, count + len(targets)
        means.append(loss / len(targets))
    assert scores["val/loss"] == pytest.approx(total / count, rel=1e-5)
    assert scores["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert abs(sum(means) / len(means) - total / count) > 1e-2


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("packing", [False, True])
def test_perplexity_depends_on_neither_batches_nor_packing(
    lm_model: Path, lm_data: Path, batch_size: int, packing: bool
) -> None:
    reference = _pairs(lm_data, "validation", batch_size=21)
    data = _pairs(lm_data, "validation", batch_size=batch_size, packing=packing)
    model = CausalLM(str(lm_model))
    (expected,) = make_trainer().validate(model, reference, verbose=False)
    (found,) = make_trainer().validate(model, data, verbose=False)
    assert found == pytest.approx(expected, rel=1e-5)


def test_training_loss_is_the_mean_over_the_batchs_tokens(lm_model: Path, lm_data: Path) -> None:
    data = _pairs(lm_data, "train", "validation", batch_size=96, shuffle=False)
    model = CausalLM(str(lm_model), learning_rate=0.0, label_smoothing=0.2, sample_prompts=[])
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(model, data)
    batch = ExampleCollator(0, False)(list(data.encoded("train")))
    with torch.no_grad():
        logits = model.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.2
    )
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(expected), rel=1e-5)


# ---- fit, test, predict -------------------------------------------------------------------------


def test_it_learns(fitted: Any) -> None:
    _, before, after, _ = fitted
    assert set(before) == {"val/loss", "val/perplexity"}
    assert set(after) == {"train/loss", "lr", "val/loss", "val/perplexity"}
    assert before["val/perplexity"] > 100
    assert after["val/perplexity"] < before["val/perplexity"] / 10
    assert after["val/perplexity"] == pytest.approx(math.exp(after["val/loss"]), rel=1e-5)


def test_the_checkpoint_tests_and_predicts(
    fitted: Any, lm_model: Path, lm_data: Path, tmp_path: Path
) -> None:
    _, _, _, root = fitted
    data = _pairs(lm_data, "test", predict_file=str(lm_data / "test.csv"), eval_batch_size=4)
    model = CausalLM(str(lm_model), max_new_tokens=24)
    path = root / "model.ckpt"
    first, second = make_trainer().test(model, data, ckpt_path=path, verbose=False)
    scores = {**first, **second}
    assert set(scores) == {
        *("test/loss", "test/perplexity"),
        *("test/bleu", "test/nist", "test/rouge_l", "test/chrf"),
    }
    files = {suffix: tmp_path / f"out{suffix}" for suffix in (".jsonl", ".csv", ".txt")}
    for file in files.values():
        writer = model.prediction_writer(file)
        make_trainer(writer).predict(model, data, ckpt_path=path, return_predictions=False)
    lines = [json.loads(line) for line in files[".jsonl"].open(encoding="utf-8")]
    with (lm_data / "test.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    # A line for each row of the data, a line of text for each different prompt.
    assert [line["prompt"] for line in lines] == [row["mr"] for row in rows]
    with files[".csv"].open(encoding="utf-8", newline="") as stream:
        assert list(csv.DictReader(stream)) == lines
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row["mr"], []).append(row["ref"])
    texts = files[".txt"].read_text(encoding="utf-8").splitlines()
    generated = {line["prompt"]: line["generation"] for line in lines}
    assert len(references) < len(rows)
    assert texts == [generated[prompt] for prompt in references]
    most = max(map(len, references.values()))
    streams = [[r[n] if n < len(r) else None for r in references.values()] for n in range(most)]
    bleu = sacrebleu.corpus_bleu(texts, streams).score  # type: ignore[arg-type]
    assert scores["test/bleu"] == pytest.approx(bleu, abs=1e-4)
    assert bleu > 10


def test_without_metrics_and_for_plain_text_nothing_is_generated(
    lm_model: Path, lm_data: Path, tmp_path: Path
) -> None:
    names = {"test/loss", "test/perplexity"}
    model = CausalLM(str(lm_model), metrics=[])
    (scores,) = make_trainer().test(model, _pairs(lm_data, "test"), verbose=False)
    assert set(scores) == names
    (tmp_path / "a.txt").write_text("Cocum serves food.\n" * 20)
    data = CausalLMDataModule(test_file=str(tmp_path / "a.txt"))
    (scores,) = make_trainer().test(CausalLM(str(lm_model)), data, verbose=False)
    assert set(scores) == names


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_padding_changes_no_generation(kind: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / kind, kind)
    model = CausalLM(str(folder), max_new_tokens=6)
    model.setup("predict")
    model.configure_model()
    model.model.eval()
    prompts = [[5, 9, 3, 11, 30, 31], [7], [12, 13, 14]]
    rows = [{"input_ids": ids, "prompt": "", "row": n} for n, ids in enumerate(prompts)]
    collate = PromptCollator(model.tokenizer.pad_token_id)
    alone = [model.generate(collate([row]))[0] for row in rows]
    assert model.generate(collate(rows)) == alone
    assert len(set(alone)) > 1


def test_generation_stops_at_the_end_of_a_turn(tmp_path: Path, lm_data: Path) -> None:
    folder = save_model(tmp_path / "chat", "llama", CHAT_TEMPLATE)
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    seed_everything(0)
    files = {f"{s}_file": str(lm_data / f"{s}.jsonl") for s in ("train", "validation", "test")}
    data = CausalLMDataModule(**files, max_length=64, batch_size=8)
    model = CausalLM(
        str(folder), learning_rate=1e-2, max_new_tokens=40, metrics=["bleu"], sample_prompts=[]
    )
    trainer = make_trainer(max_epochs=5, default_root_dir=tmp_path)
    trainer.fit(model, data)
    batch = data.collator("prompts")(list(data.encoded("prompts"))[:4])
    tokens = model.model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=40
    )
    for text, ids in zip(model.generate(batch), tokens.tolist(), strict=True):
        raw = tokenizer.decode(ids[batch["input_ids"].shape[1] :])
        assert "<|im_end|>" in raw
        assert text == raw.partition("<|im_end|>")[0].strip()
        assert text.endswith(".")


def test_beams_and_sampling_are_passed_on(lm_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"num_beams": 3, "length_penalty": 0.9, "no_repeat_ngram_size": 4}
    model = CausalLM(str(lm_model), max_new_tokens=5, **settings)
    model.setup("predict")
    model.configure_model()
    model.model.eval()
    batch = PromptCollator(0)([{"input_ids": [5, 9, 3], "prompt": "", "row": 0}])
    asked = {}
    original = model.model.generate

    def generate(**options: Any) -> Any:
        asked.update(options)
        return original(**options)

    monkeypatch.setattr(model.model, "generate", generate)
    model.generate(batch)
    assert {name: asked[name] for name in settings} == settings
    assert asked["eos_token_id"] == [0] and asked["max_new_tokens"] == 5
    drawing = CausalLM(str(lm_model), do_sample=True, temperature=5.0, top_p=0.9).decoding
    torch.manual_seed(0)
    drawn = {model.generate(batch, drawing)[0] for _ in range(3)}
    assert len(drawn) == 3
    assert asked["temperature"] == 5.0


# ---- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["blue"]}, "no metric 'blue' (did you mean 'bleu'?)"),
        ({"num_beams": 0, "top_p": 0.0}, "num_beams is 0, not at least 1; top_p is 0.0, not above"),
        ({"temperature": 0.5}, "temperature and top_p need do_sample"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, not from 0"),
        ({"dtype": "flaot32"}, "model.dtype is 'flaot32'"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CausalLM("gpt2", **settings)
    assert message in str(caught.value)


def test_encoder_decoders_are_refused_before_their_weights_are_read(
    tmp_path: Path, lm_data: Path
) -> None:
    from transformers import T5Config

    T5Config(vocab_size=420).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is an encoder-decoder model \(t5\)"):
        make_trainer().validate(CausalLM(str(tmp_path)), _pairs(lm_data, "validation"))


def test_encoders_and_packing_where_it_leaks_are_refused(tmp_path: Path, lm_data: Path) -> None:
    bert = save_model(tmp_path / "bert", "bert")
    with pytest.raises(ConfigError, match="no causal language model"):
        make_trainer().validate(CausalLM(str(bert)), _pairs(lm_data, "validation"))
    bloom = CausalLM(str(save_model(tmp_path / "bloom", "bloom")))
    with pytest.raises(ConfigError, match=r"Set data\.packing to false"):
        make_trainer().validate(bloom, _pairs(lm_data, "validation", packing=True))
    make_trainer().validate(bloom, _pairs(lm_data, "validation"), verbose=False)


def test_no_room_for_a_prompt(lm_model: Path, lm_data: Path) -> None:
    model = CausalLM(str(lm_model), max_new_tokens=128)
    with pytest.raises(ConfigError, match=r"max_new_tokens is 128, and the model takes 128 tokens"):
        make_trainer().test(model, _pairs(lm_data, "test"))
