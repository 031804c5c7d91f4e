"""Guards of robust training: each member is trained a second time without it, from the same seed, and compared.

Consistency can be bought with the task: scores that are all alike agree between scanners. So a robust member that
learned nothing where its twin learned something is replaced by the twin. Validation patients share the training
patients' confounding, so a model that leaves the scanner alone must lose something on them: a somewhat worse validation
loss is no failure. An effective rank of the vectors that the classifier reads below 0.8 of the twin's is reported as a
collapse in the log and in the bundle.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from slidemake.mil.invariance.robust import Robust, describe_scans

if TYPE_CHECKING:
    from slidemake.mil.members import Fitted

log = logging.getLogger("slidemake")

RANK = 0.8  # smallest share of the twin's effective rank
NOTHING, SOMETHING = 0.95, 0.75  # of the loss of constant outputs: a member above the first learned nothing, ...
TILES = 1024  # of a scan, evenly spaced


def choose(
    fitted: Fitted, plain: Fitted, robust: Robust, patients: Sequence[str], constant: float | None = None
) -> tuple[Fitted, dict[str, Any]]:
    """The member to keep, and what was found of both: rank, spread and inconsistency of scores, validation loss.

    constant: validation loss of outputs that are all 0; None without validation patients.
    """
    found = {
        name: describe_scans(member.model, robust, patients, TILES)
        for name, member in (("robust", fitted), ("plain", plain))
    }
    loss, without = _val_loss(fitted), _val_loss(plain)
    worse = False
    if loss is not None and without is not None and constant is not None:
        worse = loss > NOTHING * constant and without < SOMETHING * constant
    rank, usual = (found[name].effective_rank for name in ("robust", "plain"))
    collapsed = rank < RANK * usual
    if worse:
        log.warning(
            "robust training cost the task (validation loss %.3f, without it %.3f, of constant scores %.3f): this "
            "member is the one without; lower the weights under invariance",
            loss,
            without,
            constant,
        )
    elif collapsed:
        log.warning(
            "after robust training the vectors that the classifier reads use %.1f directions instead of %.1f: see "
            "whether the metrics hold",
            rank,
            usual,
        )
    report = {
        "kept": "plain" if worse else "robust",
        "collapsed": collapsed,
        "rescanned": robust.rescanned,
        "robust": {**asdict(found["robust"]), "val_loss": loss},
        "plain": {**asdict(found["plain"]), "val_loss": without},
    }
    return plain if worse else fitted, report


def _val_loss(member: Fitted) -> float | None:
    value = member.curve[member.epoch - 1]["val_loss"]
    return None if value is None else float(value)
