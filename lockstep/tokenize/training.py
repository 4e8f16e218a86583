"""A tokenizer of one's own: byte-level BPE learned from texts, for models that are trained from scratch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lockstep.core.errors import ConfigError
from lockstep.core.extras import require

END = "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
SPECIAL = (END, *ROLES)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SMALLEST = 256 + len(SPECIAL)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Learns merges and writes tokenizer.json and tokenizer_config.json into `folder`.

    Digits stay apart, so that a number is spelled the same wherever it stands; bytes are the smallest tokens, so that no
    text is unknown. The chat template has one token a role and `<|end|>` after what the assistant said.

    Args:
        texts: what merges are learned from (Sennrich et al. 2016); the result is a function of texts and size.
        vocab_size: ids in all, at least 261: 256 bytes and five special tokens. Few texts may yield fewer.

    Raises:
        ConfigError: the size is too small.
        MissingExtraError: the `tokenizers` package is not installed.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(
            f"vocab_size={vocab_size}; expected at least {SMALLEST}: 256 bytes and {len(SPECIAL)} special"
        )
    library: Any = require("tokenizers", extra="lm")
    tokenizer = library.Tokenizer(library.models.BPE())
    split = library.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=split.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": END, "pad_token": END, "chat_template": CHAT_TEMPLATE, "model_max_length": 1 << 20}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
