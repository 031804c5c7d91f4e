"""The training step on scans, with whatever of this package the settings ask for: the one hook that `fitting` calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slidemake.core.failures import RunError
from slidemake.mil.aggregators import Aggregator, Batch
from slidemake.mil.bags import Bags
from slidemake.mil.batches import cells_of, draw_rows, looks_at_neighbours, pad_rows
from slidemake.mil.invariance.adversary import Adversary
from slidemake.mil.invariance.augmentation import mean_shift, mix_style
from slidemake.mil.invariance.combat import fit_combat
from slidemake.mil.invariance.groups import GroupDRO, vrex
from slidemake.mil.invariance.penalties import coral, effective_rank, info_nce, mmd, score_consistency
from slidemake.mil.losses import Objective
from slidemake.statistics.association import cramers_v

log = logging.getLogger("slidemake")

# name -> (value that does nothing, what a harmless value is)
OPTIONS: dict[str, Any] = {
    "domain": "scanner",  # column of the sheet that tells the domains apart
    "consistency": 0.0,
    "info_nce": 0.0,
    "coral": 0.0,
    "mmd": 0.0,
    "dann": 0.0,
    "conditional_dann": 0.0,
    "group_dro": 0.0,
    "v_rex": 0.0,
    "combat": False,
    "augmentation": "none",
}
RAMP = 0.2  # of training, over which penalties grow from 0 to their weight
COINCIDE = 0.8  # Cramér's V of label and domain from which training warns
Losses = Callable[[Tensor, Sequence[str]], Tensor]  # logits (n, O) and their n patients -> the task's mean loss


def options_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**OPTIONS, **(settings.get("invariance") or {})}


def active(settings: Mapping[str, Any]) -> bool:
    """Whether anything but the ordinary training is asked for."""
    options = options_of(settings)
    return any(options[key] != OPTIONS[key] for key in OPTIONS if key != "domain")


@dataclass(frozen=True)
class Scan:
    """A patient's slides of one domain (-1: unknown)."""

    patient: str
    domain: int
    slides: tuple[int, ...]


def scans_of(bags: Bags, patient: str, domain_of: np.ndarray) -> list[Scan]:
    """The patient's scans that have tiles, by domain."""
    first, last = bags.where[patient]
    found: dict[int, list[int]] = {}
    for s in range(first, last):
        if bags.offsets[s + 1] > bags.offsets[s]:
            found.setdefault(int(domain_of[s]), []).append(s)
    return [Scan(patient, d, tuple(slides)) for d, slides in sorted(found.items())]


def domain_names(bags: Bags) -> list[str]:
    """The cohort's domains, sorted; slides without one are in none."""
    return sorted({d for d in bags.domains.values() if d})


def domain_numbers(bags: Bags, names: Sequence[str]) -> np.ndarray:
    """(S,) place of every slide's domain in `names`, -1 for those that are not there."""
    place = {name: i for i, name in enumerate(names)}
    return np.array([place.get(bags.domains.get(slide, ""), -1) for slide in bags.slides])


def warn_where_label_and_domain_coincide(bags: Bags, labels: Mapping[str, Any], column: str) -> float:
    """Cramér's V of label and domain over scans; logged where no training can be trusted to tell them apart."""
    pairs = [
        (str(labels[p]), bags.domains[s])
        for s, p in zip(bags.slides, bags.patients, strict=True)
        if p in labels and bags.domains.get(s)
    ]
    v = cramers_v([a for a, _ in pairs], [b for _, b in pairs]) if pairs else 0.0
    if v >= COINCIDE:
        log.warning(
            "label and %s nearly coincide (Cramér's V %.2f): without patients scanned on several scanners no training "
            "can tell one from the other, and aligning scanners may take the signal away. This is no cure; add cases "
            "that break the association, or test on a site that does.",
            column,
            v,
        )
    return v


class Robust:
    """Steps on scans for one member. Everything fitted comes from the member's training patients."""

    def __init__(
        self,
        bags: Bags,
        objective: Objective,
        train: Sequence[str],
        settings: Mapping[str, Any],
        seed: int,
    ):
        self.bags, self.settings, self.options = bags, settings, options_of(settings)
        self.names = domain_names(bags)
        self.domain_of = domain_numbers(bags, self.names)
        targets = objective.targets(train)  # tasks without classes have one, to all that works within classes
        self.classes = dict(zip(train, [0] * len(train) if targets is None else targets.tolist(), strict=True))
        self.scans = {p: scans_of(bags, p, self.domain_of) for p in train}
        self.train, self.seed = list(train), seed
        self.squash = "softmax" if targets is not None else "standardise" if objective.outputs == 1 else "sigmoid"
        if len({s.domain for scans in self.scans.values() for s in scans} - {-1}) < 2:
            raise RunError(
                f"models.<name>.invariance needs training slides of two {self.options['domain']}s at least, and the "
                f"column {self.options['domain']} of the sheet names {', '.join(self.names) or 'none'}. Fill it in, "
                "choose another domain, or leave invariance out."
            )
        groups = len(self.names) * (max(self.classes.values()) + 1) + 1
        self.dro = GroupDRO(groups, self.options["group_dro"]) if self.options["group_dro"] else None
        self.adversaries = nn.ModuleDict()
        self.means = torch.full((len(self.names), bags.dim), float("nan"))

    @property
    def rescanned(self) -> int:
        """Training patients with scans in two domains or more."""
        return sum(len([s for s in scans if s.domain >= 0]) > 1 for scans in self.scans.values())

    def prepare(self, model: Aggregator) -> None:
        """Fit ComBat into the model, before its feature statistics are taken."""
        if self.options["combat"]:
            classes = [self.classes[p] for p in self.train]
            scale, shift = fit_combat(self.bags, self.train, self.domain_of, len(self.names), classes)
            model.set_domains(torch.from_numpy(scale).float(), torch.from_numpy(shift).float())

    def complete(self, model: Aggregator) -> None:
        """Give a model that was trained without harmonisation one that changes nothing, so that bundles are alike."""
        if self.options["combat"]:
            shape = (len(self.names), self.bags.dim)
            model.set_domains(torch.ones(shape), torch.zeros(shape))

    def attach(self, model: Aggregator) -> list[nn.Parameter]:
        """Parameters to be trained beside the model's, once its feature statistics are known."""
        with torch.no_grad():
            width = model.readout(model.pool(*model.encode(model.feature_mean[None, None]))[0]).shape[1]
        scores = 1 if self.squash == "standardise" else model.outputs
        for i, (name, condition) in enumerate((("dann", 0), ("conditional_dann", scores))):
            if self.options[name]:
                self.adversaries[name] = Adversary(width, len(self.names), condition, self.seed + i)
        self.adversaries.to(model.feature_mean.device)
        if self.options["augmentation"] == "mean_shift":
            self._domain_means(model)
        return list(self.adversaries.parameters())

    def _domain_means(self, model: Aggregator) -> None:
        for d in range(len(self.names)):
            slides = [s for scans in self.scans.values() for scan in scans if scan.domain == d for s in scan.slides]
            means = [self.bags.slide(s).mean(0, dtype=np.float64) for s in slides]
            self.bags.forget()
            if means:
                mean = torch.from_numpy(np.mean(means, axis=0)).float()[None]
                self.means[d] = model.harmonise(mean.to(model.feature_mean.device), torch.tensor([d]))[0].cpu()

    def step(
        self, model: Aggregator, patients: Sequence[str], progress: float, rng: np.random.Generator, losses: Losses
    ) -> Tensor:
        """Loss of a batch of patients, all their scans in it. progress: share of training that is done, 0..1."""
        device = model.feature_mean.device
        scans = [scan for p in patients for scan in self.scans[p]]
        candidates = [np.concatenate([np.arange(*self.bags.offsets[s : s + 2]) for s in scan.slides]) for scan in scans]
        placed = looks_at_neighbours(self.bags, self.settings)
        cells = self.bags.cells if placed else None
        rows, mask = pad_rows(
            [draw_rows(c, self.settings, rng, None if cells is None else cells[c]) for c in candidates]
        )
        x = torch.from_numpy(np.take(self.bags.features, rows, axis=0)).float().to(device)
        mask = None if mask is None else mask.to(device)
        domains = np.array([scan.domain for scan in scans])
        x = model.harmonise(x, torch.from_numpy(domains)[:, None].expand(rows.shape))
        if self.options["augmentation"] == "mean_shift":
            x = mean_shift(x, domains, self.means, rng)
        elif self.options["augmentation"] == "mix_style":
            x = mix_style(x, mask, rng)
        slides = None
        if self.settings.get("slides") == "attention":
            numbers = self.bags.slide_of(rows)
            slides = torch.from_numpy(numbers - numbers.min(1, keepdims=True)).to(device)
        people = [scan.patient for scan in scans]
        number = {p: i for i, p in enumerate(dict.fromkeys(people))}
        about = {
            "patients": torch.tensor([number[p] for p in people], device=device),
            "domains": torch.from_numpy(domains).to(device),
            "classes": torch.tensor([self.classes[p] for p in people], device=device),
        }
        weights = 1 / torch.bincount(about["patients"])[about["patients"]]  # a patient weighs one, in so many scans

        def bag_loss(logits: Tensor) -> Tensor:
            each = torch.stack([losses(logits[i : i + 1], people[i : i + 1]) for i in range(len(people))])
            return self._reduce(each, weights, about)

        labels = about["classes"] if self.squash == "softmax" else None
        places = cells_of(self.bags, rows).to(device) if placed else None
        result = model.step(Batch(x, mask, labels, slides, places), bag_loss)
        self.bags.forget()
        return result.loss + self._penalties(result.hidden, result.logits, about, progress)

    def _reduce(self, losses: Tensor, weights: Tensor, about: Mapping[str, Tensor]) -> Tensor:
        domains = about["domains"] + 1  # unknown is a domain of its own
        if self.dro is not None:
            groups = torch.where(domains > 0, (domains - 1) + len(self.names) * about["classes"], len(self.dro.q) - 1)
            return self.dro.loss(losses, groups, weights)
        if self.options["v_rex"]:
            return vrex(losses, domains, weights, self.options["v_rex"])
        return (losses * weights).sum() / weights.sum()

    def _penalties(self, hidden: Tensor, logits: Tensor, about: Mapping[str, Tensor], progress: float) -> Tensor:
        known = about["domains"] >= 0
        patients, domains, classes = (about[key][known] for key in ("patients", "domains", "classes"))
        hidden, scores = hidden[known], squashed(logits, self.squash)[known]
        ramp, total, options = min(1.0, progress / RAMP), logits.new_zeros(()), self.options
        if options["consistency"]:
            total = total + ramp * options["consistency"] * score_consistency(scores, patients, domains)
        if options["info_nce"]:
            total = total + ramp * options["info_nce"] * info_nce(hidden, patients, domains)
        if options["coral"]:
            total = total + ramp * options["coral"] * coral(hidden, classes, domains)
        if options["mmd"]:
            total = total + ramp * options["mmd"] * mmd(hidden, classes, domains)
        for name, adversary in self.adversaries.items():
            if len(hidden):
                total = total + options[name] * adversary(hidden, scores, domains, progress)
        return total


def squashed(logits: Tensor, how: str) -> Tensor:
    """Scores (B, K) that can be compared between scans: probabilities, or for a value (a risk, a regression) the value
    in deviations of the batch: otherwise shrinking all values would pass for consistency."""
    if how == "softmax":
        return logits.softmax(1)
    if how == "sigmoid":
        return logits.sigmoid()
    value = logits[:, :1]
    return (value - value.mean()) / value.std().clamp_min(1e-6) if len(value) > 1 else value * 0


def make_robust(
    bags: Bags, objective: Objective, train: Sequence[str], settings: Mapping[str, Any], seed: int
) -> Robust | None:
    """None where the settings ask for nothing."""
    return Robust(bags, objective, train, settings, seed) if active(settings) else None


@dataclass(frozen=True)
class Description:
    """Effective rank of the vectors that the classifier reads, deviation of the scores (of the last output), and mean
    difference of scores between scans of one patient (None without re-scans)."""

    effective_rank: float
    score_spread: float | None
    inconsistency: float | None


@torch.inference_mode()
def describe_scans(model: Aggregator, robust: Robust, patients: Sequence[str], most: int) -> Description:
    """Scans of these patients as a model sees them, of at most so many tiles each."""
    model.eval()
    hidden, logits, people, domains = [], [], [], []
    for p in patients:
        for scan in scans_of(robust.bags, p, robust.domain_of):
            parts = [np.arange(*robust.bags.offsets[s : s + 2]) for s in scan.slides]
            rows = np.concatenate(parts)
            rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]
            x = torch.from_numpy(np.asarray(robust.bags.features[rows], np.float32)).to(model.feature_mean.device)
            x = model.harmonise(x[None], torch.full((1, len(rows)), scan.domain))
            numbers = robust.bags.slide_of(rows)[None]
            slides = torch.from_numpy(numbers - numbers.min()) if model.slide_scores is not None else None
            places = cells_of(robust.bags, rows[None]) if model.placed and robust.bags.cells is not None else None
            pooled, _ = model.represent(model.encode_placed(x, places), None, slides)
            hidden.append(model.readout(pooled)[0])
            logits.append(model.logits(pooled)[0])
            people.append(p)
            domains.append(scan.domain)
            robust.bags.forget()
    scores = squashed(torch.stack(logits), robust.squash)[:, -1]
    gaps = [
        float((scores[i] - scores[j]).abs())
        for i in range(len(people))
        for j in range(i)
        if people[i] == people[j] and domains[i] != domains[j]
    ]
    spread = float(scores.std()) if len(scores) > 1 else None
    return Description(effective_rank(torch.stack(hidden)), spread, float(np.mean(gaps)) if gaps else None)
