"""From the user's configuration to everything that the rules need to know before the first job runs.

Every mistake that can be seen without opening a slide is reported here, at once: settings, sheet, labels, folds,
encoders and access to their weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from slidemake.cohort.sheet import SlideRow, read_sheet
from slidemake.configuration.load import in_order, load_configuration, sheet_columns, stage_options
from slidemake.configuration.sweeps import axis_table
from slidemake.core.addresses import is_remote, truth_file
from slidemake.core.bundle_place import check_external
from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import FORMAT_VERSION, read_json, write_json
from slidemake.core.marker import MARKER, inferred_rack_size, read_marker
from slidemake.encoders.access import check_access
from slidemake.encoders.contamination import contamination, public_cohorts
from slidemake.encoders.registry import REGISTRY, EncoderRecord, load_record, registry
from slidemake.interchange.sources import feature_files
from slidemake.jobs.racks import Machine, assign_racks, auto_rack_size
from slidemake.mil.bundle_checks import check_bundle
from slidemake.slides.remote import check_addresses
from slidemake.splits.files import split_files
from slidemake.stain.fit import resolve_method
from slidemake.tasks.controls import TRAINED
from slidemake.tasks.labels import label_columns, label_task
from slidemake.workflow.imported import feature_notes, imported_encoder
from slidemake.workflow.place import KEY, embedding_place, marked_place

PATIENCE = 60.0  # seconds that a job waits for the marker: network file systems show new files late


@dataclass(frozen=True)
class Plan:
    """What a run is about: validated configuration, sheet rows in racks, encoders, grids, tasks."""

    config: dict[str, Any]
    rows: list[SlideRow]
    racks: dict[str, list[SlideRow]]
    encoders: dict[str, EncoderRecord]  # by folder name
    registry: dict[str, Any]
    bundle: dict[str, Any] | None
    rack_size: int
    place: dict[str, Any]  # where it embeds, and in which precision (`place.embedding_place`)
    racks_on_disk: int = 4  # racks whose remote slides may be on the disk at a time

    @property
    def output(self) -> str:
        return str(self.config["output"])

    @property
    def tasks(self) -> dict[str, Any]:
        return dict(self.config["tasks"])

    @property
    def imports(self) -> bool:
        """Whether features are imported, and no slide is tiled and embedded."""
        return bool(self.config["features"]["encoder"])

    @property
    def features_stage(self) -> str:
        """The stage whose manifests vouch for the stores of embeddings."""
        return "import" if self.imports else "embed"

    @cached_property
    def grids(self) -> list[str]:
        return [] if self.imports else sorted({self.grid_of(key) for key in self.encoders})

    def grid_of(self, encoder: str) -> str:
        """Name of the grid that an encoder takes its tiles from."""
        return "imported" if self.imports else self.encoders[encoder].grid

    def encoders_of(self, grid: str) -> list[str]:
        """Folder names of the encoders that take their tiles from a grid."""
        return [encoder for encoder in self.encoders if self.grid_of(encoder) == grid]

    def tile_px(self, grid: str) -> int:
        """Side of the tiles of a grid, in px."""
        return max(self.encoders[encoder].tile_px for encoder in self.encoders_of(grid))

    def encoder_record(self, encoder: str) -> dict[str, Any]:
        """The registry's record of an encoder, as it goes into params and fingerprints."""
        return self.encoders[encoder].as_dict()

    def feature_files(self, rack: str) -> dict[str, list[str]]:
        """{slide: its files of features} of a rack: one is right."""
        pattern = self.config["features"]["folder"]
        return {row.slide_id: feature_files(row, pattern) for row in self.racks[rack] if not row.exclude}

    def feature_rows(self, rack: str) -> list[dict[str, Any]]:
        """What importing a rack's features depends on besides their files."""
        return [{"slide_id": row.slide_id, "mpp": row.mpp} for row in self.racks[rack] if not row.exclude]

    def feature_notes(self) -> list[str]:
        """What a look at the names alone tells of the features that are to be imported."""
        if not self.imports:
            return []
        return feature_notes(self.rows, self.config["features"], self.registry)

    @cached_property
    def stain_options(self) -> dict[str, Any]:
        """Options of the stain stage, with `auto` resolved over all encoders of the run.

        `also`: methods that some models take instead, where there are any.
        """
        options = dict(stage_options(self.config, "stain"))
        own = {key for key, record in self.encoders.items() if record.normalisation}
        methods = {self.stain_method_of(key) for key in set(self.encoders) - own} - {"none"}
        options["method"] = methods.pop() if methods else "none"
        if also := {self.stain_method_of(key) for key in own} - {"none", options["method"]}:
            options["also"] = sorted(also)
        options.pop("target", None)  # the target is another rule's, and changes no fit
        return options

    @property
    def stain_target(self) -> str:
        return str(self.config["stain"]["target"])

    @property
    def stain_target_record(self) -> dict[str, Any] | None:
        """The reference that a bundle was trained with, when a bundle is applied."""
        return self.bundle["stain_target"] if self.bundle else None

    def stain_method_of(self, encoder: str) -> str:
        """Stain method of a folder of embeddings: a model's own, the configured one, or for `auto` the encoder's."""
        if self.imports:
            return "none"
        own = self.encoders[encoder].normalisation
        return own or resolve_method(self.config["stain"]["method"], self.encoders[encoder].stain)

    def screening_rows(self, rack: str) -> list[dict[str, Any]]:
        """What screening depends on, per slide: not the labels, nor who scanned it when."""
        keys = ("slide_id", "path", "mpp", "stain", "exclude")
        rows = [{key: getattr(row, key) for key in keys} for row in self.racks[rack]]
        sums = [row.sha256 if not is_remote(row.path) else "" for row in self.racks[rack]]
        return [row | ({"sha256": wanted} if wanted else {}) for row, wanted in zip(rows, sums, strict=True)]

    def remote_rows(self, rack: str) -> list[dict[str, str]]:
        """Slides of a rack that have to be fetched: slide_id, address, and SHA-256 where the sheet gives it."""
        keys = ("slide_id", "path", "sha256")
        rows = [row for row in self.racks[rack] if not row.exclude and is_remote(row.path)]
        return [{key: getattr(row, key) for key in keys} for row in rows]

    def outlines(self, rack: str) -> dict[str, str]:
        """{slide: GeoJSON given in the sheet} of a rack."""
        return {row.slide_id: row.tissue_geojson for row in self.racks[rack] if row.tissue_geojson}

    def outline_problems(self) -> list[str]:
        """What is wrong with the outlines that the sheet gives, a sentence per slide, as far as a look at the beginning
        of the file tells. The run goes on: each is a failure of its slide.
        """
        given = [(row, row.tissue_geojson) for row in self.rows if row.tissue_geojson and not row.exclude]
        found = [(row, problem) for row, path in given if (problem := outline_problem(path))]
        return [f"row {row.row}, tissue_geojson: {problem}; slide {row.slide_id} will fail" for row, problem in found]

    def weights_files(self, encoders: Iterable[str]) -> list[str]:
        """Files of weights of the user's that these encoders load."""
        files = {self.encoders[encoder].source.file for encoder in encoders}
        return sorted(file for file in files if file)

    @property
    def bundle_weights(self) -> list[str]:
        """Files of weights of the bundle that is applied."""
        return sorted(str(path) for path in Path(self.config["bundle"]).glob("*.safetensors"))

    def truth_files(self, rack: str) -> list[str]:
        """Where the masks of annotated tumour of a rack's slides may be, whether they are there or not."""
        pattern = self.config["explain"]["truth"]
        if not pattern:
            return []
        return [truth_file(pattern, row.path, row.slide_id) for row in self.racks[rack] if not is_remote(row.path)]

    @cached_property
    def owners(self) -> dict[str, str]:
        """{file of the user's that is of one slide: that slide}; of one that is in several rows, of none of them."""
        found: dict[str, str] = {}
        for rack, rows in self.racks.items():
            files = [[row.slide_id, path] for row in rows for path in (row.path, row.tissue_geojson) if path]
            if self.imports:
                files += [[slide, path] for slide, paths in self.feature_files(rack).items() for path in paths]
            if self.config["explain"]["truth"]:
                local = [row for row in rows if not is_remote(row.path)]
                files += [[row.slide_id, mask] for row, mask in zip(local, self.truth_files(rack), strict=True)]
            for slide_id, path in files:
                path = os.path.abspath(path)
                found[path] = slide_id if found.get(path, slide_id) == slide_id else ""
        return found

    def models_of(self, task: str) -> list[str]:
        """Configured models of a task, then the controls."""
        return [*self.tasks[task]["models"], *TRAINED]

    def encoder_of(self, task: str, model: str) -> str:
        """Folder name of the encoder whose features a model of a task reads; controls use the first model's."""
        if self.imports:
            return next(iter(self.encoders))
        return features_record(self._model(task, model), self.config, self.registry).slug

    def _model(self, task: str, model: str) -> dict[str, Any]:
        name = self.tasks[task]["models"][0] if model in TRAINED else model
        return dict(self.config["models"][name])

    def task_options(self, task: str) -> dict[str, Any]:
        """A task's settings but for its list of models, which changes nothing for any one of them."""
        return in_order({key: value for key, value in self.tasks[task].items() if key != "models"})

    def split_files(self, task: str) -> list[str]:
        """Files that a task's folds are read from: none, unless its split method is file."""
        splits = self.tasks[task]["splits"]
        return [str(path) for path in split_files(splits["file"])] if splits["method"] == "file" else []

    @cached_property
    def contamination(self) -> dict[str, list[str]]:
        """{encoder: public collections of its pretraining that this cohort is from}; those that have any."""
        rows = [
            {**row.labels, "slide_id": row.slide_id, "patient_id": row.patient_id, "path": row.path}
            for row in self.rows
        ]
        return contamination(self.encoders, public_cohorts(rows, self.config["evaluation"]["public_cohort"]))

    def contamination_of(self, task: str) -> dict[str, list[str]]:
        """{encoder: corpora} of the encoders that the models of a task read."""
        used = {self.encoder_of(task, model) for model in self.models_of(task)}
        return {encoder: corpora for encoder, corpora in self.contamination.items() if encoder in used}

    def probed(self, task: str) -> list[str]:
        """Folder names of the encoders that are probed for shortcuts: a task's own, where it has classes."""
        if self.tasks[task]["type"] not in ("binary", "multiclass", "ordinal"):
            return []
        return sorted({self.encoder_of(task, model) for model in self.models_of(task)})

    def background_encoders(self) -> list[str]:
        """Folder names of the encoders that look at the background, where the configuration asks for it."""
        if not self.config["background"]["tiles"]:
            return []
        return sorted({encoder for task in self.tasks for encoder in self.probed(task)})

    def model_options(self, task: str, model: str) -> dict[str, Any]:
        """Settings of a model; a control is the first model's with `control` set."""
        options = self._model(task, model)
        del options["stain"]  # says which features it reads, and they say it themselves
        del options["preset"]  # is in the other settings
        if model in TRAINED:
            options["control"] = model
        return in_order(options)

    def bundle_context(self, task: str, model: str) -> dict[str, Any]:
        """What a bundle must carry so that a slide never seen is processed like the training slides.

        The stain reference, an input of the training job, is added there.
        """
        encoder = self.encoder_of(task, model)
        return {
            "grid": self.grid_of(encoder),
            "stain": {**stage_options(self.config, "stain"), "method": self.stain_method_of(encoder)},
            "tissue": stage_options(self.config, "tissue"),
            "tiling": in_order(self.config["tiling"]),
            "features": self.config["embedding"]["features"],
        }

    def explained_model(self, task: str) -> str | None:
        """The model of a task whose attention is drawn on the slides; None when nothing is to be explained."""
        if self.config["explain"]["slides"] == "none":
            return None
        return self.config["explain"]["model"] or next(iter(self.tasks[task]["models"]), None)

    def sweep_axes(self, task: str) -> dict[str, dict[str, str]]:
        """{model: {axis: value}} of the models of a task that sweeps made."""
        table = axis_table(self.config["sweeps"])
        return {model: table[model] for model in self.tasks[task]["models"] if model in table}

    def stain_compared(self) -> dict[str, str]:
        """{task: folder name of the encoder} of tasks of classes whose first model reads normalised features, where
        the configuration asks what normalisation does to them."""
        if not self.config["stain"]["compare"]:
            return {}
        classes = [task for task in self.tasks if self.probed(task)]
        first = {task: self.encoder_of(task, self.tasks[task]["models"][0]) for task in classes}
        return {task: encoder for task, encoder in first.items() if self.stain_method_of(encoder) != "none"}

    def stressed_models(self) -> dict[str, str]:
        """{task: the model that is tested under stress}: the first of each, where the configuration asks for it."""
        if not self.config["stress"]["tiles"]:
            return {}
        return {task: about["models"][0] for task, about in self.tasks.items() if about["models"]}


def plan_run(raw: dict[str, Any], base: Path, machine: Machine | None = None, in_job: bool = False) -> Plan:
    """Validate everything that can be validated now. Raises RunError with all problems of the first kind that has any.

    `base` is the folder of the workflow. `in_job` says that this process
    is a job of a run, on whatever node: it takes the size of the racks from the run that started it.
    """
    registry_paths = [REGISTRY]
    if raw.get("encoders_file"):
        registry_paths.append(Path(str(raw["encoders_file"])).expanduser())
    known = registry(registry_paths)
    config = load_configuration(raw, base, encoders=known)
    config["output"] = normal_output(config["output"])
    bundle = read_bundle(config["bundle"]) if config["bundle"] else None
    if bundle:
        config = apply_bundle(config, bundle)
    tasks = config["tasks"]
    # write_sheet makes the sheet that is not there yet
    new_sheet = config["slides_folder"] and not Path(config["sheet"]).exists()
    imports = bool(config["features"]["encoder"])
    rows = [] if new_sheet else read_sheet(config["sheet"], sheet_columns(config, bundle), tasks, features=imports)
    if imports:  # nothing is fetched for pictures alone
        rows = [replace(row, path="") if is_remote(row.path) else row for row in rows]
    if bundle and config["bundle_label"]:
        labels = label_columns(label_task(bundle, config["bundle_label"]))
        tested = [row.patient_id for row in rows if not row.exclude and any(row.labels.get(name) for name in labels)]
        check_external(tested, bundle)
    encoders = {}
    if imports or (bundle and bundle["encoder"].get("weights_sha256") == "imported"):
        record = imported_encoder(raw, config, bundle, known)
        encoders[record.slug] = record
    else:
        for model in used_features(config, tasks, bundle):
            record = features_record(model, config, known)
            check_access(record)
            encoders[record.slug] = record
    check_results_folder(Path(config["output"]))
    size = rack_size(config, len(rows), machine or Machine(), in_job)
    by_id = {row.slide_id: row for row in rows}
    racks = {rack: [by_id[i] for i in ids] for rack, ids in assign_racks(list(by_id), size).items()}
    check_addresses(row.path for row in rows if not row.exclude)
    kept = read_marker(config["output"]).get("racks_on_disk")
    on_disk = int(kept or config["remote"]["racks_on_disk"])
    where = machine or Machine()
    embedded = {} if imports else encoders
    place = embedding_place(config["embedding"], embedded, config["output"], where, bundle=bundle, in_job=in_job)
    return Plan(config, rows, racks, encoders, known, bundle, size, place, on_disk)


def normal_output(path: str) -> str:
    """One spelling of the results folder: relative where it is below the working folder, absolute elsewhere."""
    path = os.path.abspath(path)
    return os.path.relpath(path) if path.startswith(f"{os.getcwd()}/") else path


def outline_problem(path: str) -> str | None:
    """Why a file cannot be an outline: not there, no file, not allowed, or it does not begin as JSON does."""
    try:
        if not os.path.isfile(path):
            return f"{path} is no file" if os.path.exists(path) else f"{path} does not exist"
        with open(path, "rb") as handle:
            head = handle.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if head[:1] in (b"{", b"[") else f"{path} is not GeoJSON"


def rack_size(config: dict[str, Any], slides: int, machine: Machine, in_job: bool = False) -> int:
    """Slides per rack. `auto` chooses once: results that are there keep theirs, or slides would change racks.

    Raises RunError in a job that cannot see what the run recorded.
    """
    if config["rack_size"] != "auto":
        return int(config["rack_size"])
    marker = Path(config["output"]) / MARKER
    deadline = time.monotonic() + PATIENCE
    while True:
        kept = read_marker(config["output"]).get("rack_size")
        if kept:
            return int(kept)
        if not in_job or not slides:
            found = inferred_rack_size(config["output"]) or 0
            racks = len(list((Path(config["output"]) / "manifests" / "screen").glob("r*.json")))
            return found if racks > 1 else max(found, auto_rack_size(slides, machine))
        if time.monotonic() > deadline:
            raise RunError(
                f"{marker.absolute()} is not there, or has no rack_size, and the run that started this job wrote it. "
                "Is `output` on a file system that all nodes see? If so, set rack_size to a number."
            )
        time.sleep(1.0)


def rack_size_hint(plan: Plan, machine: Machine) -> str | None:
    """What to tell about racks that were sized for a much smaller cohort."""
    better = auto_rack_size(len(plan.rows), machine)
    if plan.config["rack_size"] != "auto" or better < 4 * plan.rack_size:
        return None
    return (
        f"racks keep the {plan.rack_size} slides that suited the cohort when it was first run; {better} would take "
        f"fewer jobs: set rack_size: {better} (once; finished slides are kept)"
    )


def used_features(config: dict[str, Any], tasks: dict[str, Any], bundle: dict[str, Any] | None) -> list[dict[str, Any]]:
    """{encoder, stain} that some model of some task reads (all models' without a task), in a stable order."""
    if bundle:
        return [{"encoder": f"{bundle['encoder']['key']}:{bundle['encoder']['variant']}", "stain": None}]
    used = [name for task in tasks.values() for name in task["models"]] if tasks else list(config["models"])
    pairs = {(str(config["models"][name]["encoder"]), config["models"][name]["stain"] or "") for name in used}
    return [{"encoder": encoder, "stain": stain or None} for encoder, stain in sorted(pairs)]


def features_record(model: dict[str, Any], config: dict[str, Any], known: dict[str, Any]) -> EncoderRecord:
    """The encoder of a model, with a stain method of its own where that is not what the encoder gets anyway."""
    record = load_record(str(model["encoder"]), known)
    own = model["stain"]
    if own is None or own == resolve_method(config["stain"]["method"], record.stain):
        return record
    return replace(record, normalisation=own)


def read_bundle(folder: str) -> dict[str, Any]:
    """bundle.json of a trained model. Raises RunError where there is none, or one of another format."""
    try:
        info = read_json(Path(folder) / "bundle.json")
    except SlideFailure as failure:
        raise RunError(f"bundle: {folder} is not a model bundle: {failure}.") from failure
    if not isinstance(info, dict):
        raise RunError(f"bundle: {folder} is not a model bundle: its bundle.json is no JSON object.")
    missing = sorted({"encoder", "stain", "stain_target", "tissue", "tiling", "features"} - set(info))
    if missing:
        raise RunError(
            f"bundle: {folder} does not say how its slides were processed ({', '.join(missing)}); train again."
        )
    check_bundle(Path(folder) / "bundle.json", info)
    return info


def apply_bundle(config: dict[str, Any], bundle: dict[str, Any]) -> dict[str, Any]:
    """The configuration with everything that shapes features taken from the bundle; nothing is trained."""
    config = {**config, "tasks": {}, "demo": None}
    config["tissue"] = bundle["tissue"]
    config["tiling"] = {**bundle["tiling"], **{key: config["tiling"][key] for key in ("store", "codec", "min_tiles")}}
    config["stain"] = {**config["stain"], **bundle["stain"]}
    config["embedding"] = {**config["embedding"], "features": bundle["features"]}
    return config


def check_results_folder(output: Path) -> None:
    """Refuse a results folder that another version of the format wrote, or that cannot be written.

    Raises RunError naming both versions and the ways out.
    """
    found = read_marker(output)
    if not found:
        parent = _existing_parent(output)
        if not parent.is_dir():
            raise RunError(f"{output} cannot be written: {parent} is a file. Set `output` to a folder.")
        if not os.access(parent, os.W_OK):
            raise RunError(f"{output} cannot be written: no permission in {parent}. Set `output`.")
        return
    if found.get("format_version") != FORMAT_VERSION:
        raise RunError(
            f"{output} was written by an incompatible slidemake (results format {found.get('format_version')}; this "
            f"one reads and writes {FORMAT_VERSION}). Nothing was changed. Choose another `output`, move that "
            "folder away, or use the slidemake that wrote it."
        )


def mark_results_folder(
    output: Path, rack_size: int | None = None, racks_on_disk: int | None = None, plan: Plan | None = None
) -> None:
    """Say in the results folder which version of the format it has (when a run starts; not in a dry run).

    `rack_size` (None: there are no racks yet) is kept for `rack_size: auto` of later runs and for jobs on other nodes,
    `racks_on_disk` (None: no slide is fetched) because another number would make Snakemake fetch all slides again, and
    where `plan` embeds, for its jobs and for `precision: auto` of later runs.
    """
    found = read_marker(output)
    marked = {**found, "format": "slidemake-results", "format_version": found.get("format_version", FORMAT_VERSION)}
    if rack_size:
        marked["rack_size"] = rack_size
    if racks_on_disk:
        marked["racks_on_disk"] = racks_on_disk
    if plan is not None and plan.encoders:
        marked[KEY] = marked_place(found, plan.config["embedding"], plan.place)
    if marked != found:
        write_json(output / MARKER, marked)


def _existing_parent(path: Path) -> Path:
    for parent in [path.absolute(), *path.absolute().parents]:
        if parent.exists():
            return parent
    return Path("/")
