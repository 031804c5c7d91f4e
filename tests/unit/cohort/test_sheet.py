"""The sample sheet: what is read as what, every mistake with its remedy, tasks against labels, and first sheets."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path

import pytest
from slidemake.cohort.sheet import SlideRow, read_sheet, sheet_records, task_counts, task_problems
from slidemake.cohort.sheet_checks import lost_zeros
from slidemake.core.failures import RunError
from slidemake.core.files import write_json
from slidemake.slides.first_sheet import find_slides, sheet_rows, slide_ids, write_sheet

DATA = os.environ.get("SLIDEMAKE_TEST_DATA")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def sheet(tmp_path):
    def write(text: str, encoding: str = "utf-8") -> Path:
        path = tmp_path / "slides.csv"
        path.write_bytes(text.encode(encoding))
        return path

    return write


def check_task(rows, task):
    """Counts of rows that fit a task; RunError with every problem of those that do not."""
    if problems := task_problems(rows, task, "task"):
        raise RunError("\n".join(map(str, problems)))
    return task_counts(rows, task)


def fault(path, *columns, **more) -> str:
    with pytest.raises(RunError) as caught:
        read_sheet(path, columns, **more)
    return str(caught.value)


def cohort(labels: dict[str, str], **columns) -> list[SlideRow]:
    """One slide per patient: {patient: label}; further columns as {name: {patient: value}}."""
    rows = []
    for number, (patient, label) in enumerate(labels.items(), start=2):
        own = {name: values.get(patient, "") for name, values in columns.items()}
        rows.append(SlideRow(f"s{number}", "x", patient, labels={"grade": label}, row=number, **own))
    return rows


def task(**more) -> dict:
    splits = {"method": "kfold", "folds": 2, "column": "split", **more.pop("splits", {})}
    return {"label": "grade", "type": "binary", "level": "patient", "positive": None, "splits": splits, **more}


# -- reading ------------------------------------------------------------------------------------------------------


def test_cells_are_text_and_paths_start_at_the_sheet(sheet, tmp_path):
    path = sheet(
        "slide_id,path,patient_id,mpp,exclude,tissue_geojson,grade,note\n"
        "001,scans/a.svs,007,0.25,,outlines/a.geojson,2,\n"
        "1e,/abs/b.svs,,,YES,,NA,x\n"
        "c,s3://bucket/c.svs,007,,0,,1.0,\n"
    )
    first, second, third = read_sheet(path, ["grade"])
    assert (first.slide_id, first.patient_id, first.mpp) == ("001", "007", 0.25)
    assert first.path == str(tmp_path / "scans" / "a.svs")
    assert first.tissue_geojson == str(tmp_path / "outlines" / "a.geojson")
    assert first.labels == {"grade": "2", "note": ""}
    assert (second.path, second.patient_id, second.exclude) == ("/abs/b.svs", "1e", True)
    assert (second.mpp, second.labels["grade"], second.tissue_geojson) == (None, "", None)
    assert (third.path, third.exclude, third.labels["grade"], third.row) == ("s3://bucket/c.svs", False, "1.0", 4)


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_encodings_of_spreadsheets(sheet, mark, encoding):
    lines = ["slide_id|path|site|grade", "a|a.svs|Zürich|x", "", "b|b.svs|Genève|y", "|||"]
    path = sheet("\r\n".join(lines).replace("|", mark), encoding)
    rows = read_sheet(path, ["grade"])
    assert [(row.slide_id, row.site, row.row) for row in rows] == [("a", "Zürich", 2), ("b", "Genève", 4)]


def test_quoted_cells_and_short_rows(sheet):
    rows = read_sheet(sheet('slide_id,path,site,note\na,"dir, with comma/a.svs",X,"two\nlines"\nb,b.svs\n'))
    assert rows[0].path.endswith("dir, with comma/a.svs")
    assert rows[0].labels["note"] == "two\nlines"
    assert rows[1].site == ""


def test_files_that_are_no_sheet(sheet, tmp_path):
    assert "snakemake write_sheet" in fault(tmp_path / "none.csv")
    assert "is a folder" in fault(tmp_path)
    assert "Excel workbook" in fault(sheet("PK\x03\x04rest"))
    assert "not UTF-8 (row 2)" in fault(sheet("slide_id,path\nä,b\n", "latin-1"))
    assert "is empty" in fault(sheet("\n \n"))
    assert "no slides in it" in fault(sheet("slide_id,path\n"))


def test_records_for_the_cohort_table_keep_every_column(sheet):
    path = sheet("grade,slide_id,path,mpp,patient_id\nNA,a,a.svs,0.50,\nG2,b,b.svs,,P\n")
    assert sheet_records(path) == [
        {"slide_id": "a", "path": "a.svs", "patient_id": "a", "grade": "", "mpp": "0.50"},
        {"slide_id": "b", "path": "b.svs", "patient_id": "P", "grade": "G2", "mpp": ""},
    ]


def test_row_for_screening_alone():
    row = SlideRow.for_screening(slide_id="a", path="a.svs", mpp=0.5, stain="", exclude=False)
    assert (row.slide_id, row.patient_id, row.mpp) == ("a", "a", 0.5)


def test_the_demo_sheet_is_valid():
    rows = read_sheet(ROOT / "config" / "demo" / "slides.csv", ["diagnosis", "recurrence"])
    summary = check_task(rows, {**task(positive="tumour", splits={"folds": 5}), "label": "diagnosis"})
    assert summary["classes"] == {"benign": 15, "tumour": 15}


# -- mistakes in cells ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "cell", "expected"),
    [
        ("mpp", '"0,5"', '"0,5" is not a number; write 0.5'),
        ("mpp", "half", "write um per pixel such as 0.25"),
        ("mpp", "896", "896 um per pixel is outside 0.05 to 10"),
        ("mpp", "0.01", "outside 0.05 to 10"),
        ("mpp", "inf", "outside 0.05 to 10"),
        ("mpp", "-nan", "outside 0.05 to 10"),
        ("scan_date", "2024/3/5", '"2024/3/5" is not a date; write 2024-03-05'),
        ("scan_date", "20240305", "write 2024-03-05"),
        ("scan_date", "05.03.2024", "year-month-day"),
        ("scan_date", "45356", "write 2024-03-05"),
        ("scan_date", "2024-02-30", "is not a date"),
        ("exclude", "perhaps", '"perhaps" is neither yes nor no; write true or false'),
        ("patient_id", "1.23E+05", "a spreadsheet has rounded"),
        ("patient_id", '"1,2e+11"', "a spreadsheet has rounded"),
    ],
)
def test_a_wrong_cell_is_told_with_row_column_and_remedy(sheet, column, cell, expected):
    text = fault(sheet(f"slide_id,path,{column}\na,a.svs,\nb,b.svs,{cell}\n"))
    assert f"slides.csv row 3, column {column}: " in text
    assert expected in text
    assert "has a problem:" in text


@pytest.mark.parametrize(
    ("slide_id", "expected"),
    [
        ("", "is empty"),
        ("scans/a 1.svs", "is a path; write the name of the file alone: a_1"),
        ("C:\\scans\\a.svs", "is a path; write the name of the file alone: a"),
        ("a b", "holds a space"),
        ("Ä1", "holds Ä"),
        ("..", "begins with ."),
        (".S1.zarr.tmp-x", "begin with a letter, a digit or _: write S1.zarr.tmp-x"),
        ("-rf", "begins with -"),
        ("1.23E+05", "a spreadsheet has rounded"),
        ("1E12", "a spreadsheet has rounded"),
        ("x" * 201, "at most 200"),
    ],
)
def test_ids_that_cannot_be_names_of_files(sheet, slide_id, expected):
    text = fault(sheet(f"slide_id,path\n{slide_id},a.svs\n"))
    assert "row 2, column slide_id: " in text
    assert expected in text


@pytest.mark.parametrize("slide_id", ["TCGA-3L-AA1B-01Z-00-DX1.ABC", "a_b-c.1", "0", "12E4x", "2024-01-01", "_x"])
def test_ids_that_are_fine(sheet, slide_id):
    assert read_sheet(sheet(f"slide_id,path\n{slide_id},a.svs\n"))[0].slide_id == slide_id


@pytest.mark.parametrize("cell", ["2024-03-05", "2024-03-05T10:11:12", "NA", ""])
def test_dates_that_are_fine(sheet, cell):
    read_sheet(sheet(f"slide_id,path,scan_date\na,a.svs,{cell}\n"))


def test_an_empty_path(sheet):
    assert "row 2, column path: is empty; write the path" in fault(sheet("slide_id,path\na,\n"))


def test_too_many_cells(sheet):
    assert "row 2: 3 cells under 2 column names" in fault(sheet("slide_id,path\na,b,c\n"))
    assert read_sheet(sheet("slide_id,path\na,b,,\n"))


# -- mistakes in the header ----------------------------------------------------------------------------------------


def test_missing_columns_with_what_was_meant(sheet):
    text = fault(sheet("slide,filename,outcom\na,a.svs,x\n"), "outcome")
    assert "there is no column slide_id; rename the column slide to slide_id" in text
    assert "there is no column path; rename the column filename to path" in text
    assert "there is no column outcome; did you mean outcom?" in text
    assert "it has: slide_id, path" in fault(sheet("slide_id,path\na,b\n"), "zzz")


@pytest.mark.parametrize(
    ("column", "meant"),
    [("Patient ID", "patient_id"), ("case_id", "patient_id"), ("sites", "site"), ("scandate", "scan_date")],
)
def test_near_misses_of_known_columns_are_errors(sheet, column, meant):
    text = fault(sheet(f"slide_id,path,{column}\na,a.svs,x\n"))
    assert f"row 1, column {column}: did you mean {meant}?" in text


def test_other_columns_are_metadata(sheet):
    path = sheet("slide_id,path,patient_id,case_id,age,label,slide_note,mpp,mpp_x\na,a.svs,P,7,70,x,,,\n")
    assert read_sheet(path)[0].labels["age"] == "70"
    assert read_sheet(sheet("slide_id,path,sites\na,a.svs,x\n"), ["sites"])[0].labels == {"sites": "x"}


def test_features_need_no_path_and_words_near_that_name_are_metadata(sheet, tmp_path):
    path = sheet("slide_id,patient_id,features,fractures\na,p,f/a.h5,2\nb,q,,0\n")
    rows = read_sheet(path, features=True)
    assert [(row.path, row.features) for row in rows] == [("", str(tmp_path / "f/a.h5")), ("", "")]
    assert rows[0].labels == {"fractures": "2"}
    assert "features.encoder" in fault(sheet("slide_id,path,features\na,a.svs,a.h5\n"))
    assert "is the file of row 2 too" in fault(sheet("slide_id,features\na,a.h5\nb,a.h5\n"), features=True)
    assert sheet_records(path)[0]["path"] == ""


def test_columns_there_twice(sheet):
    assert "column site: this column is there twice" in fault(sheet("slide_id,path,site,site\na,b,c,d\n"))
    assert "another spelling" in fault(sheet("slide_id,path,site,Site\na,b,c,d\n"))


def test_a_label_may_be_one_of_our_own_columns(sheet):
    rows = read_sheet(sheet("slide_id,path,scanner\na,a.svs,A\nb,b.svs,B\n"), ["scanner"])
    assert [row.labels["scanner"] for row in rows] == ["A", "B"]


# -- rows against each other ---------------------------------------------------------------------------------------


def test_doubled_ids_name_both_rows(sheet):
    text = fault(sheet("slide_id,path\na,1.svs\nb,2.svs\na,3.svs\n"))
    assert 'row 4, column slide_id: "a" is the id of row 2 too' in text


def test_ids_that_differ_in_case_only(sheet):
    text = fault(sheet("slide_id,path\nAb,1.svs\nab,2.svs\n"))
    assert 'row 3, column slide_id: "ab" differs from "Ab" in row 2 in case only' in text


def test_one_file_in_two_rows(sheet):
    text = fault(sheet("slide_id,path\na,x/1.svs\nb,y/../x/1.svs\n"))
    assert 'row 3, column path: "y/../x/1.svs" is the file of row 2 too' in text
    assert len(read_sheet(sheet("slide_id,path,exclude\na,1.svs,\nb,1.svs,yes\n"))) == 2


def test_leading_zeros_that_are_gone(sheet):
    text = fault(sheet("slide_id,path\n7,scans/007.svs\n12,scans/012.svs\n"))
    assert 'row 2, column slide_id: "7" has lost the leading zeros of its file 007; write 007' in text
    assert "row 3, column slide_id" in text
    text = fault(sheet("slide_id,path,patient_id\na,a.svs,007\nb,b.svs,7\nc,c.svs,7\n"))
    assert 'row 3, column patient_id: "7" and "007" in row 2 differ in leading zeros only' in text
    assert "has a problem:" in text
    text = fault(sheet("slide_id,path,patient_id\na,a.svs,12.0\nb,b.svs,\nc,c.svs,13.0\n"))
    assert "was turned into a decimal number by a program; write 12" in text


def test_codes_of_one_width_of_which_some_are_shorter_are_warned_of(sheet, caplog):
    ids = [48213, 9120, 77310, 65102, 81234, 52011]
    lines = "".join(f"{i},x{i}.svs\n" for i in ids)
    with caplog.at_level(logging.WARNING, logger="slidemake"):
        logging.getLogger("slidemake").propagate = True
        read_sheet(sheet(f"slide_id,path\n{lines}"))
    assert "such as 9120: lost leading zeros?" in caplog.text


def test_ids_that_are_simply_counted_are_not():
    assert lost_zeros(str(i) for i in range(1, 200)) is None
    assert lost_zeros(f"{i:04d}" for i in range(500)) is None
    assert lost_zeros(["a1", "22", "333", "444", "555", "666"]) is None


def test_a_patient_in_two_splits(sheet):
    text = fault(sheet("slide_id,path,patient_id,split\na,1,P,train\nb,2,P,\nc,3,P,test\nd,4,Q,test\n"))
    assert 'row 4, column split: patient P has "test" here and "train" in row 2' in text


def test_every_problem_at_once_and_the_first_fifty(sheet):
    lines = "".join(f"s{i},p{i}.svs,wide\n" for i in range(70))
    text = fault(sheet("slide_id,path,mpp\n" + lines))
    assert "has 70 problems" in text
    assert "... and 20 more" in text
    assert text.count("column mpp") == 50
    mixed = fault(sheet("slide_id,path,mpp,grade\na b,,x,y\nc,c.svs,1,y\n"), tasks={"t": task()})
    assert "has 4 problems" in mixed
    for part in ("column slide_id", "column path", "column mpp", "task t: column grade has one class only (y)"):
        assert part in mixed


# -- tasks ---------------------------------------------------------------------------------------------------------


def refused(rows, wanted) -> str:
    with pytest.raises(RunError) as caught:
        check_task(rows, wanted)
    return str(caught.value)


def test_a_task_that_fits_is_counted():
    rows = cohort({"p1": "x", "p2": "x", "p3": "y", "p4": "y", "p5": ""})
    rows += [SlideRow("second", "x", "p1", labels={"grade": "x"}), SlideRow("out", "x", "q", exclude=True)]
    summary = check_task(rows, task())
    assert summary == {"classes": {"x": 2, "y": 2}, "patients": 4, "slides": 5, "unlabelled": 1}


def test_labels_that_cannot_be_learned():
    assert "one class only (x)" in refused(cohort({"a": "x", "b": "x"}), task())
    assert "column grade is empty" in refused(cohort({"a": "", "b": ""}), task())
    three = cohort({f"{c}{i}": c for c in "xyz" for i in range(3)})
    assert "has 3 classes (x 3, y 3, z 3 patients), and a binary task has two; set type: multiclass" in refused(
        three, task()
    )
    assert check_task(three, task(type="multiclass"))["patients"] == 9
    numbers = cohort({f"p{i}": f"{i / 7:.3f}" for i in range(30)})
    assert "a measurement, not a class" in refused(numbers, task())
    text = refused(cohort({"a": "Tumour", "b": "tumour", "c": "benign", "d": "benign"}), task())
    assert '"tumour" (row 3) and "Tumour" (row 2) differ in case only' in text
    assert "no slide has the positive class yes in column grade" in refused(
        cohort({"a": "x", "b": "x", "c": "y", "d": "y"}), task(positive="yes")
    )


def test_missing_label_column():
    rows = [SlideRow("a", "a", "a", labels={"diagnosis": "x", "age": "3"})]
    text = refused(rows, {**task(), "label": "diagnosys"})
    assert "there is no column diagnosys; did you mean diagnosis?" in text


def test_fewer_patients_than_folds():
    rows = cohort({"a": "x", "b": "x", "c": "x", "d": "y", "e": "y"})
    text = refused(rows, task(splits={"folds": 3}))
    assert "3 folds need 3 patients of each class, and there are y 2; set folds: 2" in text
    assert check_task(rows, task(splits={"folds": 2}))
    two_slides = [SlideRow(f"s{i}", "x", "e", labels={"grade": "y"}) for i in range(5)]
    assert "y 2" in refused(rows + two_slides, task(splits={"folds": 3})), "slides are not patients"
    assert "add patients, or merge classes" in refused(cohort({"a": "x", "b": "x", "c": "y"}), task())


def test_excluded_slides_do_not_count():
    rows = cohort({"a": "x", "b": "x", "c": "y", "d": "y"})
    out = [SlideRow(row.slide_id, "x", row.patient_id, exclude=True, labels=row.labels) for row in rows[2:]]
    assert "one class only" in refused(rows[:2] + out, task())
    assert "every slide is excluded" in refused(out, task())


def test_a_patient_with_two_labels():
    rows = cohort({"a": "x", "b": "x", "c": "y", "d": "y"})
    rows.append(SlideRow("other", "x", "a", labels={"grade": "y"}, row=9))
    assert 'row 9, column grade: patient a has "y" here and "x" in row 2' in refused(rows, task())


def test_given_splits():
    labels = {"a": "x", "b": "x", "c": "y", "d": "y"}
    given = task(splits={"method": "given"})
    assert check_task(cohort(labels, split={"a": "0", "b": "1", "c": "0", "d": "1"}), given)
    assert "need column split, which is missing or empty" in refused(cohort(labels), given)
    assert "row 5, column split: is empty" in refused(cohort(labels, split={"a": "0", "b": "1", "c": "0"}), given)
    assert "one value only (0)" in refused(cohort(labels, split=dict.fromkeys("abcd", "0")), given)
    rows = cohort(labels, split={"a": "0", "b": "1", "c": "0", "d": "1"})
    rows.append(SlideRow("again", "x", "a", split="1", labels={"grade": "x"}, row=7))
    assert "a patient in two folds" in refused(rows, given)
    second = SlideRow("again", "x", "a", labels={"grade": "x"}, row=7)
    assert check_task([*rows[:4], second], given), "one slide of a patient may speak for the others"
    elsewhere = task(splits={"method": "given", "column": "fold"})
    assert "there is no column fold" in refused(rows, elsewhere)
    own = [
        SlideRow(f"s{i}", "x", labels={"grade": "xy"[i % 2], "fold": str(i // 2)}, patient_id=f"p{i}") for i in range(4)
    ]
    assert check_task(own, elsewhere)


def test_leave_one_site_out():
    labels = {"a": "x", "b": "x", "c": "y", "d": "y"}
    loso = task(splits={"method": "leave_one_site_out"})
    rows = cohort(labels, site={"a": "N", "b": "S", "c": "N", "d": "S"})
    assert check_task(rows, loso)
    assert "need column site" in refused(cohort(labels), loso)
    rows.append(SlideRow("again", "x", "a", site="S", labels={"grade": "x"}, row=8))
    assert "row 8, column site" in refused(rows, loso)


# -- first sheets --------------------------------------------------------------------------------------------------


def slides_below(tmp_path, *names) -> Path:
    folder = tmp_path / "scans"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no slide")
    return folder


def test_slides_of_a_folder(tmp_path):
    names = ["b.SVS", "a 1.ndpi", "sub/b.tiff", "m.mrxs", "m/Slide.dat", "m/index.tif", ".x.svs", "p.png", "n.ome.tif"]
    folder = slides_below(tmp_path, *names, "v.zarr/0/c.tif")
    found = find_slides(folder)
    assert {p.relative_to(folder).as_posix() for p in found} == {
        *("b.SVS", "a 1.ndpi", "sub/b.tiff", "m.mrxs", "n.ome.tif", "v.zarr"),
    }
    assert sorted(slide_ids(found, folder)) == ["a_1", "b", "m", "n", "sub_b", "v"]


def test_first_sheet_is_a_valid_sheet_and_is_never_overwritten(tmp_path):
    folder = slides_below(tmp_path, "TCGA-3L-AA1B-01Z-00-DX1.abc.svs", "x y.svs", "007.tif")
    sheet = tmp_path / "new" / "slides.csv"
    assert write_sheet(folder, sheet) == 3
    rows = {row.slide_id: row for row in read_sheet(sheet, ["label"])}
    assert set(rows) == {"007", "TCGA-3L-AA1B-01Z-00-DX1.abc", "x_y"}
    assert rows["x_y"].path == str(folder / "x y.svs")
    barcode = rows["TCGA-3L-AA1B-01Z-00-DX1.abc"]
    assert (barcode.patient_id, barcode.site) == ("TCGA-3L-AA1B", "3L")
    sheet.write_text("precious")
    with pytest.raises(RunError, match="is there already and is not overwritten"):
        write_sheet(folder, sheet)
    assert sheet.read_text() == "precious"


def test_paths_are_relative_when_slides_lie_below_the_sheet(tmp_path):
    folder = slides_below(tmp_path, "a.svs")
    assert sheet_rows(folder, tmp_path / "slides.csv")[0]["path"] == "scans/a.svs"


def test_folders_without_slides(tmp_path):
    with pytest.raises(RunError, match="There is no folder"):
        write_sheet(tmp_path / "none", tmp_path / "s.csv")
    with pytest.raises(RunError, match="No slides in"):
        write_sheet(slides_below(tmp_path, "a.txt"), tmp_path / "s.csv")
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.skipif(not DATA, reason="SLIDEMAKE_TEST_DATA is not set: real slides are not available")
def test_first_sheet_of_real_slides(tmp_path):
    rows = {row["slide_id"]: row for row in sheet_rows(Path(DATA) / "slides", tmp_path / "s.csv")}
    assert rows["cmu-1-small-region"]["scan_date"] == "2009-12-29"
    assert rows["cmu-1-small-region"]["scanner"] == "CPAPERIOCS"
    assert Path(rows["cmu-small_dicom"]["path"]).is_dir()
    assert rows["camelyon-overview_mpp29"]["path"].endswith(".dcm")


@pytest.mark.skipif(not DATA, reason="SLIDEMAKE_TEST_DATA is not set: real cohort tables are not available")
def test_tables_as_users_have_them():
    text = fault(Path(DATA) / "cohorts" / "tcga-crc" / "TCGA-CRC-DX_SLIDE.csv")
    assert "there is no column path; rename the column FILENAME to path" in text
    assert "column PATIENT: did you mean patient_id?" in text
    text = fault(Path(DATA) / "cohorts" / "clam" / "dataset_csv" / "tumor_vs_normal_dummy_clean.csv", "label")
    assert "column case_id: did you mean patient_id?" in text


def test_ten_thousand_rows(tmp_path):
    path = tmp_path / "slides.csv"
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["slide_id", "path", "patient_id", "mpp", "scan_date", "grade"])
        writer.writerows(
            [f"s{i:05d}", f"s{i}.svs", f"p{i // 2}", 0.25, "2024-03-15", "xy"[i // 2 % 2]] for i in range(10_000)
        )
    rows = read_sheet(path, tasks={"t": task()})
    assert len(rows) == 10_000
    assert rows[-1].labels == {"grade": "y"}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("Slide_ID,path", "there is no column slide_id; rename the column Slide_ID to slide_id"),
        ("slide_id,Path", "there is no column path; rename the column Path to path"),
        ("SLIDE_ID;PATH", "rename the column PATH to path"),
    ],
)
def test_capitals_in_a_header_get_the_advice_that_helps(tmp_path, header, says):
    sheet = tmp_path / "slides.csv"
    mark = ";" if ";" in header else ","
    sheet.write_text(f"{header}\na{mark}a.svs\n")
    with pytest.raises(RunError) as caught:
        read_sheet(sheet)
    assert says in str(caught.value)


@pytest.mark.parametrize("first", ["sep=;\n", '"sep=;"\r\n', "SEP=;\n"])
def test_a_first_line_for_excel_is_no_header(tmp_path, first):
    sheet = tmp_path / "slides.csv"
    sheet.write_text(f"{first}slide_id;path\na;a,b.svs\n", newline="")
    [row] = read_sheet(sheet)
    assert (row.slide_id, Path(row.path).name, row.row) == ("a", "a,b.svs", 3)


def test_a_file_address_is_told_to_be_a_path(tmp_path):
    sheet = tmp_path / "slides.csv"
    sheet.write_text("slide_id,path\na,file:///data/my%20slides/a.svs\n")
    with pytest.raises(RunError, match=r"write /data/my slides/a\.svs"):
        read_sheet(sheet)


def test_links_are_followed_once_and_stores_of_ours_are_no_slides(tmp_path):
    """A link that leads back, two links to one folder, a link beside the folder itself; results of an earlier run."""
    folder, elsewhere = tmp_path / "slides", tmp_path / "elsewhere"
    (folder / "deep").mkdir(parents=True)
    (elsewhere / "more").mkdir(parents=True)
    for path in (folder / "a.svs", folder / "deep" / "b.svs", elsewhere / "c.svs", elsewhere / "more" / "d.svs"):
        path.write_bytes(b"x")
    (folder / "again").symlink_to(folder)
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "also deep").symlink_to(folder / "deep")
    (folder / "link").symlink_to(elsewhere)
    (folder / "second link").symlink_to(elsewhere)
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    (folder / "link.svs").symlink_to(elsewhere / "c.svs")
    results = folder / "results"
    write_json(results / "slidemake.json", {"format": "slidemake-results"})
    (results / "fetched.svs").write_bytes(b"x")
    for name, form in (
        ("theirs.zarr", None),
        ("ours.zarr", "slidemake-tiles"),
        ("embedded.zarr", "slidemake-embeddings"),
    ):
        (folder / name).mkdir()
        attributes = {"ome": {}} if form is None else {"format": form}
        (folder / name / "zarr.json").write_text(json.dumps({"zarr_format": 3, "attributes": attributes}))
    found = [path.relative_to(folder).as_posix() for path in find_slides(folder)]
    assert found == ["a.svs", "deep/b.svs", "link/c.svs", "link/more/d.svs", "link.svs", "theirs.zarr"]
