"""Conversations by chat templates: every turn of the assistant is trained, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.causal_lm.chat import (
    PLAIN_TEMPLATE,
    ChatFormat,
    read_template,
    settle_template,
    stop_ids,
)
from tests.recipes.causal_lm.material import CHAT_TEMPLATE, MARKED_TEMPLATE, make_tokenizer

CONVERSATION = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello Aromi"},
    {"role": "user", "content": "Hello é ☃ Aromi"},
    {"role": "assistant", "content": "Hi\nHi é"},
]


def _parts(tokenizer: Any, messages: list[dict[str, str]]) -> list[tuple[bool, str]]:
    """The text of the conversation in stretches that are trained, or not."""
    ((ids, trained),) = ChatFormat(tokenizer).encode([(messages, "a.jsonl, line 1")])
    assert len(ids) == len(trained)
    stretches: list[tuple[bool, list[int]]] = []
    for token, mine in zip(ids, trained, strict=True):
        if not stretches or stretches[-1][0] != mine:
            stretches.append((mine, []))
        stretches[-1][1].append(token)
    return [(mine, tokenizer.decode(tokens)) for mine, tokens in stretches]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE])
def test_the_assistants_turns_are_trained_with_their_ends(template: str) -> None:
    system = "<|im_start|>system\nYou are brief.<|im_end|>\n"
    assert _parts(make_tokenizer(template), CONVERSATION) == [
        (False, f"{system}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Hello Aromi<|im_end|>"),
        (False, "\n<|im_start|>user\nHello é ☃ Aromi<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Hi\nHi é<|im_end|>"),
        (False, "\n"),
    ]


def test_the_plain_template_is_documented_text() -> None:
    tokenizer = make_tokenizer()
    assert settle_template(tokenizer, None)
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert _parts(tokenizer, CONVERSATION) == [
        (False, "System: You are brief.\nUser: Hi\nAssistant:"),
        (True, " Hello Aromi<|endoftext|>"),
        (False, "\nUser: Hello é ☃ Aromi\nAssistant:"),
        (True, " Hi\nHi é<|endoftext|>"),
        (False, "\n"),
    ]
    prompt = ChatFormat(tokenizer).prompt(CONVERSATION[:2], "line 1")
    assert prompt == "System: You are brief.\nUser: Hi\nAssistant:"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE, PLAIN_TEMPLATE])
def test_a_prompt_has_the_tokens_that_were_trained_after(template: str) -> None:
    tokenizer = make_tokenizer(template)
    chat = ChatFormat(tokenizer)
    ((ids, trained),) = chat.encode([(CONVERSATION[:3], "line 1")])
    prompt = tokenizer(chat.prompt(CONVERSATION[:2], "line 1"), add_special_tokens=False)
    assert ids[: trained.index(True)] == prompt["input_ids"]


def test_an_answer_without_an_end_gets_one() -> None:
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    assert _parts(tokenizer, CONVERSATION[1:3]) == [
        (False, "user: Hi\nassistant: "),
        (True, "Hello Aromi\n<|im_end|>"),
    ]
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]


def test_a_token_over_the_border_is_divided_as_the_prompt_alone_is() -> None:
    """The space that ends the prompt is in one token with the word that follows."""
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    parts = [(False, "user: Hi<|im_end|>assistant: "), (True, "Hello Aromi<|im_end|>")]
    assert _parts(tokenizer, CONVERSATION[1:3]) == parts
    assert _parts(tokenizer, CONVERSATION[1:]) == [
        *parts,
        (False, "user: Hello é ☃ Aromi<|im_end|>assistant: "),
        (True, "Hi\nHi é<|im_end|>"),
    ]
    ((ids, trained),) = ChatFormat(tokenizer).encode([(CONVERSATION[1:3], "line 1")])
    prompt = tokenizer(parts[0][1], add_special_tokens=False)["input_ids"]
    assert ids[: trained.index(True)] == prompt


def test_an_end_outside_the_marks_is_trained() -> None:
    template = MARKED_TEMPLATE.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    found = _parts(make_tokenizer(template), CONVERSATION[1:3])
    assert found[1:] == [(True, "Hello Aromi<|im_end|>"), (False, "\n")]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    """As Qwen 3's drops the thoughts of all answers but the last."""
    template = CHAT_TEMPLATE.replace(
        "message['content'] +", "(message['content'] if loop.last else 'forgotten') +"
    )
    chat = ChatFormat(make_tokenizer(template))
    with pytest.raises(
        DataError, match=r"line 4: the chat template renders the beginning .* \{% generation %\}"
    ):
        chat.encode([(CONVERSATION, "a.jsonl, line 4")])


def test_what_a_template_refuses_is_said_with_its_place() -> None:
    template = "{{ raise_exception('no system message, please') }}"
    chat = ChatFormat(make_tokenizer(template))
    with pytest.raises(DataError, match=r"line 4: .* render .*: no system message, please"):
        chat.encode([(CONVERSATION, "a.jsonl, line 4")])
    chat = ChatFormat(make_tokenizer(CHAT_TEMPLATE))
    with pytest.raises(DataError, match="line 5: the conversation begins with the assistant"):
        chat.encode([(CONVERSATION[2:], "a.jsonl, line 5")])


def test_generations_stop_at_the_end_of_a_turn() -> None:
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    tokenizer.eos_token = "<|endoftext|>"
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert stop_ids(tokenizer) == ends
    assert stop_ids(make_tokenizer()) == [0]


def test_templates_are_files_or_given(tmp_path: Any) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHAT_TEMPLATE)
    tokenizer = make_tokenizer()
    assert not settle_template(tokenizer, str(file))
    assert tokenizer.chat_template == CHAT_TEMPLATE == read_template(CHAT_TEMPLATE)
    with pytest.raises(ConfigError, match=r"chat_template: no\.jinja cannot be read"):
        read_template("no.jinja")


def test_what_cannot_end_or_be_placed_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a chat template nor an end-of-sequence"):
        settle_template(tokenizer, None)
    with pytest.raises(ConfigError, match="no chat template"):
        ChatFormat(tokenizer)

    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="Slow does not say where its tokens stand"):
        ChatFormat(Slow())
