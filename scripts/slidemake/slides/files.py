"""Whether a path of the sheet is a file that can be opened at all, before a library is asked to."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from slidemake.core.failures import SlideFailure

OF_WINDOWS = (
    "This is a path of Windows. Write it as this system sees the drive (in WSL C:\\data\\a.svs is /mnt/c/data/a.svs), "
    "or relative to the sheet's own folder, with / between folders."
)
_DRIVE = re.compile(r"(?:^|/)[A-Za-z]:(?:/|$)")


def check_file(path: Path) -> None:
    """Whether there is a file, or a folder, that this user may read. Raises SlideFailure missing_file, unsupported (a
    pipe or a device, which may have no end) or unreadable.
    """
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISREG(kind):
            os.close(os.open(path, os.O_RDONLY))
        elif stat.S_ISDIR(kind):
            os.scandir(path).close()
        else:
            raise SlideFailure("unsupported", f"{path} is no file and no folder", "Write the path of the slide itself.")
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = OF_WINDOWS if "\\" in str(path) or _DRIVE.search(str(path)) else None
        raise SlideFailure("missing_file", f"{path} does not exist", hint) from error
    except PermissionError as error:
        raise no_permission(path, error) from error


def no_permission(path: Path, error: PermissionError) -> SlideFailure:
    """The failure of a slide that this user may not read: the slide's own, not the run's."""
    hint = f"Give this user permission to read it (chmod a+r {error.filename or path}; folders above it need x)."
    return SlideFailure("unreadable", f"there is no permission to read {path}", hint)
