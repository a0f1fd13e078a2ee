"""Tokenizers: their ids and texts are those of the reference implementations."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import rwkv
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
from tokenizers import decoders, models, pre_tokenizers, processors

from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import UserError

WORLD = load_tokenizer("world")
BYTES = load_tokenizer("bytes")
REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "data"


@pytest.fixture(scope="module")
def trie():
    return TRIE_TOKENIZER(str(Path(rwkv.__file__).parent / "rwkv_vocab_v20230424.txt"))


@pytest.mark.slow
def test_world_has_the_trie_s_ids_for_every_token(trie):
    assert WORLD.vocab_size == max(trie.idx2token) + 1 == 65530
    for token, piece in trie.idx2token.items():
        text = piece.decode("utf-8", errors="replace")
        assert WORLD.decode([token]) == text
        if "\ufffd" not in text:
            assert WORLD.encode(text) == [token]


def test_world_has_the_trie_s_ids_for_real_text(trie):
    text = (
        "User: 你好，世界！今天天氣如何？\n\nAssistant: \U0001f469\u200d\U0001f469\u200d\U0001f467 🇩🇪 naïve Zürich — ﬁn"
    )
    text += "\r\n\t\tпривет こんにちは 한국어 مرحبا\n\n\n    return 100000 == 1e5\0\x7f"
    if REFERENCE.exists():
        text += (REFERENCE / "gsm8k-train.jsonl").read_text(encoding="utf-8")[:200_000]
    assert WORLD.encode(text) == trie.encode(text)
    assert WORLD.decode(WORLD.encode(text)) == text


@given(st.text())
def test_world_has_the_trie_s_ids_for_any_text(trie, text):
    assert WORLD.encode(text) == trie.encode(text)
    assert WORLD.decode(WORLD.encode(text)) == text


@given(st.lists(st.integers(0, 65535)))
def test_world_decodes_any_ids(trie, ids):
    joined = b"".join(trie.idx2token.get(i, b"\xff" if i else b"") for i in ids)
    assert WORLD.decode(ids) == joined.decode("utf-8", errors="replace")


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8")))
def test_bytes(text):
    assert BYTES.encode(text) == list(text.encode("utf-8"))
    assert BYTES.decode([*BYTES.encode(text), 0]) == text


def test_bytes_decodes_any_ids():
    assert BYTES.vocab_size == 256
    assert BYTES.decode([97, 0xE4, 0xBD, 98, 256, 0]) == "a\ufffdb\ufffd"


@pytest.fixture(scope="module")
def json_path(tmp_path_factory):
    """A byte-level tokenizer of three merges that truncates, pads and adds a token unless told otherwise."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(["<end>", *alphabet, "Ġa", "Ġan", "Ġand"])}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [("Ġ", "a"), ("Ġa", "n"), ("Ġan", "d")]))
    inner.add_special_tokens(["<end>", "<pad>"])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing("<end> $A", special_tokens=[("<end>", 0)])
    inner.enable_truncation(4)
    inner.enable_padding(length=8, pad_id=260, pad_token="<pad>")
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    inner.save(str(path))
    return path


def test_hugging_face(json_path):
    tokenizer = load_tokenizer(str(json_path))
    assert tokenizer.vocab_size == 261
    text = "this and that and 你好 and more than four"
    ids = tokenizer.encode(text)
    assert ids.count(259) == 3 and 260 not in ids and 0 not in ids
    assert tokenizer.decode([*ids, 0]) == text
    assert tokenizer.encode(" and") == [259]
    assert tokenizer.decode([260]) == "<pad>"
    assert tokenizer.decode([tokenizer.encode("你")[0]]) == "\ufffd"


def test_pickled(json_path):
    for name in ("world", "bytes", str(json_path)):
        copy = pickle.loads(pickle.dumps(load_tokenizer(name)))
        assert copy.name == name
        assert copy.encode("and so on") == load_tokenizer(name).encode("and so on")


def test_a_tokenizer_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="tokenizer 'word': no such file; give world, bytes, or the path"):
        load_tokenizer("word")
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"tokenizer\.json': is not a Hugging Face tokenizer\.json \("):
        load_tokenizer(str(path))
    tokenizers.Tokenizer(models.WordLevel({}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(UserError, match=r"tokenizer\.json': has no tokens"):
        load_tokenizer(str(path))


def test_a_word_that_a_tokenizer_has_no_token_for(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    tokenizers.Tokenizer(models.WordLevel({"<end>": 0, "known": 1}, unk_token="[UNK]")).save(path)
    assert load_tokenizer(path).encode("known") == [1]
    with pytest.raises(UserError, match=r"tokenizer\.json': cannot encode 'unknown' \(.*UNK"):
        load_tokenizer(path).encode("unknown")
