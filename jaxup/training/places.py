"""Where the processes of a run meet, and how many they are: what whoever started them left in the environment.

It is read without jax, whose import takes longer than to notice that a process is missing. What is found is what
`jax.distributed.initialize` would find (jax/_src/clusters), but that a run of one process finds nothing, that Open MPI
from version 5 on is known, and that a process takes its share of a machine's GPUs, not one.
"""

from __future__ import annotations

import glob
import os
import re
import socket
import zlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple

from jaxup.errors import UserError

# What these say goes before what is found; the rest is found.
ADDRESS, TOTAL, RANK = GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TPU_PORT = 8482  # as jax has it


class Place(NamedTuple):
    """Where the processes meet, how many they are and which this is; without an address jax finds all of it out.

    `devices` are the GPUs that this process takes of those it sees, None for all. `names`: what said so, for messages.
    """

    address: str = ""
    total: int = 0
    rank: int = 0
    devices: tuple[int, ...] | None = None
    names: tuple[str, ...] = GIVEN


class _Found(NamedTuple):
    """What a launcher says; what it does not is empty."""

    address: str
    total: str
    rank: str
    names: tuple[str, ...]
    here: int = 1  # of its processes on this machine, of which this is
    local: int = 0


def place(env: Mapping[str, str] = os.environ) -> Place | None:
    """What the environment says, None of one process only; UserError if it makes no sense."""
    given = [env.get(name, "") for name in GIVEN]
    if given[1] == "1":
        return None
    found = next((found for read in (_open_mpi, _slurm, _tpu, _others) if (found := read(env))), None)
    if not any(given[:2]):
        if found is None or found.total == "1":
            return None
        if not found.total and find_spec("kubernetes"):
            return Place()
    found = found or _Found("", "", "", GIVEN)
    address, *numbers = (own or other for own, other in zip(given, found[:3], strict=True))
    where, *whose = (name if own else other for own, name, other in zip(given, GIVEN, found.names, strict=True))
    said = ", ".join(f"{name}={number}" for name, number in zip(whose, numbers, strict=True))
    if not address:
        hint = f"set {ADDRESS}=HOST:PORT of process 0 for all of them, or {TOTAL}=1 for runs of their own"
        raise UserError(f"one of several processes ({said}), and nothing says where they meet", hint=hint)
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"{where} says where they meet, which takes two numbers more: {said}")
    total, rank = map(int, numbers)
    if rank >= total:
        raise UserError(f"{said}: each process has a number of its own, from 0 on and below theirs")
    if not address.rpartition(":")[2].isdecimal():
        raise UserError(f"{where}={address} is not HOST:PORT")
    return None if total == 1 else Place(address, total, rank, _share(env, found), (where, *whose))


def apart(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the processes of a launcher can compute each by itself: the machines of a slice of TPUs cannot."""
    return _tpu(env) is None


def share(env: Mapping[str, str] = os.environ) -> tuple[int, ...] | None:
    """The GPUs that this process takes, where each computes by itself, of those that it sees; None for all."""
    if given := env.get("JAX_LOCAL_DEVICE_IDS"):
        return tuple(_ints(*given.split(",")))
    found = next((found for read in (_open_mpi, _slurm) if (found := read(env))), None)
    return None if found is None else _share(env, found)


def _open_mpi(env: Mapping[str, str]) -> _Found | None:
    """mpirun's. Its address is that of mpirun, beside which process 0 is; from version 5 on there is none."""
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    total, here = (env.get(f"OMPI_COMM_WORLD_{name}SIZE", "") for name in ("", "LOCAL_"))
    rank, local = (env.get(f"OMPI_COMM_WORLD_{name}RANK", "") for name in ("", "LOCAL_"))
    # 15315.0;tcp://10.96.0.1,10.148.0.1:34911; or 15315.0;tcp6://[fe80::1,2620:10d::2]:43370
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    host = re.search(r"tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d+$)", uri)
    name = "127.0.0.1" if here == total else host[1] if host else ""
    if name:
        name = f"[{name}]" if ":" in name else name
        name += f":{_port(env, uri.partition(';')[0] or env.get('PMIX_NAMESPACE', ''))}"
    names = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    return _Found(name, total, rank, names, *_ints(here or "1", local or "0"))


def _slurm(env: Mapping[str, str]) -> _Found | None:
    """srun's. A script of sbatch's, and a shell of salloc's, are no step and have no list of nodes."""
    if not all(name in env for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")):
        return None
    total = "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    # node001; node001,other; node[001-015],other; node[001,007-015]-ib
    first = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\]([^,\[]*))?", env["SLURM_STEP_NODELIST"])
    host = "".join(filter(None, first.groups())) if first else ""
    port = _port(env, f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID', '')}")
    tasks = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))  # 2(x3),1
    counts = [int(count) for count, times in tasks for _ in range(int(times or 1))]
    node, local = _ints(env.get("SLURM_NODEID", "0"), env.get("SLURM_LOCALID", "0"))
    here = counts[node] if node < len(counts) else 1
    names = ("SLURM_STEP_NODELIST", total, "SLURM_PROCID")
    return _Found(f"{host}:{port}", env.get(total, ""), env["SLURM_PROCID"], names, here, local)


def _tpu(env: Mapping[str, str]) -> _Found | None:
    """A slice's hosts, or several slices': from the environment (GKE), or Google's server of metadata (TPU VMs)."""
    if "tpu" not in (env.get("JAX_PLATFORMS") or "tpu").split(","):
        return None
    name = "TPU_PROCESS_ADDRESSES" if env.get("TPU_PROCESS_ADDRESSES") else "TPU_WORKER_HOSTNAMES"
    hosts, worker, more = env.get(name, ""), env.get("TPU_WORKER_ID", ""), ""
    if not hosts and "TPU_SKIP_MDS_QUERY" not in env and _has_tpu():
        name, worker = "worker-network-endpoints", _metadata(env, "agent-worker-number")
        # Names; or of older machines NAME:ID:ADDRESS.
        hosts = ",".join(host.split(":")[-1] for host in _metadata(env, name).split(","))
        more = _metadata(env, "tpu-env")
    if not hosts:
        return None

    def of_slices(key: str) -> str:
        return env.get(key) or next(iter(re.findall(rf"^{key}: *'?([^'\n]*)", more, re.MULTILINE)), "")

    slices, index = _ints(of_slices("MEGASCALE_NUM_SLICES") or "1", of_slices("MEGASCALE_SLICE_ID") or "0")
    each = len(hosts.split(","))
    if worker.isdecimal():
        worker = str(int(worker) + index * each)
    first = (of_slices("MEGASCALE_COORDINATOR_ADDRESS") or hosts.split(",")[0]).split(":")[0]
    port = env.get("JAX_COORDINATOR_PORT") or _TPU_PORT
    names = (name, "MEGASCALE_NUM_SLICES" if slices > 1 else name, "TPU_WORKER_ID")
    return _Found(f"{first}:{port}", str(slices * each), worker, names)


def _others(env: Mapping[str, str]) -> _Found | None:
    """Of MPICH's mpiexec and torchrun nothing is known of where the processes meet, of an indexed job of Kubernetes not
    how many they are, unless jax asks: without what is missing each would be a run of its own, in the same place."""
    for total, rank in (("PMI_SIZE", "PMI_RANK"), ("WORLD_SIZE", "RANK")):
        if total in env and rank in env:
            return _Found("", env[total], env[rank], (ADDRESS, total, rank))
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        index = env["JOB_COMPLETION_INDEX"]
        # JOB-3.SUBDOMAIN.NAMESPACE.svc.cluster.local, where the job has a headless service; JOB-3 alone where not.
        job, found, domain = socket.getfqdn().partition(f"-{index}.")
        if found and "." not in job:
            names = ("this pod's name", TOTAL, "JOB_COMPLETION_INDEX")
            return _Found(f"{job}-0.{domain}:{_port(env, job)}", "", index, names)
        return _Found("", "", index, (ADDRESS, TOTAL, "JOB_COMPLETION_INDEX"))
    return None


def _share(env: Mapping[str, str], found: _Found) -> tuple[int, ...] | None:
    """An even share of the GPUs here, in the order of the processes. Who has less than one has been given it already,
    and who was started with some for each task has those."""
    seen = env.get("CUDA_VISIBLE_DEVICES")
    count = len(glob.glob("/dev/nvidia[0-9]*") if seen is None else seen.split(","))
    if env.get("JAX_LOCAL_DEVICE_IDS") or found.here < 2 or env.get("SLURM_GPUS_PER_TASK") or count < found.here:
        return None
    each = count // found.here
    return tuple(range(found.local * each, (found.local + 1) * each))


def _port(env: Mapping[str, str], job: str) -> str:
    """One above those that systems give to whoever asks for any; jobs on one machine have different ones."""
    return env.get("JAX_COORDINATOR_PORT") or str(61440 + zlib.crc32(job.encode()) % 4096)


def _ints(*texts: str) -> list[int]:
    if wrong := [text for text in texts if not text.isdecimal()]:
        raise UserError(f"the launcher's environment has {wrong[0]!r} where a number should be")
    return [int(text) for text in texts]


def _has_tpu() -> bool:
    return bool(find_spec("libtpu") and (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")))


def _metadata(env: Mapping[str, str], key: str) -> str:
    """An attribute of this machine, "" where there is none."""
    import urllib.request

    host = env.get("GCE_METADATA_IP", "metadata.google.internal")
    url, headers = f"http://{host}/computeMetadata/v1/instance/attributes/{key}", {"Metadata-Flavor": "Google"}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return answer.read(2**20).decode(errors="replace").strip()
    except OSError:
        return ""
