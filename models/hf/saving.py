"""Writing a safetensors file as any other file of ours: errors of the system, usual permissions."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from configs.errors import UserError

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to `path`.

    The library writes a file that only its owner may read; this one is for whom the umask lets
    read. Raises OSError with the file's name where the disk takes no more, UserError else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:  # what the system said is in its text
        if found := _SYSTEM_ERROR.search(str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from None
        raise UserError(f"{path}: cannot be written: {error}") from None
    path.chmod(mode)
