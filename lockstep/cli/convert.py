"""`lockstep convert`: a language model as a GGUF file or as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lockstep.cli.model_words import of_run
from lockstep.cli.store_args import byte_words, stored_path, suggesting
from lockstep.interop.convert import Conversion, convert
from lockstep.interop.gguf.source import GGUFSource
from lockstep.interop.weights import open_weights
from lockstep.kernels import set_num_threads


@dataclass(frozen=True)
class ConvertArgs:
    """Write a language model, its tokenizer and chat template included, as a GGUF file or as a Hugging Face folder; read it
    again and compare ids and logits before it appears under its name."""

    model: Annotated[str, tyro.conf.Positional]
    """A GGUF file, a Hugging Face folder, a run that trained a language model, a name in the store, or a hub id."""
    out: Annotated[Path, tyro.conf.Positional]
    """What to write: a file if it ends in .gguf, else a folder."""
    format: str = "stored"
    """stored keeps the numbers as they are. f32, f16, bf16; of a GGUF file also q8_0, q4_0, q4_1, q5_0, q5_1, q4_k_s, q4_k_m
    (or q4_k), q5_k_s, q5_k_m (or q5_k), q6_k, iq4_nl, mxfp4_moe, mixed as llama-quantize mixes them."""
    pure: bool = False
    """All matrices in that one format, the output matrix too."""
    requantise: bool = False
    """Quantise a model that is quantised already, which loses twice."""
    name: str = ""
    """Of the model, in the file; empty: as it is called."""
    weights: str = ""
    """Of a run that kept an average: trained or averaged; empty: what it serves."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    overwrite: bool = False
    """Replace the file, or the folder if it holds nothing but a model."""
    check: bool = True
    """Read what was written and compare; needs memory for the model."""
    num_threads: int = 0
    """Threads of the model while comparing (0: one a processor)."""
    store: Path | None = None
    """Folder of the model store; None: lockstep/models in the user's cache."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(ConvertArgs, args=list(args), prog="lockstep convert")
    set_num_threads(wish.num_threads)
    path = stored_path(of_run(wish.model, wish.weights), wish.store)
    with suggesting(wish.model, wish.store):
        source = open_weights(path, revision=wish.revision)
    made = convert(
        source,
        wish.out,
        format=wish.format.lower(),
        pure=wish.pure,
        requantise=wish.requantise,
        name=wish.name or _name(wish.model, source),
        overwrite=wish.overwrite,
        check=wish.check,
    )
    print("\n".join(_lines(made)))
    return 0


def _name(word: str, source: object) -> str:
    """What the file itself says, else the last part of the word."""
    said = source.tokenizer().get("general.name") if isinstance(source, GGUFSource) else None
    return str(said) if said else Path(word).resolve().name.removesuffix(".gguf")


def _lines(made: Conversion) -> list[str]:
    kinds = ", ".join(f"{num} x {kind}" for kind, num in made.kinds.items())
    share = made.num_bytes_written / made.num_bytes
    lines = [
        f"wrote {made.path}: tensors {kinds}",
        f"weights  {byte_words(made.num_bytes_written)}, {share:.0%} of the {byte_words(made.num_bytes)} before",
    ]
    if made.num_texts is not None:
        lines.append(f"ids      equal for {made.num_texts} texts, chat template too")
    if made.logits is not None:
        lines.append(f"logits   {made.logits}")
    return lines + [f"note     {note}" for note in made.notes]
