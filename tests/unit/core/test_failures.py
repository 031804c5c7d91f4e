"""Which errors are the disk's and not a slide's."""

import errno
import os

import pytest
from slidemake.core.failures import disk_trouble


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on the disk while tiles wrote slide a"),
        (errno.EDQUOT, "No space"),
        (errno.EACCES, "No permission"),
        (errno.EROFS, "No permission"),
        (errno.ESTALE, "does not answer"),
        (errno.EMFILE, "Too many open files"),
    ],
)
def test_the_disk_is_nobodys_slides_fault(number, words):
    error = OSError(number, os.strerror(number))
    text = str(disk_trouble(error, "tiles wrote slide a"))
    assert words in text
    assert os.strerror(number) in text
    assert "run the same command again: finished slides are kept" in text


def test_also_where_a_library_wraps_it():
    def save():
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ValueError("cannot save") from error

    with pytest.raises(ValueError, match="cannot save") as found:
        save()
    assert "No space" in str(disk_trouble(found.value, "x"))
    assert "No space" in str(disk_trouble(RuntimeError("unable to write: system error: No space left on device"), "x"))


def test_other_errors_are_not_the_disks():
    assert disk_trouble(OSError(errno.EIO, "Input/output error"), "x") is None
    assert disk_trouble(FileNotFoundError(errno.ENOENT, "No such file"), "x") is None
    assert disk_trouble(ValueError("bad"), "x") is None
