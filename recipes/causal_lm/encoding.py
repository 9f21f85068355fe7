"""Texts into tokens, and which of the tokens are trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_TEMPLATE = "{prompt}\n{completion}"
_TRAILING_SPACES = re.compile(r" *\Z")


@dataclass
class Encoded:
    """An example in tokens.

    Attributes:
        ids: The tokens.
        trained: For each token whether it is to be predicted.
    """

    ids: list[int]
    trained: list[bool]

    def cut(self, limit: int) -> Encoded:
        """Return the first `limit` tokens."""
        return Encoded(self.ids[:limit], self.trained[:limit])

    @property
    def targets(self) -> int:
        """How many tokens are predicted: the first has nothing that it could be predicted from."""
        return sum(self.trained[1:])


def template_problems(template: str) -> list[str]:
    """Return what is wrong with a template of prompts and completions.

    >>> template_problems("Q: {prompt} A: {answer}")
    ["template 'Q: {prompt} A: {answer}' does not have {completion} exactly once"]
    """
    shown = f"template {template!r}"
    found = [
        f"{shown} does not have {{{name}}} exactly once"
        for name in ("prompt", "completion")
        if template.count(f"{{{name}}}") != 1
    ]
    if not found and template.index("{prompt}") > template.index("{completion}"):
        found.append(f"{shown} has the completion before the prompt")
    return found


def fill(template: str, prompt: str, completion: str = "") -> tuple[str, str]:
    """Return what is given and what is predicted.

    Spaces right before the completion go with it: byte-pair tokenizers join them to the word that
    follows, and a prompt that ends with a space of its own would ask for words that were never
    seen there.

    Args:
        template: Has `{prompt}` and, after it, `{completion}`.
        prompt: The prompt.
        completion: The completion; none where it is to be generated.

    Example:
        >>> fill("Q: {prompt} A: {completion}", "2 + 2", "4")
        ('Q: 2 + 2 A:', ' 4')
    """
    before, _, after = template.partition("{completion}")
    given = before.replace("{prompt}", prompt)
    spaces = _TRAILING_SPACES.search(before)
    count = 0 if spaces is None else len(spaces.group())
    head = given[: len(given) - count]
    return head, " " * count + completion + after


def opening_ids(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text, such as `<s>`."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for place in range(len(full) - len(plain) + 1):
        if full[place : place + len(plain)] == plain:
            return list(full[:place])
    return []


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], opening: Sequence[int], whole: bool = False
) -> list[Encoded]:
    """Tokenize prompts with their completions; completions end with the end-of-sequence token.

    A prompt always has the tokens that it has by itself, as it stands alone when its completion is
    generated.

    Args:
        tokenizer: The tokenizer.
        pairs: What is given and what is predicted, as `fill` returns them.
        opening: Tokens before each, as `opening_ids`.
        whole: Whether prompts are trained too.
    """
    heads = _tokens(tokenizer, [head for head, _ in pairs])
    joined = _tokens(tokenizer, [head + tail for head, tail in pairs])
    eos = tokenizer.eos_token_id
    found = []
    for (_, tail), head, ids in zip(pairs, heads, joined, strict=True):
        if ids[: len(head)] != head:
            # A token would reach over the border.
            ids = head + _tokens(tokenizer, [tail])[0]
        given = len(opening) + len(head)
        ids = [*opening, *ids]
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        found.append(Encoded(ids, [whole or place >= given for place in range(len(ids))]))
    return found


def encode_prompts(tokenizer: Any, heads: Sequence[str], opening: Sequence[int]) -> list[list[int]]:
    """Tokenize prompts whose completions are to be generated; none is without a token.

    Args:
        tokenizer: The tokenizer.
        heads: The texts.
        opening: Tokens before each, as `opening_ids`.
    """
    start = [
        token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None
    ]
    return [[*opening, *ids] or start[:1] for ids in _tokens(tokenizer, heads)]


def text_blocks(
    tokenizer: Any,
    pieces: Iterable[list[tuple[str, bool]]],
    limit: int,
    opening: Sequence[int],
    apart: bool,
) -> Iterator[list[int]]:
    """Cut plain text into consecutive blocks, with an end-of-sequence token after each document.

    Args:
        tokenizer: The tokenizer.
        pieces: Texts in chunks, each with whether its document goes on in the next.
        limit: Tokens of a block.
        opening: Tokens before each document, as `opening_ids`.
        apart: Whether a block ends with its document; else blocks run on over documents, and only
            the last is shorter.

    Yields:
        The tokens of a block, two at least.
    """
    eos = tokenizer.eos_token_id
    block: list[int] = []
    begins = True
    for chunk in pieces:
        tokens = _tokens(tokenizer, [text for text, _ in chunk])
        for (_, continues), ids in zip(chunk, tokens, strict=True):
            block += [*opening, *ids] if begins else ids
            if not continues and eos is not None:
                block.append(eos)
            begins = not continues
            full = len(block) - len(block) % limit
            yield from (block[start : start + limit] for start in range(0, full, limit))
            block = block[full:]
            if apart and begins:
                if len(block) > 1:
                    yield block
                block = []
    if len(block) > 1:
        yield block


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    found: list[list[int]] = encoded["input_ids"]
    return found
