"""Data files as records: what is read, which unread fields are reported, and what is refused."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import lzma
import pickle
import shutil
import subprocess
import zipfile
from itertools import islice

import pyarrow.ipc
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers import json_array, jsonl, table, text, txt
from rwkv_miss.data.readers.instead import BY_SUFFIX
from rwkv_miss.data.readers.reader import block_records, read_blocks, read_records
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.errors import UserError


def assert_refused(path, content, said):
    """The file of these bytes is refused with a message that begins so, after its name."""
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_records(path, DataOptions()))
    assert str(error.value).startswith(f"{path}{said}")


def write(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def turns(path, **options):
    return [record.turns for record in read_records(path, DataOptions(**options))]


def test_known_shapes(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"text": " as it\r\nis "},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "do", "input": "", "output": "done"},
        {"instruction": "do", "output": "done"},
        {"query": "q", "response": "r", "input": "not of this pair"},
        {"question": "q", "answer": "a", "text": None},
        {"prompt": "p", "completion": "c"},
    )
    assert turns(path) == [
        (Turn("text", " as it\r\nis "),),
        (Turn("user", "q"), Turn("assistant", "a")),
        (Turn("user", "do", "this"), Turn("assistant", "done")),
        (Turn("user", "do"), Turn("assistant", "done")),
        (Turn("user", "do"), Turn("assistant", "done")),
        (Turn("user", "q"), Turn("assistant", "r")),
        (Turn("user", "q"), Turn("assistant", "a")),
        (Turn("user", "p"), Turn("assistant", "c")),
    ]


def test_where_counts_blank_lines_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "\\u2028b"}')
    assert list(read_records(path, DataOptions())) == [
        Record(f"{path}:1", (Turn("text", "a"),)),
        Record(f"{path}:4", (Turn("text", "\u2028b"),)),
    ]


def test_fields_by_option_win_over_known_shapes(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "t", "question": "q", "answer": "a", "body": "b", "output": "o"})
    assert turns(path, prompt_field="body", answer_field="output") == [(Turn("user", "b"), Turn("assistant", "o"))]
    assert turns(path, text_field="body") == [(Turn("text", "b"),)]


def test_txt_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert list(read_records(path, DataOptions())) == [Record(f"{path}:1", (Turn("text", "one\n\ntwo\n"),))]


def test_txt_parted_by_a_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\nmore\n---\n\n---\ntwo\n---\n")
    assert list(read_records(path, DataOptions(separator="---\n"))) == [
        Record(f"{path}:1", (Turn("text", "one\nmore\n"),)),
        Record(f"{path}:6", (Turn("text", "two\n"),)),
    ]


@pytest.mark.parametrize("size", [1, 7, 30, 1000])
def test_blocks_of_any_size_are_whole_lines(tmp_path, monkeypatch, size):
    monkeypatch.setattr(jsonl, "BLOCK_SIZE", size)
    lines = [b'\xef\xbb\xbf{"text": "a"}', b"", b'{"text": "%s"}' % (b"b" * 40), b'{"text": "c"}\r', b'{"text": "d"}']
    (path := tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    blocks = [pickle.loads(pickle.dumps(block)) for block in read_blocks(path, DataOptions())]
    records = [record for block in blocks for record in block_records(block, DataOptions())]
    assert records == [*read_records(path, DataOptions())]
    assert [record.where for record in records] == [f"{path}:{number}" for number in (1, 3, 4, 5)]
    assert all(block.content.endswith(b"\n") for block in blocks[:-1])
    assert len(blocks) == {1: 4, 7: 4, 30: 2, 1000: 1}[size]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), VALUES), st.booleans(), st.binary(max_size=3), st.integers(0, 300))
def test_a_line_is_what_the_standard_library_reads(item, is_ascii, change, at):
    """Also where it is no JSON: then it is refused."""
    text = json.dumps(item, ensure_ascii=is_ascii).encode()
    raw = text[:at] + change + text[at + len(change) :]
    try:
        expected = json.loads(raw.decode())
    except (ValueError, RecursionError):
        expected = None
    if isinstance(expected, dict):
        assert repr(jsonl._object("a.jsonl:1", raw)) == repr(expected)
    else:
        with pytest.raises(UserError, match=r"^a\.jsonl:1: "):
            jsonl._object("a.jsonl:1", raw)


@pytest.mark.parametrize("size", [1, 7, 60])
@pytest.mark.parametrize("suffix", [".json", ".csv", ".txt", ".txt.gz"])
def test_smaller_blocks_hold_the_same_records(tmp_path, monkeypatch, suffix, size):
    path, options = tmp_path / f"a{suffix}", DataOptions(separator="--\n" if ".txt" in suffix else None)
    rows = [{"text": f"{n} é\r\n{n}\r-\n"} for n in range(9)]
    write_as(path, rows)
    expected = [*read_records(path, options)]
    for module in (text, json_array, table, txt):
        monkeypatch.setattr(module, "BLOCK_SIZE", size)
    blocks = [pickle.loads(pickle.dumps(block)) for block in read_blocks(path, options)]
    assert [record for block in blocks for record in block_records(block, options)] == expected and len(expected) == 9
    assert len(blocks) > 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text,more,text\na,b,c\n", ":1: the header names 'text' twice"),
        (b"\ntext,more\na,b\n\nc\n", ":5: has 1 columns, the header has 2 (',' parts them)"),
        (b'text\na\n"b', ":3: is not a row of a table"),
        (b"text\n", ": is empty"),
        (b"answers\na\n", ":2: no known field"),
    ],
)
def test_a_table_that_is_none(tmp_path, content, said):
    assert_refused(tmp_path / "a.csv", content, said)


@pytest.mark.parametrize(
    "content", [b"question;answer\na,b;c\n", b"question\tanswer\na,b\tc\n", b'question,answer\n"a,b",c\n']
)
def test_what_parts_the_columns(tmp_path, content):
    (path := tmp_path / "a.csv").write_bytes(content)
    write(tmp_path / "a.jsonl", {"question": "a,b", "answer": "c"})
    assert turns(path) == turns(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", ": is empty"),
        (b'[{"text": "a"}] x', ": has more after the array, which ends with item 1: 'x'"),
        (b'[{"text": "a"} {"text": "b"}]', ":1: a comma or ] has to follow, not '{'"),
        (b'[{"text": "a"},', ":2: is not JSON (Expecting value at character 1)"),
        (b'[{"text": "a"}', ":1: a comma or ] has to follow, not the end of the file"),
        (b'[{"text": "a"}, 3]', ":2: is a number, not an object; give an array of objects"),
        (b'{"text": "a"} {"text": ', ":2: is not JSON (Expecting value at character 10)"),
        (b'{"data": []}', ":1: no known field"),
    ],
)
def test_json_that_is_no_array_of_objects(tmp_path, content, said):
    assert_refused(tmp_path / "a.json", content, said)


def test_objects_in_json_without_an_array(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text":\n "b"}')
    write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    assert turns(tmp_path / "a.json") == turns(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst"])
def test_a_compressed_file_that_is_cut_off(tmp_path, suffix):
    """Also where what is left unpacks to text."""
    content = PACKERS[suffix[4:]]("".join(f"{n} " for n in range(10**5)).encode())
    path = tmp_path / f"a{suffix}"
    for end in (len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        assert "is damaged" in refused(path)


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "caf\xe9"}', "is not UTF-8"),
        (b'{"text": "a"', "is not JSON (Expecting ',' delimiter at column 13)"),
        (b'{"text": "a', "is not JSON (Unterminated string starting at column 10)"),
        (b'{"text": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
        (b"[1]", "is a list, not an object"),
        (b"null", "is null, not an object"),
        (b'{"body": "b", "id": 3}', "found 'body', 'id'; name yours with prompt_field and answer_field"),
        (b'{"text": null}', "found no field that is not null"),
        (
            b'{"text": "t", "question": "q", "answer": "a"}',
            "fit more than one form: text and question/answer",
        ),
        (b'{"text": 3}', "field 'text' is a number, not a string"),
        (b'{"text": " \\n"}', "field 'text' is empty"),
        (b'{"question": "q", "answer": ""}', "field 'answer' is empty"),
        (b'{"question": "q", "answer": ["a"]}', "field 'answer' is a list, not a string"),
        (b'{"instruction": "q", "input": 1, "output": "a"}', "field 'input' is a number, not a string"),
        (b'{"text": "\\ud800"}', "field 'text' holds '\\ud800', half of a surrogate pair"),
        (b'{"messages": "hi"}', "messages is a string, not a list"),
        (b'{"messages": ["hi"]}', "messages[0] is a string, not an object with role and content"),
        (b'{"messages": [{"role": "user"}]}', "messages[0]: lacks the field 'content'; found 'role'; each message"),
        (
            b'{"messages": [{"role": "critic", "content": "x"}]}',
            "messages[0]: role 'critic' is not known; use system, ",
        ),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "messages has no assistant turn"),
        (b'{"messages": []}', "messages has no assistant turn"),
        (
            b'{"messages": [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": null}]}',
            "messages[1]: field 'content' is null, not a string",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "x"}, {"role": "system", "content": "s"}]}',
            "messages[1]: a system turn can only be the first",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(UserError) as error:
        list(read_records(path, DataOptions()))
    assert str(error.value).startswith(f"{path}:3: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt_field": "body", "answer_field": "a"}, "lacks the field 'body'; found 'text'; name yours with"),
        ({"text_field": "body"}, "lacks the field 'body'; found 'text'; name yours with"),
    ],
)
def test_a_field_of_an_option_that_is_not_there(tmp_path, options, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    with pytest.raises(UserError) as error:
        list(read_records(path, DataOptions(**options)))
    assert f"{path}:1: " in str(error.value) and said in str(error.value)


def test_bad_files(tmp_path):
    def said(name, content=None, **options):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            list(read_records(path, DataOptions(**options)))
        assert str(path) in str(error.value)
        return str(error.value)

    readable = "give a .jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow file, a folder of them, or a binidx"
    assert "no such file" in said("none.jsonl")
    assert "is a folder" in said(".")
    assert f"suffix '.doc' is not known; {readable}" in said("a.doc", b"a,b")
    assert f"no such file or folder; {readable}" in said("none")
    assert "by the suffix before this one, it is of no format" in said("a.parquet.gz", b"a")
    assert "is empty" in said("e.jsonl", b"\n \n")
    assert "is empty" in said("e.txt", b"")
    assert "is empty" in said("blank.txt", b"--\n--", separator="--")
    assert "b.txt: line 2 is not UTF-8" in said("b.txt", b"fine\n\xff\n")
    assert "separator can only be given for .txt; leave it out" in said("s.jsonl", GOOD, separator="-")
    assert "text_field can only be given for .jsonl, .json" in said("f.txt", b"a", text_field="body")
    assert "prompt_field and answer_field can only" in said("f.txt", b"a", prompt_field="q", answer_field="a")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt_field": "q"}, "give both, or neither"),
        ({"answer_field": "q"}, "give both, or neither"),
        ({"prompt_field": "q", "answer_field": "a", "text_field": "body"}, "give one kind"),
    ],
)
def test_options_that_contradict(tmp_path, options, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    with pytest.raises(UserError, match=said):
        list(read_records(path, DataOptions(**options)))


def test_an_empty_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    with pytest.raises(UserError, match="separator is empty"):
        list(read_records(path, DataOptions(separator="")))


def refused(path):
    with pytest.raises(UserError) as error:
        list(read_records(path, DataOptions()))
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


ROWS = [{"question": "2 + 2?", "answer": "4"}, {"question": 'say "a,\tb"', "answer": "é\nf"}]


def write_as(path, rows=ROWS):
    """Writes rows in the format that the suffixes name."""
    packed = path.suffix in PACKERS
    suffix = path.suffixes[-2 if packed else -1]
    if suffix in (".csv", ".tsv"):
        file = io.StringIO()
        writer = csv.DictWriter(file, [*rows[0]], delimiter="\t" if suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        content = file.getvalue().encode("utf-8-sig")
    elif suffix == ".txt":
        content = "--\n".join(row["text"] for row in rows).encode()
    elif suffix == ".json":
        content = json.dumps(rows, indent=1).encode()
    elif suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    elif suffix == ".arrow":
        with pyarrow.ipc.new_stream(path, (table := pyarrow.Table.from_pylist(rows)).schema) as file:
            file.write_table(table, max_chunksize=1)
        return
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(PACKERS[path.suffix](content) if packed else content)


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", content)
    return file.getvalue()


PACKERS = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".zip": zipped}
TOOLS = {".gz": "gunzip", ".zst": "zstd", ".xz": "unxz", ".zip": "unzip"}


@pytest.mark.parametrize(
    "suffix", [".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".json.zst", ".csv.GZ".lower(), ".tsv.zst"]
)
def test_every_format_holds_the_same_records(tmp_path, suffix):
    paths = [tmp_path / f"a{suffix}", tmp_path / "a.jsonl"]
    for path in paths:
        write_as(path)
    assert (
        turns(paths[0])
        == turns(paths[1])
        == [(Turn("user", row["question"]), Turn("assistant", row["answer"])) for row in ROWS]
    )
    first = {".csv": 2, ".tsv": 2}.get(paths[0].suffixes[0], 1)
    assert [record.where for record in read_records(paths[0], DataOptions())] == [
        f"{paths[0]}:{first}",
        f"{paths[0]}:{first + 1}",
    ]


@pytest.mark.parametrize("suffix", BY_SUFFIX)
def test_a_file_that_is_not_read_says_what_to_do_and_that_works(tmp_path, suffix):
    """The message's command, pasted into a shell, makes a file that is read."""
    if shutil.which(TOOLS[suffix]) is None:
        pytest.skip(f"no {TOOLS[suffix]} here")
    folder = tmp_path / "my FILE"
    folder.mkdir()
    path = folder / f"a{suffix}"
    path.write_bytes(PACKERS[suffix]("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    said = refused(path)
    assert f"{suffix!r}: " in said and "\n" not in said
    subprocess.run(said.rpartition(": ")[2], shell=True, check=True, cwd=folder)
    if (folder / "a").exists():
        (folder / "a").rename(folder / "a.jsonl")
    assert turns(folder / "a.jsonl") == [
        (Turn("user", row["question"]), Turn("assistant", row["answer"])) for row in ROWS
    ]


@pytest.mark.parametrize(
    ("package", "extra", "suffix"), [("pyarrow", "parquet", ".parquet"), ("zstandard", "zstd", ".txt.zst")]
)
def test_a_package_that_is_not_there_is_named_with_its_extra(tmp_path, monkeypatch, package, extra, suffix):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    (tmp_path / f"a{suffix}").write_bytes(b"")
    assert refused(tmp_path / f"a{suffix}").endswith(
        f"{package}, which is not installed: pip install 'rwkv-miss[{extra}]'"
    )


def test_a_pattern_that_is_a_name_is_read(tmp_path):
    assert turns(write(tmp_path / "a[1].jsonl", {"text": "t"})) == [(Turn("text", "t"),)]


def test_a_suffix_in_capitals_is_read(tmp_path):
    assert turns(write(tmp_path / "A.JSONL", {"text": "t"})) == [(Turn("text", "t"),)]


def test_fields_that_are_not_read_are_named_once_with_their_records(tmp_path, caplog):
    call = {"role": "assistant", "content": "a", "reasoning_content": "hm", "weight": 0}
    call["tool_calls"] = [{"id": 1, "function": {"name": "f"}}]
    path = write(
        tmp_path / "a.jsonl",
        {"messages": [{"role": "user", "content": "q"}, call, call], "id": 1},
        {"messages": [{"role": "user", "content": "q", "tool_calls": [], "name": None}, call | {"weight": None}]},
        {"question": "q", "answer": "a", "system": "s", "history": [["q", "a"]], "id": "2", "input": "more"},
        {"instruction": "i", "input": "x", "output": "o", "system": "", "history": [], "id": None},
        {"text": "t", "source": "web"},
    )
    records = list(read_records(path, DataOptions(learn="all")))
    assert [sorted(record.unread) for record in records] == [
        ["id", "messages[].tool_calls[].id", "messages[].weight"],
        ["messages[].tool_calls[].id"],
        ["id", "input"],
        [],
        ["source"],
    ]
    [said] = caplog.messages
    assert said.startswith(f"{path}: fields that are not read, with the records that have them: ")
    for name, count in {"id": 2, "tool_calls": 2, "reasoning_content": 2, "messages[].weight": 1, "source": 1}.items():
        assert f"'{name}' ({count})" in said


def test_fields_beside_those_of_an_option_are_named(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", {"instruction": "i", "input": "x", "output": "o", "text": "t"})
    [record] = read_records(path, DataOptions(text_field="output"))
    assert record.unread == ("instruction", "input", "text")
    caplog.clear()
    list(read_records(path, DataOptions(prompt_field="instruction", answer_field="output")))
    assert "'input' (1), 'text' (1)" in caplog.text
    caplog.clear()
    list(read_records(write(path, {"text": "t", "input": ""}), DataOptions()))
    assert not caplog.messages


def test_a_warning_names_no_more_fields_than_can_be_read(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", *({"text": "t", "often": 1, f"field {i}": i} for i in range(1, 31)))
    list(read_records(path, DataOptions()))
    assert "'often' (30), 'field 1' (1)" in caplog.text and caplog.text.count("field ") == 19
    assert "and 11 more" in caplog.text


def test_a_reader_that_is_stopped_tells_of_what_it_read(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", *[{"text": "t", "id": 1}] * 10)
    assert len(list(islice(read_records(path, DataOptions()), 3))) == 3
    assert caplog.messages == [f"{path}: fields that are not read, with the records that have them: 'id' (3)"]


def test_a_file_that_is_refused_says_that_alone(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", {"text": "t", "id": 1}, {"text": 3})
    assert "field 'text' is a number" in refused_at(path, 2)
    assert not caplog.messages


def refused_at(path, line):
    with pytest.raises(UserError, match=rf"a\.jsonl:{line}: ") as error:
        list(read_records(path, DataOptions()))
    return str(error.value)


def test_answers_that_a_runtime_cuts_are_counted(tmp_path, caplog):
    pair = {"question": "q\n\nUser: r", "answer": "a"}
    path = write(tmp_path / "a.jsonl", pair, *[pair | {"answer": "a\n\nUser: b"}] * 2)
    list(read_records(path, DataOptions()))
    [said] = caplog.messages
    assert "answers hold '\\n\\nUser:' in 2 records" in said and f"first in {path}:2;" in said
    caplog.clear()
    list(read_records(path, DataOptions(answer_lines="join")))
    assert not caplog.messages
