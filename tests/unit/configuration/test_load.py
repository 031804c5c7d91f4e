"""Configuration: defaults, conversions, errors that name the key and the remedy, and the pages made from the schema."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from slidemake.configuration.load import load_configuration, path_keys, sheet_columns, stage_options
from slidemake.configuration.page import PAGE, configuration_page
from slidemake.configuration.presets import PUBLISHED
from slidemake.configuration.schema import SCHEMA, describe, leaves, schema
from slidemake.core.failures import RunError
from slidemake.core.stages import STAGES
from slidemake.core.words import nearest

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "config" / "config.yaml"


def problems(raw: dict, **more) -> str:
    with pytest.raises(RunError) as caught:
        load_configuration(raw, **more)
    return str(caught.value)


def minimal(**more) -> dict:
    return {"sheet": "mine.csv", "output": "out", "tasks": {"outcome": {"label": "outcome"}}, **more}


def test_sheet_output_and_a_label_are_enough():
    config = load_configuration(minimal())
    assert config["tasks"]["outcome"]["models"] == ["auto"]
    assert config["tasks"]["outcome"]["splits"]["folds"] == 5
    assert config["tasks"]["outcome"]["splits"]["repeats"] == 3
    assert config["models"]["auto"]["encoder"] == "efficientnet_lite0"
    assert config["models"]["auto"]["aggregator"] == "auto"
    assert config["demo"] is None
    assert config["output"] == "out"


def test_filled_configuration_satisfies_its_own_schema_and_loading_it_again_changes_nothing():
    config = load_configuration(minimal())
    jsonschema.validate(config, json.loads(SCHEMA.read_text()), cls=jsonschema.Draft202012Validator)
    assert load_configuration(config) == config


def test_raw_configuration_is_left_alone():
    raw = minimal(tiling={"codec": "zstd"})
    before = copy.deepcopy(raw)
    load_configuration(raw)
    assert raw == before


def test_defaults_are_not_shared_between_configurations():
    first = load_configuration(minimal())
    first["tissue"]["pen"].append("pink")
    assert "pink" not in load_configuration(minimal())["tissue"]["pen"]


def test_demo_configuration_is_valid_and_names_every_key():
    raw = yaml.safe_load(DEMO.read_text())
    config = load_configuration(raw, ROOT)
    assert config["tasks"]["tumour"]["positive"] == "tumour"
    assert config["demo"] == {"side": 4608, "seed": 0}
    for path, _ in leaves():
        part = raw
        for step in path.split("."):
            if step == "<name>" and part is None:
                break  # an example stands in comments
            step = next(iter(part)) if step == "<name>" else step
            assert step in part, f"config.yaml does not document {path}"
            part = part[step]


def test_demo_configuration_shows_the_defaults():
    shown = load_configuration(yaml.safe_load(DEMO.read_text()), ROOT)
    default = load_configuration({"sheet": "x.csv"})
    assert shown["explain"].pop("truth"), "only the demo has truth masks"
    default["explain"].pop("truth")
    for section in ("screening", "tissue", "stain", "tiling", "embedding", "evaluation", "explain", "dask", "models"):
        assert shown[section] == default[section], section


def test_schema_is_a_valid_one_with_description_and_default_everywhere():
    jsonschema.Draft202012Validator.check_schema(schema())
    needed = {"sheet", "tasks.<name>.label"}
    for path, part in leaves():
        assert part["description"].strip(), path
        assert ("default" in part) != (path in needed), path
        if "default" in part:
            jsonschema.validate(part["default"], part, cls=jsonschema.Draft202012Validator)


def test_schema_admits_no_unknown_key_anywhere():
    def walk(part):
        if isinstance(part, dict):
            if "properties" in part:
                assert part.get("additionalProperties") is False, part.get("description")
            for child in part.values():
                walk(child)

    walk(schema())


def test_documentation_is_what_the_schema_says():
    assert PAGE.read_text() == configuration_page(), "run python -m slidemake.configuration.load.page in scripts/"


def test_every_problem_is_reported_at_once():
    text = problems(
        minimal(
            tilling={},
            tiling={"codec": "jpg", "jpeg_quality": 120, "min_tisue": 0.5},
            rack_size=0,
            stain={"method": "macenco"},
            max_failed_fraction="many",
        )
    )
    for line in (
        "tilling: is not a key; did you mean tiling?",
        'tiling.codec: "jpg" is not jpeg, zstd or none; did you mean jpeg?',
        "tiling.jpeg_quality: 120 is not a whole number from 50 to 100",
        "tiling.min_tisue: is not a key; did you mean min_tissue?",
        "rack_size: 0 is not auto or a whole number from 1 to 10000",
        "did you mean macenko?",
        'max_failed_fraction: "many" is not a number from 0 to 1',
    ):
        assert line in text
    assert "has 7 problems" in text


def test_key_in_the_wrong_place_is_shown_its_place():
    assert "folds: is not a key here; did you mean tasks.<name>.splits.folds?" in problems(minimal(folds=3))
    assert "did you mean models.<name>.learning_rate?" in problems(minimal(learning_rate=1e-3))


@pytest.mark.parametrize(
    ("section", "given", "expected"),
    [
        ("tiling", {"jpeg_quality": "80"}, 80),
        ("tiling", {"min_tissue": "0.25"}, 0.25),
        ("tiling", {"min_tissue": 1}, 1.0),
        ("tiling", {"jpeg_subsampling": 420}, "420"),
        ("tiling", {"codec": "JPEG"}, "jpeg"),
        ("tiling", {"codec": None}, "none"),
        ("tiling", {"stride_px": "none"}, None),
        ("tiling", {"shard_tiles": 512.0}, 512),
        ("tissue", {"remove_folds": "yes"}, True),
        ("tissue", {"pen": "green"}, ["green"]),
        ("tissue", {"pen": []}, []),
        ("stain", {"white_point": "255"}, 255),
        ("embedding", {"batch_size": "64"}, 64),
        ("screening", {"default_mpp": "0.5"}, 0.5),
        ("explain", {"top_tiles": None}, 10),
    ],
)
def test_values_are_converted_where_there_is_no_doubt(section, given, expected):
    (key,) = given
    found = load_configuration(minimal(**{section: given}))[section][key]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", "1e999"])
def test_numbers_that_are_none(value):
    assert "tissue.min_area_um2: " in problems(minimal(tissue={"min_area_um2": value}))


def test_yaml_takes_2e_4_for_text_and_we_do_not():
    raw = yaml.safe_load("{sheet: a.csv, models: {m: {learning_rate: 2e-4}}}")
    assert isinstance(raw["models"]["m"]["learning_rate"], str)
    assert load_configuration(raw)["models"]["m"]["learning_rate"] == 2e-4


def test_class_names_that_yaml_reads_as_something_else():
    task = {"label": "grade", "positive": 1}
    assert load_configuration(minimal(tasks={"t": task}))["tasks"]["t"]["positive"] == "1"
    text = problems(minimal(tasks={"t": yaml.safe_load("{label: a, positive: yes}")}))
    assert "tasks.t.positive: true is not" in text
    assert "write the word in quotes" in text


def test_empty_sections_and_keys_take_their_defaults():
    config = load_configuration(minimal(tiling=None, models={"m": None}, rack_size=None))
    assert config["tiling"]["codec"] == "jpeg"
    assert config["models"]["m"]["hidden"] == 128
    assert config["rack_size"] == "auto"


def test_fingerprints_do_not_depend_on_how_a_number_is_written():
    one = stage_options(load_configuration(minimal(tissue={"min_area_um2": 20000})), "tissue")
    other = stage_options(load_configuration(minimal(tissue={"min_area_um2": "20000.0"})), "tissue")
    assert json.dumps(one) == json.dumps(other)


def test_models_of_a_task_must_exist():
    raw = minimal(models={"abmil": {}, "wide": {"hidden": 512}}, tasks={"t": {"label": "l", "models": ["abmill"]}})
    assert "tasks.t.models: there is no model 'abmill'; did you mean abmil?" in problems(raw)
    raw["tasks"]["t"]["models"] = None
    assert load_configuration(raw)["tasks"]["t"]["models"] == ["abmil", "wide"]
    raw["tasks"]["t"]["models"] = ["site_only"]
    assert "runs by itself as a control" in problems(raw)


def test_names_of_models_and_tasks():
    assert "belongs to a control" in problems(minimal(models={"mean_pool_lr": {}}))
    assert '"a/b" becomes a folder' in problems(minimal(tasks={"a/b": {"label": "x"}}))
    assert "tasks.t.label: is missing" in problems(minimal(tasks={"t": {}}))


def test_encoders_are_checked_against_the_registry():
    raw = minimal(models={"m": {"encoder": "uni2"}, "n": {"encoder": "virchow2:cls"}})
    text = problems(raw, encoders=["uni2_h", "virchow2"])
    assert "models.m.encoder: there is no encoder 'uni2'; did you mean uni2_h?" in text
    assert "models.n" not in text


def test_files_named_by_settings_must_be_there(tmp_path):
    text = problems(minimal(stain={"target": "cohorte"}, bundle=str(tmp_path / "no"), encoders_file="no.yaml"))
    assert "stain.target: there is no file cohorte; did you mean cohort?" in text
    assert "bundle: there is no folder" in text
    assert "encoders_file: there is no file no.yaml" in text
    image = tmp_path / "reference.png"
    image.touch()
    assert load_configuration(minimal(stain={"target": str(image)}))["stain"]["target"] == str(image)


def test_paths_of_the_workflow_are_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_configuration({"sheet": "config/config.yaml"}, ROOT)
    assert Path(config["sheet"]) == DEMO
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").touch()
    assert load_configuration({"sheet": "config/config.yaml"}, ROOT)["sheet"] == "config/config.yaml"


def test_without_a_sheet_the_remedy_is_write_sheet():
    assert "snakemake write_sheet" in problems({"output": "x"})


def test_contradictions():
    assert "keeps no pixels" in problems(minimal(tiling={"store": "coords", "pixels": "normalised"}))
    text = problems(minimal(tasks={"t": {"label": "x", "type": "multiclass", "positive": "a"}}))
    assert "no positive class" in text
    external = {"outcome": {"label": "outcome", "splits": {"method": "external", "test": ["b"]}}}
    said = problems(minimal(tasks=external, stain={"target": "cohort", "method": "macenko"}))
    assert "stain.target: the median of the cohort would be taken over the external cohort of task outcome" in said
    assert load_configuration(minimal(tasks=external, stain={"target": "cohort", "method": "none"}))
    assert "explain.model: there is no model 'x'" in problems(minimal(explain={"model": "x"}))
    assert "tasks.outcome.positive: explain.slides is positive" in problems(minimal(explain={"slides": "positive"}))
    assert "explain.truth: 'masks/{slide}.png' may hold" in problems(minimal(explain={"truth": "masks/{slide}.png"}))
    assert load_configuration(minimal(explain={"truth": "{folder}/{stem}.png"}))


@pytest.mark.parametrize("wrong", [[], 3, "text", True])
def test_sections_of_the_wrong_kind(wrong):
    for section in ("tiling", "stain", "tasks", "models", "explain", "demo"):
        assert f"{section}: " in problems(minimal() | {section: wrong})


def test_stage_options_hold_what_a_stage_depends_on_and_no_more():
    config = load_configuration(minimal())
    assert set(stage_options(config, "screen")) == {"default_mpp", "reader"}
    assert set(stage_options(config, "explain")) == {"slides", "truth", "top_tiles"}
    other = load_configuration(minimal(stain={"method": "reinhard"}, screening={"duplicates": "warn"}))
    changed = {
        stage
        for stage, about in STAGES.items()
        if about.section and stage_options(config, stage) != stage_options(other, stage)
    }
    assert changed == {"stain"}
    stage_options(config, "tissue")["pen"].clear()
    assert config["tissue"]["pen"]


def test_stage_options_are_what_the_stages_know():
    """The defaults that the stages have for their own callers are the configuration's, key by key."""
    from slidemake.evaluation import evaluate as evaluation
    from slidemake.stain import stage as stain_stage
    from slidemake.tissue import detection as tissue
    from slidemake.tissue import stage as tissue_stage

    config = load_configuration(minimal())
    assert stage_options(config, "tissue") == {**tissue.DEFAULTS, **tissue_stage.DEFAULTS}
    assert stage_options(config, "evaluate") == evaluation.DEFAULTS
    found = stage_options(config, "stain")
    assert set(found) - {"target"} == set(stain_stage.DEFAULTS)


def test_models_are_what_training_knows():
    fitting = pytest.importorskip("slidemake.mil.fitting")
    model = load_configuration(minimal())["models"]["auto"]
    assert (model.pop("encoder"), model.pop("stain")) == ("efficientnet_lite0", None)  # which features it reads
    assert model.pop("aggregator") == "auto"  # a fit by itself is of one aggregator
    assert model.pop("preset") == "none"  # has its say while the configuration is read
    assert model == {key: value for key, value in fitting.DEFAULTS.items() if key not in ("device", "aggregator")}


def test_preset_of_a_paper_fills_what_is_not_said():
    models = {
        "paper": {"aggregator": "transmil", "preset": "Paper", "learning_rate": "1e-3", "max_tiles": 500},
        "clam": {"aggregator": "CLAM_sb", "preset": "paper", "epochs": None},
        "own": {"aggregator": "transmil"},
    }
    found = load_configuration(minimal(models=models))["models"]
    assert found["paper"]["hidden"] == 512
    assert found["paper"]["optimiser"] == "lookahead_radam"
    assert (found["paper"]["learning_rate"], found["paper"]["max_tiles"]) == (1e-3, 500)  # what the user says stands
    assert (found["paper"]["tile_fraction"], found["paper"]["scaling"]) == (1.0, "none")
    assert (found["clam"]["hidden"], found["clam"]["attention"], found["clam"]["max_tiles"]) == (512, 256, None)
    assert (found["own"]["hidden"], found["own"]["optimiser"], found["own"]["tile_fraction"]) == (128, "adamw", None)
    sweep = {"s": {"aggregator": ["dtfd", "ilra"], "preset": "paper"}}
    swept = load_configuration(minimal(sweeps=sweep))["models"]
    assert (swept["s-dtfd"]["clip"], swept["s-ilra"]["hidden"]) == (5.0, 256)
    text = problems(minimal(models={"auto": {"aggregator": "auto", "preset": "paper"}}))
    assert "models.auto.preset: auto has no paper to take settings from" in text
    assert "models.auto.preset" in problems(minimal(models={"auto": {"aggregator": "auto", "preset": "papr"}}))


def test_presets_are_settings_that_their_aggregators_take():
    registered = pytest.importorskip("slidemake.mil.aggregators").AGGREGATORS
    for name, settings in PUBLISHED.items():
        sizes = {"hidden", "attention", "dropout"} & set(settings)
        assert sizes == {"hidden", "attention", "dropout"} & set(registered[name].takes), name
        assert set(settings) <= set(schema()["$defs"]["model"]["properties"]), name


def test_columns_that_tasks_need():
    given = {"label": "grade", "splits": {"method": "given", "column": "fold"}}
    config = load_configuration(minimal(tasks={"a": given, "b": {"label": "mutation"}}))
    assert sheet_columns(config) == ["fold", "grade", "mutation"]


def test_words_for_values():
    assert describe({"type": "integer", "minimum": 1, "maximum": 5}) == "a whole number from 1 to 5"
    assert describe({"type": ["number", "null"], "exclusiveMinimum": 0}) == "a number above 0, or empty"
    assert describe({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]}) == (
        "auto or a whole number of at least 1"
    )
    assert describe({"type": "integer", "multipleOf": 256, "minimum": 256}) == "a multiple of 256 of at least 256"
    assert nearest("Macenko", ["macenko", "none"]) == "macenko"
    assert nearest("xyz", ["macenko"]) is None


def test_schemas_are_checked_without_compiling_grammars_of_uris():
    """jsonschema does so at its import where rfc3987_syntax is installed: a second at every start of Snakemake."""
    code = (
        "import sys; from slidemake.core.json_schemas import validator as v; print(v({'type': 'object'}).is_valid({}), "
    )
    code += "v({'type': 'object'}).is_valid([]), 'lark' in sys.modules, 'rfc3987_syntax' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(SCHEMA.parents[3] / "scripts")}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert ended.stdout.split() == ["True", "False", "False", "False"]


def test_the_home_folder_is_meant_by_a_tilde_in_every_path(tmp_path, monkeypatch):
    """Every key of the schema that is a path, so that none can be forgotten."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("bundle", "slides"):
        (tmp_path / name).mkdir()
    for name in ("encoders.yaml", "target.png", "folds.csv"):
        (tmp_path / name).write_text("")
    raw = {
        **{"sheet": "~/a.csv", "output": "~/results", "bundle": "~/bundle", "slides_folder": "~/slides"},
        **{"encoders_file": "~/encoders.yaml", "stain": {"target": "~/target.png"}, "models": {"m": {}}},
        "tasks": {"t": {"label": "x", "splits": {"method": "file", "file": "~/folds.csv"}}},
        "explain": {"truth": "~/truth/{stem}.png"},
    }
    config = load_configuration(raw)
    found = {key: section[key] for section, key in path_keys(config)}
    paths = {path.rsplit(".", 1)[-1] for path, part in leaves() if "path of" in part.get("title", "")}
    assert paths <= set(found)
    assert all(value.startswith(f"{tmp_path}/") for value in found.values()), found


@pytest.mark.parametrize("name", ["metrics.json", "curves.json", "splits.CSV", "leakage", "shortcuts"])
def test_models_are_not_named_like_files_of_the_results(name):
    raw = {"sheet": "s.csv", "tasks": {"t": {"label": "x"}}, "models": {name: {}}}
    with pytest.raises(RunError, match="belongs to a file or folder of the results"):
        load_configuration(raw)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("res{rack}", "wildcards of Snakemake"),
        ("a}b", "wildcards of Snakemake"),
        ("results\n2", "a character that is not seen"),
        ("/", "no folder for results alone"),
        (".", "no folder for results alone"),
        ("./x/..", "no folder for results alone"),
    ],
)
def test_an_output_that_cannot_be_a_folder_of_results(output, says):
    with pytest.raises(RunError, match=says):
        load_configuration({"sheet": "s.csv", "output": output})
