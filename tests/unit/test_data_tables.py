"""Parquet files and data sets of `datasets`, written here by the libraries themselves and broken by hand."""
import json
from datetime import datetime, timedelta
from decimal import Decimal
from shutil import copytree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from frpo.data.source import read_rows
from frpo.data.tables import is_saved
from frpo.errors import DataError

MESSAGES = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


def read(path, split="train", limit=None):
    return [(row.origin, row.columns) for row in read_rows(str(path), split=split, limit=limit, seed=0)]


def test_parquet_gives_plain_values_that_survive_json(tmp_path):
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({
        "messages": [MESSAGES, None], "when": pa.array([datetime(2024, 1, 2), None], pa.timestamp("ns")),
        "took": pa.array([timedelta(seconds=5), None], pa.duration("us")), "price": [Decimal("1.10"), None],
        "raw": [b"abc", b"d"], "numbers": [[0.5, 2.0], []], "score": [float("nan"), 1.5],
        "pairs": pa.array([[("k", 1)], None], pa.map_("string", "int8")),
        "kind": pa.array(["x", "y"]).dictionary_encode()}), path)
    (first, one), (second, two) = read(path)
    assert (first, second) == (f"{path}:1", f"{path}:2")
    assert one == {"messages": MESSAGES, "when": "2024-01-02 00:00:00", "took": "0:00:05", "price": "1.10",
                   "raw": "abc", "numbers": [0.5, 2.0], "score": None, "pairs": [["k", 1]], "kind": "x"}
    assert two == {"messages": None, "when": None, "took": None, "price": None, "raw": "d", "numbers": [],
                   "score": 1.5, "pairs": None, "kind": "y"}
    assert json.loads(json.dumps(one, allow_nan=False)) == one


def parquet(tmp_path, table):
    pq.write_table(table, tmp_path / "r.parquet")
    return tmp_path / "r.parquet"


def test_parquet_rows_are_counted_over_row_groups_and_read_no_further_than_asked(tmp_path):
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"p": list(range(3000))}), path, row_group_size=1000)
    assert read(path)[2500] == (f"{path}:2501", {"p": 2500})
    content = bytearray(path.read_bytes())
    third = pq.ParquetFile(path).metadata.row_group(2).column(0)
    start = third.dictionary_page_offset or third.data_page_offset
    content[start:start + third.total_compressed_size] = b"\xff" * third.total_compressed_size
    path.write_bytes(content)
    assert len(read(path, limit=1000)) == 1000
    with pytest.raises(DataError, match=r"r\.parquet' cannot be read after row 1024: .*write the file again if"):
        read(path)


def test_broken_parquet_names_file_row_and_column(tmp_path):
    for content, message in ((b"", "file size is 0 bytes"), (b'{"p": 1}\n', "[Mm]agic bytes not found|smaller than")):
        (tmp_path / "r.parquet").write_bytes(content)
        with pytest.raises(DataError, match=rf"r\.parquet' cannot be read: .*({message})"):
            read(tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"none\.parquet' cannot be read: No such file or directory; check the path"):
        read(tmp_path / "none.parquet")
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["p", "p"])
    with pytest.raises(DataError, match=r"r\.parquet: two columns have the same name \(columns: 'p', 'p'\); "
                                        "rename one"):
        read(parquet(tmp_path, twice))
    text = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    with pytest.raises(DataError, match=r"r\.parquet:2: column 'p' cannot be read: 'utf-8' codec can't decode"):
        read(parquet(tmp_path, pa.table({"p": text})))
    with pytest.raises(DataError, match=r"r\.parquet:1: column 'p' cannot be read: date value out of range"):
        read(parquet(tmp_path, pa.table({"p": pa.array([10**18], pa.timestamp("us"))})))
    with pytest.raises(DataError, match=r"r\.parquet:2: column 'p' holds bytes that are not UTF-8 text"):
        read(parquet(tmp_path, pa.table({"p": [b"a", b"\xff"]})))
    with pytest.raises(DataError, match=r"r\.parquet:1: column 'p' holds a number beyond the largest float"):
        read(parquet(tmp_path, pa.table({"p": [float("inf")]})))
    with pytest.raises(DataError, match=r"r\.parquet' has no rows"):
        read(parquet(tmp_path, pa.table({"p": pa.array([], pa.string())})))


@pytest.fixture
def saved(tmp_path):
    data = Dataset.from_dict({"messages": [MESSAGES, MESSAGES[:1]], "ids": [[1, 2], [3, 4]]})
    # A format, here arrays of one column, is saved with the data.
    data.with_format("numpy", columns=["ids"]).save_to_disk(tmp_path / "one")
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "both")
    return tmp_path


def test_saved_data_sets(saved):
    one = saved / "one"
    assert read(one) == [(f"{one}:0", {"messages": MESSAGES, "ids": [1, 2]}),
                         (f"{one}:1", {"messages": MESSAGES[:1], "ids": [3, 4]})]
    both = saved / "both"
    assert [origin for origin, _ in read(both)] == [f"{both}[train]:0", f"{both}[train]:1"]
    assert read(both, "test") == [(f"{both}[test]:0", {"messages": MESSAGES[:1], "ids": [3, 4]})]
    assert read(both / "test") == [(f"{both / 'test'}:0", {"messages": MESSAGES[:1], "ids": [3, 4]})]
    with pytest.raises(DataError, match="both' has no split 'dev'; it has: 'train', 'test'; set data.split to one of"):
        read(both, "dev")
    assert is_saved(one) and is_saved(both) and not is_saved(saved)


@pytest.mark.parametrize("file, content", [
    ("data-00000-of-00001.arrow", None), ("data-00000-of-00001.arrow", "xx"), ("state.json", "{}"),
    ("dataset_info.json", "["), ("dataset_info.json", '{"features": 3}')])
def test_a_damaged_saved_data_set_is_one_message(saved, file, content):
    copytree(saved / "one", saved / "damaged")
    (saved / "damaged" / file).unlink()
    if content is not None:
        (saved / "damaged" / file).write_text(content)
    with pytest.raises(DataError, match="saved data set '.*damaged' cannot be loaded: .*; save it again"):
        read(saved / "damaged")


def test_a_saved_data_set_without_rows_or_without_its_description_is_one_message(saved):
    Dataset.from_dict({"p": []}).save_to_disk(saved / "empty")
    with pytest.raises(DataError, match="empty' cannot be loaded: .*; save it again, with at least one row"):
        read(saved / "empty")
    (saved / "one" / "dataset_info.json").unlink()
    with pytest.raises(DataError, match="saved data set '.*one' cannot be loaded"):
        read(saved / "one")
    DatasetDict({}).save_to_disk(saved / "none")
    with pytest.raises(DataError, match="has no split 'train'; it has: none;"):
        read(saved / "none")
