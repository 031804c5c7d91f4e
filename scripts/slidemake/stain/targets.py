"""References that slides' stains are brought to: TIAToolbox's image, an image, or the median of a cohort."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.core.files import fingerprint
from slidemake.stain.fit import StainRefused, fit_stain, rounded
from slidemake.stain.judgement import describe_pixels, fit_reasons, in_words


def no_target(reason: str) -> dict[str, Any]:
    """The reference of a run that normalises nothing."""
    return _target_record({"status": "none", "method": "none", "reason": reason})


def target_from_pixels(pixels: np.ndarray, method: str, source: str = "pixels") -> dict[str, Any]:
    """Reference from RGB pixels (..., 3) uint8, all of them, with a white point of 255. Raises RunError if not H&E.

    Whatever the method, Macenko's vectors must be those of two stains that both are there (`judgement`): every
    slide would be brought to what is wrong here.
    """
    pixels = pixels.reshape(-1, 3)
    try:
        fit = fit_stain(pixels, method)
        vectors = fit if method == "macenko" else fit_stain(pixels, "macenko")
    except StainRefused as refused:
        raise RunError(_of_no_use(source, str(refused))) from refused
    if reasons := fit_reasons({**vectors.as_dict(), "tissue": describe_pixels(pixels, 255.0)}):
        raise RunError(_of_no_use(source, in_words(" ".join(reasons))))
    return _target_record({"status": "ok", "source": source, **fit.as_dict()})


def _of_no_use(source: str, why: str) -> str:
    return (
        f"The stain reference {source} is of no use: {why}. Set stain.target to an H&E image of tissue that fills most "
        "of the frame, to 'tiatoolbox' or to 'cohort'."
    )


def target_from_image(image: str | Path | np.ndarray, method: str) -> dict[str, Any]:
    """Reference from 'tiatoolbox' (the image in that package), an image file, or an array (h, w, 3) uint8."""
    if isinstance(image, np.ndarray):
        return target_from_pixels(image, method)
    bundled = str(image) == "tiatoolbox"
    path = _tiatoolbox_image() if bundled else Path(image)
    from PIL import Image

    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise RunError(
            f"stain.target: {path} does not open as an image ({error}). Give a PNG, JPEG or TIFF."
        ) from error
    step = max(1, int(np.ceil(np.sqrt(pixels.shape[0] * pixels.shape[1] / 4e6))))  # 4 Mpx say all there is to say
    return target_from_pixels(pixels[::step, ::step], method, "tiatoolbox" if bundled else path.name)


def _tiatoolbox_image() -> Path:
    """The reference image inside TIAToolbox, found without importing it (9 s and 1.3 GB)."""
    found = importlib.util.find_spec("tiatoolbox")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "data" / "target_image.png"
        if path.is_file():
            return path
    raise RunError(
        "stain.target is 'tiatoolbox', but TIAToolbox, whose reference image that is, is not installed. Install it "
        "(the extra slidemake[tiatoolbox]), or set stain.target to 'cohort' or to an H&E image of your own."
    )


def pool_targets(fits: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """Reference of a cohort: the median of its slides' fits, element by element, rows of the matrix made unit again.

    `fits` are stain.json records; those with status none or another method take no part. The white point is 255
    whatever the slides' own are: glass comes out white. Without any fit the reference is `no_target`.
    """
    used = [fit for fit in fits if fit.get("status", "ok") == "ok" and fit["method"] == method]
    if not used:
        return no_target("no slide of the cohort has a stain fit that is of use")

    def median(key: str) -> np.ndarray | None:
        return None if used[0][key] is None else np.median([fit[key] for fit in used], axis=0)

    matrix, maxima, mean, std = (median(k) for k in ("stain_matrix", "max_concentrations", "lab_mean", "lab_std"))
    if matrix is not None:
        matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    return _target_record(
        {
            "status": "ok",
            "source": "cohort",
            "slides": len(used),
            "method": method,
            "white_point": [255.0] * 3,
            "stain_matrix": None if matrix is None else [rounded(row) for row in matrix],
            "max_concentrations": None if maxima is None else rounded(maxima),
            "lab_mean": None if mean is None else rounded(mean),
            "lab_std": None if std is None else rounded(std),
            "pixels": int(sum(fit["pixels"] for fit in used)),
        }
    )


def _target_record(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "hash": fingerprint("stain", target=values)}
