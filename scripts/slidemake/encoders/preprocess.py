"""From uint8 tiles to what an encoder wants to see, on the device where the encoder runs.

Order: stain transform (optional) on 0..255, antialiased resize, centre crop, mean and standard deviation. The tile is
never rounded to integers in between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from slidemake.encoders.registry import EncoderRecord

StainHook = Callable[[torch.Tensor], torch.Tensor]


class Preprocess(nn.Module):
    """(B, 3, H, W) uint8 or float 0..255, H = W -> (B, 3, crop, crop) float32, normalised, same device.

    The resize is antialiased as PIL's and torchvision's are (a triangle or cubic kernel stretched to the scale); cubic
    overshoot is clipped to 0..255. A batch that is a channels-last view (a permuted (B, H, W, 3) array) stays one.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, record: EncoderRecord):
        super().__init__()
        self.resize, self.crop, self.interpolation = record.resize, record.crop, record.interpolation
        mean = torch.tensor(record.mean, dtype=torch.float64).view(1, 3, 1, 1)
        std = torch.tensor(record.std, dtype=torch.float64).view(1, 3, 1, 1)
        self.register_buffer("scale", (1.0 / (255.0 * std)).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, batch: torch.Tensor, stain: StainHook | None = None) -> torch.Tensor:
        if batch.ndim != 4 or batch.shape[1] != 3 or batch.shape[2] != batch.shape[3]:
            raise ValueError(f"tiles must be (B, 3, H, W) with H = W, not {tuple(batch.shape)}")
        x = batch.float() if stain is None else stain(batch).float()
        if x.shape[2] != self.resize and x.shape[0]:
            size = [self.resize, self.resize]
            x = nn.functional.interpolate(x, size=size, mode=self.interpolation, align_corners=False, antialias=True)
            x = x.clamp_(0.0, 255.0) if self.interpolation == "bicubic" else x
        if self.crop != self.resize:
            # torchvision's convention: an odd margin is rounded half to even
            start = round((self.resize - self.crop) / 2)
            x = x[:, :, start : start + self.crop, start : start + self.crop]
        return self._normalised(x)

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        """x * scale + shift per channel. Channels-last memory is worked on as rows of W * 3 numbers, which the CPU
        does in vectors; per pixel there are only three.
        """
        pixels = x.permute(0, 2, 3, 1)
        wide = pixels.shape[2]
        if pixels.stride()[2:] != (3, 1):
            return torch.addcmul(self.shift, x, self.scale)
        scale, shift = (v.view(3).repeat(wide) for v in (self.scale, self.shift))
        return torch.addcmul(shift, pixels.flatten(2), scale).unflatten(2, (wide, 3)).permute(0, 3, 1, 2)
