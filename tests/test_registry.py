"""Registries that list without importing, and wrappers that multiply their names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lbzoo.errors import UnknownNameError, UsageError
from lbzoo.registry import Registry
from lbzoo.signatures import REQUIRED, Option, options_of

PACKAGE = {
    "__init__.py": "",
    "things.py": '''
from tool_for_this_test import registry

register_thing = registry.things.register
register_thing_coat = registry.coats.register


@register_thing("plain", paper="one", floats=1)
def plain(target, *, size: int = 3, shape: "tuple[int, ...] | None" = None):
    """A plain thing."""
    return ["plain", target, size]


@register_thing("striped", paper="two")
class Striped:
    """A striped thing.

    More of it.
    """

    def __init__(self, target, width: float, *, colour: str = "red"):
        self.parts = [target, width, colour]


@register_thing_coat("warm_", paper="three")
class Coat:
    """A coat."""

    def __init__(self, inner, *, thickness: float = 1.0, colour: str = "blue"):
        self.inner, self.thickness = inner, thickness
''',
    "registry.py": """
from lbzoo.registry import Registry

coats = Registry("thing_coat", package="tool_for_this_test")
things = Registry("thing", package="tool_for_this_test", wrappers=coats)
""",
}


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    folder = tmp_path / "tool_for_this_test"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in [name for name in sys.modules if name.startswith("tool_for_this_test")]:
        monkeypatch.delitem(sys.modules, module)
    from tool_for_this_test.registry import things  # type: ignore[import-not-found]  # written above

    return things


def imported() -> bool:
    return "tool_for_this_test.things" in sys.modules


def test_names_and_options_are_read_without_importing(things):
    assert things.names() == ["plain", "striped", "warm_plain"]
    assert things.names("s*") == ["striped"]
    assert "plain" in things
    assert "plaid" not in things
    entry = things.entry("striped")
    assert (entry.first_line, dict(entry.meta), entry.qualname) == ("A striped thing.", {"paper": "two"}, "Striped")
    assert entry.options == {"width": Option("width", float), "colour": Option("colour", str, "red")}
    assert entry.options["width"].default is REQUIRED
    assert things.options("plain")["shape"].annotation == "tuple[int, ...] | None"
    assert not imported()


def test_getting_imports_the_one_module(things):
    assert things.get("plain")("x") == ["plain", "x", 3]
    assert imported()
    assert things.meta("plain") == {"paper": "one", "floats": 1}


def test_an_unknown_name_is_answered_with_the_nearest(things):
    for call in (things.get, things.entry, things.options, things.meta):
        with pytest.raises(UnknownNameError, match="no thing named 'plane'; did you mean 'plain'"):
            call("plane")


def test_a_wrapped_name_has_the_options_of_both(things):
    entry = things.entry("warm_plain")
    assert list(entry.options) == ["size", "shape", "thickness", "colour"]
    assert entry.first_line == "A coat (around plain)."
    assert dict(entry.meta) == {"paper": "three", "floats": 1}
    assert entry.source.endswith("things.py:26")
    assert not imported()
    assert things.meta("warm_plain") == {"paper": "three", "floats": 1}


def test_a_wrapped_name_builds_the_one_around_the_other(things):
    coat = things.get("warm_plain")("x", size=5, thickness=2.0)
    assert (coat.inner, coat.thickness) == (["plain", "x", 5], 2.0)


def test_two_parts_that_share_an_option_are_no_name(things):
    assert "warm_striped" not in things
    with pytest.raises(UnknownNameError):
        things.get("warm_striped")


def test_wrappers_are_not_piled_up(things):
    assert "warm_warm_plain" not in things
    assert "warm_" not in things


def test_what_is_registered_at_run_time_is_wrapped_too(things):
    @things.register("late", floats=4)
    def late(target, *, depth: int = 1):
        """Late."""
        return [target, depth]

    assert {"late", "warm_late"} <= set(things.names())
    assert things.get("warm_late")("x", depth=2).inner == ["x", 2]


def test_a_plain_name_with_the_prefix_wins(things):
    @things.register("warm_late")
    def warm_late(target):
        return "registered"

    @things.register("late")
    def late(target):
        return "late"

    assert things.get("warm_late")("x") == "registered"


def test_a_wrapped_name_of_ours_is_taken(things):
    with pytest.raises(UsageError, match=r"the thing name 'warm_plain' is taken by .*things.py:\d+; register under"):

        @things.register("warm_plain")
        def mine(target): ...

    assert things.get("warm_plain")("x").inner == things.get("plain")("x")


def test_a_name_goes_to_one_thing_of_a_file(things):
    @things.register("twice")
    class First: ...

    with pytest.raises(UsageError, match=r"the thing name 'twice' is taken by .*test_registry.py:\d+; register under"):

        @things.register("twice")
        class Second: ...

    assert things.get("twice") is First


def test_the_same_file_may_register_again_but_no_other(things):
    def first(target): ...

    things.add("again", first)
    things.add("again", first)
    with pytest.raises(UsageError, match="the thing name 'plain' is taken by"):
        things.add("plain", first)


POINTS = {"far": ":far", "lost": ":lost", "gone": ".no:x"}


@pytest.fixture
def points(things: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry in whose group an installed package has two entry points, of which one leads nowhere."""
    package = tmp_path / "package_for_this_test"
    package.mkdir()
    (package / "__init__.py").write_text("def far(target, *, depth: int = 1): return ['far', target, depth]\n")
    facts = tmp_path / "package_for_this_test-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: package-for-this-test\nVersion: 1.0\n")
    lines = [
        "far = package_for_this_test:far",
        "lost = package_for_this_test:lost",
        "gone = package_for_this_test.no:x",
    ]
    (facts / "entry_points.txt").write_text("\n".join(["[lbzoo.things]", *lines, ""]))
    monkeypatch.delitem(sys.modules, "package_for_this_test", raising=False)
    return things


def test_entry_points_are_listed_and_wrapped_without_being_imported(points):
    assert {"far", "lost", "gone", "warm_far", "warm_gone"} <= set(points.names())
    for name in ("far", "warm_far", "gone", "warm_gone"):
        assert points.entry(name).options is None
    assert points.entry("far").source == "entry point of package-for-this-test"
    assert "package_for_this_test" not in sys.modules
    assert list(points.options("warm_far")) == ["depth", "thickness", "colour"]
    assert points.get("warm_far")("x", depth=2, thickness=3.0).inner == ["far", "x", 2]


@pytest.mark.parametrize(("name", "fault"), [("lost", "AttributeError"), ("gone", "ModuleNotFoundError")])
def test_an_entry_point_that_leads_nowhere_is_named_with_its_package(points, name, fault):
    words = f"the thing '{name}', entry point of package-for-this-test, cannot be loaded from package_for.*{fault}"
    for call in (points.get, points.options, points.meta):
        with pytest.raises(UsageError, match=words):
            call(name)
    assert points.get("far")("x") == ["far", "x", 1]


def test_an_entry_point_with_a_name_of_ours_is_an_error(points, tmp_path):
    path = tmp_path / "package_for_this_test-1.0.dist-info" / "entry_points.txt"
    path.write_text(path.read_text() + "plain = package_for_this_test:far\n")
    with pytest.raises(UsageError, match=r"entry point package_for_this_test:far: the thing name 'plain' is taken by"):
        points.names()


class Parent:
    def __init__(self, params, needed, lr: float = 0.1, momentum: float = 0.0): ...


class Heir(Parent):
    def __init__(self, params, warm: int = 2, **kwargs):
        super().__init__(params, 3, **kwargs)


class Swallower:
    def __init__(self, params, lr: float = 0.1, **kwargs): ...


def test_keywords_that_are_passed_on_are_the_parents_options():
    assert options_of(Heir) == {
        "lr": Option("lr", float, 0.1),
        "momentum": Option("momentum", float, 0.0),
        "warm": Option("warm", int, 2),
    }
    assert list(options_of(Swallower)) == ["lr"]
