"""Two "hosts" on one machine: network namespaces joined by a cable, each with a host name of its own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

# What mpiexec starts in the place of ssh: rsh [options] HOST COMMAND...
RSH = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1
shift
export TMPDIR="{folder}/$host" HOST="$host"
exec ip netns exec "$host" unshare --uts --mount sh -c '
    hostname "$HOST" && mount --bind "{folder}/hosts" /etc/hosts && eval "$*"' sh "$@"
"""
# How often a host repeats what nobody confirms, from 0.2 s on and twice as long each time: some 25 s. By default it is
# 15 times, 15 minutes; so long a launcher may wait for a host that it can't reach, after the ranks have ended.
RETRIES = 6
CABLE = "cable"  # the network interface of both hosts
PROGRAMS = ("ip", "unshare", "hostname", "mount")


class NotPossibleHereError(Exception):
    """The machine does not let us make namespaces; the text says why."""


class TwoHosts:
    """`with TwoHosts() as hosts`: hosts.names are two hosts that reach each other, and nothing else, over TCP."""

    def __enter__(self):
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing or os.geteuid() != 0:
            raise NotPossibleHereError(f"needs root and {', '.join(PROGRAMS)}; missing: {missing or 'root'}")
        token = secrets.token_hex(4)
        self.names = [f"an-{token}-{letter}" for letter in "ab"]
        # short, for sockets lie in it, whose paths may have some 100 characters
        self.folder = Path(tempfile.mkdtemp(prefix="an"))
        self.rsh = self.folder / "rsh"
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self.__exit__()
            raise NotPossibleHereError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self):
        a, b = self.names
        for name in self.names:
            _ip("netns", "add", name)
            (self.folder / name).mkdir()
        _ip("link", "add", CABLE, "netns", a, "type", "veth", "peer", "name", CABLE, "netns", b)
        for number, name in enumerate(self.names, start=1):
            _ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                _ip("-n", name, "link", "set", device, "up")
            _ip("netns", "exec", name, "sh", "-c", f"echo {RETRIES} >/proc/sys/net/ipv4/tcp_retries2")
        if not until(lambda: all(self._is_up(name) for name in self.names), 10):
            raise NotPossibleHereError("the cable between the hosts does not come up")
        hosts = "".join(f"10.99.0.{number} {name}\n" for number, name in enumerate(self.names, start=1))
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
        self.rsh.write_text(RSH.format(folder=self.folder))
        self.rsh.chmod(0o755)
        subprocess.run([str(self.rsh), a, "true"], check=True, capture_output=True, text=True)

    def __exit__(self, *exception):
        for name in self.names:
            for pid in self.processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
                _ip("netns", "del", name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self, name):
        """The ids of the processes on a host."""
        done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    def received(self, name):
        """Bytes that have come to a host."""
        return self._link(name)["stats64"]["rx"]["bytes"]

    def _is_up(self, name):
        return self._link(name)["operstate"] == "UP"

    def _link(self, name):
        (link,) = json.loads(_ip("-n", name, "-j", "-s", "link", "show", "dev", CABLE))
        return link

    def cut(self):
        _ip("-n", self.names[0], "link", "set", CABLE, "down")

    def launch(self, mpiexec, is_open_mpi, environment, log, *program):
        """Start mpiexec on the first host, with two ranks on each."""
        a, b = self.names
        if is_open_mpi:
            options = ["--prtemca", "plm_ssh_agent", str(self.rsh), "--host", f"{a}:2,{b}:2"]
            options += [
                "--map-by",
                "ppr:2:node:oversubscribe",
                "--mca",
                "btl",
                "tcp,self,sm",
                "--mca",
                "btl_tcp_if_include",
                CABLE,
                "--mca",
                "pml",
                "ob1",
            ]
        else:
            options = ["-launcher", "ssh", "-launcher-exec", str(self.rsh), "-hosts", f"{a},{b}", "-ppn", "2"]
            environment = environment | {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": CABLE}
        return subprocess.Popen(
            [str(self.rsh), a, "exec", mpiexec, *options, "-n", "4", *program],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout


def until(condition, seconds):
    """Whether `condition()` came true within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
