"""safetensors files: slices with bounded mapped memory, and writing with the usual permissions.

safetensors maps a file into memory and returns views of it. Pages that were read count as memory of
the process until the file is closed, so reading a model of many files one after the other would map
all of it. So the files are closed after every 32 MiB that were read, and reopened on demand.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.errors import UserError

MAPPED_BYTES = 2**25
"""Number of bytes read after which files are closed."""
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


class MappedFiles:
    """Open safetensors files by path; raises the errors of the library and of the system."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._taken = 0

    def file(self, path: Path) -> Any:
        """The open file, for its names, shapes and dtypes."""
        from safetensors import safe_open

        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def slice(self, path: Path, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """`name[index]` of a file, a view of the mapped file: copy it before the next call."""
        if self._taken > MAPPED_BYTES:
            self._open.clear()
            self._taken = 0
        file = self.file(path)
        part: Tensor = file.get_slice(name)[index] if index else file.get_tensor(name)
        self._taken += part.nbytes
        return part


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to `path`.

    The library writes a file that only its owner may read; this one has the permissions of the
    umask. Raises OSError with the file's name if the disk is full, otherwise UserError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:  # its text contains the system's error
        if found := _SYSTEM_ERROR.search(str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from None
        raise UserError(f"{path}: cannot be written: {error}") from None
    path.chmod(mode)
