"""A slide that cannot be processed is a typed record, not a crash and not a gap.

Code that meets such a slide raises `SlideFailure`; `racks.run_rack` turns it into the record that travels down the
manifests to the report. `RunError` is the other kind of trouble: the run itself cannot go on (a wrong setting, a full
disk), which is nobody's slide's fault.
"""

from __future__ import annotations

import errno
import os
from dataclasses import asdict, dataclass

# code -> what the user can do about it, when the place that raises has nothing more precise to say. The next run sees a
# change of the sheet, the configuration or a file by itself; of memory and the like it has to be told (--forcerun).
HINTS: dict[str, str] = {
    "missing_file": "Check the path column of the sheet: relative paths start at the sheet's own folder.",
    "unreachable": "The slide could not be fetched. See that address, network and credentials (environment) are right.",
    "wrong_checksum": "The file is not the one that the sheet describes: correct the sha256 in the sheet, or the file.",
    "unsupported": "No reader opens this file. Convert it to a pyramidal TIFF (vips tiffsave --tile --pyramid).",
    "unreadable": "The file opens but its pixels do not decode. Copy it again from the scanner or the archive.",
    "truncated": "The file is shorter than its own index says. Copy it again and compare the sizes.",
    "not_brightfield": "slidemake reads RGB brightfield slides; fluorescence and multichannel images are refused.",
    "no_mpp": "Write the slide's um per pixel into the mpp column of the sheet, or set screening.default_mpp.",
    "implausible_mpp": "Write the true um per pixel (0.05 to 10) into the mpp column of the sheet.",
    "too_coarse": "The scan is coarser than the grid asks for and is not enlarged: use a grid with a larger mpp.",
    "no_tissue": "Look at tissue.jpg. If tissue was missed, give your own outline in the tissue_geojson column.",
    "implausible_colours": "Look at tissue.jpg: glass under transmitted light is white or nearly so. Export the slide "
    "again, with its colour profile; or, if it is as it should be, give an outline in the tissue_geojson column.",
    "too_few_tiles": "Lower tiling.min_tissue or tiling.min_tiles, or exclude the slide.",
    "missing_features": "Check the column features of the sheet (relative paths start at the sheet's folder), or the "
    "pattern features.folder.",
    "wrong_features": "See that the file is of this slide, of this encoder, and whole.",
    "duplicate": "The same scan is in the sheet twice: keep one row, or set exclude on the other.",
    "out_of_memory": "Lower embedding.batch_size; or give the job more memory or fewer threads, and run again with "
    "--forcerun and the name of its rule.",
    "too_slow": "The file asks for more work than a slide should: look at it, and set exclude; or raise slide_seconds "
    "and run again with --forcerun and the name of the job's rule.",
    "damaged": "A file of the results is damaged, not the slide: `python -m slidemake verify` with the folder of the "
    "results names every such file, and what to delete so that the next run makes it again.",
    "crashed": "This is a defect or an exotic file: please report it, with the traceback that the log of the job has "
    "(in logs/, by rule and rack). Where it is mended, run again with --forcerun and the name of the rule.",
}
CODES = tuple(HINTS)


@dataclass(frozen=True)
class Failure:
    """Why one slide stops at one stage (the failure record of docs/formats.md)."""

    slide_id: str
    stage: str
    code: str
    message: str
    hint: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class SlideFailure(Exception):
    """This slide cannot be processed; the cohort goes on.

    `code` is one of `CODES`; `message` says what is wrong with this slide, with numbers; `hint` says what to do and
    defaults to the code's own.
    """

    def __init__(self, code: str, message: str, hint: str | None = None):
        if code not in HINTS:
            raise ValueError(f"unknown failure code {code!r}; one of {', '.join(CODES)}")
        message = one_line(message)
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint or HINTS[code]

    def __reduce__(self) -> tuple[type[SlideFailure], tuple[str, str, str]]:
        """Travels between processes with all three, not as an exception of one argument."""
        return type(self), (self.code, self.message, self.hint)

    def record(self, slide_id: str, stage: str) -> Failure:
        return Failure(slide_id, stage, self.code, self.message, self.hint)


def one_line(text: str, longest: int = 1000) -> str:
    """A message for terminals, tables and pages: what a slide file says of itself may be part of it."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else f"\\x{ord(c):02x}" for c in text[: 2 * longest])
    return text if len(text) <= longest else text[:longest] + "..."


def damaged(path: object, what: str) -> SlideFailure:
    """A file or store that slidemake wrote is not as it was written; `what` goes on after its name."""
    return SlideFailure("damaged", f"{path} {what}")


class RunError(Exception):
    """The run cannot go on. The message is the whole story for the user: what is wrong, where, and what to do."""


# What the system says that is nobody's slide's fault: errno -> (what is wrong, what to do about it)
_DISK_TROUBLES = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), ("No space left on the disk", "Free some space (or raise the quota)")
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), ("No permission", "Give this user access")),
    **dict.fromkeys(
        (errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        ("The file system does not answer", "Wait until it does"),
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), ("Too many open files", "Raise the limit (ulimit -n)")),
}


def _number_in(text: str) -> int | None:
    """The errno that a C library reports in words."""
    return next((n for n in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS) if os.strerror(n) in text), None)


def disk_trouble(error: BaseException | None, doing: str) -> RunError | None:
    """The RunError for a full disk, a missing permission and their like, also where a library wrapped them; None for
    any other error. `doing` says what could not be done ("tiles wrote slide a").
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else _number_in(str(error))
        if number in _DISK_TROUBLES:
            what, remedy = _DISK_TROUBLES[number]
            return RunError(
                f"{what} while {doing} ({error}). {remedy} and run the same command again: finished slides are kept."
            )
        error = error.__cause__ or error.__context__
    return None
