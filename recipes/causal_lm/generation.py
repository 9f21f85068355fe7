"""Texts generated after prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lightning_lora.errors import ConfigError


@dataclass(frozen=True)
class Decoding:
    """How texts are generated; the words are those of `transformers`' `generate`.

    Attributes:
        max_new_tokens: Tokens generated at most.
        num_beams: Beams of the search; 1 is greedy.
        do_sample: Whether tokens are drawn and not chosen.
        temperature: What logits are divided by where tokens are drawn.
        top_p: Share of the probability that tokens are drawn from.
        no_repeat_ngram_size: Length of n-grams that may not occur twice; 0 allows all.
        length_penalty: Above 0 prefers longer texts in beam search, below 0 shorter ones.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0
    length_penalty: float = 1.0

    def check(self) -> Decoding:
        """Return the settings as they are.

        Raises:
            ConfigError: If any is out of range; all that are wrong are named.

        Example:
            >>> Decoding(num_beams=10, length_penalty=0.9).check().num_beams
            10
        """
        wrong = []
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} is {getattr(self, name)}, not at least 1")
        if self.temperature <= 0:
            wrong.append(f"temperature is {self.temperature}, not above 0")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p is {self.top_p}, not above 0 and at most 1")
        if self.no_repeat_ngram_size < 0:
            wrong.append(f"no_repeat_ngram_size is {self.no_repeat_ngram_size}, below 0")
        if not self.do_sample and (self.temperature != 1.0 or self.top_p != 1.0):
            wrong.append("temperature and top_p need do_sample")
        if wrong:
            raise ConfigError("Settings of model: " + "; ".join(wrong) + ".")
        return self

    def greedy(self) -> Decoding:
        """Return the same without sampling and beams."""
        return replace(self, num_beams=1, do_sample=False, temperature=1.0, top_p=1.0)


def generate(
    model: Any,
    tokenizer: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    decoding: Decoding,
    stops: Sequence[int],
) -> list[str]:
    """Return the text that follows each prompt, without special tokens and blanks around it.

    Args:
        model: A model with `generate`, in evaluation mode.
        tokenizer: Its tokenizer.
        input_ids: int64 `[rows, tokens]`, padded on the left.
        attention_mask: int64 `[rows, tokens]`, 0 at the padding.
        decoding: How. What it leaves open, such as a repetition penalty, is the model's own
            `generation_config`.
        stops: Tokens that end a text.
    """
    options: dict[str, Any] = asdict(decoding)
    if not options["do_sample"]:
        options["top_k"] = 50  # the default: others are complained about where nothing is drawn
    if decoding.num_beams == 1:
        del options["length_penalty"]
    sequences = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(stops) or None,
        use_cache=True,
        **options,
    )
    ends = set(stops)
    texts = []
    for tokens in sequences[:, input_ids.shape[1] :].tolist():
        length = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
        text = tokenizer.decode(
            tokens[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        texts.append(text.strip())
    return texts
