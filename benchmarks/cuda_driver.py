"""Whether this machine has a CUDA device: asked of the driver alone, so that nothing need be installed for it."""

from __future__ import annotations

import ctypes
import sys

LIBRARY = {"win32": "nvcuda.dll"}.get(sys.platform, "libcuda.so.1")


def missing() -> str | None:
    """What is missing, in words."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return f"no CUDA device here: NVIDIA's driver ({LIBRARY}) is not installed"
    count = ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return f"no CUDA device here: NVIDIA's driver answers with error {code}"
    return None if count.value else "no CUDA device here: NVIDIA's driver finds none"


if __name__ == "__main__":
    why = missing()
    sys.exit(why and f"{why}; nothing was run")
