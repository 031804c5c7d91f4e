"""Bags: the embeddings of a cohort, packed so that a patient's tiles lie together.

One array (T, D) holds all tiles, ordered by patient, then slide; offsets say where each slide begins. Small cohorts are
held in memory as float32, large ones in a memory-mapped scratch file in the stores' own type, so that memory does not
grow with the cohort. No torch here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.failures import RunError

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

    @property
    def dim(self) -> int:
        return int(self.features.shape[1])

    def slide(self, index: int) -> np.ndarray:
        """(N, D) features of one slide, a view."""
        return self.features[self.offsets[index] : self.offsets[index + 1]]

    def bag(self, patient: str) -> np.ndarray:
        """(N, D) features of all slides of a patient, a view; N = 0 for a patient without tiles or without slides."""
        first, last = self.where.get(patient, (0, 0))
        return self.features[self.offsets[first] : self.offsets[last]]

    def tiles(self, patient: str) -> int:
        return len(self.bag(patient))


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


def open_embeddings(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """The features array (N, D) of an embedding store, not yet read, and its attributes. RunError when it is none."""
    import zarr

    try:
        group = zarr.open_group(str(path), mode="r")
        features = group["features"]
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise RunError(
            f"{path} is not an embedding store ({error}); run the embed_tiles rule for this slide."
        ) from error
    attrs = dict(group.attrs)
    if attrs.get("format") != "slidemake-embeddings":
        raise RunError(f"{path} has format {attrs.get('format')!r}, not slidemake-embeddings.")
    return features, attrs


def load_bags(
    folder: str | Path,
    slides: Iterable[tuple[str, str]],
    scratch: str | Path | None = None,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> Bags:
    """Load the stores `folder/{slide_id}.zarr` of (slide_id, patient_id) pairs.

    Above `in_memory_bytes` (as float32) the features go to an unnamed file in `scratch` (default: the temporary folder)
    that vanishes with the process. RunError when stores differ in encoder, stain method, stain target or grid: an
    aggregator trained on a mixture would learn the mixture.
    """
    pairs = sorted(set(slides), key=lambda pair: (pair[1], pair[0]))
    if not pairs:
        raise RunError("No slide with embeddings is left for this task; see cohort/failures.csv for why.")
    stores = [(s, p, *open_embeddings(Path(folder) / f"{s}.zarr")) for s, p in pairs]
    _check_same([(s, attrs) for s, _, _, attrs in stores])
    sizes = [int(features.shape[0]) for _, _, features, _ in stores]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    packed = _packed(int(offsets[-1]), int(stores[0][2].shape[1]), stores[0][2].dtype, scratch, in_memory_bytes)
    for i, (slide, _, features, _) in enumerate(stores):
        values = np.asarray(features[:])
        if not np.isfinite(values).all():
            raise RunError(
                f"Features of slide {slide} are not all finite; delete its store in {folder} and embed it again."
            )
        packed[offsets[i] : offsets[i + 1]] = values
    attrs = stores[0][3]
    return make_bags(
        packed,
        [s for s, *_ in stores],
        [p for _, p, *_ in stores],
        sizes,
        encoder=attrs.get("encoder", {}),
        stain=stain_identity(attrs.get("stain")),
        grid=str(attrs.get("grid") or ""),
        mpp=_mpp(attrs),
        fingerprints={s: str(a.get("fingerprint", "")) for s, _, _, a in stores},
    )


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
) -> Bags:
    """Bags from arrays at hand: features (T, D), and per slide its id, patient and number of tiles.

    Slides must come ordered by patient, then slide id.
    """
    order = list(zip(patients, slides, strict=True))
    if order != sorted(set(order)):
        raise ValueError("slides must be unique and ordered by patient, then slide id")
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
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
    )


def _packed(tiles: int, dim: int, dtype: Any, scratch: str | Path | None, limit: int) -> np.ndarray:
    if tiles * dim * 4 <= limit:
        return np.empty((tiles, dim), np.float32)
    if scratch is not None:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch, prefix=".bags-") as handle:
        return np.memmap(handle, dtype=dtype, mode="w+", shape=(tiles, dim))  # the mapping outlives the handle


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
