"""The model that a run trains: loaded, or new with a tokenizer of its own; and the folder it becomes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lockstep.core.errors import ConfigError
from lockstep.interop.hf.save import save_folder
from lockstep.interop.weights import open_weights
from lockstep.models.families import build_model, hf_tensors, load_model
from lockstep.models.language import LanguageModel
from lockstep.tokenize.tokenizer import Tokenizer
from lockstep.tokenize.training import train_tokenizer


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained."""

    path: str = ""
    """Model folder or hub id to go on from (empty: a new model of the sizes below)."""
    width: int = 192
    """Width of a new model."""
    num_layers: int = 4
    """Layers of a new model."""
    num_heads: int = 6
    """Attention heads of a new model."""
    hidden: int = 512
    """Width inside the feed-forward of a new model."""
    vocab_size: int = 384
    """Tokens of a new model's tokenizer, learned from the task's own texts."""
    max_context: int = 512
    """Positions of a new model."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the products, in training and sampling alike; the optimiser changes float32 weights either way."""

    def architecture(self, vocab_size: int, eos_id: int) -> dict[str, Any]:
        """config.json of a new model: Qwen3, whose normalised queries and keys train steadily."""
        if self.width % self.num_heads or self.width % 32:
            raise ConfigError(f"width={self.width}; expected a multiple of 32 and of num_heads={self.num_heads}")
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "head_dim": self.width // self.num_heads,
            "max_position_embeddings": self.max_context,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "eos_token_id": eos_id,
            "torch_dtype": "float32",
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedModel:
    """A model with float weights, its tokenizer, and what its folder needs beside them."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: Mapping[str, Any]
    """config.json."""
    tokenizer_folder: Path

    def write(self, folder: Path, results: Mapping[str, Any], title: str) -> None:
        """A Hugging Face folder with weights, tokenizer and card; replaces an older one whole."""
        tensors = hf_tensors(self.model, self.config)
        save_folder(folder, self.config, tensors, tokenizer_from=self.tokenizer_folder, overwrite=True)
        (folder / "README.md").write_text(_card(self.model, results, title))


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A model that is only asked, with its tokenizer."""

    path: str
    model: LanguageModel
    tokenizer: Tokenizer
    tokenizer_folder: Path | None
    """None: a GGUF file holds it."""

    def folder_for(self, student: ModelConfig) -> Path | None:
        """Folder of the tokenizer that a new student takes over; None: the student brings its own.

        Raises:
            ConfigError: a new student of a GGUF file, whose tokenizer is no folder.
        """
        if student.path:
            return None
        if self.tokenizer_folder is None:
            raise ConfigError(
                f"a new student takes its teacher's tokenizer, and {self.path} is a GGUF file, which has no folder of one; "
                "give the student as model.path, or the teacher as a Hugging Face folder"
            )
        return self.tokenizer_folder

    def check(self, student: TrainedModel) -> None:
        """Distributions are compared token by token, so both must mean the same by them.

        Raises:
            ConfigError: names the first token that differs.
        """
        ours, theirs = student.tokenizer.vocabulary.tokens, self.tokenizer.vocabulary.tokens
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if place is not None:
            raise ConfigError(
                f"token {place} is {ours[place]!r} to the student and {theirs[place]!r} to the teacher {self.path}; "
                "distributions are compared token by token, so both need the same vocabulary: take a teacher of the "
                "student's family"
            )
        if len(ours) > student.model.vocab_size or len(ours) > self.model.vocab_size:
            raise ConfigError(
                f"the student's tokenizer has {len(ours)} tokens, the teacher's model {self.model.vocab_size}; the teacher "
                "must know every token that the student may write"
            )


def load_teacher(path: str, dtype: str = "auto") -> Teacher:
    """A teacher from wherever models are read: a folder, a run's directory, a GGUF file, a hub id.

    Raises:
        ConfigError: no path; InputError, FormatError: no such model, or one that cannot be read.
    """
    if not path:
        raise ConfigError("there is no teacher; give a model folder, a run's directory, a GGUF file or a hub id")
    source = open_weights(path)
    model, described = load_model(source, dtype), source.tokenizer()
    if isinstance(described, Path):
        return Teacher(path=path, model=model, tokenizer=Tokenizer.from_folder(described), tokenizer_folder=described)
    tokenizer = Tokenizer.from_gguf_metadata(described)
    return Teacher(path=path, model=model, tokenizer=tokenizer, tokenizer_folder=None)


def build(
    config: ModelConfig, texts: Iterable[str], seed: int, folder: Path | None, vocab_size: int | None = None
) -> TrainedModel:
    """The model to train, float32 weights and all of them trainable.

    Args:
        texts: what the tokenizer of a new model is learned from.
        folder: where that tokenizer lies, or is to be written; None: a temporary one.
        vocab_size: logits of a new model; None: as many as its tokenizer has ids, in whole tiles of the kernels.

    Raises:
        ConfigError: no such model, sizes that do not fit, or a model that cannot be trained.
    """
    if config.path:
        source = open_weights(config.path)
        described = source.tokenizer()
        if not isinstance(described, Path):
            raise ConfigError(
                f"{config.path} is a GGUF file; training goes on from a Hugging Face folder: convert it first"
            )
        model = load_model(source, config.dtype, trainable=True)
        return TrainedModel(
            model=model,
            tokenizer=Tokenizer.from_folder(described),
            config=source.config(),
            tokenizer_folder=described,
        )
    folder = folder or Path(tempfile.mkdtemp(prefix="lockstep-tokenizer-"))
    if not (folder / "tokenizer_config.json").is_file():
        train_tokenizer(texts, config.vocab_size, folder)
    tokenizer = Tokenizer.from_folder(folder)
    # Padded to a whole tile of the kernels; the rows beyond the vocabulary are never drawn by a trained model.
    size = vocab_size or (tokenizer.vocab_size + 31) // 32 * 32
    architecture = config.architecture(size, tokenizer.eos_ids[0])
    model = build_model(architecture, seed, config.dtype)
    return TrainedModel(model=model, tokenizer=tokenizer, config=architecture, tokenizer_folder=folder)


def _card(model: LanguageModel, results: Mapping[str, Any], title: str) -> str:
    size = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        *("---", "library_name: lockstep", "tags: [lockstep]", "---", f"# {title}", ""),
        *(
            f"A language model of {size:,} parameters ({model.facts.family}), trained with Lockstep.",
            "",
        ),
        *("| result | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in results.items()), ""),
        *("```sh", "lockstep serve FOLDER", "```", ""),
    ]
    return "\n".join(lines)
