"""The data module: kinds of data, what is held out, what is said of rows that cannot be used."""

from __future__ import annotations

import csv
import random
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.causal_lm import CausalLMDataModule
from lightning_lora.recipes.causal_lm.batches import ExampleCollator, PromptCollator
from tests.recipes.causal_lm.material import NAMES, pair, write_lines, write_pairs


def _text(data: CausalLMDataModule, row: Any) -> tuple[str, str]:
    """What of an example is not trained, and what is."""
    ids, trained = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["trained"])
    return data.tokenizer.decode(ids[~trained]), data.tokenizer.decode(ids[trained])


def _quiet(data: CausalLMDataModule, split: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data.encoded(split)


# ---- kinds ------------------------------------------------------------------------------------


def test_pairs_are_joined_by_the_template(lm_model: Path, lm_data: Path) -> None:
    data = CausalLMDataModule(
        train_file=str(lm_data / "train.csv"),
        validation_file=str(lm_data / "validation.csv"),
        prompt_column="mr",
        completion_column="ref",
        template="{prompt}<|endoftext|> {completion}",
        tokenizer=str(lm_model),
    )
    data.setup("fit")
    with (lm_data / "train.csv").open(encoding="utf-8") as stream:
        first = next(csv.DictReader(stream))
    assert _text(data, data.encoded("train")[0]) == (
        f"{first['mr']}<|endoftext|>",
        f" {first['ref']}<|endoftext|>",
    )
    assert len(data.encoded("train")) == 96


def test_without_a_template_pairs_stand_on_lines_of_their_own(
    lm_model: Path, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"question": "Hi", "answer": 72})
    data = CausalLMDataModule(test_file=file, tokenizer=str(lm_model))
    assert _text(data, data.encoded("test")[0]) == ("Hi\n", "72<|endoftext|>")


def test_pairs_are_chats_where_the_tokenizer_has_a_template(
    chat_model: Path, tmp_path: Path
) -> None:
    file = write_lines(
        tmp_path / "a.jsonl", {"instruction": "Hi", "input": "You", "output": "Hello"}
    )
    chat = CausalLMDataModule(test_file=file, tokenizer=str(chat_model), system_prompt="Be brief.")
    assert _text(chat, chat.encoded("test")[0]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n\nYou<|im_end|>\n"
        "<|im_start|>assistant\n\n",
        "Hello<|im_end|>",
    )
    plain = CausalLMDataModule(
        test_file=file, tokenizer=str(chat_model), template="{prompt} {completion}"
    )
    assert _text(plain, plain.encoded("test")[0]) == ("Hi\n\nYou", " Hello<|im_end|>")


@pytest.mark.parametrize("model", ["lm_model", "chat_model"])
def test_conversations(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file = write_lines(
        tmp_path / "a.jsonl",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    )
    folder = str(request.getfixturevalue(model))
    data = CausalLMDataModule(test_file=file, tokenizer=folder)
    expected = {
        "lm_model": ("User: Hi\nAssistant:\n", " Hello<|endoftext|>"),
        "chat_model": (
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\n",
            "Hello<|im_end|>",
        ),
    }
    assert _text(data, data.encoded("test")[0]) == expected[model]
    # An exported model takes the template along.
    assert data.tokenizer.chat_template


def test_prompts_are_trained_where_wanted(lm_model: Path, lm_data: Path) -> None:
    data = CausalLMDataModule(
        test_file=str(lm_data / "test.jsonl"), tokenizer=str(lm_model), train_on_prompt=True
    )
    assert all(all(row["trained"]) for row in data.encoded("test"))


def test_text_is_cut_into_blocks(lm_model: Path, tmp_path: Path) -> None:
    text = "".join(f"{pair(random.Random(n), long=True)[1]}\n" for n in range(300))
    (tmp_path / "a.txt").write_text(text)
    data = CausalLMDataModule(
        train_file=str(tmp_path / "a.txt"), tokenizer=str(lm_model), max_length=32
    )
    data.setup("fit")
    train, held_out = data.encoded("train"), data.encoded("validation")
    assert set(train["length"][:-1].tolist()) == {32}
    both = [token for rows in (train, held_out) for row in rows for token in row["input_ids"]]
    assert data.tokenizer.decode(both) == f"{text}<|endoftext|>", "the end is held out"
    share = held_out["length"][:].sum() / len(both)
    assert 0.05 < share < 0.25


def test_packed_documents_are_apart(lm_model: Path, tmp_path: Path) -> None:
    texts = [pair(random.Random(n), long=n % 2 == 0)[1] for n in range(60)]
    file = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    data = CausalLMDataModule(
        test_file=file, tokenizer=str(lm_model), max_length=40, packing=True, batch_size=4
    )
    rows = data.encoded("test")
    assert len(rows) < 30
    found = []
    for row in rows:
        for part in torch.as_tensor(row["input_ids"]).split(row["parts"].tolist()):
            found.append(data.tokenizer.decode(part))
    assert sorted(found) == sorted(f"{text}<|endoftext|>" for text in texts)


def test_a_dataset_in_a_folder_like_one_on_the_hub(chat_model: Path, tmp_path: Path) -> None:
    messages = [
        [{"role": "user", "content": name}, {"role": "assistant", "content": f"{name} food."}]
        for name in NAMES
    ]
    datasets.Dataset.from_dict({"messages": messages}).to_parquet(tmp_path / "train.parquet")
    data = CausalLMDataModule(
        dataset=str(tmp_path), tokenizer=str(chat_model), validation_share=0.4
    )
    data.setup("fit")
    assert (len(data.encoded("train")), len(data.encoded("validation"))) == (4, 2)
    assert _text(data, data.encoded("train")[0])[1].endswith(" food.<|im_end|>")


# ---- what is held out, and prompts --------------------------------------------------------------


def test_rows_with_one_prompt_are_held_out_together(lm_model: Path, lm_data: Path) -> None:
    data = CausalLMDataModule(
        train_file=str(lm_data / "train.csv"),
        prompt_column="mr",
        completion_column="ref",
        validation_share=0.3,
        tokenizer=str(lm_model),
    )
    data.setup("fit")
    train, held_out = (set(data.table(s).columns["mr"]) for s in ("train", "validation"))
    assert train and held_out and not train & held_out
    assert len(data.table("train")) + len(data.table("validation")) == 96


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_each_prompt_is_generated_once_with_all_its_references(
    lm_model: Path, tmp_path: Path, suffix: str
) -> None:
    pairs = [("a", "one"), ("b", "two"), ("a", "three"), ("c", ""), ("b", "four")]
    file = tmp_path / f"test.{suffix}"
    if suffix == "csv":
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([("prompt", "completion"), *pairs])
    else:
        chats = (
            [{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c in pairs
        )
        write_lines(file, *({"messages": chat} for chat in chats))
    data = CausalLMDataModule(test_file=str(file), tokenizer=str(lm_model))
    rows = list(data.encoded("prompts"))
    assert [(row["prompt"], row["references"]) for row in rows] == [
        ("a", ["one", "three"]),
        ("b", ["two", "four"]),
    ]
    example = _quiet(data, "test")[0]
    given = torch.as_tensor(example["input_ids"])[~torch.as_tensor(example["trained"])].tolist()
    assert given[: len(rows[0]["input_ids"])] == rows[0]["input_ids"]
    assert len(data.encoded("test")) == 4


def test_prompts_to_predict_need_no_answers(chat_model: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    asked = [*chat, {"role": "user", "content": "You"}]
    files = {
        "messages": write_lines(tmp_path / "m.jsonl", {"messages": chat}, {"messages": asked}),
        "pairs": write_lines(tmp_path / "p.jsonl", {"mr": "Hi"}, {"mr": "You"}),
        "lines": str(tmp_path / "l.txt"),
    }
    (tmp_path / "l.txt").write_text("Hi\n\nYou\n")

    def prompts(file: str, **settings: Any) -> list[str]:
        data = CausalLMDataModule(predict_file=file, tokenizer=str(chat_model), **settings)
        return [data.tokenizer.decode(row["input_ids"]) for row in data.encoded("predict")]

    ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    after = f"{ask.format('Hi')}Hello<|im_end|>\n{ask.format('You')}"
    columns = {"prompt_column": "mr", "completion_column": "ref"}
    assert prompts(files["messages"]) == [ask.format("Hi"), after]
    assert prompts(files["pairs"], **columns) == [ask.format("Hi"), ask.format("You")]
    assert prompts(files["lines"], **columns) == [ask.format("Hi"), ask.format("You")]
    assert prompts(files["lines"], messages_column="messages") == prompts(files["pairs"], **columns)
    assert prompts(files["lines"], template="Q: {prompt} A: {completion}", **columns) == [
        "Q: Hi A:",
        "Q: You A:",
    ]
    assert prompts(files["lines"]) == ["Hi", "You"], "of plain text, the text itself"


def test_long_prompts_lose_their_beginning(lm_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hi\n" + "Cocum food " * 100 + "Strada\n")
    data = CausalLMDataModule(predict_file=str(tmp_path / "a.txt"), tokenizer=str(lm_model))
    with pytest.warns(UserWarning, match=r"1 prompts are longer than the 128 tokens"):
        rows = data.encoded("predict")
    assert max(rows["length"]) == 128
    assert data.tokenizer.decode(rows[1]["input_ids"]).endswith("food Strada")


# ---- batches ------------------------------------------------------------------------------------


def test_batches_mark_padding_by_length_and_not_by_token() -> None:
    rows = [
        {"input_ids": [5, 6, 0], "trained": [False, True, True], "row": 4},
        {"input_ids": [7, 8, 9, 0, 3], "trained": [True] * 5, "row": 2},
    ]
    batch = ExampleCollator(0, packed=False)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0, 0], [7, 8, 9, 0, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [[-100, 6, 0, -100, -100], [-100, 8, 9, 0, 3]]
    assert batch["columns"].tolist() == [0, 1, 2, 3]
    assert batch["row"].tolist() == [4, 2]


def test_no_example_predicts_the_first_token_of_the_next() -> None:
    rows = [
        {"input_ids": [5, 6, 0, 7, 8], "trained": [True] * 5, "parts": [3, 2], "row": 0},
        {"input_ids": [9, 0], "trained": [True] * 2, "parts": [2], "row": 1},
    ]
    batch = ExampleCollator(0, packed=True)(rows)
    assert batch["labels"].tolist() == [[-100, 6, 0, -100, 8], [-100, 0, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["columns"].tolist() == [0, 1, 3]


def test_prompts_are_padded_on_the_left() -> None:
    rows = [
        {"input_ids": [5], "prompt": "a", "references": ["x", "y"], "row": 1},
        {"input_ids": [6, 7, 8], "prompt": "b", "row": 0},
    ]
    batch = PromptCollator(9)(rows)
    assert batch["input_ids"].tolist() == [[9, 9, 5], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert (batch["prompt"], batch["references"]) == (["a", "b"], [["x", "y"], []])


@pytest.mark.parametrize(("packing", "most"), [(False, 0.05), (True, 0.02)])
def test_little_is_padding(lm_model: Path, tmp_path: Path, packing: bool, most: float) -> None:
    write_pairs(tmp_path / "a.csv", 1500, 0)
    data = CausalLMDataModule(
        train_file=str(tmp_path / "a.csv"),
        prompt_column="mr",
        completion_column="ref",
        tokenizer=str(lm_model),
        packing=packing,
        max_length=128,
        batch_size=8,
    )
    data.setup("fit")
    assert data.padding("train") < most
    if not packing:
        data.group_by_length = False
        assert data.padding("train") > 3 * most


# ---- bad input ----------------------------------------------------------------------------------


def _data(folder: Path, model: Path, *records: Any, **settings: Any) -> CausalLMDataModule:
    file = write_lines(folder / "a.jsonl", *records)
    return CausalLMDataModule(test_file=file, tokenizer=str(model), **settings)


def test_rows_that_cannot_be_used_are_counted(lm_model: Path, tmp_path: Path) -> None:
    long = "Cocum food " * 30
    rows = [
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "completion": " "},
        {"prompt": "Hi", "completion": None},
        {"prompt": long, "completion": "Hello"},
        {"prompt": "Hi", "completion": long},
    ]
    data = _data(tmp_path, lm_model, *rows, max_length=20)
    with pytest.warns(UserWarning) as caught:
        examples = data.encoded("test")
    said = " ".join(str(warning.message) for warning in caught)
    assert "of 5 rows 2 have no completion and 1 have a prompt that leaves no room" in said
    assert "1 examples are longer than 20 tokens" in said
    assert len(examples) == 2
    # A completion that was cut off has no end to be trained.
    assert examples[1]["length"] == 20
    assert data.tokenizer.eos_token_id not in examples[1]["input_ids"]
    assert data.tokenizer.eos_token_id in examples[0]["input_ids"]


def test_no_row_that_can_be_used(lm_model: Path, chat_model: Path, tmp_path: Path) -> None:
    empty = _data(tmp_path, lm_model, *[{"prompt": "a", "completion": ""}] * 3)
    with pytest.raises(DataError, match=r"none of the 3 rows can be used: 3 have no completion"):
        empty.encoded("test")
    with pytest.raises(DataError, match="no row has a completion to compare with"):
        empty.encoded("prompts")
    row = {"prompt": "Cocum food " * 9, "completion": "b"}
    with pytest.raises(DataError, match=r"no room for a completion in 8.*Raise data\.max_length"):
        _data(tmp_path, lm_model, row, max_length=8).encoded("test")
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    with pytest.raises(DataError, match="1 have no completion"):
        _data(tmp_path, chat_model, chat).encoded("test")
    with pytest.raises(DataError, match="there is no text in them"):
        _data(tmp_path, lm_model, {"text": ""}).encoded("test")


def test_columns_of_a_wrong_kind(lm_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the column 'completion' holds a list"):
        rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ["b"]}]
        _data(tmp_path, lm_model, *rows).encoded("test")
    with pytest.raises(DataError, match=r"line 1: the column 'text' holds an object and not text"):
        _data(tmp_path, lm_model, {"text": {"a": 1}}).encoded("test")
    with pytest.raises(DataError, match=r"holds text and not a list of messages.*text_column"):
        _data(tmp_path, lm_model, {"messages": "Hi"}).encoded("test")


def test_files_that_do_not_fit_the_settings(lm_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hi\n")
    pairs = {"prompt_column": "mr", "completion_column": "ref"}
    with pytest.raises(DataError, match="no column 'mr'"):
        CausalLMDataModule(test_file=str(tmp_path / "a.txt"), **pairs).setup("test")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8"):
        CausalLMDataModule(test_file=str(tmp_path / "latin.txt")).setup("test")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        CausalLMDataModule(test_file=str(tmp_path / "empty.jsonl")).setup("test")
    with pytest.raises(DataError, match=r"no test data: set data\.test_file"):
        CausalLMDataModule(train_file=str(tmp_path / "a.txt")).setup("test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"messages_column": "m", "text_column": "t"}, "name different kinds of data"),
        ({"completion_column": "c"}, "completion_column needs prompt_column"),
        ({"template": "{prompt} {answer}"}, "does not have {completion} exactly once"),
        (
            {"template": "{prompt} {completion}", "chat_template": "{{ 1 }}", "system_prompt": "s"},
            "give either template or chat_template, not both; system_prompt is for chat templates",
        ),
        ({"documents": "lines"}, "documents is 'lines' (did you mean 'line'?), not one of file"),
        ({"max_length": 1}, "max_length is 1, not at least 2"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CausalLMDataModule(train_file="a.csv", **settings)
    assert message in str(caught.value)


def test_tokens_are_made_once(lm_model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    settings: dict[str, Any] = {
        "test_file": file,
        "tokenizer": str(lm_model),
        "cache_dir": str(tmp_path / "cache"),
    }
    for _ in range(2):
        data = CausalLMDataModule(packing=True, **settings)
        data.encoded("test")
        data.encoded("prompts")
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 3
    other = CausalLMDataModule(template="{prompt}: {completion}", **settings)
    assert _text(other, other.encoded("test")[0]) == ("a:", " b<|endoftext|>")
