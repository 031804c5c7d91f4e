"""A Slurm cluster of one node, for tests: slurmctld, slurmd and munged of its own, on ports and in folders of its own.

Nothing outside its folder is read or written, so it runs beside other tests, beside a Slurm of the machine, and without
root. The Slurm commands find it through wrappers in its `bin`: an environment variable would not do, because the
executor plugin takes Slurm's variables out of the environment of its jobs.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sacct", "salloc", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"])
PREFIX = "slidemake-slurm-"
PATIENCE = 180  # seconds after which something is taken to have gone wrong; no test is about time

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
AuthType=auth/munge
CredType=cred/munge
# a requeued job may start again when its old credential has expired: 120 s later, if nothing is said here
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
# the node has what this file says, whatever the machine has: jobs only wait for each other
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
SlurmdTimeout=3600
SlurmctldTimeout=60
KillWait=5
InactiveLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 \
RealMemory=20000 Gres=gpu:1 State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=1-00:00:00 State=UP
PartitionName=gpu Nodes={host} MaxTime=1-00:00:00 State=UP
"""
WRAPPER = """\
#!/bin/sh
SLURM_CONF={conf} exec {command} "$@"
"""


def missing() -> list[str]:
    """Programs of Slurm that this machine lacks."""
    return [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=PATH) is None]


@dataclass
class Cluster:
    """A running cluster. `bin` has to come first on the PATH of whoever uses it."""

    folder: Path
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    def command(self, *words: str) -> str:
        """Run a Slurm command; returns what it printed."""
        ended = subprocess.run([str(self.bin / words[0]), *words[1:]], capture_output=True, text=True, timeout=PATIENCE)
        if ended.returncode:
            raise RuntimeError(f"{' '.join(words)}: {ended.stderr}{ended.stdout}")
        return ended.stdout

    def jobs(self) -> list[Job]:
        """Every job that the cluster has ever had, tasks of arrays one by one."""
        text = self.command("scontrol", "--oneliner", "--all", "show", "job")
        return [Job.parse(line) for line in text.splitlines() if line.startswith("JobId=")]

    def start_daemon(self, name: str) -> None:
        """Start munged, slurmctld or slurmd; it ends with this process, however that ends."""
        conf = ["-f", str(self.folder / "slurm.conf")]
        munge = self.folder / "munge"
        arguments = {
            "munged": [
                "--foreground",
                "--force",
                f"--key-file={munge / 'key'}",
                f"--socket={munge / 'socket'}",
                f"--pid-file={munge / 'pid'}",
                f"--log-file={munge / 'log'}",
                f"--seed-file={munge / 'seed'}",
            ],
            "slurmctld": ["-D", *conf],
            "slurmd": ["-D", *conf],
        }[name]
        executable = shutil.which(name, path=PATH)
        assert executable, f"{name} is not installed"
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                [executable, *arguments],
                cwd=self.folder,
                env={**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )

    def kill_slurmd(self) -> None:
        """kill -9: its jobs go on without it."""
        self.daemons["slurmd"].kill()
        self.daemons["slurmd"].wait()

    def kill_node(self) -> None:
        """kill -9 for slurmd and for every job of the node, as when its power fails, and Slurm is told."""
        self.kill_slurmd()
        kill_processes(lambda text: self._mark in text and (b"SLURM_JOB_ID=" in text or b"slurmstepd" in text))
        self.command("scontrol", "update", f"NodeName={self.node}", "State=DOWN", "Reason=power")

    def start_node(self) -> None:
        self.start_daemon("slurmd")
        with contextlib.suppress(RuntimeError):  # it may have come up by itself, by registering
            self.command("scontrol", "update", f"NodeName={self.node}", "State=RESUME")
        wait_for("a node that takes jobs", lambda: self.node_state() in ("idle", "mixed", "allocated"))

    @property
    def node(self) -> str:
        return node_name()

    @property
    def _mark(self) -> bytes:
        return os.fsencode(self.folder)

    def node_state(self) -> str:
        return self.command("sinfo", "--noheader", "--format=%T", "--partition=cpu").strip()

    def logs(self) -> str:
        """The ends of the daemons' logs, for messages of failed tests."""
        texts = []
        for path in sorted(self.folder.glob("*.out")):
            texts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(texts)

    def stop(self) -> None:
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        kill_processes(lambda text: self._mark in text)


@dataclass(frozen=True)
class Job:
    """What `scontrol show job` says of a job; tasks of arrays are jobs with an id of their own, too."""

    id: str
    state: str
    rule: str  # and wildcards: <rule>[_wildcards_<values>]; of an array, those of its first task
    fields: dict[str, str]

    @classmethod
    def parse(cls, line: str) -> Job:
        fields = dict(re.findall(r"(\w[\w/:]*)=(\S*)", line))
        rule = re.search(r"Comment=rule_(\S*)", line)
        return cls(fields["JobId"], fields["JobState"], rule[1] if rule else "", fields)


def wait_for(what: str, condition: Callable[[], object], patience: float = PATIENCE) -> object:
    """Poll until `condition` is true, and return what it gave."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited for {patience:.0f} s in vain: {what}")


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a cluster and wait until its node is idle; stop it, with all that runs on it."""
    remove_leftovers()
    host = node_name()
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise RuntimeError(f"this machine cannot resolve its own name, {host}, as Slurm wants it: {error}") from error
    # not in pytest's folder: a socket's path has at most 107 characters, and others must be able to reach it
    made = Cluster(Path(tempfile.mkdtemp(prefix=PREFIX)))
    try:
        _configure(made.folder)
        made.bin.chmod(0o755)
        for name in DAEMONS:
            made.start_daemon(name)
            if name == "munged":
                wait_for("munged", (made.folder / "munge" / "socket").exists)
        try:
            wait_for("an idle node", lambda: _idle(made))
        except AssertionError as error:
            raise RuntimeError(f"Slurm did not start.\n{made.logs()}") from error
        yield made
    finally:
        made.stop()
        shutil.rmtree(made.folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    folder.chmod(0o755)
    for name in ("state", "spool", "munge", "bin"):
        (folder / name).mkdir(mode=0o755)
    (folder / "owner").write_text(str(os.getpid()))
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    ports = _free_ports(2)
    conf = folder / "slurm.conf"
    conf.write_text(
        SLURM_CONF.format(
            folder=folder,
            host=node_name(),
            user=getpass.getuser(),
            ctld_port=ports[0],
            slurmd_port=ports[1],
        )
    )
    # a GPU only by name: a device that is there on every machine
    (folder / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/null\n")
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n")
    for name in COMMANDS:
        wrapper = folder / "bin" / name
        wrapper.write_text(WRAPPER.format(conf=conf, command=shutil.which(name, path=PATH)))
        wrapper.chmod(0o755)


def node_name() -> str:
    return socket.gethostname().partition(".")[0]


def _idle(made: Cluster) -> bool:
    dead = [name for name, daemon in made.daemons.items() if daemon.poll() is not None]
    assert not dead, f"ended at once: {dead}"
    try:
        return made.node_state() == "idle"
    except RuntimeError:  # slurmctld does not answer yet
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def kill_processes(chosen: Callable[[bytes], bool]) -> None:
    """kill -9 for every process whose command line and environment (joined by NUL) are `chosen`."""
    for _ in range(50):  # they may start others meanwhile
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):  # gone, or somebody else's
                if chosen((entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()):
                    found.append(int(entry.name))
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    raise RuntimeError(f"processes that do not die: {found}")


def remove_leftovers() -> None:
    """Stop and delete clusters whose tests were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            os.kill(int((folder / "owner").read_text()), 0)
        except ProcessLookupError:
            mark = os.fsencode(folder)
            kill_processes(lambda text, mark=mark: mark in text)  # type: ignore[misc]
            shutil.rmtree(folder, ignore_errors=True)
        except (FileNotFoundError, ValueError, PermissionError):
            continue  # just being made, or another user's
