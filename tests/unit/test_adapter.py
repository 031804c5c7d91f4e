"""What a rule's script does around the library, and which device a job gets."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from slidemake.adapter import available_cpus, job
from slidemake.devices import claimed_device
from slidemake.failures import RunError


def fake(tmp_path):
    return SimpleNamespace(log=[str(tmp_path / "logs" / "rule.log")], rule="a_rule")


def run_failing(snakemake, error):
    with job(snakemake):
        raise error


def test_a_run_error_is_its_message_and_no_traceback(tmp_path, capfd):
    with pytest.raises(SystemExit) as caught:
        run_failing(fake(tmp_path), RunError("no space left; free some"))
    assert caught.value.code == 1
    assert capfd.readouterr().err == "no space left; free some\n"
    log = (tmp_path / "logs" / "rule.log").read_text()
    assert "no space left; free some" in log
    assert "Traceback" not in log


def test_anything_else_keeps_its_traceback_in_the_log(tmp_path, capfd):
    with pytest.raises(SystemExit):
        run_failing(fake(tmp_path), KeyError("x"))
    shown = capfd.readouterr().err
    assert "a_rule stopped: KeyError" in shown
    assert "rule.log" in shown
    assert "Traceback" not in shown
    assert "Traceback" in (tmp_path / "logs" / "rule.log").read_text()


def test_cpus_are_those_of_this_process():
    assert 1 <= available_cpus() <= len(os.sched_getaffinity(0))


def test_without_a_gpu_the_device_is_the_cpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with claimed_device("auto") as device:
        assert device == "cpu"
    with pytest.raises(RunError, match="no CUDA device"):
        claimed_device("cuda").__enter__()


CLAIM = """
import sys, time, pathlib, torch
from slidemake.devices import claimed_device
torch.cuda.device_count = lambda: 2
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with claimed_device("auto", str(folder)) as device:
    (folder / f"{name}.claim").write_text(device)
    while not (folder / "release").exists():
        time.sleep(0.05)
"""


def claims(folder, count):
    """{job: device} once `count` jobs have one."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = {path.stem: path.read_text() for path in folder.glob("*.claim")}
        if len(found) >= count and all(found.values()):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{count} claims did not come")


@pytest.mark.skipif(sys.platform != "linux", reason="file locks are tested on Linux")
def test_every_job_gets_a_gpu_to_itself(tmp_path):
    """Three jobs, two GPUs: two get one each, the third when one of them ends, even by being killed."""
    scripts = Path(__file__).parents[2] / "scripts"
    command = [sys.executable, "-c", CLAIM, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(scripts)}
    jobs = {name: subprocess.Popen([*command, name], env=environment) for name in "abc"}
    try:
        two = claims(tmp_path, 2)
        assert sorted(two.values()) == ["cuda:0", "cuda:1"]
        killed = next(iter(two))
        jobs[killed].kill()
        three = claims(tmp_path, 3)
        third = (set(three) - set(two)).pop()
        assert three[third] == two[killed]
        (tmp_path / "release").touch()
        assert [jobs[name].wait(60) for name in set("abc") - {killed}] == [0, 0]
    finally:
        for process in jobs.values():
            process.kill()
