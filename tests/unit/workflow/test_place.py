"""Where a run embeds and in which precision: once for a folder of results, whoever goes on with it."""

import pytest
from slidemake.core.failures import RunError
from slidemake.core.files import read_json, write_json
from slidemake.encoders.registry import load_record
from slidemake.jobs.racks import Machine
from slidemake.workflow.place import embedding_place, marked_place, precision_hint

ENCODERS = {"uni": load_record("uni"), "efficientnet_lite0": load_record("efficientnet_lite0")}
HALF, AUTO = ENCODERS["uni"].precision, {"device": "auto", "precision": "auto"}
HERE, NOTHING, CLUSTER = Machine(gpu=True), Machine(), Machine(cluster=True)


def mark(output, settings, place):
    """What a run that starts writes."""
    path = output / "slidemake.json"
    found = read_json(path) if path.exists() else {"format": "slidemake-results", "format_version": 1}
    write_json(path, {**found, "embedding": marked_place(found, settings, place)})


def embed(output, encoder, precision):
    """A store as embedding leaves it, as far as its identity goes."""
    path = output / "embeddings" / encoder / "a.zarr" / "zarr.json"
    path.parent.mkdir(parents=True)
    write_json(path, {"attributes": {"encoder": {"precision": precision}}})


def precisions(output, settings, machine, **more):
    return embedding_place(settings, ENCODERS, str(output), machine, **more)["precisions"]


@pytest.mark.parametrize(
    ("device", "machine", "gpu", "precision"),
    [
        ("auto", HERE, "here", HALF),
        ("auto", NOTHING, "", "fp32"),
        ("auto", CLUSTER, "cluster", HALF),
        ("cpu", Machine(gpu=True, cluster=True), "", "fp32"),
        ("cuda", NOTHING, "", HALF),  # the user says that there is one
    ],
)
def test_the_first_embeddings_have_what_suits_the_device(tmp_path, device, machine, gpu, precision):
    assert HALF in ("fp16", "bf16")
    place = embedding_place({"device": device, "precision": "auto"}, ENCODERS, str(tmp_path), machine)
    assert place == {"gpu": gpu, "precisions": {"uni": precision, "efficientnet_lite0": "fp32"}}


def test_embeddings_that_are_there_keep_their_precision_on_another_machine(tmp_path):
    mark(tmp_path, AUTO, embedding_place(AUTO, ENCODERS, str(tmp_path), CLUSTER))
    assert precisions(tmp_path, AUTO, NOTHING)["uni"] == "fp32"  # nothing was embedded: decided anew
    embed(tmp_path, "uni", HALF)
    assert precisions(tmp_path, AUTO, NOTHING)["uni"] == HALF
    assert precisions(tmp_path, AUTO, HERE)["uni"] == HALF


def test_embeddings_from_before_the_marker_said_so_are_asked(tmp_path):
    embed(tmp_path, "uni", "fp32")
    assert precisions(tmp_path, AUTO, CLUSTER)["uni"] == "fp32"
    place = embedding_place(AUTO, ENCODERS, str(tmp_path), CLUSTER)
    assert f"embedding.precision: {HALF}" in precision_hint(AUTO, ENCODERS, place)
    assert precision_hint({**AUTO, "precision": "fp32"}, ENCODERS, place) is None


def test_a_precision_that_somebody_sets_for_a_while_changes_nothing_of_what_auto_chose(tmp_path):
    mark(tmp_path, AUTO, embedding_place(AUTO, ENCODERS, str(tmp_path), NOTHING))
    embed(tmp_path, "uni", "fp32")
    own = {**AUTO, "precision": "bf16"}
    place = embedding_place(own, ENCODERS, str(tmp_path), CLUSTER)
    assert set(place["precisions"].values()) == {"bf16"}
    mark(tmp_path, own, place)
    assert precisions(tmp_path, AUTO, CLUSTER)["uni"] == "fp32"


def test_a_job_takes_what_its_run_decided(tmp_path):
    """On a node whose driver does not answer, a job still knows that a GPU was promised, and in which precision."""
    place = embedding_place(AUTO, ENCODERS, str(tmp_path), CLUSTER)
    mark(tmp_path, AUTO, place)
    assert embedding_place(AUTO, ENCODERS, str(tmp_path), NOTHING, in_job=True) == place


def test_a_bundle_has_its_own_precision_and_another_is_refused_before_anything_is_computed(tmp_path):
    bundle = {"encoder": {"precision": "fp16"}}
    assert set(precisions(tmp_path, AUTO, NOTHING, bundle=bundle).values()) == {"fp16"}
    with pytest.raises(RunError, match=r"precision is fp32, and the bundle was trained on features in fp16"):
        precisions(tmp_path, {**AUTO, "precision": "fp32"}, HERE, bundle=bundle)
