"""The fast paths give what the plain model gives, and say which of them ran."""

from __future__ import annotations

import platform
from functools import partial

import pytest
import timm
import torch
from slidemake.core.failures import RunError
from slidemake.encoders.loading import load_encoder
from slidemake.encoders.registry import load_record
from slidemake.encoders.runtime import (
    accelerate,
    allow_tf32,
    autocast,
    cast_weights,
    effective_precision,
    probe,
    relative_difference,
)
from slidemake.jobs.memory import keep_freed_memory

CPU = torch.device("cpu")


def resnet() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=0).eval()


def test_the_allocator_agrees_on_glibc():
    assert keep_freed_memory() is (platform.libc_ver()[0] == "glibc")
    assert keep_freed_memory() is (platform.libc_ver()[0] == "glibc")  # again is harmless


def test_a_convolutional_network_is_traced_and_agrees():
    model = resnet()
    x = probe(4, 64, CPU)
    with torch.inference_mode():
        expected = model(x.contiguous())
        fast, path = accelerate(model, CPU, 64)
        assert path == "traced"
        assert relative_difference(fast(x), expected) < 1e-4


def test_the_traced_network_repeats_itself_bit_by_bit():
    """The first calls are profiled, later ones optimised: none of it may show, whatever sizes come in between."""
    fast, _ = accelerate(resnet(), CPU, 64)
    batches = {count: probe(count, 64, CPU) for count in (1, 4, 7)}
    with torch.inference_mode():
        first = {count: fast(batch) for count, batch in batches.items()}
        for count in (7, 1, 4, 4, 1, 7):
            assert torch.equal(fast(batches[count]), first[count])


def operations(traced: torch.jit.ScriptModule) -> set[str]:
    return {node.kind() for node in traced.graph.nodes()}


def test_convolutions_go_through_onednn_with_their_activations():
    fast, _ = accelerate(resnet(), CPU, 64)
    assert "mkldnn::_convolution_pointwise" in operations(fast)
    assert not {"aten::_convolution", "aten::batch_norm"} & operations(fast)
    names = [n.inputsAt(7).toIValue() for n in fast.graph.findAllNodes("mkldnn::_convolution_pointwise")]
    assert {"relu", "none"} == set(names)


def test_an_activation_that_others_share_is_not_taken_from_them():
    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return torch.cat([torch.relu(y), torch.nn.functional.relu6(y), y], 1).mean((2, 3))

    torch.manual_seed(0)
    model, x = Branches().eval(), probe(4, 16, CPU)
    with torch.inference_mode():
        expected = model(x)
        fast, path = accelerate(model, CPU, 16)
        assert path == "traced"
        assert relative_difference(fast(x), expected) < 1e-5


def test_transposed_convolutions_are_left_alone():
    torch.manual_seed(0)
    layers = (torch.nn.ConvTranspose2d(3, 4, 2, 2), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1))
    model, x = torch.nn.Sequential(*layers, torch.nn.Flatten()).eval(), probe(4, 16, CPU)
    with torch.inference_mode():
        expected = model(x)
        fast, path = accelerate(model, CPU, 16)
        assert path == "traced"
        assert "mkldnn::_convolution_pointwise" not in operations(fast)
        assert relative_difference(fast(x), expected) < 1e-5


def test_a_transformer_has_its_linear_layers_through_onednn():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, img_size=64).eval()
    x = probe(5, 64, CPU)
    with torch.inference_mode():
        expected = model(x)
        fast, path = accelerate(model, CPU, 64)
        assert path == "onednn"
        assert relative_difference(fast(x), expected) < 1e-4


def test_a_compiled_model_agrees(monkeypatch):
    # captured as a graph with a fixed shape, but run without the code generator, which takes half a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model, x = torch.nn.Sequential(*layers).eval(), probe(4, 16, CPU)
    with torch.inference_mode():
        expected = model(x)
        fast, path = accelerate(model, CPU, 16, compile_model=True)
        assert path == "compiled"
        assert relative_difference(fast(x), expected) < 1e-5


class Moody(torch.nn.Module):
    """Its answer depends on the batch size in a way that tracing freezes."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x).mean((2, 3)) * (1.0 if len(x) < 3 else 2.0)


def test_a_network_that_does_not_trace_faithfully_runs_eager(caplog):
    model = Moody()
    fast, path = accelerate(model, CPU, 16)
    assert path == "eager"
    assert "traced model differs" in caplog.text
    x = probe(5, 16, CPU)
    with torch.inference_mode():
        assert torch.equal(fast(x), model(x))


class Untraceable(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, x):
        return {"a": [self.norm(x)], "b": {"c": 1}}["a"][0].mean((2, 3)) if not torch.jit.is_tracing() else None


def test_a_network_that_cannot_be_traced_runs_eager(caplog):
    assert accelerate(Untraceable(), CPU, 16)[1] == "eager"
    assert "cannot be traced" in caplog.text


def test_precision_follows_the_device():
    assert effective_precision(None, "fp16", CPU) == "fp32"
    assert effective_precision("auto", "fp16", torch.device("cuda:0")) == "fp16"
    assert effective_precision("fp32", "fp16", torch.device("cuda:0")) == "fp32"
    for precision in ("fp16", "tf32"):
        with pytest.raises(ValueError, match=f"{precision} needs a GPU"):
            effective_precision(precision, "fp16", CPU)
    assert effective_precision("tf32", "fp16", torch.device("cuda:0")) == "tf32"
    with pytest.raises(RunError, match="must be one of fp32, tf32, fp16, bf16, not 'int8'"):
        load_encoder(load_record("random_resnet18"), "cpu", "int8")


def test_bf16_is_refused_on_a_processor_that_emulates_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(RunError, match="no units for bf16"):
        load_encoder(load_record("random_resnet18"), "cpu", "bf16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert effective_precision("bf16", "fp16", CPU) == "bf16"


def test_only_tf32_multiplies_with_ten_bits():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (True, False):
            allow_tf32(allowed)
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_weights_cast_once_give_the_same_bits():
    """As autocast casts them for every batch: linear layers, convolutions; norms stay as they are."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, img_size=32).eval().requires_grad_(False)
    x = probe(3, 32, CPU)
    with torch.inference_mode(), autocast(CPU, "bf16"):
        expected = model(x)
    with torch.inference_mode():
        assert cast_weights(model, CPU, "fp32", 32) == 0
        assert cast_weights(model, CPU, "bf16", 32) == 1 + 4  # patch embedding; qkv, projection and two of the MLP
        assert model.blocks[0].mlp.fc1.weight.dtype == model.patch_embed.proj.bias.dtype == torch.bfloat16
        assert model.norm.weight.dtype == torch.float32
        with autocast(CPU, "bf16"):
            assert torch.equal(model(x), expected)


def test_weights_that_are_also_used_beside_autocast_stay_as_they_are():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 5)

        def forward(self, x):
            return self.layer(x.mean((2, 3))) * self.layer.weight.sum(1).exp()

    torch.manual_seed(0)
    model = Tied().eval().requires_grad_(False)
    weight = model.layer.weight.clone()
    with torch.inference_mode():
        assert cast_weights(model, CPU, "bf16", 8) == 0
    assert torch.equal(model.layer.weight, weight)


def test_bf16_on_the_cpu_is_close_to_fp32_and_says_so(monkeypatch):
    monkeypatch.setattr("slidemake.encoders.runtime.has_bf16", lambda: True)  # emulated gives the same numbers
    record = load_record("random_resnet18")
    plain, half = load_encoder(record), load_encoder(record, precision="bf16")
    assert (plain.path_name, half.path_name) == ("traced", "eager")
    assert half.identity["precision"] == "bf16"
    batch = torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    a, b = plain.forward(batch), half.forward(batch)
    assert b.dtype == torch.float32
    assert float(torch.nn.functional.cosine_similarity(a, b).min()) >= 0.999


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("key", ["random_resnet18", "efficientnet_lite0"])
def test_the_gpu_gives_what_the_cpu_gives(key):
    record = load_record(key)
    batch = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cpu, gpu = load_encoder(record).forward(batch), load_encoder(record, "cuda").forward(batch)
    assert gpu.device.type == "cuda"
    assert relative_difference(gpu.cpu(), cpu) < 1e-3
