"""What a rule's script does around the library, and which device a job gets."""

import os
from types import SimpleNamespace

import pytest
from slidemake.core.failures import RunError
from slidemake.jobs.job import available_cpus, cgroup_quotas, job


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


def write_files(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "found"),
    [
        # a container: its cgroup is the root of what it sees
        ("0::/\n", {"cpu.max": "250000 100000\n"}, [2.5]),
        # a service with a quota in a slice with one, and a parent without
        (
            "0::/a.slice/b.service\n",
            {"a.slice/b.service/cpu.max": "400000 100000", "a.slice/cpu.max": "50000 100000", "cpu.max": "max 100000"},
            [4.0, 0.5],
        ),
        # version 1, no limit at the root
        (
            "7:memory:/x\n4:cpu,cpuacct:/docker/7f\n0::/\n",
            {
                "cpu,cpuacct/docker/7f/cpu.cfs_quota_us": "300000\n",
                "cpu,cpuacct/docker/7f/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "memory/x/cpu.max": "1 1",
            },
            [3.0],
        ),
        # the path is the host's, and only the root is mounted
        ("0::/kubepods/pod1\n", {"cpu.max": "100000 100000"}, [1.0]),
        ("0::/\n", {}, []),
    ],
)
def test_quotas_of_cgroups(own, files, found, tmp_path):
    write_files(tmp_path / "fs", files)
    (tmp_path / "own").write_text(own)
    assert cgroup_quotas(str(tmp_path / "fs"), str(tmp_path / "own")) == found
    assert cgroup_quotas(str(tmp_path / "fs"), str(tmp_path / "absent")) == []


def test_a_quota_bounds_the_cpus(monkeypatch):
    monkeypatch.setattr("slidemake.jobs.job.cgroup_quotas", lambda: [0.5])
    assert available_cpus() == 1
    monkeypatch.setattr("slidemake.jobs.job.cgroup_quotas", lambda: [1000.0])
    assert available_cpus() == len(os.sched_getaffinity(0))
