"""Files, and what is said of the wrong ones."""

from __future__ import annotations

import gzip
import json
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pellucid.data import read_rows
from pellucid.data.sources import hub_reachable, where
from pellucid.errors import DataError

ROWS = [{"question": "one?", "answer": "1"}, {"question": "two?", "answer": "2"}]


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_jsonl_gzip_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", jsonl(ROWS))
    packed = write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(ROWS).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for source in (plain, packed, str(tmp_path / "a.parquet")):
        assert read_rows(source) == ROWS
        assert read_rows(source, limit=1) == ROWS[:1]


def test_columns_rename_ours_from_theirs(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", jsonl(ROWS))
    assert read_rows(source, columns={"prompt": "question"})[1] == {"prompt": "two?", "answer": "2"}
    swapped = read_rows(source, columns={"question": "answer", "answer": "question"})
    assert swapped[0] == {"question": "1", "answer": "one?"}


def test_blank_lines_are_passed_over_but_counted(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n\n{"text": "b"}'))
    assert [where(rows, i).rsplit(":", 1)[1] for i in range(2)] == ["1", "3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": "a"}\n\n[1]\n', r"a\.jsonl:3: a list, each line must be a JSON object"),
        ("a.jsonl", "\n\n", "the data set is empty"),
        ("a.jsonl.gz", "not gzip", r"a\.jsonl\.gz:1: not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-10], "not a whole gzip file"),
        ("a.parquet", "not parquet", "not a readable Parquet file"),
        ("a.parquet", b"", "not a readable Parquet file"),
        ("a.csv", "a,b", r"unknown kind of file; pellucid reads \.jsonl"),
    ],
)
def test_an_unreadable_file_is_a_short_error(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_rows(write(tmp_path / name, content))
    assert str(caught.value).count("\n") <= 1


def test_an_empty_parquet_file_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="empty"):
        read_rows(str(tmp_path / "a.parquet"))


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl\?"):
        read_rows(str(tmp_path / "tarin.jsonl"))
    with pytest.raises(DataError, match="nor the folder"):
        read_rows(str(tmp_path / "no" / "train.jsonl"))


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    for source in (tmp_path, tmp_path / "d.jsonl"):
        with pytest.raises(DataError, match="is a folder, a file is needed"):
            read_rows(str(source))


def test_a_row_without_a_renamed_field_names_its_line(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{"q": "a"}\n{"r": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: no field 'q'.*the row has r"):
        read_rows(source, columns={"prompt": "q"})


# --- the Hub, with a stand-in for its client ------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    class Found(list[dict[str, Any]]):
        def select(self, indices: range) -> Found:
            return Found(self[i] for i in indices)

    def load_dataset(*names: str, split: str) -> Found:
        calls.append((*names, split))
        if "missing" in names[0]:
            raise FileNotFoundError("no such data set\nand a long tail")
        return Found([{"prompt": "a"}, {"prompt": "b"}])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("pellucid.data.sources.hub_reachable", lambda: True)
    return calls


def test_hub_names_and_configs(hub: list[tuple[Any, ...]]) -> None:
    assert read_rows("hub:org/name", limit=1) == [{"prompt": "a"}]
    assert len(read_rows("hub:org/name/main", split="test")) == 2
    assert hub == [("org/name", "train"), ("org/name", "main", "test")]
    with pytest.raises(DataError, match=r"hub:org/missing \(split 'train'\).*: no such data set$"):
        read_rows("hub:org/missing")
    with pytest.raises(DataError, match="write hub:org/name"):
        read_rows("hub:name")


def test_an_offline_hub_says_so_at_once(hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pellucid.data.sources.hub_reachable", lambda: False)
    with pytest.raises(DataError, match="the Hub cannot be reached"):
        read_rows("hub:org/name")
    assert not hub


def test_hub_reachable_is_about_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: the connection is refused
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert not hub_reachable()


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'pellucid\[hub\]'"):
        read_rows("hub:org/name")
