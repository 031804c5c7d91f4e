"""What jobs do not import: each of these takes a second or two of every job, wherever nobody asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
# what a job does before it knows whether anything is left to do -> packages that it must not have imported by then
CASES = {
    "embedding of a rack that is finished": (
        "from slidemake.embedding.stage import device_on_demand, known_encoder, make_slide_job, process_rack\n"
        "from slidemake.encoders.registry import load_record\n"
        "record = load_record('random_resnet18')\n"
        "known_encoder(record.as_dict(), {'precisions': {record.slug: 'fp32'}})\n"
        "with device_on_demand({'device': 'auto'}, {'gpu': 'here'}, 1) as device:\n"
        "    assert process_rack([], [], device=device, dtype='float16', batch_size='auto') == []\n",
        {"torch", "timm", "sklearn", "dask"},
    ),
    "training": ("import slidemake.training.train\n", {"sklearn", "timm"}),
    "tiles": ("import slidemake.tiles.stage\n", {"torch", "distributed", "sklearn"}),
    "shards on threads": (
        "from slidemake.tiles.stage import run_shards\nassert run_shards([], 2, 'threads', None) == []\n",
        {"torch", "distributed"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_job_imports_only_what_it_needs(name):
    code, unwanted = CASES[name]
    code += f"import sys\nprint(sorted({unwanted!r} & set(sys.modules)))\n"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
