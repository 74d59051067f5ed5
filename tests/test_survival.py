"""Whatever breaks between a prior and the Hub: it is survived, or said; never a half prior. See tests/faults.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fault_scenarios import SCENARIOS
from faults import ALLOWED, KINDS, OPERATIONS, as_json, as_markdown

EXPERIMENT = Path(__file__).with_name("faults.py")
DOCS = Path(__file__).parent.parent / "docs"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The experiment, in a process that may set the client's time-outs."""
    command = [sys.executable, EXPERIMENT, "--json", tmp_path / "faults.json", "--markdown", tmp_path / "faults.md", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((tmp_path / "faults.json").read_text())


def not_survived(result: dict[str, Any]) -> list[str]:
    rows = result["faults"] + result["scenarios"]
    return [
        f"{row.get('operation', row.get('scenario'))}, {row.get('label')}: {row['outcome']}: {row['wrong']}"
        for row in rows
        if row["wrong"]
    ]


def test_a_sample_of_the_faults_is_survived(tmp_path):
    result = run(tmp_path, "--sample", "30", "--parts", "2", "--no-scenarios")
    assert len(result["faults"]) == 30
    assert {row["outcome"] for row in result["faults"]} <= set(ALLOWED)
    assert all(row["hits"] for row in result["faults"])
    assert not_survived(result) == []


@pytest.mark.slow
def test_every_kind_of_fault_in_every_operation_is_survived(tmp_path):
    result = run(tmp_path)
    assert not_survived(result) == []
    check(result)


def test_the_table_in_the_docs_is_of_an_experiment_in_which_everything_was_survived():
    result = json.loads((DOCS / "faults.json").read_text())
    assert not_survived(result) == []
    check(result)


def check(result: dict[str, Any]) -> None:
    """At least 250 faults, of every kind, into every request of every operation, each with an outcome that is allowed."""
    faults = result["faults"]
    assert len(faults) >= 250
    assert all(row["hits"] for row in faults)
    assert {row["outcome"] for row in faults} <= set(ALLOWED)
    assert {row["operation"] for row in faults} == set(OPERATIONS) == set(result["requests"])
    assert {row["kind"] for row in faults} == set(KINDS)
    hit = {(row["operation"], row["number"]) for row in faults}
    assert hit == {(name, number) for name, count in result["requests"].items() for number in range(count)}
    outcomes = Counter(row["outcome"] for row in faults)
    assert min(outcomes[name] for name in ("done", "retried", "resumed", "from the cache", "clear error", "killed")) > 0
    assert [row["scenario"] for row in result["scenarios"]] == list(SCENARIOS)


def test_the_table_in_the_docs_is_written_from_the_experiment_and_names_every_operation_and_kind():
    result = json.loads((DOCS / "faults.json").read_text())
    text = (DOCS / "faults.md").read_text(encoding="utf-8")
    assert text == as_markdown(result)
    assert as_json(result) == (DOCS / "faults.json").read_text()
    for name in (*OPERATIONS, *KINDS, *SCENARIOS):
        assert name in text, name


def test_the_judge_sees_what_is_wrong(tmp_path):
    """What was not survived is in the table: here a result with one such row."""
    result = json.loads((DOCS / "faults.json").read_text())
    result["faults"][0]["wrong"] = ["a mixture"]
    assert "1 were not survived" in as_markdown(result)
    assert not_survived(result) != []
