"""What `changes.py` draws from: settings, sheets, files, what is damaged, where runs are killed, how sequences end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cohort import EXCEPT_FILES
from snakemake_run import CONFIG, GRID

ENCODER = "toy"
SMALL = {**CONFIG["models"]["abmil"], "encoder": ENCODER}
# What may be set to what; the first is what the sequence starts from.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "model": [{"models": {"abmil": {"hidden": 16}}}, {"models": {"abmil": {"hidden": 24}}}],
    "tissue": [{"tissue": {"focus_samples": 8}}, {"tissue": {"focus_samples": 6}}],
    "stain": [{"stain": {"method": "macenko"}}, {"stain": {"method": "reinhard"}}],
    "tiles": [{"tiling": {"min_tissue": 0.5}}, {"tiling": {"min_tissue": 0.7}}],
    "evaluation": [{"evaluation": {"bootstrap": 100}}, {"evaluation": {"bootstrap": 120}}],
    "explain": [{"explain": {"top_tiles": 3}}, {"explain": {"top_tiles": 2}}],
    "sweep": [{"sweeps": None}, {"sweeps": {"rates": {**SMALL, "learning_rate": [1e-3, 1e-4]}}}],
    "background": [{"background": {"tiles": 0}}, {"background": {"tiles": 2}}],
    "stress": [{"stress": {"tiles": 0}}, {"stress": {"tiles": 2}}],
    "bundle": [{"bundle": None}, {"bundle": "bundle"}],
}
FILES = {"slide": "slides/P03-A.tiff", "mask": "slides/truth/P01-A_tumour16.png", "weights": "toy.pt"}
# The rule in which a run is killed, and what is changed before so that the rule has to do something.
KILLED_IN: dict[str, str] = {
    **{"fetch_slides": "delete slides/P04-A", "screen_slides": "delete slides", "detect_tissue": "tissue"},
    **{"fit_stain": "stain", "make_stain_target": "stain", "tile_slides": "tiles", "embed_tiles": "weights"},
    **{"cohort_table": "sheet", "pack_bags": "tiles", "split_cohort": "sheet", "train_aggregator": "sweep"},
    **{"probe_shortcuts": "weights", "describe_training": "model", "explain_slides": "mask", "evaluate": "evaluation"},
    **{"compare_models": "sweep", "embed_background": "background", "stress_test": "stress", "write_report": "explain"},
    **{"predict_slides": "bundle", "watch_drift": "bundle"},
}
WORKED = 0.4  # s, at most, of the job that is killed
REMOTE = "P04-A"  # the slide that is fetched
SHEETS = ("as it was", "labels", "excluded", "shorter")
FINAL = (  # states that a sequence may end with
    {},
    {"sheet": "labels"},
    {"model": 1, "slide": 1},
    {"tissue": 1, "mask": 1},
    {"tiles": 1, "sheet": "excluded"},
    {"evaluation": 1, "explain": 1, "sheet": "shorter"},
    {"sweep": 1, "weights": 1},
    {"background": 1, "stress": 1},
    {"bundle": 1, "mask": 1},
)
NOT_COMPARED = (*EXCEPT_FILES, "digests/", "plan.json", "slidemake.json", ".snakemake")
DELETABLE = (
    *("manifests/screen/r00000.json", "manifests/tissue/r00001.json", f"manifests/tiles/{GRID}/r00000.json"),
    *(f"manifests/embed/{ENCODER}/r00001.json", "manifests/explain/tumour/abmil/r00000.json", "plan.json", "digests"),
    *("cohort/slides.csv", "cohort/passed.json", "cohort/stain_target.json", f"cohort/bags/{ENCODER}.npy"),
    *("tasks/tumour/splits.csv", "tasks/tumour/abmil/train.json", "tasks/tumour/abmil/bundle", "report/index.html"),
    *("tasks/tumour/metrics.json", "tasks/tumour/site_only/predictions_patients.csv", "slides/P04-A/tissue.json"),
    *(f"tiles/{GRID}/P01-A.zarr", f"embeddings/{ENCODER}/P03-A.zarr", "slides/P01-A", "explain/tumour/abmil/P02-A"),
    *("digests/cohort/slides.csv.json", "tasks/tumour/abmil/bundles/repeat0_fold0", "manifests", "slides", "tasks"),
)
OVERWRITTEN = (
    *("cohort/slides.csv", "cohort/failures.csv", "tasks/tumour/splits.csv", "tasks/tumour/metrics.csv"),
    *("tasks/tumour/abmil/predictions_patients.csv", "manifests/tissue/r00000.json", "cohort/stain_target.json"),
    *("tasks/tumour/comparison.json", "digests/tasks/tumour/splits.csv.json", "plan.json"),
)
STEPS = {
    **{"setting": 4, "sheet": 2, "file": 2, "delete": 3, "overwrite": 1, "forget": 1, "times": 1},
    **{"run": 1, "killed run": 6, "part": 1},
}
