"""Model bundles: one folder with weights.safetensors and bundle.json, all that predicting on a slide never seen needs.

A bundle is an ensemble in two levels. A member is one trained aggregator with the mean, deviation and axes that its
features are scaled with. A group is the members of one fold of one repeat: their outputs are averaged (with weights
over the candidates of `aggregator: auto`, see `automatic.py`) and become values by the group's link, which was fitted
on its validation patients (for classes a temperature that divides the logits before the softmax; see `outcomes.py`).
The bundle's values are the mean over its groups (a fold's own bundle has one group, the deployable bundle one per fold
and repeat), and are compared with one threshold. No pickle is written or read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from slidemake.core.bundle_place import JSON, about_place, check_bundle_place, misplaced
from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import (
    check_file,
    committed,
    file_sums,
    may_appear,
    read_json,
    read_json_if_whole,
    write_json,
)
from slidemake.mil.aggregators import AGGREGATORS, Aggregator, build_aggregator, leave_one_out, predict_bag
from slidemake.mil.automatic import Part
from slidemake.mil.bags import same_encoder, stain_identity
from slidemake.mil.bundle_checks import check_bundle
from slidemake.tasks.base import Outcome, Threshold
from slidemake.tasks.registry import load_outcome

FORMAT, FORMAT_VERSION = "slidemake-bundle", 1
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Group:
    """Members whose outputs are averaged, and the link from there to values, fitted on their validation patients.

    parts: the candidates that the members are of, where the model is a mixture; empty where all are alike.
    """

    name: str
    link: dict[str, Any]
    members: tuple[Aggregator, ...]
    parts: tuple[Part, ...] = ()

    @property
    def weights(self) -> np.ndarray:
        """(M,) of the members, sum 1."""
        if not self.parts:
            return np.full(len(self.members), 1 / len(self.members))
        return np.concatenate([np.full(part.members, part.weight / part.members) for part in self.parts])

    @property
    def factors(self) -> np.ndarray:
        """(M,) by which the members' outputs are multiplied: weights and scales."""
        scales = np.concatenate([np.full(part.members, part.scale) for part in self.parts]) if self.parts else 1.0
        return self.weights * scales


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; `info` is its bundle.json."""

    info: dict[str, Any]
    groups: tuple[Group, ...]

    @cached_property
    def outcome(self) -> Outcome:
        return load_outcome(self.info)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.outcome.classes

    @property
    def threshold(self) -> Threshold:
        """What values are compared with: for two classes the second is predicted at this probability or above."""
        return self.info["threshold"]

    @property
    def domain(self) -> str | None:
        """Column of the sheet by which the model harmonises features; None: it does not."""
        return (self.info.get("harmonised") or {}).get("column")

    def domain_number(self, name: str) -> int:
        """Place of a scanner or site among those that training knew; -1 for others, whose features stay as they are."""
        names = (self.info.get("harmonised") or {}).get("names", [])
        return names.index(name) if name in names else -1


@dataclass(frozen=True)
class Prediction:
    """Of one bag: raw outputs (C,) averaged over all members, values (P,) as the outcome defines them (probabilities
    of classes, a number, risk and survival), mean attention (N,), and the score (M,) of each member by itself
    (`Outcome.direction`)."""

    logits: np.ndarray
    values: np.ndarray
    attention: np.ndarray
    members: np.ndarray

    @property
    def prob(self) -> np.ndarray:
        """The values, where they are probabilities of classes."""
        return self.values


def save_bundle(folder: str | Path, info: Mapping[str, Any], groups: Sequence[Group]) -> None:
    """Write a bundle, whole or not at all.

    `info` has encoder, stain_of_features, aggregator {name, parameters, features}, target (`Outcome.about`), threshold
    and whatever else is to be kept; format, version and groups are added here.
    """
    tensors = {
        f"{group.name}/{i}/{key}": value.detach().cpu().contiguous()
        for group in groups
        for i, member in enumerate(group.members)
        for key, value in member.state_dict().items()
    }
    about = [
        {"name": g.name, **g.link, "members": len(g.members)}
        | ({"parts": list(map(asdict, g.parts))} if g.parts else {})
        for g in groups
    ]
    with committed(folder) as work:
        work.mkdir()
        (work / WEIGHTS).write_bytes(save(tensors))  # save_file would make it readable to its owner alone
        versions = {"format": FORMAT, "format_version": FORMAT_VERSION}
        of_place = about_place(folder)
        files = file_sums(work, [WEIGHTS])
        write_json(work / JSON, {**info, **versions, **of_place, "groups": about, "files": files})


def read_info(folder: str | Path, of_run: bool = False) -> dict[str, Any]:
    """bundle.json of a bundle; RunError when it is not one that this version reads, or lies in another's place.

    of_run: the folder is one of the run's own results, where the bundle must have been written (`bundle_place`).
    """
    path = Path(folder) / JSON
    while not path.is_file():
        if may_appear(path):
            continue
        raise RunError(f"{folder} is not a model bundle: it has no {JSON}.")
    try:
        info = read_json(path)
    except SlideFailure as failure:
        raise RunError(f"{failure}. Train the model again or copy the bundle again.") from failure
    if not isinstance(info, dict):
        raise RunError(f"{path} is no description of a model bundle; train the model again or copy the bundle again.")
    if info.get("format") != FORMAT or info.get("format_version") != FORMAT_VERSION:
        raise RunError(
            f"{path} is {info.get('format')!r} version {info.get('format_version')!r}; this slidemake reads "
            f"{FORMAT} version "
            f"{FORMAT_VERSION}. Use the slidemake that wrote it (versions are in the file), or train again."
        )
    check_bundle(path, info)
    check_bundle_place(folder, info, of_run)
    return info


def load_bundle(folder: str | Path, device: str = "cpu", of_run: bool = False) -> Bundle:
    """Load a bundle; every tensor must be there, in shape and finite. RunError otherwise, and as `read_info`."""
    info = read_info(folder, of_run)
    path = Path(folder) / WEIGHTS
    try:
        check_file(path, info)
        tensors = load_file(path, device=device)
    except (FileNotFoundError, SafetensorError, SlideFailure) as error:
        raise RunError(f"{path} cannot be read ({error}); train the model again or copy the bundle again.") from error
    about = info["aggregator"]
    kinds = about.get("candidates") or {"": about}  # of an auto model, {candidate: {"name", "parameters"}}
    for kind in kinds.values():
        if kind["name"] not in AGGREGATORS:
            raise RunError(f"{folder} needs aggregator {kind['name']!r}; this slidemake has {', '.join(AGGREGATORS)}.")
    groups, outputs = [], load_outcome(info).outputs
    for group in info["groups"]:
        members: list[Aggregator] = []
        parts = tuple(Part(**part) for part in group.get("parts", ()))
        names = [part.candidate for part in parts for _ in range(part.members)] or [""] * group["members"]
        for i, kind in enumerate(kinds[name] for name in names):
            prefix = f"{group['name']}/{i}/"
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            model = build_aggregator(kind["name"], about["features"], outputs, kind["parameters"])
            try:
                model.load_state_dict(state, strict=True)
            except RuntimeError as error:
                raise RunError(f"{path} does not fit its {JSON}: {error}") from error
            _check_weights(path, prefix, state, model.state_dict())
            members.append(model.to(device).eval())
        link = {key: value for key, value in group.items() if key not in ("name", "members", "parts")}
        groups.append(Group(group["name"], link, tuple(members), parts))
    return Bundle(info, tuple(groups))


def _check_weights(path: Path, prefix: str, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    """RunError for weights of another type (they would be cast in silence), not finite, or that divide by 0."""
    for key, value in given.items():
        if value.dtype != wanted[key].dtype:
            raise RunError(f"{path}: {prefix}{key} is {value.dtype}, and {wanted[key].dtype} is needed; copy it again.")
        if not bool(value.isfinite().all()):
            raise RunError(f"{path}: weights of {prefix} are not finite; train the model again.")
    if bool((given["feature_std"] <= 0).any()):
        raise RunError(f"{path}: {prefix}feature_std has values that are not above 0; train the model again.")


def is_complete(folder: str | Path, fingerprint: str) -> bool:
    """Whether `folder` holds a whole bundle with this fingerprint that was written there."""
    info = read_json_if_whole(Path(folder) / JSON)
    if not isinstance(info, dict) or info.get("fingerprint") != fingerprint or misplaced(folder, info, of_run=True):
        return False
    try:
        check_file(Path(folder) / WEIGHTS, info)
    except SlideFailure:
        return False
    return (Path(folder) / WEIGHTS).is_file()


def check_features(
    info: Mapping[str, Any],
    encoder: Mapping[str, Any],
    stain: Mapping[str, Any] | None,
    source: str = "these features",
) -> None:
    """RunError unless features of this encoder and stain are those that the bundle `info` was trained on."""
    differs = same_encoder(info["encoder"], encoder)
    trained, found = info.get("stain_of_features"), stain_identity(stain)
    if trained is not None and trained != found:
        differs.append(
            f"stain: {trained['method']} and {found['method']}"
            + (", with another target" if trained["method"] == found["method"] else "")
        )
    if differs:
        raise RunError(
            f"The model was trained on features of encoder {info['encoder'].get('key')!r} and refuses {source}: "
            f"{'; '.join(differs)} (model's and given). Embed the slides with the model's own settings "
            "(snakemake predict with this bundle does)."
        )


def predict(
    bundle: Bundle,
    features: np.ndarray,
    sizes: Sequence[int] | None = None,
    domains: Sequence[str] | None = None,
    places: np.ndarray | None = None,
) -> Prediction:
    """Apply a bundle to the (N, D) features of one bag, N >= 1. The caller has checked them (`check_features`).

    sizes: tiles of each of the bag's slides, in order; None: one slide. domains: scanner or site of each slide, for
    models that harmonise features (`Bundle.domain`). places: as in `predict_bag`.
    """
    numbers = None if domains is None else [bundle.domain_number(name) for name in domains]
    outputs, values, attention, each = [], [], [], []
    for group in bundle.groups:
        parts = [predict_bag(member, features, sizes, numbers, places) for member in group.members]
        scaled = np.array([p[0] for p in parts]) * group.factors[:, None]
        outputs.append(scaled.sum(0))
        values.append(bundle.outcome.predict(outputs[-1], group.link))
        attention.append(group.weights @ np.array([p[1] for p in parts]))
        each.append(bundle.outcome.direction(torch.from_numpy(np.array([p[0] for p in parts]))).numpy())
    logits, mean, weight = (np.mean(part, axis=0) for part in (outputs, values, attention))
    found = Prediction(logits, mean, weight, np.concatenate(each))
    if not (np.isfinite(found.logits).all() and np.isfinite(found.values).all()):
        raise RunError(
            "The model's prediction is not a finite number: its weights or its calibration do not fit these features. "
            "Train the model again, or ask for the bundle again where it comes from."
        )
    return found


def bundle_leave_one_out(
    bundle: Bundle, features: np.ndarray, domain: str = "", places: np.ndarray | None = None
) -> np.ndarray:
    """(N,) what each tile adds to the score that `Outcome.direction` names, averaged as outputs are.

    For classes that is the log-odds of the positive, or last, one.
    """
    score, number = bundle.outcome.direction, bundle.domain_number(domain)
    found = [
        factor * leave_one_out(member, features, score, number, places)
        for group in bundle.groups
        for member, factor in zip(group.members, group.factors, strict=True)
    ]
    return np.sum(found, axis=0) / len(bundle.groups)
