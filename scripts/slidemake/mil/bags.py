"""Bags: the embeddings of a cohort, packed so that a patient's tiles lie together.

One array (T, D) holds all tiles, ordered by patient, then slide; offsets say where each slide begins. A cohort is
packed once, into a NumPy file with an index beside it that all its training jobs share: small ones are read into memory
as float32, large ones stay on disk in the stores' own type, so that memory does not grow with the cohort. No torch.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError, SlideFailure, damaged
from slidemake.core.files import check_file, check_place, committed, file_sums, placed, read_json, write_json
from slidemake.mil.places import beside_each_other, grid_cells
from slidemake.stores.arrays import StoredArray
from slidemake.stores.integrity import check_store

IN_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Bags:
    """Embeddings of a cohort. Slides are ordered by patient, then id; slide s has tiles offsets[s] to offsets[s +
    1].
    """

    features: np.ndarray  # (T, D) float32, or float16 when mapped from disk
    slides: tuple[str, ...]
    patients: tuple[str, ...]  # of each slide
    offsets: np.ndarray  # (S + 1,) int64
    encoder: dict[str, Any]
    stain: dict[str, Any]  # method and target
    grid: str
    mpp: float | None
    fingerprints: dict[str, str]  # slide -> fingerprint of its store
    where: dict[str, tuple[int, int]]  # patient -> (first slide, one past the last)
    domains: dict[str, str] = field(default_factory=dict)  # slide -> its scanner or site, where a model asks for it
    cells: np.ndarray | None = None  # (T, 2) int32 row and column of each tile, a patient's slides side by side

    @property
    def dim(self) -> int:
        return int(self.features.shape[1])

    def slide(self, index: int) -> np.ndarray:
        """(N, D) features of one slide, a view."""
        return self.features[self.offsets[index] : self.offsets[index + 1]]

    def bag(self, patient: str) -> np.ndarray:
        """(N, D) features of all slides of a patient, a view; N = 0 for a patient without tiles or without slides."""
        start, stop = self.rows(patient)
        return self.features[start:stop]

    def places(self, patient: str) -> np.ndarray | None:
        """(N, 2) row and column of each of a patient's tiles; None where nothing is known of them."""
        return None if self.cells is None else self.cells[slice(*self.rows(patient))]

    def rows(self, patient: str) -> tuple[int, int]:
        """First row of a patient's tiles in `features`, and one past the last."""
        first, last = self.where.get(patient, (0, 0))
        return int(self.offsets[first]), int(self.offsets[last])

    def sizes(self, patient: str) -> list[int]:
        """Number of tiles of each of a patient's slides."""
        first, last = self.where.get(patient, (0, 0))
        return np.diff(self.offsets[first : last + 1]).tolist()

    def slide_of(self, rows: np.ndarray) -> np.ndarray:
        """Index of the slide of each row of `features`."""
        return np.searchsorted(self.offsets, rows, side="right") - 1

    def of_patients(self, patients: Iterable[str]) -> Bags:
        """The same array for some of the patients; those without slides are left out."""
        return replace(self, where={p: self.where[p] for p in patients if p in self.where})

    def with_domains(self, domains: Mapping[str, str]) -> Bags:
        """The same with a scanner or site for each slide."""
        return replace(self, domains=dict(domains))

    def forget(self) -> None:
        """Give back the pages of a mapped file that were touched: otherwise they count as this process's memory until
        the system needs them for something else."""
        mapping = getattr(self.features, "base", None)
        if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)

    def tiles(self, patient: str) -> int:
        start, stop = self.rows(patient)
        return stop - start


def same_encoder(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between two encoder identities, in words; empty when their features are interchangeable.

    The version of timm is kept for provenance and not compared: the weights and the transform are hashed.
    """
    keys = sorted((set(first) | set(second)) - {"timm"})
    return [f"{k}: {first.get(k)!r} and {second.get(k)!r}" for k in keys if first.get(k) != second.get(k)]


def stain_identity(stain: Mapping[str, Any] | None) -> dict[str, Any]:
    """Method and target of a store's stain attributes: what the slides of a cohort share (the fit is the slide's
    own).
    """
    stain = stain or {}
    return {"method": stain.get("method") or "none", "target": stain.get("target")}


def open_embeddings(path: str | Path) -> tuple[StoredArray, dict[str, Any]]:
    """The features array (N, D) of an embedding store, not yet read, and its attributes.

    RunError when it is none, SlideFailure `damaged` when it is not as it was written.
    """
    check_store(path)
    try:
        features = StoredArray(path, "features")
        attrs = read_json(Path(path) / "zarr.json")["attributes"]
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} is not an embedding store ({error}); run the embed_tiles rule for this slide."
        ) from error
    if attrs.get("format") != "slidemake-embeddings":
        raise RunError(f"{path} has format {attrs.get('format')!r}, not slidemake-embeddings.")
    if attrs.get("slide_id", Path(path).stem) != Path(path).stem:
        raise damaged(path, f"is of slide {attrs['slide_id']}")
    return features, attrs


def load_bags(folder: str | Path, slides: Iterable[tuple[str, str]]) -> Bags:
    """Load the stores `folder/{slide_id}.zarr` of (slide_id, patient_id) pairs into memory, as float32.

    RunError when stores differ in encoder, stain method, stain target or grid: an aggregator trained on a mixture would
    learn the mixture.
    """
    cohort = _Cohort.open(folder, slides)
    features = np.empty(cohort.shape, np.float32)
    np.concatenate(list(cohort.values()), out=features)
    return make_bags(features, cohort.slides, cohort.patients, cohort.sizes, **cohort.about(), cells=cohort.cells())


def pack_bags(
    folder: str | Path,
    slides: Iterable[tuple[str, str]],
    path: str | Path,
    wanted: Mapping[str, str] | None = None,
) -> None:
    """Pack the stores as `load_bags` would into the NumPy file `path`, in the stores' type, with an index beside it.

    The index (`.json`) is written last and names the arrays that it belongs to: the features, and the cells of the
    tiles (`.places`, a NumPy file). Memory grows with the cohort by these alone, eight bytes a tile. wanted: {slide:
    fingerprint} of the stores that the embedding stage made; others are refused (RunError).
    """
    cohort = _Cohort.open(folder, slides)
    cohort.check(wanted or {})
    with committed(path) as work, open(work, "wb") as handle:
        header = {"descr": np.lib.format.dtype_to_descr(cohort.dtype), "fortran_order": False, "shape": cohort.shape}
        np.lib.format.write_array_header_2_0(handle, header)
        for values in cohort.values():
            handle.write(values.data)  # tofile() does not say why it failed
    with committed(places_of(path)) as work, open(work, "wb") as handle:
        np.save(handle, cohort.cells(), allow_pickle=False)
    about = {"slides": cohort.slides, "patients": cohort.patients, "sizes": cohort.sizes, **cohort.about()}
    index = Path(path).with_suffix(".json")
    files = file_sums(Path(path).parent, [Path(path).name, places_of(path).name])
    write_json(index, {"format": "slidemake-bags", **placed(index), **about, "files": files})


def places_of(path: str | Path) -> Path:
    """The file of the tiles' cells that lies beside packed features."""
    return Path(path).with_suffix(".places")


def open_bags(path: str | Path, in_memory_bytes: int = IN_MEMORY_BYTES) -> Bags:
    """Bags that `pack_bags` wrote: in memory as float32 up to `in_memory_bytes`, above that mapped as they are."""
    try:
        index = read_json(Path(path).with_suffix(".json"))
        check_place(Path(path).with_suffix(".json"), index)
        features = np.load(path, mmap_mode="r", allow_pickle=False)
        if features.size * 4 <= in_memory_bytes:  # a larger one is checked by `slidemake verify` only
            check_file(path, index)
            features = np.asarray(features, np.float32)
        check_file(places_of(path), index)
        cells = np.load(places_of(path), allow_pickle=False)
    except (SlideFailure, OSError, ValueError, EOFError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); delete it and run again: it is packed from the embeddings."
        ) from error
    for key in ("files", "place"):
        index.pop(key, None)
    if index.pop("format", None) != "slidemake-bags":
        raise RunError(f"{Path(path).with_suffix('.json')} is no index of packed bags; delete both and run again.")
    return make_bags(features, **index, cells=cells)


@dataclass(frozen=True)
class _Cohort:
    """The opened stores of a cohort, none read yet, ordered by patient, then slide."""

    folder: Path
    slides: list[str]
    patients: list[str]
    features: list[StoredArray]  # (N, D)
    attrs: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: str | Path, slides: Iterable[tuple[str, str]]) -> _Cohort:
        pairs = sorted(set(slides), key=lambda pair: (pair[1], pair[0]))
        if not pairs:
            raise RunError("No slide with embeddings is left for this task; see cohort/failures.csv for why.")
        stores = [open_embeddings(Path(folder) / f"{slide}.zarr") for slide, _ in pairs]
        _check_same([(slide, attrs) for (slide, _), (_, attrs) in zip(pairs, stores, strict=True)])
        return cls(
            Path(folder), *(list(c) for c in zip(*pairs, strict=True)), *(list(c) for c in zip(*stores, strict=True))
        )

    def check(self, wanted: Mapping[str, str]) -> None:
        """RunError for a store that is not the one that the embedding stage made of its slide."""
        for slide, attrs in zip(self.slides, self.attrs, strict=True):
            if wanted.get(slide, attrs.get("fingerprint")) != attrs.get("fingerprint"):
                store = self.folder / f"{slide}.zarr"
                raise RunError(
                    f"{store} is not the store that the embedding stage made of this slide. Delete it and give the "
                    "same command again."
                )

    @property
    def sizes(self) -> list[int]:
        return [int(f.shape[0]) for f in self.features]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.sizes), int(self.features[0].shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.features[0].dtype)

    def values(self) -> Iterator[np.ndarray]:
        """(N, D) features slide by slide; RunError when one is not finite."""
        for slide, features in zip(self.slides, self.features, strict=True):
            values = np.ascontiguousarray(features.read(), self.dtype)
            if not np.isfinite(values).all():
                raise RunError(
                    f"Features of slide {slide} are not all finite; delete its store in {self.folder} and embed it "
                    "again."
                )
            yield values

    def cells(self) -> np.ndarray:
        """(T, 2) cells of all tiles, a patient's slides side by side."""
        found: dict[str, list[np.ndarray]] = {}
        for slide, patient, attrs in zip(self.slides, self.patients, self.attrs, strict=True):
            coords = StoredArray(self.folder / f"{slide}.zarr", "coords").read()
            found.setdefault(patient, []).append(grid_cells(coords, attrs.get("tile_level0_px")))
        return np.concatenate([beside_each_other(slides) for slides in found.values()])

    def about(self) -> dict[str, Any]:
        """What `make_bags` wants to know besides features, slides and sizes."""
        attrs = self.attrs[0]
        return {
            "encoder": attrs.get("encoder", {}),
            "stain": stain_identity(attrs.get("stain")),
            "grid": str(attrs.get("grid") or ""),
            "mpp": _mpp(attrs),
            "fingerprints": {s: str(a.get("fingerprint", "")) for s, a in zip(self.slides, self.attrs, strict=True)},
        }


def make_bags(
    features: np.ndarray,
    slides: Sequence[str],
    patients: Sequence[str],
    sizes: Sequence[int],
    encoder: Mapping[str, Any],
    stain: Mapping[str, Any] | None = None,
    grid: str = "",
    mpp: float | None = None,
    fingerprints: Mapping[str, str] | None = None,
    cells: np.ndarray | None = None,
) -> Bags:
    """Bags from arrays at hand: features (T, D), and per slide its id, patient and number of tiles; cells (T, 2).

    Slides must come ordered by patient, then slide id.
    """
    order = list(zip(patients, slides, strict=True))
    if order != sorted(set(order)):
        raise ValueError("slides must be unique and ordered by patient, then slide id")
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    if cells is not None and cells.shape != (len(features), 2):
        raise ValueError(f"cells of {cells.shape} for {len(features)} tiles")
    if offsets[-1] != len(features):
        raise ValueError(f"{len(features)} feature rows for slides of {offsets[-1]} tiles")
    where: dict[str, tuple[int, int]] = {}
    for i, patient in enumerate(patients):
        where[patient] = (where.get(patient, (i, i))[0], i + 1)
    return Bags(
        features,
        tuple(slides),
        tuple(patients),
        offsets,
        dict(encoder),
        stain_identity(stain),
        grid,
        mpp,
        dict(fingerprints or {}),
        where,
        cells=cells,
    )


def _mpp(attrs: Mapping[str, Any]) -> float | None:
    mpp = attrs.get("mpp")
    if isinstance(mpp, Mapping):
        mpp = mpp.get("requested") or mpp.get("effective")
    return None if mpp is None else float(mpp)


def _check_same(stores: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    first, reference = stores[0]
    for slide, attrs in stores[1:]:
        differs = same_encoder(reference.get("encoder", {}), attrs.get("encoder", {}))
        if stain_identity(reference.get("stain")) != stain_identity(attrs.get("stain")):
            differs.append(
                f"stain: {stain_identity(reference.get('stain'))['method']} and "
                f"{stain_identity(attrs.get('stain'))['method']}"
                " (or another target)"
            )
        if reference.get("grid") != attrs.get("grid"):
            differs.append(f"grid: {reference.get('grid')} and {attrs.get('grid')}")
        if differs:
            raise RunError(
                f"Embeddings of slides {first} and {slide} were made in different ways ({'; '.join(differs)}) and "
                "cannot be in "
                "one cohort. Run the embed_tiles rule again for all slides."
            )
