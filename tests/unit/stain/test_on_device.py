"""Application on the device: a written-out loop as oracle, independence of the batch, blanks, NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slidemake.stain.fit import METHODS, StainTransform, apply_stain_numpy, fit_stain, stain_transform
from slidemake.stain.on_device import apply_stain
from slidemake.stain.targets import target_from_pixels

PURPLE, FADED = [[0.53, 0.75, 0.39], [0.15, 0.83, 0.53]], [[0.56, 0.72, 0.41], [0.21, 0.90, 0.38]]
WHITE = (244.0, 240.0, 235.0)


def draw(vectors, shape, seed=0, white=255.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    amounts = np.stack([rng.gamma(1.0, 0.5, shape), rng.gamma(1.5, 0.3, shape)], axis=-1)
    vectors = np.array(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.clip(np.rint(np.asarray(white) * np.exp(-amounts @ vectors)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module", params=METHODS)
def transform(request) -> StainTransform:
    target = target_from_pixels(draw(PURPLE, (30_000,)), request.param)
    return stain_transform(fit_stain(draw(FADED, (30_000,), white=WHITE), request.param, WHITE), target)


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    """(5, 64, 64, 3): tissue, a blank tile, extremes, half glass, tissue."""
    tiles = draw(FADED, (5, 64, 64), seed=3, white=WHITE)
    tiles[1] = np.random.default_rng(0).integers(228, 256, (64, 64, 3))
    tiles[2, ::2], tiles[2, 1::2, ::2] = 0, 255
    tiles[3, :, :32] = WHITE
    return tiles


def to_batch(tiles: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tiles).permute(0, 3, 1, 2)


def by_hand(pixel: np.ndarray, t: StainTransform) -> np.ndarray:
    od = [max(-np.log(max(float(pixel[c]), 1.0) / t.white_point[c]), 0.0) for c in range(3)]
    mixed = [sum(od[j] * t.matrix[j][k] for j in range(3)) for k in range(3)]
    return np.array([min(t.target_white_point[k] * np.exp(-mixed[k]), 255.0) for k in range(3)])


def test_matches_the_formula_pixel_by_pixel(transform, tiles):
    if transform.method == "reinhard":
        pytest.skip("has no matrix; compared with TIAToolbox through the numpy twin")
    out = apply_stain(to_batch(tiles), transform).permute(0, 2, 3, 1).numpy()
    for tile, y, x in ((0, 0, 0), (0, 31, 7), (2, 0, 0), (2, 1, 0), (3, 5, 5), (4, 63, 63)):
        assert out[tile, y, x] == pytest.approx(by_hand(tiles[tile, y, x], transform), abs=2e-3)


def test_same_numbers_as_numpy(transform, tiles):
    out = apply_stain(to_batch(tiles), transform)
    assert out.dtype == torch.float32
    assert np.abs(out.permute(0, 2, 3, 1).numpy() - apply_stain_numpy(tiles, transform)).max() <= 0.51


def test_float_input_gives_the_same(transform, tiles):
    exact = apply_stain(to_batch(tiles), transform)
    assert torch.allclose(apply_stain(to_batch(tiles).float(), transform), exact, atol=5e-3)


def test_memory_layout_does_not_matter_and_is_kept(transform, tiles):
    batch = to_batch(tiles)
    plain = apply_stain(batch.contiguous(), transform)
    assert plain.is_contiguous()
    for same in (batch, batch.contiguous(memory_format=torch.channels_last)):
        out = apply_stain(same, transform)
        assert torch.allclose(out, plain, atol=2e-3)
        assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(apply_stain(batch[:, :, 8:, 4:60], transform), apply_stain(batch, transform)[:, :, 8:, 4:60])


def test_a_tile_does_not_depend_on_its_batch(transform, tiles):
    for batch in (to_batch(tiles), to_batch(tiles).contiguous()):
        together = apply_stain(batch, transform)
        for i in range(len(tiles)):
            assert torch.allclose(apply_stain(batch[i : i + 1], transform)[0], together[i], atol=1e-4)


def test_blank_tile_comes_back_as_it_is_and_the_input_is_not_changed(transform, tiles):
    batch = to_batch(tiles).contiguous()
    before = batch.clone()
    out = apply_stain(batch, transform)
    assert torch.equal(out[1], before[1].float())
    assert torch.equal(batch, before)
    assert not torch.equal(out[0], before[0].float())
    floats = before.float()
    apply_stain(floats, transform)
    assert torch.equal(floats, before.float())


def test_glass_in_a_tissue_tile_becomes_white(transform, tiles):
    assert apply_stain(to_batch(tiles), transform)[3, :, :, :32].min() >= 250


def test_nothing_is_ever_nan_or_out_of_range(transform):
    values = torch.tensor([0.0, 0.5, 1.0, 254.7, 255.0, 300.0, -4.0, float("nan"), float("inf"), -float("inf")])
    batch = torch.cat([values.repeat(3, 1), torch.zeros(3, 6)], dim=1).reshape(1, 3, 4, 4)
    for out in (
        apply_stain(batch, transform),
        apply_stain(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), transform),
        apply_stain(torch.full((1, 3, 4, 4), 255, dtype=torch.uint8), transform),
    ):
        assert torch.isfinite(out).all()
        assert out.min() >= 0
        assert out.max() <= 255


def test_identity_and_empty_batches(transform, tiles):
    identity = StainTransform("none")
    assert torch.equal(apply_stain(to_batch(tiles), identity), to_batch(tiles).float())
    assert apply_stain(to_batch(tiles[:0]), transform).shape == (0, 3, 64, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same(transform, tiles):
    out = apply_stain(to_batch(tiles).cuda(), transform)
    assert out.device.type == "cuda"
    assert torch.allclose(out.cpu(), apply_stain(to_batch(tiles), transform), atol=5e-3)


def test_a_slides_tables_are_sent_to_a_device_once(monkeypatch):
    """The meta device stands in for a GPU: nothing is computed there, but what is sent is counted."""
    from slidemake.stain import on_device

    on_device._sent.cache_clear()
    table = np.arange(768, dtype=np.float32).reshape(3, 256)
    for _ in range(3):
        on_device._table(torch.zeros((2, 3, 8, 8), dtype=torch.uint8, device="meta"), table)
    assert on_device._sent.cache_info().misses == 2  # the table, and where its rows begin
    assert on_device._sent.cache_info().hits == 4
    on_device._table(torch.zeros((2, 3, 8, 8), dtype=torch.uint8, device="meta"), table + 1)
    assert on_device._sent.cache_info().misses == 3
