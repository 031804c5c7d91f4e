"""Many dry runs for the price of one: Snakemake is imported once, and every plan is made in a fork of that process.

`python planner.py REQUESTS ANSWERS`: REQUESTS is a JSON list of {folder, cwd, files, gone, replaced, arguments,
versions}; `files` ({name: text or null}) are put into the folder for that plan (null: removed), with a time of long
ago, and what they replace is put back; `gone` are moved out of it meanwhile; `replaced` are files of the user's that
look as if they were others; `versions` ({stage: number}) stand for a slidemake whose stages have other versions.
ANSWERS gets a list of [exit code, terminal].
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
LONG_AGO = 946684800  # the year 2000


def plans(requests: list[dict[str, Any]], env: dict[str, str]) -> list[tuple[int, str]]:
    """(exit code, terminal) of the dry run of each request."""
    with tempfile.TemporaryDirectory() as work:
        asked, answered = Path(work) / "requests.json", Path(work) / "answers.json"
        asked.write_text(json.dumps(requests))
        subprocess.run([sys.executable, __file__, str(asked), str(answered)], check=True, env=env, timeout=900)
        return [(code, text) for code, text in json.loads(answered.read_text())]


def _plan(request: dict[str, Any], terminal: Path) -> int:
    folder = Path(request["folder"])
    names = request.get("files", {})
    kept = {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in names}
    gone = [folder / name for name in request.get("gone", ())]
    for path in gone:
        path.rename(path.with_name(f"{path.name}.gone"))
    for name, text in names.items():
        _put(folder / name, None if text is None else text.encode())
        if text is not None:
            os.utime(folder / name, (LONG_AGO, LONG_AGO))
    try:
        pid = os.fork()
        if pid == 0:
            _dry_run(request, folder, terminal)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        for name, content in kept.items():
            _put(folder / name, content)
        for path in gone:
            path.with_name(f"{path.name}.gone").rename(path)


def _put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


def _dry_run(request: dict[str, Any], folder: Path, terminal: Path) -> None:
    """In the fork, which ends here."""
    code = 1
    try:
        with open(terminal, "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.chdir(request.get("cwd", folder))
        from slidemake.core import currency
        from slidemake.core.stages import STAGE_VERSIONS
        from slidemake.workflow import snakemake_plan as planning
        from snakemake import cli

        known, replaced = currency.identity, set(request.get("replaced", ()))
        currency.identity = planning.identity = lambda path: "another file" if path in replaced else known(path)
        STAGE_VERSIONS.update(request.get("versions", {}))
        try:
            cli.main(["--dry-run", *request["arguments"]])
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(asked: str, answered: str) -> None:
    sys.path.insert(0, str(REPO / "scripts"))
    for name in (
        "snakemake.cli",
        "snakemake.api",
        "snakemake.report.html_reporter",
        "slidemake.workflow.plan",
        "jsonschema",
    ):
        importlib.import_module(name)  # once, for all forks
    answers = []
    for number, request in enumerate(json.loads(Path(asked).read_text())):
        terminal = Path(asked).parent / f"{number}.txt"
        code = _plan(request, terminal)
        answers.append([code, terminal.read_text()])
    Path(answered).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
