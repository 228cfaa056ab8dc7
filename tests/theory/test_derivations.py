"""theory/README.md points from its steps to tests, functions and figures: they are there."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "theory" / "README.md"


def pointers() -> list[tuple[str, str]]:
    """(file, name) of every test that is pointed to; a file that is left out is the one named last."""
    found, file = list[tuple[str, str]](), ""
    for path, name in re.findall(r"`((?:[\w/]+/)?test_\w+\.py)?(?:::(\w+\*?))?", README.read_text()):
        file = path or file
        if name:
            found.append((file, name))
    return found


def test_tests_that_are_pointed_to_exist() -> None:
    named = pointers()
    assert len(named) > 25
    for file, name in named:
        paths = [ROOT / file] if "/" in file else list((ROOT / "tests").rglob(file))
        assert len(paths) == 1, file
        tests = re.findall(r"^def (test_\w+)\(", paths[0].read_text(), re.MULTILINE)
        assert any(re.fullmatch(name.replace("*", r"\w+"), test) for test in tests), (file, name)


def test_functions_of_bounds_exist() -> None:
    cells = re.findall(r"^\| B\d .*?\| (.*?) \|", README.read_text(), re.MULTILINE)
    assert len(cells) == 11
    for cell in cells:
        package = ""
        for name in re.findall(r"`([\w.]+)`", cell):
            module, function = name.rsplit(".", 1)
            # `.expert.activation_bound` stands beside the module named before it, `.swiglu_exact` in it.
            module = module if not name.startswith(".") else package.rsplit(".", 1)[0] + module if module else package
            assert callable(getattr(importlib.import_module(module), function))
            package = module


def test_every_bound_points_to_a_test() -> None:
    parts = re.split(r"^\*\*B\d\. ", README.read_text(), flags=re.MULTILINE)[1:]
    assert len(parts) == 9 and all("*Test" in part and "::test_" in part for part in parts)
