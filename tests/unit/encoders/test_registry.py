"""Encoder records, weights and networks: against published figures, transformers, torchvision and ImageNet's labels."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import constants, errors
from PIL import Image
from safetensors.torch import save_file
from slidemake.core.failures import RunError
from slidemake.encoders import registry as encoders
from slidemake.encoders.access import check_access, resolve_weights
from slidemake.encoders.architectures import Pooled, build_trunk, network_dim, pool_tokens
from slidemake.encoders.loading import build_model, load_encoder
from slidemake.encoders.preprocess import Preprocess
from slidemake.encoders.registry import EncoderRecord, identity, load_record, registry
from slidemake.encoders.weights import hf_vit_to_timm, lite0_to_timm, load_into
from slidemake.stores.state_dicts import read_state_dict
from torchvision import transforms

KNOWN = registry()
KEYS = sorted(KNOWN)
NAMED = ("resnet50", "uni", "uni2_h", "virchow2", "h_optimus_0", "prov_gigapath", "conch", "phikon_v2")
RANDOM = encoders.Source(kind="random", seed=1)


def every_variant() -> list[str]:
    return [f"{key}:{variant}" for key in KEYS for variant in sorted(KNOWN[key]["variants"])]


def tiles(count: int, px: int = 224, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures (count, 3, px, px) uint8, as a channels-last view."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    big = [np.asarray(Image.fromarray(picture).resize((px, px), Image.Resampling.BICUBIC)) for picture in coarse]
    return torch.from_numpy(np.stack(big)).permute(0, 3, 1, 2)


def small(name: str, **arguments: object) -> EncoderRecord:
    """The record with a network of width 96 and two blocks, everything else as it is."""
    record = load_record(name, KNOWN)
    width = {"embed_dim": 96, "depth": 2, "num_heads": 4} if record.prefix_tokens else {}
    dim = 96 * (2 if record.pooling == "cls_mean" else 1) if width and record.loader != "conch" else record.dim
    return replace(record, arguments={**record.arguments, **width, **arguments}, dim=dim, source=RANDOM)


def local(record: EncoderRecord, path: Path, sha256: str | None = None) -> EncoderRecord:
    return replace(record, source=encoders.Source(kind="file", file=str(path), sha256=sha256))


# ------------------------------------------------------------------------------------------------- records


def test_importing_the_registry_is_cheap():
    heavy = "{'torch', 'timm', 'huggingface_hub', 'jsonschema'}"
    code = f"import sys; import slidemake.encoders.registry; assert not {heavy} & set(sys.modules)"
    scripts = Path(encoders.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(scripts)})


def test_the_registry_has_what_the_field_expects():
    assert {"efficientnet_lite0", "random_resnet18", *NAMED} <= set(KEYS)
    assert load_record("efficientnet_lite0", KNOWN).grid == "224px_0.5mpp"
    assert load_record("prov_gigapath", KNOWN).grid == "256px_0.5mpp"
    assert load_record("conch", KNOWN).grid == "512px_0.5mpp"


@pytest.mark.parametrize("name", every_variant())
def test_a_record_survives_json(name):
    record = load_record(name, KNOWN)
    assert EncoderRecord.from_dict(json.loads(json.dumps(record.as_dict()))) == record


def test_variants_are_part_of_the_name():
    assert load_record("virchow2", KNOWN).name == "virchow2"
    assert load_record("virchow2:cls_mean", KNOWN).name == "virchow2"
    other = load_record("virchow2:cls", KNOWN)
    assert (other.name, other.slug, other.dim, other.pooling) == ("virchow2:cls", "virchow2-cls", 1280, "cls")
    assert identity(other, "0" * 64) != identity(load_record("virchow2", KNOWN), "0" * 64)


def test_an_unknown_encoder_or_variant_is_answered_with_the_nearest():
    with pytest.raises(RunError, match="Did you mean virchow2"):
        load_record("virchow-2", KNOWN)
    with pytest.raises(RunError, match=r"h0_mini has no variant 'cls\+mean'. Did you mean h0_mini:cls_mean"):
        load_record("h0_mini:cls+mean", KNOWN)


def test_resolution_after_the_resize_is_known():
    assert load_record("uni", KNOWN).effective_mpp == pytest.approx(0.5 * 256 / 224)  # 0.571
    assert load_record("prov_gigapath", KNOWN).effective_mpp == 0.5  # cropped, not shrunk
    assert load_record("gpfm", KNOWN).effective_mpp == pytest.approx(0.5 * 256 / 224)  # 512 px at 40x, shrunk
    assert load_record("conch_224", KNOWN).effective_mpp == pytest.approx(256 / 224)


def test_encoders_of_something_else_than_tissue_say_so():
    told = {key for key in KEYS if load_record(key, KNOWN).domain_warning}
    assert told == {f"dinobloom_{size}" for size in "sblg"}
    assert "single cells of blood and marrow" in load_record("dinobloom_s", KNOWN).domain_warning


def test_stain_advice():
    advice = {load_record(key, KNOWN).stain for key in KEYS}
    assert advice == {"allowed", "discouraged"}  # none was trained on normalised tiles


def test_contamination_is_found_by_name():
    assert encoders.contaminated(load_record("phikon_v2", KNOWN), "TCGA-BRCA, 2024 download") == ["TCGA"]
    assert encoders.contaminated(load_record("gpfm", KNOWN), "camelyon-16") == ["CAMELYON16"]
    assert encoders.contaminated(load_record("gpfm", KNOWN), "BRACS and CPTAC") == ["CPTAC", "BRACS"]
    assert encoders.contaminated(load_record("virchow2", KNOWN), "TCGA-BRCA") == []


def test_a_users_file_changes_single_keys_of_known_encoders(tmp_path):
    mine = tmp_path / "mine.yaml"
    own = {**KNOWN["uni"], "title": "ours"}
    text = {"encoders": {"virchow2": {"source": {"file": "w/virchow2.safetensors"}}, "ours": own}}
    mine.write_text(yaml.safe_dump(text))
    record = load_record("virchow2", mine)
    assert record.source.file == str(tmp_path / "w" / "virchow2.safetensors")
    assert (record.source.hub, record.dim) == ("paige-ai/Virchow2", 2560)
    assert load_record("ours", registry([encoders.REGISTRY, mine])).title == "ours"
    lite = {"encoders": {"efficientnet_lite0": {"source": {"file": "/x.pth"}}}}
    mine.write_text(yaml.safe_dump(lite))
    assert load_record("efficientnet_lite0", mine).source.sha256 is None  # the checksum was that of the other file


def test_every_problem_of_a_users_file_is_reported_at_once(tmp_path):
    mine = tmp_path / "mine.yaml"
    bad = {"virchow2": {"tile_pixels": 224, "mpp": -1}, "uni": {"variant": "clss"}, "new": {"title": "x"}}
    mine.write_text(yaml.safe_dump({"encoders": bad}))
    with pytest.raises(RunError) as error:
        registry([encoders.REGISTRY, mine])
    message = str(error.value)
    assert "Did you mean 'tile_px'?" in message
    assert "encoders.virchow2.mpp: -1" in message
    assert "encoders.new: 'source' is a required property" in message
    mine.write_text(yaml.safe_dump({"encoders": {"uni": {"variant": "clss"}}}))
    with pytest.raises(RunError, match=r"encoders.uni.variant: 'clss' is not one of cls"):
        registry([encoders.REGISTRY, mine])
    with pytest.raises(RunError, match="no encoder registry"):
        registry([tmp_path / "absent.yaml"])


# ------------------------------------------------------------------------------------------------- access


@pytest.fixture
def empty_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_gated_weights_without_a_token_say_what_to_do(empty_hub):
    with pytest.raises(RunError) as error:
        check_access(load_record("uni2_h", KNOWN))
    message = str(error.value)
    assert "\n" not in message
    for part in ("MahmoodLab/UNI2-h", "HF_TOKEN", "licence", "encoders.uni2_h.source.file", "encoders_file"):
        assert part in message


def test_offline_without_a_cached_file(empty_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE is set"):
        check_access(load_record("phikon_v2", KNOWN))


def test_a_token_whose_owner_has_not_accepted_the_licence(empty_hub, monkeypatch):
    def refuse(url, **_):
        raise errors.GatedRepoError("no", response=httpx.Response(403, request=httpx.Request("HEAD", url)))

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(RunError, match=r"refuses it \(HTTP 403.*accept the licence"):
        check_access(load_record("virchow2", KNOWN))


def test_a_hub_out_of_reach(empty_hub, monkeypatch):
    def fail(*_, **__):
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(RunError, match=r"no route to host.*connect once to download"):
        check_access(load_record("phikon_v2", KNOWN))
    with pytest.raises(RunError, match="no route to host"):
        resolve_weights(load_record("phikon_v2", KNOWN))


def test_a_cached_or_local_file_needs_no_hub(empty_hub, monkeypatch, tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, weights)
    check_access(local(load_record("uni2_h", KNOWN), weights))
    assert resolve_weights(local(load_record("uni2_h", KNOWN), weights)) == weights
    with pytest.raises(RunError, match="there is no weights file"):
        check_access(local(load_record("uni2_h", KNOWN), tmp_path / "other.safetensors"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: str(weights))
    check_access(load_record("uni2_h", KNOWN))


def test_a_package_that_is_not_installed():
    record = load_record("efficientnet_lite0", KNOWN)
    with pytest.raises(RunError, match="not-there, which is not installed"):
        check_access(replace(record, source=replace(record.source, package="not_there")))


def test_weights_that_are_on_no_hub_say_where_they_are():
    record = load_record("dinobloom_s", KNOWN)
    for ask in (check_access, resolve_weights):
        with pytest.raises(
            RunError, match=r"DinoBloom-S.pth.*Zenodo record 10908163.*encoders.dinobloom_s.source.file"
        ):
            ask(record)


def test_records_name_no_branch_that_can_move():
    """Weights of foundation models of pathology are pinned where their commit is known, and then by their checksum."""
    unpinned = {k for k in KEYS if (r := load_record(k, KNOWN)).source.kind == "hub" and not r.source.revision}
    kaiko = {"kaiko_vitb16", "kaiko_vits16", "kaiko_vits8", "kaiko_vitb8"}
    assert unpinned == kaiko | {"resnet50", "dinov2_vits14", "dinov2_vitb14", "dinov2_vitg14", "dinov3_vitb16"}
    pinned = [load_record(key, KNOWN).source for key in KEYS if load_record(key, KNOWN).source.revision]
    assert all(source.sha256 for source in pinned)


# ------------------------------------------------------------------------------------------------- networks

# Millions of parameters, from the papers and model cards; of backbones without a classifier.
PUBLISHED_SIZE = {
    "uni": 303.4,
    "uni2_h": 681.4,
    "virchow": 631.2,
    "virchow2": 631.2,
    "h_optimus_0": 1134,
    "prov_gigapath": 1134,
    "h0_mini": 85.7,
    "phikon": 85.8,
    "phikon_v2": 303.4,
    "midnight_12k": 1136,
    "lunit_vits8": 21.7,
    "dinov2_vitb14": 86,
    "mstar": 303.4,
    "path_orchestra": 303.4,
    "kaiko_vits16": 21.7,
    "kaiko_vits8": 21.7,
    "kaiko_vitb8": 85.8,
    "lunit_vits16": 21.7,
    "lunit_bt": 23.5,
    "openmidnight": 1134,
    "openpath": 1134,
    "dinov3_vitb16": 85.6,
    "resnet50": 23.5,
}
# Tensors in the published files of the timm layout.
PUBLISHED_TENSORS = {"uni2_h": 343, "virchow2": 455, "h_optimus_0": 567}


@pytest.mark.parametrize("key", KEYS)
def test_every_record_builds_at_full_size_and_gives_its_width(key):
    with torch.device("meta"):
        trunk = build_trunk(load_record(key, KNOWN))
    for variant in KNOWN[key]["variants"]:
        record = load_record(f"{key}:{variant}", KNOWN)
        assert network_dim(Pooled(trunk, record), record) == record.dim
    millions = sum(p.numel() for p in trunk.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED_SIZE.get(key, millions), rel=0.005)
    assert len(trunk.state_dict()) == PUBLISHED_TENSORS.get(key, len(trunk.state_dict()))


@pytest.mark.parametrize("key", NAMED)
def test_the_named_encoders_run_from_their_own_records(key):
    """True width, heads, registers and input; of a vision transformer's blocks two (all of them: the test above)."""
    record = load_record(key, KNOWN)
    shallow = {} if key == "resnet50" else {"depth": 2}
    record = replace(record, source=RANDOM, arguments={**record.arguments, **shallow})
    encoder = load_encoder(record)
    batch = tiles(2, record.tile_px)
    features = encoder.forward(batch)
    assert features.shape == (2, load_record(key, KNOWN).dim)
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()
    assert not torch.allclose(features[0], features[1])
    alone = encoder.forward(batch[:1])
    assert float((alone[0] - features[0]).abs().max() / features.abs().max()) < 1e-3
    assert encoder.forward(batch[:0]).shape == (0, record.dim)


def test_pooling_by_hand():
    tokens = torch.arange(14.0).view(1, 7, 2)  # class token, 4 registers, 2 patches
    assert pool_tokens(tokens, "cls", 5).tolist() == [[0, 1]]
    assert pool_tokens(tokens, "mean", 5).tolist() == [[11, 12]]
    assert pool_tokens(tokens, "cls_mean", 5).tolist() == [[0, 1, 11, 12]]


@pytest.mark.parametrize(
    ("name", "prefix"), [("virchow2", 5), ("virchow", 1), ("h0_mini:cls_mean", 5), ("midnight_12k", 1)]
)
def test_registers_stay_out_of_the_mean(name, prefix):
    """Change tokens behind the last norm: class token and registers must not move the mean, patches must."""
    record = small(name)
    model = build_model(record, None)
    shift = {}
    inner = model.trunk.forward_features
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for where in range(prefix + 1):

        def forward_features(x, where=where):
            tokens = inner(x).clone()
            tokens[:, where] += 100.0
            return tokens

        model.trunk.forward_features = forward_features
        with torch.inference_mode():
            shift[where] = (model(x) - torch.cat([inner(x)[:, 0], inner(x)[:, prefix:].mean(1)], -1))[0]
    assert torch.all(shift[0][:96] == 100)  # class token: its own half
    for where in range(prefix):
        assert torch.allclose(shift[where][96:], torch.zeros(96), atol=1e-5)
    assert torch.all(shift[prefix][96:] > 0.1)  # the first patch


def test_a_wrong_number_of_prefix_tokens_is_refused():
    with pytest.raises(RunError, match="prefix_tokens is 1, but its network has 5"):
        build_trunk(replace(small("virchow2"), prefix_tokens=1))


def test_resnet_stage3_is_timms_third_feature_map():
    record = replace(load_record("resnet50", KNOWN), source=RANDOM)
    model = build_model(record, None)
    oracle = timm.create_model("resnet50", features_only=True, out_indices=[3]).eval()
    oracle.load_state_dict(model.trunk.state_dict(), strict=False)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(model(x), oracle(x)[0].mean((2, 3)), atol=1e-5)


# ------------------------------------------------------------------------------------------------- weights


def test_the_default_encoder_knows_imagenet():
    """The renamed weights, with the record's mean and std, name what is on scikit-image's pictures."""
    data = pytest.importorskip("skimage.data")
    record = load_record("efficientnet_lite0", KNOWN)
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(lite0_to_timm(read_state_dict(resolve_weights(record))), strict=True)
    preprocess = Preprocess(replace(record, resize=256))
    for name, labels in {"chelsea": {281, 282, 285}, "coffee": {967}, "rocket": {657}}.items():
        picture = np.ascontiguousarray(getattr(data, name)())
        side = min(picture.shape[:2])
        top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
        square = torch.from_numpy(picture[top : top + side, left : left + side]).permute(2, 0, 1)[None]
        with torch.inference_mode():
            assert int(network(preprocess(square)).argmax()) in labels


def test_the_default_encoder_ends_as_timm_does():
    record = load_record("efficientnet_lite0", KNOWN)
    check_access(record)
    encoder = load_encoder(record)
    assert encoder.weights_sha256 == record.source.sha256
    assert encoder.identity == identity(record, record.source.sha256)
    oracle = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    state = lite0_to_timm(read_state_dict(resolve_weights(record)))
    oracle.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier")})
    config = oracle.default_cfg
    assert (record.mean, record.std, record.interpolation) == (config["mean"], config["std"], config["interpolation"])
    batch = tiles(8)
    features = encoder.forward(batch)
    with torch.inference_mode():
        expected = oracle((batch.float() / 255 - 0.5) / 0.5)
    assert float((features - expected).abs().max() / expected.abs().max()) < 1e-4
    one_by_one = torch.cat([encoder.forward(batch[i : i + 1]) for i in range(8)])
    assert float((features - one_by_one).abs().max() / features.abs().max()) < 1e-3


@pytest.mark.parametrize("name", ["virchow2", "virchow2:cls", "uni", "uni2_h", "h_optimus_0", "prov_gigapath"])
def test_weights_from_the_hub(name, monkeypatch, tmp_path):
    """hf_hub_download is asked for the record's file and revision, and its tensors are the ones that run."""
    record = small(name)
    source = load_record(name, KNOWN).source
    path = tmp_path / source.filename
    model = build_model(record, None)
    state = {k: v.contiguous() for k, v in model.trunk.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    asked = []

    def download(repo, filename, revision=None):
        asked.append((repo, filename, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(RunError, match=r"has sha256 .*, the record expects"):
        load_encoder(replace(record, source=source))  # random weights are not those that the record pins
    asked.clear()
    encoder = load_encoder(replace(record, source=replace(source, sha256=encoders.weights_sha256(path))))
    assert asked == [(source.hub, source.filename, source.revision)]
    assert encoder.identity["weights_sha256"] == encoders.weights_sha256(path)
    x = Preprocess(record)(tiles(2, record.tile_px))
    with torch.inference_mode():
        assert torch.allclose(encoder.forward(tiles(2, record.tile_px)), model(x), atol=1e-5)


@pytest.mark.parametrize(("name", "swiglu"), [("phikon_v2", False), ("midnight_12k", True)])
def test_dinov2_weights_of_transformers(name, swiglu, tmp_path):
    transformers = pytest.importorskip("transformers")
    record = small(name)
    config = transformers.Dinov2Config(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        patch_size=14 if swiglu else 16,
        use_swiglu_ffn=swiglu,
    )
    torch.manual_seed(0)
    oracle = transformers.Dinov2Model(config).eval()
    for parameter in oracle.parameters():  # biases, norms and layer scales too
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(oracle.state_dict(), tmp_path / "model.safetensors")
    model = build_model(local(record, tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        hidden = oracle(x).last_hidden_state
        expected = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], -1) if swiglu else hidden[:, 0]
        assert torch.allclose(model(x), expected, atol=1e-4)


def test_a_position_table_of_518_px_is_fitted_as_transformers_does_it(tmp_path):
    """Midnight's file may hold 257 tokens (above) or 1370, which transformers fits without antialiasing."""
    transformers = pytest.importorskip("transformers")
    record = small("midnight_12k")
    config = transformers.Dinov2Config(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=518, patch_size=14, use_swiglu_ffn=True
    )
    torch.manual_seed(0)
    oracle = transformers.Dinov2Model(config).eval()
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(oracle.embeddings.position_embeddings, std=5.0)  # so that places count
    path = tmp_path / "model.safetensors"
    save_file(oracle.state_dict(), path)
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        hidden = oracle(x).last_hidden_state
        expected = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], -1)
        assert torch.allclose(build_model(local(record, path), path)(x), expected, atol=1e-4)
        timms = build_model(local(replace(record, resample_position=True), path), path)(x)
    assert not torch.allclose(timms, expected, atol=1e-3)  # antialiased: another table
    with pytest.raises(RunError, match="shape of pos_embed"):
        build_model(local(replace(record, resample_position=False), path), path)


@pytest.mark.parametrize("chunked", [False, True])
def test_checkpoints_of_self_supervised_training(chunked, tmp_path):
    """Prefixes, projection heads and chunks of blocks go; the class token of a model with registers gets its place."""
    record = small("openmidnight")
    model = build_trunk(record)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {key.replace("reg_token", "register_tokens"): value for key, value in model.state_dict().items()}
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 96), state["pos_embed"]], 1)
    state |= {"mask_token": torch.zeros(1, 96)}
    if chunked:
        state = {key.replace("blocks.", f"blocks.{int('blocks.1' in key)}."): value for key, value in state.items()}
    saved = {f"backbone.{key}": value for key, value in state.items()} | {"dino_head.mlp.0.bias": torch.zeros(3)}
    torch.save({"teacher": saved}, tmp_path / "t.pth")
    loaded = build_model(local(record, tmp_path / "t.pth"), tmp_path / "t.pth").trunk
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_vit_weights_of_transformers():
    """Phikon's file names tensors as transformers did before version 5; the network is compared on tensors so named."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=384, image_size=224
    )
    torch.manual_seed(0)
    oracle = transformers.ViTModel(config, add_pooling_layer=False).eval()
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    old = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key"}
    old |= {"attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense"}
    old |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    state = {}
    for key, value in oracle.state_dict().items():
        key = f"encoder.layer.{key.removeprefix('layers.')}" if key.startswith("layers.") else key
        for new, name in old.items():
            key = key.replace(new, name)
        state[key] = value
    model = build_trunk(small("phikon"))
    model.load_state_dict(hf_vit_to_timm({**state, "pooler.dense.bias": torch.zeros(96)}), strict=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = oracle(x).last_hidden_state
        assert torch.allclose(model.forward_features(x), expected, atol=1e-4)


def test_conch_reads_the_vision_tower_of_the_whole_model(tmp_path):
    record = small("conch")
    tower = build_model(record, None).trunk
    file = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    rest = ("text.token_embedding.weight", "logit_scale", "visual.attn_pool_caption.query", "visual.ln_caption.bias")
    torch.save({**file, **{key: torch.zeros(2) for key in rest}}, tmp_path / "pytorch_model.bin")
    path = tmp_path / "pytorch_model.bin"
    batch = tiles(2, 512)
    x = Preprocess(record)(batch)
    pooled = load_encoder(local(record, path)).forward(batch)
    with torch.inference_mode():
        # the pooler, written out: one query, 8 heads of 64
        t = tower.attn_pool_contrast.ln_k(tower.trunk.forward_features(x))
        a = tower.attn_pool_contrast.attn
        q_bias, k_bias, v_bias = a.in_proj_bias.chunk(3)
        query = tower.attn_pool_contrast.ln_q(tower.attn_pool_contrast.query)
        q = (query @ a.q_proj_weight.T + q_bias).view(8, 64)
        k = (t @ a.k_proj_weight.T + k_bias).view(2, -1, 8, 64)
        v = (t @ a.v_proj_weight.T + v_bias).view(2, -1, 8, 64)
        weights = torch.einsum("hd,bnhd->bhn", q, k).div(8.0).softmax(-1)
        out = torch.einsum("bhn,bnhd->bhd", weights, v).reshape(2, 512)
        expected = tower.ln_contrast(a.out_proj(out))
    assert torch.allclose(pooled, expected, atol=1e-4)
    projected = load_encoder(local(replace(record, pooling="attention_projected"), path)).forward(batch)
    assert torch.allclose(projected.norm(dim=1), torch.ones(2), atol=1e-5)


def test_position_embeddings_of_another_size_only_where_the_record_allows(tmp_path):
    path = tmp_path / "w.safetensors"
    big = build_trunk(small("dinov2_vitb14", img_size=518))
    save_file(big.state_dict(), path)
    model = build_model(local(small("dinov2_vitb14"), path), path)
    assert model.trunk.pos_embed.shape == (1, 257, 96)
    with pytest.raises(RunError, match="shape of pos_embed"):
        build_model(replace(local(small("dinov2_vitb14"), path), resample_position=False), path)


def test_torchscript_from_a_local_file(tmp_path):
    path = tmp_path / "model.pt"
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 7, 16, 16), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    torch.jit.script(net).save(str(path))
    raw = {**KNOWN["random_resnet18"], "loader": "torchscript", "source": {"kind": "file", "file": "model.pt"}}
    raw = {**raw, "variant": "out", "variants": {"out": {"pooling": "output", "dim": 7}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"encoders": {"mine": raw}}))
    record = load_record("mine", tmp_path / "mine.yaml")
    encoder = load_encoder(record)
    batch = tiles(3)
    with torch.inference_mode():
        assert torch.allclose(encoder.forward(batch), net(Preprocess(record)(batch)), atol=1e-5)
    with pytest.raises(RunError, match="its record says 8 numbers per tile, its network gives 7"):
        load_encoder(replace(record, dim=8))
    path.write_bytes(b"no module")
    with pytest.raises(RunError, match="not a TorchScript module"):
        load_encoder(record)


def test_safetensors_from_a_local_file(tmp_path):
    path = tmp_path / "resnet18.safetensors"
    record = replace(load_record("random_resnet18", KNOWN), loader="safetensors")
    state = timm.create_model("resnet18").state_dict()  # with a classifier, which is left out
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, path)
    sha = encoders.weights_sha256(path)
    assert load_encoder(local(record, path, sha)).identity["weights_sha256"] == sha
    with pytest.raises(RunError, match="expects " + "0" * 64):
        load_encoder(local(record, path, "0" * 64))
    torch.save(state, tmp_path / "resnet18.pth")
    with pytest.raises(RunError, match=r"reads \.safetensors files only"):
        load_encoder(local(record, tmp_path / "resnet18.pth"))


def test_a_file_of_weights_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    reads, path = [], tmp_path / "w.bin"
    plain = encoders.file_sha256
    monkeypatch.setattr(encoders, "file_sha256", lambda path: reads.append(path) or plain(path))
    path.write_bytes(b"one")
    assert encoders.weights_sha256(path) == encoders.weights_sha256(str(path)) == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 1
    path.write_bytes(b"other")
    assert encoders.weights_sha256(path) == hashlib.sha256(b"other").hexdigest()


def test_files_that_do_not_fit(tmp_path):
    record = load_record("random_resnet18", KNOWN)
    path = tmp_path / "w.safetensors"
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    save_file({k: v for k, v in state.items() if k != "layer1.0.conv1.weight"} | {"odd": torch.zeros(1)}, path)
    with pytest.raises(RunError, match=r"missing: layer1.0.conv1.weight; unexpected: odd"):
        load_into(build_trunk(record), record, path)
    save_file(state | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(RunError, match=r"shape of conv1.weight: \(64, 3, 3, 3\), not \(64, 3, 7, 7\)"):
        load_into(build_trunk(record), record, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match="not a whole safetensors file"):
        load_into(build_trunk(record), record, path)
    save_file(state, path)
    lite0 = load_record("efficientnet_lite0", KNOWN)
    with pytest.raises(RunError, match="does not fit encoder efficientnet_lite0"):
        load_into(build_trunk(lite0), lite0, path)


def test_pickles_are_not_executed(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {"conv1.weight": Path("x")}}, path)
    with pytest.raises(RunError, match="cannot be read as plain PyTorch weights"):
        read_state_dict(path)


def test_random_weights_are_seeded():
    record = load_record("random_resnet18", KNOWN)
    before = torch.random.get_rng_state()
    first, second = load_encoder(record), load_encoder(record)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.identity["weights_sha256"] == "random:0"
    assert first.identity == identity(record, encoders.weights_sha256(resolve_weights(record)), "fp32")
    assert torch.equal(first.forward(tiles(2)), second.forward(tiles(2)))


# ------------------------------------------------------------------------------------------------- transform


@pytest.mark.parametrize("name", ["uni", "prov_gigapath", "conch", "efficientnet_lite0"])
def test_the_transform_is_torchvisions(name):
    """Resize, CenterCrop, ToTensor, Normalize on PIL pictures, to within PIL's rounding to whole grey levels."""
    record = load_record(name, KNOWN)
    mode = {"bicubic": transforms.InterpolationMode.BICUBIC, "bilinear": transforms.InterpolationMode.BILINEAR}
    chain = transforms.Compose(
        [
            transforms.Resize(record.resize, interpolation=mode[record.interpolation]),
            transforms.CenterCrop(record.crop),
            transforms.ToTensor(),
            transforms.Normalize(record.mean, record.std),
        ]
    )
    rng = np.random.default_rng(3)
    # not up to 0 and 255: PIL clips cubic overshoot between its two passes, we once
    batch = rng.integers(60, 196, (2, record.tile_px, record.tile_px, 3)).astype(np.uint8)
    got = Preprocess(record)(torch.from_numpy(batch).permute(0, 3, 1, 2))
    expected = torch.stack([chain(Image.fromarray(tile)) for tile in batch])
    grey = (got - expected) * torch.tensor(record.std).view(1, 3, 1, 1) * 255
    assert got.shape == expected.shape
    assert float(grey.abs().max()) < 2.0
    assert float(grey.abs().mean()) < 0.6


def test_odd_margins_are_cropped_as_torchvision_does():
    for resize, crop in ((256, 223), (255, 224), (230, 225)):
        record = replace(load_record("prov_gigapath", KNOWN), resize=resize, crop=crop)
        ramp = torch.arange(resize, dtype=torch.uint8).view(1, 1, 1, -1).expand(1, 3, resize, -1)
        got = Preprocess(record)(ramp)[0, 0, 0, 0] * record.std[0] + record.mean[0]
        assert round(float(got) * 255) == int(transforms.CenterCrop(crop)(ramp)[0, 0, 0, 0])


@pytest.mark.parametrize("key", KEYS)
def test_a_tile_of_the_mean_colour_becomes_zero(key):
    record = load_record(key, KNOWN)
    constant = torch.tensor(record.mean).view(1, 3, 1, 1).expand(1, 3, record.tile_px, record.tile_px) * 255
    out = Preprocess(record)(constant)
    assert out.shape == (1, 3, record.crop, record.crop)
    assert float(out.abs().max()) < 1e-4


@pytest.mark.parametrize(("key", "survives"), [("prov_gigapath", False), ("uni", True), ("conch", True)])
def test_a_stripe_on_the_border_is_lost_by_a_crop_and_kept_by_a_resize(key, survives):
    record = load_record(key, KNOWN)
    plain = torch.full((1, 3, record.tile_px, record.tile_px), 128, dtype=torch.uint8)
    striped = plain.clone()
    striped[..., 0, :] = striped[..., -1, :] = striped[..., :, 0] = striped[..., :, -1] = 0
    preprocess = Preprocess(record)
    assert torch.equal(preprocess(plain), preprocess(striped)) != survives


def test_the_stain_transform_comes_first_on_whole_tiles():
    seen = []

    def stain(batch):
        seen.append((batch.dtype, tuple(batch.shape)))
        return 255.0 - batch.float()

    record = load_record("uni", KNOWN)
    batch = tiles(2, 256)
    got = Preprocess(record)(batch, stain)
    assert seen == [(torch.uint8, (2, 3, 256, 256))]
    assert torch.allclose(got, Preprocess(record)(255 - batch), atol=1e-5)


def test_the_transform_is_part_of_the_identity():
    record = load_record("prov_gigapath", KNOWN)
    shrunk = replace(record, resize=224)
    assert identity(record, "x")["transform_sha256"] != identity(shrunk, "x")["transform_sha256"]


def test_oblong_tiles_are_refused():
    with pytest.raises(ValueError, match="H = W"):
        Preprocess(load_record("uni", KNOWN))(torch.zeros(1, 3, 256, 128))
