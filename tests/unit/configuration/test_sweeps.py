"""Sweeps: which models they make, what names they get, and how mistakes in them are told."""

import pytest
from slidemake.configuration.load import load_configuration
from slidemake.configuration.sweeps import axis_table, expand_sweeps, sweep_models, word
from slidemake.core.failures import RunError
from slidemake.encoders.registry import REGISTRY, EncoderRecord, load_record, registry
from slidemake.workflow.plan import features_record

RAW = {"sheet": "slides.csv", "output": "results", "tasks": {"t": {"label": "l", "models": ["s", "plain"]}}}
SWEEP = {"aggregator": ["abmil", "transmil"], "invariance": [{}, {"consistency": 5}], "hidden": 64}


def load(sweeps, **more):
    return load_configuration({**RAW, "sweeps": sweeps, "models": {"plain": {}}, **more})


def test_every_combination_is_a_model_of_its_own():
    config = load({"s": SWEEP})
    made = ["s-abmil-plain", "s-abmil-consistency5", "s-transmil-plain", "s-transmil-consistency5"]
    assert config["tasks"]["t"]["models"] == [*made, "plain"]
    assert list(config["models"]) == ["plain", *made]
    assert config["models"]["s-transmil-consistency5"]["invariance"]["consistency"] == 5
    assert {config["models"][name]["hidden"] for name in made} == {64}
    assert config["models"]["plain"]["hidden"] == 128
    assert axis_table(config["sweeps"])["s-abmil-plain"] == {"aggregator": "abmil", "invariance": "plain"}


def test_a_task_that_names_nothing_gets_all_and_a_sweep_alone_is_enough():
    config = load_configuration({**RAW, "tasks": {"t": {"label": "l"}}, "sweeps": {"s": SWEEP}})
    assert len(config["tasks"]["t"]["models"]) == 4
    assert list(config["models"]) == config["tasks"]["t"]["models"]


def test_words():
    assert [word(v) for v in (None, {}, "virchow2:cls", 0.25, {"combat": True, "coral": 0.5}, False)] == [
        "plain",
        "plain",
        "virchow2_cls",
        "0.25",
        "combat_coral0.5",
        "False",
    ]


def test_mistakes_are_told_of_the_sweep_and_once():
    with pytest.raises(
        RunError, match=r"(?s)a problem:\n  sweeps.s.aggregator: \"transmill\".*did you mean transmil\?"
    ):
        load({"s": {**SWEEP, "aggregator": ["abmil", "transmill"]}})
    with pytest.raises(RunError, match=r"sweeps.s.hiden: is not a key; did you mean hidden\?"):
        load({"s": {"hiden": [1, 2]}})
    with pytest.raises(RunError, match=r"sweeps\.s: .* settings of a model"):
        load({"s": [1]})


def test_too_many_or_the_same_twice_or_a_name_that_is_taken():
    with pytest.raises(RunError, match="makes 1000 models"):
        expand_sweeps({"sweeps": {"s": {"seed": list(range(1000))}}})
    with pytest.raises(RunError, match="is a value listed twice"):
        list(sweep_models("s", {"seed": [1, 1]}))
    with pytest.raises(RunError, match="there is a model s already"):
        expand_sweeps({"sweeps": {"s": {"seed": [1, 2]}}, "models": {"s": {}}})


def test_a_stain_method_of_its_own_has_features_of_its_own():
    known = registry([REGISTRY])
    config = {"stain": {"method": "macenko"}}
    features = {
        s: features_record({"encoder": "resnet50", "stain": s}, config, known) for s in (None, "macenko", "none")
    }
    assert features[None] == features["macenko"] == load_record("resnet50", known)
    assert features["none"].slug == "resnet50-none"
    assert "normalisation" not in features[None].as_dict()
    for record in features.values():
        assert EncoderRecord.from_dict(record.as_dict()) == record
