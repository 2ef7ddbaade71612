"""YAML to nodes: YAML 1.2 scalars, line numbers, and files that are no recipe at all."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from valid_recipe import Write

from lbzoo.errors import UsageError
from lbzoo.recipe import Origin, RecipeError
from lbzoo.recipe.reading import leading_comment, read_recipe, read_value, scalar
from lbzoo.recipe.writing import to_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 0.01),
        ("1E5", 100000.0),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("-.inf", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        # Text in YAML 1.2, and something else in YAML 1.1.
        ("on", "on"),
        ("No", "No"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("1e", "1e"),
        ("bf16-mixed", "bf16-mixed"),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_not_a_number() -> None:
    assert math.isnan(scalar(".nan"))


def test_every_value_knows_its_line(write: Write) -> None:
    root, problems = read_recipe(write("# c\na: 1\nb:\n  c: [x,\n    y]\n  d: |\n    text\n'on': 'off'\n"))
    assert not problems
    lines = {path: node.origin.line for path, node in root.walk() if path}
    assert lines == {("a",): 2, ("b",): 3, ("b", "c"): 4, ("b", "c", 0): 4, ("b", "c", 1): 5, ("b", "d"): 6, ("on",): 8}
    assert root.plain() == {"a": 1, "b": {"c": ["x", "y"], "d": "text\n"}, "on": "off"}
    assert all(node.origin.path == path for path, node in root.walk())


def test_quoted_scalars_are_text(write: Write) -> None:
    root, _ = read_recipe(write("a: '1e-2'\nb: \"true\"\nc: ! 3\n"))
    assert root.plain()["a"] == "1e-2"
    assert root.plain()["b"] == "true"


def test_aliases_stand_for_what_they_name(write: Write) -> None:
    root, problems = read_recipe(write("a: &x {lr: 1}\nb: *x\n"))
    assert not problems
    assert root.plain() == {"a": {"lr": 1}, "b": {"lr": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml:1: the file is empty"),
        ("# only\n# comments\n", "f.yaml:1: the file is empty"),
        ("version: 1\n\ttask: x\n", "f.yaml:2: the line is indented with a tab"),
        ("- a\n- b\n", "f.yaml:1: a recipe is a mapping (`key: value` lines), and this is a list"),
        ("hello\n", "f.yaml:1: a recipe is a mapping (`key: value` lines), and this is the text 'hello'"),
        ("a: {b: 1\nc: 2\n", "f.yaml:2: not YAML: expected ',' or '}'"),
        ("a: 1\nb: c: d\n", "f.yaml:2: not YAML: mapping values are not allowed here"),
        ("a: 'x\n", "f.yaml:2: not YAML: found unexpected end of stream"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: a second document begins here"),
        ("a: *x\n", "f.yaml:1: not YAML: found undefined alias 'x'"),
        ("a: " + "[" * 500, "f.yaml:1: the YAML is nested too deeply"),
        ("a: 1\nb: \x07\n", "f.yaml:2: not YAML: special characters are not allowed"),
    ],
)
def test_files_that_cannot_be_read(write: Write, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_recipe(write(text, "f.yaml"))
    assert str(error.value).startswith(message)


def test_not_utf_8(write: Write) -> None:
    path = write("")
    path.write_bytes(b"version: 1\n# caf\xe9\n")
    with pytest.raises(RecipeError, match=r"valid\.yaml:2: byte 0xe9 is not UTF-8"):
        read_recipe(path)


def test_byte_order_mark_is_no_text(write: Write) -> None:
    path = write("")
    path.write_bytes(b"\xef\xbb\xbfversion: 1\n")
    assert read_recipe(path)[0].plain() == {"version": 1}


def test_a_folder_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="this is a folder, not a recipe file"):
        read_recipe(tmp_path)
    with pytest.raises(RecipeError, match="no such file"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a: this key is given twice (first on line 1)"),
        ("b:\n  c: {d: 1, d: 2}\n", "f.yaml:2: b.c.d: this key is given twice (first on line 2)"),
        ("a: !!python/object:os.system x\n", "f.yaml:1: a: the tag !!python/object:os.system is not supported"),
        ("a: !mine 3\n", "f.yaml:1: a: the tag !mine is not supported"),
        ("a: 1\n? [1, 2]\n: 3\n", "f.yaml:2: a key is a name, not a list or a mapping"),
        ("x: &x {lr: 1}\na:\n  <<: *x\n", "f.yaml:3: a.<<: merge keys are not supported"),
        ('a: "\\ud800"\n', "f.yaml:1: a: half of a surrogate pair is no text"),
        ("a: &x [1, *x]\n", "f.yaml:1: a.1: an alias stands inside what it names"),
    ],
)
def test_mistakes_that_leave_the_rest_readable(write: Write, text: str, problem: str) -> None:
    root, problems = read_recipe(write(text, "f.yaml"))
    assert root.is_mapping
    assert [str(each) for each in problems] == [str(each) for each in problems if str(each).startswith(problem)]
    assert len(problems) == 1


def test_aliases_of_aliases_do_not_fill_the_memory(write: Write) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    with pytest.raises(RecipeError, match="too many values for a recipe"):
        read_recipe(write("\n".join(levels)))


def test_values_of_overrides() -> None:
    origin = Origin("override", ("optimizer", "betas"), text="optimizer.betas=[0.9, 1e-2]")
    node = read_value("[0.9, 1e-2]", origin)
    assert node.plain() == [0.9, 0.01]
    assert node.value[1].origin.path == ("optimizer", "betas", 1)
    assert read_value("", origin).value is None
    assert read_value("{name: digits}", origin).plain() == {"name": "digits"}
    with pytest.raises(UsageError, match=r"override 'optimizer.betas=.*cannot read the value '\[0.9'"):
        read_value("[0.9", origin)
    with pytest.raises(UsageError, match="this key is given twice"):
        read_value("{a: 1, a: 2}", origin)


def test_leading_comment() -> None:
    text = "# lbzoo fit x.yaml    summary\n#\n#   indented\n\n# another block\nversion: 1\n"
    assert leading_comment(text) == "lbzoo fit x.yaml    summary\n\n  indented"
    assert leading_comment("version: 1\n# no\n") == ""


@pytest.mark.parametrize(
    "data",
    [
        {"a": [1, 2.5, 1e-6, 1e300, True, None], "b": {"c": "text", "d": ""}},
        {"text that looks like more": ["1e-2", "true", "null", "~", "3", ".inf", "on", "0o17", "1_0", "2024-01-01"]},
        {"text with marks": ["a: b", "# no", "- x", "'", '"', "\u00e9", "two\nlines", " space ", "*.bias", "{", "@"]},
        {"endless": [math.inf, -math.inf], "on": "off", "3": 4},
    ],
)
@pytest.mark.parametrize("one_line", [False, True])
def test_what_is_written_reads_back_as_it_was(write: Write, data: dict[str, object], one_line: bool) -> None:
    text = to_yaml(data, one_line=one_line)
    root, problems = read_recipe(write(text))
    assert not problems
    assert root.plain() == data
    assert not one_line or "\n" not in text


def test_one_value_on_a_line() -> None:
    assert [to_yaml(value, one_line=True) for value in (3, "x", None, (0.9, 0.98), "1e5", [])] == [
        "3", "x", "null", "[0.9, 0.98]", "'1e5'", "[]",
    ]  # fmt: skip


def test_nesting_is_limited_whatever_the_process_allows(write: Write) -> None:
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(20_000)  # as torch's compiler leaves it
        with pytest.raises(RecipeError, match="nested too deeply"):
            read_recipe(write("a: " + "[" * 500, "f.yaml"))
    finally:
        sys.setrecursionlimit(before)
