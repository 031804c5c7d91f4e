"""Learned tissue models, with weights from files that the user names.

Nothing is downloaded: weights have licences of their own. torch is imported only when such a method is asked for.
`grandqc` is TIAToolbox's UNet++ on the overview. `hest` is HEST's DeepLabV3 (ResNet-50, torchvision), which sees 1 um
per px and reads the slide for it. `sam` is Segment Anything (TIAToolbox's wrapper of transformers), which has to be
told where to look: it outlines each piece that `density` found, within its box.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage as ndi

from slidemake.core.failures import RunError
from slidemake.core.files import file_sha256, fingerprint

SIDE, STRIDE = 512, 256  # px of the windows that GrandQC's model sees, and between them
BOX_MARGIN_UM = 200.0  # seen around each piece by SAM
SAM_FILES = ("config.json", "model.safetensors")

# Reads rgb (side, side, 3) uint8 of a square of the slide: x, y of its corner and its width in px of the overview, and
# the side in px.
Finer = Callable[[float, float, float, int], np.ndarray]


@dataclass(frozen=True)
class TissueModel:
    """Where the weights are, um per px of the model's input (None: any), and whether they are a file or a folder."""

    home: str
    mpp: float | None
    folder: bool = False
    options: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "grandqc": TissueModel(
        "huggingface.co/TIACentre/GrandQC_Tissue_Detection", 10.0, options={"num_output_channels": 2}
    ),
    "hest": TissueModel("huggingface.co/MahmoodLab/hest-tissue-seg", 1.0),
    "sam": TissueModel("huggingface.co/facebook/sam-vit-base", None, folder=True),
}


def model_mask(
    rgb: np.ndarray,
    mpp: float,
    method: str,
    weights: str | Path,
    pieces: np.ndarray | None = None,
    finer: Finer | None = None,
) -> np.ndarray:
    """(h, w) bool: tissue on an overview, rgb (h, w, 3) uint8 at mpp um per px, by one of `MODELS`.

    pieces (h, w) bool: where there may be tissue, needed by `sam`, and all that `hest` looks at; finer: reads the
    slide, needed where a model sees finer than the overview. Raises RunError when a package or weights are not there.
    """
    model = _load(method, str(weights))
    if method == "sam":
        if pieces is None:
            raise RunError("tissue method 'sam' needs the pieces that it is to outline")
        return _outlined(model, rgb, mpp, pieces)
    about = MODELS[method].mpp or mpp
    if method == "grandqc":
        return _grandqc(model, rgb, mpp, about)
    if finer is None:
        if mpp > 1.05 * about:
            raise RunError(f"tissue method {method!r} sees {about:g} um per px, and this picture has {mpp:g}")
        finer = functools.partial(_enlarged, rgb)
    return _hest(model, rgb.shape[:2], mpp, about, finer, pieces)


def weights_mark(method: str, weights: str | Path) -> str:
    """What tells one set of weights from another under the same name: a digest of the file, or of a folder's files."""
    if not MODELS[method].folder:
        return file_sha256(weights)
    return fingerprint("tissue", weights=[file_sha256(Path(weights) / name) for name in SAM_FILES])


def weights_files(method: str, weights: str | Path | None) -> list[Path]:
    """Files of the user that the method reads; empty for methods without weights."""
    if method not in MODELS or not weights:
        return []
    return [Path(weights) / name for name in SAM_FILES] if MODELS[method].folder else [Path(weights)]


def _grandqc(model: Any, rgb: np.ndarray, mpp: float, wanted: float) -> np.ndarray:
    """On the whole overview at the model's um per px, padded with white, in windows of 512 px that overlap by half."""
    import torch

    height, width = rgb.shape[:2]
    size = max(1, round(width * mpp / wanted)), max(1, round(height * mpp / wanted))
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


def _hest(
    model: Any, shape: tuple[int, int], mpp: float, wanted: float, finer: Finer, pieces: np.ndarray | None
) -> np.ndarray:
    """In windows of 512 px side by side, as HEST's own code does: tissue where its probability is above one half."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    step = max(1, round(SIDE * wanted / mpp))  # px of the overview
    mask = np.zeros(shape, bool)
    for y in range(0, shape[0], step):
        for x in range(0, shape[1], step):
            part = mask[y : y + step, x : x + step]
            if pieces is not None and not pieces[y : y + step, x : x + step].any():
                continue
            pixels = (finer(x, y, step, SIDE).astype(np.float32) / 255 - mean) / deviation
            batch = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None].to(device)
            with torch.inference_mode():
                share = torch.softmax(model(batch)["out"].float(), 1)[0, 1].cpu().numpy()
            small = Image.fromarray(share).resize((step, step), Image.Resampling.BOX)
            part[:] = (np.asarray(small) > 0.5)[: part.shape[0], : part.shape[1]]
    return mask


def _enlarged(rgb: np.ndarray, x: float, y: float, width: float, side: int) -> np.ndarray:
    """A square of a picture as `Finer` gives it, white beyond the picture."""
    left, top, reach = round(x), round(y), max(1, round(width))
    square = np.full((reach, reach, 3), 255, np.uint8)
    part = rgb[top : top + reach, left : left + reach]
    square[: part.shape[0], : part.shape[1]] = part
    return np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.BILINEAR))


def _outlined(model: Any, rgb: np.ndarray, mpp: float, pieces: np.ndarray) -> np.ndarray:
    """The most likely outline of each piece within its box, on the piece and 200 um around it."""
    labels, _ = ndi.label(pieces, structure=np.ones((3, 3), bool))
    margin, mask = max(1, round(BOX_MARGIN_UM / mpp)), np.zeros_like(pieces)
    for rows, columns in ndi.find_objects(labels):
        top, left = max(0, rows.start - margin), max(0, columns.start - margin)
        crop = rgb[top : rows.stop + margin, left : columns.stop + margin]
        box = np.array([[columns.start - left, rows.start - top, columns.stop - left, rows.stop - top]])
        found, _ = model.infer_batch(model, [crop], box_coords=[box], device="cpu")
        mask[top : top + crop.shape[0], left : left + crop.shape[1]] |= np.asarray(found, bool).reshape(crop.shape[:2])
    return mask


@functools.lru_cache(maxsize=1)
def _load(method: str, weights: str) -> Any:
    """The model with its weights, once per process."""
    about, missing = MODELS[method], None
    if about.folder:
        missing = next((path for path in weights_files(method, weights) if not path.is_file()), None)
    elif not Path(weights).is_file():
        missing = Path(weights)
    if missing is not None:
        kind = f"the folder with {' and '.join(SAM_FILES)}" if about.folder else "the file with its weights"
        raise RunError(
            f"tissue.weights: {missing} does not exist. Name {kind} of {method}, "
            f"which slidemake does not download: {about.home} (mind their licence)."
        )
    try:
        return _BUILDERS[method](Path(weights))
    except ImportError as error:
        raise RunError(f"tissue method {method!r} needs TIAToolbox, which is not installed here ({error}).") from error
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(f"tissue.weights: {weights} does not hold the weights of {method}: {error}") from error


def _build_grandqc(weights: Path) -> Any:
    from tiatoolbox.models.architecture.grandqc import GrandQCModel

    from slidemake.stores.state_dicts import read_state_dict

    model = GrandQCModel(**MODELS["grandqc"].options)
    model.load_state_dict(read_state_dict(weights))
    return model.eval()


def _build_hest(weights: Path) -> Any:
    from torchvision.models.segmentation import deeplabv3_resnet50

    from slidemake.stores.state_dicts import read_state_dict

    model = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=2)
    state = {key.removeprefix("model."): value for key, value in read_state_dict(weights).items()}
    # The second head served for training alone.
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("aux_classifier.")})
    return model.eval()


def _build_sam(weights: Path) -> Any:
    from tiatoolbox.models.architecture.sam import SAM

    return SAM(str(weights.resolve()), device="cpu")


_BUILDERS: dict[str, Callable[[Path], Any]] = {
    "grandqc": _build_grandqc,
    "hest": _build_hest,
    "sam": _build_sam,
}
