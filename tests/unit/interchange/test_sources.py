"""Which file is a slide's: by the sheet, by a pattern; files that are nobody's are named."""

from __future__ import annotations

from pathlib import Path

from slidemake.cohort.sheet import SlideRow
from slidemake.interchange.sources import feature_files, of_no_slide


def row(slide: str, path: str = "", features: str = "", patient: str = "p") -> SlideRow:
    return SlideRow(slide, path, patient_id=patient, features=features)


def test_the_sheet_wins():
    assert feature_files(row("a", features="/x/a.h5"), "/y/{slide_id}.h5") == ["/x/a.h5"]
    assert feature_files(row("a"), "/y/{slide_id}.h5") == ["/y/a.h5"]
    assert feature_files(row("a", "/s/TCGA-1.svs"), "/y/{stem}.pt") == ["/y/TCGA-1.pt"]
    assert feature_files(row("a"), "/y/{patient_id}/{slide_id}.h5") == ["/y/p/a.h5"]
    assert feature_files(row("a"), None) == []


def test_wildcards_find_none_or_several(tmp_path: Path):
    for name in ("a.x.h5", "a.y.h5", "b.h5", "[c].h5"):
        (tmp_path / name).touch()
    pattern = str(tmp_path / "{slide_id}*.h5")
    assert [Path(p).name for p in feature_files(row("a"), pattern)] == ["a.x.h5", "a.y.h5"]
    assert feature_files(row("z"), pattern) == []
    assert [Path(p).name for p in feature_files(row("[c]"), pattern)] == ["[c].h5"]  # a name is no pattern
    assert of_no_slide([row("a"), row("b")], pattern) == ["[c].h5"]
