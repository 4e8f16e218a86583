from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.core.errors import InputError
from lockstep.tokenize.detokenise import IncrementalDecoder, StopMatcher
from lockstep.tokenize.tokenizer import Tokenizer
from tests.tokenize.vocabularies import load

NAMES = ["gpt-2", "llama-spm", "phi-3", "deepseek-coder"]
HARD = ["🫠", "龜", "👩‍👩‍👧‍👦", "é", " ", "  ", "a", "\n", "ᄒ", "🏳️‍🌈", "<", "\u0301"]
texts = st.lists(st.one_of(st.sampled_from(HARD), st.text(max_size=3)), max_size=12).map("".join)


def pieces(tokenizer: Tokenizer, ids: list[int], **options: Any) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, **options)
    return [*(decoder.push(index) for index in ids), decoder.flush()]


@pytest.mark.parametrize("name", NAMES)
def test_text_comes_back_in_whole_characters(name: str) -> None:
    tokenizer = load(name)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(texts)
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        got = pieces(tokenizer, ids)
        assert "".join(got) == text == tokenizer.decode(ids, skip_special=True)
        assert not any("�" in piece for piece in got) or "�" in text
        assert got[-1] == ""

    check()


@pytest.mark.parametrize("name", NAMES)
def test_any_ids_give_what_decode_gives(name: str) -> None:
    tokenizer = load(name)
    ids = st.integers(0, tokenizer.vocab_size + 3)
    low = st.integers(0, 258)  # mostly single bytes in each of these vocabularies

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(st.one_of(ids, low), max_size=24), st.booleans(), st.booleans())
    def check(row: list[int], skip: bool, continuing: bool) -> None:
        got = pieces(tokenizer, row, skip_special=skip, continuing=continuing)
        assert "".join(got) == tokenizer.decode(row, skip_special=skip, continuing=continuing)

    check()


def test_byte_tokens_wait_for_each_other() -> None:
    tokenizer = load("llama-spm")
    ids = [3 + byte for byte in "🫠".encode()]
    assert pieces(tokenizer, ids) == ["", "", "", "🫠", ""]
    assert pieces(tokenizer, ids[:3]) == ["", "", "", "�"]
    assert pieces(tokenizer, [*ids[:2], ids[0]]) == ["", "", "�", "�"]


def test_first_space_of_a_continued_text_is_kept() -> None:
    tokenizer = load("llama-spm")
    world = tokenizer.id_of("▁world")
    assert "".join(pieces(tokenizer, [1, world])) == "world"
    assert "".join(pieces(tokenizer, [world], continuing=True)) == " world"
    assert "".join(pieces(tokenizer, [1, world], skip_special=False)) == "<s> world"


def naive_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if include else end - len(stop)], stop


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.text("ab!", max_size=14),
    st.lists(st.text("ab!", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 14), max_size=6),
    st.booleans(),
)
def test_stops_do_not_depend_on_the_cuts(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    matcher = StopMatcher(stops, include_stop=include)
    bounds = [0, *sorted(cuts), len(text)]
    got = ""
    for start, end in itertools.pairwise(bounds):
        got += matcher.push(text[start:end]).text
    got += matcher.flush()
    assert (got, matcher.stopped) == naive_stop(text, stops, include)


def test_only_a_possible_stop_is_held_back() -> None:
    matcher = StopMatcher(["</end>", "\n\n"])
    assert [matcher.push(piece).text for piece in ("a<", "b</e", "n\n", "c")] == ["a", "<b", "</en", "\nc"]
    with pytest.raises(InputError, match="empty stop"):
        StopMatcher(["a", ""])
