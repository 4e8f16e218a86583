"""A language model from one of the forms it is kept in to another: GGUF file or Hugging Face folder, written, read again and
compared before it appears under its name."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lockstep.core.errors import ConfigError, ExportError, FormatError, unknown_name
from lockstep.core.tensors import TensorSource
from lockstep.interop import alike
from lockstep.interop.files import folder_replaced_when_checked, replaced_when_checked
from lockstep.interop.gguf.export import save_gguf
from lockstep.interop.gguf.source import GGUFSource
from lockstep.interop.gguf.vocabulary import VocabularyFields, vocabulary_fields
from lockstep.interop.gguf.writer import check_room
from lockstep.interop.hf.folder import HFFolder
from lockstep.interop.hf.save import MORE_TEMPLATES, TOKENIZER_FILES, save_folder
from lockstep.interop.hf.tokenizer_files import write_tokenizer
from lockstep.tokenize.gguf_vocabulary import is_phi3
from lockstep.tokenize.vocabulary import Vocabulary

STORED = "stored"
PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FORMATS: dict[str, str | None] = {
    STORED: None,
    **{name: name.upper() for name in PLAIN},
    **{name: name.upper() for name in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q6_k", "iq4_nl", "mxfp4_moe")},
    **{name: name.upper() for name in ("q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m")},
    "q4_k": "Q4_K_M",
    "q5_k": "Q5_K_M",
}
"""What `format` may be, and what `save_gguf` calls it."""
_FOLDER_FILES = (*TOKENIZER_FILES, "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was written, and what was found when it was read again."""

    path: Path
    num_bytes: int
    """Of the weights as they were before, `num_bytes_written` as they are now."""
    num_bytes_written: int
    kinds: dict[str, int]
    """Tensors by format."""
    num_texts: int | None
    """Texts with equal ids; None: not compared."""
    logits: alike.LogitDifference | None
    notes: list[str] = field(default_factory=list)


def convert(
    source: TensorSource,
    out: Path,
    *,
    format: str = STORED,
    pure: bool = False,
    requantise: bool = False,
    name: str = "model",
    overwrite: bool = False,
    check: bool = True,
) -> Conversion:
    """Write a model as GGUF (`out` ends in .gguf) or as a Hugging Face folder.

    Ids of a set of texts must be equal afterwards, chat templates too, and logits of a prompt within `alike.SAME` where the
    format holds the same numbers; where it does not, their difference is told.

    Args:
        format: a key of `FORMATS`; "stored" keeps the numbers as they are. Folders hold stored (blocks as float32), f32, f16
            and bf16.
        pure: all matrices in that one format, not as llama-quantize mixes formats under its name.
        requantise: quantise what is quantised already, which loses twice.
        name: of the model, in the file.
        overwrite: replace what is there.
        check: read again and compare; the model is then in memory, once at a time.

    Raises:
        ConfigError: the wish makes no sense, something is there, no room, or a tokenizer that the form has no words for.
        ExportError: what was written is not the same model; nothing is left of it.
        InputError, FormatError: the source is damaged, or of a family that the form does not have.
    """
    if format not in FORMATS:
        raise ConfigError(unknown_name("format", format, FORMATS))
    is_file = out.suffix == ".gguf"
    if not is_file and format != STORED and format not in PLAIN:
        raise ConfigError(
            f"{format} is a format of GGUF files: give an output that ends in .gguf, or one of f32, f16, bf16"
        )
    _check_place(out, overwrite)
    kinds = _kinds(source)
    blocks = [kind for kind in kinds if kind not in _DTYPES]
    if blocks and is_file and format != STORED and format not in PLAIN and not requantise:
        raise ConfigError(
            f"the model is quantised already ({', '.join(blocks)}): quantising it anew loses twice. Take the model it was made "
            "from, or say that it is meant (--requantise)"
        )
    exact = is_exact(format, kinds) and (is_file or format in (STORED, "f32") or _holds_vectors(source, PLAIN[format]))
    wish = _Wish(source, out, format, pure, name, exact, check)
    return _to_gguf(wish) if is_file else _to_folder(wish)


@dataclass(frozen=True)
class _Wish:
    source: TensorSource
    out: Path
    format: str
    pure: bool
    name: str
    is_exact: bool
    check: bool


def _check_place(out: Path, overwrite: bool) -> None:
    """Refuses before anything is computed."""
    if out.suffix == ".gguf":
        if out.is_dir():
            raise ConfigError(f"{out} is a folder; give a file")
        if out.exists() and not overwrite:
            raise ConfigError(f"{out} is there already; give another place, or --overwrite")
        return
    if out.is_file():
        raise ConfigError(f"{out} is a file; a folder or a file that ends in .gguf can be written")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out} is there already; give another place, or --overwrite")
    strange = [
        item.name
        for item in out.iterdir()
        if item.name != MORE_TEMPLATES and not any(item.match(pattern) for pattern in _FOLDER_FILES)
    ]
    if strange:
        raise ConfigError(f"{out} holds more than a model ({', '.join(sorted(strange)[:5])}); it is not overwritten")


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def _kinds(source: TensorSource) -> dict[str, int]:
    """Bytes of the matrices by format."""
    names = {dtype: kind for kind, dtype in _DTYPES.items()}
    found: Counter[str] = Counter()
    for name in source.names():
        if len(source.shape(name)) < 2:
            continue
        if (blocks := source.quantised(name)) is not None:
            found[blocks.kind] += blocks.data.nbytes
        else:
            tensor = source.tensor(name)
            found[names.get(tensor.dtype, str(tensor.dtype))] += tensor.nbytes
    return dict(found)


def is_exact(format: str, kinds: dict[str, int]) -> bool:
    """Whether the format holds every number of matrices of these kinds.

    >>> is_exact("bf16", {"F32": 4}), is_exact("f32", {"BF16": 2}), is_exact("stored", {"Q4_0": 1})
    (False, True, True)
    """
    return format in (STORED, "f32") or (format in PLAIN and all(kind == FORMATS[format] for kind in kinds))


def _holds_vectors(source: TensorSource, dtype: torch.dtype) -> bool:
    """Whether norms and biases, which a folder keeps in the one format too, lose nothing in it."""
    vectors = (source.tensor(name) for name in source.names() if len(source.shape(name)) < 2)
    return all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in vectors)


def _to_gguf(wish: _Wish) -> Conversion:
    source, out = wish.source, wish.out
    notes: list[str] = []
    words: VocabularyFields | None = None
    described = source.tokenizer()
    if isinstance(described, Path):
        if (described / "tokenizer.json").is_file():
            words = vocabulary_fields(described, _vocab_size(source))
            notes += words.notes
        else:
            notes.append(
                f"{described} has no tokenizer.json: the file has no vocabulary, so texts cannot be sent to it"
            )
    else:
        _check_name(described, wish.name)
    about = {} if isinstance(described, Path) else _about(source)
    with replaced_when_checked(out, ".gguf") as temporary:
        stored = save_gguf(
            temporary,
            source,
            FORMATS[wish.format],
            pure=wish.pure,
            tokenizer=None if words is None else words.fields,
            name=wish.name,
            about=about,
        )
        kinds = Counter(stored.values())
        return _checked(wish, GGUFSource.open(temporary), kinds, notes, words or VocabularyFields({}))


def _check_name(described: dict[str, Any], name: str) -> None:
    """Refuses a name that would change how readers take texts apart."""
    before, after = is_phi3(described), is_phi3({**described, "general.name": name})
    if before != after and described.get("tokenizer.ggml.model") == "llama":
        raise ConfigError(
            f"the name {name!r} would change ids: that special tokens swallow the spaces after them is told by phi-3 in the "
            f"model's name alone; give a --name {'with' if before else 'without'} phi-3"
        )


def _about(source: TensorSource) -> dict[str, Any]:
    """What a file says of its model beside what is written anew: author, licence, tags."""
    if not isinstance(source, GGUFSource):
        return {}
    anew = ("architecture", "type", "name", "file_type", "quantization_version", "alignment")
    names = {f"general.{name}" for name in anew}
    return {
        key: value for key, value in source.file.metadata.items() if key.startswith("general.") and key not in names
    }


def _vocab_size(source: TensorSource) -> int:
    size = source.config().get("vocab_size")
    if not isinstance(size, int):
        raise FormatError(f"the config has vocab_size={size!r}; expected a whole number")
    return size


def _to_folder(wish: _Wish) -> Conversion:
    source, out = wish.source, wish.out
    notes: list[str] = []
    described = source.tokenizer()
    is_file = not isinstance(described, Path)
    dtype = PLAIN[wish.format] if wish.format in PLAIN else _main_dtype(source)
    keep = wish.format == STORED and not is_file
    config = {key: value for key, value in source.config().items() if key != "dtype"}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_room(out.parent, sum(math.prod(source.shape(name)) for name in source.names()) * dtype.itemsize)
    kinds: Counter[str] = Counter()
    with folder_replaced_when_checked(out, "config.json") as temporary:
        save_folder(
            temporary,
            config,
            _cast(source, dtype, kinds, keep=keep, whole=wish.format in PLAIN),
            generation_config=source.generation_config(),
            tokenizer_from=described if isinstance(described, Path) else None,
        )
        if not isinstance(described, Path) and alike.tokenizer_of(source) is not None:
            _write_words(temporary, described, source)
        elif alike.tokenizer_of(source) is None:
            copied = any((temporary / name).is_file() for name in TOKENIZER_FILES)
            notes.append(
                "there is no tokenizer.json, so ids were not compared"
                if copied
                else "the model has no tokenizer: the folder has none either"
            )
        return _checked(wish, HFFolder.open(temporary), kinds, notes, VocabularyFields({}))


def _checked(
    wish: _Wish, written: TensorSource, kinds: Counter[str], notes: list[str], words: VocabularyFields
) -> Conversion:
    """What is told of a model that was written, once it has been compared with its source."""
    texts, logits = _compare(wish, written, notes, words)
    return Conversion(
        path=wish.out,
        num_bytes=_stored_bytes(wish.source),
        num_bytes_written=_stored_bytes(written),
        kinds=dict(kinds.most_common()),
        num_texts=texts,
        logits=logits,
        notes=notes,
    )


def _write_words(folder: Path, described: dict[str, Any], source: TensorSource) -> None:
    config = source.config()
    context = config.get("max_position_embeddings") or config.get("n_positions")
    vocabulary = write_tokenizer(folder, described, max_context=context)
    generation = _generation_config(source, vocabulary)
    if generation:
        text = json.dumps(generation, indent=2, sort_keys=True) + "\n"
        (folder / "generation_config.json").write_text(text, "utf-8")


def _generation_config(source: TensorSource, vocabulary: Vocabulary) -> dict[str, Any]:
    """What ends a text in the file ends it in `generate`, and recommended sampling is switched on there."""
    found = source.generation_config()
    ends = list(vocabulary.eos_ids)
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if vocabulary.pad_id is not None:
        found["pad_token_id"] = vocabulary.pad_id
    if found.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        found["do_sample"] = True
    return found


def _main_dtype(source: TensorSource) -> torch.dtype:
    """Of the most bytes of matrices; float32, which holds them exactly, where there are blocks."""
    kinds = _kinds(source)
    if any(kind not in _DTYPES for kind in kinds):
        return torch.float32
    return _DTYPES[max(kinds, key=lambda kind: kinds[kind])] if kinds else torch.float32


def _cast(
    source: TensorSource, dtype: torch.dtype, kinds: Counter[str], *, keep: bool, whole: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors by Hugging Face name.

    Args:
        keep: each as it is.
        whole: each in `dtype`; else those that it holds exactly, as the float32 norms of a file of bfloat16 were.
    """
    for name in source.names():
        tensor = source.tensor(name)
        if not keep and tensor.is_floating_point() and tensor.dtype != dtype:
            cast = tensor.to(dtype)
            tensor = cast if whole or torch.equal(cast.to(tensor.dtype), tensor) else tensor
        kinds[str(tensor.dtype).removeprefix("torch.")] += 1
        yield name, tensor


def _stored_bytes(source: TensorSource) -> int:
    if isinstance(source, GGUFSource):
        return sum(info.num_bytes for info in source.file.tensors.values())
    return sum(source.tensor(name).nbytes for name in source.names())


def _compare(
    wish: _Wish, written: TensorSource, notes: list[str], words: VocabularyFields
) -> tuple[int | None, alike.LogitDifference | None]:
    """Ids, but for what `words` says of them, and logits of what was written and of what it was made from."""
    if not wish.check:
        return None, None
    before, after = alike.tokenizer_of(wish.source), alike.tokenizer_of(written)
    texts = None
    if (before is None) != (after is None):
        raise ExportError("the tokenizer was not written; nothing is left of the rest")
    if before is not None and after is not None:
        texts = alike.compare_ids(
            before,
            after,
            nfc=words.needs_nfc,
            special=not words.spaces_differ,
            first_space=not words.first_space_differs,
        )
    ids = alike.prompt_ids(before, _vocab_size(wish.source))
    has_blocks = any(kind not in _DTYPES for kind in _kinds(wish.source))
    is_unpacked = has_blocks and (isinstance(written, HFFolder) or wish.format in PLAIN)
    one: TensorSource = _Unpacked(wish.source) if is_unpacked else wish.source
    # Half precision is run as such, with rounded activations; what became float32 of it is not.
    dtype = "fp32" if is_unpacked or wish.format == "f32" else "auto"
    try:
        logits = alike.logits_of(one, ids, dtype)
    except (ConfigError, FormatError) as error:
        notes.append(f"logits were not compared, for the model cannot be run here: {error}")
        return texts, None
    try:
        found = alike.compare_logits(logits, alike.logits_of(written, ids, dtype))
    except (ConfigError, FormatError) as error:
        raise ExportError(f"what was written cannot be run: {error}; nothing is left of it") from error
    if not math.isfinite(found.largest) or (wish.is_exact and found.largest > alike.SAME):
        raise ExportError(f"the logits of what was written are not those of the model: {found}; nothing was written")
    return texts, found


class _Unpacked:
    """A source whose blocks are plain numbers, as they are in a folder or a file of f32, f16 or bf16."""

    def __init__(self, source: TensorSource) -> None:
        self.config, self.generation_config, self.tokenizer = source.config, source.generation_config, source.tokenizer
        self.names, self.shape, self.tensor = source.names, source.shape, source.tensor

    def quantised(self, name: str) -> None:
        """None is."""
        return


__all__ = ["FORMATS", "Conversion", "convert", "is_exact"]
