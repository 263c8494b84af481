# SPDX-License-Identifier: Apache-2.0
"""The versions that `make test-oldest` installs are the oldest that pyproject.toml allows."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parent.parent


def lower_bounds(project: dict) -> dict[str, str]:
    """The oldest version of each package that has a lower bound, over all extras."""
    wanted = [
        *project["dependencies"],
        *(entry for extra in project["optional-dependencies"].values() for entry in extra),
    ]
    found = {}
    for requirement in map(Requirement, wanted):
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        for bound in bounds:
            assert found.setdefault(requirement.name, bound) == bound, f"two lower bounds of {requirement.name}"
    return found


def test_the_oldest_versions_are_the_lower_bounds_of_pyproject():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (REPOSITORY / "constraints-oldest.txt").read_text().splitlines()
    pinned = {
        r.name: str(r.specifier).removeprefix("==")
        for r in map(Requirement, (line for line in lines if not line.startswith("#")))
    }
    bounds = lower_bounds(project)
    assert bounds.pop("torch") and pinned == bounds
