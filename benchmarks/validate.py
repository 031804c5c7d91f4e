"""Does slidemake work on tissue that it has never seen? Fresh cohorts from any folder of labelled tiles, run with all
defaults, beside controls and the plainest attention MIL, in one table.

    .venv/bin/python benchmarks/validate.py --tiles FOLDER --cohorts 6 --seed 1
    make validate TILES=FOLDER COHORTS=6 SEED=1

FOLDER has a tiles.csv with the columns path (from that folder), label and group (patient, slide or region). Each cohort
is drawn from the seed: number of sites, stains, size of foci; what is given on the command line is not drawn. Ends with
status 1 where a check fails. docs/validation.md says how to read the table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from cohort_measures import TASK, measure_cohort
from compose import STAINS, Recipe, compose_cohort, draw_recipe
from labelled_tiles import LabelledTiles, read_labelled_tiles
from slidemake.core.failures import RunError
from slidemake.core.files import read_json, versions, write_json, write_text
from validation_table import cohort_table, difference_table, verdicts

REPO = Path(__file__).resolve().parents[1]

DEFAULTS: dict[str, Any] = {
    "sheet": "slides.csv",
    "output": "results",
    "tasks": {TASK: {"label": "label", "positive": "tumour"}},
}
COARSEST_MPP = 0.525  # the default encoder's 0.5 um/px, and the 5 % by which a slide may be coarser


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid upon `base`, section by section."""
    both = dict(base)
    for key, value in over.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def run_workflow(cohort: Path, configuration: dict[str, Any], cores: int) -> None:
    """The whole workflow on a composed cohort, by the command that users give; what it printed goes to terminal.txt."""
    text = yaml.safe_dump(configuration, sort_keys=False)
    if not (cohort / "config.yaml").is_file() or (cohort / "config.yaml").read_text() != text:
        write_text(cohort / "config.yaml", text)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPO / "Snakefile"), "--cores", str(cores)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with open(cohort / "terminal.txt", "w", encoding="utf-8") as terminal:
        ended = subprocess.run(
            [*command, "--configfile", "config.yaml"],
            cwd=cohort,
            stdout=terminal,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path},
            check=False,
        )
    if ended.returncode:
        lines = (cohort / "terminal.txt").read_text(errors="replace").splitlines()
        last = "\n".join(lines[-12:])
        raise RunError(f"the run ended with an error; all of it is in {cohort / 'terminal.txt'}, which ends:\n{last}")


def validate_cohort(number: int, recipe: Recipe, tiles: LabelledTiles, options: argparse.Namespace) -> dict[str, Any]:
    """Compose, run and measure one cohort; what is finished of an earlier attempt is kept."""
    name = f"{options.seed}-{number}"
    cohort, started = options.out / f"cohort-{name}", time.perf_counter()

    def say(what: str) -> None:
        print(f"cohort {number + 1} of {options.cohorts} ({name}): {what}", flush=True)

    say(f"composing {recipe.patients} slides: {recipe.in_words()}")
    slides = compose_cohort(cohort, tiles, recipe, [options.seed, number], options.mpp, options.cores)
    spoilt = sorted({path for slide in slides for path in slide["spoilt"]})
    if spoilt:
        say(f"{len(spoilt)} tiles cannot be read and are left out: {', '.join(spoilt[:3])}{' ...' * (len(spoilt) > 3)}")
    say(f"running the workflow (log: {cohort / 'terminal.txt'})")
    run_workflow(cohort, merged(DEFAULTS, options.configuration), options.cores)
    say("plain ABMIL on the same features, and the masks")
    shares = [slide["tumour_fraction"] for slide in slides if slide["tumour_fraction"]]
    found = measure_cohort(cohort) | {
        "name": name,
        "recipe": recipe.in_words(),
        "tumour_fraction": [min(shares), max(shares)],
        "reused": round(sum(s["tiles"] for s in slides) / sum(s["distinct"] for s in slides), 2),
        "spoilt": len(spoilt),
        "seconds": round(time.perf_counter() - started, 1),
    }
    own = found["models"][0]
    say(f"AUROC {found['auroc'][own]:.2f}, plain ABMIL {found['plain']:.2f}, {found['seconds'] / 60:.1f} minutes")
    return found


def page(cohorts: list[dict[str, Any]], before: dict[str, Any] | None) -> str:
    """The tables, what the cohorts are like, and the checks, as Markdown."""
    lines = [cohort_table(cohorts), "", difference_table(cohorts, before), ""]
    for cohort in cohorts:
        low, high = cohort["tumour_fraction"]
        lines.append(
            f"- {cohort['name']}: {cohort['slides']} patients, {cohort['recipe']}; tumour in {low:.0%} to "
            f"{high:.0%} of the tissue, {cohort['tiles']} tiles, each source tile laid {cohort['reused']:.1f} times"
        )
    checks = [f"- {'ok' if passed else 'FAILED'}: {text}" for passed, text in verdicts(cohorts, before)]
    return "\n".join([*lines, "", *checks, ""])


def validate(options: argparse.Namespace) -> int:
    """All cohorts; prints the tables and writes validation.json and validation.md. Returns the exit status."""
    if options.mpp > COARSEST_MPP:
        raise RunError(
            f"--mpp is {options.mpp:g} um/px, and the default encoder reads 0.5: tiles are not enlarged. Give a "
            "folder of finer tiles, or the tiles' true um per px"
        )
    tiles = read_labelled_tiles(options.tiles, options.benign, options.tumour, options.ungrouped)
    given = {name: getattr(options, name) for name in ("across", "sites", "stain", "jitter", "focus", "confound")}
    recipes = [draw_recipe(options.seed, i, options.patients, **given) for i in range(options.cohorts)]
    before = _before(options.against)
    options.out.mkdir(parents=True, exist_ok=True)
    print(
        f"{options.tiles}: {sum(map(len, tiles.benign.values()))} benign tiles in {len(tiles.benign)} groups, "
        f"{sum(map(len, tiles.tumour.values()))} tumour tiles in {len(tiles.tumour)} groups, {tiles.side} px at "
        f"{options.mpp:g} um/px; everything goes to {options.out}",
        flush=True,
    )
    cohorts, broken = [], []
    for number, recipe in enumerate(recipes):
        try:
            cohorts.append(validate_cohort(number, recipe, tiles, options))
        except RunError as error:
            broken.append(f"cohort {options.seed}-{number}: {error}")
            print(broken[-1], file=sys.stderr, flush=True)
        write_json(options.out / "validation.json", {"versions": versions(), "cohorts": cohorts, "broken": broken})
    if cohorts:
        text = page(cohorts, before)
        write_text(options.out / "validation.md", text)
        print(f"\n{text}")
    for message in broken:
        print(f"FAILED: {message.splitlines()[0]}")
    return int(bool(broken) or not all(passed for passed, _ in verdicts(cohorts, before)))


def _before(path: Path | None) -> dict[str, Any] | None:
    """Cohorts of an earlier validation.json by name."""
    if path is None:
        return None
    try:
        return {cohort["name"]: cohort for cohort in read_json(path)["cohorts"]}
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"--against {path} is not a validation.json: {error}") from error


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; numbers that are not given are drawn for each cohort."""
    words = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=words)

    def names(text: str) -> list[str]:
        return [name for name in (part.strip() for part in text.split(",")) if name]

    add = parser.add_argument
    add("--tiles", type=Path, required=True, help="folder of labelled tiles, with tiles.csv")
    add("--cohorts", type=int, default=6, help="how many (default: 6)")
    add("--seed", type=int, default=1, help="another seed, other cohorts (default: 1)")
    add("--patients", type=int, default=30, help="per cohort, half of them with a tumour (default: 30)")
    add("--mpp", type=float, default=0.5, help="um per px of the tiles (default: 0.5)")
    add("--benign", type=names, default=[], help="labels of benign tiles, separated by commas; default: by their names")
    add("--tumour", type=names, default=[], help="labels of tumour tiles; default: the other one")
    add("--ungrouped", action="store_true", help="tiles.csv has no group: each tile is of a patient of its own")
    add("--out", type=Path, help="folder of cohorts and results (default: validation/<name of the tiles' folder>)")
    add("--cores", type=int, default=len(os.sched_getaffinity(0)), help="default: all")
    add("--configuration", type=Path, help="a YAML laid over the defaults, to validate other settings")
    add("--against", type=Path, help="validation.json of an earlier run of the same seed: is it worse now?")
    add("--across", type=int, help="diameter of the tissue, tiles of 112 um (drawn: 9 to 12)")
    add("--sites", type=int, help="drawn: 1 to 4")
    add("--stain", choices=STAINS, help="mixed: by patient, sites: by site (dealt in turn)")
    add("--jitter", type=float, help="share by which patients' stains differ from their site's (drawn: 0 to 0.25)")
    add("--focus", type=float, nargs=2, metavar=("LOW", "HIGH"), help="radius of foci, of the diameter (drawn)")
    add("--confound", type=float, help="share of tumour patients from the first site (0.5: independent)")
    options = parser.parse_args(arguments)
    options.tiles = options.tiles.resolve()
    options.out = (options.out or Path("validation") / options.tiles.name).resolve()
    options.focus = tuple(options.focus) if options.focus else None
    options.configuration = yaml.safe_load(options.configuration.read_text()) or {} if options.configuration else {}
    if options.cohorts < 1 or options.cores < 1 or options.mpp <= 0:
        parser.error("--cohorts and --cores must be 1 or more, --mpp above 0")
    return options


def main() -> None:
    """Print the tables; exit status 1 where a check fails, 2 where nothing could be done."""
    try:
        sys.exit(validate(parse()))
    except RunError as error:
        print(f"validate: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
