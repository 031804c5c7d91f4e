"""The stages of a run, one record each: number, name, the settings it depends on, what it leaves of a slide.

A stage's number is a part of every digest and fingerprint: it is raised when the same input gives another output.
"""

from __future__ import annotations

from dataclasses import dataclass

_EVALUATED = (
    *("bootstrap", "seed", "ece_bins", "level", "stratify", "specificity", "abstention_alpha", "prevalence"),
    *("subgroups", "subgroup_patients", "subgroup_class"),
)


@dataclass(frozen=True)
class Stage:
    """section, keys: the part of the configuration that its results depend on; keys None: all of the section.

    artefact: what its manifest vouches for of each slide, below the results folder; {where} is the grid, the encoder,
    or task/model. title: what the report calls it where it tells how long stages took.
    """

    name: str
    version: int
    section: str | None = None
    keys: tuple[str, ...] | None = None
    artefact: str | None = None
    title: str | None = None


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("demo", 2),
        Stage("fetch", 1),
        Stage("screen", 4, "screening", ("default_mpp", "reader"), "slides/{slide}/slide.json", "screening"),
        Stage("tissue", 6, "tissue", None, "slides/{slide}/tissue.json", "tissue detection"),
        Stage(
            *("stain", 2, "stain", ("method", "target", "white_point", "max_pixels")),
            *("slides/{slide}/stain.json", "stain fit"),
        ),
        Stage("tiles", 4, "tiling", None, "tiles/{where}/{slide}.zarr", "tiling"),
        Stage("embed", 3, "embedding", None, "embeddings/{where}/{slide}.zarr", "embedding"),
        Stage(
            *("import", 1, "features", ("format", "mapping", "tile_px", "mpp", "dim")),
            *("embeddings/{where}/{slide}.zarr", "import of features"),
        ),
        Stage("bags", 3),
        Stage("splits", 3),
        Stage("train", 12, "models"),
        Stage("evaluate", 11, "evaluation", _EVALUATED),
        Stage("compare", 2),
        Stage("background", 1, "background", None, "slides/{slide}/background_{where}.json"),
        Stage("stress", 3, "stress"),
        Stage("explain", 2, "explain", ("slides", "truth", "top_tiles"), "explain/{where}/{slide}", "explanation"),
        Stage("predict", 2),
        Stage("drift", 3),
        Stage("report", 4, "report"),
        Stage("export", 1, "export"),
    )
}
STAGE_VERSIONS: dict[str, int] = {name: stage.version for name, stage in STAGES.items()}
ARTEFACTS: dict[str, str] = {name: stage.artefact for name, stage in STAGES.items() if stage.artefact}
