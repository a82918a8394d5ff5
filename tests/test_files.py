import errno
import math
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.errors import OutputError
from fastft.files import append_line, canonical_json, new_folder, sha256_of, write_atomically

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values)
def test_canonical_json_is_canonical(value):
    import json

    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text
    if isinstance(value, dict):
        backwards = dict(reversed(value.items()))
        assert canonical_json(backwards) == text
        assert sha256_of(backwards) == sha256_of(value)


def test_different_values_have_different_hashes():
    values = [None, 0, "0", [], {}, [0], {"a": 0}, {"a": None}]
    assert len({sha256_of(value) for value in values}) == len(values)
    assert len(sha256_of({})) == 64


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf]])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


@pytest.mark.parametrize("data", ["täxt\n", b"\x00\xff", ""])
def test_data_arrives_as_it_is(data, tmp_path):
    path = tmp_path / "new" / "folders" / "file"
    write_atomically(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    write_atomically(path, "other")
    assert path.read_text() == "other"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("where", ["fsync", "fdopen"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(where, monkeypatch, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, full)
    with pytest.raises(OutputError, match=r"cannot write .*file; got No space left on device; fix: free some space"):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_path_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"Not a directory|File exists"):
        write_atomically(tmp_path / "file" / "below", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        write_atomically(tmp_path / "folder", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "file"
    texts = [letter * 200_000 for letter in "ab"]
    write_atomically(path, texts[0])
    done = threading.Event()

    def write() -> None:
        for index in range(30):
            write_atomically(path, texts[index % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert path.read_text() in texts
    writer.join()


def test_a_new_folder_is_claimed(tmp_path):
    path = tmp_path / "a" / "b"
    assert new_folder(path, what="output") == path
    assert path.is_dir()
    assert new_folder(path, what="output") == path, "an empty one may be used"


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(OutputError, match=r"the output folder is not empty.*nothing was overwritten"):
        new_folder(tmp_path, what="output")
    with pytest.raises(OutputError, match="the output folder is a file"):
        new_folder(tmp_path / "kept", what="output")
    with pytest.raises(OutputError, match="cannot create the output folder"):
        new_folder(tmp_path / "kept" / "below", what="output")
    assert (tmp_path / "kept").read_text() == "mine"


def test_a_link_is_replaced_not_followed(tmp_path):
    target = tmp_path / "target"
    target.write_text("target")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, "new")
    assert target.read_text() == "target"
    assert Path(link).read_text() == "new"


@pytest.mark.parametrize("before", [b"", b"one\n", b"one\ntorn \xff", b"\n"])
def test_a_line_is_appended_behind_whole_and_torn_ones(tmp_path, before):
    path = tmp_path / "new" / "lines"
    if before:
        path.parent.mkdir()
        path.write_bytes(before)
    append_line(path, "two\u2028")
    append_line(path, "three")
    whole = before if not before or before.endswith(b"\n") else before + b"\n"
    assert path.read_bytes() == whole + "two\u2028\nthree\n".encode()


def test_a_line_that_cannot_be_appended_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write the diary; got .*; fix: buy another$"):
        append_line(tmp_path / "file" / "lines", "one", name="the diary", fix="buy another")
