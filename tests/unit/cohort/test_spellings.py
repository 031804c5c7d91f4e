"""One rule for every column that groups; missing values, doubtful ones, and quotation marks that swallow rows."""

from __future__ import annotations

import logging
import unicodedata

import pytest
from slidemake.cohort.sheet import describe_tasks, read_sheet
from slidemake.cohort.sheet_table import doubtful, read_table
from slidemake.cohort.spellings import difference, spelling_key, spelling_problems
from slidemake.configuration.load import load_configuration
from slidemake.core.failures import RunError

TASK = {"t": {"label": "grade", "type": "binary", "splits": {"method": "kfold", "folds": 2}}}


@pytest.fixture
def sheet(tmp_path):
    def write(text: str):
        (tmp_path / "slides.csv").write_text(text, encoding="utf-8")
        return tmp_path / "slides.csv"

    return write


def fault(path, columns=(), tasks=None) -> str:
    with pytest.raises(RunError) as caught:
        read_sheet(path, columns, tasks)
    return str(caught.value)


@pytest.mark.parametrize(
    ("one", "two", "what"),
    [
        ("P01", "p01", "case"),
        ("Köln", unicodedata.normalize("NFD", "Köln"), "the Unicode form of a letter"),
        ("P01", "P\uff101", "the width or form of a character"),
        ("A-1", "A\u20131", "the kind of a dash"),
        ("A-1", "A\u22121", "the kind of a dash"),
        ("A-1", "A\u20111", "the kind of a dash"),
        ("St Gallen", "St\u00a0Gallen", "the kind or number of spaces"),
        ("St Gallen", "St  Gallen", "the kind or number of spaces"),
        ("P01", "P\u200d01", "characters that nobody sees"),
        ("P01", "\u042001", "letters of another alphabet that look alike"),
        ("STRASSE", "straße", "case"),
        ("A-1", "a\u20131", "the kind of a dash and case"),
    ],
)
def test_spellings_of_one_name_are_found_and_told_apart(one, two, what):
    assert one != two
    assert spelling_key(one) == spelling_key(two)
    assert difference(one, two) == what
    [problem] = spelling_problems([(2, one), (3, two), (4, one), (5, two)], "site")
    assert problem.row == 3
    assert "(rows 3, 5)" in problem.text
    assert "(rows 2, 4)" in problem.text
    assert "write one of them everywhere" in problem.text


@pytest.mark.parametrize(("one", "two"), [("P01", "P02"), ("P-1", "P_1"), ("ö", "o"), ("1", "01"), ("A1", "A 1")])
def test_different_names_stay_different(one, two):
    assert spelling_key(one) != spelling_key(two)
    assert not list(spelling_problems([(2, one), (3, two)], "site"))


def test_what_cannot_be_seen_is_written_out():
    [problem] = spelling_problems([(2, "P01"), (3, "P\u200d01")], "patient_id")
    assert '"P<U+200D>01"' in problem.text


def test_every_column_that_groups_is_looked_at_in_one_go(sheet):
    """Patients, sites, scanners, folds, cohorts, classes and subgroups: all in one message, with rows."""
    path = sheet(
        "slide_id,path,patient_id,site,scanner,split,cohort,sex,grade\n"
        "a,a.svs,P01,North,AT2,one,TCGA,F,high\n"
        "b,b.svs,p01,north,at2,One,tcga,f,High\n"
        "c,c.svs,P02,South,AT2,two,CPTAC,M,low\n"
        "d,d.svs,P03,South,AT2,two,CPTAC,M,low\n"
    )
    text = fault(path, ["cohort", "sex"], TASK)
    for column in ("patient_id", "site", "scanner", "split", "cohort", "sex", "grade"):
        assert f"row 3, column {column}: " in text
    assert text.count("differ in case only") == 7


def test_numbers_and_dates_are_no_names(sheet):
    survival = {"t": {"label": "os", "type": "survival", "splits": {"method": "kfold", "folds": 2}}}
    rows = "".join(f"s{i},s{i}.svs,{t},{i % 2}\n" for i, t in enumerate(["1e1", "1E1", "2.0", "2", "7", "8"]))
    assert len(read_sheet(sheet("slide_id,path,os_time,os_event\n" + rows), [], survival)) == 6


def test_excluded_slides_do_not_count(sheet):
    rows = "a,a.svs,P01,\nb,b.svs,p01,yes\n"
    assert len(read_sheet(sheet("slide_id,path,patient_id,exclude\n" + rows))) == 2


# -- missing and doubtful values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [
        *("'--", "n/a", "N/A", "<NA>", "<na>", "NaN", "null", "#N/A", "[Not Available]", "[Not Applicable]"),
        *("[Unknown]", "[Not Evaluated]", "[not evaluated]"),
    ],
)
def test_missing_values_are_missing(sheet, cell):
    [(_, row)] = read_table(sheet(f"slide_id,path,grade\na,a.svs,{cell}\n")).rows
    assert row["grade"] == ""


def test_the_many_names_of_no_value_are_doubtful():
    for text in ("Unknown", "None", "not reported", "Not_Evaluated", "--", "?", "NA"):
        assert doubtful(text), text
    for text in ("other", "negative", "no", "0", "indeterminate", "not tumour"):
        assert not doubtful(text), text


def cohort(*grades: str) -> str:
    return "slide_id,path,grade\n" + "".join(f"s{i},s{i}.svs,{g}\n" for i, g in enumerate(grades))


def test_a_class_that_may_be_none_is_asked_about(sheet):
    path = sheet(cohort("high", "high", "low", "low", "Unknown", "Unknown"))
    text = fault(path, [], TASK)
    assert "column grade has 2 of Unknown (patients: Unknown 2, high 2, low 2): is that a value, or none?" in text
    assert "set type: multiclass" not in text
    several = {"t": {**TASK["t"], "type": "multiclass"}}
    assert "is that a value, or none?" in fault(path, [], several)
    named = {"t": {**several["t"], "classes": ["high", "low", "Unknown"]}}
    assert len(read_sheet(path, [], named)) == 6


def test_classes_that_are_named_are_all(sheet):
    path = sheet(cohort("high", "high", "low", "low", "hihg", "hihg"))
    text = fault(path, [], {"t": {**TASK["t"], "type": "multiclass", "classes": ["high", "low", "none"]}})
    assert "class hihg of column grade is not in classes; did you mean high?" in text
    assert "classes names none, and no slide has it in column grade" in text


def test_one_number_in_two_ways_is_one_class(sheet):
    text = fault(sheet(cohort("0", "0", "1", "1", "1.0", "1.0")), [], TASK)
    assert "1 and 1.0 of column grade are the same number; write one of them everywhere" in text
    assert "set type" not in text


def test_a_doubtful_site_is_warned_of(sheet, caplog):
    with caplog.at_level(logging.WARNING, logger="slidemake"):
        read_sheet(sheet("slide_id,path,site\na,a.svs,Unknown\nb,b.svs,North\n"))
    assert "column site: Unknown (1 slides): taken as a name; leave these cells empty if it is none" in caplog.text


def test_planning_says_how_many_have_which_class(sheet):
    rows = read_sheet(sheet(cohort("high", "high", "low", "low", "")), [], TASK)
    [line] = describe_tasks(rows, TASK)
    assert line == "task t: 4 patients, 4 slides: high 2, low 2; 1 slides have no label"


# -- quotation marks -------------------------------------------------------------------------------------------------


def test_a_stray_quotation_mark_does_not_swallow_rows(sheet):
    """Three rows became part of a path, and a cohort of nine slides was one of six."""
    lines = [f"P{i}-A,/slides/P{i}-A.tiff,P{i}" for i in range(9)]
    lines[2] = 'P2-A,"/slides/P2-A.tiff,P2'
    lines[5] = 'P5-A,/slides/P5-A.tiff",P5'
    text = fault(sheet("slide_id,path,patient_id\n" + "\n".join(lines) + "\n"))
    assert "row 4: it reaches from line 4 to line 7 of the file" in text
    assert "(9 lines with text under the header, and 6 rows)" in text
    assert 'row 4, column path: holds a line break after "/slides/P2-A.tiff,P2"' in text


@pytest.mark.parametrize("column", ["patient_id", "site", "grade"])
def test_names_have_no_line_break(sheet, column):
    path = sheet(f'slide_id,path,{column}\na,a.svs,"x\ny"\nb,b.svs,z\n')
    assert f'row 2, column {column}: holds a line break after "x"' in fault(
        path, ["grade"] if column == "grade" else []
    )


def test_a_comment_may_have_lines_but_no_rows(sheet):
    head = "slide_id,path,patient_id,site,comment\n"
    rows = read_sheet(sheet(head + 'a,a.svs,P1,N,"first\nsecond, and more"\nb,b.svs,P2,N,\n'))
    assert len(rows) == 2
    text = fault(sheet(head + 'a,a.svs,P1,N,"left\nb,b.svs,P2,N,\nc,c.svs,P3,N,right"\n'))
    assert "row 2: it reaches from line 2 to line 4 of the file" in text


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["{folder.nope}", "{stem[x]}", "{stem.__class__}", "{stem:>999}", "{stem!r}", "{", "{}"]
)
def test_a_pattern_of_truth_masks_has_three_plain_fields(pattern):
    with pytest.raises(RunError, match=r"explain.truth: .* may hold \{folder\}, \{stem\} and \{slide_id\}"):
        load_configuration({"sheet": "s.csv", "explain": {"truth": pattern}})


@pytest.mark.parametrize("section", ["evaluation", "stress", "background"])
def test_a_seed_that_libraries_refuse_is_refused(section):
    """scikit-learn takes 32 bits, torch 64: both after everything else is done."""
    load_configuration({"sheet": "s.csv", section: {"seed": 2**32 - 1}})
    with pytest.raises(RunError, match=f"{section}.seed: 4294967296 is not a whole number from 0 to 4294967295"):
        load_configuration({"sheet": "s.csv", section: {"seed": 2**32}})
