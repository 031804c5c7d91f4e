"""A ready encoder from a record: weights found, checked, loaded strictly, and made fast.

encoder = load_encoder(load_record("virchow2"), "cuda")
features = encoder.forward(tiles)          # (B, 3, H, W) uint8 -> (B, 2560) float32
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slidemake.core.failures import RunError
from slidemake.encoders import registry as encoders
from slidemake.encoders.access import resolve_weights
from slidemake.encoders.architectures import Pooled, build_trunk, network_dim
from slidemake.encoders.preprocess import Preprocess, StainHook
from slidemake.encoders.registry import EncoderRecord
from slidemake.encoders.runtime import accelerate, autocast, effective_precision
from slidemake.encoders.weights import load_into
from slidemake.jobs.memory import keep_freed_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    """A warm model on its device. `identity` is what embedding stores and model bundles keep of it."""

    record: EncoderRecord
    model: Callable[[torch.Tensor], torch.Tensor]
    preprocess: Preprocess
    device: torch.device
    precision: str  # what really runs: fp32 | tf32 | fp16 | bf16
    path_name: str  # "traced", "onednn", "compiled" or "eager"
    weights_sha256: str
    identity: dict[str, Any]

    @torch.inference_mode()
    def forward(self, batch: torch.Tensor, stain: StainHook | None = None) -> torch.Tensor:
        """(B, 3, H, W) uint8 tiles, on any device -> (B, dim) float32 on `self.device`. B = 0 is legal.

        A (B, H, W, 3) array permuted to (B, 3, H, W) is passed as it is: that is the channels-last memory that
        convolutions like best. `stain`, if given, gets the uint8 batch on the device and returns it as floats 0..255.
        Raises torch.OutOfMemoryError as it comes: the caller halves its batch.
        """
        if not batch.shape[0]:
            return torch.zeros((0, self.record.dim), device=self.device)
        # the copy overlaps with computation only from pinned memory; otherwise non_blocking changes nothing
        x = self.preprocess(batch.to(self.device, non_blocking=True), stain)
        with autocast(self.device, self.precision):
            features = self.model(x.contiguous(memory_format=torch.channels_last))
        return features.float()

    __call__ = forward


def load_encoder(
    record: EncoderRecord,
    device: str | torch.device = "cpu",
    precision: str | None = None,
    *,
    compile_model: bool = False,
) -> Encoder:
    """Find, verify and load the record's weights on `device`; -> a warm `Encoder`.

    `precision`: fp32, tf32, fp16 or bf16; None or "auto" is the record's own on a GPU and fp32 on the CPU. On the CPU
    the C library's allocator is tuned for the whole process (`memory.keep_freed_memory`). RunError when weights are
    missing, are not those of the record (sha256, names or shapes of tensors), or give features of another width.
    """
    device = torch.device(device)
    try:
        precision = effective_precision(precision, record.precision, device)
    except ValueError as error:
        raise RunError(f"Encoder {record.name}: {error}.") from error
    if device.type == "cpu":
        keep_freed_memory()
    path = resolve_weights(record)
    sha = verified_sha256(record, path) if path else encoders.weights_sha256(None)
    model = build_model(record, path)
    fast, path_name = accelerate(model, device, record.crop, precision, compile_model=compile_model)
    identity = encoders.identity(record, sha, precision)
    log.info("encoder %s on %s in %s (%s), %d numbers per tile", record.name, device, precision, path_name, record.dim)
    return Encoder(
        record=record,
        model=fast,
        preprocess=Preprocess(record).to(device),
        device=device,
        precision=precision,
        path_name=path_name,
        weights_sha256=identity["weights_sha256"],
        identity=identity,
    )


def verified_sha256(record: EncoderRecord, path: Path) -> str:
    """Hash of the weights file; RunError if the record expects another."""
    sha = encoders.weights_sha256(path)
    if record.source.sha256 and sha != record.source.sha256:
        raise RunError(
            f"Encoder {record.key}: {path} has sha256 {sha}, the record expects {record.source.sha256}. It is damaged "
            f"or another version: replace it, or change encoders.{record.key}.source.sha256 if you trust it."
        )
    return sha


def build_model(record: EncoderRecord, path: Path | None) -> nn.Module:
    """The record's network with the weights of `path` (None: seeded random ones) on the CPU, float32, frozen."""
    if record.loader == "torchscript":
        model: nn.Module = Pooled(_torchscript(record, path), record)
        _check_dim(model, record)
        return model.eval().requires_grad_(False)
    # Built without memory, then given the file's tensors: 1.1 billion parameters are in memory once, not twice.
    with torch.device("meta"):
        model = Pooled(build_trunk(record), record)
        _check_dim(model, record)
    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(record.source.seed)
            model = Pooled(build_trunk(record), record)
    else:
        load_into(model.trunk, record, path)
        left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
        if left:
            raise RunError(f"Encoder {record.key}: {path} leaves {', '.join(left[:3])} without values.")
    return model.eval().requires_grad_(False)


def _torchscript(record: EncoderRecord, path: Path | None) -> torch.jit.ScriptModule:
    if path is None:
        raise RunError(f"encoders.{record.key}: loader torchscript needs a file, not random weights.")
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"Encoder {record.key}: {path} is not a TorchScript module ({reason}).") from error


def _check_dim(model: nn.Module, record: EncoderRecord) -> None:
    found = network_dim(model, record)
    if found != record.dim:
        raise RunError(
            f"Encoder {record.name}: its record says {record.dim} numbers per tile, its network gives {found}. "
            f"Correct encoders.{record.key}.variants.{record.variant}."
        )
