# SPDX-License-Identifier: Apache-2.0
"""What README and SECURITY.md promise is held by tests that exist, and that `make test` runs."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_SECTION = re.compile(r"^## Promises\n(.*?)^## ", re.DOTALL | re.MULTILINE)
_TEST = re.compile(r"`(tests/\w+\.py)::(\w+)`")


def promised() -> dict[str, list[tuple[str, str]]]:
    """Promise -> (file, test) of each row."""
    section = _SECTION.search((ROOT / "README.md").read_text(encoding="utf-8"))[1]
    rows = [row.strip("|").split("|") for row in section.splitlines() if row.startswith("|")][2:]
    return {promise.strip(): _TEST.findall(held) for promise, held in rows}


def left_out(test: ast.FunctionDef) -> bool:
    """Whether a mark keeps `make test` from running it."""
    marks = " ".join(ast.unparse(decorator) for decorator in test.decorator_list)
    return bool(re.search(r"mark\.(slow|gpu|skip\b|xfail)", marks))


@pytest.mark.parametrize(
    ("promise", "tests"), promised().items(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_promise_is_held_by_a_test_that_runs(promise, tests):
    assert tests, f"no test is named for: {promise}"
    for file, name in tests:
        functions = [
            node
            for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)
        ]
        found = [function for function in functions if function.name == name]
        assert found, f"{file} has no {name}"
        assert not left_out(found[0]), f"{name} is not run by make test"


@pytest.mark.parametrize(
    "page", ["SECURITY.md", *(f"docs/{name}" for name in ("METHODS.md", "FORMAT.md", "KERNELS.md", "EVALUATION.md"))]
)
def test_pages_name_tests_that_exist(page):
    for file, name in _TEST.findall((ROOT / page).read_text(encoding="utf-8")):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page}: {file} has no {name}"
