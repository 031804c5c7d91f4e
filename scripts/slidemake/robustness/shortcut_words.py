"""What the probes of `shortcuts` found, in words: a warning where a shortcut is open, notes elsewhere."""

from __future__ import annotations

from typing import Any

P = 0.05
TOLD = 0.01  # association's p below which the label follows the site


def findings(result: dict[str, Any]) -> list[dict[str, str]]:
    """What a reader should conclude: {level, code, text}."""
    said = []
    for column, found in result["columns"].items():
        one, within, association = found["probe"], found["within_class"], found["association"]
        if one is None:
            continue
        text = (
            f"The embeddings tell the {column} of held-out patients with a balanced accuracy of "
            f"{one['balanced_accuracy']:.2f} (by chance {one['null']:.2f}, and up to {one['null_high']:.2f})"
        )
        told = one["p"] <= P and (within is None or within["balanced_accuracy"] > within["null_high"])
        follows = association is not None and association["p"] < TOLD
        if told and follows:
            text += (
                f", and the label follows the {column} (Cramér's V {association['cramers_v']:.2f}): a model can score "
                f"by recognising the {column}. Believe figures under folds that keep sites whole, or on another cohort."
            )
            said.append({"level": "warning", "code": f"shortcut_{column}", "text": text})
        elif told:
            text += (
                f", but the label is not shown to follow the {column}: in this cohort the knowledge is of little use."
            )
            said.append({"level": "note", "code": f"tells_{column}", "text": text})
        elif one["p"] <= P:
            text += f", but not of patients of the same class: no more of the {column} than the label tells is shown."
            said.append({"level": "note", "code": f"tells_{column}", "text": text})
        else:
            text += ": not shown to be more than chance."
            said.append({"level": "note", "code": f"blind_to_{column}", "text": text})
    gain = result["optimism"]
    if gain["difference"] is not None and gain["p"] <= P:
        text = (
            f"A linear model on the mean embeddings has AUROC {gain['preserved']:.2f} when sites are kept whole, and "
            f"{gain['random']:.2f} in folds of the same sizes and classes that mix the sites (p {gain['p']:.2g}): the "
            f"difference, {gain['difference']:.2f}, is what it gains by having seen the site."
        )
        said.append({"level": "warning", "code": "optimism", "text": text})
    null = result["null"]
    if null["auroc"] is not None and null["p"] > P and null["auroc"] <= null["null_high"]:
        below = null["auroc"] < null["null_low"]
        how = "worse than" if below else "not shown to be better than"
        why = (
            "are labels inverted, or folds too small?"
            if below
            else "there may be nothing to learn, or too few patients."
        )
        text = (
            f"A linear model on the mean embeddings has AUROC {null['auroc']:.2f}, {how} with permuted labels "
            f"({null['null_low']:.2f} to {null['null_high']:.2f}): {why}"
        )
        said.append({"level": "note", "code": "no_signal", "text": text})
    return said
