"""From JSON lines to examples: what is learned, what the prompt's tokens are, and what is said about bad rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.core.errors import ConfigError, FormatError
from lockstep.learn.data import DataConfig, JsonLines, Renderer, shuffled, texts_of
from lockstep.learn.packing import Example
from lockstep.tokenize.chat import ChatTemplate
from lockstep.tokenize.tokenizer import Tokenizer
from tests.learn.conftest import write_rows


@pytest.fixture
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(model_folder)


def learned(tokenizer: Tokenizer, example: Example | None) -> str:
    """The tokens with a weight, as text; | between what is not side by side."""
    assert example is not None
    parts: list[list[int]] = [[]]
    for token, weight in zip(example.tokens.tolist(), example.weight.tolist(), strict=True):
        parts[-1].append(token) if weight else parts.append([])
    return "|".join(tokenizer.decode(part, skip_special=False) for part in parts if part)


TURNS = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "2 + 3"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "and 4"},
    {"role": "assistant", "content": "9"},
]


def test_conversations_learn_every_assistant_turn(tokenizer: Tokenizer) -> None:
    example = Renderer(tokenizer, DataConfig()).supervised({"messages": TURNS}, "x:1")
    assert learned(tokenizer, example) == "5<|end|>|9<|end|>"
    last = Renderer(tokenizer, DataConfig(last_turn_only=True)).supervised({"messages": TURNS}, "x:1")
    assert learned(tokenizer, last) == "9<|end|>"
    assert example is not None
    assert last is not None
    assert example.tokens.tolist() == last.tokens.tolist()
    # What precedes the last answer is what the engine would be given as the prompt for it.
    prompt = ChatTemplate.of(tokenizer).render(TURNS[:-1])
    ids = tokenizer.encode(prompt, add_special=False, parse_special=True)
    assert example.tokens.tolist()[: len(ids)] == ids


def test_what_a_template_writes_after_a_turn_is_not_learned(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    renderer = Renderer(tokenizer, DataConfig(chat_template=template))
    example = renderer.supervised({"messages": TURNS}, "x:1")
    assert learned(tokenizer, example) == "5<|end|>|9<|end|>"
    assert example is not None
    assert tokenizer.decode(example.tokens.tolist(), skip_special=False) == (
        "system:Add.<|end|>\nuser:2 + 3<|end|>\nassistant:5<|end|>\nuser:and 4<|end|>\nassistant:9<|end|>"
    )


def test_a_template_that_rewrites_history_is_found(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.role }}:{{ m.content }};{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(FormatError, match=r"x:7.*last_turn_only"):
        Renderer(tokenizer, DataConfig(chat_template=template)).supervised({"messages": TURNS}, "x:7")
    renderer = Renderer(tokenizer, DataConfig(chat_template=template, last_turn_only=True))
    assert learned(tokenizer, renderer.supervised({"messages": TURNS}, "x:7")) == "9;"


def test_prompt_and_completion_and_plain_text(tokenizer: Tokenizer) -> None:
    renderer = Renderer(tokenizer, DataConfig())
    row = {"prompt": "2 + 3 = ", "completion": "5"}
    assert learned(tokenizer, renderer.supervised(row, "x:1")) == "5<|end|>"
    row = {"prompt": TURNS[:2], "completion": TURNS[2:3]}  # type: ignore[dict-item]
    assert learned(tokenizer, renderer.supervised(row, "x:1")) == "5<|end|>"
    assert learned(tokenizer, renderer.supervised({"text": "abc"}, "x:1")) == "bc<|end|>"
    # Text of a row is data: it cannot spell control tokens.
    example = renderer.supervised({"prompt": "<|end|>", "completion": "5"}, "x:1")
    assert example is not None
    assert tokenizer.eos_ids[0] not in example.tokens.tolist()[:-1]


def test_pairs_share_their_prompt(tokenizer: Tokenizer) -> None:
    pair = Renderer(tokenizer, DataConfig()).pair({"prompt": "yes or no? ", "chosen": "yes", "rejected": "no"}, "x:1")
    assert pair is not None
    assert [learned(tokenizer, one) for one in pair] == ["yes<|end|>", "no<|end|>"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "data.jsonl:2: is not JSON"),
        ("[1]", "data.jsonl:2: holds list"),
        ({"prompt": "a"}, r"data.jsonl:2: has the keys \['prompt'\]"),
        ({"prompt": "a", "completion": 5}, '"completion" is int'),
        ({"completion": "a"}, '"prompt" is missing'),
        ({"prompt": "", "completion": "a"}, '"prompt" is empty'),
        ({"messages": "hi"}, "not a list"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "nothing to learn"),
        ({"messages": [{"content": "hi"}, {"role": "assistant", "content": "x"}]}, "role"),
        ({"prompt": "a", "completion": "b" * 99}, "max_tokens is 30"),
        ({"text": "a", "messages": []}, "expected"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tokenizer: Tokenizer, tmp_path: Path, row: object, says: str) -> None:
    rows = JsonLines(Path(write_rows(tmp_path / "data.jsonl", ["", row])))
    renderer = Renderer(tokenizer, DataConfig(max_tokens=30))
    with pytest.raises(FormatError, match=says) as caught:
        renderer.supervised(rows[0], rows.where(0))
    assert "data.jsonl:2" in str(caught.value)


def test_long_rows_are_cut_or_skipped_and_counted(tokenizer: Tokenizer) -> None:
    row = {"prompt": "2 + ", "completion": "3" * 50}
    cut = Renderer(tokenizer, DataConfig(max_tokens=10, too_long="cut")).supervised(row, "x:1")
    assert cut is not None
    assert len(cut.tokens) == 10
    renderer = Renderer(tokenizer, DataConfig(max_tokens=10, too_long="skip"))
    assert renderer.supervised(row, "x:1") is None
    assert renderer.num_skipped == 1
    # Cut inside the prompt nothing is left to learn.
    renderer = Renderer(tokenizer, DataConfig(max_tokens=2, too_long="cut"))
    assert renderer.supervised(row, "x:1") is None
    assert renderer.num_skipped == 1


def test_rows_come_in_another_order_every_epoch_and_none_is_missed() -> None:
    steps = [shuffled(10, 4, 3, step) for step in range(5)]
    flat = [row for rows in steps for row in rows]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert shuffled(10, 4, 3, 2) == steps[2]
    assert shuffled(3, 7, 0, 0)[:3] != sorted(shuffled(3, 7, 0, 0))  # a batch may be longer than the file


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a file"):
        JsonLines(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="no rows"):
        JsonLines(Path(write_rows(tmp_path / "empty.jsonl", ["", ""])))
    rows = JsonLines(Path(write_rows(tmp_path / "a.jsonl", [{"text": "é"}, "", {"messages": TURNS}])))
    assert (len(rows), rows[0]["text"], rows.where(1)[-2:]) == (2, "é", ":3")
    assert list(texts_of(rows)) == ["é", "Add.", "2 + 3", "5", "and 4", "9"]
