"""What `data` names: files, folders, patterns, data sets, their weights and options."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkv_miss.config import DataOptions
from rwkv_miss.data import sources
from rwkv_miss.data.records import Turn
from rwkv_miss.data.sources import check_sources, data_name, parse_sources, source_records
from rwkv_miss.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("")


def found(data, **options):
    """(name, files, weight) of each source."""
    parsed = parse_sources(data, DataOptions(**options))
    return [(source.name, [str(file) for file in source.files], source.weight) for source in parsed]


def records(data):
    return [*source_records(parse_sources(data, DataOptions()))]


def refused(data, weights=True, **options):
    with pytest.raises(UserError) as error:
        parse_sources(data, DataOptions(**options), weights)
    return str(error.value)


def test_files_and_weights():
    make("a.jsonl", "b.parquet", "c.txt")
    assert found("a.jsonl") == [("a.jsonl", ["a.jsonl"], 1)]
    assert found("a.jsonl:2,b.parquet:0.5,c.txt") == [
        ("a.jsonl", ["a.jsonl"], 2),
        ("b.parquet", ["b.parquet"], 0.5),
        ("c.txt", ["c.txt"], 1),
    ]
    assert found(["a.jsonl:2", {"path": "c.txt", "weight": 3}]) == [
        ("a.jsonl", ["a.jsonl"], 2),
        ("c.txt", ["c.txt"], 3),
    ]
    assert (
        data_name("a.jsonl:2,c.txt") == "a.jsonl:2,c.txt"
        and data_name(["a.jsonl:2", {"path": "c.txt"}]) == "a.jsonl, c.txt"
    )


def test_a_name_that_is_there_counts_as_it_is():
    make("a,b.jsonl", "a.jsonl:2", "c.jsonl:3,d.jsonl", "d.jsonl", "c.jsonl", "[x].jsonl")
    for name in ("a,b.jsonl", "c.jsonl:3,d.jsonl", "[x].jsonl"):
        assert found(name) == [(name, [name], 1)]
    assert found("a,b.jsonl:2,d.jsonl,c.jsonl:3") == [
        ("a,b.jsonl", ["a,b.jsonl"], 2),
        ("d.jsonl", ["d.jsonl"], 1),
        ("c.jsonl", ["c.jsonl"], 3),
    ]
    assert "suffix '.jsonl:2' is not known" in refused("a.jsonl:2")


def test_a_folder_is_all_files_in_it_that_are_read():
    make(
        "set/b.csv",
        "set/a/z.jsonl.gz",
        "set/a/README.md",
        "set/.hidden.jsonl",
        "set/.git/x.json",
        "set/m.bin",
        "set/c.idx",
    )
    make("set/corpus.bin", "set/corpus.idx", "set/a.jsonl", "set/a.jsonl.idx")
    [source, pair] = parse_sources("set", DataOptions())
    assert [*map(str, source.files)] == ["set/a/z.jsonl.gz", "set/a.jsonl", "set/b.csv"]
    assert [*map(str, pair.files)] == ["set/corpus.idx"] and pair.name == source.name == "set"
    skipped = ["set/a/README.md", "set/a.jsonl.idx", "set/c.idx", "set/m.bin"]
    assert [*map(str, source.skipped)] == skipped and not pair.skipped


def test_links_are_followed_and_loops_end():
    make("elsewhere/a.jsonl", "set/b.jsonl")
    os.symlink("../elsewhere", "set/more")
    os.symlink("..", "set/loop")
    os.symlink("b.jsonl", "set/again.jsonl")
    files = [os.path.realpath(file) for _, names, _ in found("set") for file in names]
    assert sorted(map(os.path.basename, files)) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "files"), [("p/*.jsonl", 2), ("p/?.csv", 1), ("p/*", 4), ("p/**", 4), ("p/[ab].jsonl", 2)]
)
def test_a_pattern(pattern, files):
    make("p/a.jsonl", "p/b.jsonl", "p/c.csv", "p/d/e.txt", "p/notes.md")
    names = [file for _, names, _ in found(f"{pattern}:2") for file in names]
    assert len(names) == len(set(names)) == files


@pytest.mark.parametrize("data", ["corpus", "corpus.bin", "corpus.idx", "corpus:2"])
def test_a_binidx_is_its_index(data):
    make("corpus.bin", "corpus.idx")
    [(_, files, weight)] = found(data)
    assert files == ["corpus.idx"] and weight == (2 if ":" in data else 1)


def test_options_go_to_the_files_that_have_use_for_them():
    make("set/a.txt", "set/b.jsonl", "c.csv")
    sources = parse_sources(
        ["set", {"path": "c.csv", "prompt_field": "q", "answer_field": "a"}], DataOptions(separator="-", text_field="t")
    )
    read = {str(s.files[0]): (s.options.separator, s.options.text_field, s.options.prompt_field) for s in sources}
    assert read == {"set/a.txt": ("-", "text", None), "set/b.jsonl": (None, "t", None), "c.csv": (None, "text", "q")}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("", "a source is ''; give a name"),
        ([], "data is an empty list"),
        ([3], "a source is 3; give a name, or an object with a path"),
        ([["a.jsonl"]], "a source is ['a.jsonl']"),
        ([{"weight": 2}], "a source is {'weight': 2}"),
        ("a.jsonl,,b.csv", "a source is ''"),
        ("a.jsonl:0", "a.jsonl: the weight is 0.0; it must be a number from 0.001 to 1000"),
        ("a.jsonl:-1", "the weight is -1.0"),
        ("a.jsonl:nan", "the weight is nan"),
        ("a.jsonl:inf", "the weight is inf"),
        ([{"path": "a.jsonl", "weight": True}], "the weight is True"),
        ([{"path": "a.jsonl", "weight": "2"}], "the weight is '2'"),
        ([{"path": "a.jsonl", "weight": 10**400}], "the weight is 1000"),
        ([{"path": "a.jsonl", "ctx_len": 2}], "a.jsonl: a source has no 'ctx_len'; it has path, weight, text_field"),
        ([{"path": "a.jsonl", "text_field": 2}], "text_field is 2; it must be text"),
        ([{"path": "a.jsonl", "prompt_field": "q"}], "a.jsonl: prompt_field and answer_field go together"),
        (
            [{"path": "a.jsonl", "separator": "-"}, "c.txt"],
            "a.jsonl: separator can only be given for .txt; leave it out",
        ),
        ("none.jsonl", "none.jsonl: no such file"),
        ("a.jsonl,none", "none: no such file or folder"),
        ("a.jsonl,b.doc", "b.doc: no such file or folder"),
        ("*.doc", "*.doc: no file is there that is read; give .jsonl"),
        ("empty", "empty: no file is there that is read"),
        ("pipe.jsonl", "pipe.jsonl: is a pipe or a device"),
        ("piped", "piped/a.jsonl: is a pipe or a device"),
        ("loop.jsonl", "loop.jsonl: cannot be the name of data: Too many levels of symbolic links"),
        ("looped", "looped/a.jsonl: cannot be the name of data"),
        ("y" * 300, "cannot be the name of data: File name too long"),
        (",".join(["a.jsonl"] * 200), "data has 200 parts"),
        ("\0", "cannot be the name of data"),
    ],
)
def test_what_is_refused(data, said):
    make("a.jsonl", "c.txt", "empty/notes.md")
    for name in ("piped", "looped"):
        os.mkdir(name)
    for name in ("pipe.jsonl", "piped/a.jsonl"):
        os.mkfifo(name)
    os.symlink("loop.jsonl", "loop.jsonl")
    os.symlink("a.jsonl", "looped/a.jsonl")
    assert said in refused(data)


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ("a.jsonl", {"separator": "-"}, "a.jsonl: separator can only be given for .txt; leave it out"),
        ("c.txt", {"text_field": "t"}, "c.txt: text_field can only be given for .jsonl, .json, .csv"),
        ("a.jsonl,c.txt", {"separator": "-", "text_field": "t"}, None),
    ],
)
def test_a_common_option_that_nothing_has_use_for(data, options, said):
    make("a.jsonl", "c.txt")
    sources = parse_sources(data, DataOptions(**options))
    with pytest.raises(UserError) if said else nullcontext() as error:
        check_sources(sources, DataOptions(**options))
    assert not said or said in str(error.value)


def test_weights_where_there_are_none():
    make("a.jsonl")
    assert "a.jsonl: has the weight 2; only training data have weights" in refused("a.jsonl:2", weights=False)
    assert parse_sources("a.jsonl:1", DataOptions(), weights=False)


def test_too_many_files(monkeypatch):
    make(*(f"set/{i}.txt" for i in range(4)))
    monkeypatch.setattr(sources, "_MOST_NAMES", 3)
    assert "set: has more than 3 files and folders" in refused("set")
    assert "set/*.txt: more than 3 names match" in refused("set/*.txt")


def test_what_is_beside_the_data_is_named(caplog):
    make("set/a.jsonl", *(f"set/{i}.md" for i in range(7)))
    caplog.set_level("INFO")
    check_sources(parse_sources("set", DataOptions()), DataOptions())
    assert caplog.messages == [
        "set: what is no data is not read: " + ", ".join(f"set/{i}.md" for i in range(5)) + " and 2 more"
    ]


def test_the_records_of_all():
    make("corpus.bin", "corpus.idx")
    Path("a.txt").write_text("one")
    Path("b.csv").write_text("text\ntwo\n")
    assert [record.where for record in records("b.csv,a.txt")] == ["b.csv:2", "a.txt:1"]
    with pytest.raises(UserError, match=r"corpus\.idx: is a binidx"):
        records("corpus")


def test_a_saved_data_set_is_its_files():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two", "three"]})
    rows.save_to_disk("saved", num_shards=2)
    make("saved/cache-1.arrow")
    assert found("saved") == [("saved", [f"saved/data-0000{i}-of-00002.arrow" for i in range(2)], 1)]
    assert [record.where for record in records("saved")][1:] == [
        "saved/data-00000-of-00002.arrow:2",
        "saved/data-00001-of-00002.arrow:1",
    ]
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk("splits")
    assert "splits: has the splits train, test; give one, such as splits/train" in refused("splits")
    assert found("splits/test")[0][1] == ["splits/test/data-00000-of-00001.arrow"]
    datasets.DatasetDict({"train": rows}).save_to_disk("only")
    assert found("only")[0][1] == ["only/train/data-00000-of-00001.arrow"]
    for content in ("", "[]", "{}", '{"_data_files": [{"filename": "../a.arrow"}]}', '{"_data_files": 3}', "[" * 10000):
        Path("saved/state.json").write_text(content)
        assert "saved/state.json: does not describe a data set" in refused("saved")


def test_a_data_set_of_a_hub(monkeypatch, here):
    datasets = pytest.importorskip("datasets")
    Path("a.jsonl").write_text('{"text": "one"}\n')
    local = datasets.load_dataset("json", data_files="a.jsonl", split="train", cache_dir=str(here / "cache"))
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **named: (asked.append((*args, named["split"])), local)[1]
    )
    for name in ("some/set:2", "some/set:test", "some/set:main/test:0.5"):
        [(_, [file], _)] = found(name)
        assert file.endswith(".arrow") and str(here / "cache") in file
    assert asked == [("some/set", None, "train"), ("some/set", None, "test"), ("some/set", "main", "test")]
    assert [record.turns for record in records("some/set")] == [(Turn("text", "one"),)]


def test_a_data_set_that_the_hub_does_not_give(monkeypatch):
    def fails(*args, **named):
        raise ConnectionError("Couldn't reach it\nmore")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fails, __spec__=SimpleNamespace()))
    assert refused("some/set").endswith(
        "some/set: no such file or folder here, and not loaded from the hub: Couldn't reach it"
    )
    make("some/other/a.jsonl")
    assert "some/set: no such file or folder; give" in refused("some/set")
    assert "no such file" in refused("other/set.jsonl")


def test_a_data_set_of_a_hub_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "it needs the package datasets: pip install 'rwkv-miss[datasets]'" in refused("some/set")
