"""The embedding path on a GPU, in one short run: python benchmarks/gpu.py [--out gpu.json] [--budget 420]

Sections: machine, then for UNI, Virchow2 and H-optimus-1 (random weights: speed and rounding do not depend on them)
the model alone, store to embedding beside it (bar 0.95), cores that spin, one slot beside two, features beside fp32 on
the CPU; then out of memory, a fault in the middle of a rack, the stain transform, training. Each section stands alone:
an error or a spent budget costs that section only. --dry runs all of it on the CPU with a tiny network, to see that it
runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from slidemake.core.failures import RunError
from slidemake.embedding import forward as on_device
from slidemake.embedding.engine import SlideJob
from slidemake.embedding.stage import Lane, process_rack, stain_description
from slidemake.encoders.architectures import Pooled, build_trunk
from slidemake.encoders.loading import Encoder
from slidemake.encoders.preprocess import Preprocess
from slidemake.encoders.registry import EncoderRecord, identity, load_record, registry
from slidemake.encoders.runtime import accelerate, autocast
from slidemake.jobs.memory import keep_freed_memory
from slidemake.jobs.racks import run_rack
from slidemake.stores.arrays import read_array, write_array, write_group
from slidemake.stores.integrity import seal
from slidemake.stores.tile_store import TileCodec, create_store, shard_path, write_shard

ENCODERS = ("uni", "virchow2", "h_optimus_1")
BAR = 0.95  # store to embedding, of the model alone
COSINE = 0.999  # of features in half precision with those in fp32 on the CPU
SHARD = 256


@dataclass
class Check:
    """What a run shares: the device, a folder for stores, the clock, and the rows found so far."""

    dry: bool
    work: Path
    budget: float
    began: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda:0"

    @property
    def threads(self) -> int:
        return 2 if self.dry else min(8, os.cpu_count() or 1)

    def row(self, section: str, name: str, value: Any, ok: bool | None = None) -> None:
        """Keep a figure; `ok`: whether it reaches its bar, None where there is none."""
        self.rows.append({"section": section, "name": name, "value": value, "ok": ok})
        verdict = "" if ok is None else " ok" if ok else " BELOW ITS BAR"
        print(f"[{time.monotonic() - self.began:5.0f} s] {section}: {name}: {value}{verdict}", flush=True)

    def timed(self, work: Callable[[], Any], turns: int = 5) -> float:
        """Median seconds of a call, after two that are not counted."""
        found = []
        turns = 1 if self.dry else turns
        for turn in range(2 + turns):
            began = time.perf_counter()
            work()
            if not self.dry:
                torch.cuda.synchronize()
            if turn > 1:
                found.append(time.perf_counter() - began)
        return float(np.median(found))


def record_of(check: Check, key: str) -> EncoderRecord:
    """A record with random weights; in a dry run a transformer with one small layer in its place."""
    known = registry()
    record = replace(load_record(key, known), source=load_record("random_resnet18", known).source)
    if not check.dry:
        return record
    small = {"architecture": "vit_tiny_patch16_224", "arguments": {"depth": 1, "img_size": 32}, "dim": 192}
    return replace(record, **small, resize=32, crop=32, prefix_tokens=1, pooling="cls", precision="bf16")


def random_network(record: EncoderRecord, device: str) -> torch.nn.Module:
    """The record's network with weights drawn on the device: a billion of them take no time there."""
    with torch.device("meta"):
        network = Pooled(build_trunk(record), record)
    network = network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor.data.normal_(0, 0.02, generator=generator)
        else:
            tensor.data.fill_(1.0 if name.endswith(("weight", "running_var", "gamma")) else 0.0)
    return network.eval().requires_grad_(False)


def encoder_of(check: Check, record: EncoderRecord, network: torch.nn.Module, precision: str) -> Encoder:
    """As `load_encoder` leaves one."""
    device = torch.device(check.device)
    model, path = accelerate(network, device, record.crop, precision)
    known = identity(record, "random", precision)
    return Encoder(record, model, Preprocess(record).to(device), device, precision, path, "random", known)


def tile_stores(check: Check, px: int) -> list[tuple[Path, int]]:
    """(store, tiles) of drawn texture (JPEG 90, 4:4:4), as tiling writes them; the same files for all encoders."""
    slides, tiles = (2, 20) if check.dry else (3, 2048)
    codec, rng = TileCodec(), np.random.default_rng(0)
    coarse = np.kron(rng.normal(190, 25, (px // 4 + 1, px // 4 + 1, 3)), np.ones((4, 4, 1)))[:px, :px]
    base = np.clip(coarse + rng.normal(0, 6, (px, px, 3)), 0, 255)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        drawn = (np.roll(base, (k * 5 % px, k * 11 % px), (0, 1)).astype(np.uint8) for k in range(64))
        blobs = list(pool.map(codec.encode, drawn))
    made = []
    for slide in range(slides):
        path = check.work / "tiles" / f"{px}" / f"s{slide}.zarr"
        made.append((path, tiles))
        if path.exists():
            continue
        group = create_store(path, tiles, px, codec, SHARD)
        for shard in range(-(-tiles // SHARD)):
            numbers = range(shard * SHARD, min(tiles, (shard + 1) * SHARD))
            write_shard(shard_path(path, shard), [blobs[(k * 13 + slide) % 64] for k in numbers], SHARD)
        write_array(path, "coords", np.stack([np.arange(tiles) * px, np.zeros(tiles)], 1).astype(np.int32))
        about = {"format": "slidemake-tiles", "format_version": 1, "slide_id": f"s{slide}", "fingerprint": f"t{slide}"}
        about |= {"store": "pixels", "tile_px": px, "codec": codec.as_dict(), "shard_tiles": SHARD, "identity": "x"}
        about |= {"grid": f"{px}px_0.5mpp", "mpp": {"requested": 0.5}, "tile_level0_px": [px, px], "stride_px": px}
        about |= {"resampling": "none", "pixels": "scanned"}
        write_group(path, {**dict(group.attrs), **about})
        seal(path)
    return made


@dataclass(frozen=True)
class Embedded:
    """Tiles and cores' worth of processor per second of wall time; what became of each slide; features of the first."""

    rate: float
    cores: float
    statuses: list[str]
    features: np.ndarray | None


def embedded(check: Check, encoder: Any, batch: int) -> Embedded:
    """All stores through the embedding stage itself."""
    out, made = check.work / "embeddings", tile_stores(check, encoder.record.tile_px)
    shutil.rmtree(out, ignore_errors=True)
    records = [{"slide_id": f"s{k}", "status": "ok", "tiles": n, "failure": None} for k, (_, n) in enumerate(made)]

    def job(record: dict[str, Any]) -> SlideJob:
        name = record["slide_id"]
        store = made[int(name[1:])][0]
        return SlideJob(name, store, out / f"{name}.zarr", None, stain_description(None), f"f{name}", {})

    run = partial(run_rack, "embed", check.work / "manifest.json", rack="r0", background=True)
    processor, wall = time.process_time(), time.perf_counter()
    lanes, device = [Lane(lambda: encoder, job, run)], check.device
    (done,) = process_rack(records, lanes, device=device, dtype="float16", batch_size=batch, threads=check.threads)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    statuses = [str((r["failure"] or {}).get("code", "ok")) for r in done]
    features = read_array(out / "s0.zarr", "features") if statuses[0] == "ok" else None
    return Embedded(sum(n for _, n in made) / wall, processor / wall, statuses, features)


def lowest_cosine(one: Any, two: Any) -> float:
    one, two = (torch.as_tensor(np.asarray(x, np.float32)) for x in (one, two))
    return round(float(torch.nn.functional.cosine_similarity(one, two).min()), 6)


def machine(check: Check) -> None:
    check.row("machine", "torch, device, cores", [torch.__version__, check.device, os.cpu_count()])
    if check.dry:
        return
    check.row("machine", "GPU", torch.cuda.get_device_name(0))
    a, b = (torch.randn(8192, 8192, device=check.device, dtype=torch.bfloat16) for _ in range(2))
    check.row("machine", "bf16 8192^3, TFLOP/s", round(2 * 8192**3 / check.timed(lambda: a @ b) / 1e12))


def one_encoder(check: Check, key: str) -> None:
    """Speed of the stage beside the model's own, and what the precision costs."""
    record, batch = record_of(check, key), 8 if check.dry else 128
    network = random_network(record, check.device)
    reference = copy.deepcopy(network).cpu()
    precision = record.precision if record.precision != "fp32" else "bf16"
    encoder = encoder_of(check, record, network, precision)
    x = torch.randn(batch, 3, record.crop, record.crop, device=check.device).contiguous(
        memory_format=torch.channels_last
    )

    @torch.inference_mode()
    def alone() -> torch.Tensor:
        with autocast(encoder.device, precision):
            return encoder.model(x).float()

    own = batch / check.timed(alone)
    check.row(key, f"model alone, {precision}, tiles/s", round(own))
    embedded(check, encoder, batch)  # warms up
    two = embedded(check, encoder, batch)
    share = two.rate / own
    check.row(
        key,
        "store to embedding, tiles/s, and of the model alone",
        [round(two.rate), round(share, 3)],
        None if check.dry else share >= BAR,
    )
    check.row(key, f"cores in use, {check.threads} threads", round(two.cores, 2))
    plain, on_device.ON_GPU = on_device.ON_GPU, 1
    try:
        one = embedded(check, encoder, batch)
    finally:
        on_device.ON_GPU = plain
    same = one.features is not None and two.features is not None and np.array_equal(one.features, two.features)
    check.row(key, "one slot, tiles/s", round(one.rate))
    check.row(key, "one slot gives the same bits as two", same, same)
    few = 2 if check.dry else 4
    torch.set_num_threads(os.cpu_count() or 1)
    with torch.inference_mode():
        cosine = lowest_cosine(alone()[:few].cpu(), reference(x[:few].cpu()))
    torch.set_num_threads(1)
    check.row(key, f"{precision} beside fp32 on the CPU, lowest cosine", cosine, cosine >= COSINE)


class Tight:
    """In a dry run: an encoder whose memory holds three tiles."""

    def __init__(self, encoder: Encoder):
        self.record, self.path_name, self.identity = encoder.record, encoder.path_name, encoder.identity
        self._encoder = encoder

    def forward(self, batch: torch.Tensor, stain: Any = None) -> torch.Tensor:
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return self._encoder.forward(batch, stain)


def memory(check: Check) -> None:
    """A batch that does not fit is halved, and features are the same within what another batch size rounds."""
    record, batch = record_of(check, "uni"), 8 if check.dry else 512
    encoder = encoder_of(check, record, random_network(record, check.device), record.precision)
    want = embedded(check, encoder, batch)
    if check.dry:
        got = embedded(check, Tight(encoder), batch)
    else:
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_allocated() + (1500 << 20)
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
        try:
            got = embedded(check, encoder, batch)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    check.row("memory", f"batches of {batch} without memory for one", got.statuses, set(got.statuses) == {"ok"})
    cosine = lowest_cosine(got.features, want.features)
    check.row("memory", "lowest cosine with undisturbed features", cosine, cosine >= 0.9999)


def fault(check: Check) -> None:
    """A device that breaks in the middle of a rack, in a process of its own: nothing works in it afterwards."""
    reading, writing = multiprocessing.get_context("spawn").Pipe(False)
    process = multiprocessing.get_context("spawn").Process(target=break_device, args=(check.dry, check.work, writing))
    process.start()
    said = reading.recv() if reading.poll(180) else "nothing within 180 s"
    process.kill()
    process.join()
    check.row("fault", "a GPU that breaks in the middle of a rack", said, said.startswith("the job ends: "))


class Breaks(Tight):
    """An encoder whose device fails after three batches: on a GPU by an index that is out of range."""

    calls = 0

    def forward(self, batch: torch.Tensor, stain: Any = None) -> torch.Tensor:
        self.calls += 1
        if self.calls > 3:
            if batch.device.type == "cpu":
                raise torch.AcceleratorError("CUDA error: device-side assert triggered")
            torch.zeros(4, device=batch.device)[torch.tensor([99], device=batch.device)]
            torch.cuda.synchronize()
        return self._encoder.forward(batch, stain)


def break_device(dry: bool, work: Path, answer: Any) -> None:
    check = Check(dry, work / "fault", 180.0)
    record = replace(record_of(replace(check, dry=True), "uni"), precision="fp32")
    encoder = encoder_of(check, record, random_network(record, check.device), "fp32")
    try:
        answer.send(f"slides: {embedded(check, Breaks(encoder), 8).statuses}")
    except RunError as error:
        answer.send(f"the job ends: {error}")


def stain(check: Check) -> None:
    """The stain transform on the device, beside the CPU's."""
    from slidemake.stain.fit import StainTransform
    from slidemake.stain.on_device import apply_stain

    count = 4 if check.dry else 128
    tiles = torch.randint(0, 256, (count, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tiles = tiles.permute(0, 3, 1, 2)
    there = tiles.to(check.device)
    matrix = ((0.9, 0.05, 0.0), (0.1, 0.8, 0.1), (0.0, 0.1, 0.9))
    transform = StainTransform("macenko", "ok", "t", None, (240.0,) * 3, (235.0,) * 3, matrix)
    with torch.inference_mode():
        seconds = check.timed(lambda: apply_stain(there, transform))
        far = float((apply_stain(there[:4], transform).cpu() - apply_stain(tiles[:4], transform)).abs().max())
    check.row("stain", f"{count} tiles of 224 px, ms", round(1e3 * seconds, 2))
    check.row("stain", "largest difference from the CPU's, grey levels", round(far, 5), far < 0.01)


def training(check: Check) -> None:
    """A model of the default kind on the device and on the CPU: time of a fit, and whether both learn the same."""
    from slidemake.mil.bags import make_bags
    from slidemake.mil.fitting import DEFAULTS, fit_member
    from slidemake.mil.losses import class_objective

    patients, tiles, dim = (12, 60, 16) if check.dry else (120, 4096, 1536)
    rng = np.random.default_rng(0)
    ids = [f"p{k:03d}" for k in range(patients)]
    labels = {name: number % 2 for number, name in enumerate(ids)}
    features = rng.standard_normal((patients * tiles, dim), dtype=np.float32)
    for number in range(1, patients, 2):
        features[number * tiles : number * tiles + tiles // 8, 0] += 3.0
    bags = make_bags(features.astype(np.float16), ids, ids, [tiles] * patients, {})
    half, scores = patients // 2, {}
    for device in dict.fromkeys(("cpu", check.device)):
        settings = {**DEFAULTS, "device": device, "epochs": 12}
        objective = class_objective(labels, ids[:half], 2, settings)
        began = time.perf_counter()
        fitted = fit_member(bags, objective, ids[:half], ids[half:], settings, 0)
        seconds = time.perf_counter() - began
        scores[device] = fitted.curve[fitted.epoch - 1]["val_loss"]
        check.row("training", f"a fit on {device}, s", round(seconds, 2))
    check.row("training", "loss on held-out patients by device", {k: round(float(v), 4) for k, v in scores.items()})


def run(check: Check, only: list[str]) -> None:
    sections: dict[str, Callable[[Check], None]] = {"machine": machine}
    sections |= {key: partial(one_encoder, key=key) for key in ENCODERS}
    sections |= {"memory": memory, "fault": fault, "stain": stain, "training": training}
    for name, section in sections.items():
        if only and name not in only:
            continue
        if time.monotonic() - check.began > check.budget:
            check.row(name, "left out", "no time was left", False)
            continue
        try:
            section(check)
        except Exception as error:
            traceback.print_exc()
            check.row(name, "error", f"{type(error).__name__}: {error}", False)
        if not check.dry:
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no section is begun")
    parser.add_argument("--only", default="", help="sections, separated by commas")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="gpu_benchmark_") as folder:
        check = Check(options.dry, Path(folder), options.budget)
        run(check, [name for name in options.only.split(",") if name])
    options.out.write_text(json.dumps(check.rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
