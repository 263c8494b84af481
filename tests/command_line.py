# SPDX-License-Identifier: Apache-2.0
"""`nmsparse` in the process of a test."""

import json
import shlex

from typer.testing import CliRunner

from hf_nmsparse.cli.main import app


def run(line: str, code: int = 0):
    """Run `nmsparse LINE` and hold it to its exit code."""
    result = CliRunner().invoke(app, shlex.split(line))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


def facts(line: str, code: int = 0) -> dict:
    """The one JSON object that `nmsparse LINE --json` prints; NaN and infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(run(f"{line} --json", code).stdout, parse_constant=refuse)
