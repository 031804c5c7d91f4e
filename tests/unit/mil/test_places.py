"""Tiles on their slide's grid, pieces of tissue, and what a model that looks at neighbours makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mil_cohort import ENCODER, QUICK, STAIN
from slidemake.mil.aggregators import leave_one_out, log_odds, predict_bag
from slidemake.mil.bags import make_bags
from slidemake.mil.batches import sample_batch
from slidemake.mil.fitting import DEFAULTS, fit_member
from slidemake.mil.losses import class_objective
from slidemake.mil.optimisers import OPTIMISERS, LookaheadRAdam, make_optimiser
from slidemake.mil.places import beside_each_other, grid_cells, patches, square_cells
from small_models import model_of, tiles


def test_grid_cells():
    """A step that is no whole number of px, over more columns than its error would allow; single columns; far tiles."""
    columns, rows = np.arange(2000), np.arange(5)
    coords = np.array([(round(c * 224.4) + 30, round(r * 224.4)) for r in rows for c in columns])
    cells = grid_cells(coords, (224.4, 224.4))
    np.testing.assert_array_equal(cells, [(r, c) for r in rows for c in columns])
    np.testing.assert_array_equal(grid_cells(np.array([[7, 0], [7, 100], [7, 300]])), [[0, 0], [1, 0], [3, 0]])
    np.testing.assert_array_equal(grid_cells(np.array([[0, 0], [500, 500]]), (100.0, 100.0)), [[0, 0], [5, 5]])
    np.testing.assert_array_equal(grid_cells(np.array([[9, 9]])), [[0, 0]])
    np.testing.assert_array_equal(grid_cells(np.zeros((5, 2), int)), square_cells(5))  # none is known
    assert grid_cells(np.zeros((0, 2), int)).shape == (0, 2)
    np.testing.assert_array_equal(square_cells(5), [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]])
    np.testing.assert_array_equal(
        beside_each_other([np.array([[0, 0], [0, 4]]), np.zeros((0, 2), int), np.array([[2, 0]])]),
        [[0, 0], [0, 4], [2, 22]],
    )


def test_patches_are_pieces_of_tissue():
    cells = np.stack(np.divmod(np.arange(900), 30), 1)
    chosen = patches(cells, 64, 16, np.random.default_rng(0))
    assert len(chosen) == len(set(chosen)) == 64
    assert (np.diff(chosen) > 0).all()

    def neighbours(rows: np.ndarray) -> float:
        apart = np.abs(cells[rows][:, None] - cells[rows][None]).sum(-1)
        return float((apart == 1).sum(1).mean())

    at_random = np.sort(np.random.default_rng(0).permutation(900)[:64])
    assert neighbours(chosen) > 2.2  # of 4; four by four tiles have 3
    assert neighbours(at_random) < 0.6
    np.testing.assert_array_equal(patches(cells, 900, 16, np.random.default_rng(0)), np.arange(900))


def dense(model, x: torch.Tensor, places: np.ndarray) -> torch.Tensor:
    """The paper's convolutions over a grid of which empty cells are 0."""
    grid = torch.zeros(1, x.shape[1], *(places.max(0) + 1))
    grid[0, :, places[:, 0], places[:, 1]] = x.T
    grid = grid + sum(F.conv2d(grid, c.weight, c.bias, padding=c.padding, groups=c.groups) for c in model.position)
    return grid[0, :, places[:, 0], places[:, 1]].T


@pytest.mark.parametrize("shape", ["square", "two pieces", "diagonal"])
def test_transmil_sees_the_tissue(shape):
    rng, model = np.random.default_rng(0), model_of("transmil")
    places = {
        "square": square_cells(49),
        "two pieces": np.array([(r, c) for r in range(9) for c in (0, 1, 2, 30, 31) if rng.random() < 0.8]),
        "diagonal": np.array([(i, i) for i in range(12)]),
    }[shape].astype(np.int64)
    x = torch.from_numpy(rng.normal(size=(len(places), 16)).astype(np.float32))
    with torch.no_grad():
        got = model._neighbours(x, torch.from_numpy(places))
        np.testing.assert_allclose(got.numpy(), dense(model, x, places).numpy(), atol=1e-5)
    bag = tiles(len(places))
    logits, attention = predict_bag(model, bag, places=places)
    np.testing.assert_allclose(predict_bag(model, bag, places=places + [3, 40])[0], logits, atol=1e-6)
    assert attention.sum() == pytest.approx(1, abs=1e-5)
    if shape == "square":  # what it is where nothing is known of places
        np.testing.assert_allclose(predict_bag(model, bag)[0], logits, atol=1e-6)
    else:
        assert np.abs(predict_bag(model, bag)[0] - logits).max() > 1e-4


def test_transmil_in_batches_and_without_a_tile():
    model, places = model_of("transmil"), np.array([[0, 0], [0, 1], [4, 7], [5, 7], [5, 8]])
    bags = [tiles(n, seed=n) for n in (5, 3)]
    x, mask = torch.full((2, 5, 12), 1e3), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for i, bag in enumerate(bags):
        x[i, : len(bag)] = torch.from_numpy(bag)
    with torch.no_grad():
        logits, _ = model(x, mask, None, torch.from_numpy(np.stack([places, places])))
    for i, bag in enumerate(bags):
        np.testing.assert_allclose(logits[i].numpy(), predict_bag(model, bag, places=places[: len(bag)])[0], atol=1e-5)

    def odds(rows: list[int]) -> float:
        return float(log_odds(torch.from_numpy(predict_bag(model, bags[0][rows], places=places[rows])[0]), 1))

    brute = [odds([0, 1, 2, 3, 4]) - odds([j for j in range(5) if j != i]) for i in range(5)]
    np.testing.assert_allclose(leave_one_out(model, bags[0], places=places), brute, atol=1e-5)


def test_training_draws_pieces_and_is_told_places():
    rng = np.random.default_rng(0)
    names = [f"P{i:02d}" for i in range(8)]
    packed = rng.normal(size=(8 * 36, 8)).astype(np.float32)
    bags = make_bags(packed, names, names, [36] * 8, ENCODER, STAIN, cells=np.tile(square_cells(36) * 2, (8, 1)))
    settings = {**DEFAULTS, **QUICK, "aggregator": "transmil", "epochs": 2, "min_epochs": 2}
    drawn = sample_batch(bags, names[:2], settings, np.random.default_rng(0))
    assert drawn.features.shape == (2, 36, 8)  # all tiles, unless a share is asked for
    assert drawn.places.shape == (2, 36, 2)
    few = sample_batch(bags, names[:2], {**settings, "tile_fraction": 0.25, "min_tiles": 4}, np.random.default_rng(0))
    assert few.features.shape == (2, 9, 8)
    for bag in few.places.numpy():
        assert np.abs(bag - bag.mean(0)).max() < 7  # a piece
    other = sample_batch(bags, names[:2], {**settings, "aggregator": "abmil"}, np.random.default_rng(0))
    assert other.places is None
    assert other.features.shape == (2, 9, 8)
    labels = {p: i % 2 for i, p in enumerate(names)}
    scores = []
    for known in (bags, replace(bags, cells=None)):
        model = fit_member(known, class_objective(labels, names, 2, settings), names, [], settings, 0).model
        scores.append(predict_bag(model, bags.bag("P00"), places=known.places("P00"))[0])
    assert np.abs(scores[0] - scores[1]).max() > 1e-4


def test_lookahead_goes_half_the_way_every_five_steps():
    start = [1.0, -2.0]
    fast = torch.nn.Parameter(torch.tensor(start))
    slow = torch.nn.Parameter(torch.tensor(start))
    plain, ahead = torch.optim.RAdam([fast], lr=0.1), LookaheadRAdam([slow], lr=0.1)
    for step in range(1, 6):
        for weights, optimiser in ((fast, plain), (slow, ahead)):
            optimiser.zero_grad()
            (weights**2).sum().backward()
            optimiser.step()
        if step < 5:
            np.testing.assert_array_equal(fast.detach().numpy(), slow.detach().numpy())
    half = (np.array(start) + fast.detach().numpy()) / 2
    np.testing.assert_allclose(slow.detach().numpy(), half, rtol=1e-6)
    settings = {"learning_rate": 0.1, "weight_decay": 0.0}
    kinds = {name: type(make_optimiser([slow], {**settings, "optimiser": name})).__name__ for name in OPTIMISERS}
    assert kinds == {"adamw": "AdamW", "adam": "Adam", "lookahead_radam": "LookaheadRAdam"}


def test_cells_are_of_every_tile():
    with pytest.raises(ValueError, match="cells of"):
        make_bags(np.zeros((3, 2), np.float32), ["a"], ["A"], [3], ENCODER, cells=np.zeros((2, 2), np.int32))
