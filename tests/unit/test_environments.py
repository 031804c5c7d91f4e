"""The environments of envs/ hold the packages of the lock: conda's, the container's, and the lock itself.

`python tests/unit/test_environments.py` writes envs/slidemake.yaml anew (`make lock` does); it needs no packages.
"""

from __future__ import annotations

import re
from pathlib import Path

ENVS = Path(__file__).resolve().parents[2] / "envs"
PYTHON = "3.11"
HEAD = """\
# The environment of all rules, for --software-deployment-method conda (profiles/conda), or to work in: conda env create
# -f envs/slidemake.yaml. Written by `make lock`: the packages of requirements.in at the versions of requirements.txt.
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted() -> list[str]:
    """Requirements of requirements.in, names with extras."""
    lines = (line.partition("#")[0].strip() for line in (ENVS / "requirements.in").read_text().splitlines())
    return [re.match(r"[\w.-]+(\[[^\]]*\])?", line)[0] for line in lines if line]  # type: ignore[index]


def locked() -> dict[str, str]:
    """{name: version} of requirements.txt."""
    return {
        canonical(n): v for n, v in re.findall(r"^([\w.-]+)==([^\s;]+)", (ENVS / "requirements.txt").read_text(), re.M)
    }


def conda_yaml() -> str:
    """What envs/slidemake.yaml has to be."""
    versions = locked()
    pins = [f"      - {name}=={versions[canonical(name.partition('[')[0])]}\n" for name in wanted()]
    head = f"channels:\n  - conda-forge\n  - nodefaults\ndependencies:\n  - python={PYTHON}\n  - pip\n  - pip:\n"
    return HEAD + head + "".join(pins)


def test_conda_environment_is_that_of_the_lock():
    assert (ENVS / "slidemake.yaml").read_text() == conda_yaml(), "run python tests/unit/test_environments.py"
    assert len(wanted()) > 20


def test_conda_environment_is_what_conda_reads():
    import yaml
    from packaging.requirements import Requirement
    from packaging.version import Version

    environment = yaml.safe_load((ENVS / "slidemake.yaml").read_text())
    assert set(environment) == {"channels", "dependencies"}
    *plain, pip = environment["dependencies"]
    assert plain == [f"python={PYTHON}", "pip"]
    pinned = {Requirement(line).name: Requirement(line) for line in pip["pip"]}
    asked = (line.partition("#")[0].strip() for line in (ENVS / "requirements.in").read_text().splitlines())
    for requirement in map(Requirement, filter(None, asked)):
        (version,) = pinned.pop(requirement.name).specifier
        assert Version(version.version) in requirement.specifier, requirement
    assert pinned == {}


def sections(recipe: str) -> dict[str, str]:
    """{name: text} of an Apptainer recipe; the header under ""."""
    parts = re.split(r"^%(\w+).*\n", recipe, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_container_installs_the_lock_and_this_slidemake():
    recipe = sections((ENVS / "slidemake.def").read_text())
    assert re.search(rf"^From: python:{PYTHON}-slim-", recipe[""], re.MULTILINE)
    copied = [line.split()[0] for line in recipe["files"].splitlines() if line.strip()]
    assert all((ENVS.parent / name).exists() for name in copied), copied
    assert {"envs/requirements.txt", "pyproject.toml", "README.md", "scripts"} <= set(copied)
    assert "--require-hashes -r envs/requirements.txt" in recipe["post"]
    makefile = (ENVS.parent / "Makefile").read_text()
    for install in re.findall(r"pip install .*", recipe["post"]):  # the same two as in `make setup`
        options = {word for word in install.split() if word.startswith("--")} - {"--no-cache-dir"}
        assert any(options <= set(line.split()) for line in re.findall(r"pip install .*", makefile)), install
    assert "slidemake" in recipe["test"]


def test_image_is_made_as_the_container_and_holds_the_workflow():
    recipe = sections((ENVS / "slidemake.def").read_text())
    dockerfile = (ENVS / "Dockerfile").read_text().replace("\\\n", "")
    assert re.search(r"^FROM (\S+)", dockerfile, re.M)[1] == re.search(r"^From: (\S+)", recipe[""], re.M)[1]  # type: ignore[index]
    packages = [
        re.search(r"--no-install-recommends ([^&\n]*)", text)[1].split() for text in (dockerfile, recipe["post"])
    ]  # type: ignore[index]
    assert packages[0] == packages[1]
    assert "--require-hashes -r envs/requirements.txt" in dockerfile
    copied = {name for line in re.findall(r"^COPY (.*)", dockerfile, re.M) for name in line.split()[:-1]}
    assert all((ENVS.parent / name).exists() for name in copied), copied
    assert {"Snakefile", "rules", "scripts", "config", "profiles"} <= copied


if __name__ == "__main__":
    (ENVS / "slidemake.yaml").write_text(conda_yaml())
    print("wrote envs/slidemake.yaml")
