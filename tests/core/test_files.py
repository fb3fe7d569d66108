"""Files: written whole or not at all, read up to a limit."""

import math
import os
from pathlib import Path

import pytest

from dml_accel.core.errors import UnreadableError, UsageError
from dml_accel.core.files import (
    can_be_made,
    parse_json,
    read_at_most,
    read_json,
    replacing,
    text_of,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    """The files of a folder, hidden ones as well."""
    return sorted(os.listdir(folder))


# ---------------------------------------------------------------- writing


def test_a_reader_sees_the_old_file_or_the_whole_new_one(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == path.parent  # a rename within one file system
        temporary.write_text("new, and ")
        assert path.read_text() == "old"
        with open(temporary, "a") as file:
            file.write("longer")
        assert path.read_text() == "old"
    assert path.read_text() == "new, and longer"
    assert names(tmp_path) == ["status.json"]


def test_a_new_file_does_not_exist_before_it_is_whole(tmp_path: Path) -> None:
    with replacing(tmp_path / "new") as temporary:
        temporary.write_text("half")
        assert not (tmp_path / "new").exists()
    assert names(tmp_path) == ["new"]


def test_a_text_is_utf_8_and_names_that_are_not_do_not_end_it(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9") + " caf\u00e9 \u732b"
    write_text(tmp_path / "text", name)
    assert (tmp_path / "text").read_bytes() == b"caf\\udce9 caf\xc3\xa9 \xe7\x8c\xab"
    write_json(tmp_path / "json", {"name": name})
    assert read_json(tmp_path / "json") == {"name": name}


@pytest.mark.parametrize("content", [b"caf\xc3\xa9", b"\xef\xbb\xbfcaf\xc3\xa9"])
def test_a_mark_at_the_start_of_a_text_is_no_part_of_it(content: bytes) -> None:
    assert text_of(Path("list"), content) == "caf\u00e9"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_is_left_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "results.md"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["results.md"]


def test_an_error_before_anything_is_written_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "x"):
        _ = 1 / 0
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as temporary:
        name = temporary.name
        temporary.write_text("first")
    (tmp_path / name).write_text("of a process that was killed, and longer than the next")
    write_text(path, "second")
    assert path.read_text() == "second" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan_and_no_infinity(tmp_path: Path, value: float) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"top1": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"top1": value})
    assert read_json(path) == {"top1": 0.5} and names(tmp_path) == ["x.json"]


def test_a_folder_that_can_be_made(tmp_path: Path) -> None:
    assert can_be_made(tmp_path) and can_be_made(tmp_path / "a/b/c")
    (tmp_path / "file").touch()
    assert not can_be_made(tmp_path / "file")
    assert not can_be_made(tmp_path / "file/below")
    assert not can_be_made(tmp_path / ("x" * 300))
    assert names(tmp_path) == ["file"]  # only asked


# ---------------------------------------------------------------- reading


def test_a_file_of_just_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(10))
    assert read_at_most(path, 10) == bytes(10)
    with pytest.raises(UnreadableError, match="/x has more than the allowed 9 bytes"):
        read_at_most(path, 9)
    with pytest.raises(UnreadableError, match="/y cannot be read: No such file or directory"):
        read_at_most(tmp_path / "y", 9)
    with pytest.raises(UnreadableError, match="cannot be read: Is a directory"):
        read_at_most(tmp_path, 9)


def test_a_file_without_an_end_is_read_up_to_the_limit() -> None:
    # The system reports a size of 0 for it.
    with pytest.raises(UnreadableError, match="more than the allowed 1,000 bytes"):
        read_at_most(Path("/dev/zero"), 1000)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b'{"a": NaN}', "is not valid JSON"),
        (b'{"a": -Infinity}', "is not valid JSON"),
        (b"\xff\xfe\xfd", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
        (b'{"a": "' + b"x" * 1000 + b'"}', "has more than the allowed 1,000 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    limit = 1000 if len(content) < 2000 else 10**6
    with pytest.raises(UsageError, match=said) as refusal:
        read_json(path, limit)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_content_that_was_read_already_is_parsed_alike(tmp_path: Path) -> None:
    found = parse_json(tmp_path / "x", b'{"a": [1, 2.5, null, true, "x"]}')
    assert found == {"a": [1, 2.5, None, True, "x"]}
    for content in (b'{"a": Infinity}', b"[]"):
        with pytest.raises(UnreadableError, match=str(tmp_path / "x")):
            parse_json(tmp_path / "x", content)
