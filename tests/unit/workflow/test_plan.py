"""The plan of a run: racks, encoders, grids, stain, controls; what is refused before the first job."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from slidemake.core.failures import RunError
from slidemake.core.files import read_json, write_json
from slidemake.jobs.racks import Machine
from slidemake.stain.fit import resolve_method
from slidemake.tasks.controls import TRAINED
from slidemake.workflow import plan as setup
from slidemake.workflow.plan import check_results_folder, mark_results_folder, normal_output, plan_run, rack_size_hint

BASE = Path(__file__).parents[3]


@pytest.fixture
def raw(tmp_path):
    lines = ["slide_id,path,patient_id,site,label,mpp"]
    lines += [f"s{i:02d},{i}.svs,p{i // 2:02d},x,{'ab'[i // 2 % 2]},0.5" for i in range(24)]
    (tmp_path / "slides.csv").write_text("\n".join(lines) + "\n")
    return {"sheet": str(tmp_path / "slides.csv"), "output": str(tmp_path / "out"), "tasks": {"t": {"label": "label"}}}


def test_a_minimal_configuration_is_a_whole_plan(raw):
    plan = plan_run(raw, BASE)
    assert {rack: len(rows) for rack, rows in plan.racks.items()} == {"r00000": 12, "r00001": 12}
    assert list(plan.encoders) == ["efficientnet_lite0"]
    assert plan.grids == ["224px_0.5mpp"]
    assert plan.models_of("t") == ["auto", *TRAINED]
    assert {plan.encoder_of("t", model) for model in plan.models_of("t")} == {"efficientnet_lite0"}
    assert plan.stain_options["method"] == "none"  # auto: nothing, unless the encoder requires it
    assert "target" not in plan.stain_options
    assert not Path(raw["output"]).exists()  # a plan writes nothing


def test_the_racks_params_do_not_know_labels(raw):
    before = plan_run(raw, BASE).screening_rows("r00000")
    sheet = Path(raw["sheet"])
    lines = sheet.read_text().splitlines()
    swapped = [lines[0], *[line.replace(",a,", ",b,") if ",p00," in line else line for line in lines[1:]]]
    sheet.write_text("\n".join(swapped) + "\n")
    assert plan_run(raw, BASE).screening_rows("r00000") == before


def test_options_of_a_model_do_not_know_the_other_models(raw):
    one = plan_run(raw, BASE)
    raw["models"] = {"abmil": {}, "wide": {"hidden": 256}}
    two = plan_run(raw, BASE)
    assert two.models_of("t") == ["abmil", "wide", *TRAINED]
    assert two.model_options("t", "abmil") == one.model_options("t", "auto")
    assert two.task_options("t") == one.task_options("t")
    assert two.model_options("t", "shuffled_label") == {**one.model_options("t", "auto"), "control": "shuffled_label"}


def test_stain_auto_is_by_encoder(raw):
    raw["models"] = {"a": {"encoder": "random_resnet18"}, "b": {"encoder": "efficientnet_lite0"}}
    plan = plan_run(raw, BASE)
    assert {plan.stain_method_of(key) for key in plan.encoders} == {"none"}
    needy = replace(plan.encoders["efficientnet_lite0"], stain="required")
    assert resolve_method(plan.config["stain"]["method"], needy.stain) == "macenko"
    raw["stain"] = {"method": "none"}
    plan = plan_run(raw, BASE)
    assert {plan.stain_method_of(key) for key in plan.encoders} == {"none"}
    assert plan.stain_options["method"] == "none"


def test_stain_is_compared_where_it_is_asked_for_and_applied(raw):
    raw["stain"] = {"method": "macenko", "compare": True}
    plan = plan_run(raw, BASE)
    assert plan.stain_compared() == {"t": "efficientnet_lite0"}
    without = plan_run({**raw, "stain": {"method": "macenko"}}, BASE)
    assert without.stain_compared() == {}
    assert without.stain_options == plan.stain_options  # no fit is made anew
    assert without.bundle_context("t", "auto") == plan.bundle_context("t", "auto")
    assert plan_run({**raw, "stain": {"compare": True}}, BASE).stain_compared() == {}  # nothing is normalised
    raw["models"], raw["tasks"]["t"]["models"] = {"own": {"stain": "reinhard"}}, ["own"]
    assert plan_run({**raw, "stain": {"compare": True}}, BASE).stain_compared() == {"t": "efficientnet_lite0-reinhard"}


def test_a_gated_encoder_is_refused_before_any_slide_is_read(raw, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    raw["models"] = {"abmil": {"encoder": "uni"}}
    with pytest.raises(RunError, match="HF_TOKEN"):
        plan_run(raw, BASE)


def test_a_results_folder_of_another_format_is_left_alone(raw, tmp_path):
    out = Path(raw["output"])
    mark_results_folder(out)
    plan_run(raw, BASE)
    assert read_json(out / "slidemake.json")["format_version"] == 1
    write_json(out / "slidemake.json", {"format": "slidemake-results", "format_version": 99})
    with pytest.raises(RunError, match=r"results format 99.*Nothing was changed"):
        plan_run(raw, BASE)
    mark_results_folder(out)
    assert read_json(out / "slidemake.json")["format_version"] == 99
    check_results_folder(tmp_path / "new" / "deep")


def append_slides(raw, first, last):
    with open(raw["sheet"], "a") as sheet:
        sheet.writelines(f"t{i:05d},t{i}.svs,q{i:05d},x,{'ab'[i % 2]},0.5\n" for i in range(first, last))


def ids(plan):
    return {rack: [row.slide_id for row in rows] for rack, rows in plan.racks.items()}


def test_appended_slides_and_another_machine_move_no_slide(raw):
    first = plan_run(raw, BASE, Machine(cores=4))
    mark_results_folder(Path(raw["output"]), first.rack_size)
    append_slides(raw, 24, 524)
    plan = plan_run(raw, BASE, Machine(cores=64, gpus=8))
    assert plan.rack_size == first.rack_size == 6
    before, after = ids(first), ids(plan)
    assert {rack: after[rack] for rack in before} == before  # the racks were full
    assert len(after) == 88  # ceil(524 / 6)
    assert plan_run({**raw, "rack_size": 40}, BASE).rack_size == 40  # who sets it, has it
    assert rack_size_hint(plan, Machine(cores=64)) is None  # 9 would be better, but not by much
    append_slides(raw, 524, 10_000)
    assert "rack_size: 64" in rack_size_hint(plan_run(raw, BASE), Machine(cores=64))


def test_the_rack_size_that_was_set_stays_when_auto_comes_back(raw):
    out = Path(raw["output"])
    mark_results_folder(out, plan_run({**raw, "rack_size": 7}, BASE).rack_size)
    assert plan_run({**raw, "rack_size": "auto"}, BASE).rack_size == 7
    mark_results_folder(out)  # a run without slides forgets nothing
    assert read_json(out / "slidemake.json") == {"format": "slidemake-results", "format_version": 1, "rack_size": 7}


def test_a_job_on_another_node_takes_the_racks_of_its_run(raw, monkeypatch):
    monkeypatch.setattr(setup, "PATIENCE", 0.0)
    with pytest.raises(RunError, match="file system that all nodes see"):
        plan_run(raw, BASE, Machine(cores=64), in_job=True)
    monkeypatch.setattr(setup, "PATIENCE", 60.0)
    late = threading.Timer(0.5, mark_results_folder, (Path(raw["output"]), 5))  # as network file systems show files
    late.start()
    assert plan_run(raw, BASE, Machine(cores=64), in_job=True).rack_size == 5
    late.join()


def test_a_bundle_brings_its_own_processing(raw, tmp_path):
    tiling = {**plan_run(raw, BASE).config["tiling"], "min_tissue": 0.9, "stride_px": 112}
    bundle = tmp_path / "bundle"
    info = {
        "format": "slidemake-bundle",
        "format_version": 1,
        "aggregator": {"name": "abmil", "parameters": {"hidden": 16}, "features": 1280},
        "groups": [{"name": "g", "members": 1, "temperature": 1.0}],
        "classes": ["a", "b"],
        "encoder": {"key": "efficientnet_lite0", "variant": "avgpool"},
        "tissue": plan_run(raw, BASE).config["tissue"],
        "tiling": tiling,
        "stain": {"method": "reinhard", "target": "tiatoolbox", "white_point": "estimate", "max_pixels": 1000},
        "stain_target": {"status": "ok", "method": "reinhard"},
        "features": "float32",
    }
    write_json(bundle / "bundle.json", info)
    plan = plan_run({**raw, "bundle": str(bundle)}, BASE)
    assert plan.tasks == {}
    assert list(plan.encoders) == ["efficientnet_lite0"]
    assert plan.config["tiling"]["min_tissue"] == 0.9
    assert plan.stain_options["method"] == "reinhard"
    assert plan.stain_target_record == info["stain_target"]
    write_json(bundle / "bundle.json", info | {"tissue": {"overview_mpp": 1e-9}})
    with pytest.raises(RunError, match=r"tissue\.overview_mpp: 1e-09 is not a number"):
        plan_run({**raw, "bundle": str(bundle)}, BASE)
    write_json(bundle / "bundle.json", {"encoder": info["encoder"]})
    with pytest.raises(RunError, match="train"):
        plan_run({**raw, "bundle": str(bundle)}, BASE)


def test_the_results_folder_has_one_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spelling in (
        "results",
        "./results",
        "results/",
        "x/../results",
        f"{tmp_path}/results",
        f"{tmp_path}//results/.",
    ):
        assert normal_output(spelling) == "results"
    assert normal_output("../results") == str(tmp_path.parent / "results")
    assert normal_output(f"{tmp_path}-2/results") == f"{tmp_path}-2/results"


def test_paths_of_slides_hold_from_another_folder(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_run({**raw, "sheet": "slides.csv"}, BASE)
    assert plan.rows[0].path == str(tmp_path / "0.svs")


def test_masks_of_the_users_are_named(raw, tmp_path):
    plan = plan_run({**raw, "rack_size": 2, "explain": {"truth": "{folder}/m/{stem}-{slide_id}.png"}}, BASE)
    assert plan.truth_files("r00001") == [str(tmp_path / "m/2-s02.png"), str(tmp_path / "m/3-s03.png")]
    assert plan_run(raw, BASE).truth_files("r00001") == []


def test_weights_of_the_users_are_named(raw, tmp_path):
    """They are compared by size and time in every plan; those of a package or a hub say which they are."""
    (tmp_path / "weights.bin").write_bytes(b"weights")
    file = tmp_path / "encoders.yaml"
    file.write_text(f"encoders: {{efficientnet_lite0: {{source: {{file: {tmp_path}/weights.bin}}}}}}\n")
    plan = plan_run({**raw, "encoders_file": str(file)}, BASE)
    assert plan.weights_files(list(plan.encoders)) == [str(tmp_path / "weights.bin")]
    assert plan_run(raw, BASE).weights_files(["efficientnet_lite0"]) == []


def test_a_bundle_that_knows_the_patients_is_refused_before_a_slide_is_processed(raw, tmp_path):
    """Two hospitals may number their patients alike: the message says what to do then."""
    from slidemake.cohort.sheet import read_sheet

    config = plan_run(raw, BASE).config
    [label] = {task["label"] for task in config["tasks"].values()}
    rows = read_sheet(config["sheet"], [label])
    seen = next(row.patient_id for row in rows if row.labels[label] and not row.exclude)
    write_json(
        tmp_path / "bundle" / "bundle.json",
        {
            **{"format": "slidemake-bundle", "format_version": 1, "classes": ["a", "b"], "features": "float32"},
            "aggregator": {"name": "abmil", "parameters": {"hidden": 16}, "features": 1280},
            "groups": [{"name": "g", "members": 1, "temperature": 1.0}],
            "encoder": {"key": "efficientnet_lite0", "variant": "avgpool"},
            **{key: config[key] for key in ("tissue", "tiling")},
            "stain": config["stain"] | {"method": "none"},
            "stain_target": None,
            "training": {"patients": ["X1", seen]},
        },
    )
    own = {key: value for key, value in raw.items() if key not in ("tasks", "models")}
    assert plan_run({**own, "bundle": str(tmp_path / "bundle")}, BASE).bundle is not None
    with pytest.raises(RunError, match=f"trained on {seen}.*number their patients alike.*B-{seen}"):
        plan_run({**own, "bundle": str(tmp_path / "bundle"), "bundle_label": label}, BASE)


def test_outlines_that_cannot_be_right_are_told_when_planning(tmp_path):
    from slidemake.workflow.plan import outline_problem

    (tmp_path / "bom.geojson").write_bytes(b"\xef\xbb\xbf\n {}")
    (tmp_path / "list.geojson").write_text("[]")
    assert outline_problem(str(tmp_path / "bom.geojson")) is None
    assert outline_problem(str(tmp_path / "list.geojson")) is None
    (tmp_path / "table.geojson").write_text("x,y\n")
    for name, text in (("gone", "does not exist"), (".", "is no file"), ("table.geojson", "is not GeoJSON")):
        assert text in outline_problem(str(tmp_path / name))
