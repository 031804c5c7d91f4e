"""Stain normalisation of batches on the device, in the same pass as the encoder's resize and normalisation.

A tile's result never depends on the other tiles of its batch. On a GPU the whole batch goes through each step. On the
CPU, uint8 tiles in channels-last memory go through all steps one at a time, and so stay in the processor's cache. What
else counts there (224 px, one core): two uint8 values looked up at once take 0.05 ms, their logarithms 0.18 ms; powers
of two take 0.04 ms, of e 0.12 ms; a product with eight 3 x 3 matrices on one diagonal takes 0.11 ms, with one 0.36 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import torch

from slidemake.stain.colour import (
    BLANK_FRACTION,
    GLASS_OD,
    LAB_EPSILON,
    LAB_KAPPA,
    LAB_OFFSET,
    RGB_TO_XYZ,
    TISSUE_OD,
    XYZ_TO_RGB,
    optical_density,
    srgb_to_linear,
    tissue_lattice,
)
from slidemake.stain.fit import StainTransform

Blocks = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
CACHED_PIXELS = 50_176  # px worked on at a time on the CPU, a tile of 224 px: 0.6 MB for each copy of it
LANES = 8  # pixels that one row of a matrix product holds


def apply_stain(batch: torch.Tensor, transform: StainTransform) -> torch.Tensor:
    """Normalise tiles (B, 3, H, W), uint8 or float 0..255, to float32 0..255 of the same shape on the same device.

    A tile with fewer than 0.5 % of tissue-like pixels (mean optical density of at least 0.15, on every fourth pixel in
    both directions) comes back as it is. No result is ever NaN. Safe to call from several threads.
    """
    if transform.status == "none" or batch.numel() == 0:
        return batch.float()
    blank = _blank(batch, np.asarray(transform.white_point, np.float64))
    if batch.device.type != "cpu":
        return torch.where(blank[:, None, None, None], batch.float(), _normalised(batch, transform))  # no synchronising
    if batch.dtype == torch.uint8 and _channels_last(batch) and transform.method != "reinhard":
        out = torch.empty_like(batch, dtype=torch.float32, memory_format=torch.channels_last)
        with torch.autocast("cpu", enabled=False):
            _mix_densities(batch, transform, out)
    else:
        out = _normalised(batch, transform)
    if bool(blank.any()):
        out[blank] = batch[blank].float()
    return out


def _normalised(batch: torch.Tensor, transform: StainTransform) -> torch.Tensor:
    """`apply_stain` for tiles that are not blank: any device, dtype and layout."""
    density = _density(batch, np.asarray(transform.white_point, np.float64))
    if transform.method == "reinhard":
        return _reinhard(batch, density.mean(dim=1, keepdim=True), transform)
    out = _mix(density, -np.asarray(transform.matrix).T, np.log(np.asarray(transform.target_white_point)))
    return out.exp_().clamp_(max=255.0)


def _blank(batch: torch.Tensor, white: np.ndarray) -> torch.Tensor:
    """(B,) True for tiles with too few tissue-like pixels on their lattice."""
    step = tissue_lattice(batch.shape[2], batch.shape[3])
    lattice = batch[:, :, ::step, ::step]

    def too_few(pixels: torch.Tensor) -> torch.Tensor:
        dark = (_density(pixels, white).mean(dim=1) >= TISSUE_OD).sum(dim=(1, 2))
        return dark / (lattice.shape[2] * lattice.shape[3]) < BLANK_FRACTION

    if batch.device.type == "cpu":
        blank = too_few(lattice[:, :, ::4])  # enough in a quarter of the rows is enough
        if not bool(blank.any()):
            return blank
    return too_few(lattice)


def _mix_densities(batch: torch.Tensor, transform: StainTransform, out: torch.Tensor) -> None:
    """The optical density methods on uint8 tiles in channels-last memory on the CPU, into `out` (B, 3, H, W) float32.

    In logarithms of base 2 relative to 255, so that bright pixels have small ones: log I = min(log2(max(I, 1) / 255),
    log2(I0 / 255)) and log I' = log I @ matrix + log2(I0_target) - log2(I0 / 255) @ matrix.
    """
    height, width = batch.shape[2:]
    ceiling = np.log2(np.asarray(transform.white_point, np.float64) / 255.0)
    matrix = np.asarray(transform.matrix, np.float64)
    blocks = _blocks(matrix, np.log2(np.asarray(transform.target_white_point, np.float64)) - ceiling @ matrix)
    ceilings = torch.from_numpy(np.tile(ceiling, width).astype(np.float32))
    source, target = (tensor.permute(0, 2, 3, 1).view(len(batch), -1) for tensor in (batch, out))
    paired = height * width % 2 == 0 and batch.storage_offset() % 2 == 0
    table = _logarithms(paired)
    if paired:
        source = source.view(torch.uint16)
    rows = min(max(8, CACHED_PIXELS // width // 8 * 8), height)
    index = torch.empty(rows * source.shape[1] // height, dtype=torch.int32)
    logs = torch.empty(index.shape, dtype=table.dtype)
    for tile, result in zip(source, target, strict=True):
        for values, mixed in zip(tile.split(len(index)), result.split(3 * width * rows), strict=True):
            used = logs[: len(values)]
            torch.index_select(table, 0, index[: len(values)].copy_(values), out=used)
            lines = used.view(torch.float32).view(-1, 3 * width)
            torch.minimum(lines, ceilings, out=lines)
            _mix_pixels(lines.view(-1), blocks, mixed)
            mixed.exp2_().clamp_(max=255.0)


@cache
def _logarithms(paired: bool) -> torch.Tensor:
    """log2(max(i, 1) / 255) of every uint8 i, float32; `paired`: of every two at once, as the bytes of one float64."""
    single = np.log2(np.maximum(np.arange(256), 1) / 255.0).astype(np.float32)
    if not paired:
        return torch.from_numpy(single)
    pairs = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(single[pairs].view(np.float64).ravel())


def _mix_pixels(pixels: torch.Tensor, blocks: Blocks, out: torch.Tensor) -> None:
    """out = pixels @ matrix + offset, for flat (3 n,) float32 pixels on the CPU; `blocks` from `_blocks`.

    A product of matrices this narrow is slow: `LANES` pixels make one row, and the matrix stands on the diagonal.
    """
    lanes = math.gcd(LANES, pixels.numel() // 3)
    weight, bias = blocks(lanes)
    torch.addmm(bias, pixels.view(-1, 3 * lanes), weight, out=out.view(-1, 3 * lanes))


def _blocks(matrix: np.ndarray, offset: np.ndarray) -> Blocks:
    """(3, 3) and (3,) repeated for a number of pixels side by side, made once for each number asked for."""

    @cache
    def repeated(lanes: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = np.kron(np.eye(lanes), matrix), np.tile(offset, lanes)
        return torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(bias.astype(np.float32))

    return repeated


def _table(batch: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    """Look up uint8 `batch` (B, 3, H, W) in `table` (3, 256), one row per channel -> float32.

    The memory layout is kept: tiles come from the store as (B, H, W, 3), and convolutions like them so.
    """
    entries = _constant(table.astype(np.float32).ravel(), batch.device)
    first = _constant(np.array([0, 256, 512], np.int32), batch.device)
    size, channels, height, width = batch.shape
    if not _channels_last(batch):
        index = batch.to(torch.int32, memory_format=torch.contiguous_format) + first.view(1, 3, 1, 1)
        return entries.index_select(0, index.view(-1)).view(batch.shape)
    index = batch.permute(0, 2, 3, 1).to(torch.int32).reshape(size, -1)
    index += first.repeat(height * width)  # written out once: adding along an axis of length 3 is slow
    return entries.index_select(0, index.view(-1)).view(size, height, width, channels).permute(0, 3, 1, 2)


def _constant(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Numbers on the device. A GPU gets them once for all batches of a slide: each sending waits for its stream."""
    if device.type == "cpu":
        return torch.as_tensor(values)
    sent = _sent(values.tobytes(), values.dtype.str, str(device))
    if device.type == "cuda":
        sent.record_stream(torch.cuda.current_stream(device))  # others than the stream that it was made in use it
    return sent


@lru_cache(maxsize=64)
def _sent(values: bytes, dtype: str, device: str) -> torch.Tensor:
    return torch.as_tensor(np.frombuffer(values, dtype).copy(), device=device)


def _channels_last(batch: torch.Tensor) -> bool:
    return not batch.is_contiguous() and batch.is_contiguous(memory_format=torch.channels_last)


def _density(batch: torch.Tensor, white: np.ndarray) -> torch.Tensor:
    if batch.dtype == torch.uint8:
        return _table(batch, optical_density(np.arange(256)[:, None] * np.ones(3), white).T)
    ceiling = _constant(np.log(white).astype(np.float32), batch.device).view(1, 3, 1, 1)
    clean = torch.nan_to_num(batch.float(), nan=255.0)
    return (ceiling - clean.clamp_(1.0, 255.0).log_()).clamp_(min=0.0)


def _mix(planes: torch.Tensor, matrix: np.ndarray, offset: np.ndarray | None = None) -> torch.Tensor:
    """(B, 3, H, W): out[:, k] = sum_j matrix[k, j] planes[:, j] + offset[k].

    Channels-last on the CPU as a 1 x 1 convolution; elsewhere plane by plane, which is as fast, and exact where a
    convolution may run in TF32.
    """
    if planes.device.type == "cpu" and _channels_last(planes):
        weight = torch.as_tensor(matrix, dtype=torch.float32)[:, :, None, None]
        bias = None if offset is None else torch.as_tensor(offset, dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.conv2d(planes, weight, bias)
    out = torch.empty_like(planes)
    for k in range(3):
        plane = out[:, k]
        torch.mul(planes[:, 0], float(matrix[k, 0]), out=plane)
        plane.add_(planes[:, 1], alpha=float(matrix[k, 1])).add_(planes[:, 2], alpha=float(matrix[k, 2]))
        if offset is not None:
            plane.add_(float(offset[k]))
    return out


def _reinhard(batch: torch.Tensor, density: torch.Tensor, transform: StainTransform) -> torch.Tensor:
    """CIELAB moments of the source brought to the target's, glass faded to balanced white; as in `stain`."""
    gain = 255.0 / np.asarray(transform.white_point, np.float64)
    if batch.dtype == torch.uint8:
        balanced_table = np.minimum(np.arange(256) * gain[:, None], 255.0)
        balanced, linear = _table(batch, balanced_table), _table(batch, srgb_to_linear(balanced_table / 255.0))
    else:
        scale = _constant(gain.astype(np.float32), batch.device).view(1, 3, 1, 1)
        balanced = (torch.nan_to_num(batch.float(), nan=255.0) * scale).clamp_(0.0, 255.0)
        unit = balanced / 255.0
        linear = torch.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    xyz = _mix(linear, RGB_TO_XYZ)
    f = torch.where(xyz > LAB_EPSILON, xyz.clamp_min(LAB_EPSILON).pow(1.0 / 3.0), LAB_KAPPA * xyz + LAB_OFFSET)
    matrix, offset = _lab_affine(transform)
    f = _mix(f, matrix, offset)
    cut = float(np.cbrt(LAB_EPSILON))
    linear = _mix(torch.where(f > cut, f**3, (f - LAB_OFFSET) / LAB_KAPPA), XYZ_TO_RGB).clamp_(0.0, 1.0)
    moved = torch.where(
        linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp_min(0.0031308).pow(1 / 2.4) - 0.055
    ).mul_(255.0)
    weight = (density / GLASS_OD).clamp_(max=1.0)
    return torch.lerp(balanced, moved.clamp_(0.0, 255.0), weight)


def _lab_affine(transform: StainTransform) -> tuple[np.ndarray, np.ndarray]:
    """Moments in CIELAB are an affine map of the three cube roots (fx, fy, fz): its matrix (3, 3) and offset (3,)."""
    to_lab = np.array([[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]])
    base = np.array([-16.0, 0.0, 0.0])
    mean, std, target_mean, target_std = (
        np.asarray(getattr(transform, key), np.float64)
        for key in ("lab_mean", "lab_std", "target_lab_mean", "target_lab_std")
    )
    back = np.linalg.inv(to_lab)
    scale = np.diag(target_std / std)
    return back @ scale @ to_lab, back @ (scale @ (base - mean) + target_mean - base)
