"""Pieces of text: joined they are the decoding of all ids at once, whatever the tokenizer and the ids."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from rwkv_miss.data.tokenizers import END, Tokenizer, load_tokenizer
from rwkv_miss.generation.text_stream import Detokenizer, StopStrings, thoughts_apart

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "▁the", "the", "▁你", "é", "##ing", "##", ".", "'s", "do not", "end</w>", "</w>", " ", "x"]
WORDS += ["\ufffd"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
HUGGING_FACE = {
    "byte level": (decoders.ByteLevel(), [*ALPHABET, "Ġthe", "ä½ł", "½ł", "<|x|>"]),
    "llama": (decoders.Sequence(LLAMA), WORDS + BYTE_TOKENS),
    "byte fallback": (decoders.Sequence(LLAMA[:3]), WORDS + BYTE_TOKENS),
    "byte names as text": (decoders.Metaspace(), WORDS + BYTE_TOKENS[:8]),
    "metaspace": (decoders.Metaspace(), WORDS),
    "metaspace, never prepended": (decoders.Metaspace(prepend_scheme="never"), WORDS),
    "word piece": (decoders.WordPiece(cleanup=False), WORDS),
    "word piece, cleaned": (decoders.WordPiece(cleanup=True), WORDS),
    "bpe": (decoders.BPEDecoder(), WORDS),
    "none": (None, WORDS),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Callable[[str], Tokenizer]:
    """`tokenizer(kind)`: world, bytes, or a tokenizer.json with a decoder and a vocabulary of `HUGGING_FACE`."""
    loaded = {name: load_tokenizer(name) for name in ("world", "bytes")}
    for kind, (decoder, words) in HUGGING_FACE.items():
        vocabulary = {word: i for i, word in enumerate(["<end>", *words])}
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="x"))
        if decoder is not None:
            inner.decoder = decoder
        path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
        inner.save(str(path))
        loaded[kind] = load_tokenizer(str(path))
    return loaded.__getitem__


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["world", "bytes", *HUGGING_FACE])
@settings(max_examples=300)
@given(data=st.data())
def test_the_pieces_of_any_ids_are_their_text(tokenizer, kind, data):
    tok = tokenizer(kind)
    token = st.integers(0, tok.vocab_size + 3)  # a model's vocabulary may be larger than its tokenizer's
    runs = st.builds(lambda t, n: [t] * n, token, st.integers(1, 40))
    ids = data.draw(st.lists(st.one_of(token.map(lambda t: [t]), runs)).map(lambda x: list(chain(*x))))
    pieces = pieces_of(tok, ids)
    assert "".join(pieces) == tok.decode(ids)


def byte_ids(kind: str, tok: Tokenizer, raw: bytes) -> list[int]:
    """The ids of tokens of one byte each."""
    if kind == "byte level":  # printable bytes are named by their Latin-1 characters, the others by U+0100 and on
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        names = {byte: chr(byte) for byte in printable}
        names |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in names)}
        inner = tokenizers.Tokenizer.from_file(tok.name)
        return [inner.token_to_id(names[byte]) for byte in raw]
    first = {"world": 1, "bytes": 0, "llama": len(WORDS) + 1, "byte fallback": len(WORDS) + 1}[kind]
    return [first + byte for byte in raw]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["world", "bytes", "byte level", "llama", "byte fallback"])
@settings(max_examples=300)
@given(data=st.data())
def test_the_pieces_of_what_is_nearly_utf_8(tokenizer, kind, data):
    """Whole characters among stray bytes and incomplete characters."""
    tok = tokenizer(kind)
    parts = st.one_of(st.text(max_size=3).map(lambda t: t.encode("utf-8", "ignore")), st.binary(max_size=3))
    raw = data.draw(st.lists(parts, max_size=30).map(b"".join)).replace(b"\0", b"")
    ids = byte_ids(kind, tok, raw)
    pieces = pieces_of(tok, ids)
    assert "".join(pieces) == tok.decode(ids)
    if kind in ("world", "bytes", "byte level"):
        assert "".join(pieces) == raw.decode("utf-8", "replace")


@pytest.mark.parametrize("kind", ["world", "bytes", "byte level"])
def test_a_character_comes_with_its_last_byte_and_what_is_none_with_the_next(tokenizer, kind):
    tok = tokenizer(kind)
    ids = byte_ids(kind, tok, "aé你😀".encode())
    assert pieces_of(tok, ids) == ["a", "", "é", "", "", "你", "", "", "", "😀", ""]
    assert pieces_of(tok, byte_ids(kind, tok, b"\xff\xffa\xe4")) == ["", "\ufffd", "\ufffda", "", "\ufffd"]


def test_a_run_of_byte_tokens_comes_when_it_is_over(tokenizer):
    tok = tokenizer("llama")
    word = 1 + WORDS.index("▁the")
    ids = [word, *byte_ids("llama", tok, "你\n".encode()), word, *byte_ids("llama", tok, "é".encode())]
    assert pieces_of(tok, ids) == ["the", "", "", "", "", "你\n the", "", "", "é"]


@pytest.mark.parametrize("kind", ["world", "bytes", "byte level", "llama"])
def test_ids_without_text_inside_a_character(tokenizer, kind):
    tok = tokenizer(kind)
    first, *rest = byte_ids(kind, tok, "é😀".encode())[1:]
    lead = byte_ids(kind, tok, "é".encode())[0]
    nothing = [END] if kind in ("world", "bytes") else [END, tok.vocab_size + 5]
    for n in range(1, 30):
        ids = [lead, first, rest[0], *nothing * n, *rest[1:]]
        assert "".join(pieces_of(tok, ids)) == tok.decode(ids) == "é😀", n


def test_names_of_bytes_that_the_decoder_leaves_as_they_are_come_at_once(tokenizer):
    assert pieces_of(tokenizer("byte names as text"), [len(WORDS) + 1, len(WORDS) + 2]) == ["<0x00>", "<0x01>", ""]


@pytest.mark.parametrize("kind", ["world", "bytes", *HUGGING_FACE])
@pytest.mark.parametrize("pattern", ["words", "broken", "unknown", "bytes"])
def test_the_cost_of_a_token_does_not_grow_with_the_text(tokenizer, kind, pattern):
    tok = tokenizer(kind)
    n = 3000
    ids = {
        "words": [1 + i % 5 for i in range(n)],
        "broken": [tok.encode("x")[0], *[0xE0 if kind == "bytes" else min(0xE0, tok.vocab_size - 1)] * n],
        "unknown": [*[tok.vocab_size + 2] * n, 1],
        "bytes": [min(len(WORDS) + 1 + 0x41, tok.vocab_size - 1)] * n,
    }[pattern]
    decoded = 0

    def decode(some: list[int]) -> str:
        nonlocal decoded
        decoded += len(some)
        return tok.decode(some)

    assert "".join(pieces_of(replace(tok, decode=decode), ids)) == tok.decode(ids)
    assert decoded < 20 * n


def test_tokens_without_text_after_one_that_may_be_incomplete(tokenizer):
    tok = tokenizer("word piece")
    ids = [1 + WORDS.index("\ufffd"), *[1 + WORDS.index("##")] * 15]
    assert "".join(pieces_of(tok, ids)) == tok.decode(ids) == "\ufffd"


# Stop strings


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: cut where a stop string is first complete; of several complete there, the longest is cut off."""
    for end in range(1, len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, complete))], True
    return text, False


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.lists(st.text("ab", max_size=5), max_size=12), st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_stop_strings_are_found_in_any_pieces(pieces, stops):
    found = StopStrings(stops)
    given_out, is_stopped = "", False
    for i, piece in enumerate(pieces):
        text, is_stopped = found.push(piece)
        given_out += text
        assert cut("".join(pieces), stops)[0].startswith(given_out)
        assert is_stopped == cut("".join(pieces[: i + 1]), stops)[1]
        if is_stopped:
            break
    assert (given_out + ("" if is_stopped else found.finish()), is_stopped) == cut("".join(pieces), stops)


def test_no_more_is_held_back_than_what_may_become_a_stop_string():
    found = StopStrings(["\n\nUser:", "END"])
    assert [found.push(t)[0] for t in ("yes\n", "\nU", "s", "ual EN", "T")] == ["yes", "", "", "\n\nUsual ", "ENT"]


@given(
    st.lists(st.sampled_from(["<", "think", "</", ">", "a", " ", "</think>", "\n<think"]), max_size=12),
    st.data(),
)
def test_thoughts_are_told_from_answers(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    found = list(thoughts_apart(pieces))
    thought = re.match("<think.*?(</think>|$)", text, re.DOTALL)
    assert "".join(x for x, _ in found) == text
    assert "".join(x for x, is_thought in found if is_thought) == (thought[0] if thought else "")
