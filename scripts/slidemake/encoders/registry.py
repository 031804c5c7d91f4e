"""The registry of encoders: what each is, where its weights are, what it wants to see.

One record per encoder in `encoders.yaml` (documented there), checked against its schema. A user's own file
(`encoders_file`) adds records and changes single keys of known ones. Nothing here imports torch: the plan of a run,
its access check and its grid come from records alone. `loading` makes a model of a record.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from slidemake.core.failures import RunError
from slidemake.core.files import canonical_json, file_sha256
from slidemake.core.json_schemas import validator as json_validator
from slidemake.core.yaml_files import read_yaml

REGISTRY = Path(__file__).with_name("encoders.yaml")
SCHEMA = Path(__file__).with_name("encoders.schema.json")


@dataclass(frozen=True)
class Source:
    """Where weights come from. `file`, when set, wins over everything else."""

    kind: str  # package | hub | file | random
    package: str | None = None
    resource: str | None = None
    hub: str | None = None
    filename: str | None = None
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class EncoderRecord:
    """One encoder with one of its outputs (variant). Lengths in px, resolutions in um per px."""

    key: str
    variant: str
    default_variant: str
    title: str
    source: Source
    loader: str
    layout: str
    architecture: str | None
    arguments: dict[str, Any] = field(hash=False)
    resample_position: bool | str
    tile_px: int
    mpp: float
    trained_mpp: tuple[float, ...]
    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prefix_tokens: int
    pooling: str
    dim: int
    precision: str
    licence: str
    gated: bool
    stain: str
    corpora: tuple[str, ...]
    reference: str
    normalisation: str | None = None  # stain method of a model that does not take the run's
    imported: bool = False  # its features come from files of others
    domain: str | None = None  # what it was trained on, where that is no tissue on a slide

    @property
    def name(self) -> str:
        """`key`, or `key:variant` when it is not the default variant: what a configuration calls it."""
        return self.key if self.variant == self.default_variant else f"{self.key}:{self.variant}"

    @property
    def slug(self) -> str:
        """`name` fit for a folder: `virchow2-cls`; with a stain method of its own `virchow2-cls-reinhard`."""
        marks = [self.normalisation, "imported" if self.imported else None]
        return "-".join([self.name.replace(":", "-"), *filter(None, marks)])

    @property
    def grid(self) -> str:
        """Name of the tiling grid that this encoder asks for: `224px_0.5mpp`."""
        return f"{self.tile_px}px_{self.mpp:g}mpp"

    @property
    def effective_mpp(self) -> float:
        """um per pixel that the network really sees, after its resize (256 px at 0.5 resized to 224: 0.571)."""
        return self.mpp * self.tile_px / self.resize

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, for params and JSON; `from_dict` is the inverse."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if self.normalisation is None:  # as it was before there was one: nothing runs again
            del plain["normalisation"]
        if not self.imported:
            del plain["imported"]
        if self.domain is None:
            del plain["domain"]
        return plain

    @property
    def domain_warning(self) -> str | None:
        """A sentence for encoders of something else than tissue; None for all others."""
        if not self.domain:
            return None
        return (
            f"encoder {self.name} was trained on {self.domain}: its features of tiles of tissue are out of its domain, "
            "and what models learn of them may not hold"
        )

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> EncoderRecord:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()
        }
        values |= {"source": Source(**plain["source"]), "arguments": dict(plain["arguments"])}
        return cls(**values)

    @property
    def transform(self) -> dict[str, Any]:
        """Everything that happens to a tile between uint8 and the network, stain apart."""
        return {
            "tile_px": self.tile_px,
            "mpp": self.mpp,
            "resize": self.resize,
            "crop": self.crop,
            "interpolation": self.interpolation,
            "antialias": True,
            "mean": list(self.mean),
            "std": list(self.std),
        }


# ------------------------------------------------------------------------------------------------- registry files


def registry(paths: Iterable[str | Path] | None = None) -> dict[str, dict[str, Any]]:
    """Raw records by key, of registry files read in order, later ones on top of earlier ones; None: only our own.

    Raises RunError that lists every problem of the first file that has one.
    """
    merged: dict[str, dict[str, Any]] = {}
    for path in [REGISTRY] if paths is None else [Path(p) for p in paths]:
        records = _read(path)
        for key, record in records.items():
            merged[key] = _overlaid(merged[key], record) if key in merged else record
        problems = _problems({"encoders": {key: merged[key] for key in records}})
        if problems:
            raise RunError(f"{path} is not a valid encoder registry:\n  " + "\n  ".join(problems))
    return merged


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        raise RunError(f"There is no encoder registry {path}: check the configuration key encoders_file.")
    raw = read_yaml(path)
    records = raw.get("encoders") if isinstance(raw, dict) else None
    if not isinstance(records, dict) or set(raw) != {"encoders"}:
        raise RunError(f"{path} must hold one mapping `encoders:` of key -> record; see {REGISTRY.name} for the form.")
    for key, record in records.items():
        if not isinstance(record, dict):
            raise RunError(f"{path}: encoders.{key} must be a mapping, not {type(record).__name__}.")
        source = record.get("source")
        if isinstance(source, dict) and isinstance(source.get("file"), str):
            source["file"] = str(path.parent / Path(source["file"]).expanduser())
    return records


def _overlaid(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `change`; mappings are merged, and a new weights file sheds the old one's checksum."""
    out = copy.deepcopy(base)
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict) and key in ("source", "transform", "variants"):
            if key == "source" and value.get("file") and "sha256" not in value:
                out[key].pop("sha256", None)
            out[key] = _overlaid(out[key], value)
        else:
            out[key] = copy.deepcopy(value)
    return out


def _problems(raw: dict[str, Any]) -> list[str]:
    schema = json.loads(SCHEMA.read_text())
    known = set(schema["$defs"]["encoder"]["properties"]) | set(schema["$defs"]["source"]["properties"])
    found = []
    for error in json_validator(schema).iter_errors(raw):
        where = ".".join(str(part) for part in error.absolute_path)
        hint = ""
        if error.validator == "additionalProperties" and isinstance(error.instance, dict):
            for key in sorted(set(error.instance) - set(error.schema.get("properties", {})), key=str):
                close = difflib.get_close_matches(str(key), known, n=1)
                hint += f" Did you mean {close[0]!r}?" if close else ""
        found.append(f"{where}: {error.message}.{hint}")
    if not found:
        for key, record in raw["encoders"].items():
            found += _contradictions(key, record)
    return sorted(found)


def _contradictions(key: str, record: dict[str, Any]) -> list[str]:
    """What a schema cannot say."""
    found = []
    if record["variant"] not in record["variants"]:
        found.append(f"encoders.{key}.variant: {record['variant']!r} is not one of {', '.join(record['variants'])}.")
    source = record["source"]
    if record["loader"] == "torchscript" and source["kind"] == "hub" and not source.get("file"):
        pinned = re.fullmatch(r"[0-9a-f]{40}", str(source.get("revision") or "")) and source.get("sha256")
        if not pinned:
            found.append(
                f"encoders.{key}.source: TorchScript is code that would be run as you: to allow it, name the commit "
                "that you have looked at (revision, 40 digits) and the sha256 of its file."
            )
    if record["loader"] != "torchscript" and not record.get("architecture"):
        found.append(f"encoders.{key}.architecture: loader {record['loader']} needs the name of a timm model.")
    if record["transform"]["crop"] > record["transform"]["resize"]:
        found.append(f"encoders.{key}.transform: crop is larger than resize; it cuts from the resized tile.")
    return found


def load_record(name: str, known: dict[str, dict[str, Any]] | str | Path | None = None) -> EncoderRecord:
    """Record of `key` or `key:variant`. RunError with the nearest names if there is none.

    `known` is what `registry` returned, or a user's `encoders_file` to be laid over our registry, or None for ours.
    """
    records = known if isinstance(known, dict) else registry([REGISTRY, known] if known else None)
    key, _, variant = name.partition(":")
    if key not in records:
        close = difflib.get_close_matches(key, records, n=3, cutoff=0.5)
        meant = f" Did you mean {' or '.join(close)}?" if close else ""
        raise RunError(f"Unknown encoder {name!r}.{meant} Known: {', '.join(sorted(records))}.")
    raw = records[key]
    variant = variant or raw["variant"]
    if variant not in raw["variants"]:
        close = difflib.get_close_matches(variant, raw["variants"], n=1, cutoff=0.0)
        raise RunError(
            f"Encoder {key} has no variant {variant!r}. Did you mean {key}:{close[0]}? "
            f"Its variants: {', '.join(sorted(raw['variants']))}."
        )
    return _record(key, variant, raw)


def _record(key: str, variant: str, raw: dict[str, Any]) -> EncoderRecord:
    return EncoderRecord(
        key=key,
        variant=variant,
        default_variant=raw["variant"],
        title=raw["title"],
        source=Source(**raw["source"]),
        loader=raw["loader"],
        layout=raw.get("layout", "timm"),
        architecture=raw.get("architecture"),
        arguments=dict(raw.get("arguments") or {}),
        resample_position=raw.get("resample_position", False),
        tile_px=raw["tile_px"],
        mpp=float(raw["mpp"]),
        trained_mpp=tuple(float(m) for m in raw.get("trained_mpp", [raw["mpp"]])),
        resize=raw["transform"]["resize"],
        crop=raw["transform"]["crop"],
        interpolation=raw["transform"]["interpolation"],
        mean=tuple(float(v) for v in raw["mean"]),
        std=tuple(float(v) for v in raw["std"]),
        prefix_tokens=raw.get("prefix_tokens", 0),
        pooling=raw["variants"][variant]["pooling"],
        dim=raw["variants"][variant]["dim"],
        precision=raw["precision"],
        licence=raw["licence"],
        gated=raw["gated"],
        stain=raw["stain"],
        corpora=tuple(raw.get("corpora", [])),
        reference=raw.get("reference", ""),
        domain=raw.get("domain"),
    )


def contaminated(record: EncoderRecord, cohort: str) -> list[str]:
    """Corpora of the record's pretraining named in the free text `cohort` (a sheet's name, a citation): warn on any."""
    text = cohort.lower().replace("-", "").replace("_", "")
    return [corpus for corpus in record.corpora if corpus.lower().replace("-", "") in text]


# ------------------------------------------------------------------------------------------------- identity


def weights_sha256(path: str | Path | None) -> str:
    """Hex SHA-256 of a weights file; "random" for None, the answer of `resolve_weights` then.

    A file is read for it once in the life of a process (about 1 s per 1.5 GB), unless its size or time change.
    """
    if not path:
        return "random"
    found = Path(path).stat()
    return _weights_sha256(str(path), found.st_size, found.st_mtime_ns)


@cache
def _weights_sha256(path: str, size: int, time_ns: int) -> str:
    return file_sha256(path)


def transform_sha256(record: EncoderRecord) -> str:
    """Hex SHA-256 of `record.transform`: two encoders with equal weights and unequal transforms are two encoders."""
    return hashlib.sha256(canonical_json(record.transform).encode()).hexdigest()


def identity(record: EncoderRecord, sha: str, precision: str | None = None) -> dict[str, Any]:
    """What an embedding store and a model bundle keep of an encoder; equal identities give interchangeable features.

    `sha` is `weights_sha256` of `resolve_weights`. `precision` is what really ran; the record's own by default.
    """
    return {
        "key": record.key,
        "variant": record.variant,
        "weights_sha256": f"random:{record.source.seed}" if sha == "random" else sha,
        "transform_sha256": transform_sha256(record),
        "precision": precision or record.precision,
        "dim": record.dim,
        "architecture": record.architecture or record.loader,
        "mpp": record.mpp,
        "tile_px": record.tile_px,
        "timm": _version("timm"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
