"""What a row of the data says: a conversation, a prompt with its completion, or plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_lora.errors import DataError
from lightning_lora.recipes.files import Table, nearest

CHAT, PAIRS, TEXT = "chat", "pairs", "text"
ASSISTANT = "assistant"
Message = dict[str, Any]

# Found in the data where the settings name no column, in this order.
_USUAL = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"prompt": "prompt", "completion": "completion"},
    {"prompt": "instruction", "completion": "output"},
    {"prompt": "question", "completion": "answer"},
    {"text": "text"},
)
_ROLES = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT}


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; one kind of data fills its own and leaves the others empty.

    Attributes:
        messages: Column of conversations, each a list of messages.
        prompt: Columns that make up the prompt, with blank lines between them.
        completion: Column of what follows the prompt.
        text: Column of plain text.
    """

    messages: str | None = None
    prompt: tuple[str, ...] = ()
    completion: str | None = None
    text: str | None = None

    @property
    def kind(self) -> str | None:
        """`chat`, `pairs` or `text`; None where no column is named."""
        if self.messages is not None:
            return CHAT
        if self.prompt or self.completion is not None:
            return PAIRS
        return None if self.text is None else TEXT

    def problems(self) -> list[str]:
        """Return what is wrong with the columns as settings."""
        kinds = {
            "messages_column": self.messages is not None,
            "prompt_column": bool(self.prompt),
            "text_column": self.text is not None,
        }
        named = [name for name, given in kinds.items() if given]
        found = []
        if len(named) > 1:
            found.append(f"{' and '.join(named)} name different kinds of data; give one of them")
        if self.completion is not None and not self.prompt:
            found.append("completion_column needs prompt_column")
        if self.prompt and self.completion is None:
            found.append("prompt_column needs completion_column")
        return found


def choose_columns(table: Table, given: Columns, labelled: bool = True) -> Columns:
    """Return the columns of a table that are used, as named or, without any, as usually named.

    Args:
        table: The rows.
        given: The settings.
        labelled: Whether completions are needed.

    Raises:
        DataError: If a column is missing, or none is named and none is found.

    Example:
        >>> choose_columns(Table("a.csv", {"text": ["x"]}), Columns()).kind
        'text'
    """
    chosen = given
    if given.kind is None:
        for usual in _USUAL:
            needed = [name for what, name in usual.items() if labelled or what != "completion"]
            if all(name in table.columns for name in needed):
                prompt = [usual["prompt"]] if "prompt" in usual else []
                # Alpaca keeps what an instruction is about in a column of its own.
                if prompt == ["instruction"] and "input" in table.columns:
                    prompt.append("input")
                chosen = Columns(
                    usual.get("messages"), tuple(prompt), usual.get("completion"), usual.get("text")
                )
                break
        else:
            raise DataError(
                f"{table.source} has the columns {', '.join(map(str, table.columns))}. Say what "
                "they hold: data.messages_column for conversations, data.prompt_column and "
                "data.completion_column for pairs, or data.text_column for plain text."
            )
    if not labelled:
        chosen = replace(chosen, completion=None)
    for setting, name in (
        ("data.messages_column", chosen.messages),
        *(("data.prompt_column", name) for name in chosen.prompt),
        ("data.completion_column", chosen.completion),
        ("data.text_column", chosen.text),
    ):
        if name is not None:
            table.column(name, setting)
    return chosen


def text_of(value: Any, table: Table, row: int, column: str) -> str:
    """Return the text in a cell; nothing is an empty text, and numbers are written out.

    Raises:
        DataError: If it is neither text nor a number.

    Example:
        >>> text_of(72, Table("a.jsonl", {}), 0, "answer")
        '72'
    """
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"{table.where(row)}: the column {column!r} holds {_kind_of(value)} and not text."
    )


def prompt_of(values: Mapping[str, Any], table: Table, row: int) -> str:
    """Return the prompt of a row: its columns that are not empty, with blank lines between them."""
    texts = [text_of(value, table, row, name) for name, value in values.items()]
    return "\n\n".join(text for text in texts if text.strip())


def messages_of(value: Any, table: Table, row: int, column: str) -> list[Message]:
    """Return a conversation as messages with `role` and `content`.

    Args:
        value: A list of `{"role": ..., "content": ...}`, or ShareGPT's `{"from": ..., "value":
            ...}`, or either written as JSON.
        table: Where the conversation is from.
        row: Its row.
        column: Its column.

    Raises:
        DataError: If it is something else: the message says where, and what.

    Example:
        >>> messages_of([{"from": "human", "value": "Hi"}], Table("a.jsonl", {}), 0, "messages")
        [{'role': 'user', 'content': 'Hi'}]
    """
    place = f"{table.where(row)}: the column {column!r}"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place} holds text and not a list of messages. Give a list of "
                '{"role": "user", "content": "..."}; for plain text set data.text_column.'
            ) from error
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{place} holds {_kind_of(value)} and not a list of messages.")
    return [_message(entry, f"{place}, message {n}") for n, entry in enumerate(value, start=1)]


def _message(entry: Any, place: str) -> Message:
    if not isinstance(entry, Mapping):
        raise DataError(f"{place}: {_kind_of(entry)} where a message should be.")
    # A table on disk fills the keys that a message does not have.
    fields = {name: value for name, value in entry.items() if value is not None}
    for ours, theirs in (("role", "from"), ("content", "value")):
        if ours not in fields and theirs in fields:
            fields[ours] = fields.pop(theirs)
    for name in ("role", "content"):
        if name not in fields:
            near = nearest(name, fields)
            raise DataError(
                f"{place} has no {name!r}{near}; its keys are: {', '.join(fields) or '(none)'}."
            )
        if not isinstance(fields[name], str):
            raise DataError(f"{place}: {name!r} is {_kind_of(fields[name])} and not text.")
    role = _ROLES.get(fields["role"], fields["role"])
    return {"role": role, "content": fields["content"], **_others(fields)}


def _others(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("role", "content")}


def conversation_of(prompt: str, completion: str | None, system: str | None) -> list[Message]:
    """Return a prompt, and its completion where there is one, as a conversation.

    >>> conversation_of("Hi", "Hello", None)
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    if completion is not None:
        messages.append({"role": ASSISTANT, "content": completion})
    return messages


def open_turn(messages: Sequence[Message]) -> tuple[list[Message], str | None]:
    """Divide a conversation into what comes before its last turn of the assistant, and that turn.

    Args:
        messages: The conversation.

    Returns:
        The messages that ask for the turn, and its content; None where the assistant has not
        answered the last message.

    Example:
        >>> open_turn(conversation_of("Hi", "Hello", None))
        ([{'role': 'user', 'content': 'Hi'}], 'Hello')
    """
    answered = [n for n, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not answered or answered[-1] != len(messages) - 1:
        return list(messages), None
    return list(messages[:-1]), messages[-1]["content"]


def readable(messages: Sequence[Message]) -> str:
    """Return a conversation as text for people; a single question as it is.

    >>> readable(conversation_of("Hi", None, "Be brief.")).splitlines()
    ['system: Be brief.', 'user: Hi']
    """
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _kind_of(value: Any) -> str:
    names = {list: "a list", dict: "an object", bool: "true or false", type(None): "nothing"}
    for kind, name in names.items():
        if isinstance(value, kind):
            return name
    return "text" if isinstance(value, str) else f"{value!r:.40}"
