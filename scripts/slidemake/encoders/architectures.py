"""The networks behind the records: a timm trunk, or CONCH's vision tower, and a pooling of what comes out."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from slidemake.core.failures import RunError
from slidemake.encoders.registry import EncoderRecord


def timm_arguments(record: EncoderRecord) -> dict[str, Any]:
    """The record's `arguments` as timm takes them: names of layers become layers, `norm_eps` a LayerNorm with it."""
    from timm.layers import SwiGLUPacked

    arguments: dict[str, Any] = {"num_classes": 0, **record.arguments}
    if "mlp_layer" in arguments:
        layers = {"swiglu_packed": SwiGLUPacked}
        if arguments["mlp_layer"] not in layers:
            raise RunError(f"encoders.{record.key}.arguments.mlp_layer: one of {', '.join(layers)}.")
        arguments["mlp_layer"] = layers[arguments["mlp_layer"]]
    if "norm_eps" in arguments:
        arguments["norm_layer"] = partial(nn.LayerNorm, eps=float(arguments.pop("norm_eps")))
    return arguments


def build_trunk(record: EncoderRecord) -> nn.Module:
    """The record's network without weights (randomly initialised), in evaluation mode. RunError if timm cannot."""
    import timm

    arguments = timm_arguments(record)
    plain = str(record.architecture).startswith("vit_") and "dinov3" not in str(record.architecture)
    if torch.get_default_device().type == "meta" and plain:
        arguments["weight_init"] = "skip"  # there is nothing to initialise, and going through it costs most of the time
    try:
        trunk = timm.create_model(str(record.architecture), pretrained=False, **arguments)
    except (RuntimeError, TypeError) as error:
        raise RunError(f"timm cannot build encoder {record.key} ({record.architecture}): {error}") from error
    found = getattr(trunk, "num_prefix_tokens", 0)
    if found != record.prefix_tokens:
        raise RunError(
            f"encoders.{record.key}.prefix_tokens is {record.prefix_tokens}, but its network has {found} (class token "
            "and registers); a wrong number would mix registers into the mean of the patches."
        )
    return (ConchTower(trunk) if record.loader == "conch" else trunk).eval()


class ConchTower(nn.Module):
    """Vision tower of CONCH: ViT-B/16 and the attentional pooler of its contrastive branch (Lu et al. 2024; CoCa).

    One learned query (512) attends over the trunk's normalised tokens (768) with 8 heads. Attribute names are those of
    the published weights below `visual.`, so a state dict loads without renaming.
    """

    def __init__(self, trunk: nn.Module, width: int = 512, heads: int = 8):
        super().__init__()
        self.trunk = trunk
        self.attn_pool_contrast = AttentionalPooler(width, int(trunk.num_features), heads)  # type: ignore[arg-type]
        self.ln_contrast = nn.LayerNorm(width)
        self.proj_contrast = nn.Parameter(torch.randn(width, width) * width**-0.5)

    def forward(self, x: torch.Tensor, projected: bool = False) -> torch.Tensor:
        """(B, 3, 448, 448) -> (B, 512); projected: multiplied into the space shared with text, unit length."""
        tokens = self.trunk.forward_features(x)  # type: ignore[operator]
        pooled = self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0])
        return nn.functional.normalize(pooled @ self.proj_contrast, dim=-1) if projected else pooled


class AttentionalPooler(nn.Module):
    """(B, N, context) -> (B, queries, width): learned queries attend over layer-normalised tokens."""

    def __init__(self, width: int, context: int, heads: int, queries: int = 1):
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width))
        self.attn = nn.MultiheadAttention(width, heads, kdim=context, vdim=context, batch_first=True)
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(context)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.ln_k(tokens)
        query = self.ln_q(self.query).unsqueeze(0).expand(tokens.shape[0], -1, -1)
        return self.attn(query, tokens, tokens, need_weights=False)[0]


class Pooled(nn.Module):
    """A trunk and the record's pooling: (B, 3, crop, crop) float32 -> (B, dim).

    cls: the class token after the last norm. mean: mean over patch tokens, behind class token and registers.
    cls_mean: both, concatenated. avgpool: the trunk's own global pooling. stage3: mean over a ResNet's third
    stage. attention, attention_projected: CONCH. output: what a TorchScript module returns.
    """

    def __init__(self, trunk: nn.Module, record: EncoderRecord):
        super().__init__()
        self.trunk, self.pooling, self.prefix = trunk, record.pooling, record.prefix_tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pooling in ("avgpool", "attention", "output"):
            return self.trunk(x)
        if self.pooling == "attention_projected":
            return self.trunk(x, projected=True)
        if self.pooling == "stage3":
            return self._stage3(x)
        tokens = self.trunk(x) if isinstance(self.trunk, torch.jit.ScriptModule) else self.trunk.forward_features(x)  # type: ignore[operator]
        return pool_tokens(tokens, self.pooling, self.prefix)

    def _stage3(self, x: torch.Tensor) -> torch.Tensor:
        net: Any = self.trunk
        x = net.maxpool(net.act1(net.bn1(net.conv1(x))))
        return net.layer3(net.layer2(net.layer1(x))).mean(dim=(2, 3))


def pool_tokens(tokens: torch.Tensor, pooling: str, prefix: int) -> torch.Tensor:
    """(B, N, D) -> (B, D) or, for cls_mean, (B, 2 D). `prefix` tokens at the front are no patches."""
    if pooling == "cls":
        return tokens[:, 0]
    mean = tokens[:, prefix:].mean(dim=1)
    return mean if pooling == "mean" else torch.cat([tokens[:, 0], mean], dim=-1)


def network_dim(model: nn.Module, record: EncoderRecord) -> int:
    """Width of the features of `model`, found by a forward pass; on the meta device that computes nothing."""
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    with torch.inference_mode():
        out = model(torch.zeros((1, 3, record.crop, record.crop), device=device))
    if not isinstance(out, torch.Tensor) or out.ndim != 2 or out.shape[0] != 1:
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise RunError(f"Encoder {record.name}: its network returns {shape} for one tile; features must be (1, dim).")
    return int(out.shape[1])
