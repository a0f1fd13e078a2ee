import json

import pytest

from rwkv_miss.data.records import Record, read_records
from rwkv_miss.errors import UserError


def write(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def turns(path, **options):
    return [record.turns for record in read_records(path, **options)]


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
        (("text", " as it\r\nis "),),
        (("user", "q"), ("assistant", "a")),
        (("user", "do\nthis"), ("assistant", "done")),
        (("user", "do"), ("assistant", "done")),
        (("user", "do"), ("assistant", "done")),
        (("user", "q"), ("assistant", "r")),
        (("user", "q"), ("assistant", "a")),
        (("user", "p"), ("assistant", "c")),
    ]


def test_where_counts_blank_lines_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "\\u2028b"}')
    assert list(read_records(path)) == [
        Record(f"{path}:1", (("text", "a"),)),
        Record(f"{path}:4", (("text", "\u2028b"),)),
    ]


def test_fields_by_option_win_over_known_shapes(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "t", "question": "q", "answer": "a", "body": "b", "output": "o"})
    assert turns(path, prompt_field="body", answer_field="output") == [(("user", "b"), ("assistant", "o"))]
    assert turns(path, text_field="body") == [(("text", "b"),)]


def test_txt_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert list(read_records(path)) == [Record(f"{path}:1", (("text", "one\n\ntwo\n"),))]


def test_txt_parted_by_a_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\nmore\n---\n\n---\ntwo\n---\n")
    assert list(read_records(path, separator="---\n")) == [
        Record(f"{path}:1", (("text", "one\nmore\n"),)),
        Record(f"{path}:6", (("text", "two\n"),)),
    ]


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "caf\xe9"}', "is not UTF-8"),
        (b'{"text": "a"', "is not JSON (Expecting ',' delimiter at column 13)"),
        (b'{"text": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
        (b"[1]", "is a list, not an object"),
        (b"null", "is null, not an object"),
        (b'{"body": "b", "id": 3}', "found 'body', 'id'; name yours with prompt_field and answer_field"),
        (b'{"text": null}', "found no field that is not null"),
        (b'{"text": "t", "question": "q", "answer": "a"}', "more than one reading: text and question/answer"),
        (b'{"text": 3}', "field 'text' is a number, not a string"),
        (b'{"text": " \\n"}', "field 'text' is empty"),
        (b'{"question": "q", "answer": ""}', "field 'answer' is empty"),
        (b'{"question": "q", "answer": ["a"]}', "field 'answer' is a list, not a string"),
        (b'{"instruction": "q", "input": 1, "output": "a"}', "field 'input' is a number, not a string"),
        (b'{"text": "\\ud800"}', "field 'text' holds '\\ud800', half of a surrogate pair"),
        (b'{"messages": "hi"}', "messages is a string, not a list"),
        (b'{"messages": ["hi"]}', "messages[0] is a string, not an object with role and content"),
        (b'{"messages": [{"role": "user"}]}', "messages[0]: lacks the field 'content'; found 'role'; each message"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "messages[0]: role 'tool' is not known"),
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
        list(read_records(path))
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
        list(read_records(path, **options))
    assert f"{path}:1: " in str(error.value) and said in str(error.value)


def test_bad_files(tmp_path):
    def said(name, content=None, **options):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            list(read_records(path, **options))
        assert str(path) in str(error.value)
        return str(error.value)

    assert "cannot be read: No such file" in said("none.jsonl")
    assert "is a directory" in said(".")
    assert "suffix '.csv' is not known" in said("a.csv", b"a,b")
    assert "is empty" in said("e.jsonl", b"\n \n")
    assert "is empty" in said("e.txt", b"")
    assert "is empty" in said("blank.txt", b"--\n--", separator="--")
    assert "b.txt:2: is not UTF-8" in said("b.txt", b"fine\n\xff\n")
    assert "leave it out for .jsonl" in said("s.jsonl", GOOD, separator="-")
    assert "has no fields" in said("f.txt", b"a", text_field="body")
    assert "has no fields" in said("f.txt", b"a", prompt_field="q", answer_field="a")


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
        list(read_records(path, **options))


def test_an_empty_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    with pytest.raises(UserError, match="separator is empty"):
        list(read_records(path, separator=""))
