"""Bags given as tables instead of slides: training and testing as papers on classic MIL data sets do it.

A table is a CSV without header: label (0 or 1) of the bag, name of the bag, then the features of one instance a row.
The protocol is R runs of K-fold cross-validation, stratified, with one model per fold trained for a fixed number of
epochs on all other bags: nothing is chosen on the tested fold. Accuracy is the share of bags whose most probable class
is right, of each run over all its folds.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core import csv_cells
from slidemake.core.failures import RunError
from slidemake.core.files import file_sha256, versions, write_json, write_text
from slidemake.mil.aggregators import AGGREGATORS, predict_bag
from slidemake.mil.bags import Bags, make_bags
from slidemake.mil.fitting import DEFAULTS, fit_member
from slidemake.mil.losses import class_objective
from slidemake.mil.scaling import COMPONENTS
from slidemake.splits.make import Patient, deal_patients

TABLE_COLUMNS = ("data_set", "model", "bags", "ours", "ours_sd", "published", "published_se", "difference", "within")


def read_bag_table(path: str | Path) -> tuple[Bags, dict[str, int]]:
    """Bags of a table, and the class of each; RunError with file and line for what cannot be one."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"There is no table {path}. Give its path under `tables` (docs/paper_tables.md).")
    found: dict[str, tuple[int, list[list[float]]]] = {}
    width = 0
    with open(path, newline="") as handle:
        for line, row in enumerate(csv.reader(handle), 1):
            try:
                label, bag, values = int(row[0]), row[1].strip(), [float(v) for v in row[2:]]
            except (IndexError, ValueError):
                raise RunError(
                    f"{path}, line {line}: a row is the bag's label (0 or 1), its name, and numbers, without header."
                ) from None
            width = width or len(values)
            if label not in (0, 1) or not bag or not values or len(values) != width or not np.isfinite(values).all():
                raise RunError(
                    f"{path}, line {line}: needs a label of 0 or 1, a name, and {width or 'some'} finite numbers."
                )
            if found.setdefault(bag, (label, []))[0] != label:
                raise RunError(f"{path}, line {line}: bag {bag} has both labels; an instance takes its bag's.")
            found[bag][1].append(values)
    if len({label for label, _ in found.values()}) < 2:
        raise RunError(f"{path} has bags of one label only.")
    names = sorted(found)
    features = np.concatenate([np.array(found[name][1]) for name in names]).astype(np.float32)
    encoder = {"key": path.stem, "dim": width}
    bags = make_bags(features, names, names, [len(found[name][1]) for name in names], encoder)
    return bags, {name: found[name][0] for name in names}


def cross_validate(
    bags: Bags, labels: Mapping[str, int], options: Mapping[str, Any], runs: int, folds: int, seed: int = 0
) -> list[dict[str, Any]]:
    """One record a run: its accuracy, and for every bag its fold and the log-odds of class 1, by a model that did not
    see it."""
    settings = {**DEFAULTS, "tile_fraction": 1.0, "max_tiles": None, **options}
    if settings["scaling"] in COMPONENTS:
        settings["components"] = settings["components"] or COMPONENTS[settings["scaling"]]
    settings["min_epochs"] = settings["epochs"]  # without validation bags it ends midway between both
    people = [Patient(name, str(label), "", "", ()) for name, label in sorted(labels.items())]
    records = []
    for run in range(runs):
        fold_of = deal_patients(people, folds, seed + run)
        scores = {}
        for k, fold in enumerate(sorted(set(fold_of.values()), key=int)):
            train = [name for name in sorted(labels) if fold_of[name] != fold]
            member_seed = int(np.random.SeedSequence([seed, run, k]).generate_state(1)[0])
            model = fit_member(
                bags, class_objective(labels, train, 2, settings), train, [], settings, member_seed
            ).model
            for name in sorted(labels):
                if fold_of[name] == fold:
                    logits, _ = predict_bag(model, bags.bag(name))
                    scores[name] = float(logits[1] - logits[0])
        right = [(score > 0) == bool(labels[name]) for name, score in scores.items()]
        records.append({"run": run, "accuracy": float(np.mean(right)), "fold": fold_of, "log_odds": scores})
    return records


def train_bag_table(path: str | Path, options: Mapping[str, Any], runs: int, folds: int, out: str | Path) -> None:
    """Cross-validate on a table and write what came out as JSON."""
    bags, labels = read_bag_table(path)
    records = cross_validate(bags, labels, options, runs, folds)
    about = {"bags": len(labels), "instances": len(bags.features), "features": bags.dim}
    write_json(
        out,
        {
            "format": "slidemake-bag-table",
            "table_sha256": file_sha256(path),
            **about,
            "options": dict(options),
            "folds": folds,
            "runs": records,
            "versions": versions(),
        },
    )


def paper_rows(
    results: Mapping[tuple[str, str], Mapping[str, Any]], published: Mapping[str, Mapping[str, Sequence[float]]]
) -> list[dict[str, Any]]:
    """Ours beside theirs: rows of TABLE_COLUMNS, for results by (data set, model) and published {data set: {model:
    [accuracy, standard error]}}. `within`: ours lies within their accuracy plus or minus their standard error."""
    rows = []
    for (data_set, model), result in results.items():
        accuracy = [run["accuracy"] for run in result["runs"]]
        mean = float(np.mean(accuracy))
        row: dict[str, Any] = {"data_set": data_set, "model": model, "bags": result["bags"], "ours": f"{mean:.3f}"}
        row["ours_sd"] = f"{np.std(accuracy, ddof=1):.3f}" if len(accuracy) > 1 else ""
        theirs = (published.get(data_set) or {}).get(model)
        if theirs:
            row |= {"published": f"{theirs[0]:.3f}", "published_se": f"{theirs[1]:.3f}"}
            row |= {"difference": f"{mean - theirs[0]:+.3f}"}
            row["within"] = "yes" if abs(mean - theirs[0]) <= theirs[1] else "no"
        rows.append(row)
    return rows


def write_paper_table(rows: Sequence[Mapping[str, Any]], csv_path: str | Path, markdown_path: str | Path) -> None:
    """The same table as CSV and as Markdown."""
    text = io.StringIO()
    writer = csv_cells.DictWriter(text, TABLE_COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(csv_path, text.getvalue())
    lines = ["| data set | model | ours (SD of runs) | published (SE) | difference |", "|---|---|---|---|---|"]
    for row in rows:
        ours = row["ours"] + (f" ({row['ours_sd']})" if row["ours_sd"] else "")
        theirs = f"{row['published']} ({row['published_se']})" if row.get("published") else "-"
        lines.append(f"| {row['data_set']} | {row['model']} | {ours} | {theirs} | {row.get('difference', '-')} |")
    write_text(markdown_path, "\n".join(lines) + "\n")


@dataclass(frozen=True)
class Recipe:
    """What a file of config/cohorts/ for tables says."""

    output: str
    tables: dict[str, str]  # data set -> path
    models: dict[str, dict[str, Any]]  # name -> settings
    published: dict[str, dict[str, list[float]]]
    runs: int
    folds: int

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(data_set, model) for data_set in self.tables for model in self.models]


def load_recipe(raw: Mapping[str, Any]) -> Recipe:
    """Check a recipe; RunError with every problem."""
    problems = []
    known = {"output", "tables", "tables_folder", "models", "published", "runs", "folds"}
    problems += [f"{key}: is not a key; known: {', '.join(sorted(known))}" for key in sorted(set(raw) - known)]
    folder = Path(str(raw.get("tables_folder") or "."))
    tables = {str(name): str(folder / str(path)) for name, path in (raw.get("tables") or {}).items()}
    models = {str(name): dict(options or {}) for name, options in (raw.get("models") or {}).items()}
    for name, path in tables.items():
        if not Path(path).is_file():
            problems.append(f"tables.{name}: there is no file {path}; give its folder with --config tables_folder=DIR")
    for name, options in models.items():
        problems += [f"models.{name}.{key}: is not a setting" for key in sorted(set(options) - set(DEFAULTS))]
        if options.get("aggregator", DEFAULTS["aggregator"]) not in AGGREGATORS:
            problems.append(f"models.{name}.aggregator: one of {', '.join(AGGREGATORS)}")
    problems += [f"{key}: names none" for key, found in (("tables", tables), ("models", models)) if not found]
    numbers = {"runs": int(raw.get("runs", 5)), "folds": int(raw.get("folds", 10))}
    problems += [f"{key}: {n} is too few" for key, n in numbers.items() if n < (2 if key == "folds" else 1)]
    if problems:
        raise RunError("The recipe cannot be followed:\n  " + "\n  ".join(problems))
    output = str(raw.get("output") or "results_tables")
    return Recipe(output, tables, models, dict(raw.get("published") or {}), **numbers)
