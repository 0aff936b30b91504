"""A plugin for the whole suite: its namespace cupy, without a device.

cd tests && python -m pytest -p suite_on_imitated_cupy -k cupy
"""

from __future__ import annotations

import namespaces
from imitated_cupy import CUPY, imitated_cupy

CONTEXT = imitated_cupy()
CONTEXT.__enter__()  # for the life of the process
IMITATED = namespaces.Namespace("cupy", CUPY)
for known in {id(some): some for some in (namespaces.NAMESPACES, namespaces.EVERY_PATH)}.values():
    known[:] = [*(namespace for namespace in known if namespace.name != "cupy"), IMITATED]
