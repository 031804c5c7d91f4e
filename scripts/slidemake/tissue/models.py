"""Learned tissue models: TIAToolbox's architectures with weights from a file that the user names.

Nothing is downloaded: the weights have licences of their own (GrandQC's are CC BY-NC-SA 4.0). torch is imported only
when such a method is asked for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slidemake.core.failures import RunError

SIDE, STRIDE = 512, 256  # px of the windows that the model sees, and between them


@dataclass(frozen=True)
class TissueModel:
    """Where TIAToolbox has the architecture, what it is made with, um per px of its input, and where weights are."""

    module: str
    name: str
    options: dict[str, Any]
    mpp: float
    home: str


MODELS = {
    "grandqc": TissueModel(
        "tiatoolbox.models.architecture.grandqc",
        "GrandQCModel",
        {"num_output_channels": 2},
        10.0,
        "huggingface.co/TIACentre/GrandQC_Tissue_Detection",
    ),
}


def model_mask(rgb: np.ndarray, mpp: float, method: str, weights: str | Path) -> np.ndarray:
    """(h, w) bool: tissue on an overview, rgb (h, w, 3) uint8 at mpp um per px, by one of `MODELS`.

    The overview is brought to the model's um per px, padded with white, and seen in windows of 512 px that overlap by
    half; where they do, probabilities are averaged. Raises RunError when TIAToolbox or the weights are not there.
    """
    import torch

    about, model = MODELS[method], _load(method, str(weights))
    height, width = rgb.shape[:2]
    size = max(1, round(width * mpp / about.mpp)), max(1, round(height * mpp / about.mpp))
    small = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX))
    down, across = (max(0, -(-(side - SIDE) // STRIDE)) for side in small.shape[:2])
    shape = down * STRIDE + SIDE, across * STRIDE + SIDE
    canvas = np.full((*shape, 3), 255, np.uint8)
    canvas[: small.shape[0], : small.shape[1]] = small
    total, seen = np.zeros((*shape, 2), np.float32), np.zeros((*shape, 1), np.float32)
    for y in range(0, down * STRIDE + 1, STRIDE):
        for x in range(0, across * STRIDE + 1, STRIDE):
            window = slice(y, y + SIDE), slice(x, x + SIDE)
            batch = torch.from_numpy(model.preproc(canvas[window])[None])
            total[window] += model.infer_batch(model, batch, device="cpu")[0]
            seen[window] += 1
    mask = np.asarray(model.postproc(total / seen), bool)[: small.shape[0], : small.shape[1]]
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


@functools.lru_cache(maxsize=1)
def _load(method: str, weights: str) -> Any:
    """The model with its weights, once per process."""
    import importlib

    from slidemake.stores.state_dicts import read_state_dict

    about = MODELS[method]
    if not Path(weights).is_file():
        raise RunError(
            f"tissue.weights: {weights} does not exist. "
            f"Get the weights of {method} from {about.home} (mind their licence)."
        )
    try:
        model = getattr(importlib.import_module(about.module), about.name)(**about.options)
    except ImportError as error:
        raise RunError(f"tissue method {method!r} needs TIAToolbox, which is not installed here ({error}).") from error
    try:
        model.load_state_dict(read_state_dict(Path(weights)))
    except RuntimeError as error:
        raise RunError(f"tissue.weights: {weights} does not hold the weights of {method}: {error}") from error
    return model.eval()
