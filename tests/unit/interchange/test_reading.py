"""Features of other tools' layouts are read as they are written there, and what is no such file is refused in words."""

from __future__ import annotations

import pickle
from pathlib import Path

import feature_files as other
import h5py
import numpy as np
import pytest
from slidemake.core.failures import SlideFailure
from slidemake.interchange.features import Features
from slidemake.interchange.hdf5_features import spacing
from slidemake.interchange.reading import open_features

N, D = 9, 5


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


def opened(path: Path, *args, **kwargs) -> tuple[Features, np.ndarray]:
    """What the file says, and all its features."""
    with open_features(path, *args, **kwargs) as found:
        return found, np.concatenate(list(found.blocks()))


def test_trident(tmp_path: Path, features: np.ndarray):
    coords = other.grid_coords(N, 512)
    found, read = opened(other.write_trident(tmp_path / "a.h5", features, coords))
    assert found.tool == "trident"
    np.testing.assert_array_equal(read, features)
    np.testing.assert_array_equal(found.coords, coords)
    assert (found.unit, found.tile, found.stride, found.tile_px, found.mpp, found.mpp0) == (
        "px",
        512,
        512,
        256,
        0.5,
        0.25,
    )


def test_trident_with_overlap_and_one_dimension_more(tmp_path: Path, features: np.ndarray):
    path = other.write_trident(tmp_path / "a.h5", features[None], other.grid_coords(N, 384), overlap=64)
    found, read = opened(path)
    assert found.stride == 384  # 256 - 64 px of 2 level-0 px each
    np.testing.assert_array_equal(read, features)


@pytest.mark.parametrize("pt", [False, True])
def test_clam(tmp_path: Path, features: np.ndarray, pt: bool):
    coords = other.grid_coords(N, 256)
    found, read = opened(other.write_clam(tmp_path, "a", features, coords, pt))
    assert (found.tool, found.tile, found.tile_px) == ("clam", 256, 256)
    np.testing.assert_array_equal(read, features)
    np.testing.assert_array_equal(found.coords, coords)


def test_stamp_in_micrometres(tmp_path: Path, features: np.ndarray):
    half = features.astype(np.float16)
    path = other.write_stamp(tmp_path / "a.h5", half, other.grid_coords(N, 256).astype(np.float32), **other.STAMP_2)
    found, read = opened(path)
    assert (found.tool, found.unit, found.tile, found.tile_px) == ("stamp", "um", 256, 224)
    assert found.mpp == pytest.approx(256 / 224)
    assert found.encoder == "uni"
    assert read.dtype == np.float16
    np.testing.assert_array_equal(read, half)


@pytest.mark.parametrize(
    ("about", "step"), [({"tile_size": 224}, 224), ({}, 224), ({"tile_size": 256.0, "unit": "um"}, 256)]
)
def test_stamp_of_old_versions(tmp_path: Path, features: np.ndarray, about: dict, step: int):
    """px of 256 um / 224, with and without saying so, and um under the older name."""
    found, _ = opened(other.write_stamp(tmp_path / "a.h5", features, other.grid_coords(N, step).astype(float), **about))
    assert (found.unit, found.tile) == ("um", 256)
    np.testing.assert_allclose(found.coords, other.grid_coords(N, 256))


def test_stamp_without_a_unit_is_not_guessed(tmp_path: Path, features: np.ndarray):
    path = other.write_stamp(tmp_path / "a.h5", features, other.grid_coords(N, 100).astype(float))
    with pytest.raises(SlideFailure, match="unit"):
        opened(path)


def test_stamp_of_slides_is_refused(tmp_path: Path):
    path = other.write_stamp(tmp_path / "a.h5", np.zeros(7, np.float32), np.zeros((0, 2)), feat_type="patient")
    with pytest.raises(SlideFailure, match="whole patient"):
        opened(path)


def test_slide2vec_by_index_of_tiles(tmp_path: Path, features: np.ndarray):
    """Rows in another order than the tiles: each row keeps its own place."""
    coords, order = other.grid_coords(N, 448), np.random.default_rng(1).permutation(N)
    found, read = opened(other.write_slide2vec(tmp_path, "a", features, coords, order))
    assert (found.tool, found.tile, found.tile_px, found.mpp, found.mpp0) == ("slide2vec", 448, 224, 0.5, 0.25)
    np.testing.assert_array_equal(read, features[order])
    np.testing.assert_array_equal(found.coords, coords[order])


def test_h5ad_by_columns_of_its_rows(tmp_path: Path, features: np.ndarray):
    coords = other.grid_coords(N, 10)
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        file["X"], file["obs/x"], file["obs/y"] = features, coords[:, 0], coords[:, 1]
    found, read = opened(tmp_path / "a.h5ad")
    assert found.tool == "h5ad"
    np.testing.assert_array_equal(read, features)
    np.testing.assert_array_equal(found.coords, coords)
    with h5py.File(tmp_path / "b.h5ad", "w") as file:  # corners or centres? nobody says
        file["X"], file["obsm/spatial"] = features, coords
        file.create_group("obs")
    with pytest.raises(SlideFailure, match="corners or the centres"):
        opened(tmp_path / "b.h5ad")


def test_spatialdata_of_lazyslide(tmp_path: Path, features: np.ndarray):
    """Several tables, of which one is meant; the grid's specification says how large a tile is on level 0."""
    import zarr

    coords = other.grid_coords(N, 448)
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    spec = {"height": 224, "width": 224, "stride_width": 224, "mpp": 0.5, "ops_downsample": 2.0, "base_downsample": 1.0}
    group.attrs["tile_spec"] = {"tiles": spec}
    for model in ("uni", "conch"):
        table = group.create_group(f"tables/{model}_tiles")
        table.create_array("X", data=features if model == "uni" else features[:, :3])
        table.create_group("obs")
        for axis, name in enumerate("xy"):
            table["obs"].create_array(name, data=coords[:, axis])
    with pytest.raises(SlideFailure, match="holds features in conch_tiles, uni_tiles"):
        opened(tmp_path / "a.zarr")
    found, read = opened(tmp_path / "a.zarr", "wsidata", {"features": "uni"})
    assert (found.tile, found.stride, found.tile_px, found.mpp, found.encoder) == (448, 448, 224, 0.5, "uni")
    np.testing.assert_array_equal(read, features)
    np.testing.assert_array_equal(found.coords, coords)


def test_plain_arrays(tmp_path: Path, features: np.ndarray):
    import zarr

    coords = other.grid_coords(N, 10)
    np.save(tmp_path / "a.npy", features)
    np.savez(tmp_path / "a.npz", features=features, coords=coords)
    np.savez(tmp_path / "b.npz", vectors=features, place=coords)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["group/vectors"], file["group/place"] = features.astype(np.float64), coords
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.create_array("features", data=features)
    group.create_array("coords", data=coords)
    named = {"features": "vectors", "coords": "place"}
    deep = {"features": "group/vectors", "coords": "group/place"}
    for name, mapping in [("a.npy", {}), ("a.npz", {}), ("b.npz", named), ("a.h5", deep), ("a.zarr", {})]:
        found, read = opened(tmp_path / name, "plain", mapping)
        np.testing.assert_array_equal(read, features, err_msg=name)
        assert read.dtype == np.float32
        if name != "a.npy":
            np.testing.assert_array_equal(found.coords, coords, err_msg=name)


def test_what_is_stored_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: np.ndarray):
    monkeypatch.setattr("slidemake.interchange.features.BLOCK", 4 * D * 2)
    path = other.write_trident(tmp_path / "a.h5", features, other.grid_coords(N, 512))
    with open_features(path) as found:
        blocks = list(found.blocks())
    assert [len(block) for block in blocks] == [2, 2, 2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), features)


def bad_files(folder: Path, features: np.ndarray) -> dict[str, tuple[Path, str]]:
    """{what is wrong: (file, words of its refusal)}."""
    import torch

    coords = other.grid_coords(N, 512)
    whole = other.write_trident(folder / "whole.h5", np.tile(features, (400, 40)), np.tile(coords, (400, 1)))
    made = {"empty": (folder / "e.h5", "empty")}
    made["empty"][0].write_bytes(b"")
    made["truncated"] = (folder / "t.h5", "truncated")
    made["truncated"][0].write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    made["no HDF5"] = (folder / "text.h5", "no HDF5")
    made["no HDF5"][0].write_text("features")
    made["counts"] = (other.write_trident(folder / "n.h5", features, coords[:-2]), "9 tiles and coordinates of 7")
    made["a vector"] = (other.write_trident(folder / "v.h5", features[0], coords[:1]), "one vector of 5")
    made["words"] = (other.write_trident(folder / "w.h5", features.astype("S8"), coords), "no numbers")
    made["pickle"] = (folder / "p.pkl", "could run code")
    made["pickle"][0].write_bytes(pickle.dumps({"features": [1]}))
    made["pickle in pt"] = (folder / "p.pt", "could run code")
    torch.save({"features": Path("x")}, made["pickle in pt"][0])
    made["pickle in npy"] = (folder / "p.npy", "could run code")
    np.save(made["pickle in npy"][0], np.array([{1: 2}], dtype=object), allow_pickle=True)
    made["half a pt"] = (folder / "h.pt", "does not load")
    torch.save(torch.zeros(400, 400), folder / "full.pt")
    made["half a pt"][0].write_bytes((folder / "full.pt").read_bytes()[:5000])
    made["half an npz"] = (folder / "h.npz", "no whole NumPy file")
    np.savez(folder / "full.npz", features=features)
    made["half an npz"][0].write_bytes((folder / "full.npz").read_bytes()[:100])
    made["other names"] = (folder / "o.h5", "no known layout")
    with h5py.File(made["other names"][0], "w") as file:
        file["a"], file["b"] = features, features
    made["another kind"] = (folder / "x.docx", "no known kind")
    made["another kind"][0].write_text("x")
    return made


def test_bad_files_are_refused_in_words(tmp_path: Path, features: np.ndarray):
    for what, (path, words) in bad_files(tmp_path, features).items():
        with pytest.raises(SlideFailure, match=words) as caught:
            opened(path)
        assert caught.value.code == "wrong_features", what


def test_another_tool_than_declared(tmp_path: Path, features: np.ndarray):
    path = other.write_trident(tmp_path / "a.h5", features, other.grid_coords(N, 512))
    with pytest.raises(SlideFailure, match=r"layout of trident, and features\.format says stamp"):
        opened(path, "stamp")


def test_no_code_of_a_pickle_runs(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    import torch

    torch.save(Bomb(), tmp_path / "a.pt")
    with pytest.raises(SlideFailure):
        opened(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_spacing():
    assert spacing(other.grid_coords(9, 224).astype(float)) == 224
    assert spacing(np.zeros((1, 2))) is None
    assert spacing(np.zeros((0, 2))) is None
