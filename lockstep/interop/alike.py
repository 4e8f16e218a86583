"""Is a language model that was written the one it was made from? The same ids, and how far the logits are.

Legend: T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lockstep.core.batch import ForwardBatch
from lockstep.core.errors import ExportError
from lockstep.core.tensors import TensorSource
from lockstep.models.families import load_model
from lockstep.tokenize.tokenizer import Tokenizer

_TEXTS = (
    "Hello, world! It's 12:34 on 2024-05-06, isn't it? WE'LL SEE; they've gone.",
    "    def f(x):\n\t\treturn x ** 2  # squared\r\n\n\n   \n",
    "  leading,   inner   and trailing spaces   ",
    "Größe, naïve café, Привет, Ελληνικά, العربية, हिन्दी, ไทย, 中文字符, 日本語のテキスト, 한국어",
    "🙂🚀👩‍👩‍👧‍👦 🫠 ½ ² ™ “quotes” — dashes… x≤y∑",
    "3.14159 1000000 0x1F 42nd a1b2c3",
    "https://example.org/a_b?c=d&e=%20#f {'json': [1, 2.5, null]} <tag attr=\"v\">",
    "a",
    "\n",
    "",
)
_PROMPT = (
    "The quick brown fox jumps over the lazy dog. In 1969, two people walked on the Moon; today a small model reads about it "
    "and writes: def answer(question): return 42"
)
_MOST_PLACES = 64
SAME = 1e-4
"""Largest difference of logits, relative to the largest logit, of what holds the same numbers."""


@dataclass(frozen=True, kw_only=True)
class LogitDifference:
    """Of two models' predictions after each token of a prompt."""

    num_places: int
    kl_mean: float
    """Kullback-Leibler divergence of the second from the first, in nats a place."""
    kl_max: float
    num_same_top: int
    """Places where both hold the same token for the most probable."""
    largest: float
    """Largest difference of logits, relative to the largest logit."""

    def __str__(self) -> str:
        return (
            f"KL {self.kl_mean:.2g} nats on average and {self.kl_max:.2g} at most, the same most probable token in "
            f"{self.num_same_top} of {self.num_places} places, largest relative difference {self.largest:.1e}"
        )


def tokenizer_of(source: TensorSource) -> Tokenizer | None:
    """The source's tokenizer; None where it has none."""
    described = source.tokenizer()
    if isinstance(described, Path):
        return Tokenizer.from_folder(described) if (described / "tokenizer.json").is_file() else None
    has_words = described.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")
    return Tokenizer.from_gguf_metadata(described) if has_words else None


def compare_ids(
    before: Tokenizer, after: Tokenizer, *, nfc: bool = False, special: bool = True, first_space: bool = True
) -> int:
    """Both tokenizers on a fixed set of texts and on random ones, ids and back.

    Args:
        nfc: bring the texts to Unicode NFC first.
        special: also texts with special tokens in them.
        first_space: also texts that begin with a space.

    Returns:
        the number of texts, all of them equal.

    Raises:
        ExportError: one differs, a chat template does, or an id with a role.
    """
    texts = [*_TEXTS, *_random_texts(random.Random(0))]
    if special:
        names = [before.vocabulary.tokens[index] for index in sorted(before.special_ids)]
        names = [name for name in names if after.id_of(name) is not None]
        texts += [f"{name}user\nHi {name} there{name}" for name in names[:4] + names[-4:]]
    if not first_space:
        texts = [text.lstrip(" ") for text in texts]
    if nfc:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    for around in (True, False):
        rows = [t.encode_batch(texts, add_special=around, parse_special=True) for t in (before, after)]
        for text, one, two in zip(texts, *rows, strict=True):
            if one != two:
                raise ExportError(
                    f"the text {text[:60]!r} has the ids {one[:24]} before and {two[:24]} after; nothing was written"
                )
            if before.decode(one, skip_special=True) != after.decode(two, skip_special=True):
                raise ExportError(f"the ids of the text {text[:60]!r} become another text; nothing was written")
    if before.chat_templates != after.chat_templates:
        raise ExportError("the chat templates differ; nothing was written")
    for role, one, two in (
        ("bos", before.bos_id, after.bos_id),
        ("first eos", before.eos_ids[:1], after.eos_ids[:1]),
    ):
        if one != two:
            raise ExportError(f"{role} is {one} before and {two} after; nothing was written")
    return len(texts)


def _random_texts(draw: random.Random) -> list[str]:
    """Letters, signs, spaces and characters of many scripts, mixed."""
    pools = ("abcdefghij", "ABCXYZ", "0123456789", " \t\n  ", ".,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`", "'s 't 'LL 're")
    latin, others = ((0xA1, 0x24F), (0x370, 0x52F)), ((0x620, 0x64A), (0x905, 0x939), (0x10400, 0x1044F))
    blocks = (*latin, *others, (0x3041, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F))
    found = []
    for _ in range(60):
        pieces = [draw.choice(draw.choice(pools)) for _ in range(draw.randint(1, 30))]
        pieces += [chr(draw.randint(*draw.choice(blocks))) for _ in range(draw.randint(0, 10))]
        draw.shuffle(pieces)
        found.append("".join(pieces))
    return found


def prompt_ids(tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """A short prompt; random ids without a tokenizer."""
    if tokenizer is None:
        draw = random.Random(0)
        return [draw.randrange(vocab_size) for _ in range(_MOST_PLACES)]
    ids = tokenizer.encode(_PROMPT, add_special=True, parse_special=True)
    return [index for index in ids if index < vocab_size][:_MOST_PLACES]


def logits_of(source: TensorSource, ids: list[int], dtype: str = "auto") -> Tensor:
    """Logits [T, V] float32 after each of the ids, computed as they are served.

    Raises:
        ConfigError, FormatError: as `load_model`.
    """
    model = load_model(source, dtype)
    ids = ids[: model.max_context]
    with torch.no_grad():
        return model.logits(model.forward(ForwardBatch.packed([torch.tensor(ids)]), None))


def compare_logits(before_TV: Tensor, after_TV: Tensor) -> LogitDifference:
    """How far the second model's predictions are from the first's."""
    one, two = before_TV.double().log_softmax(1), after_TV.double().log_softmax(1)
    kl_T = (one.exp() * (one - two)).sum(1).clamp_min(0)
    return LogitDifference(
        num_places=len(kl_T),
        kl_mean=float(kl_T.mean()),
        kl_max=float(kl_T.max()),
        num_same_top=int((before_TV.argmax(1) == after_TV.argmax(1)).sum()),
        largest=float((before_TV - after_TV).abs().max() / before_TV.abs().max().clamp_min(1e-30)),
    )
