"""slidemake.json: damage is not absence, and absence is inferred, so that no slide changes its rack."""

from __future__ import annotations

import pytest
from slidemake.core.failures import RunError
from slidemake.core.files import write_json
from slidemake.core.marker import MARKER, inferred_rack_size, read_marker
from slidemake.jobs.racks import Machine
from slidemake.workflow.plan import check_results_folder, rack_size

AUTO = {"rack_size": "auto"}


@pytest.fixture
def results(tmp_path):
    """Ten slides in racks of four."""
    for rack, slides in (("r00000", 4), ("r00001", 4), ("r00002", 2)):
        path = tmp_path / "manifests" / "screen" / f"{rack}.json"
        write_json(
            path, {"stage": "screen", "rack": rack, "slides": [{"slide_id": f"{rack}-{i}"} for i in range(slides)]}
        )
    write_json(tmp_path / MARKER, {"format": "slidemake-results", "format_version": 1, "rack_size": 4})
    return tmp_path


@pytest.mark.parametrize("how", ["a digit", "no JSON", "another kind"])
def test_a_damaged_marker_stops_the_run(results, how):
    """One digit changed moved all slides to other racks, and every model was trained again."""
    path = results / MARKER
    text = {
        "a digit": path.read_text().replace('"rack_size": 4', '"rack_size": 5'),
        "no JSON": "{",
        "another kind": "[]",
    }
    path.write_text(text[how])
    for look in (read_marker, check_results_folder, lambda out: rack_size({**AUTO, "output": str(out)}, 10, Machine())):
        with pytest.raises(
            RunError, match=r"slidemake.json .* Delete .*slidemake.json and give the same command again"
        ):
            look(results)


def test_its_remedy_keeps_the_racks(results):
    config = {**AUTO, "output": str(results)}
    assert rack_size(config, 10, Machine()) == 4
    (results / MARKER).unlink()  # as the message says
    assert inferred_rack_size(results) == 4
    assert rack_size(config, 10, Machine()) == 4
    assert rack_size(config, 5000, Machine()) == 4


def test_one_rack_alone_says_how_many_it_holds_at_least(results):
    for rack in ("r00001", "r00002"):
        (results / "manifests" / "screen" / f"{rack}.json").unlink()
    (results / MARKER).unlink()
    assert rack_size({**AUTO, "output": str(results)}, 4, Machine()) >= 4


def test_new_results_have_none(tmp_path):
    assert read_marker(tmp_path) == {}
    assert inferred_rack_size(tmp_path) is None
