"""Every way through `apply_stain` against the formula in float64: layouts, sizes, offsets, threads, blank tiles."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from slidemake.stain.fit import StainTransform
from slidemake.stain.on_device import apply_stain

# rank 2 as real ones are, with a negative entry; a white point that no pixel hits exactly
TRANSFORM = StainTransform(
    "macenko",
    "ok",
    "hash",
    None,
    (243.5, 240.0, 235.25),
    (255.0, 250.0, 253.0),
    ((0.9, 0.5, -0.1), (0.3, 0.7, 0.4), (0.6, 0.6, 0.15)),
)
SIZES = [(64, 64), (224, 224), (256, 256), (225, 225), (518, 518), (7, 9), (1, 1), (6, 1000), (300, 231)]


def formula(tiles: np.ndarray, transform: StainTransform) -> np.ndarray:
    """(n, H, W, 3) uint8 -> float64, blank tiles unchanged."""
    pixels, white = tiles.astype(np.float64), np.array(transform.white_point)
    density = np.maximum(-np.log(np.maximum(pixels, 1.0) / white), 0.0)
    out = np.minimum(np.array(transform.target_white_point) * np.exp(-density @ np.array(transform.matrix)), 255.0)
    step = 4 if min(tiles.shape[1:3]) >= 64 else 1
    dark = density[:, ::step, ::step].mean(axis=-1) >= 0.15
    blank = dark.mean(axis=(1, 2)) < 0.005
    out[blank] = pixels[blank]
    return out


def drawn(height: int, width: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def worst(tiles: np.ndarray, batch: torch.Tensor) -> float:
    out = apply_stain(batch, TRANSFORM)
    assert out.dtype == torch.float32
    return float(np.abs(out.permute(0, 2, 3, 1).numpy() - formula(tiles, TRANSFORM)).max())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_size_and_layout_gives_the_formula(height, width):
    tiles = drawn(height, width)
    batch = torch.from_numpy(tiles).permute(0, 3, 1, 2)
    assert worst(tiles, batch) < 2e-3
    assert worst(tiles, batch.contiguous()) < 2e-3
    assert worst(tiles, batch.float()) < 2e-3
    assert worst(tiles[1:], batch[1:]) < 2e-3  # may start at an odd byte
    assert worst(tiles[:, ::2, ::2], batch[:, :, ::2, ::2]) < 2e-3


def test_all_values_of_a_channel():
    tiles = np.full((3, 64, 64, 3), 128, np.uint8)
    for channel in range(3):
        tiles[channel, :4, :, channel] = np.arange(256).reshape(4, 64)
    assert worst(tiles, torch.from_numpy(tiles).permute(0, 3, 1, 2)) < 1e-3


@pytest.mark.parametrize("side", [64, 100, 224, 240])
def test_the_share_of_tissue_that_makes_a_tile_blank(side):
    """Tiles with no dark pixel on the lattice, and with one fewer than, just, and more than enough; anywhere."""
    lattice = -(-side // 4)
    enough = int(np.ceil(0.005 * lattice**2 - 1e-9))
    rng = np.random.default_rng(side)
    counts = [0, enough - 1, enough, enough + 1, 3 * enough]
    tiles = np.full((2 * len(counts), side, side, 3), 250, np.uint8)
    for i, count in enumerate(counts):
        where = rng.permutation(lattice**2)[:count]
        tiles[i, where // lattice * 4, where % lattice * 4] = 60
        late = lattice**2 - 1 - np.arange(count)  # the last rows: nothing in most of the tile
        tiles[len(counts) + i, late // lattice * 4, late % lattice * 4] = 60
    expected = formula(tiles, TRANSFORM)
    assert (expected == tiles).all(axis=(1, 2, 3)).sum() == 4  # none and one too few, twice
    for part in (tiles, tiles[2:5], tiles[:1]):
        assert worst(part, torch.from_numpy(part).permute(0, 3, 1, 2)) < 1e-3


def test_threads_do_not_disturb_each_other():
    batches = [torch.from_numpy(drawn(96, 96 + 8 * i, 4)).permute(0, 3, 1, 2) for i in range(8)]
    alone = [apply_stain(batch, TRANSFORM) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for out, expected in zip(pool.map(lambda b: apply_stain(b, TRANSFORM), batches), alone, strict=True):
                assert torch.equal(out, expected)


def test_a_tile_gives_the_same_bits_in_any_batch():
    batch = torch.from_numpy(drawn(224, 224, 5)).permute(0, 3, 1, 2)
    together = apply_stain(batch, TRANSFORM)
    for i in range(5):
        assert torch.equal(apply_stain(batch[i : i + 1], TRANSFORM)[0], together[i])


def test_autocast_does_not_lower_the_precision():
    tiles = drawn(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert worst(tiles, torch.from_numpy(tiles).permute(0, 3, 1, 2)) < 2e-3
