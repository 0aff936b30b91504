"""What the loader asks of CuPy, with a stand-in for it."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from arraynorm import _array
from arraynorm.kernels.cuda import Instance, _loader, instances, warm_up
from arraynorm.kernels.cuda._loader import Plan

ONE = Instance("batch_norm.cu", "apply<Slab, float, 4, false>")


@pytest.fixture
def cupy(monkeypatch):
    """A CuPy of one device that notes what it is asked for."""
    asked = SimpleNamespace(modules=[], launches=[])

    class Kernel:
        shared_size_bytes = 1024

        def __call__(self, grid, block, arguments, *, shared_mem):
            asked.launches.append((grid, block, arguments, shared_mem))

    class Module:
        def __init__(self, **options):
            asked.modules.append(options)

        def get_function(self, name):
            assert name in asked.modules[-1]["name_expressions"]
            asked.kernel = Kernel()
            return asked.kernel

    runtime = SimpleNamespace(
        getDeviceProperties=lambda number: {"multiProcessorCount": 132, "sharedMemPerBlockOptin": 232448}
    )
    stand_in = SimpleNamespace(
        RawModule=Module, cuda=SimpleNamespace(runtime=runtime, Device=lambda: SimpleNamespace(id=0))
    )
    monkeypatch.setattr(_array, "cupy", lambda: stand_in)
    for cached in (_loader.compiled, _loader.properties):
        cached.cache_clear()
    yield asked
    for cached in (_loader.compiled, _loader.properties):
        cached.cache_clear()


def test_an_instance_is_compiled_once_from_its_whole_source(cupy):
    first, again = _loader.compiled(ONE, 0), _loader.compiled(ONE, 0)
    assert first is again
    assert cupy.modules == [
        {
            "code": _loader.source("batch_norm.cu"),
            "options": ("-std=c++17", "-fmad=false"),
            "backend": "nvrtc",
            "name_expressions": (ONE.name,),
        }
    ]
    assert cupy.kernel.max_dynamic_shared_size_bytes == 232448 - 1024


def test_a_launch_has_the_geometry_last(cupy):
    x = SimpleNamespace(device=SimpleNamespace(id=0))
    geometry = np.zeros(1)
    _loader.launch(x, Plan(ONE, 7, 256, 512, geometry), x, 1)
    _loader.launch(x, Plan(ONE, 1, 32, 0, None), x)
    assert cupy.launches == [((7,), (256,), (x, 1, geometry), 512), ((1,), (32,), (x,), 0)]


def test_warming_up_compiles_what_is_named_or_all(cupy):
    assert warm_up([ONE]) == 1
    assert [module["name_expressions"] for module in cupy.modules] == [(ONE.name,)]
    assert warm_up() == len(list(instances())) == len(set(instances()))
    assert len(cupy.modules) == len(list(instances()))


def test_without_cupy_the_kernels_are_registered_and_warming_up_says_what_to_install():
    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("CuPy is installed here")
    with pytest.raises(RuntimeError, match=r"pip install arraynorm\[cuda13\]"):
        warm_up()
