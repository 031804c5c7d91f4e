"""Configuration files and encoder records that are not what they seem: doubled keys, anchors, encodings, depth."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from slidemake.core.failures import RunError
from slidemake.core.yaml_files import MOST, check_command, check_yaml_files, problems_of, read_yaml
from slidemake.encoders.registry import registry

ROOT = Path(__file__).parents[3]


OURS = sorted([*ROOT.glob("config/**/*.yaml"), *ROOT.glob("profiles/**/*.yaml"), *ROOT.glob("envs/*.yaml")])


@pytest.mark.parametrize("path", OURS, ids=[path.relative_to(ROOT).as_posix() for path in OURS])
def test_our_own_files_are_well(path):
    assert problems_of(path.read_text()) == []
    assert read_yaml(path) == yaml.safe_load(path.read_text())


def test_a_key_given_twice_is_an_error_with_both_lines(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("models:\n  a: {epochs: 3}\n  b: {epochs: 3, epochs: 4}\nsheet: s.csv\nmodels: {c: {}}\n")
    with pytest.raises(RunError) as caught:
        check_yaml_files([path])
    assert "line 3: epochs is there already (line 3)" in str(caught.value)
    assert "line 5: models is there already (line 1), and one would be lost; remove one" in str(caught.value)


def test_equal_keys_of_different_sections_are_no_problem():
    assert problems_of("a: {x: 1, y: [x, x]}\nb: {x: 1}\nx: {x: {x: x}}\n? [1, 2]\n: 3\n") == []


def test_a_bomb_of_anchors_is_refused_before_it_goes_off():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    [problem] = problems_of("\n".join(lines))
    assert problem.startswith("line 5: ")
    assert f"more than {MOST} values when its anchors are followed" in problem


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("remote: &r {a: *r}", "line 1: *r holds itself"),
        ("a: 1\nb: *nowhere", "line 2: *nowhere is nowhere defined"),
        ("[" * 20_000, "nested more than 50 deep"),
        ("a: [1", "it is no valid YAML"),
    ],
)
def test_what_cannot_be_followed_is_a_message(text, says):
    found = problems_of(text)
    assert any(says in problem for problem in found), found


def test_anchors_that_people_write_are_fine():
    assert problems_of("a: &a {x: 1}\nb: *a\nc: [*a, *a]\n") == []


@pytest.mark.parametrize("reader", [lambda path: check_yaml_files([path]), read_yaml, lambda path: registry([path])])
def test_a_file_that_is_not_utf8_is_a_message(tmp_path, reader):
    path = tmp_path / "encoders.yaml"
    path.write_bytes("encoders:\n  # Gewebe f\xfcr alle\n  x: {}\n".encode("latin-1"))
    with pytest.raises(RunError, match=r"encoders.yaml is not UTF-8 \(line 2\). Save it as UTF-8"):
        reader(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &x 1\nb: &x 2\n", "found duplicate anchor"),
        ("a: !!python/object:os.system 1\n", "could not determine a constructor for the tag"),
        ("a: 2020-99-99\n", "month must be in 1..12"),
        ("? [a]\n: b\n", "found unhashable key"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
    ],
)
def test_what_yaml_refuses_while_it_builds_is_a_message(tmp_path, text, says):
    path = tmp_path / "encoders.yaml"
    path.write_text(text)
    with pytest.raises(RunError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path} is not as it should be:\n  it is no valid YAML: ")
    assert says in str(caught.value)


def test_an_encoder_given_twice_is_an_error(tmp_path):
    path = tmp_path / "encoders.yaml"
    path.write_text("encoders:\n  x: {}\n  x: {}\n")
    with pytest.raises(RunError, match=r"line 3: x is there already \(line 2\)"):
        registry([path])


def said(arguments: list[str]) -> str:
    """The message that ends a command; empty where it goes on."""
    try:
        check_command(arguments)
    except SystemExit as ended:
        return str(ended.code)
    return ""


def test_configuration_files_of_a_command_are_looked_at_before_snakemake_reads_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text("sheet: slides.csv\n")
    Path("good.json").write_text('{\n\t"sheet": "slides.csv"\n}')
    Path("latin.yaml").write_bytes("sheet: Präparate.csv".encode("latin-1"))
    Path("list.yaml").write_text("- sheet")
    Path("twice.yaml").write_text("a: &x 1\nb: &x 2\n")
    for good in (
        ["--cores", "1"],
        ["--config", "latin.yaml=1"],
        ["tiles", "--configfile", "good.yaml", "good.json", "-n"],
    ):
        assert said(good) == "", good
    assert "absent" not in said(["--configfile", "absent.yaml"]), "Snakemake says so itself"
    for words in (
        ["--configfile", "latin.yaml"],
        ["-n", "--configfile=latin.yaml"],
        ["--configfiles", "good.yaml", "latin.yaml", "-n"],
    ):
        assert "latin.yaml is not UTF-8 (line 1). Save it as UTF-8" in said([*words, "--cores", "1"]), words
    assert "list.yaml is not as it should be:\n  it has no keys at its top level" in said(["--configfile", "list.yaml"])
    assert "found duplicate anchor" in said(["--configfile", "twice.yaml"])
