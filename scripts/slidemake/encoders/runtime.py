"""Make a loaded encoder fast on the machine at hand, and say what was done.

On the CPU an allocator that keeps freed memory, instead of returning it to the kernel after every layer, counts most. A
convolutional encoder then gains from channels-last memory and from a traced and frozen graph in which batch
normalisation is folded into the convolutions, and activations are computed by them. Both those convolutions and the
linear layers of transformers go through oneDNN: by itself PyTorch takes it for some of them only, depending on the size
of the batch, and MKL for the rest (see `linear`). On CUDA: channels-last, autocast and, on request, torch.compile.
What each of these gains: docs/performance.md.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from slidemake.core.onednn import use_onednn

log = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
AGREEMENT = 1e-3  # largest difference between traced and eager features, relative to the largest feature
PROBES = (1, 3)  # tiles in the batches on which that is looked at


def effective_precision(precision: str | None, recorded: str, device: torch.device) -> str:
    """Precision that will run: the one asked for; for None and "auto" the record's on a GPU and fp32 on the CPU.

    ValueError on the CPU for fp16 and tf32, which nobody evaluated there, and for bf16 where the processor has no units
    for it: it is emulated then, and slower than fp32.
    """
    automatic = recorded if device.type == "cuda" else "fp32"
    chosen = automatic if precision in (None, "auto") else str(precision)
    if chosen not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {chosen!r}")
    if device.type == "cpu":
        if chosen in ("fp16", "tf32"):
            raise ValueError(
                f"{chosen} needs a GPU, and this job has none. Run where there is one; or set embedding.precision: "
                "fp32 (or bf16), with which features that are there in another precision are computed anew"
            )
        if chosen == "bf16" and not has_bf16():
            raise ValueError(
                "this processor has no units for bf16 (AVX512_BF16 or AMX) and would emulate it, slower than fp32: use "
                "fp32, a GPU, or another processor"
            )
    return chosen


def has_bf16() -> bool:
    """Whether this processor computes in bf16 by itself: AVX512_BF16 or AMX."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Context in which the model runs: autocast for fp16 and bf16, nothing for fp32 and tf32."""
    if PRECISIONS[precision] == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def allow_tf32(allowed: bool) -> None:
    """Whether this process's GPU may multiply float32 numbers with 10 bits of their mantissa (TF32).

    PyTorch does so in convolutions and not in products of matrices; here fp32 never does, and tf32 does in both.
    """
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def cast_weights(model: nn.Module, device: torch.device, precision: str, input_px: int) -> int:
    """Give linear and convolution layers their weights in `precision` once, where autocast would cast them for every
    batch: the same bits, half of the memory. Returns how many layers; 0 where features would differ in any bit, and
    then nothing is changed.
    """
    dtype = PRECISIONS[precision]
    layers = [module for module in model.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    if dtype == torch.float32 or not layers:
        return 0
    batch = probe(2, input_px, device)
    with autocast(device, precision):
        expected = model(batch)
    kept = [[(name, weight.data) for name, weight in layer.named_parameters(recurse=False)] for layer in layers]
    for layer in layers:
        layer.to(dtype)
    try:
        with autocast(device, precision):
            same = torch.equal(model(batch), expected)
    except RuntimeError as error:  # a layer whose weights are used beside autocast
        log.debug("weights are cast with every batch: %s", error)
        same = False
    if same:
        return len(layers)
    for layer, weights in zip(layers, kept, strict=True):
        for name, weight in weights:
            getattr(layer, name).data = weight
    return 0


@torch.inference_mode()
def accelerate(
    model: nn.Module, device: torch.device, input_px: int, precision: str = "fp32", *, compile_model: bool = False
) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """Move `model` to `device` and make it fast: -> (callable of the same signature, name of the path).

    Path names: "traced" (CPU, fp32, a model with batch normalisation whose traced form agrees with the eager one to
    `AGREEMENT` on two probe batches of different size), "onednn" (CPU, fp32, linear layers through oneDNN), "compiled"
    (on request), otherwise "eager". On a GPU all of it is there when this returns, whichever stream uses it.
    `input_px` is the side of the square input. `model` must be a module (B, 3, px, px) float32 -> (B, D).
    """
    model = model.eval().to(device=device)
    if not isinstance(model, torch.jit.ScriptModule):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    script = isinstance(model, torch.jit.ScriptModule)
    if device.type == "cuda":
        allow_tf32(precision == "tf32")
    if not script:
        cast_weights(model, device, precision, input_px)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # weights were laid out anew in the default stream, which others do not wait for
    if compile_model and not script:
        return torch.compile(model, dynamic=False), "compiled"  # the engine gives it batches of one shape only
    if device.type == "cuda" or precision != "fp32" or script:
        return model, "eager"
    layers = use_onednn(model) if torch.backends.mkldnn.is_available() else 0
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return _traced(model, device, input_px)
    return model, "onednn" if layers else "eager"


def _traced(model: nn.Module, device: torch.device, input_px: int) -> tuple[Callable, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TracerWarning: control flow on shapes; the probes below decide
            traced = torch.jit.freeze(torch.jit.trace(model, probe(2, input_px, device), check_trace=False))
        if torch.backends.mkldnn.is_available():
            _convolve_through_onednn(traced.graph)
        # The executor profiles the first calls and optimises the later ones: ask twice, the last answer counts.
        for count in PROBES:
            batch = probe(count, input_px, device)
            expected = model(batch)
            for _ in range(2):
                got = traced(batch)
            difference = relative_difference(got, expected)
            if not difference <= AGREEMENT:
                log.warning("traced model differs from eager by %.1e: running eager", difference)
                return model, "eager"
    except (RuntimeError, torch.jit.TracingCheckError) as error:
        log.warning("model cannot be traced (%s): running eager", str(error).strip().splitlines()[-1])
        return model, "eager"
    return traced, "traced"


_CONVOLUTION = "%x, %w, %b, %stride, %pad, %dilation, %transposed, %out, %groups, %bench, %fixed, %cudnn, %tf32"
_POINTWISE = "%x, %w, %b, %pad, %stride, %dilation, %groups, %name, %numbers, %algorithm"
# activation after the convolution in the graph, its arguments, its name in oneDNN
_ACTIVATIONS = (
    ("hardtanh_", ", %low, %high", "hardtanh"),  # ReLU6
    ("hardtanh", ", %low, %high", "hardtanh"),
    ("relu_", "", "relu"),
    ("relu", "", "relu"),
    ("", "", "none"),
)


def _convolve_through_onednn(graph: torch._C.Graph) -> None:
    """Let oneDNN do every convolution of a frozen graph, with the activation that follows it, in place."""
    convolutions = [node for node in graph.nodes() if node.kind() == "aten::_convolution"]
    if any(node.inputsAt(6).toIValue() for node in convolutions):
        return  # transposed convolutions take other weights
    for activation, arguments, name in _ACTIVATIONS:
        after = f"%z = aten::{activation}(%y{arguments})" if activation else ""
        pattern = f"""graph({_CONVOLUTION}{arguments}):
            %y = aten::_convolution({_CONVOLUTION})
            {after}
            return ({"%z" if activation else "%y"})"""
        replacement = f"""graph({_CONVOLUTION}{arguments}):
            %name : str = prim::Constant[value="{name}"]()
            %numbers : Scalar?[] = prim::ListConstruct({arguments.lstrip(", ")})
            %algorithm : NoneType = prim::Constant()
            %z : Tensor = mkldnn::_convolution_pointwise({_POINTWISE})
            return (%z)"""
        torch._C._jit_pass_custom_pattern_based_rewrite_graph(pattern, replacement, graph)


def probe(count: int, px: int, device: torch.device) -> torch.Tensor:
    """Seeded noise (count, 3, px, px) float32, channels-last, of about unit variance."""
    noise = torch.randn((count, 3, px, px), generator=torch.Generator().manual_seed(count))
    return noise.to(device).contiguous(memory_format=torch.channels_last)


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """max |got - expected| / max |expected|; NaN where either is not finite, infinity where shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-12))
