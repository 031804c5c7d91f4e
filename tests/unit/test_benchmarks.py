"""The benchmark runs and measures everything beside something; how fast anything is, is not asked."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The small benchmark's results, what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--small", "--out", str(folder / "small.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "small.json").read_text()), done.stdout, folder


@pytest.mark.slow
def test_every_figure_stands_beside_a_limit(outcome):
    results, printed, folder = outcome
    assert {row["section"] for row in results["rows"]} == {"reading", "store", "embedding", "stain", "mil", "memory"}
    assert set(results["sections"]) == {"reading", "store", "embedding", "mil", "jpeg", "memory"}
    for row in results["rows"]:
        assert row["beside"]
        assert all(math.isfinite(row[key]) for key in ("figure", "limit", "ratio", "cpu_ratio")), row
        assert row["limit"] > 0, row
        assert len(row["figures"]) == len(row["limits"]) == 1  # turn, in the small run
        assert row["name"] in printed
    assert (folder / "small.png").stat().st_size > 10_000
    assert [(e["quality"], e["subsampling"]) for e in results["jpeg"]][:2] == [(70, "444"), (80, "444")]
    assert all(0.5 < e["worst_percent"] <= e["median"] <= 1 for e in results["jpeg"])


@pytest.mark.slow
def test_the_page_gets_its_tables(outcome, tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from tables import END, START, write_docs

    page = tmp_path / "performance.md"
    page.write_text(f"before\n{START}\nan earlier table\n{END}\nafter\n")
    for _ in range(2):
        write_docs(outcome[0], page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "an earlier table" not in text
    assert text.count("### Reading tiles") == 1
    for row in outcome[0]["rows"]:
        assert row["name"] in text


@pytest.mark.slow
def test_the_machine_is_described(outcome):
    machine = outcome[0]["machine"]
    assert machine["cores"] >= 1
    assert {"numpy", "torch", "zarr", "imagecodecs"} <= set(machine["packages"])


def test_the_interval_of_a_median_is_that_of_order_statistics():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from measure import median_interval

    # By hand: 2 P(Binomial(n, 1/2) < k) <= 0.05. n = 5: 2/32 for the extremes already is more; n = 6 to 8: k = 1;
    # n = 9: 2 (1 + 9) / 512 = 0.039 for k = 2; n = 12: 2 (1 + 12 + 66) / 4096 = 0.039 for k = 3; n = 25: k = 8.
    for n, k in ((1, 1), (3, 1), (5, 1), (6, 1), (8, 1), (9, 2), (12, 3), (25, 8)):
        values = [float(v) for v in range(1, n + 1)]
        assert median_interval(values[::-1]) == (k, n + 1 - k), n


def test_a_verdict_needs_the_interval_on_one_side():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from measure import Timed, compare

    ours, limit = Timed([80.0, 100.0, 90.0], [40.0, 50.0, 45.0]), Timed([100.0, 100.0, 100.0], [50.0, 50.0, 50.0])
    row = compare("reading", "a", "tiles/s", ours, "b", limit, bar=">=0.95")
    assert (row.figure, row.limit, row.ratio, row.cpu_ratio) == (90.0, 100.0, 0.9, 0.9)
    assert row.verdict == "unclear"
    assert compare("reading", "a", "tiles/s", ours, "b", limit, bar=">=0.8").verdict == "met"
    assert compare("reading", "a", "tiles/s", ours, "b", limit, bar=">=1.1").verdict == "missed"
    assert compare("store", "a", "tiles/s", ours, "b", limit, bar=">=75", absolute=True).verdict == "met"
    assert compare("stain", "a", "ms", ours, "b", limit, bar="<=0.7").verdict == "missed"
    assert compare("stain", "a", "ms", ours, "b", limit).verdict == ""
    one_off = Timed([0.5, *[1.0] * 8], [1.0] * 9)
    assert compare("a", "a", "", one_off, "b", Timed([1.0] * 9, [1.0] * 9), bar=">=1").verdict == "met"
    two_off = Timed([0.5, 0.5, *[1.0] * 7], [1.0] * 9)
    assert compare("a", "a", "", two_off, "b", Timed([1.0] * 9, [1.0] * 9), bar=">=1").verdict == "unclear"
    fewer = compare("a", "a", "", two_off, "b", Timed([1.0] * 3, [1.0] * 3))  # a peer of three turns: pairs of three
    assert (len(fewer.figures), fewer.ratio, fewer.figure) == (3, 0.5, 0.5)
    assert compare("store", "a", "tiles/s", ours, "b", limit, clock="cpu").figure == 45.0


def test_alarms_are_counted():
    command = [sys.executable, str(ROOT / "benchmarks" / "alarms.py"), "--cohorts", "2", "--patients", "16"]
    done = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert head == ["patients", "confounded", "shortcut_site", "optimism", "either"]
    assert [row[:2] for row in rows] == [["16", "0"], ["16", "0.85"]]
    for row in rows:
        shares = [float(cell.split()[0]) for cell in row[2:]]
        assert all(share in (0, 0.5, 1) for share in shares)
        assert max(shares[:2]) <= shares[2] <= sum(shares[:2])
