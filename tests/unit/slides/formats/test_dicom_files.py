"""DICOM folders: the slide is told by what files say of themselves, and what is no slide is named for what it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from slidemake.core.failures import SlideFailure
from slidemake.slides.first_sheet import find_slides
from slidemake.slides.formats.dicom_files import WHOLE_SLIDE, slide_series
from slidemake.slides.opening import open_slide, slide_file

pydicom = pytest.importorskip("pydicom")
DATA = os.environ.get("SLIDEMAKE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SLIDEMAKE_TEST_DATA is not set: no real DICOM slide")
SEG, ANN = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.91.1"


def write(path: Path, series: str, kind: str = WHOLE_SLIDE, flavour: str = "VOLUME") -> Path:
    """The head of a DICOM file, without pixels."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, f"1.2.3.{abs(hash(path.name)) % 10**9}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    head = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    head.SOPClassUID, head.SOPInstanceUID, head.SeriesInstanceUID = kind, meta.MediaStorageSOPInstanceUID, series
    head.Modality = "SM"
    if kind == WHOLE_SLIDE:
        head.ImageType = ["ORIGINAL", "PRIMARY", flavour, "NONE"]
    head.save_as(path, enforce_file_format=True)
    return path


def test_the_slide_of_a_folder_is_told_by_content(tmp_path: Path) -> None:
    above, tmp_path = tmp_path, tmp_path / "case"
    tmp_path.mkdir()
    write(tmp_path / "a_label.dcm", "1.1", flavour="LABEL")
    write(tmp_path / "b_seg.dcm", "1.2", SEG)
    levels = [write(tmp_path / name, "1.1") for name in ("IM0001", "IM0002", "z.dcm")]  # two without a suffix
    write(tmp_path / "c_ann.dcm", "1.3", ANN)
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / "empty").write_bytes(b"")
    assert slide_series(tmp_path) == levels
    assert slide_file(tmp_path) == levels[0]
    assert slide_file(levels[1]) == levels[1]
    assert slide_file(tmp_path / "a_label.dcm") == levels[0]  # of the same series: the slide
    assert find_slides(above) == [tmp_path]


@pytest.mark.parametrize(
    ("kind", "flavour", "word"),
    [
        (SEG, "", r"a segmentation \(SEG\)"),
        (ANN, "", r"annotations \(ANN\)"),
        (WHOLE_SLIDE, "LABEL", "the label image"),
        (WHOLE_SLIDE, "OVERVIEW", "the overview image"),
        ("1.2.840.10008.5.1.4.1.1.2", "", "of another kind"),
    ],
)
def test_what_is_no_slide_is_named(tmp_path: Path, kind: str, flavour: str, word: str) -> None:
    path = write(tmp_path / "x.dcm", "1.5", kind, flavour)
    for given in (path, tmp_path):
        with pytest.raises(SlideFailure, match=f"x.dcm is {word}") as failure:
            slide_file(given)
        assert failure.value.code == "unsupported"


def test_two_slides_in_a_folder_are_asked_about(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.dcm", "1.1"), write(tmp_path / "b.dcm", "1.2")
    with pytest.raises(SlideFailure, match="holds 2 slides") as failure:
        slide_file(tmp_path)
    assert failure.value.code == "unsupported"
    assert [slide_file(path) for path in (first, second)] == [first, second]
    assert find_slides(tmp_path) == [first, second]


@needs_data
def test_a_real_slide_among_other_files(tmp_path: Path) -> None:
    real = Path(str(DATA)) / "slides" / "cmu-small_dicom"
    for number, path in enumerate(sorted(real.iterdir())):
        shutil.copy(path, tmp_path / f"IM{number:04d}")
    write(tmp_path / "AAA.dcm", "1.9", SEG)
    shutil.copy(Path(str(DATA)) / "slides" / "camelyon-overview_mpp29.dcm", tmp_path / "other")
    with pytest.raises(SlideFailure, match="holds 2 slides"):
        open_slide(tmp_path)
    (tmp_path / "other").unlink()
    with open_slide(real) as wanted, open_slide(tmp_path) as got, open_slide(tmp_path, "tiatoolbox") as other:
        assert got.name == "openslide"
        assert got.levels == wanted.levels
        assert got.mpp == other.mpp == wanted.mpp
        region = got.read(700, 900, 0, 300, 300)
        assert np.array_equal(region, wanted.read(700, 900, 0, 300, 300))
        assert np.abs(region.astype(int) - other.read(700, 900, 0, 300, 300)).mean() < 2  # other JPEG decoders
