"""The pages say what the code does: lists of docs/formats.md, the encoder table of the README, links and names.

`python tests/unit/test_docs.py` writes the generated tables anew.
"""

from __future__ import annotations

import csv
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from slidemake.configuration.load import load_configuration, stage_options
from slidemake.configuration.schema import leaves
from slidemake.core.failures import HINTS, SlideFailure
from slidemake.encoders.registry import REGISTRY, load_record, registry

ROOT = Path(__file__).resolve().parents[2]
FORMATS, GUIDE, README = ROOT / "docs" / "formats.md", ROOT / "docs" / "guide.md", ROOT / "README.md"
PAGES = sorted([README, ROOT / "CHANGELOG.md", ROOT / "config" / "README.md", *(ROOT / "docs").rglob("*.md")])
GRID, ENCODER, SIDE = "224px_0.5mpp", "random_resnet18", 1536


# -- generated tables ---------------------------------------------------------------------------------------------


def failure_rows() -> str:
    return "".join(f"| `{code}` | {hint} |\n" for code, hint in HINTS.items())


def encoder_rows() -> str:
    known = registry([REGISTRY])
    rows = ["| key | what it is | tile | numbers | licence | gated |\n|---|---|---|---|---|---|\n"]
    for key in known:
        record = load_record(key, known)
        tile = f"{record.tile_px} px, {record.mpp:g} um/px"
        gated = "yes" if record.gated else ""
        rows.append(f"| `{key}` | {record.title} | {tile} | {record.dim} | {record.licence} | {gated} |\n")
    return "".join(rows)


def rerun_rows() -> str:
    rows = ["| a change of | computes again | jobs that look |\n|---|---|---|\n"]
    for row in yaml.safe_load((ROOT / "tests" / "workflow" / "what_runs_again.yaml").read_text())["rows"]:
        rows.append(f"| {row['change']} | {row['computes']} | {row['looks']} |\n")
    return "".join(rows)


GENERATED = (
    (FORMATS, "failure codes", failure_rows),
    (README, "encoders", encoder_rows),
    (GUIDE, "what runs again", rerun_rows),
)


def between(text: str, name: str) -> tuple[str, str, str]:
    """Text before, inside and after a generated part."""
    start = f"<!-- generated: {name} -->\n"
    before, rest = text.split(start)
    inside, after = rest.split("<!-- /generated -->", 1)
    return before + start, inside, "<!-- /generated -->" + after


@pytest.mark.parametrize(("page", "name", "make"), GENERATED, ids=[name for _, name, _ in GENERATED])
def test_generated_tables_are_up_to_date(page, name, make):
    assert between(page.read_text(), name)[1] == make(), "run python tests/unit/test_docs.py"


# -- formats.md against what the code writes ----------------------------------------------------------------------


def documented(heading: str) -> set[str]:
    """Names in the first cells of the tables directly under a heading of formats.md."""
    text = FORMATS.read_text()
    body = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert body, f"formats.md has no heading {heading}"
    cells = [line.split("|")[1] for line in body[1].splitlines() if line.startswith("|")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def documented_figures(stage: str) -> set[str]:
    """Figures of a stage in the table under the heading of slide records."""
    return set(re.findall(rf"^\| `{stage}` \| `(\w+)` \|", FORMATS.read_text(), re.MULTILINE))


def draw_slide(path: Path) -> None:
    """Blobs of haematoxylin and eosin on glass, 0.5 um/px."""
    import pyvips

    rng = np.random.default_rng(0)
    vectors = np.array([[0.53, 0.75, 0.39], [0.15, 0.83, 0.53]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cells, glass = (128, 128), np.array([242.0, 238.0, 230.0])
    nucleus = rng.random(cells) < 0.4
    amounts = np.stack([nucleus * rng.gamma(6, 0.2, cells), ~nucleus * rng.gamma(6, 0.12, cells)], axis=-1)
    image = np.broadcast_to(glass, (SIDE, SIDE, 3)).copy()
    image[256:1280, 256:1280] = np.kron(np.exp(-amounts @ vectors), np.ones((8, 8, 1))) * glass
    picture = pyvips.Image.new_from_array(image.clip(0, 255).astype(np.uint8))
    picture = picture.copy(interpretation="srgb", xres=2000, yres=2000)
    picture.tiffsave(str(path), tile=True, pyramid=True, compression="jpeg", resunit="cm")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A slide through screening, tissue, stain, tiles and embedding, as the rules' scripts run them."""
    from slidemake.cohort.sheet import SlideRow
    from slidemake.embedding import stage as embedding
    from slidemake.encoders.loading import load_encoder
    from slidemake.encoders.registry import identity
    from slidemake.jobs.racks import run_rack
    from slidemake.slides import screening
    from slidemake.stain import stage as stain_stage
    from slidemake.tiles import stage as tiling
    from slidemake.tiles.grid import parse_grid
    from slidemake.tissue import stage as tissue_stage

    root = tmp_path_factory.mktemp("results")
    draw_slide(root / "slide.tiff")
    config = load_configuration({"sheet": "slides.csv"}, ROOT)
    row, manifests = SlideRow.for_screening("a", str(root / "slide.tiff")), root / "manifests"

    def run(stage, before, work):
        return run_rack(stage, manifests / f"{stage}.json", before, work, rack="r00000")

    screened = run("screen", [{"slide_id": "a"}], lambda r: screening.screen_slide(row, {}, root))
    options = stage_options(config, "tissue")
    tissue = run("tissue", screened, lambda r: tissue_stage.process_slide(r, root, options))
    run("stain", tissue, lambda r: stain_stage.process_slide(r, root, {"method": "macenko"}))
    tiling_options = stage_options(config, "tiles")
    grid = parse_grid(GRID, tiling_options.pop("stride_px"))
    tiles = run("tiles", tissue, lambda r: tiling.process_slide(r, grid, root, tiling_options))
    record = load_record(ENCODER)
    target = stain_stage.pool_targets([json.loads((root / "slides/a/stain.json").read_text())], "macenko")
    (root / "target.json").write_text(json.dumps(target))
    known = identity(record, "random", "fp32")
    embedding.process_rack(
        tiles,
        [
            embedding.Lane(
                partial(load_encoder, record, "cpu", "fp32"),
                partial(embedding.make_slide_job, root, record, known, "macenko", target, "float16"),
                partial(run_rack, "embed", manifests / "embed.json", rack="r00000"),
            )
        ],
        device="cpu",
        dtype="float16",
        batch_size="auto",
    )
    return root


def read(path: Path) -> dict:
    """Content without the checksum, which every JSON has (see "Checksums" of formats.md)."""
    content = json.loads(path.read_text())
    assert len(content.pop("checksum")) == 32
    return content


def test_manifests(results):
    common = documented("Slide record")
    assert common == {"slide_id", "status", "failure", "seconds", "fingerprint", "reused"}
    own = {
        "screen": documented("slide.json"),
        "tissue": documented("tissue.json"),
        "stain": documented("stain.json") - {"tissue"},
    }
    for stage in ("screen", "tissue", "stain", "tiles", "embed"):
        manifest = read(results / "manifests" / f"{stage}.json")
        assert set(manifest) == documented("Manifests"), stage
        (record,) = manifest["slides"]
        figures = set(record) - common - {"coarser_than"}
        assert figures == own.get(stage, documented_figures(stage)) - common, stage


def test_failure_record():
    record = SlideFailure("no_mpp", "m").record("a", "screen").as_dict()
    assert set(record) == documented("Failures")
    assert documented("Failure codes") == set(HINTS)


def test_files_of_a_slide(results):
    folder = results / "slides" / "a"
    assert set(read(folder / "slide.json")) == documented("slide.json")
    tissue = read(folder / "tissue.json")
    assert set(tissue) == documented("tissue.json")
    assert set(tissue["qc"]) == documented("Tissue QC")
    assert set(read(folder / "stain.json")) == documented("stain.json")


def test_tile_store(results):
    import zarr
    from slidemake.tiles.quality import NAMES

    group = zarr.open_group(results / "tiles" / GRID / "a.zarr", mode="r")
    assert set(group.array_keys()) == documented("Tile store")
    assert set(group.attrs) == documented("Attributes of a tile store")
    assert set(NAMES) == documented("Quality scores")
    n = group["coords"].shape[0]
    assert n > 0
    found = {name: (array.shape, str(array.dtype)) for name, array in group.arrays()}
    assert found == {
        "pixels": ((n, 224, 224, 3), "uint8"),
        "coords": ((n, 2), "int32"),
        "tissue": ((n,), "float32"),
        "quality": ((n, 5), "float32"),
    }


def test_embedding_store(results):
    import zarr

    group = zarr.open_group(results / "embeddings" / ENCODER / "a.zarr", mode="r")
    assert set(group.array_keys()) == documented("Embedding store")
    assert set(group.attrs) == documented("Attributes of an embedding store")
    assert set(group.attrs["encoder"]) == documented("Encoder identity")


def test_cohort_table(results):
    from slidemake.cohort.table import FAILURE_COLUMNS, cohort_rows
    from slidemake.stain.stage import judgement_columns

    stages = ("screen", "tissue", "stain", "tiles", "embed")
    manifests = {stage: read(results / "manifests" / f"{stage}.json")["slides"] for stage in stages}
    manifests[f"tiles {GRID}"] = manifests.pop("tiles")
    sheet = {"slide_id": "a", "path": "slide.tiff", "patient_id": "a", "site": ""}
    target = json.loads((results / "target.json").read_text())
    (row,) = cohort_rows([sheet], manifests, results, {}, partial(judgement_columns, results, target))
    assert {name.replace(GRID, "<grid>") for name in set(row) - set(sheet)} == documented("Cohort")
    assert all(f"`{name}`" in FORMATS.read_text() for name in FAILURE_COLUMNS)


def columns(path: Path, *classes: str) -> set[str]:
    """Column names, with the classes of the task as <class>."""
    with path.open(newline="") as handle:
        names = next(csv.reader(handle))
    return {re.sub(rf"_({'|'.join(classes)})$", "_<class>", name) if classes else name for name in names}


@pytest.fixture(scope="module")
def task(results) -> Path:
    """A task of twelve patients with random features: splits, training, evaluation."""
    from slidemake.encoders.registry import identity
    from slidemake.evaluation.evaluate import evaluate
    from slidemake.mil.bags import make_bags
    from slidemake.splits.make import make_splits, write_splits
    from slidemake.training.train import train_model
    from slidemake.workflow.plan import Plan

    config = load_configuration(
        {"sheet": "s.csv", "models": {"m": {"encoder": ENCODER}}, "tasks": {"t": {"label": "y"}}}
    )
    record, known, folder = load_record(ENCODER), registry([REGISTRY]), results / "tasks" / "t"
    plan = Plan(config, [], {}, {ENCODER: record}, known, None, 16, {})
    ids = [f"{i:02d}" for i in range(12)]
    rows = [{"slide_id": i, "patient_id": i, "site": "AB"[int(i) % 2], "y": "nt"[int(i) // 2 % 2]} for i in ids]
    splits = make_splits(rows, "y", {"folds": 2})
    write_splits(splits, folder / "splits.csv", folder / "splits.json")
    features = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    bags = make_bags(features, ids, ids, [5] * 12, identity(record, "random", "fp32"))
    context = {**plan.bundle_context("t", "m"), "stain_target": json.loads((results / "target.json").read_text())}
    train_model({"label": "y"}, {"epochs": 2, "min_epochs": 1}, bags, splits, folder / "m", context)
    outputs = {name: folder / f"{name}.{end}" for name, end in (("metrics", "json"), ("curves", "json"))}
    predictions = folder / "m" / "predictions_patients.csv"
    evaluate([predictions], ["m"], "binary", {"bootstrap": 100}, table=folder / "metrics.csv", **outputs)
    return folder


def test_files_of_a_task(task):
    from slidemake.statistics.class_metrics import METRICS

    assert columns(task / "splits.csv") == documented("Splits")
    for key in read(task / "splits.json"):
        assert f"`{key}`" in FORMATS.read_text(), key
    assert columns(task / "m" / "predictions_patients.csv", "n", "t") == documented("Predictions")
    assert columns(task / "m" / "predictions_slides.csv", "n", "t") == documented("Predictions") | {"slide_id"}
    assert columns(task / "m" / "curves.csv") == documented("curves.csv")
    assert set(read(task / "m" / "train.json")) == documented("train.json")
    assert columns(task / "metrics.csv") == documented("Metrics")
    assert set(METRICS) == documented("Metric names")
    metrics = read(task / "metrics.json")
    assert set(metrics) == documented("Keys of metrics.json")
    assert all(f"`{key}`" in FORMATS.read_text() for key in metrics["models"]["m"])


def test_bundle(task):
    wanted = documented("Keys of bundle.json")
    for folder in (task / "m" / "bundle", task / "m" / "bundles" / "repeat0_fold0"):
        assert {p.name for p in folder.iterdir()} == {"bundle.json", "weights.safetensors"}
        assert set(read(folder / "bundle.json")) == wanted


def test_explanation(tmp_path):
    from slidemake.explain.explanation import explain_slide

    coords = np.array([[0, 0], [10, 0], [0, 10]])
    facts = dict.fromkeys(("place", "fingerprint", "label", "patient_id", "probability", "models"))  # of explain_stage
    explain_slide(
        tmp_path,
        slide_id="a",
        coords=coords,
        tile_level0_px=(10, 10),
        features=np.eye(3),
        attention=np.array([0.2, 0.3, 0.5]),
        leave_one_out=np.zeros(3),
        read_tiles=lambda indices: np.zeros((len(indices), 10, 10, 3), np.uint8),
        overview=np.full((40, 40, 3), 255, np.uint8),
        sx=1,
        sy=1,
        mpp=(0.5, 0.5),
        k=1,
        truth=np.zeros(3),
        facts=facts,
    )
    assert columns(tmp_path / "scores.csv") == documented("Columns of scores.csv")
    assert set(read(tmp_path / "explain.json")) == documented("Keys of explain.json")
    assert all(f"`{path.name}`" in FORMATS.read_text() for path in tmp_path.iterdir())


# -- all pages ----------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub forms them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target) or target.endswith((".png", ".jpg")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def code(page: Path) -> str:
    """Everything in backticks on a page."""
    return "\n".join(re.findall(r"```.*?^```|`[^`\n]+`", page.read_text(), re.DOTALL | re.MULTILINE))


def test_settings_that_pages_name_exist():
    """`tiling.codec`, `tiling.codec: zstd`, `models.abmil.hidden`: whatever begins with a section is a setting."""
    paths = {path for path, _ in leaves()} | {path.rpartition(".")[0] for path, _ in leaves() if "." in path}
    keys = [re.escape(path).replace("<name>", r"[\w<>]+") for path in sorted(paths)]
    sections = "|".join({path.partition(".")[0] for path, _ in leaves() if "." in path})
    for page in PAGES:
        for setting in re.findall(rf"`((?:{sections})\.[\w.<>]+)(?:: [^`]+)?`", page.read_text()):
            known = any(re.fullmatch(key, setting) for key in keys)
            assert known or setting.endswith((".json", ".csv", ".geojson", ".png", ".jpg")), f"{page.name}: {setting}"


def test_targets_that_pages_name_exist():
    smk = "".join(path.read_text() for path in [ROOT / "Snakefile", *sorted((ROOT / "rules").glob("*.smk"))])
    rules = set(re.findall(r"^ *rule (\w+):", smk, re.MULTILINE))
    made = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"\bsnakemake ([a-z_]+)\b", code(page))) <= rules, page.name
        assert set(re.findall(r"\bmake ([a-z]+)", code(page))) <= made, page.name


def test_yaml_examples_are_valid_configurations():
    """Every YAML example of the guide and the README that has a sheet loads, with the defaults filled in."""
    found = 0
    for page in PAGES:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            raw = yaml.safe_load(block)
            if "sheet" not in raw:
                continue
            raw = {key: value for key, value in raw.items() if key not in ("bundle", "encoders_file")}
            load_configuration(raw, ROOT, encoders=registry([REGISTRY]))
            found += 1
    assert found >= 2


def test_citation_names_this_version():
    from slidemake import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == "MIT"
    assert f"[{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


if __name__ == "__main__":
    for page, name, make in GENERATED:
        before, _, after = between(page.read_text(), name)
        page.write_text(before + make() + after)
        print(f"wrote {name} into {page.relative_to(ROOT)}")
