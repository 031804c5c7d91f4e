"""A small slice of `make validate`: one composed cohort of real tiles, from the folder to the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from snakemake_run import CONFIG, REPO, environment


@pytest.mark.long
@pytest.mark.workflow
def test_a_folder_of_tiles_is_validated(real_data: Path, tmp_path: Path):
    quick = {key: CONFIG[key] for key in ("rack_size", "tissue", "models", "evaluation")}
    quick["tasks"] = {"tumour": {"splits": CONFIG["tasks"]["tumour"]["splits"]}}
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(quick))
    ended = subprocess.run(
        [
            *(sys.executable, str(REPO / "benchmarks" / "validate.py"), "--tiles", str(real_data / "tiles_colon")),
            *("--cohorts", "1", "--seed", "3", "--patients", "10", "--across", "4", "--stain", "sites", "--sites", "2"),
            *("--configuration", "quick.yaml", "--out", "out", "--cores", "1"),
        ],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    # One cohort proves nothing by itself (no interval): only the masks can fail, and they are good.
    assert ended.returncode == 0, ended.stdout[-4000:]
    (cohort,) = json.loads((tmp_path / "out" / "validation.json").read_text())["cohorts"]
    assert cohort["slides"] == 10
    assert cohort["failed"] == {}
    assert set(cohort["auroc"]) >= {"abmil", "mean_pool_lr", "site_only", "shuffled_label"}
    assert cohort["mask_iou"] > 0.9
    assert cohort["tiles_supervised"] > 0.9  # real tumour tiles are told apart: features, masks and coordinates agree
    assert 0 <= cohort["attention"] <= 1
    assert sum(sum(kinds.values()) for kinds in cohort["stain"].values()) == 10
    assert "| 3-0 |" in ended.stdout
    assert "plain ABMIL" in (tmp_path / "out" / "validation.md").read_text()
