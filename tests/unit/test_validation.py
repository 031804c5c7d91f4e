"""Composed cohorts, their measures and their verdicts: `make validate` on small inputs and hand-computed cases."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from slidemake.core.failures import RunError
from slidemake.robustness.corruptions import restained

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from cohort_measures import stain_judgement
from compose import CELL, GAINS, STAINS, Recipe, compose_cohort, draw_looks, draw_recipe
from labelled_tiles import Supply, deal, is_benign_name, read_labelled_tiles
from validate import parse, validate
from validation_table import cohort_table, difference_table, mean_interval, paired, verdicts
from yardstick import Bag, scores, share_of_tiles, supervised_tiles, tile_auroc

GREEN, RED = (60, 160, 60), (160, 60, 60)  # benign and tumour: colours that survive JPEG, told apart by any model


def write_tiles(
    folder: Path, groups: int = 12, per_group: int = 2, side: int = 64, columns: tuple[str, ...] = ()
) -> Path:
    """A folder of flat tiles, `groups` of either kind; the first channel's last digits tell the group."""
    rows = []
    for label, colour in (("gut_n", GREEN), ("gut_cancer", RED)):
        for group in range(groups):
            for copy in range(per_group):
                name = f"{label}_{group:02d}_{copy}.png"
                tile = np.full((side, side, 3), colour, np.uint8) + np.uint8(group)
                folder.mkdir(exist_ok=True)
                Image.fromarray(tile).save(folder / name)
                rows.append({"path": name, "label": label, "group": f"{label}-{group}"})
    write_table(folder, rows, columns or ("path", "label", "group"))
    return folder


def write_table(folder: Path, rows: list[dict[str, str]], columns: tuple[str, ...]) -> None:
    with open(folder / "tiles.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


# -- the folder of tiles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "benign"),
    [("colon_n", True), ("NORM", True), ("Benign", True), ("non-tumour", False), ("colon_aca", False), ("TUM", False)],
)
def test_benign_labels_are_known_by_their_names(name, benign):
    assert is_benign_name(name) is benign


def test_a_folder_is_read_by_label_and_group(tmp_path):
    tiles = read_labelled_tiles(write_tiles(tmp_path / "t", groups=3))
    assert list(tiles.benign) == ["gut_n-0", "gut_n-1", "gut_n-2"]
    assert [path.name for path in tiles.tumour["gut_cancer-1"]] == ["gut_cancer_01_0.png", "gut_cancer_01_1.png"]
    assert tiles.side == 64


def test_a_folder_without_groups_is_refused_unless_told_otherwise(tmp_path):
    folder = write_tiles(tmp_path / "t", groups=3, columns=("path", "label"))
    with pytest.raises(RunError, match=r"no column 'group'.*--ungrouped"):
        read_labelled_tiles(folder)
    assert len(read_labelled_tiles(folder, ungrouped=True).benign) == 6  # every tile by itself


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("path,group\na.png,1\n", "no column 'label'"),
        ("path,label,group\na.png,gut_n,1\n", "tiles of two labels, and there is only 'gut_n'"),
        ("path,label,group\na.png,gut_n,1\nb.png,x,2\nc.png,y,3\n", "not clear from their names"),
        ("path,label,group\na.png,up,1\nb.png,down,2\n", "not clear from their names"),
        ("path,label,group\na.png,gut_n,1\nb.png,x,\n", "row 3: the cell 'group' is empty"),
        ("path,label,group\na.png,gut_n,1\nb.png,x,2\n", "could be opened"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, table, message):
    (tmp_path / "tiles.csv").write_text(table)
    with pytest.raises(RunError, match=message):
        read_labelled_tiles(tmp_path)


def test_no_table_and_unknown_labels_are_said(tmp_path):
    with pytest.raises(RunError, match="is missing"):
        read_labelled_tiles(tmp_path)
    with pytest.raises(RunError, match=r"no tile has the label 'colon'. There are: 'gut_cancer'"):
        read_labelled_tiles(write_tiles(tmp_path / "t", groups=2), benign=["colon"])


def test_several_labels_can_be_tumour(tmp_path):
    (tmp_path / "tiles.csv").write_text("path,label,group\na.png,n,1\nb.png,x,2\nc.png,y,3\nd.png,z,4\n")
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    tiles = read_labelled_tiles(tmp_path, tumour=["x", "z"])
    assert set(tiles.tumour) == {"2", "4"}
    assert set(tiles.benign) == {"1"}


def test_a_group_of_both_kinds_serves_one_of_them(tmp_path):
    (tmp_path / "tiles.csv").write_text("path,label,group\na.png,n,1\nb.png,x,1\nc.png,n,2\nd.png,n,3\n")
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    tiles = read_labelled_tiles(tmp_path)
    assert set(tiles.tumour) == {"1"}
    assert set(tiles.benign) == {"2", "3"}


def test_no_group_is_dealt_to_two_patients(tmp_path):
    tiles = read_labelled_tiles(write_tiles(tmp_path / "t", groups=13))
    labels = [0, 1] * 6
    dealt = deal(tiles, labels, np.random.default_rng(0))
    for kind, expected in ((0, 12), (1, 6)):
        groups = [{path.name.rsplit("_", 1)[0] for path in patient[kind]} for patient in dealt]
        assert sum(bool(own) for own in groups) == expected
        assert len(set().union(*groups)) == sum(map(len, groups)) == 13  # all used, none twice
    assert [bool(tumour) for _, tumour in dealt] == [bool(label) for label in labels]
    with pytest.raises(RunError, match=r"28 patients need 28 groups of benign tiles, and there are 13. Up to 13"):
        deal(tiles, [0, 1] * 14, np.random.default_rng(0))


def test_unreadable_tiles_are_passed_over_and_named(tmp_path):
    Image.new("RGB", (64, 64), GREEN).save(tmp_path / "good.png")
    Image.new("RGB", (20, 64), GREEN).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    paths = [tmp_path / name for name in ("good.png", "small.png", "text.png", "cut.png", "absent.png")]
    supply = Supply(paths, 64, np.random.default_rng(0))
    for _ in range(8):
        assert supply.take().shape == (64, 64, 3)
    assert supply.given == {tmp_path / "good.png"}
    assert set(supply.spoilt) == set(paths[1:])
    with pytest.raises(RunError, match="none of the 4 tiles of a composed patient can be read"):
        Supply(paths[1:], 64, np.random.default_rng(0)).take()


# -- composing ----------------------------------------------------------------------------------------------------


def test_recipes_are_drawn_by_seed_and_cover_all_stains():
    drawn = [draw_recipe(5, number) for number in range(len(STAINS))]
    assert drawn == [draw_recipe(5, number) for number in range(len(STAINS))]
    assert {recipe.stain for recipe in drawn} == set(STAINS)
    assert drawn != [draw_recipe(6, number) for number in range(len(STAINS))]
    fixed = draw_recipe(5, 0, 20, stain="pale", focus=(0.1, 0.2), sites=3)
    assert (fixed.patients, fixed.stain, fixed.focus, fixed.sites) == (20, "pale", (0.1, 0.2), 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"focus": (0.2, 0.1)}, "focus"),
        ({"jitter": 1.5}, "jitter"),
        ({"sites": 0}, "sites"),
        ({"across": 1}, "across"),
        ({"confound": 2.0}, "confound"),
    ],
)
def test_a_recipe_that_makes_no_cohort_is_refused(given, message):
    with pytest.raises(RunError, match=message):
        draw_recipe(0, 0, **given)
    with pytest.raises(RunError, match="at least 10"):
        draw_recipe(0, 0, patients=4)


def test_restaining_multiplies_optical_densities():
    """A pixel of pure haematoxylin (Ruifrok and Johnston's vector) of density 0.5 becomes one of density 1."""
    vector = np.array([0.65, 0.70, 0.29])
    pixel = lambda density: np.rint(256 * np.exp(-density * vector) - 1).astype(np.uint8)[None, None]  # noqa: E731
    assert np.abs(restained(pixel(0.5), 2.0, 1.0).astype(int) - pixel(1.0)).max() <= 2
    grey = np.full((1, 1, 3), 255, np.uint8)
    assert np.array_equal(restained(grey, 2.0, 1.0), grey)
    noise = np.random.default_rng(0).integers(20, 250, (9, 9, 3)).astype(np.uint8)
    assert np.abs(restained(noise, 1.0, 1.0).astype(int) - noise).max() <= 1


def test_stains_by_site_are_those_of_the_site():
    recipe = Recipe(stain="sites", sites=3, jitter=0.0)
    looks = draw_looks(recipe, [0, 1, 2, 0, 1, 2], np.random.default_rng(0))
    assert looks[:3] == looks[3:]
    assert len({(look.haematoxylin, look.eosin) for look in looks}) == 3
    mixed = draw_looks(Recipe(stain="mixed", sites=1, jitter=0.0), [0] * 40, np.random.default_rng(0))
    assert len({(look.haematoxylin, look.eosin) for look in mixed}) == len(GAINS)


@pytest.fixture(scope="module")
def composed(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("composed")
    tiles = read_labelled_tiles(write_tiles(folder / "tiles"))
    recipe = Recipe(patients=10, across=3, sites=2, stain="as-is", jitter=0.0, focus=(0.15, 0.3))
    return folder, compose_cohort(folder / "c", tiles, recipe, [0, 0])


def test_composed_slides_are_what_their_truth_says(composed):
    """Green is benign, red is tumour: the masks are compared with the colours of the pixels."""
    import openslide

    folder, records = composed
    for record in records[:4]:
        with openslide.OpenSlide(folder / "c" / "slides" / f"{record['slide_id']}.tiff") as slide:
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-3)
            rgb = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(int)
        masks = [
            np.kron(np.asarray(Image.open(folder / "c" / "slides" / "truth" / f"{record['slide_id']}_{k}16.png")) > 0,
                    np.ones((CELL, CELL), bool))
            for k in ("tissue", "tumour")
        ]  # fmt: skip
        red, green = rgb[..., 0] > rgb[..., 1] + 40, rgb[..., 1] > rgb[..., 0] + 40
        assert ((red | green) == masks[0]).mean() > 0.99
        assert (red == masks[1]).mean() > 0.98  # tiles do not end at cells of the mask
        assert bool(red.sum() > 1000) == bool(record["tumour_fraction"])


def test_composing_is_reproducible_and_keeps_what_is_there(composed, tmp_path):
    folder, records = composed
    tiles = read_labelled_tiles(folder / "tiles")
    recipe = Recipe(patients=10, across=3, sites=2, stain="as-is", jitter=0.0, focus=(0.15, 0.3))
    again = compose_cohort(tmp_path / "c", tiles, recipe, [0, 0])
    assert again == records
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*.*")}
    (tmp_path / "c" / "slides" / "P003.tiff").write_bytes(b"damaged")
    assert compose_cohort(tmp_path / "c", tiles, recipe, [0, 0]) == records
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert {name for name in changed if "P003" not in name} == set()
    assert "P003.tiff" in changed


def test_label_and_site_are_independent_unless_confounded(composed):
    folder, _ = composed
    rows = list(csv.DictReader((folder / "c" / "slides.csv").open()))
    seen = {(row["site"], row["label"]) for row in rows}
    assert len(seen) == 4
    assert [row["label"] for row in rows].count("tumour") == 5


def test_a_folder_of_mostly_unreadable_tiles_is_refused(tmp_path):
    folder = write_tiles(tmp_path / "t", per_group=3)
    for path in folder.glob("*_[12].png"):
        path.write_bytes(path.read_bytes()[:50])
    recipe = Recipe(patients=10, across=3, sites=1, stain="as-is", jitter=0.0)
    with pytest.raises(RunError, match=r"of \d+ tiles cannot be read"):
        compose_cohort(tmp_path / "c", read_labelled_tiles(folder), recipe, [0, 0])


# -- measures -----------------------------------------------------------------------------------------------------


def bags(count: int = 24, signal: float = 3.0) -> list[Bag]:
    """Ten tiles of eight numbers a patient; one tile of each positive patient is shifted."""
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        x, tumour = rng.normal(size=(10, 8)).astype(np.float32), np.zeros(10)
        if number % 2:
            x[number % 10] += signal
            tumour[number % 10] = 1.0
        found.append(Bag(f"P{number}", x, tumour, number % 2))
    return found


FOLDS = {f"P{number}": number // 2 % 4 for number in range(24)}


def test_the_yardstick_learns_what_is_there_and_nothing_else():
    auroc, attention = scores(bags(signal=4.0), [FOLDS])
    assert auroc > 0.9
    assert attention > 0.9
    assert supervised_tiles(bags(signal=4.0), FOLDS) > 0.99
    without, _ = scores(bags(signal=0.0), [FOLDS])
    assert 0.15 < without < 0.85
    assert supervised_tiles([Bag(b.name, b.features, 0 * b.tumour, b.label) for b in bags()], FOLDS) is None


def test_share_of_tiles_against_pixels():
    rng = np.random.default_rng(0)
    mask = rng.random((20, 30)) > 0.5
    coords = np.array([(0, 0), (16, 32), (416, 256)])
    expected = [np.kron(mask, np.ones((16, 16)))[y : y + 64, x : x + 64].mean() for x, y in coords]
    assert share_of_tiles(mask, coords, 64, 16) == pytest.approx(expected)
    assert tile_auroc(np.array([0, 1, 1, 0]), np.array([0.1, 0.4, 0.2, 0.3])) == roc_auc_score(
        [0, 1, 1, 0], [1, 4, 2, 3]
    )
    assert tile_auroc(np.zeros(3), np.arange(3)) is None


def test_stain_judgements_are_counted(tmp_path):
    (tmp_path / "cohort").mkdir()
    table = tmp_path / "cohort" / "slides.csv"
    table.write_text(
        "slide_id,status,stain_applied,stain_reason\na,ok,both,\nb,ok,none,maxima glass\nc,failed,,\nd,ok,eosin,x\n"
    )
    assert stain_judgement(tmp_path) == {"normalised": {"both": 1, "eosin": 1}, "left": {"maxima glass": 1}}
    table.write_text("slide_id,status\na,ok\nb,failed\n")
    assert stain_judgement(tmp_path) == {"normalised": {}, "left": {"not asked for": 1}}


def test_the_interval_of_a_mean_is_students():
    """0.7, 0.8, 0.9: mean 0.8, SD 0.1, t(0.975, 2) = 4.303, so 0.8 +- 4.303 * 0.1 / sqrt(3) = 0.2484."""
    mean, low, high = mean_interval([0.7, None, 0.8, 0.9])
    assert (mean, low, high) == pytest.approx((0.8, 0.8 - 0.2484, 0.8 + 0.2484), abs=1e-4)
    assert mean_interval([None]) is None
    assert mean_interval([0.5])[1:] == (-math.inf, math.inf)
    assert paired([0.9, 0.8, None], [0.7, 0.7, 0.1])[0] == pytest.approx(0.15)


def figures(name: str, auroc: float, plain: float, **other: object) -> dict:
    return {
        "name": name,
        "models": ["ours"],
        "auroc": {"ours": auroc, "mean_pool_lr": 0.6, "shuffled_label": 0.5, "prevalence": 0.5},
        "plain": plain,
        "plain_attention": None,
        "tiles_supervised": 0.95,
        "attention": 0.9,
        "mask_iou": 0.93,
        "stain": {"normalised": {"both": 20}, "left": {"single_stain": 10}},
        "failed": {},
        **other,
    }


def test_tables_have_a_row_per_cohort_and_the_mean():
    text = cohort_table([figures("1-0", 0.9, 0.8), figures("1-1", 0.8, 0.8, failed={"no_tissue": 2})])
    head, _, first, second, mean = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    assert head[:3] == ["cohort", "ours", "mean_pool_lr"]
    assert "prevalence" not in head
    assert first[head.index("ours")] == "0.90"
    assert first[head.index("stain")] == "20 both, 10 left (single_stain)"
    assert second[head.index("failed")] == "2 no_tissue"
    assert mean[1].startswith("0.85 (")
    differences = difference_table([figures("1-0", 0.9, 0.8), figures("1-1", 0.8, 0.8)])
    assert "| plain ABMIL | +0.05 (-0.59 to +0.69) |" in differences  # t(0.975, 1) = 12.706; 12.706 * 0.05 = 0.635


def test_checks_fail_where_all_of_the_interval_is_on_the_wrong_side():
    good = [figures(str(i), 0.85 + i / 100, 0.8) for i in range(4)]
    assert all(passed for passed, _ in verdicts(good))
    for changed, word in (
        ({"plain": 0.99}, "plain ABMIL"),
        ({"attention": 0.3}, "looks at the tumour"),
        ({"mask_iou": 0.5}, "IoU"),
        ({"auroc": {"ours": 0.9, "shuffled_label": 0.8}}, "shuffled labels"),
    ):
        bad = [cohort | changed for cohort in good]
        failed = [text for passed, text in verdicts(bad) if not passed]
        assert len(failed) == 1, (changed, failed)
        assert word in failed[0]
    before = {cohort["name"]: figures(cohort["name"], 0.99, 0.8) for cohort in good}
    assert next(text for passed, text in verdicts(good, before) if not passed).startswith("no worse than before: -0.1")
    assert all(passed for passed, _ in verdicts(good, {c["name"]: c for c in good}))
    unclear = [figures(str(i), 0.8, plain) for i, plain in enumerate((0.7, 0.95))]
    assert all(passed for passed, _ in verdicts(unclear))  # two cohorts that disagree prove nothing


def test_tiles_that_are_too_coarse_are_refused_before_anything_is_composed(tmp_path):
    folder = write_tiles(tmp_path / "t", groups=2)
    with pytest.raises(RunError, match="not enlarged"):
        validate(parse(["--tiles", str(folder), "--mpp", "1.0", "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()
