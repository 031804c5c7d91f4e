"""The threat model of docs/security.md: each line there names its test here (or elsewhere)."""

from __future__ import annotations

import ast
import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from slidemake.cohort.sheet import read_sheet
from slidemake.cohort.table import failure_rows
from slidemake.core import csv_cells
from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import write_json
from slidemake.core.tables import read_table, write_table
from slidemake.jobs.racks import read_manifest
from slidemake.workflow import verify

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "scripts" / "slidemake"
SOURCES = sorted([*(ROOT / "scripts").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
RULES = [ROOT / "Snakefile", *sorted((ROOT / "rules").glob("*.smk"))]


# -- ids and paths ---------------------------------------------------------------------------------------------------


def sheet(tmp_path: Path, header: str, *rows: str) -> Path:
    path = tmp_path / "slides.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    "slide_id",
    [
        *(
            "../up",
            "..",
            ".",
            "a/b",
            "/etc/passwd",
            "a\\b",
            "a;rm -rf ~",
            "$(id)",
            "`id`",
            "a b",
            "a\x00b",
            "a\x1b[31m",
        ),
        *("<script>", "'\"", "a" * 201, "é", "{wildcards}", "*", "a|b", "~"),
    ],
)
def test_ids_that_could_lead_elsewhere_are_refused(tmp_path, slide_id):
    path = tmp_path / "slides.csv"
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([["slide_id", "path"], [slide_id, "a.svs"]])
    with pytest.raises(RunError, match="slide_id"):
        read_sheet(path)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "-rf", "a b", "$(id)", "a;b", ""])
def test_names_of_tasks_and_models_that_could_lead_elsewhere_are_refused(name):
    from slidemake.configuration.load import load_configuration

    for section, value in (("tasks", {"label": "y"}), ("models", {})):
        with pytest.raises(RunError, match="becomes a folder"):
            load_configuration({"sheet": "s.csv", section: {name: value}})


def test_no_shell_is_given_anything_from_outside():
    """No rule but one has a shell command, and that one holds nothing but the quoted name of its log; no script starts
    a shell."""
    commands = [found for path in RULES for found in re.findall(r"^ +shell:\s+(.*)", path.read_text(), re.MULTILINE)]
    assert set(commands) <= {'"true 2> {log:q}"'}
    assert not [path for path in RULES if re.search(r"^ +run:", path.read_text(), re.MULTILINE)]
    for path, call, name in calls():
        assert name not in ("os.system", "os.popen", "subprocess.getoutput"), path
        shell = [word.value for word in call.keywords if word.arg == "shell"]
        assert not shell, path


def test_a_manifest_of_somebody_else_names_no_other_files(tmp_path):
    """Results may come from elsewhere: verify must not point at files outside of them, nor a stage read them."""
    path = tmp_path / "manifests" / "screen" / "r00000.json"
    record = {"slide_id": "../../../home", "status": "ok", "fingerprint": "x", "failure": None}
    write_json(path, {"stage": "screen", "rack": "r00000", "version": 1, "seconds": 0, "slides": [record]})
    write_json(tmp_path / "slidemake.json", {"format": "slidemake-results", "format_version": 1})
    with pytest.raises(RunError, match="no slide_id"):
        read_manifest(path)
    findings = verify.verify(tmp_path)
    told = findings[0] if isinstance(findings, tuple) else findings
    assert any("no slide_id" in finding.what for finding in told)
    assert {file for finding in told for file in finding.delete} == {path}


# -- code ------------------------------------------------------------------------------------------------------------


def calls():
    """(file, call, dotted name) of every call in the sources."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path, node, ast.unparse(node.func)


def test_no_pickle_is_loaded():
    """Not by pickle and its relatives, nor by a loader that falls back to it, nor by YAML or eval."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = {a.name.split(".")[0] for a in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            if "pickle" in names:  # to catch its errors
                used = {
                    n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pickle"
                }
                assert used <= {"UnpicklingError", "PickleError"}, path
            assert not names & (modules - {"pickle"}), path
    for path, call, name in calls():
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert words.get("allow_pickle", "False") == "False", path
        if name == "torch.load":
            assert words.get("weights_only") == "True", path
        if name == "yaml.load":
            assert "SafeLoader" in words.get("Loader", ""), path
        assert name not in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec", "pd.read_pickle", "torch.save"), path


def test_a_pickle_in_place_of_weights_is_not_executed(tmp_path):
    import pickle

    import torch
    from slidemake.stores.state_dicts import read_state_dict

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for number, write in enumerate((lambda f: pickle.dump(Hostile(), f), lambda f: torch.save({"w": Hostile()}, f))):
        path = tmp_path / f"{number}.pth"
        with path.open("wb") as handle:
            write(handle)
        with pytest.raises(RunError):
            read_state_dict(path)
        assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "1.pth", weights_only=False)  # the trap is real
    assert (tmp_path / "executed").exists()


def test_code_from_a_model_repository_is_not_run():
    """Networks are built from timm's and our own code; nothing fetches Python from a repository."""
    for path, call, name in calls():
        assert name not in ("torch.hub.load", "AutoModel.from_pretrained", "timm.create_model_from_hub"), path
        assert "trust_remote_code" not in {word.arg for word in call.keywords}, path
    for path in (ROOT / "scripts").rglob("*.py"):
        assert "hf-hub:" not in path.read_text(), path


def test_torchscript_from_the_hub_needs_a_pinned_revision_and_checksum(tmp_path):
    import yaml
    from slidemake.encoders.registry import REGISTRY, registry

    record = {
        **yaml.safe_load(REGISTRY.read_text())["encoders"]["resnet50"],
        "loader": "torchscript",
        "source": {"kind": "hub", "hub": "somebody/model", "filename": "model.pt"},
    }

    def load(**source):
        path = tmp_path / "encoders.yaml"
        path.write_text(yaml.safe_dump({"encoders": {"mine": {**record, "source": {**record["source"], **source}}}}))
        return registry([path])["mine"]

    for source in ({}, {"revision": "main", "sha256": "0" * 64}, {"revision": "0" * 40}):
        with pytest.raises(RunError, match="TorchScript is code"):
            load(**source)
    assert load(revision="0" * 40, sha256="0" * 64)


# -- labels and macros -----------------------------------------------------------------------------------------------


@pytest.fixture
def labelled_slide(tmp_path) -> Path:
    """An SVS as Aperio writes it, with grey tissue; thumbnail, label and macro are magenta, and name a patient."""
    import tifffile

    rng = np.random.default_rng(0)
    path = tmp_path / "labelled.svs"
    tissue = np.full((1536, 1536, 3), 240, np.uint8)
    tissue[256:1280, 256:1280] = rng.integers(90, 170, (1024, 1024, 1), np.uint8)
    magenta = np.zeros((300, 300, 3), np.uint8) + np.array([255, 0, 255], np.uint8)
    about = "Aperio Image Library v12\r\n1536x1536 |AppMag = 20|MPP = 0.5|Patient = DOE^JANE|Title = DOE^JANE"
    jpeg = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 95}, "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(tissue, tile=(256, 256), description=about, **jpeg)
        file.write(magenta, description="Aperio Image Library v12\r\nthumbnail", rowsperstrip=300, **jpeg)
        file.write(tissue[::4, ::4], tile=(128, 128), description=about, **jpeg)
        for name in ("label", "macro"):
            text = f"Aperio Image Library v12\r\n{name} 300x300"
            file.write(magenta, description=text, subfiletype=1 if name == "label" else 9, rowsperstrip=300, **jpeg)
    return path


@pytest.mark.parametrize("reader", ["auto", "openslide", "tiatoolbox"])
def test_label_and_macro_never_come_into_results(labelled_slide, tmp_path, reader):
    """Nothing magenta in any picture of the results, and the patient's name in no file."""
    import openslide
    from PIL import Image
    from slidemake.cohort.sheet import SlideRow
    from slidemake.slides.opening import open_slide
    from slidemake.slides.screening import screen_slide
    from slidemake.stain import stage as stain_stage
    from slidemake.stores.tile_store import TileStore
    from slidemake.tiles import stage as tiling
    from slidemake.tiles.grid import parse_grid
    from slidemake.tissue import stage as tissue_stage

    with openslide.OpenSlide(labelled_slide) as slide:
        assert set(slide.associated_images) >= {"label", "macro"}  # the trap is real
        assert slide.level_count == 2
    results = tmp_path / "results"
    row = SlideRow.for_screening("a", str(labelled_slide), mpp=0.5)
    record = screen_slide(row, {"reader": reader}, results, {"uri": "x", "source": "y"})
    assert "label" in record["associated"] or reader == "tiatoolbox"
    tissue = tissue_stage.process_slide(record, results, {"focus_samples": 8, "method": "otsu"})
    stain_stage.process_slide(tissue, results, {"method": "reinhard"})
    options = {"store": "pixels", "codec": "jpeg", "pixels": "scanned", "min_tissue": 0.5, "shard_tiles": 64}
    tiling.process_slide(tissue, parse_grid("224px_0.5mpp"), results, options)
    pictures = [np.asarray(Image.open(p).convert("RGB")) for p in results.rglob("*") if p.suffix in (".jpg", ".png")]
    assert len(pictures) >= 4  # thumbnail, overview, tissue.png, tissue.jpg
    store = TileStore(results / "tiles" / "224px_0.5mpp" / "a.zarr")
    pictures += list(store.read_tiles(range(len(store))))
    with open_slide(labelled_slide, reader=record["reader"]) as opened:
        pictures += [opened.read_level(0, 0, n, level.width, level.height) for n, level in enumerate(opened.levels)]
    for picture in pictures:
        r, g, b = np.moveaxis(picture.astype(int), -1, 0)
        assert not ((r > 200) & (b > 200) & (g < 60)).any()
    for path in results.rglob("*"):
        assert not path.is_file() or b"DOE" not in path.read_bytes(), path


def test_associated_images_are_not_asked_for():
    """Their names are listed; no code takes one."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript):
                assert not ast.unparse(node.value).endswith("associated_images"), path
            if isinstance(node, ast.Call):
                assert "associated_images.get" not in ast.unparse(node.func), path
                assert not {"associated", "associated_image"} & {word.arg for word in node.keywords}, path


# -- hostile texts ---------------------------------------------------------------------------------------------------

FORMULAS = ["=1+1", '=HYPERLINK("http://evil","x")', "@SUM(A1)", "+cmd|' /C calc'!A0", "-2+3+cmd|x!A0", "\t=1", "'=1"]
HARMLESS = ["+", "-", "-1.5", "+0.3", "-negative", "a=b", "x", "", "'quoted'", "ER+", "N/A", "0x1"]


def test_cells_cannot_be_formulas_and_come_back_as_they_were(tmp_path):
    rows = [{"slide_id": f"s{n}", "site": text} for n, text in enumerate([*FORMULAS, *HARMLESS])]
    write_table(tmp_path / "slides.csv", rows)
    with (tmp_path / "slides.csv").open(newline="") as handle:
        written = [row["site"] for row in csv.DictReader(handle)]
    assert written[len(FORMULAS) :] == HARMLESS
    for cell in written[: len(FORMULAS)]:
        assert cell[0] == "'"
    assert [row["site"] for row in read_table(tmp_path / "slides.csv")] == [*FORMULAS, *HARMLESS]


def test_every_table_is_written_through_safe_cells():
    """But for tables of numbers and ids, and the demo's own sheet."""
    numbers = {"core/csv_cells.py", "explain/explanation.py", "demo/cohort.py"}
    for path, _, name in calls():
        inside = path.is_relative_to(LIBRARY) and path.relative_to(LIBRARY).as_posix() not in numbers
        if inside:
            assert name not in ("csv.writer", "csv.DictWriter"), f"{path}: use csv_cells"


@pytest.mark.parametrize("cell", ["a\x1b]0;x\x07", "a\x00", "\u202egnp.exe", "a\x7f", "a\x9b31m"])
def test_invisible_characters_in_a_sheet_are_refused(tmp_path, cell):
    path = sheet(tmp_path, "slide_id,path,patient_id,site", f"a,a.svs,P1,{cell}")
    with pytest.raises(RunError, match="invisible character") as caught:
        read_sheet(path)
    assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.parametrize("size", [5000, 200_000])
def test_huge_cells_are_refused(tmp_path, size):
    with pytest.raises(RunError):
        read_sheet(sheet(tmp_path, "slide_id,path,patient_id", f"a,a.svs,{'x' * size}"))


def test_what_a_slide_says_of_itself_cannot_spoil_a_message():
    failure = SlideFailure("not_brightfield", "x\x1b[2J\n<script>" + "y" * 100_000)
    record = failure.record("a", "screen")
    assert record.message.isprintable()
    assert len(record.message) < 1100
    row = {"slide_id": "a", "status": "failed", **{f"failure_{k}": v for k, v in record.as_dict().items()}}
    assert failure_rows([row])[0]["message"] == record.message


def test_addresses_with_a_password_are_refused(tmp_path):
    with pytest.raises(RunError, match="password") as caught:
        read_sheet(sheet(tmp_path, "slide_id,path", "a,https://me:secret@host/a.svs"))
    assert "secret" not in str(caught.value)


def test_every_line_of_the_threat_model_has_a_test():
    page = (ROOT / "docs" / "security.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| threat")]
    assert len(lines) >= 10
    for line in lines:
        named = re.findall(r"`(test_\w+)`", line.rsplit("|", 2)[1])
        assert named, line
        for name in named:
            assert f"def {name}(" in tests, name


def test_json_of_hostile_texts_is_whole(tmp_path):
    hostile = {"site": "</script><script>alert(1)</script>", "name": "\u2028\x00\x1b"}
    write_json(tmp_path / "a.json", hostile)
    assert json.loads((tmp_path / "a.json").read_text()) | hostile == json.loads((tmp_path / "a.json").read_text())
    assert csv_cells.plain(csv_cells.safe("=x")) == "=x"
