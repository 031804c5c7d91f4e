"""The library as a house: who may import whom, no circles, packages that say what is in them, a wheel that has it all.

`python tests/unit/test_house.py` writes the picture in docs/architecture.md anew.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "scripts" / "slidemake"
PAGE = ROOT / "docs" / "architecture.md"
FROM, TO = "<!-- picture: python tests/unit/test_house.py -->", "<!-- /picture -->"

# package -> packages that its files may import; in the order of the data. What is not here is forbidden.
MAY_IMPORT = {
    "core": "",
    "statistics": "",
    "jobs": "core",
    "stores": "core",
    "tasks": "core statistics",
    "splits": "core statistics tasks",
    "cohort": "core tasks splits",
    "configuration": "core tasks splits cohort",
    "slides": "core jobs cohort",
    "tissue": "core stores slides",
    "stain": "core slides tissue",
    "tiles": "core jobs stores slides tissue stain",
    "encoders": "core jobs stores",
    "interchange": "core stores encoders",  # files of other tools become stores of embeddings: it needs no pixels
    "embedding": "core jobs stores slides tissue stain tiles encoders",
    "mil": "core statistics stores tasks configuration",
    "training": "core statistics tasks splits mil",
    "evaluation": "core statistics tasks",
    "drift": "core statistics tasks mil evaluation",
    "robustness": "core jobs statistics tasks splits embedding mil evaluation",
    "explain": "core jobs statistics stores slides splits embedding mil",
    "report": "core jobs stores tasks stain robustness",
    "workflow": "core jobs stores tasks configuration cohort splits slides stain encoders interchange embedding mil",
    "demo": "core",
}
WINGS = {
    "ground": "core statistics stores jobs",
    "entrance": "tasks splits cohort configuration",
    "slide wing": "slides tissue stain tiles encoders interchange embedding",
    "patient wing": "mil training evaluation drift",
    "where they meet": "robustness explain",
    "roof": "report workflow demo",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(LIBRARY.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, set[str]]:
    """{file of the library: files that it imports}, also those that a function imports when it runs."""
    files = {name_of(path): path for path in LIBRARY.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "slidemake":
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= {module if module in files else str(node.module) for module in full}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name.split(".")[0] == "slidemake"}
    return found


def room(module: str) -> str:
    return (module.split(".") + [""])[1]


def needs(package: str) -> set[str]:
    """Other packages that files of this one import."""
    return {room(other) for file in imports() if room(file) == package for other in imports()[file]} - {package, ""}


def test_every_package_imports_what_it_may():
    assert {path.name for path in LIBRARY.iterdir() if (path / "__init__.py").exists()} == set(MAY_IMPORT)
    assert set(MAY_IMPORT) == {package for names in WINGS.values() for package in names.split()}
    wrong = [
        f"{file} -> {other}"
        for file, others in imports().items()
        for other in others
        if room(file) in MAY_IMPORT and room(other) not in {room(file), "", *MAY_IMPORT[room(file)].split()}
    ]
    assert wrong == []


def test_what_may_be_imported_is():
    """A permission that nobody needs is an invitation."""
    needed = {
        package: {room(other) for f in imports() if room(f) == package for other in imports()[f]}
        for package in MAY_IMPORT
    }
    unused = {package: sorted(set(may.split()) - needed[package]) for package, may in MAY_IMPORT.items()}
    assert {package: names for package, names in unused.items() if names} == {}


def test_the_wings_do_not_know_each_other():
    slide, patient = (set(WINGS[wing].split()) for wing in ("slide wing", "patient wing"))
    for one, other in ((slide, patient), (patient, slide)):
        assert not [(package, name) for package in one for name in MAY_IMPORT[package].split() if name in other]


def test_no_file_imports_itself_through_others():
    graph, state = imports(), {}

    def visit(file: str, way: list[str]) -> None:
        state[file] = "open"
        for other in sorted(graph[file] & set(graph)):
            assert state.get(other) != "open", f"a circle: {' -> '.join([*way, other])}"
            if other not in state:
                visit(other, [*way, other])
        state[file] = "done"

    for file in sorted(graph):
        if file not in state:
            visit(file, [file])


def test_private_names_stay_in_their_file():
    wrong = []
    for path in [*LIBRARY.rglob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "slidemake":
                private = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
                wrong += [f"{path.relative_to(ROOT)}: {node.module}.{name}" for name in private]
    assert wrong == []


@pytest.mark.parametrize("package", [path.parent for path in LIBRARY.rglob("__init__.py") if path.parent != LIBRARY])
def test_a_package_says_what_is_in_it(package: Path):
    said = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    files = [path.stem for path in package.glob("*.py") if path.stem != "__init__"]
    assert [name for name in files if name not in said] == []
    assert len(files) <= 18


def test_the_wheel_has_the_whole_library(tmp_path: Path):
    """Built, unpacked and imported: every module, with its schemas, records and templates."""
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    copy = tmp_path / "copy"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if name.startswith("scripts/slidemake/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    installed = tmp_path / "installed" / "slidemake"
    theirs = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    source = copy / "scripts" / "slidemake"
    ours = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert theirs == ours
    program = f"""
import importlib, pkgutil, sys
sys.path.insert(0, {str(tmp_path / "installed")!r})
import slidemake
assert slidemake.__file__.startswith({str(installed)!r})
for module in pkgutil.walk_packages(slidemake.__path__, "slidemake."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from slidemake.configuration.load import load_configuration
from slidemake.encoders.registry import registry
from pathlib import Path
assert len(registry()) > 5
load_configuration({{"sheet": "slides.csv", "output": "results"}}, Path("."))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# -- the picture in docs/architecture.md ----------------------------------------------------------------------------


def picture() -> str:
    """A graph of packages (what others bring is not drawn again) and a table of them, from the code."""

    def brought(package: str) -> set[str]:
        return {name for other in needs(package) for name in {other, *brought(other)}}

    lines = ["```mermaid", "flowchart BT"]
    for wing, names in WINGS.items():
        lines += [f'  subgraph "{wing}"', *(f"    {package}" for package in names.split()), "  end"]
    for package in MAY_IMPORT:
        direct = {n for n in needs(package) if not any(n in brought(other) for other in needs(package) - {n})}
        lines += [f"  {package} --> {other}" for other in sorted(direct)]
    lines += ["```", "", "| package | what it is | files | imports |", "|---|---|---|---|"]
    for wing, names in WINGS.items():
        lines.append(f"| *{wing}* | | | |")
        for package in names.split():
            text = ast.get_docstring(ast.parse((LIBRARY / package / "__init__.py").read_text())) or ""
            files = [path for path in (LIBRARY / package).rglob("*.py") if path.stem != "__init__"]
            lines.append(
                f"| `{package}` | {text.splitlines()[0]} | {len(files)} | {', '.join(sorted(needs(package)))} |"
            )
    return "\n".join(lines)


def test_the_picture_is_drawn_from_the_code():
    between = PAGE.read_text().split(FROM)[1].split(TO)[0].strip()
    assert between == picture(), "run python tests/unit/test_house.py"


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(FROM)
    PAGE.write_text(f"{before}{FROM}\n{picture()}\n{TO}{rest.split(TO)[1]}")
    print(f"wrote {PAGE}")
