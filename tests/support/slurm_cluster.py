"""SLURM on this machine, in a folder of its own: munge, a controller and two nodes, n1 and n2, for a test.

By hand: `python tests/launch/slurm_cluster.py FOLDER` starts it, says how to reach it, and stops it on Ctrl-C.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SECONDS = 30  # until all of it answers

CONFIG = """\
ClusterName=here
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPort={controller}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=5,bf_interval=5
ReturnToService=2
JobRequeue=1
KillWait=30
MpiDefault=none
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=1000
PartitionName=cpu Nodes=n1,n2 Default=YES State=UP
"""


def missing() -> list[str]:
    """The programs that are not installed (Debian: slurm-wlm, munge)."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Within: it runs; the environment in which SLURM's commands reach it. Raises RuntimeError where it does not."""
    ports = {name: _free_port() for name in ("controller", "n1", "n2")}
    for name in ("state", "log", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, user=getpass.getuser(), **ports))
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    with ExitStack() as stack:

        def start(name: str, *command: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((folder / "log" / name).open("wb"))
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(_stop, process)
            return process

        start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
        _until((folder / "munge.socket").exists, folder)
        start("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            start(node, "slurmd", "-D", "-N", node)
        _until(lambda: _idle(environment) == 2, folder)
        try:
            yield environment
        finally:
            # Its jobs are its own: none outlives it.
            for words in (["--full", "--signal=KILL"], []):
                user = f"--user={getpass.getuser()}"
                subprocess.run(["scancel", *words, user], env=environment, capture_output=True, check=False)


def _idle(environment: dict[str, str]) -> int:
    said = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True, check=False
    )
    return said.stdout.split().count("idle")


def _until(ready: Callable[[], object], folder: Path) -> None:
    end = time.monotonic() + SECONDS
    while not ready():
        if time.monotonic() > end:
            last = "; ".join(f"{log.name}: {log.read_text()[-300:]}" for log in sorted((folder / "log").iterdir()))
            raise RuntimeError(f"SLURM did not start in {SECONDS} s: {last}")
        time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _path() -> str:
    # Where Debian keeps daemons, which an ordinary user's PATH leaves out.
    return os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main() -> None:
    ends = {signal.SIGINT, signal.SIGTERM}
    with cluster(Path(sys.argv[1]).resolve()) as environment:
        # Only now: what is started before would inherit it.
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        print(f"export SLURM_CONF={environment['SLURM_CONF']}", flush=True)
        signal.sigwait(ends)


if __name__ == "__main__":
    main()
