"""Ways of keeping tiles: the same coordinates, and the same features to within what was lost in keeping them."""

from __future__ import annotations

import numpy as np
import pytest
from snakemake_run import GRID, Project, cosine, embedding

pytestmark = pytest.mark.workflow
SLIDES = 3


def embeddings(project: Project) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{slide: (features, coords)} of every embedded slide."""
    stores = [row["slide_id"] for row in project.rows()[:SLIDES]]
    return {slide: embedding(project, slide)[:2] for slide in stores}


def with_tiling(finished: Project, folder, **tiling: object) -> Project:
    """A copy of the finished run, with the first slides only, tiled and embedded once more in another way."""
    project = finished.copy(folder)
    project.write_sheet(project.rows()[:SLIDES])
    project.configure(tiling=tiling, tasks=None)
    project.succeed("embeddings")
    assert not any(record.get("reused") for record in project.manifest("embed/efficientnet_lite0"))
    return project


@pytest.fixture(scope="module")
def coords_only(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return with_tiling(finished, tmp_path_factory.mktemp("stores") / "coords", store="coords")


def compare(a: Project, b: Project) -> np.ndarray:
    """Cosines of all tiles of two runs that must agree on slides and coordinates."""
    mine, other = embeddings(a), embeddings(b)
    assert len(mine) == len(other) == SLIDES
    for slide in mine:
        assert np.array_equal(mine[slide][1], other[slide][1]), slide
    return np.concatenate([cosine(mine[slide][0], other[slide][0]) for slide in mine])


def test_store_of_coordinates_gives_the_features_of_stored_pixels(finished: Project, coords_only: Project):
    assert not list((coords_only.results / "tiles" / GRID).glob("P01-A.zarr/pixels"))
    assert list((finished.results / "tiles" / GRID).glob("*.zarr/pixels"))
    similar = compare(finished, coords_only)  # what JPEG at quality 90 costs
    assert np.mean(similar) > 0.99
    assert similar.min() > 0.97


def test_lossless_store_gives_the_features_of_the_slide(finished: Project, coords_only: Project, tmp_path):
    lossless = with_tiling(finished, tmp_path / "zstd", codec="zstd")
    compare(lossless, coords_only)
    for slide, (features, _) in embeddings(lossless).items():
        read, _ = embedding(coords_only, slide)[:2]
        assert np.linalg.norm(features - read) <= 1e-3 * np.linalg.norm(read), slide


def test_normalised_pixels_give_the_features_of_scanned_ones(finished: Project, tmp_path):
    """Normalising before storing rounds and compresses once more; it must be the same colour all the same."""
    normalised = with_tiling(finished, tmp_path / "normalised", pixels="normalised")
    similar = compare(finished, normalised)
    assert np.median(similar) > 0.98
    assert similar.min() > 0.95
    before, after = (project.results / "tiles" / GRID for project in (finished, normalised))
    assert (before / "P01-A.zarr/pixels/c/0/0/0/0").read_bytes() != (after / "P01-A.zarr/pixels/c/0/0/0/0").read_bytes()
