"""What stain normalisation does to models of small cohorts: the measurement behind `stain.method: auto`.

    .venv/bin/python benchmarks/stain.py embed FOLDER --tiles TILES [--encoder KEY] [--encoders-file YAML]
    .venv/bin/python benchmarks/stain.py score FOLDER

`embed` composes cohorts (stain_cohorts.py) and writes the features of every arm, one file a cohort, which a second call
goes on from; `score` prints tables. An arm is a method and the reference that slides are brought to. Fits, transforms
and encoder are slidemake's own. Figures, each a difference to no normalisation on the same patients:

folds   AUROC of patients, five folds, four repeats: a linear score per tile on 32 whitened principal components (of
        all tiles, without labels), pooled by log-sum-exp; patients of one site are compared with each other
sites   the same model, each site held out in turn, from its components on
tiles   AUROC of tumour tiles by a logistic regression on tiles of the other sites: what the features allow
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from slidemake.stain.fit import (
    StainRefused,
    StainTransform,
    fit_stain,
    stain_transform,
)
from slidemake.stain.judgement import describe_pixels, judged_transform
from slidemake.stain.targets import pool_targets, target_from_image
from stain_cohorts import Design, Patient, compose, designs

ARMS = tuple((method, target) for method in ("macenko", "reinhard") for target in ("tiatoolbox", "cohort"))
POOLED = 20_000  # pixels of a patient that a fit is given


def pooled_pixels(patient: Patient) -> np.ndarray:
    """Pixels (n, 3) of a patient's tiles at 1 um per px, as the stain stage pools them."""
    n, height, width, _ = patient.tiles.shape
    mean = patient.tiles.reshape(n, height // 2, 2, width // 2, 2, 3).mean(axis=(2, 4)).reshape(-1, 3)
    keep = np.linspace(0, len(mean) - 1, min(len(mean), POOLED)).round().astype(int)
    return np.rint(mean[keep]).astype(np.uint8)


def fits_of(cohort: list[Patient], method: str) -> list[dict[str, Any]]:
    """One record per patient, as stain.json has it."""
    found = []
    for patient in cohort:
        try:
            found.append({"status": "ok", **fit_stain(pooled_pixels(patient), method, patient.glass).as_dict()})
        except StainRefused as refused:
            empty = dict.fromkeys(("stain_matrix", "max_concentrations", "lab_mean", "lab_std"))
            found.append({"status": "none", "method": method, "reason": refused.reason, **empty})
            found[-1]["white_point"] = patient.glass
    return found


def embed_cohort(design: Design, encoder: Any, arguments: argparse.Namespace, out: Path) -> None:
    """Features of every arm of one cohort -> `out`.npz, with truth, fits and judgements.

    What is judged unfit (`judged-` arms) is embedded again where one stain is left; else it is what was there.
    """
    cohort = compose(design, arguments.tiles, arguments.benign, arguments.tumour)
    arrays: dict[str, np.ndarray] = dict(np.load(out)) if out.exists() else {}
    arrays |= {
        "site": np.array([p.site for p in cohort]),
        "label": np.array([p.label for p in cohort]),
        "truth": np.stack([p.truth for p in cohort]),
    }
    if "none" not in arrays:
        arrays["none"] = np.stack([features(encoder, p.tiles, None) for p in cohort])
    described = [describe_pixels(pooled_pixels(p), p.glass) for p in cohort]
    records: dict[str, Any] = {"design": vars(design), "judged": {}}
    fits = {method: fits_of(cohort, method) for method, _ in ARMS}
    for method, target in ARMS:
        arm = f"{method}-{target}"
        reference = pool_targets(fits[method], method) if target == "cohort" else target_from_image(target, method)
        plain = [stain_transform(fit, reference) for fit in fits[method]]
        if arm not in arrays:
            arrays[arm] = np.stack(
                [_of_arm(encoder, p, t, f) for p, t, f in zip(cohort, plain, arrays["none"], strict=True)]
            )
        judged = [
            judged_transform(fit | {"tissue": about}, reference)
            for fit, about in zip(fits[method], described, strict=True)
        ]
        records["judged"][arm] = [(t.applied, t.reason, t.judgement) for t in judged]
        kept = [f if t.applied == "both" else g for t, f, g in zip(judged, arrays[arm], arrays["none"], strict=True)]
        alone = [i for i, t in enumerate(judged) if t.applied in ("haematoxylin", "eosin")]
        for i in alone:
            kept[i] = features(encoder, cohort[i].tiles, judged[i])
        arrays[f"judged-{arm}"] = np.stack(kept)
    arrays["records"] = np.array(json.dumps(records))
    part = out.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.rename(out)


def _of_arm(encoder: Any, patient: Patient, transform: StainTransform, unchanged: np.ndarray) -> np.ndarray:
    return unchanged if transform.status == "none" else features(encoder, patient.tiles, transform)


def features(encoder: Any, tiles: np.ndarray, transform: StainTransform | None) -> np.ndarray:
    """(n, D) float16 of tiles (n, H, W, 3) uint8, in batches of eight."""
    import torch
    from slidemake.stain.on_device import apply_stain

    hook = None if transform is None else (lambda batch: apply_stain(batch, transform))
    parts = [
        encoder.forward(torch.from_numpy(tiles[i : i + 8]).permute(0, 3, 1, 2), hook) for i in range(0, len(tiles), 8)
    ]
    return torch.cat(parts).numpy().astype(np.float16)


def embed(arguments: argparse.Namespace) -> None:
    """Features of all cohorts that are not there yet."""
    import torch
    from slidemake.encoders.loading import load_encoder
    from slidemake.encoders.registry import load_record, registry

    torch.set_num_threads(1)
    known = registry([arguments.encoders_file] if arguments.encoders_file else None)
    encoder = load_encoder(load_record(arguments.encoder, known), "cpu", "fp32")
    folder = arguments.folder / arguments.encoder
    folder.mkdir(parents=True, exist_ok=True)
    for design in designs():
        out = folder / f"{design.name}.npz"
        if arguments.only and design.name not in arguments.only:
            continue
        if arguments.size:
            design = replace(design, patients=arguments.size[0], tiles=arguments.size[1])
        if not out.exists() or "judged-reinhard-cohort" not in np.load(out):
            embed_cohort(design, encoder, arguments, out)
            print(out, flush=True)


def concordance(label: np.ndarray, score: np.ndarray, group: np.ndarray) -> float:
    """Share of pairs of a positive and a negative of one group (site) that are in order: AUROC within groups."""
    right, pairs = 0.0, 0
    for g in np.unique(group):
        positive, negative = score[(group == g) & (label == 1)], score[(group == g) & (label == 0)]
        difference = positive[:, None] - negative[None]
        right += (difference > 0).sum() + 0.5 * (difference == 0).sum()
        pairs += difference.size
    return float(right / pairs)


def whitened(x: np.ndarray, train: np.ndarray, components: int = 32) -> np.ndarray:
    """(patients, tiles, components) of features (patients, tiles, D), by the tiles of the patients `train`."""
    from sklearn.decomposition import PCA

    pca = PCA(components, whiten=True, svd_solver="randomized", random_state=0)
    pca.fit(x[train].reshape(-1, x.shape[-1]))
    return pca.transform(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], components).astype(np.float64)


def patient_scores(z: np.ndarray, label: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Scores of the patients `test`: a linear score per tile of z (patients, tiles, K), pooled by log-sum-exp.

    Minimises the mean logistic loss with a penalty of 0.01 |w|^2 / 2; the sharpness of the pooling is 3.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, logsumexp, softmax

    sign = 2.0 * label[train] - 1

    def pooled(v: np.ndarray, at: np.ndarray) -> np.ndarray:
        return (logsumexp(3 * (z[at] @ v[:-1]), axis=1) - np.log(z.shape[1])) / 3 + v[-1]

    def loss(v: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * pooled(v, train)
        slope = -sign * expit(-margin) / len(train)
        shares = softmax(3 * (z[train] @ v[:-1]), axis=1)
        gradient = np.einsum("p,pt,ptk->k", slope, shares, z[train]) + 0.01 * v[:-1]
        return np.logaddexp(0, -margin).mean() + 0.005 * v[:-1] @ v[:-1], np.append(gradient, slope.sum())

    return pooled(minimize(loss, np.zeros(z.shape[2] + 1), jac=True, method="L-BFGS-B").x, test)


def figures(x: np.ndarray, label: np.ndarray, truth: np.ndarray, site: np.ndarray) -> dict[str, float]:
    """`folds`, `sites` and `tiles` of one arm; `x` (patients, tiles, D)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    x = x.astype(np.float32)
    everyone = whitened(x, np.arange(len(x)))
    by_fold = []
    for seed in range(4):
        score = np.zeros(len(label))
        for train, test in StratifiedKFold(5, shuffle=True, random_state=seed).split(x, label):
            score[test] = patient_scores(everyone, label, train, test)
        by_fold.append(concordance(label, score, site))
    by_site, tiles = np.zeros(len(label)), np.zeros(truth.shape)
    for held in np.unique(site):
        train, test = np.nonzero(site != held)[0], np.nonzero(site == held)[0]
        z = whitened(x, train)
        by_site[test] = patient_scores(z, label, train, test)
        probe = LogisticRegression(C=0.1, class_weight="balanced", max_iter=300)
        probe.fit(z[train].reshape(-1, z.shape[-1]), truth[train].ravel())
        tiles[test] = probe.decision_function(z[test].reshape(-1, z.shape[-1])).reshape(len(test), -1)
    everywhere = np.repeat(site, truth.shape[1])
    return {
        "folds": float(np.mean(by_fold)),
        "sites": concordance(label, by_site, site),
        "tiles": concordance(truth.ravel().astype(int), tiles.ravel(), everywhere),
    }


def score(folder: Path) -> None:
    """Figures of every arm of every cohort (kept in scores.json) and the tables of differences."""
    kept = folder / "scores.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for path in sorted(folder.glob("*/*.npz")):
        if path.name.endswith(".part.npz"):
            continue
        arrays = np.load(path)
        known = found.setdefault(f"{path.parent.name}/{path.stem}", {})
        for arm in ["none", *[p + "-".join(a) for a in ARMS for p in ("", "judged-")]]:
            if arm in arrays and arm not in known:
                known[arm] = figures(arrays[arm], arrays["label"], arrays["truth"], arrays["site"])
        kept.write_text(json.dumps(found, indent=1))
        print(path, {arm: round(known[arm]["folds"], 3) for arm in known}, flush=True)
    for encoder in sorted({name.split("/")[0] for name in found}):
        table(encoder, {name.split("/")[1]: arms for name, arms in found.items() if name.split("/")[0] == encoder})


def table(encoder: str, cohorts: dict[str, dict[str, dict[str, float]]]) -> None:
    """Mean differences to no normalisation over cohorts, with a 95 % interval by Student's t."""
    from scipy.stats import t

    kinds = {design.name: design.kind for design in designs()}
    for measure in ("folds", "sites", "tiles"):
        plain = [arms["none"][measure] for arms in cohorts.values()]
        print(f"\n{encoder}, {measure}: none {np.mean(plain):.3f} over {len(plain)} cohorts\n")
        print("| arm | all | " + " | ".join(dict.fromkeys(kinds.values())) + " | worst | better |")
        for arm in ["-".join(a) for a in ARMS] + ["judged-" + "-".join(a) for a in ARMS]:
            gains = {n: a[arm][measure] - a["none"][measure] for n, a in cohorts.items() if arm in a}
            if len(gains) < 2:
                continue
            values = np.array(list(gains.values()))
            half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
            cells = [f"{values.mean():+.3f} ({values.mean() - half:+.3f}, {values.mean() + half:+.3f})"]
            for kind in dict.fromkeys(kinds.values()):
                own = [gain for name, gain in gains.items() if kinds[name] == kind]
                cells.append(f"{np.mean(own):+.3f}" if own else "")
            cells += [f"{values.min():+.3f}", f"{(values > 0).sum()} of {len(values)}"]
            print(f"| {arm} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("embed")
    one.add_argument("folder", type=Path)
    one.add_argument("--tiles", type=Path, required=True, help="folder of tiles with tiles.csv")
    one.add_argument("--benign", default="colon_n")
    one.add_argument("--tumour", default="colon_aca")
    one.add_argument("--encoder", default="efficientnet_lite0")
    one.add_argument("--encoders-file", type=Path)
    one.add_argument("--size", type=int, nargs=2, help="patients of a cohort, and tiles of a patient, of all cohorts")
    one.add_argument("--only", nargs="+", help="names of cohorts (default: all)")
    two = commands.add_parser("score")
    two.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "embed":
        embed(arguments)
    else:
        score(arguments.folder)


if __name__ == "__main__":
    main()
