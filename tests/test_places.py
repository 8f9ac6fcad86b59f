"""What the environment says of the processes of a run, as each launcher leaves it."""

import http.server
import re
import socket
import sys
import threading
import types

import pytest

from jaxup.errors import UserError
from jaxup.training import places
from jaxup.training.places import Place, place

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLURM = {
    "SLURM_JOB_ID": "81234", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[007,010-012],big1", "SLURM_NTASKS": "9",
    "SLURM_STEP_NUM_TASKS": "9", "SLURM_PROCID": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4),1",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
GKE = {"TPU_WORKER_HOSTNAMES": "a.tpu,b.tpu,c.tpu,d.tpu", "TPU_WORKER_ID": "2"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.job:8080"}
INDEXED = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.fixture(autouse=True)
def named(monkeypatch):
    """named(name): what this machine is called; without a headless service a pod is called by its host's name alone."""
    names = ["train-1"]
    monkeypatch.setattr(socket, "getfqdn", lambda *_: names[-1])
    return names.append


@pytest.mark.parametrize(
    ("env", "address", "total", "rank"),
    [
        (EXPLICIT, "host:1234", 2, 1),
        (SLURM, "node007:*", 9, 8),
        ({**SLURM, "SLURM_STEP_NODELIST": "login,node[1-2]", "JAX_COORDINATOR_PORT": "999"}, "login:999", 9, 8),
        ({**SLURM, "SLURM_STEP_NODELIST": "node[001-015]-ib"}, "node001-ib:*", 9, 8),
        # What is explicit goes before what is found, and the rest is found.
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "other:7"}, "other:7", 9, 8),
        ({**SLURM, **EXPLICIT}, "host:1234", 2, 1),
        (OPEN_MPI, "10.96.0.1:*", 8, 5),
        ({**SLURM, **OPEN_MPI}, "10.96.0.1:*", 8, 5),  # mpirun in a job of Slurm's
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fe80::1,2620:10d::2]:43"}, "[fe80::1]:*", 8, 5),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.96.0.1:34911"}, "10.96.0.1:*", 8, 5),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_MCA_orte_hnp_uri": "",
          "PMIX_NAMESPACE": "prterun-a-7@1"}, "127.0.0.1:*", 8, 5),
        (GKE, "a.tpu:8482", 4, 2),
        ({**GKE, **SLICES}, "job-0-0.job:8482", 8, 6),
        ({"TPU_PROCESS_ADDRESSES": "localhost:8476,localhost:8477", "TPU_WORKER_ID": "0"}, "localhost:8482", 2, 0),
        ({**INDEXED, "JAX_COORDINATOR_ADDRESS": "job-0.job:1", "JAX_NUM_PROCESSES": "4"}, "job-0.job:1", 4, 1),
        ({"PMI_SIZE": "4", "PMI_RANK": "3", "JAX_COORDINATOR_ADDRESS": "host:1"}, "host:1", 4, 3),
        ({"WORLD_SIZE": "4", "RANK": "3", "JAX_COORDINATOR_ADDRESS": "host:1"}, "host:1", 4, 3),
    ],
)  # fmt: skip
def test_what_launchers_say(env, address, total, rank):
    found = place(env)
    assert (found.total, found.rank) == (total, rank)
    assert re.fullmatch(re.escape(address).replace(r"\*", r"(6[1-5]\d{3})"), found.address)
    assert int(found.address.rpartition(":")[2]) < 2**16


@pytest.mark.parametrize(
    "env",
    [
        {}, {"JAX_PROCESS_ID": "1"}, {**EXPLICIT, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {**SLURM, "JAX_NUM_PROCESSES": "1"}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"},  # the script of sbatch
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"},
        {**GKE, "JAX_PLATFORMS": "cpu"},
        {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "4"}, {**INDEXED, "JAX_NUM_PROCESSES": "1"},
        {"JOB_COMPLETION_INDEX": "1"},
    ],
)  # fmt: skip
def test_a_run_of_one_process_finds_nothing(env):
    assert place(env) is None


def test_steps_of_one_job_and_jobs_on_one_machine_do_not_meet():
    ports = {place({**SLURM, "SLURM_STEP_ID": str(step)}).address for step in range(3)}
    assert len(ports | {place({**SLURM, "SLURM_JOB_ID": "81235"}).address}) == 4


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({**EXPLICIT, "JAX_PROCESS_ID": ""}, "JAX_COORDINATOR_ADDRESS says where they meet, which takes two numbers "
         "more: JAX_NUM_PROCESSES=2, JAX_PROCESS_ID="),
        ({**EXPLICIT, "JAX_PROCESS_ID": "-1"}, "takes two numbers more: JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=-1"),
        ({**EXPLICIT, "JAX_PROCESS_ID": "2"}, "JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=2: each process has a number"),
        ({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS=host is not HOST:PORT"),
        ({"JAX_NUM_PROCESSES": "4"}, "one of several processes (JAX_NUM_PROCESSES=4, JAX_PROCESS_ID=), and nothing "
         "says where they meet; set JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0 for all of them, or JAX_NUM_"),
        ({**SLURM, "SLURM_PROCID": "9"}, "SLURM_STEP_NUM_TASKS=9, SLURM_PROCID=9: each process has a number"),
        ({**SLURM, "SLURM_LOCALID": "x"}, "the launcher's environment has 'x' where a number should be"),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": ""}, "one of several processes (OMPI_COMM_WORLD_SIZE=8, "
         "OMPI_COMM_WORLD_RANK=5), and nothing says where"),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, "one of several processes (PMI_SIZE=4, PMI_RANK=3), and nothing says"),
        ({"WORLD_SIZE": "4", "RANK": "3"}, "one of several processes (WORLD_SIZE=4, RANK=3), and nothing says"),
        (INDEXED, "(JAX_NUM_PROCESSES=, JOB_COMPLETION_INDEX=1), and nothing says where they meet"),
        ({**INDEXED, "JAX_COORDINATOR_ADDRESS": "h:1"}, "numbers more: JAX_NUM_PROCESSES=, JOB_COMPLETION_INDEX=1"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "two numbers more: TPU_WORKER_HOSTNAMES=2, TPU_WORKER_ID="),
        ({**GKE, **SLICES, "MEGASCALE_SLICE_ID": "2"}, "MEGASCALE_NUM_SLICES=8, TPU_WORKER_ID=10: each process has a"),
    ],
)  # fmt: skip
def test_an_environment_that_makes_no_sense_is_one_line(env, said, monkeypatch):
    monkeypatch.setattr(places, "find_spec", lambda name: None)  # no client of Kubernetes
    with pytest.raises(UserError, match=re.escape(said)) as error:
        place(env)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("train-1.pods.default.svc.cluster.local", "train-0.pods.default.svc.cluster.local"),
        ("set-workers-0-1.set.ns.svc.cluster.local", "set-workers-0-0.set.ns.svc.cluster.local"),  # of a JobSet
        ("train-1.pods", "train-0.pods"),
    ],
)
def test_a_pod_knows_the_first_by_its_own_name(name, address, named):
    named(name)
    found = place({**INDEXED, "JAX_NUM_PROCESSES": "4", "JAX_COORDINATOR_PORT": "1234"})
    assert (found.address, found.total, found.rank) == (f"{address}:1234", 4, 1)
    with pytest.raises(UserError, match=r"^this pod's name says where they meet, which takes two numbers more: JAX_"):
        place(INDEXED)
    for other in ("train-1", "train-11.pods", "node.zone.internal"):  # the last where it has its machine's network
        named(other)
        with pytest.raises(UserError, match="nothing says where they meet"):
            place({**INDEXED, "JAX_NUM_PROCESSES": "4"})


def test_jax_asks_kubernetes_where_it_can(monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", types.SimpleNamespace(__spec__=object()))
    assert place(INDEXED) == Place()


@pytest.mark.parametrize(
    ("env", "devices"),
    [
        ({**SLURM, "SLURM_NODEID": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),  # one task there takes all
        ({**SLURM, "SLURM_NODEID": "0", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, (2, 3)),
        ({**SLURM, "SLURM_NODEID": "0", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "1"}, None),
        ({**SLURM, "SLURM_NODEID": "0", "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, None),
        ({**SLURM, "SLURM_NODEID": "0", "CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "1"}, None),
        ({**OPEN_MPI, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (1,)),
        (OPEN_MPI, None),  # no GPUs
        (EXPLICIT, None),
    ],
)
def test_processes_of_one_machine_share_its_gpus(env, devices, monkeypatch):
    monkeypatch.setattr(places.glob, "glob", lambda pattern: [])
    assert place(env).devices == devices
    if env is OPEN_MPI:
        monkeypatch.setattr(places.glob, "glob", lambda pattern: [f"/dev/nvidia{n}" for n in range(8)])
        assert place(env).devices == (2, 3)


def test_a_tpu_machine_asks_the_server_of_metadata(monkeypatch):
    attributes = {"agent-worker-number": "3", "worker-network-endpoints": "w0:1:10.0.0.2,w1:2:10.0.0.3,,"[:-2]}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rpartition("/")[2])
            self.send_response(404 if value is None or self.headers["Metadata-Flavor"] != "Google" else 200)
            self.end_headers()
            self.wfile.write((value or "none").encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(places, "_has_tpu", lambda: True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}", "http_proxy": "http://127.0.0.1:1"}
        with pytest.raises(UserError, match="worker-network-endpoints=2, TPU_WORKER_ID=3: each process"):
            place(env)
        attributes["agent-worker-number"] = "1"
        assert place(env)[:3] == ("10.0.0.2:8482", 2, 1)
        attributes["worker-network-endpoints"] = "w0,w1"
        attributes["tpu-env"] = "ZONE: 'x'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'"
        assert place(env)[:3] == ("w0:8482", 4, 3)
        attributes.clear()
        attributes["worker-network-endpoints"] = "w0"
        attributes["agent-worker-number"] = "0"
        assert place(env) is None
        assert place({**env, "TPU_SKIP_MDS_QUERY": "1"}) is None
        server.shutdown()
    assert place(env) is None  # a machine with TPUs and no such server
