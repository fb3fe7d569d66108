"""Who learns from whom: rings, stars, matrices of weights, and what is refused."""

from pathlib import Path

import pytest

from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.mutual.links import read_links
from dml_accel.mutual.teaching import Teaching

NAMES = ["b-0", "a-0", "c-0"]


def test_a_ring_and_a_star_by_hand() -> None:
    assert read_links("full", NAMES, []) is None
    assert read_links("ring", NAMES, []) == {
        "b-0": {"c-0": 1.0},
        "a-0": {"b-0": 1.0},
        "c-0": {"a-0": 1.0},
    }
    assert read_links("star:a-0", NAMES, []) == {
        "a-0": {"b-0": 1.0, "c-0": 1.0},
        "b-0": {"a-0": 1.0},
        "c-0": {"a-0": 1.0},
    }
    assert read_links("frozen", NAMES, ["frozen-0"]) == {name: {"frozen-0": 1.0} for name in NAMES}


def test_a_matrix_is_read_by_name(tmp_path: Path) -> None:
    path = tmp_path / "links.csv"
    path.write_text(",c-0,a-0,b-0\n\nc-0,0,0.5,2\nb-0, 1 ,,0\na-0,0,0,0\n")
    weights = read_links(str(path), NAMES, [])
    assert weights["c-0"] == {"c-0": 0.0, "a-0": 0.5, "b-0": 2.0}
    assert weights["b-0"]["c-0"] == 1.0 and not any(weights["a-0"].values())


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_matrix_from_windows_is_the_same(start: str, end: str, tmp_path: Path) -> None:
    lines = [",b-0,a-0,c-0", "c-0,1,0.5,0", "a-0,1,0,0", "b-0,0,0,1"]
    path = tmp_path / "links.csv"
    path.write_bytes((start + "".join(line + end for line in lines)).encode())
    weights = read_links(str(path), NAMES, [])
    assert weights["c-0"] == {"b-0": 1.0, "a-0": 0.5, "c-0": 0.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (",a-0,b-0\na-0,0,1\nb-0,1,0\n", "first line names a-0, b-0, not b-0, a-0, c-0"),
        (",a-0,b-0,c-0\na-0,0,1,0\n", "first column names a-0, not"),
        (",a-0,b-0,c-0\na-0,0,1\nb-0,1,0,0\nc-0,1,1,0\n", "line of a-0 has 2 weights, not 3"),
        (",a-0,b-0,c-0\na-0,0,-1,0\nb-0,1,0,0\nc-0,1,1,0\n", "has '-1' for b-0"),
        (",a-0,b-0,c-0\na-0,0,nan,0\nb-0,1,0,0\nc-0,1,1,0\n", "has 'nan' for b-0"),
        (",a-0,b-0,c-0\na-0,1,1,0\nb-0,1,0,0\nc-0,1,1,0\n", "makes a-0 learn from itself"),
        (
            ",a-0,b-0,c-0\na-0,0,0,0\nb-0,0,0,0\nc-0,0,0,0\n",
            "all weights are 0; for independent training use --kl-weight 0",
        ),
        ("\0\xff", "is in UTF-16, or not a text; save it as UTF-8"),
        ("\xff\xfe,\0a\0", "is in UTF-16, or not a text; save it as UTF-8"),
        (",caf\xe9\n", "is not in UTF-8 .*; save it as UTF-8"),
    ],
    ids=range(11),
)
def test_a_file_that_is_not_a_matrix_is_refused_in_one_line(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "links.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=said) as refusal:
        read_links(str(path), NAMES, [])
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rings", NAMES, []), "--links rings cannot be read: .*; write full, ring, star:PEER"),
        (("star:x-0", NAMES, []), "there is no peer 'x-0'; the peers are b-0, a-0, c-0"),
        (("ring", NAMES[:1], []), "--links ring needs at least two peers"),
        (("ring", NAMES, ["frozen-0"]), "gives --frozen-peers nobody to teach"),
    ],
    ids=str,
)
def test_impossible_links_are_refused(words: tuple, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_links(*words)


def test_the_teachers_of_each_peer() -> None:
    def teachers(config: Config, frozen: list[str]) -> list[list[str]]:
        weights = read_links(config.method.links, NAMES, frozen)
        teaching = Teaching(config.method, NAMES, frozen, weights)
        return [teaching.teachers_of(name) for name in NAMES]

    assert teachers(Config(), ["frozen-0"])[0] == ["a-0", "c-0", "frozen-0"]
    assert teachers(Config(links="ring"), []) == [["c-0"], ["b-0"], ["a-0"]]
    only = Config(links="frozen", frozen_peers=("x",))
    assert teachers(only, ["frozen-0"]) == [["frozen-0"]] * 3
    assert teachers(Config(kl_weight=0.0), ["frozen-0"]) == [[]] * 3
