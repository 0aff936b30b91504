"""Which communicator is meant: None, ours, a raw mpi4py one; with and without mpi4py and a launcher."""

# ruff: noqa: N802 (mpi4py's names)
from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import SELF, MPICommunicator, as_communicator, mpi, world
from arraynorm.typing import Communicator

LAUNCHERS = {
    "MPICH": "PMI_SIZE",
    "Open MPI": "OMPI_COMM_WORLD_SIZE",
    "MVAPICH": "MV2_COMM_WORLD_SIZE",
    "Slurm": "SLURM_STEP_NUM_TASKS",
}

x = np.random.default_rng(0).normal(size=(6, 3))


DONE = SimpleNamespace(Test=lambda: True)


class Intracomm:
    """mpi4py's, for one rank: as much of it as is used here."""

    def __init__(self, ranks=1):
        self.ranks, self.duplicates, self.attributes = ranks, [], {}

    def Get_rank(self):
        return 0

    def Get_size(self):
        return self.ranks

    def Iallgather(self, payload, gathered):
        gathered[...] = payload
        return DONE

    def Iallreduce(self, payload, greatest, op):
        greatest[...] = payload
        return DONE

    def Recv_init(self, buffer, source):
        return SimpleNamespace(into=buffer[0])

    def Send_init(self, buffer, dest):
        return SimpleNamespace(out=buffer[0])

    def Idup(self):
        self.duplicates.append(Intracomm(self.ranks))
        return self.duplicates[-1], DONE

    def Get_attr(self, keyval):
        return self.attributes.get(keyval)

    def Set_attr(self, keyval, value):
        self.attributes[keyval] = value


class Prequest:
    """Of two ranks that always say the same."""

    @staticmethod
    def Startall(requests):
        for receive, send in zip(requests[: len(requests) // 2], requests[len(requests) // 2 :], strict=True):
            receive.into[: len(send.out)] = send.out

    @staticmethod
    def Testall(requests):
        return True


Intracomm.__module__ = "mpi4py.MPI"  # how a communicator is recognized without importing mpi4py


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for variable in LAUNCHERS.values():
        monkeypatch.delenv(variable, raising=False)
    world.cache_clear()
    yield
    world.cache_clear()


@pytest.fixture
def without_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)


@pytest.fixture
def mpi4py(monkeypatch):
    """A stand-in whose world has two ranks that always say the same; the value is its MPI module."""
    package, module = ModuleType("mpi4py"), ModuleType("mpi4py.MPI")
    package.__spec__, package.MPI = ModuleSpec("mpi4py", None), module
    module.Intracomm, module.COMM_NULL, module.COMM_WORLD = Intracomm, Intracomm(0), Intracomm(2)
    module.Comm, module.MAX = SimpleNamespace(Create_keyval=lambda delete_fn: 7), None
    module.DOUBLE, module.Prequest = None, Prequest
    module.get_vendor = lambda: ("a stand-in", (1,))
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", module)
    for cached in (mpi._mpi, mpi._keyval):
        cached.cache_clear()
    yield module
    for cached in (mpi._mpi, mpi._keyval):
        cached.cache_clear()


def test_hydra_says_whether_ranks_share_cores():
    assert not mpi._is_crowded({})
    assert not mpi._is_crowded({"MPI_LOCALNRANKS": "1"})
    assert mpi._is_crowded({"MPI_LOCALNRANKS": "1000000"})


# -- the world -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_mpi4py")
def test_without_mpi4py_and_launcher_the_world_is_this_process():
    assert world() is SELF
    layer, alone = an.SyncBatchNorm(3), an.BatchNorm(3)
    np.testing.assert_array_equal(layer(x), alone(x))
    np.testing.assert_array_equal(layer.backward(x), alone.backward(x))
    np.testing.assert_array_equal(layer.running_var, alone.running_var)


@pytest.fixture
def without_libmpi(monkeypatch):
    """mpi4py, but no library beneath it."""
    package, finder = ModuleType("mpi4py"), SimpleNamespace(find_spec=_fails_to_load)
    package.__spec__ = ModuleSpec("mpi4py", None)
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    package.__path__ = []


def _fails_to_load(name, path=None, target=None):
    if name == "mpi4py.MPI":
        raise RuntimeError("cannot load MPI library")


@pytest.mark.usefixtures("without_libmpi")
def test_without_an_mpi_library_a_single_process_is_the_world_and_ranks_are_told_what_to_install(monkeypatch):
    assert world() is SELF
    world.cache_clear()
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(RuntimeError, match=r"started 4 ranks.*no MPI library \(cannot load.*pip install mpich"):
        an.SyncBatchNorm(3)(x)


@pytest.mark.usefixtures("without_mpi4py")
@pytest.mark.parametrize("variable", LAUNCHERS.values(), ids=LAUNCHERS)
def test_without_mpi4py_under_a_launcher_training_raises_and_says_what_to_install(variable, monkeypatch):
    monkeypatch.setenv(variable, "4")
    layer = an.SyncBatchNorm(3)  # nothing is resolved yet
    before = {name: array.tobytes() for name, array in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"the launcher started 4 ranks.*mpi4py.*pip install arraynorm\[mpi\]"):
        layer(x)
    assert {name: array.tobytes() for name, array in layer.state_dict().items()} == before


@pytest.mark.usefixtures("without_mpi4py")
def test_without_mpi4py_under_a_launcher_eval_and_unsynchronized_layers_work(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    np.testing.assert_array_equal(an.SyncBatchNorm(3).eval()(x), an.BatchNorm(3).eval()(x))
    np.testing.assert_array_equal(an.SyncBatchNorm(3, comm=SELF)(x), an.BatchNorm(3)(x))
    np.testing.assert_array_equal(an.FusedBatchNorm(3)(x), an.FusedBatchNorm(3, comm=SELF)(x))


@pytest.mark.usefixtures("without_mpi4py")
@pytest.mark.parametrize("ranks", ["1", "", "several", "-2"])
def test_a_launcher_of_one_rank_or_a_size_that_is_no_number_is_no_launcher(ranks, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", ranks)
    assert world() is SELF


def test_the_world_is_mpis_found_at_the_first_training_forward(mpi4py):
    layer = an.SyncBatchNorm(3)
    layer.eval()(x)
    assert not mpi4py.COMM_WORLD.duplicates
    layer.train()(x)
    assert type(world()) is MPICommunicator
    assert world().size == 2
    assert int(layer.num_batches_tracked) == 1


def test_the_world_is_found_once_for_all_layers(mpi4py):
    net = an.Sequential(an.SyncBatchNorm(3), an.SyncBatchNorm(3))
    net(x)
    net(x)
    assert world() is world()
    assert len(mpi4py.COMM_WORLD.duplicates) == 1


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_layer_over_one_rank_is_batch_norm_and_over_more_it_counts_them_all(mpi4py, ranks):
    mpi4py.COMM_WORLD = Intracomm(ranks)
    layer, alone = an.SyncBatchNorm(3, dtype=np.float64), an.BatchNorm(3, dtype=np.float64)
    layer(x)
    alone(np.concatenate([x] * ranks))
    np.testing.assert_allclose(layer.running_var, alone.running_var, rtol=1e-15 if ranks > 1 else 0)


def test_importing_the_package_and_making_layers_does_not_import_mpi4py():
    code = "import sys, arraynorm as an; an.SyncBatchNorm(3).eval(); assert 'mpi4py' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- one communicator ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mpi4py")
def test_a_raw_communicator_is_wrapped_and_duplicated_once_however_many_layers_it_has():
    raw, other = Intracomm(2), Intracomm(2)
    layers = [an.SyncBatchNorm(3, comm=raw), an.FusedBatchNorm(3, comm=raw), an.SyncBatchNorm(3, comm=other)]
    net = an.SyncBatchNorm.convert_sync_batchnorm(an.Sequential(an.BatchNorm(3), an.BatchNorm(3)), raw)
    for layer in (*layers, *net.children()):
        assert type(layer.comm) is MPICommunicator
        assert isinstance(layer.comm, Communicator)
    MPICommunicator(raw)
    as_communicator(raw)
    assert [len(comm.duplicates) for comm in (raw, other)] == [1, 1]


@pytest.mark.usefixtures("mpi4py")
def test_what_is_sent_goes_through_the_duplicate():
    raw = Intracomm(2)
    raw.Allgather = raw.allgather = None  # the caller's own messages are under way there
    an.SyncBatchNorm(3, comm=raw)(x)


def test_none_and_our_communicators_are_taken_as_they_are():
    assert as_communicator(None) is None
    assert as_communicator(SELF) is SELF
    assert an.SyncBatchNorm(3).comm is None
    assert an.FusedBatchNorm(3).comm is SELF


@pytest.mark.parametrize("what", [3, "world", Intracomm, [SELF]], ids=repr)
@pytest.mark.parametrize(
    "take",
    [
        as_communicator,
        lambda comm: an.SyncBatchNorm(3, comm=comm),
        lambda comm: an.FusedBatchNorm(3, comm=comm),
        lambda comm: setattr(an.SyncBatchNorm(3), "comm", comm),
        lambda comm: an.SyncBatchNorm.convert_sync_batchnorm(an.BatchNorm(3), comm),
    ],
    ids=["as_communicator", "SyncBatchNorm", "FusedBatchNorm", "assignment", "convert"],
)
def test_anything_else_is_a_type_error_that_says_what_it_is(take, what):
    with pytest.raises(TypeError, match=f"comm must be None, a communicator .* got {type(what).__name__}"):
        take(what)


@pytest.mark.parametrize("what", [None, 3, SELF, Intracomm], ids=repr)
def test_mpi_communicator_takes_mpi4pys_only(what):
    with pytest.raises(TypeError, match="MPICommunicator: comm must be an mpi4py intracommunicator, got"):
        MPICommunicator(what)


@pytest.mark.parametrize(
    "name", ["batch_norm", "batch_norm_forward", "batch_norm_add_relu", "batch_norm_add_relu_forward"]
)
@pytest.mark.parametrize("what", [Intracomm(2), 3, "world"], ids=lambda what: type(what).__name__)
def test_functions_take_a_communicator_only_and_name_the_wrapper(name, what):
    with pytest.raises(TypeError, match=r"comm must be None or a communicator.*distributed\.MPICommunicator\(comm\)"):
        getattr(an, name)(x, comm=what)
