"""Snakemake and its jobs without the price of starting Python: all are forks of one process that has imported it all.

A run of the small cohort takes 28 jobs, each of which imports for seconds and works for a tenth of that. Here the real
Snakemake runs the real scripts, each in a process of its own, in the same folders and with the same arguments; only the
interpreter is not started anew. `Warm().run(folder, arguments)` is such a run; `kill_in` ends it and all its jobs, as
when a machine goes down, while a job of that rule is in work.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
KILLED = "WARM_KILL"  # rule and seconds, for Snakemake's process
IMPORTED = (
    *("torch._dynamo", "torch.optim", "distributed", "requests", "matplotlib.backends.backend_agg", "PIL.ImageOps"),
    *("snakemake.cli", "snakemake.api", "snakemake.script", "snakemake.report.html_reporter", "jsonschema", "psutil"),
    *("torch", "zarr", "sklearn.linear_model", "scipy.stats", "skimage.measure", "matplotlib.pyplot", "PIL.Image"),
    *(
        "slidemake.workflow.plan",
        "slidemake.workflow.snakemake_plan",
        "slidemake.training.train",
        "slidemake.report.page",
        "slidemake.embedding.stage",
    ),
    *(
        "slidemake.encoders.loading",
        "slidemake.explain.stage",
        "slidemake.evaluation.evaluate",
        "slidemake.stores.tile_store",
    ),
    *(
        "slidemake.tissue.stage",
        "slidemake.stain.stage",
        "slidemake.slides.screening",
        "slidemake.robustness.shortcuts",
    ),
)


class Warm:
    """The process that everything is forked from. A context manager. first: a file of Python that it runs first."""

    def __init__(self, first: Path | None = None):
        self.first = [str(first)] if first else []

    def __enter__(self) -> Warm:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self.address = str(Path(self._folder.name) / "socket")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO / "scripts")}
        self._server = subprocess.Popen([sys.executable, __file__, self.address, *self.first], env=environment)
        while not os.path.exists(self.address):
            if self._server.poll() is not None:
                raise RuntimeError("the warm process could not start")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.terminate()
        self._server.wait()
        self._folder.cleanup()

    def run(
        self,
        folder: Path,
        arguments: list[str],
        terminal: Path,
        kill_in: tuple[str, float] | None = None,
        **env: str,
    ) -> int | None:
        """Snakemake with `arguments` in `folder`: its exit code; None when it was killed.

        kill_in: a rule, and for how many seconds its first job may work; one that is done sooner is the last, too.
        """
        request = {"kind": "snakemake", "folder": str(folder), "arguments": arguments, "terminal": str(terminal)}
        killed = {KILLED: f"{kill_in[0]} {kill_in[1]}"} if kill_in else {}
        with asked(self.address, {**request, "env": {**env, **killed}}) as connection:
            code = int(connection.makefile().readline())
        if code != -signal.SIGKILL:
            return code
        time.sleep(0.2)  # its jobs are being killed
        return None


@contextlib.contextmanager
def asked(address: str, request: dict[str, Any]) -> Any:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    connection.sendall(json.dumps(request).encode() + b"\n")
    try:
        yield connection
    finally:
        connection.close()


# -- in the warm process and its forks ---------------------------------------------------------------------------------


def serve(address: str, *first: str) -> None:
    sys.path.insert(0, str(REPO / "scripts"))
    for path in first:
        runpy.run_path(path)
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # forks share what is there, and copy none of it to count references to it
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    running: dict[int, socket.socket] = {}  # process -> who asked for it
    while True:
        ready = select.select([listener, *running.values()], [], [], 0.02)[0]
        if listener in ready:
            connection = listener.accept()[0]
            request = json.loads(connection.makefile().readline())
            pid = os.fork()
            if pid == 0:
                listener.close()
                for other in [connection, *running.values()]:
                    other.close()
                work(address, request)
            running[pid] = connection
        for pid, connection in list(running.items()):
            if connection in ready:  # nobody says more than the request: it was closed
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                with contextlib.suppress(OSError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                connection.close()
                del running[pid]


def work(address: str, request: dict[str, Any]) -> None:
    """In a fork, which ends here."""
    code = 1
    try:
        os.setsid()
        random.seed()
        os.environ.update(request["env"])
        os.chdir(request["folder"])
        if terminal := request.get("terminal"):
            with open(terminal, "a") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
        code = run_snakemake(address, request["arguments"]) if request["kind"] == "snakemake" else run_script(request)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_snakemake(address: str, arguments: list[str]) -> int:
    from snakemake import cli
    from snakemake.jobs import Job
    from snakemake.script import PythonScript

    terminal = os.readlink("/proc/self/fd/1")
    rule, _, seconds = os.environ.pop(KILLED, "").partition(" ")

    def execute_script(self: Any, fname: str, edit: bool = False) -> None:
        request = {"kind": "script", "folder": os.getcwd(), "script": fname, "terminal": terminal}
        with asked(address, {**request, "env": dict(os.environ)}) as connection:
            dies = Path(fname).suffixes[-2:-1] == [f".{rule}"]
            connection.settimeout(float(seconds) if dies else None)
            with contextlib.suppress(TimeoutError):
                code = int(connection.makefile().readline())
            if dies:  # the job goes with it, as its connection is closed
                os.kill(os.getpid(), signal.SIGKILL)
        if code:
            raise subprocess.CalledProcessError(code, fname)

    PythonScript.execute_script = execute_script
    Job.benchmark = property(lambda self: None)  # there is no child whose seconds could be taken
    sys.argv = ["snakemake", *arguments]
    try:
        cli.main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def run_script(request: dict[str, Any]) -> int:
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


if __name__ == "__main__":
    serve(*sys.argv[1:])
