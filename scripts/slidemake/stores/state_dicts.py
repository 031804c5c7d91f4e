"""Files of weights, read as plain tensors and never as a pickle that runs."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch

from slidemake.core.failures import RunError

StateDict = dict[str, torch.Tensor]


def read_state_dict(path: Path, safetensors_only: bool = False) -> StateDict:
    """Tensors of a .safetensors, .bin, .pt or .pth file, out of `state_dict`, `model` or `teacher`; or RunError."""
    if path.suffix == ".safetensors":
        import safetensors
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise RunError(f"{path} is not a whole safetensors file ({error}). Download it again.") from error
    if safetensors_only:
        raise RunError(f"{path}: loader safetensors reads .safetensors files only; use loader timm for {path.suffix}.")
    try:
        # mapped: 4.5 GB of weights are then not in memory twice. The old tar format cannot be mapped.
        raw = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"{path} cannot be read as plain PyTorch weights ({reason}). Download it again.") from error
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(raw, dict) and isinstance(raw.get(wrapper), dict):
            raw = raw[wrapper]
    if not isinstance(raw, dict) or not all(isinstance(value, torch.Tensor) for value in raw.values()):
        raise RunError(f"{path} holds {type(raw).__name__}, not a state dict of tensors.")
    return {key.removeprefix("module."): value for key, value in raw.items()}
