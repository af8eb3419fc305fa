"""Files that are no studies: each is refused with its place and a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from dense_lab.errors import InputError
from dense_lab.yaml_file import load, parse


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    return str(caught.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "x.yaml:1:1: a study is a mapping of keys to values, got an empty file"),
        ("# only a comment\n", "x.yaml:1:1: a study is a mapping of keys to values, got an empty file"),
        ("- a\n- b\n", "x.yaml:1:1: a study is a mapping of keys to values, got a list"),
        ("retnet\n", "x.yaml:1:1: a study is a mapping of keys to values, got the single value 'retnet'"),
        ("a:\n  b: 1\n  b: 2\n", "x.yaml:3:3 a.b: the key 'b' is here twice; first at x.yaml:2:3"),
        ("a: &x 1\n", "x.yaml:1:4 a: the anchor '&x' is not part of the grammar: write it out"),
        ("a: {b: 1}\n<<: {c: 2}\n", "x.yaml:2:1: merge keys '<<' are not part of the grammar: write the keys out"),
        ("a: !!python/name:os.system x\n", "x.yaml:1:4 a: the tag 'tag:yaml.org,2002:python/name:os.system' is not"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2:1: a second document starts here; a study is one document"),
        ("%YAML 1.1\n---\na: on\n", "x.yaml:1:1: directives such as '%YAML' are not part of the grammar"),
        ("a: 1\n3: 2\n", "x.yaml:2:1: a key is a word, got 3; quote it if it is meant as one"),
        ("a: [1, 2\nb: 3\n", "x.yaml:2:2: not YAML: while parsing a flow sequence"),
        ("a: 1\n\tb: 2\n", "x.yaml:2:1: not YAML: while scanning"),
        ("a: b: c\n", "x.yaml:1:5: not YAML: mapping values are not allowed"),
        ("a: x\0y\n", "x.yaml:1:5: not a text file: it holds the character U+0000"),
        ('a: "\\ud800"\n', "x.yaml:1:4 a: half of a surrogate pair is not a character"),
        ('a: "\\U99999999"\n', "x.yaml:1:1: not YAML"),
        ("a: " + "[" * 80 + "]" * 80, "x.yaml:1:68 a: nested more than 64 levels deep"),
        ("a: " + "[" * 800, "x.yaml:1:1: nested more than 64 levels deep"),
    ],
)
def test_what_is_no_study_is_refused_where_it_stands(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    assert refused(file).startswith(said)


def test_every_problem_of_a_file_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("a: &x 1\nb: !t 2\na: 2\n")
    assert [line.partition(" ")[0] for line in refused(file).splitlines()] == ["x.yaml:1:4", "x.yaml:2:4", "x.yaml:3:1"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("a: 1")
    (tmp_path / "binary.yaml").write_bytes(b"a: 1\nb: \xff\xfe")
    assert refused(tmp_path / "quickstrt.yaml") == "quickstrt.yaml: no such file. Did you mean 'quickstart.yaml'?"
    assert refused(tmp_path / "binary.yaml") == "binary.yaml:2:4: not a UTF-8 text file: byte 0xff"
    (tmp_path / "folder").mkdir()
    assert refused(tmp_path / "folder") == "folder: this is a folder; name a study file in it"


def test_values_are_what_people_mean() -> None:
    text = "a: 1e-3\nb: on\nc: 010\nd: 0x1F\ne: ~\nf: 2026-11-22\ng: .5\nh: 1_000\ni: yes\nj: 'true'\nk: true"
    found = parse(text, "x.yaml").tree
    expected = [1e-3, "on", 10, 31, None, "2026-11-22", 0.5, 1000, "yes", "true", True]
    assert list(found.values()) == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected]


def test_every_key_and_value_has_its_place() -> None:
    document = parse("a:\n  - b\n  - {c: 1,\n     d: 2}\n", "x.yaml")
    assert document.where(("a", 1, "d")) == "x.yaml:4:9"
    assert document.keys["a", 1, "d"] == "x.yaml:4:6"
    assert document.where(("a", 0)) == "x.yaml:2:5"
    assert document.where(("a", 1, "absent")) == "x.yaml:3:5"


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xef\xbb\xbfdense_lab: 1\r\n")
    assert load(file).tree == {"dense_lab": 1}
