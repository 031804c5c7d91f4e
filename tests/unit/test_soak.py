"""The page on reliability says what the long harnesses leave out of their comparison."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "soak"))

from changes import foretold
from cohort import EXCEPT_FILES, EXCEPT_KEYS, TESTS
from soak import figures, table


def test_the_page_lists_all_exceptions():
    page = (TESTS.parent / "docs" / "reliability.md").read_text()
    rows = page.split("<!-- exceptions -->")[1].split("<!-- /exceptions -->")[0].strip().splitlines()[2:]
    listed = dict(line.strip("| ").split(" | ") for line in rows)
    assert {name.strip("`"): why for name, why in listed.items()} == EXCEPT_FILES | EXCEPT_KEYS


def test_every_promise_of_the_page_names_its_tests():
    page = (TESTS.parent / "docs" / "reliability.md").read_text()
    promised = page.split("## What is promised")[1].split("\n## ")[0].split("Equal results means")[0]
    leads = [" ".join(lead.split()) for lead in re.findall(r"^- \*\*(.*?)\*\*", promised, re.MULTILINE | re.DOTALL)]
    rows = page.split("| what is promised |")[1].split("\n\n")[0].splitlines()[2:]
    listed = dict(row.strip("| ").split(" | ") for row in rows)
    assert [lead.rstrip(":") for lead in leads] == list(listed)
    tests = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    for lead, names in listed.items():
        found = re.findall(r"`(test_\w+)`", names)
        assert found, lead
        assert [name for name in found if f"def {name}(" not in tests] == []


def test_the_table_counts_what_is_wrong(tmp_path):
    (tmp_path / "kill.jsonl").write_text(
        '{"moments": [{"kind": "job"}, {"kind": "job"}], "slowest_stop": 1.5, "lost": ["x"], "wrong": []}\n'
    )
    (tmp_path / "fuzz.jsonl").write_text('{"outcome": "same"}\n{"outcome": "wrong"}\n')
    (tmp_path / "faults.jsonl").write_text('{"kind": "full", "lost": [], "wrong": ["y", "z"]}\n')
    (tmp_path / "changes.jsonl").write_text(
        '{"steps": ["a", "b", "end"], "killed": 1, "lost": ["v"], "wrong": ["w"]}\n'
    )
    found = figures(tmp_path)
    assert (found["moments"], found["cases"], found["faults"]) == (2, 2, 1)
    assert (found["lost"], found["wrong"]) == (2, 4)
    assert "| sequences of changes | 1 | 2 steps, 1 runs killed |" in table(found)
    assert "| moments killed | 2 | 1 runs: 2 job |" in table(found)


def test_a_dry_run_is_held_to_what_it_said():
    def told(plan: str, done: str) -> bool:
        return foretold(f"slidemake: of 5 slides {plan}\n", f"slidemake: of 5 slides {done}\n") == []

    failed = "1 failed, and nothing has changed of them"
    assert told(f"1 will be computed, 2 will be found finished, {failed}", "1 computed, 2 found finished, 1 failed")
    assert told("2 will be looked at (computed where", "1 computed, 1 found finished, 3 not looked at")
    assert told("2 will be computed (1 of them new)", "1 computed, 1 failed")
    assert not told("2 will be computed", "1 computed, 1 found finished")
    assert not told("2 will be found finished", "1 computed, 1 found finished")
    assert not told(failed, "1 computed, 1 failed")
    assert foretold("Nothing to be done", "Nothing to be done") == []
