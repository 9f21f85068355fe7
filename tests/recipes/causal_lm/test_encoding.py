"""Pairs and plain text in tokens, and which of them are trained, token by token."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_lora.recipes.causal_lm.encoding import (
    encode_pairs,
    encode_prompts,
    fill,
    opening_ids,
    template_problems,
    text_blocks,
)
from tests.recipes.causal_lm.material import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def bos_tokenizer() -> Any:
    return make_tokenizer(bos=True)


def test_the_space_before_a_completion_goes_with_it() -> None:
    assert fill("{prompt} ->  {completion}!", "a {completion}", "b") == (
        "a {completion} ->",
        "  b!",
    )
    assert fill("{prompt}\n{completion}", "a ", "b") == ("a \n", "b")
    assert fill("{prompt}{completion}", "a ", "b") == ("a ", "b")


def test_templates_need_both_places_in_order() -> None:
    assert template_problems("{prompt}<|endoftext|> {completion}") == []
    assert len(template_problems("x")) == 2
    assert "before the prompt" in template_problems("{completion} {prompt}")[0]


def test_completions_and_their_end_are_trained(tokenizer: Any) -> None:
    pairs = [fill("{prompt}<|endoftext|> {completion}", "name[Cocum]", "Cocum serves food.")]
    (found,) = encode_pairs(tokenizer, pairs, [])
    trained = [token for token, mine in zip(found.ids, found.trained, strict=True) if mine]
    given = [token for token, mine in zip(found.ids, found.trained, strict=True) if not mine]
    assert tokenizer.decode(given) == "name[Cocum]<|endoftext|>"
    assert tokenizer.decode(trained) == " Cocum serves food.<|endoftext|>"
    # The end-of-sequence token in the prompt is not trained, the one at the end is.
    assert found.ids.count(tokenizer.eos_token_id) == 2
    assert found.trained == sorted(found.trained)
    assert found.targets == len(trained)


def test_a_token_over_the_border_is_divided_as_the_prompt_alone_is(tokenizer: Any) -> None:
    """`serves` is one token here: a prompt `ser` has tokens of its own."""
    whole = tokenizer("Cocum serves", add_special_tokens=False)["input_ids"]
    head = tokenizer("Cocum ser", add_special_tokens=False)["input_ids"]
    assert whole[: len(head)] != head, "the tokenizer joins them"
    (found,) = encode_pairs(tokenizer, [("Cocum ser", "ves")], [])
    assert found.ids[: len(head)] == head
    assert found.trained == [False] * len(head) + [True] * (len(found.ids) - len(head))
    assert tokenizer.decode(found.ids) == "Cocum serves<|endoftext|>"
    assert encode_prompts(tokenizer, ["Cocum ser"], []) == [head]


def test_prompts_are_trained_too_where_wanted(tokenizer: Any) -> None:
    (found,) = encode_pairs(tokenizer, [("a", " b")], [], whole=True)
    assert all(found.trained)
    assert found.targets == len(found.ids) - 1, "the first has nothing before it"


def test_opening_tokens_stand_before_prompts(tokenizer: Any, bos_tokenizer: Any) -> None:
    assert opening_ids(tokenizer) == []
    assert opening_ids(bos_tokenizer) == [1]
    (found,) = encode_pairs(bos_tokenizer, [("Cocum", " food")], [1])
    assert found.ids[0] == 1 and found.ids.count(1) == 1
    (prompt,) = encode_prompts(bos_tokenizer, ["Cocum"], [1])
    assert found.ids[: len(prompt)] == prompt
    assert found.trained == [n >= len(prompt) for n in range(len(found.ids))]


def test_no_prompt_is_without_a_token(tokenizer: Any) -> None:
    assert encode_prompts(tokenizer, [""], []) == [[tokenizer.eos_token_id]]


def test_an_end_that_is_written_out_is_not_doubled(tokenizer: Any) -> None:
    (found,) = encode_pairs(tokenizer, [("a", " b<|endoftext|>")], [])
    assert found.ids.count(tokenizer.eos_token_id) == 1


def _documents(*texts: str) -> list[list[tuple[str, bool]]]:
    return [[(text, False)] for text in texts]


def test_text_runs_on_over_documents_with_their_ends_between(tokenizer: Any) -> None:
    texts = ["Cocum serves food.", "Aromi.", "Strada serves Indian food near the city."]
    blocks = list(text_blocks(tokenizer, _documents(*texts), 5, [], apart=False))
    assert all(len(block) == 5 for block in blocks[:-1]) and len(blocks[-1]) > 1
    joined = [token for block in blocks for token in block]
    whole = tokenizer("<|endoftext|>".join([*texts, ""]))["input_ids"]
    # A block of a single token could predict nothing.
    assert joined == whole[: len(joined)] and len(whole) - len(joined) <= 1


def test_blocks_apart_end_with_their_documents(tokenizer: Any) -> None:
    texts = ["Cocum serves food.", "Aromi.", "Strada serves Indian food near the city."]
    blocks = list(text_blocks(tokenizer, _documents(*texts), 5, [], apart=True))
    ends = [block[-1] == tokenizer.eos_token_id for block in blocks]
    assert sum(ends) == 3
    assert all(tokenizer.eos_token_id not in block[:-1] for block in blocks)


def test_pieces_of_a_document_have_no_end_between_them(bos_tokenizer: Any) -> None:
    pieces = [[("Cocum serves\n", True), ("Aromi serves\n", True)], [("Strada\n", False)]]
    (block,) = text_blocks(bos_tokenizer, pieces, 1000, [1], apart=False)
    assert bos_tokenizer.decode(block) == (
        "<|im_start|>Cocum serves\nAromi serves\nStrada\n<|endoftext|>"
    )
