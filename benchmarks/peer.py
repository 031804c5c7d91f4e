"""A peer at the same work, in its own environment: PYTHON peer.py NAME SLIDE FOLDER, or torchmil BAGS TILES

Without arguments: prints which peers are installed. LazySlide, slide2vec and TIAToolbox embed a slide with the default
encoder's network; torchmil trains gated ABMIL on tensors in memory for an epoch, on one thread.

Prints {"tiles", "seconds", "cpu", "version"} of the part that reads tiles and runs the model; tissue, tiling and
loading the model are left out where the peer lets them be told apart (slide2vec does not: tissue and tiling, a second
or two, are in). The network is timm's tf_efficientnet_lite0 in float32 at 224 px; its weights do not matter for time.
Settings are each peer's own defaults, except that all run on the CPU. The allocator is what the environment says.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NETWORK, MEAN, STD, DIM = "tf_efficientnet_lite0", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1280
Work = Callable[[], int]  # returns the number of tiles


def network() -> Any:
    import timm

    return timm.create_model(NETWORK, num_classes=0).eval()


def lazyslide(slide: str, folder: Path) -> Work:
    import lazyslide as zs
    from torchvision.transforms import v2
    from wsidata import open_wsi

    wsi = open_wsi(slide, store=str(folder / "lazyslide.zarr"))
    zs.pp.find_tissues(wsi)
    zs.pp.tile_tissues(wsi, 224, mpp=0.5)
    model = network()

    def work() -> int:
        import torch

        steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        zs.tl.feature_extraction(wsi, model, model_name="lite0", transform=v2.Compose(steps), device="cpu", pbar=False)
        return len(wsi.shapes["tiles"])

    return work


def slide2vec(slide: str, folder: Path) -> Work:
    from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig
    from slide2vec.encoders.base import TorchTileEncoder
    from slide2vec.encoders.registry import register_encoder

    variants = {"default": {"encode_dim": DIM}}

    @register_encoder(
        "benchmark",
        output_variants=variants,
        default_output_variant="default",
        input_size=224,
        supports_variable_input_size=False,
        supported_spacing_um=0.5,
        precision="fp32",
        source="timm",
    )
    class Benchmark(TorchTileEncoder):
        def __init__(self, *, output_variant: str | None = None, **_: Any) -> None:
            super().__init__(
                network(), encode_dim=DIM, input_size=224, mean=MEAN, std=STD, output_variant=output_variant
            )

    model = Model.from_preset("benchmark", device="cpu")
    execution = ExecutionOptions(output_dir=folder / "slide2vec", num_gpus=1, precision="fp32", output_format="npz")
    pipeline = Pipeline(model=model, preprocessing=PreprocessingConfig(), execution=execution)

    def work() -> int:
        import numpy as np

        pipeline.run(slides=[slide])
        (features,) = (folder / "slide2vec" / "tile_embeddings").glob("*.npz")
        return len(np.load(features)["features"])

    return work


def tiatoolbox(slide: str, folder: Path) -> Work:
    import torch
    from tiatoolbox.models.architecture.vanilla import TimmBackbone
    from tiatoolbox.models.engine.deep_feature_extractor import DeepFeatureExtractor
    from tiatoolbox.models.engine.io_config import IOPatchPredictorConfig
    from tiatoolbox.models.models_abc import ModelABC
    from tiatoolbox.wsicore.wsireader import WSIReader

    backbone = TimmBackbone.__new__(TimmBackbone)
    ModelABC.__init__(backbone)
    backbone.feat_extract = network()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    backbone.feat_extract.register_forward_pre_hook(lambda _, args: ((args[0] / 255 - mean) / std,))
    extractor = DeepFeatureExtractor(model=backbone, verbose=False)
    settings = {"input_resolutions": [{"units": "mpp", "resolution": 0.5}], "patch_input_shape": [224, 224]}
    settings |= {"output_resolutions": [], "stride_shape": [224, 224]}
    config = IOPatchPredictorConfig(**settings)

    reader = WSIReader.open(slide, mpp=(0.5, 0.5), power=20)

    def work() -> int:
        import zarr

        out = extractor.run(
            [reader],
            patch_mode=False,
            ioconfig=config,
            device="cpu",
            output_type="zarr",
            save_dir=folder / "tiatoolbox",
            overwrite=True,
        )
        (store,) = out.values()
        return int(zarr.open_group(str(store), mode="r")["features"].shape[0])

    return work


def torchmil(bags: str, tiles: str) -> Work:
    import torch
    from torch import nn
    from torchmil.models import ABMIL

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = [torch.randn(1, int(tiles), DIM) for _ in range(int(bags))]
    width, attention, drop = 128, 64, 0.25  # slidemake's defaults
    project = nn.Sequential(nn.Linear(DIM, width), nn.ReLU(), nn.Dropout(drop))
    model = ABMIL((DIM,), att_dim=attention, gated=True, feat_ext=project).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)

    def step(index: int) -> None:
        _, losses = model.compute_loss(torch.tensor([float(index % 2)]), data[index])
        loss = sum(losses.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss.item()

    for index in range(min(3, len(data))):
        step(index)

    def work() -> int:
        for index in torch.randperm(len(data)).tolist():
            step(index)
        return len(data)

    return work


PEERS: dict[str, Any] = {"lazyslide": lazyslide, "slide2vec": slide2vec, "tiatoolbox": tiatoolbox, "torchmil": torchmil}


def cpu() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def installed() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(name: str, first: str, second: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    work = torchmil(first, second) if name == "torchmil" else PEERS[name](first, Path(second))
    before, started = cpu(), time.perf_counter()
    tiles = work()
    seconds, busy = time.perf_counter() - started, cpu() - before
    return {"tiles": tiles, "seconds": seconds, "cpu": busy, "version": importlib.metadata.version(name)}


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:]) if sys.argv[1:] else installed()))
