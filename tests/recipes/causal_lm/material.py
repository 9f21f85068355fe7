"""A small tokenizer, tiny decoders, and data about restaurants that they can learn."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_lora import LoRACallback

NAMES = ["Alimentum", "Aromi", "Cocum", "Fitzbillies", "Giraffe", "Strada"]
FOODS = ["Chinese", "English", "French", "Indian", "Italian"]
PLACES = ["city", "riverside", "station"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pair(draw: random.Random, long: bool = False) -> tuple[str, str]:
    """A meaning and a sentence that says it."""
    name, food, place = draw.choice(NAMES), draw.choice(FOODS), draw.choice(PLACES)
    if long:
        meaning = f"name[{name}], food[{food}], area[{place}]"
        return meaning, f"{name} serves {food} food near the {place}."
    return f"name[{name}], food[{food}]", f"{name} serves {food} food."


def make_tokenizer(chat_template: str | None = None, bos: bool = False) -> Any:
    """A byte-level BPE tokenizer of a few hundred tokens; `bos` puts a token before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(0)
    texts = [" ".join(pair(draw, long=row % 2 == 0)) for row in range(200)]
    texts += ["system user assistant Assistant: User: You are brief. Hi Hello"] * 20
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    end = "<|endoftext|>" if chat_template is None else "<|im_end|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        additional_special_tokens=special,
        model_input_names=["input_ids", "attention_mask"],
    )
    if chat_template is not None:
        fast.chat_template = chat_template
    return fast


def make_model(kind: str, vocabulary: int = 420, positions: int = 128, **settings: Any) -> Any:
    """A tiny decoder with random weights that are large enough for attention to matter."""
    import transformers

    small = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": positions,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    own: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
        "mistral": (
            "MistralForCausalLM",
            {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4},
        ),
        "gpt2": (
            "GPT2LMHeadModel",
            {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": positions},
        ),
        "opt": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        "bloom": ("BloomForCausalLM", {"n_layer": 2, "n_head": 2}),
        "mamba": ("MambaForCausalLM", {"state_size": 4}),
        "bert": ("BertLMHeadModel", {}),
    }
    class_name, more = own[kind]
    attention = settings.pop("attention", None)
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**{**small, **more, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {} if attention is None else {"attn_implementation": attention}
        model = model_class._from_config(config, **options)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_model(folder: Path, kind: str, chat_template: str | None = None, **settings: Any) -> Path:
    """Write a tiny decoder and its tokenizer, for `from_pretrained`."""
    tokenizer = make_tokenizer(chat_template)
    make_model(kind, len(tokenizer), **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(path: Path, rows: int, seed: int) -> Path:
    """Write pairs of unequal lengths: `mr` and `ref` in a CSV file, else messages in JSON lines."""
    draw = random.Random(seed)
    pairs = [pair(draw, long=row % 3 == 0) for row in range(rows)]
    with path.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".csv":
            writer = csv.writer(stream)
            writer.writerows([("mr", "ref"), *pairs])
        else:
            for prompt, completion in pairs:
                messages = [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": completion},
                ]
                stream.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_lines(path: Path, *records: Any) -> str:
    """Write objects as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def make_trainer(*callbacks: Any, **settings: Any) -> Trainer:
    """A silent Trainer on the CPU with LoRA."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lora = LoRACallback(r=8, alpha=16, verbose=False)
    return Trainer(callbacks=[lora, *callbacks], **{**defaults, **settings})
