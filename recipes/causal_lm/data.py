"""Data for causal language models: conversations, pairs or plain text in, batches of tokens out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.cache import cached_rows, tokenizer_fingerprint
from lightning_lora.recipes.causal_lm.batches import ExampleCollator, PromptCollator
from lightning_lora.recipes.causal_lm.chat import ChatFormat, settle_template
from lightning_lora.recipes.causal_lm.encoding import DEFAULT_TEMPLATE, template_problems
from lightning_lora.recipes.causal_lm.packing import packed_rows
from lightning_lora.recipes.causal_lm.reader import Prompts, RowReader, prompt_groups
from lightning_lora.recipes.causal_lm.records import PAIRS, TEXT, Columns, choose_columns
from lightning_lora.recipes.causal_lm.rows import example_rows, prompt_rows
from lightning_lora.recipes.causal_lm.text_files import DOCUMENTS, read_text_file
from lightning_lora.recipes.data import RecipeDataModule
from lightning_lora.recipes.files import Table, nearest
from lightning_lora.recipes.grouping import padding_share

_PROMPTS = "prompts"


class CausalLMDataModule(RecipeDataModule):
    r"""Conversations, prompts with completions, or plain text, for `CausalLM`.

    Which of them the data are is said by the column that is named, or found by its usual name:

    - `messages_column`: conversations, each a list of `{"role", "content"}` or ShareGPT's
      `{"from", "value"}`. The tokenizer's chat template renders them, and the assistant's turns are
      trained. A tokenizer without a template gets a plain one (`User: ...`, `Assistant: ...`),
      which an exported model takes along.
    - `prompt_column` and `completion_column`: completions are trained. By the chat template as a
      user's message and its answer, where the tokenizer has a template and `template` is not set;
      else joined by `template`.
    - `text_column`, or a `.txt` file: all of it is trained, in consecutive blocks of `max_length`
      tokens with an end-of-sequence token after each document.

    Test data may have several completions of one prompt, in rows of their own: the prompt is
    generated once, and they are its references. To predict, no completions are needed; each line of
    a `.txt` file is a prompt. Without validation data a share of the training rows is held out:
    rows with the same prompt together, and of a text file its end.

    Args:
        messages_column: Column of conversations.
        prompt_column: Column of prompts, or several, joined by blank lines where they are not
            empty.
        completion_column: Column of completions.
        text_column: Column of plain text, a document a row.
        template: How prompts and completions are joined where no chat template is used:
            `{prompt}\n{completion}` by default. Special tokens may be written out in it.
        chat_template: A file with a Jinja chat template, or the template itself, in place of the
            tokenizer's.
        system_prompt: System message of every conversation that has none.
        documents: What a document is in a `.txt` file: the whole `file`, a `paragraph` or a
            `line`.
        train_on_prompt: Whether prompts are trained too, with everything else around the answers.
        packing: Put several examples into one sequence of `max_length` tokens, without letting them
            see each other; so are documents of plain text, which else run on in the same blocks.
        max_length: Tokens of an example at most. Longer ones are cut off; plain text goes on in the
            next block.
        batch_size: Examples, or packed sequences, in a training batch.
        **kwargs: As for `RecipeDataModule`.

    Raises:
        ConfigError: If settings contradict each other.

    Example:
        >>> CausalLMDataModule(train_file="chats.jsonl", messages_column="messages").max_length
        512
    """

    def __init__(
        self,
        messages_column: str | None = None,
        prompt_column: str | list[str] | None = None,
        completion_column: str | None = None,
        text_column: str | None = None,
        template: str | None = None,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        documents: str = "file",
        train_on_prompt: bool = False,
        packing: bool = False,
        max_length: int = 512,
        batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_length=max_length, batch_size=batch_size, **kwargs)
        prompt = [prompt_column] if isinstance(prompt_column, str) else prompt_column or []
        self.given = Columns(messages_column, tuple(prompt), completion_column, text_column)
        self.template = template
        self.chat_template = chat_template
        self.system_prompt = system_prompt
        self.documents = documents
        self.train_on_prompt = train_on_prompt
        self.packing = packing
        self._prompts: dict[str, Prompts] = {}
        self._chat: ChatFormat | None = None
        self.require_good_settings()

    def check_settings(self) -> list[str]:
        """Return what is wrong with the settings."""
        problems = super().check_settings() + self.given.problems()
        if self.template is not None:
            problems += template_problems(self.template)
            if self.chat_template is not None:
                problems.append("give either template or chat_template, not both")
            if self.system_prompt is not None:
                problems.append("system_prompt is for chat templates, and template is set")
        if self.documents not in DOCUMENTS:
            near = nearest(self.documents, DOCUMENTS)
            problems.append(
                f"documents is {self.documents!r}{near}, not one of {', '.join(DOCUMENTS)}"
            )
        if self.max_length < 2:
            problems.append(f"max_length is {self.max_length}, not at least 2")
        return problems

    # ---- rows ----------------------------------------------------------------------------------

    def read_split(self, split: str) -> Table:
        """Read the rows of a split from its file or dataset.

        Raises:
            DataError: If there are none, or they cannot be read.
        """
        file = self.files[split]
        if self.dataset is None and file is not None and file.lower().endswith(".txt"):
            documents = "line" if split == "predict" else self.documents
            return read_text_file(file, documents, self.cache_dir)
        return super().read_split(split)

    def setup(self, stage: str) -> None:
        """Read the rows that the stage needs, and find their columns.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            DataError: If data for the stage are missing or not what the settings say.
        """
        super().setup(stage)
        for split in self._tables:
            self.columns(split)

    def columns(self, split: str) -> Columns:
        """Return which columns of a split are used.

        Raises:
            DataError: If one is missing, or none is named and none is found.
        """
        return self._columns_of(self.table(split), split)

    def _columns_of(self, table: Table, split: str) -> Columns:
        # A text file has no columns to be named: it is text, or a prompt a line.
        lines = "continues" in table.columns and split == "predict"
        if lines or ("continues" in table.columns and self.given.kind in (None, TEXT)):
            return Columns(text="text")
        return choose_columns(table, self.given, labelled=split != "predict")

    def reader(self, split: str) -> RowReader:
        """Return what makes prompts and examples of a split's rows."""
        columns = self.columns(split)
        chat = None
        pairs = columns.kind == PAIRS or (split == "predict" and self.given.kind == PAIRS)
        if self._is_chat(columns) or (split == "predict" and self._is_chat(self.given)):
            chat = self._chat_format()
        template = (self.template or DEFAULT_TEMPLATE) if pairs and chat is None else None
        return RowReader(self.table(split), columns, template, chat, self.system_prompt)

    def prompts(self, split: str) -> Prompts:
        """Return the different prompts of a split, with their references."""
        if split not in self._prompts:
            self._prompts[split] = self.reader(split).prompts(split != "predict")
        return self._prompts[split]

    def prompt_repeats(self, split: str) -> Sequence[int]:
        """Return for each row of a split the number of its prompt."""
        return self.prompts(split).repeats

    def sample_prompts(self, given: Sequence[str] | None, count: int = 3) -> list[dict[str, Any]]:
        """Return prompts to be generated while training, as `input_ids` and `prompt`.

        Args:
            given: Texts, each put as the data put their prompts; None takes the first of the
                validation data.
            count: How many are taken from the data.
        """
        reader = self.reader("validation")
        if given is None:
            chosen = reader.first_prompts(count)
        else:
            chosen = [reader.prompt(text) for text in given]
        return list(prompt_rows(self.tokenizer, reader, chosen, self._prompt_limit()))

    # ---- tokens --------------------------------------------------------------------------------

    @property
    def limit(self) -> int:
        """Tokens of an example at most: the setting, or what the model takes."""
        limit: int = min(self.max_length, self.tokenizer.model_max_length)
        return limit

    def encode(self, split: str) -> Any:
        """Return the tokenized rows of a split: examples, or prompts to be generated.

        Args:
            split: `train`, `validation` or `test` for examples, which have `input_ids`, `trained`,
                their number as `row`, and `length`, and packed ones `parts`; `predict`, or
                `prompts` for those of the test data.

        Raises:
            DataError: If a row cannot be used, or none is left.
        """
        if split in (_PROMPTS, "predict"):
            return self._encode_prompts("test" if split == _PROMPTS else split)
        reader, limit = self.reader(split), self.limit
        if limit < self.max_length:
            rank_zero_info(f"data.max_length is {self.max_length}; the model takes {limit} tokens.")
        parts = [
            "causal lm",
            tokenizer_fingerprint(self.tokenizer),
            reader.table.fingerprint,
            astuple(reader.columns),
            [reader.template, self.system_prompt, reader.chat is not None],
            [limit, self.train_on_prompt, self.packing],
        ]

        def build() -> Iterator[dict[str, Any]]:
            return example_rows(self.tokenizer, reader, limit, self.train_on_prompt, self.packing)

        examples = cached_rows(parts, build, self.cache_dir).with_format("numpy")
        if not self.packing:
            return examples
        return cached_rows(
            [*parts, "packed"], lambda: packed_rows(examples, limit), self.cache_dir
        ).with_format("numpy")

    def collator(self, split: str) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what makes a batch of examples, or of prompts."""
        if split in (_PROMPTS, "predict"):
            return PromptCollator(self.tokenizer.pad_token_id)
        return ExampleCollator(self.tokenizer.pad_token_id, self.packing)

    def train_dataloader(self) -> Any:
        """Return batches of the training examples."""
        if self.packing:
            rank_zero_info(
                f"{self.table('train').source}: {len(self.encoded('train'))} packed sequences; "
                f"{self.padding('train'):.1%} of the tokens in an epoch are padding."
            )
        return super().train_dataloader()

    def test_dataloader(self) -> Any:
        """Return batches of examples, and of prompts where generated texts are scored."""
        examples = self.loader("test")
        if self.columns("test").kind == TEXT or not getattr(self.module, "metrics", ()):
            return examples
        return [examples, self.loader(_PROMPTS)]

    def padding(self, split: str) -> float:
        """Return the share of padding among the tokens that are computed in an epoch of a split."""
        loader = self.loader(split)
        lengths = self.encoded(split)["length"][:]
        return padding_share(lengths, list(loader.sampler), loader.batch_size or 1)

    def _encode_prompts(self, split: str) -> Any:
        reader, limit = self.reader(split), self._prompt_limit()
        if split == "predict" and self.given.kind is None and reader.columns.kind == TEXT:
            rank_zero_info(
                f"{reader.table.source}: the texts are continued as they are. To put them as "
                "prompts, name the columns that the model was trained with, such as "
                "data.prompt_column and data.completion_column."
            )
        parts = [
            "causal lm prompts",
            tokenizer_fingerprint(self.tokenizer),
            reader.table.fingerprint,
            astuple(reader.columns),
            [reader.template, self.system_prompt, reader.chat is not None, limit, split],
        ]

        def build() -> Iterator[dict[str, Any]]:
            prompts = self.prompts(split)
            chosen = reader.prompts_at(prompts.first)
            for number, row in enumerate(prompt_rows(self.tokenizer, reader, chosen, limit)):
                yield {
                    "input_ids": np.asarray(row["input_ids"], dtype=np.int32),
                    "prompt": row["prompt"],
                    "references": prompts.references[number],
                    "row": number,
                    "length": len(row["input_ids"]),
                }

        return cached_rows(parts, build, self.cache_dir)

    def _prompt_limit(self) -> int | None:
        """Tokens of a prompt at most, so that there are positions left for what is generated."""
        most = self.tokenizer.model_max_length
        if most >= 10**9:  # what stands for "not known" in transformers
            return None
        settings = getattr(self.module, "hparams", {})
        left: int = most - int(settings.get("max_new_tokens", 0))
        if left < 1:
            raise ConfigError(
                f"model.max_new_tokens is {settings['max_new_tokens']}, and the model takes {most} "
                "tokens, which leaves none for the prompt. Give less."
            )
        return left

    # ---- chats, and what is held out -----------------------------------------------------------

    def _is_chat(self, columns: Columns) -> bool:
        if columns.kind == PAIRS:
            template = self.chat_template or self.tokenizer.chat_template
            return self.template is None and bool(template)
        return columns.messages is not None

    def _chat_format(self) -> ChatFormat:
        if self._chat is None:
            if settle_template(self.tokenizer, self.chat_template):
                rank_zero_info(
                    "The tokenizer has no chat template: conversations are written as lines that "
                    "begin with `User:` and `Assistant:`, and answers end with "
                    f"{self.tokenizer.eos_token}."
                )
            self._chat = ChatFormat(self.tokenizer)
        return self._chat

    def divide_rows(self, table: Table) -> tuple[list[int], list[int]]:
        """Hold out all rows of a prompt, or the end of a text file.

        Raises:
            DataError: If one part would be empty.
        """
        columns = self._columns_of(table, "train")
        if "continues" in table.columns:
            border = len(super().divide_rows(table)[0])
            return list(range(border)), list(range(border, len(table)))
        if columns.kind == PAIRS:
            return self.divide_groups(prompt_groups(table, columns), f"{table.source} (prompts)")
        return super().divide_rows(table)
