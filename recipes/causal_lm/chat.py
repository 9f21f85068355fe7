"""Conversations as text: the tokenizer's chat template, and which of its text is trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.causal_lm.records import ASSISTANT, Message

# For tokenizers without a template of their own. Each answer ends with the end-of-sequence token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:' }}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{{ '\\n' }}"
    "{% else %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Stands for an answer where only what the template puts behind it is wanted.
_MARK = "qzxj"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


class ChatFormat:
    """Renders conversations by a tokenizer's chat template, and finds the assistant's turns.

    A template that marks them (`{% generation %}`) is believed. With any other, a turn is what the
    template adds to the conversation before it, up to and with the end-of-turn token.

    Args:
        tokenizer: A fast tokenizer with a chat template.

    Raises:
        ConfigError: If the tokenizer is not fast, or has no template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} does not say where its tokens stand in a text, so "
                "the assistant's turns cannot be found. Use a fast tokenizer."
            )
        if not tokenizer.chat_template:
            raise ConfigError("The tokenizer has no chat template.")
        self.tokenizer = tokenizer
        self.marks_turns = bool(_GENERATION.search(_template_of(tokenizer)))
        self.special_ids = special_ids(tokenizer)

    def prompt(self, messages: Sequence[Message], where: str) -> str:
        """Return the text after which the assistant's next turn begins.

        Raises:
            DataError: If the template refuses the conversation.
        """
        return self._render(messages, where, add_generation_prompt=True)

    def turns(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        """Return a conversation as text, and the characters of it that the assistant wrote.

        Args:
            messages: The conversation.
            where: Where it is from, for messages.

        Raises:
            DataError: If the template refuses the conversation, or renders its beginning in another
                way when more follows.
        """
        text = self._render(messages, where)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                start = self._render(messages[:number], where, add_generation_prompt=True)
                end = self._render(messages[: number + 1], where)
                if not (text.startswith(start) and text.startswith(end) and len(end) > len(start)):
                    raise DataError(
                        f"{where}: the chat template renders the beginning of the conversation in "
                        f"another way when more follows (message {number + 1}), so it cannot be "
                        "said which tokens are the assistant's. Set data.chat_template to a "
                        "template that marks them with {% generation %} ... {% endgeneration %}."
                    )
                spans.append((len(start), len(end)))
        return text, spans

    def encode(self, conversations: Sequence[tuple[list[Message], str]]) -> list[tuple[Any, Any]]:
        """Tokenize conversations.

        Args:
            conversations: Each with where it is from.

        Returns:
            For each its tokens, and for each token whether it is the assistant's: two lists.
        """
        if not conversations:
            return []
        if self.marks_turns:
            return [self._encode_marked(messages, where) for messages, where in conversations]
        rendered = [self.turns(messages, where) for messages, where in conversations]
        encoded = self.tokenizer(
            [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True
        )
        found = []
        for ids, offsets, (text, spans) in zip(
            encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True
        ):
            turns = [
                [n for n, (first, _) in enumerate(offsets) if start <= first < end]
                for start, end in spans
            ]
            borders = {start for start, _ in spans}
            if any(first < border < last for first, last in offsets for border in borders):
                # A token reaches into an answer. As a prompt, what is before it stands alone.
                ids, turns = self._in_parts(text, spans)
            trained = [False] * len(ids)
            for inside in turns:
                for n in self._without_tail(ids, inside):
                    trained[n] = True
            found.append(self._ended(ids, trained))
        return found

    def _in_parts(self, text: str, spans: list[Span]) -> tuple[list[int], list[list[int]]]:
        """Tokenize what is before an answer, the answer, and so on, each by itself."""
        ids: list[int] = []
        turns = []
        place = 0
        for start, end in [*spans, (len(text), len(text))]:
            for part, mine in ((text[place:start], False), (text[start:end], True)):
                tokens = self.tokenizer(part, add_special_tokens=False)["input_ids"]
                if mine:
                    turns.append(list(range(len(ids), len(ids) + len(tokens))))
                ids += tokens
            place = end
        return ids, turns

    def _without_tail(self, ids: list[int], inside: list[int]) -> list[int]:
        """Leave out what follows the end of a turn: as a rule a line break of the template's."""
        last = max((n for n in inside if ids[n] in self.special_ids), default=None)
        if last is None or self.tokenizer.decode(ids[last + 1 : inside[-1] + 1]).strip():
            return inside
        return [n for n in inside if n <= last]

    def _encode_marked(self, messages: list[Message], where: str) -> tuple[Any, Any]:
        encoded = self._apply(
            messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        trained = [bool(mark) for mark in encoded["assistant_masks"]]
        return self._ended(encoded["input_ids"], trained)

    def _ended(self, ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
        """Have the last answer's end trained, which is what stops a generation."""
        last = max((n for n, mine in enumerate(trained) if mine), default=None)
        eos = self.tokenizer.eos_token_id
        if last is None or ids[last] in self.special_ids:
            return ids, trained
        if last + 1 < len(ids):
            if ids[last + 1] in self.special_ids:
                trained[last + 1] = True
            return ids, trained
        return (ids, trained) if eos is None else ([*ids, eos], [*trained, True])

    def _render(self, messages: Sequence[Message], where: str, **options: Any) -> str:
        if not messages:
            raise DataError(f"{where}: the conversation begins with the assistant.")
        return str(self._apply(messages, where, tokenize=False, **options))

    def _apply(self, messages: Sequence[Message], where: str, **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(list(messages), **options)
        except (TemplateError, TypeError, KeyError) as error:
            raise DataError(
                f"{where}: the chat template cannot render the conversation: {error}"
            ) from error


def settle_template(tokenizer: Any, chosen: str | None) -> bool:
    """Give a tokenizer the template that the settings choose, or the plain one if it has none.

    Args:
        tokenizer: The tokenizer; an exported model takes the template along.
        chosen: A file with a template, or the template itself; None keeps the tokenizer's own.

    Returns:
        Whether the plain template was taken.

    Raises:
        ConfigError: If the template cannot be read, or there is no token to end an answer with.
    """
    if chosen is not None:
        tokenizer.chat_template = read_template(chosen)
    elif not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise ConfigError(
                "The tokenizer has neither a chat template nor an end-of-sequence token, so "
                "answers would have no end. Set data.chat_template."
            )
        tokenizer.chat_template = PLAIN_TEMPLATE
        return True
    return False


def read_template(chosen: str) -> str:
    """Return a template that is given as a file or as itself.

    Raises:
        ConfigError: If there is no such file.

    Example:
        >>> read_template("{{ messages[0]['content'] }}")
        "{{ messages[0]['content'] }}"
    """
    if "{{" in chosen or "{%" in chosen:
        return chosen
    try:
        return Path(chosen).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template: {chosen} cannot be read ({error}). Give a file with a Jinja "
            "template, or the template itself."
        ) from error


def special_ids(tokenizer: Any) -> set[int]:
    """Return the tokens that are no text, such as the end of a turn."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(n for n, token in added.items() if token.special)}


def stop_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end a generation: the end of the sequence, and of a chat's turn.

    Args:
        tokenizer: A tokenizer with or without a chat template.
    """
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        probe = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": _MARK}]
        try:
            text = tokenizer.apply_chat_template(probe, tokenize=False)
        except Exception:  # a template for other conversations; the end of the sequence remains
            return found
        after = tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
        end = next((token for token in after if token in special_ids(tokenizer)), None)
        if end is not None and end not in found:
            found.append(end)
    return found


def _template_of(tokenizer: Any) -> str:
    """The text of the template; some tokenizers have several by name."""
    template = tokenizer.chat_template
    return str(template["default"]) if isinstance(template, dict) else str(template)
