"""Explaining the slides of a rack with the models that never saw their patients.

A slide's attention is the mean over repeats of the attention that the fold's model (the one whose training left the
patient out) gives to the tiles of the slide; leave-one-tile-out likewise, as the change of the log-odds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from slidemake.core.addresses import truth_file
from slidemake.core.bundle_place import check_unseen
from slidemake.core.failures import damaged
from slidemake.core.files import (
    committed,
    file_sha256,
    files_are_whole,
    fingerprint,
    placed,
    read_json_if_whole,
    read_slide_record,
)
from slidemake.explain.explanation import explain_slide, tile_truth
from slidemake.explain.imported import ImportedTiles
from slidemake.jobs import isolation
from slidemake.mil.bags import open_embeddings
from slidemake.mil.bundle import Bundle, bundle_leave_one_out, check_features, load_bundle, predict
from slidemake.mil.places import grid_cells
from slidemake.slides.screening import OVERVIEW
from slidemake.splits.make import TRAIN, VAL, Splits
from slidemake.stores.tile_store import TileStore

if TYPE_CHECKING:
    from slidemake.slides.reader import SlideReader


class Explainer:
    """Explains slides of one task and model; fold bundles are loaded once each."""

    def __init__(
        self,
        results: Path,
        encoder: str,
        folder: Path,
        splits: Splits,
        options: dict[str, Any],
        out: Path,
        fetch: Callable[[str, Path], Path] | None = None,
    ):
        """`fetch` gets a slide that is not kept on the disk into a folder, and returns its path there."""
        self.results, self.encoder, self.folder, self.out = results, encoder, folder, out
        self.fetch = fetch
        self.splits, self.options = splits, options
        self.bundle = lru_cache(maxsize=64)(self._load)

    def _load(self, repeat: int, fold: str) -> Bundle:
        return load_bundle(self.folder / "bundles" / f"repeat{repeat}_fold{fold}", of_run=True)

    def wanted(self, row: dict[str, str], positive: str | None) -> bool:
        """Whether the options ask for this slide: its patient was tested, and is positive if only those are."""
        label = self.splits.labels.get(row["patient_id"])
        return label is not None and (self.options["slides"] == "all" or positive is None or label == positive)

    def process(self, record: dict[str, Any], row: dict[str, str]) -> dict[str, Any]:
        """Explain one slide of the embedding stage's `record`; `row` is its row of cohort/slides.csv."""
        slide_id, patient = row["slide_id"], row["patient_id"]
        out = self.out / slide_id
        bundles = self._bundles(patient)
        mask_file = self._truth(row)
        print_ = fingerprint(
            "explain",
            embeddings=record["fingerprint"],
            bundles=[bundle.info["fingerprint"] for bundle in bundles],
            options=self.options,
            truth=file_sha256(mask_file) if mask_file is not None else None,
        )
        described = read_json_if_whole(out / "explain.json")
        if described and described.get("fingerprint") == print_ and files_are_whole(out, described):
            same = {key: described.get(key) for key in ("tile_auroc", "tiles")}
            return {"fingerprint": print_, "reused": True, **same}
        stored = self.results / "embeddings" / self.encoder / f"{slide_id}.zarr"
        stored_features, attrs = open_embeddings(stored)
        if attrs.get("fingerprint") != record["fingerprint"]:
            raise damaged(stored, f"is not the store that the embedding stage made of slide {slide_id}")
        features = stored_features.read().astype(np.float32)
        store: TileStore | ImportedTiles
        if attrs.get("imported"):
            store = ImportedTiles(stored, attrs)
        else:
            store = TileStore(self.results / "tiles" / attrs["grid"] / f"{slide_id}.zarr")
        places = grid_cells(store.coords, store.attrs["tile_level0_px"])
        attention, change, probability = self._scores(bundles, features, places, attrs, row)
        truth = None
        if mask_file is not None:
            mask = np.asarray(Image.open(mask_file).convert("L")) > 127
            slide = read_slide_record(self.results / "slides" / slide_id, "slide.json")
            if slide.get("width"):
                truth = tile_truth(mask, store.coords, store.attrs["tile_level0_px"], slide["width"] / mask.shape[1])
        described = self._write(
            out,
            row,
            store,
            features,
            attention,
            change,
            truth,
            {
                **placed(out / "explain.json"),
                "fingerprint": print_,
                "label": self.splits.labels[patient],
                "patient_id": patient,
                "probability": probability,
                "models": len(bundles),
            },
        )
        return {"fingerprint": print_, "tile_auroc": described.get("tile_auroc"), "tiles": len(store)}

    def _bundles(self, patient: str) -> list[Bundle]:
        folds = ((repeat, of[patient]) for repeat, of in sorted(self.splits.folds.items()))
        tested = [(repeat, fold) for repeat, fold in folds if fold not in (TRAIN, VAL)]
        for repeat, fold in tested:
            check_unseen([patient], self.bundle(repeat, fold).info, f"the model of repeat {repeat}, fold {fold}")
        return [self.bundle(repeat, fold) for repeat, fold in tested]

    def _scores(
        self,
        bundles: list[Bundle],
        features: np.ndarray,
        places: np.ndarray,
        attrs: dict[str, Any],
        row: dict[str, str],
    ) -> tuple[np.ndarray, np.ndarray, float | None]:
        if not len(features) or not bundles:
            empty = np.zeros(len(features))
            return empty, empty, None
        attention, change, probability = [], [], []
        for bundle in bundles:
            check_features(bundle.info, attrs["encoder"], attrs["stain"], row["slide_id"])
            domain = row.get(bundle.domain or "", "")
            with isolation.unhurried():
                prediction = predict(bundle, features, None, [domain], places)
                change.append(bundle_leave_one_out(bundle, features, domain, places))
            attention.append(prediction.attention)
            probability.append(bundle.outcome.headline(prediction.values))
        return np.mean(attention, axis=0), np.mean(change, axis=0), float(np.mean(probability))

    def _truth(self, row: dict[str, str]) -> Path | None:
        """Mask of annotated tumour for a slide, where the options say how its file is called and it exists."""
        pattern = self.options.get("truth")
        if not pattern:
            return None
        slide = read_slide_record(self.results / "slides" / row["slide_id"], "slide.json")
        if not slide.get("path"):
            return None
        path = Path(truth_file(pattern, slide["path"], row["slide_id"]))
        return path if path.exists() else None

    def _write(
        self,
        out: Path,
        row: dict[str, str],
        store: TileStore | ImportedTiles,
        features: np.ndarray,
        attention: np.ndarray,
        change: np.ndarray,
        truth: np.ndarray | None,
        facts: dict[str, Any],
    ) -> dict[str, Any]:
        from slidemake.embedding.engine import read_selected

        slide = read_slide_record(self.results / "slides" / row["slide_id"], "slide.json")
        # a folder at a time: a twin of this job must never find the files of one and the record of the other
        with self._opened(slide, store) as (overview, sx, sy, reader), committed(out) as work:
            return explain_slide(
                work,
                slide_id=row["slide_id"],
                coords=store.coords,
                tile_level0_px=tuple(store.attrs["tile_level0_px"]),
                features=features,
                attention=attention,
                leave_one_out=change,
                read_tiles=None if isinstance(store, ImportedTiles) else partial(read_selected, store, slide, reader),
                overview=overview,
                sx=sx,
                sy=sy,
                mpp=store.mpp if isinstance(store, ImportedTiles) else tuple(slide["mpp_xy"]),
                k=self.options["top_tiles"],
                truth=truth,
                facts=facts,
            )

    @contextmanager
    def _opened(
        self, slide: dict[str, Any], store: TileStore | ImportedTiles
    ) -> Iterator[tuple[np.ndarray, float, float, SlideReader | None]]:
        """Overview, level-0 px per px of it in x and y, and the open slide: None where it is not on the disk and not
        needed either, because screening kept an overview and the store has the tiles."""
        from slidemake.slides.opening import open_screened

        if isinstance(store, ImportedTiles) and slide.get("status") == "absent":
            yield *store.paper(OVERVIEW), None
            return
        if not slide.get("remote"):
            with open_screened(slide) as reader:
                yield *reader.overview_of(OVERVIEW), reader
            return
        with Image.open(self.results / "slides" / slide["slide_id"] / "overview.jpg") as picture:
            overview = np.asarray(picture.convert("RGB"))
        height, width = overview.shape[:2]
        scales = slide["width"] / width, slide["height"] / height
        if store.has_pixels or self.fetch is None:
            yield overview, *scales, None
            return
        (self.results / "fetched").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.results / "fetched") as folder:
            path = self.fetch(slide["slide_id"], Path(folder))
            with open_screened(slide, path) as reader:
                yield overview, *scales, reader
