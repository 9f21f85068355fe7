"""Makes the offline quickstart: a small pretrained encoder and a labelled data set.

    python -m lightning_lora.recipes.quickstart.make --output DIR
    python recipes/quickstart/make.py --output DIR

It writes, in about twelve minutes on one core and without any download:

    DIR/base/   a RoBERTa encoder (4 layers, 128 wide) and its WordPiece tokenizer, pretrained by
                masked language modelling on generated, unlabelled passages
    DIR/data/   train.csv, validation.csv and test.csv with the columns text and label

All text comes from the grammar in grammar.py: customer messages to a mail-order shop, labelled by
what became of the product. The training messages leave out every third word of each word list;
validation, test and the pretraining passages use all words. A model that learned from the passages
which words mean alike can thus read test messages that one trained on the labels alone cannot. The
passages are half reviews and half messages with the shop's reply; they carry no labels, but a
review's verdict and a reply's tone ("we are sorry") follow from what was told, as in real text. No
message is in two splits, and no passage begins with a message of any split.

The same seed gives the same data files and passages. The model comes out slightly different each
time, for the tokenizer's trainer breaks ties between equally frequent word pieces by chance.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

if TYPE_CHECKING or __package__:
    from .grammar import JUDGING, LABELS, Writer
else:
    from grammar import JUDGING, LABELS, Writer

SPLITS = {"train": 2000, "validation": 400, "test": 600}
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
PAD, MASK = SPECIAL.index("<pad>"), SPECIAL.index("<mask>")
MAX_TOKENS = 96


def make_data(seed: int) -> dict[str, list[tuple[str, str]]]:
    """The labelled splits, with as many rows of each label and no message twice."""
    data: dict[str, list[tuple[str, str]]] = {}
    used: set[str] = set()
    for number, (split, rows) in enumerate(SPLITS.items()):
        writer = Writer(seed=1000 * seed + number, seen_only=split == "train")
        data[split] = []
        while len(data[split]) < rows:
            label = LABELS[len(data[split]) % len(LABELS)]
            text = writer.message(label)
            if text not in used:
                used.add(text)
                data[split].append((text, label))
        random.Random(seed).shuffle(data[split])
    return data


def make_passages(seed: int, count: int, labelled: set[str]) -> list[str]:
    """Unlabelled text of the same world, without the labelled messages."""
    writer = Writer(seed=1000 * seed + 999)
    passages: list[str] = []
    while len(passages) < count:
        if writer.rng.random() < 0.5:
            text = writer.review()
        else:
            text = writer.message(writer.rng.choice(LABELS), passage=True)
        if not any(text[: end.end()] in labelled for end in re.finditer("[.?]", text)):
            passages.append(text)
    return passages


def make_tokenizer(passages: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer with RoBERTa's special tokens at RoBERTa's ids."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(passages, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, SPECIAL.index(token)) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        cls_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
    )


def batches(
    rows: list[list[int]], batch_size: int, steps: int, rng: random.Random
) -> Iterator[torch.Tensor]:
    """Padded batches of rows of similar length, reshuffled on each pass over the rows."""
    done = 0
    while True:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + rng.random() * 4)
        starts = list(range(0, len(rows) - batch_size + 1, batch_size))
        rng.shuffle(starts)
        for start in starts:
            chosen = [rows[i] for i in order[start : start + batch_size]]
            width = max(map(len, chosen))
            yield torch.tensor([row + [PAD] * (width - len(row)) for row in chosen])
            done += 1
            if done == steps:
                return


def pretrain(
    tokenizer: PreTrainedTokenizerFast, passages: list[str], steps: int, batch_size: int, seed: int
) -> RobertaForMaskedLM:
    """Masked language modelling: some tokens are hidden and guessed from the others."""
    torch.manual_seed(seed)
    model = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
            max_position_embeddings=MAX_TOKENS + 2,  # RoBERTa counts positions from pad id + 1
            type_vocab_size=1,
            initializer_range=0.06,  # RoBERTa's 0.02 is made for six times this width
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    rows = tokenizer(passages, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    # The judging words (glad, sorry, ...) are few, and to guess them takes the whole story.
    share = torch.full((len(tokenizer),), 0.15)
    share[tokenizer.convert_tokens_to_ids(JUDGING)] = 0.6
    share[: len(SPECIAL)] = 0.0
    model.train()
    started, running = time.monotonic(), 0.0
    for step, ids in enumerate(batches(rows, batch_size, steps, random.Random(seed)), start=1):
        hidden = torch.rand(ids.shape) < share[ids]
        chance = torch.rand(ids.shape)
        shown = torch.where(hidden & (chance < 0.8), MASK, ids)
        anything = torch.randint(len(SPECIAL), len(tokenizer), ids.shape)
        shown = torch.where(hidden & (chance > 0.9), anything, shown)
        features = model.roberta(shown, attention_mask=(ids != PAD).long()).last_hidden_state
        # Scores for the hidden tokens only: the others do not enter the loss.
        loss = cross_entropy(model.lm_head(features[hidden]), ids[hidden])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += loss.item()
        if step % 200 == 0 or step == steps:
            mean, seconds = running / (step % 200 or 200), time.monotonic() - started
            print(f"step {step}/{steps}  loss {mean:.3f}  {seconds:.0f} s", flush=True)
            running = 0.0
    return model


def main() -> None:
    """Make the data, then the tokenizer, then the model."""
    parser = argparse.ArgumentParser(description="Make the offline quickstart model and data.")
    parser.add_argument("--output", type=Path, required=True, help="folder for base/ and data/")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--passages", type=int, default=120_000, help="passages to pretrain on")
    parser.add_argument("--steps", type=int, default=4500, help="pretraining steps")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=1100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-only", action="store_true", help="write data/ and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    data = make_data(args.seed)
    (args.output / "data").mkdir(parents=True, exist_ok=True)
    for split, split_rows in data.items():
        path = args.output / "data" / f"{split}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["text", "label"])
            writer.writerows(split_rows)
    if args.data_only:
        return

    labelled = {text for split_rows in data.values() for text, _ in split_rows}
    passages = make_passages(args.seed, args.passages, labelled)
    tokenizer = make_tokenizer(passages, args.vocab_size)
    print(f"{len(passages)} passages, {len(tokenizer)} tokens in the vocabulary", flush=True)
    model = pretrain(tokenizer, passages, args.steps, args.batch_size, args.seed)
    model.save_pretrained(args.output / "base")
    tokenizer.save_pretrained(args.output / "base")


if __name__ == "__main__":
    main()
