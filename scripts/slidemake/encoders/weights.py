"""Weights files of encoders: reading them, and renaming their tensors to the names that timm uses.

No pickle is executed: safetensors, or `torch.load(weights_only=True)`. Every layout is renamed by explicit rules and
loaded strictly, so a file that does not belong to the record is an error and never a half-random model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from slidemake.core.failures import RunError
from slidemake.encoders.registry import EncoderRecord
from slidemake.stores.state_dicts import StateDict, read_state_dict

# EfficientNet-Lite0: how many blocks timm has in each of its stages; the file counts them through.
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
# A classifier is no part of an encoder.
_CLASSIFIERS = ("head.", "fc.", "classifier.")


# ------------------------------------------------------------------------------------------------- layouts


def lite0_to_timm(state: StateDict) -> StateDict:
    """EfficientNet-Lite0 as the package of the default encoder names it -> timm's tf_efficientnet_lite0.

    `_blocks.5._expand_conv` becomes `blocks.3.0.conv_pw`: blocks are counted per stage, and a block's convolutions
    and batch norms are named in order. The first stage has no expansion, so its names are shifted by one.
    """
    places = [(stage, index) for stage, count in enumerate(_LITE0_STAGES) for index in range(count)]
    stem = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            stage, index = places[int(parts[1])]
            names = plain if stage == 0 else inverted
            renamed[f"blocks.{stage}.{index}.{names[parts[2]]}.{parts[3]}"] = value
        else:
            renamed[f"{stem[parts[0]]}.{parts[1]}"] = value
    return renamed


_HF_DINOV2 = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.mlp\.weights_in\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.mlp\.weights_out\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.layer\.(\d+)\.(norm1|norm2|mlp)\.", r"blocks.\1.\2."),
)
_HF_VIT = (
    *_HF_DINOV2[:4],
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
)
_HF_QKV = re.compile(r"^encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)$")


def _hf_to_timm(state: StateDict, rules: tuple[tuple[str, str], ...]) -> StateDict:
    renamed: StateDict = {}
    qkv: dict[str, StateDict] = {}
    for key, value in state.items():
        key = re.sub(r"^(vit|dinov2)\.", "", key)
        if key == "embeddings.mask_token" or key.startswith("pooler."):
            continue  # of pretraining only
        if match := _HF_QKV.match(key):
            block, which, kind = match.groups()
            qkv.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[which] = value
            continue
        for pattern, replacement in rules:
            key, hits = re.subn(pattern, replacement, key)
            if hits:
                break
        renamed[key] = value
    for key, parts in qkv.items():
        if set(parts) == {"query", "key", "value"}:
            renamed[key] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return renamed


def hf_dinov2_to_timm(state: StateDict) -> StateDict:
    """transformers' Dinov2Model -> timm: query, key and value become one matrix, SwiGLU's weights_in is fc1."""
    return _hf_to_timm(state, _HF_DINOV2)


def hf_vit_to_timm(state: StateDict) -> StateDict:
    """transformers' ViTModel (as saved before version 5) -> timm."""
    return _hf_to_timm(state, _HF_VIT)


def dinov2_to_timm(state: StateDict) -> StateDict:
    """Facebook's DINOv2 -> timm, whose registers have no position: the class token takes its own position with it."""
    renamed = {}
    for key, value in state.items():
        if key == "mask_token":
            continue
        key = "reg_token" if key == "register_tokens" else key
        renamed[key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = value
    if "reg_token" in renamed:
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


_HEADS = ("dino_head.", "ibot_head.", "head.", "decoder.", "student.")


def teacher_to_timm(state: StateDict) -> StateDict:
    """A checkpoint of self-supervised training whose network has timm's names: prefixes and projection heads go."""
    found = {}
    for key, value in state.items():
        for prefix in ("teacher.", "module.", "backbone.", "encoder."):
            key = key.removeprefix(prefix)
        if not key.startswith(_HEADS):
            found[key] = value
    return found


def dinov2_teacher_to_timm(state: StateDict) -> StateDict:
    """The same of DINOv2's own training, whose blocks may be in chunks (`blocks.1.12.`, counted through)."""
    found = teacher_to_timm(state)
    return dinov2_to_timm({re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): v for key, v in found.items()})


def conch_to_tower(state: StateDict) -> StateDict:
    """CONCH's file -> `ConchTower`: the vision tower's `visual.` tensors but for the captioning pooler."""
    tower = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    return {key: value for key, value in tower.items() if not key.startswith(("attn_pool_caption.", "ln_caption."))}


_LAYOUTS: dict[str, Callable[[StateDict], StateDict]] = {
    "timm": dict,
    "efficientnet_lite": lite0_to_timm,
    "hf_dinov2": hf_dinov2_to_timm,
    "hf_vit": hf_vit_to_timm,
    "dinov2": dinov2_to_timm,
    "conch": conch_to_tower,
    "teacher": teacher_to_timm,
    "dinov2_teacher": dinov2_teacher_to_timm,
}


# ------------------------------------------------------------------------------------------------- loading


def load_into(model: nn.Module, record: EncoderRecord, path: Path) -> None:
    """Fill `model` (built from the record, on the meta device or not) with the file's tensors, as float32, strictly.

    RunError names the first missing, unexpected and misshapen tensors.
    """
    state = read_state_dict(path, safetensors_only=record.loader == "safetensors")
    try:
        state = _LAYOUTS[record.layout](state)
    except (KeyError, IndexError) as error:
        raise RunError(
            _misfit(record, path, [f"a tensor that layout {record.layout} does not have: {error}"])
        ) from error
    wanted = model.state_dict()
    state = {k: v for k, v in state.items() if k in wanted or not k.startswith(_CLASSIFIERS)}
    for key, value in wanted.items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.zeros((), dtype=value.dtype))  # some files leave it out; it is not used
    _resample_position(model, record, state, wanted)
    problems = [f"missing: {key}" for key in sorted(set(wanted) - set(state))[:3]]
    problems += [f"unexpected: {key}" for key in sorted(set(state) - set(wanted))[:3]]
    both = sorted(set(state) & set(wanted))
    misshapen = [key for key in both if state[key].shape != wanted[key].shape]
    problems += [f"shape of {k}: {tuple(state[k].shape)}, not {tuple(wanted[k].shape)}" for k in misshapen[:3]]
    if problems:
        raise RunError(_misfit(record, path, problems))
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    model.load_state_dict(state, strict=True, assign=True)


def _resample_position(model: nn.Module, record: EncoderRecord, state: StateDict, wanted: StateDict) -> None:
    """Fit a position embedding of another image size, where the record allows it: bicubic, as timm does it, or as
    transformers does (`hf`: not antialiased).
    """
    key = "pos_embed"
    if not record.resample_position or key not in state or state[key].shape == wanted[key].shape:
        return
    from timm.layers import resample_abs_pos_embed

    prefix = 0 if getattr(model, "no_embed_class", False) else record.prefix_tokens
    grid = list(model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
    if record.resample_position == "hf":
        table = state[key].float()
        side = round((table.shape[1] - prefix) ** 0.5)
        patches = table[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        fitted = nn.functional.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        state[key] = torch.cat([table[:, :prefix], fitted.permute(0, 2, 3, 1).flatten(1, 2)], 1)
        return
    state[key] = resample_abs_pos_embed(state[key].float(), new_size=grid, num_prefix_tokens=prefix)


def _misfit(record: EncoderRecord, path: Path, problems: list[str]) -> str:
    return (
        f"{path} does not fit encoder {record.key} ({record.architecture}, layout {record.layout}): "
        f"{'; '.join(problems)}. Is it the right file, and does the record's layout describe it?"
    )
