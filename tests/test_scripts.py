"""tpu_scripts/, from an empty project to a deleted pod, with a cloud that is a directory (fake_cloud.sh)."""

import contextlib
import getpass
import importlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxup.experiments.config import load

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tpu_scripts"
VERBS = ("create", "setup", "launch", "logs", "watch", "fetch", "delete")
ENDS = 30  # seconds after which what hangs is ended


class Cloud:
    """The directory of the fake cloud, and the scripts called with it."""

    def __init__(self, directory):
        self.fake, self.settings = directory / "fake", directory / "settings.sh"
        (self.fake / "faults").mkdir(parents=True)
        programs = directory / "bin"
        programs.mkdir()
        for name in (
            "gcloud",
            "xpk",
            "kubectl",
            "sbatch",
            "git",
            "squeue",
            "srun",
            "scontrol",
            "python",
            "curl",
            "df",
            "python3",
            "uv",
        ):
            (programs / name).symlink_to(ROOT / "tests" / "fake_cloud.sh")
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}", "FAKE": str(self.fake), "SETTINGS": str(self.settings),
            "HOME": str(directory),
        }  # fmt: skip
        self.set(
            PROJECT="p", ZONE="us-east5-a", BUCKET="gs://runs", NAME="pod", TPU="v5p:2x2x2", POLL="0.2", RESTARTS="3"
        )

    def set(self, **values):
        """Settings as a user writes them, who edits the file."""
        text = self.settings.read_text() if self.settings.exists() else (SCRIPTS / "settings.sh").read_text()
        for name, value in values.items():
            text, count = re.subn(rf"^{name}=\S*", f"{name}={shlex.quote(value)}", text, flags=re.M)
            assert count == 1
        self.settings.write_text(text)

    def fault(self, name, text=""):
        (self.fake / "faults" / name).write_text(text)

    def mended(self, name):
        (self.fake / "faults" / name).unlink()

    def become(self, state):
        (self.fake / "qr").write_text(",".join([state, *(self.fake / "qr").read_text().split(",")[1:]]))

    @property
    def said(self):
        """The calls of gcloud, without those that only look."""
        calls = (self.fake / "said").read_text() if (self.fake / "said").exists() else ""
        return [line for line in calls.splitlines() if re.search(r"queued-resources (create|delete)", line)]

    @contextlib.contextmanager
    def started(self, verb, *flags):
        command = [SCRIPTS / f"{verb}.sh", *flags]
        with subprocess.Popen(
            command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True, cwd=self.fake.parent,
        ) as process:  # fmt: skip
            hangs = threading.Timer(ENDS, os.killpg, (process.pid, signal.SIGKILL))
            hangs.start()
            try:
                yield process
            finally:
                hangs.cancel()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def run(self, verb, *flags, code=0):
        """What it prints; with that exit code."""
        with self.started(verb, *flags) as process:
            out, _ = process.communicate()
        assert process.returncode == code, out
        return out

    def end(self):
        for pid in self.fake.glob("worker-*/jaxup/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What create.sh and setup.sh leave of a cloud."""
    cloud = Cloud(tmp_path_factory.mktemp("made"))
    cloud.run("create")
    cloud.run("setup")
    return cloud.fake


@pytest.fixture
def pod(cloud, made):
    """TPUs of two workers that are there, and ready."""
    shutil.rmtree(cloud.fake)
    shutil.copytree(made, cloud.fake, symlinks=True)
    return cloud


@contextlib.contextmanager
def ctrl_c(process):
    """Pressed, and once more if nothing has come of it in ten seconds: bash may lose one while it starts a process."""
    again = threading.Timer(10, os.killpg, (process.pid, signal.SIGINT))
    os.killpg(process.pid, signal.SIGINT)
    again.start()
    try:
        yield
    finally:
        again.cancel()


def until(process, pattern):
    """What a script prints, up to a line in which the pattern is."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError("".join(lines))


def test_shellcheck():
    files = [*sorted(SCRIPTS.glob("*.sh")), ROOT / "tests" / "fake_cloud.sh"]
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run(
        [command, "--exclude=SC1091,SC2034", *files],  # each without functions.sh: with it, it takes ten times as long
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_from_nothing_through_a_preemption_to_nothing(cloud, tmp_path):
    said = cloud.run("create")
    states = ("WAITING_FOR_RESOURCES", "PROVISIONING")
    assert said == "".join(f"create: pod is {state}\n" for state in states) + (
        "create: it is there: pod (v5p:2x2x2, 8 chips) is billed until delete.sh\n"
    )
    assert cloud.run("create").splitlines()[0] == "create: pod is ACTIVE already"
    assert "setup: all 2 workers are ready jaxup 0.1.0 jax 0.10.2\n" in cloud.run("setup")
    said = cloud.run("launch")
    assert said.splitlines()[0].startswith("launch: it fits; a step takes 25.3 s at least")
    assert "all 2 workers train into gs://runs/runs/tunguska" in said
    commands = [path.read_text() for path in sorted(cloud.fake.glob("worker-*/jaxup/command"))]
    assert len(commands) == 2
    pids = [path.read_text() for path in sorted(cloud.fake.glob("worker-*/jaxup/pid"))]
    assert "launch: it runs already on all 2 workers: runs since " in cloud.run("launch")
    assert pids == [path.read_text() for path in sorted(cloud.fake.glob("worker-*/jaxup/pid"))]
    assert "train healed: " in cloud.run("logs", "1")

    with cloud.started("watch") as watch:
        until(watch, r"^watch: training train healed: \d/320 steps")
        cloud.become("SUSPENDED")
        said = until(watch, r"^watch: training train healed: \d/320 steps")
        assert "\nwatch: restart 1 of at most 3: pod was preempted (it is SUSPENDED), 20" in f"\n{said}"
        assert "create: pod is SUSPENDED: what is left of it is deleted, and it is asked for anew\n" in said
        assert commands == [path.read_text() for path in sorted(cloud.fake.glob("worker-*/jaxup/command"))]
        (cloud.fake / "train").write_text("0")
        said = until(watch, "finished")
        assert said.endswith(
            "watch: finished: gs://runs/runs/tunguska/SUMMARY.md; fetch.sh brings it here. "
            "pod (v5p:2x2x2, 8 chips) is billed until delete.sh\n"
        )
        assert watch.wait(ENDS) == 0
    assert cloud.run("fetch") == "fetch: runs/tunguska has what gs://runs/runs/tunguska has\n"
    assert (tmp_path / "runs" / "tunguska" / "SUMMARY.md").exists()
    for _ in range(2):
        assert cloud.run("delete").startswith("delete: there is no pod in us-east5-a; what lies in gs://runs stays")
    assert [line.split()[4] for line in cloud.said] == ["create", "delete", "create", "delete"]
    assert not (cloud.fake / "qr").exists()


@pytest.mark.parametrize(
    ("fault", "settings", "line"),
    [
        ("", {"PROJECT": ""}, "PROJECT: is not set; it belongs in"),
        ("", {"ZONE": ""}, "ZONE: is not set; it belongs in"),
        ("", {"BUCKET": "runs"}, "BUCKET=runs: is not gs://NAME"),
        ("", {"TPU": "v5p:4x4x5"}, "TPU=v5p:4x4x5: no such slice; v5p has 2x2x1 2x2x2 "),
        ("", {"TPU": "v7:2x2"}, "TPU=v7:2x2: no such TPU; there are v4, v5e, v5p, v6e"),
        ("", {"TPU": "v5p:4x4x4"}, "TPU=v5p:4x4x4: ZONE=us-east5-a has no v5p-128, but v5p-8 v5p-16 v5p-32"),
        ("", {"CAPACITY": "cheap"}, "CAPACITY=cheap: is none of spot, on-demand and reservation"),
        ("old", {}, "gcloud: is of version 432, and 500 is needed; 'gcloud components update' brings it"),
        ("nobody", {}, "gcloud: nobody is logged in; 'gcloud auth login' does that"),
        ("project", {}, "PROJECT=p: (gcloud) (projects.describe) The project 'p' is not there, or not yours"),
        ("zone", {}, "ZONE=us-east5-a: has no TPUs; see https://"),
        ("bucket", {}, "BUCKET=gs://runs: (gcloud) (storage) gs://runs not found: 404."),
        ("read-only", {}, "BUCKET=gs://runs: cannot be written: (gcloud) (storage) 403: no storage.objects.create"),
        ("quota", {}, "TPU=v5p:2x2x2: PROJECT=p has no quota for it as CAPACITY=spot in ZONE=us-east5-a: "),
        ("fails", {}, "RESERVATION=: no capacity in the reservation; nothing is left that is billed"),
    ],
)
def test_a_mistake_is_a_line_before_anything_is_made(fault, settings, line, cloud):
    cloud.set(**settings)
    if fault:
        cloud.fault(fault, "no capacity in the reservation")
    said = cloud.run("create", code=2).splitlines()
    assert said[-1].startswith(f"create: {line}"), said
    assert len(said) == 1 or fault == "fails"
    assert not (cloud.fake / "qr").exists()
    asked = ["create"] if fault == "quota" else ["create", "delete"] if fault == "fails" else []
    assert [call.split()[4] for call in cloud.said] == asked


def test_what_others_made_is_left_alone(cloud):
    (cloud.fake / "qr").write_text("ACTIVE,bob,v5p-16")
    for verb in VERBS[:3] + VERBS[4:5] + VERBS[6:]:
        said = cloud.run(verb, code=2)
        assert said.startswith(f"{verb}: NAME=pod: there is one in us-east5-a that these scripts did not make for "), (
            said
        )
    (cloud.fake / "qr").write_text(f"ACTIVE,{getpass.getuser()},v5p-32")
    assert "NAME=pod: is a v5p-32, and TPU=v5p:2x2x2 a v5p-16; " in cloud.run("delete", code=2)
    assert cloud.said == []


def test_a_worker_that_is_not_right_is_named(pod):
    """It never comes up, its disk is full, or it has other packages; the others do not wait for it."""
    for verb in ("setup", "launch"):
        pod.fault("silent-1")
        said = pod.run(verb, code=1)
        assert f"{verb}: worker 1 did not answer\n{verb}: gcloud: (gcloud) [/usr/bin/ssh] exited" in said
        assert said.endswith(
            f"{verb}: so it is not done on all 2 workers; pod (v5p:2x2x2, 8 chips) is billed until delete.sh\n"
        )
        pod.mended("silent-1")
    pod.fault("full-1")
    assert "setup: worker 1: refused: its disk has 1 GiB free of the 40 that DISK asks for\n" in pod.run(
        "setup", code=1
    )
    assert "launch: worker 1: refused: its disk has 1 GiB free of the 5 " in pod.run("launch", code=1)
    assert "trains" not in pod.run("delete", "--dry-run")  # worker 0 was told to leave
    pod.mended("full-1")
    pod.fault("other-1")
    assert "setup: worker 1 is ready jaxup 0.1.0 jax 0.10.1, and worker 0 ready" in pod.run("setup", code=1)


def test_a_lock_on_the_tpus(pod):
    """Of a process that is dead it is removed; a living one is named, and left alone."""
    lock = pod.fake / "worker-1" / "lock"
    with open(lock, "w") as held:
        holder = subprocess.Popen(["sleep", "60"], stdout=held)
    try:
        said = pod.run("launch", code=1)
        assert (
            f"launch: worker 1: refused: its TPUs are held by process {holder.pid} (sleep 60 ); end it first\n" in said
        )
        assert holder.poll() is None
        assert lock.exists()
    finally:
        holder.kill()
        holder.wait()
    pod.run("launch")
    assert not lock.exists()
    assert f"removed {lock}, which a process that is dead had left\n" in pod.run("logs", "1")


def test_what_cannot_begin_is_said_by_the_worker(pod):
    pod.fault("large")
    said = pod.run("launch", code=2)
    assert said.startswith("launch: jaxup: --target=v5p:2x2x2: healed takes 99 GiB a chip, which has 95.74; pod (v5p")
    pod.mended("large")
    pod.fault("preflight")
    said = pod.run("launch", code=2)
    assert re.search(
        r"launch: worker \d ended with code 2: jaxup: preflight: process 1 \(w-1\) cannot write --workdir=gs://", said
    )
    assert "is billed until delete.sh\n" in said


def test_a_running_one_is_neither_deleted_nor_changed(pod):
    pod.run("launch")
    pod.set(RUN="another")
    assert "launch: worker 0: refused: it runs another command since " in pod.run("launch", code=1)
    pod.set(RUN="tunguska")
    assert "delete: pod trains (runs training" in pod.run("delete", code=2)
    assert "launch: its state is saved, and all workers have left; pod (" in pod.run("launch", "--stop")
    with pod.started("watch") as watch:
        until(watch, r"^watch: it was stopped by launch.sh --stop; launch.sh goes on with it. pod \(")
        assert watch.wait(ENDS) == 0
    pod.run("delete", "--running")


@pytest.mark.parametrize("code", [3, 5])
def test_what_ended_is_started_again_where_that_helps(code, pod):
    """A crash, bounded; a loss that is not finite is not."""
    pod.set(RESTARTS="1")
    pod.run("launch")
    (pod.fake / "train-1").write_text(str(code))
    (pod.fake / "train-0").write_text("5")  # the others leave with 5
    said = pod.run("watch", code=3 if code == 3 else 1)
    if code == 3:
        assert "watch: it ended with code 3, which a restart does not help: worker 1: jaxup: ended as" in said
        assert "restart 1" not in said
    else:
        assert re.search(
            r"^watch: restart 1 of at most 1: it ended with code 5: worker \d: jaxup: ended as", said, re.M
        )
        assert "restart 2" not in said
        assert "that was after 1 restarts, and RESTARTS allows no more; pod (v5p:2x2x2, 8 chips) is billed" in said


def test_ctrl_c_in_watch_leaves_the_training(pod):
    pod.run("launch")
    for _ in range(3):  # once in some hundred times bash dies of it before it comes to what is to be said
        with pod.started("watch") as watch:
            until(watch, "training")
            with ctrl_c(watch):
                said, _ = watch.communicate()
        if said:
            break
    assert said.endswith(
        "watch: not watching any more. The training goes on, but is not restarted; "
        "pod (v5p:2x2x2, 8 chips) is billed until delete.sh\n"
    )
    assert watch.returncode == 130
    assert "delete: pod trains" in pod.run("delete", code=2)
    with pod.started("watch") as watch:  # in the middle of a restart there is more to say
        pod.become("SUSPENDED")
        until(watch, "^create: pod is WAITING")
        with ctrl_c(watch):
            said, _ = watch.communicate()
        assert "create: not waiting any more. The request stays: once pod is there, it is billed; delete.sh" in said
        assert (
            "watch: not watching any more, in the middle of a restart: nothing trains, and what is there of pod" in said
        )
        assert watch.returncode == 130


def test_what_is_deleted_meanwhile_is_not_made_again(pod):
    pod.run("launch")
    with pod.started("watch") as watch:
        until(watch, "training")
        pod.run("delete", "--running")
        until(watch, r"^watch: NAME=pod: is not there, or not any more; create.sh makes it. Nothing is billed$")
        assert watch.wait(ENDS) == 2
    assert [call.split()[4] for call in pod.said] == ["create", "delete"]


def test_dry_runs_and_help(cloud):
    """Of the readme, too: what a newcomer types. Nothing is called."""
    cloud.set(TPU="v5p:4x4x4")
    for verb in VERBS:
        assert "Usage: " in cloud.run(verb, "--help")
        said = cloud.run(verb, "--dry-run")
        assert "\n+ gcloud " in f"\n{said}"
        assert f"{verb}: " not in said.replace(f"{verb} (dry run): ", "")
        assert "--bad: unknown flag; there are --dry-run --help" in cloud.run(verb, "--bad", code=2)
    assert not (cloud.fake / "said").exists()


def test_on_kubernetes(cloud):
    cloud.set(IMAGE="image:1", CAPACITY="reservation")
    assert cloud.run("gke", "create", code=2).startswith("gke: RESERVATION: xpk needs its name; it belongs in ")
    cloud.set(CAPACITY="spot")
    assert cloud.run("gke", "launch", code=1).startswith("gke: xpk cannot list the workloads of CLUSTER=pod: no clu")
    assert cloud.run("gke", "create") == "gke: pod (cluster of v5p:2x2x2, 8 chips) is billed until gke.sh delete\n"
    assert cloud.run("gke", "create").startswith("gke: pod is there already; pod (cluster")
    assert "trains into gs://runs/runs/tunguska; gke.sh watch looks at it\n" in cloud.run("gke", "launch")
    assert cloud.run("gke", "launch").startswith("gke: it is there already: ")
    job = (cloud.fake / "workload").read_text().split()[0]
    states = ["Admitted  Admitted by ClusterQueue", "Evicted  Preempted", "Finished  JobSet finished successfully"]
    (cloud.fake / "next").write_text("\n".join([*states, ""]))
    said = cloud.run("gke", "watch").splitlines()
    assert said[:-1] == [f"gke: {job}  2026-11-26  {state}" for state in states]
    assert said[-1].startswith("gke: finished: gs://runs/runs/tunguska/SUMMARY.md; fetch.sh brings it here. pod (clus")
    (cloud.fake / "next").write_text("Finished  JobSet failed due to reaching max number of restarts\n")
    assert "gke: it failed, and was started again up to 3 times; pod (" in cloud.run("gke", "watch", code=1)
    assert cloud.run("gke", "stop").startswith(f"gke: {job} is out of the cluster; pod (")
    assert cloud.run("gke", "delete").startswith("gke: there is no cluster pod; what lies in gs://runs stays")
    (cloud.fake / "cluster").write_text("pod bob")
    assert "CLUSTER=pod: was not made by these scripts for " in cloud.run("gke", "delete", code=2)
    assert "what to do is one of create, launch, " in cloud.run("gke", code=2)
    cloud.set(IMAGE="")
    assert "IMAGE: is not set; it belongs in" in cloud.run("gke", "launch", code=2)


@pytest.mark.parametrize(("ends", "code", "said"), [
    ("0", 0, "slurm: finished: runs/tunguska/SUMMARY.md\n"),
    ("3", 3, "slurm: it ended with code 3, which a restart does not help\n"),
    ("143", 143, "slurm: it was stopped, with its state saved; slurm.sh goes on with it\n"),
    ("5", 0, "slurm: restart 3 of at most 3: it ended with code 5\n"),
    ("", 0, "slurm: restart 3 of at most 3: its time was over\n"),
    ("preflight", 2, "slurm: the preflight ended with code 2\n"),
])  # fmt: skip
def test_a_job_of_slurm(ends, code, said, cloud):
    cloud.set(BUCKET="")
    assert "slurm: its log is pod-JOB.log here" in cloud.run("slurm", "--partition=gpu")
    assert "--partition=gpu" in (cloud.fake / "job").read_text()
    assert cloud.run("slurm") == "slurm: it is there already: job 7 RUNNING\n"
    if ends == "preflight":
        cloud.fault("preflight")
    elif ends:
        (cloud.fake / "train").write_text(ends)
    cloud.environment |= {"SLURM_JOB_ID": "7", "JAXUP_SCRIPTS": str(SCRIPTS), "SLURM_RESTART_COUNT": "2", "WORKER": "0"}
    with cloud.started("slurm") as job:
        if not ends:
            until(job, "1/320 steps")
            job.send_signal(signal.SIGUSR1)
        out, _ = job.communicate()
    assert job.returncode == code, out
    assert out.endswith(said)
    assert (cloud.fake / "requeued").exists() == ("slurm: restart" in said)


README = SCRIPTS / "README.md"


def chip_hours():
    """The table of the readme: seconds a step at least x steps x chips, from the table of docs/pods.md."""
    lines = ["| configuration | chips | for | s a step | chip-hours, at least |", "|---|---|---|--:|--:|"]
    table = (ROOT / "docs" / "pods.md").read_text().partition("| configuration | chips |")[2].partition("\n\n")[0]
    for name, chips, *cells in ([cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]):
        if "does not fit" in " ".join(cells):
            continue
        file = name.split("`")[1]
        config = load(file)
        if config.experiment == "heal":
            work, steps = "100 million tokens", 100e6 / (config.batch_size * config.data.seq_len)
        else:
            steps = config.steps or math.ceil(
                config.epochs * config.data.tokens / (config.batch_size * config.data.seq_len)
            )
            work = f"{steps:,.0f} steps"
        seconds = float(cells[6])
        hours = seconds * steps * math.prod(map(int, chips.partition(":")[2].split("x"))) / 3600
        lines.append(f"| {name} | {chips} | {work} | {seconds:.3g} | {float(f'{hours:.2g}'):,g} |")
    return "\n".join(lines)


def test_chip_hours_of_the_readme():
    """`python tests/test_scripts.py` writes them."""
    said = f"<!-- chip-hours -->\n\n{chip_hours()}\n\n<!-- end -->" in README.read_text()
    assert said, "`python tests/test_scripts.py` writes what docs/pods.md has now"


def test_commands_of_the_readme(cloud):
    """What a newcomer types, as dry runs; commands of jaxup are those of other pages, which run elsewhere."""
    cloud.set(TPU="v5p:4x4x4", IMAGE="image:1")
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", README.read_text(), re.M | re.S))
    commands = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    scripts = [words for words in commands if words[0].startswith("tpu_scripts/")]
    assert {words[0] for words in scripts} >= {f"tpu_scripts/{verb}.sh" for verb in VERBS}
    for script, *flags in scripts:
        assert "(dry run): " in cloud.run(Path(script).stem, *flags, "--dry-run") or "logs" in script
    for words in commands:
        if words[:2] == ["python", "-m"]:
            importlib.import_module(words[2]).parse_args(words[2:])
    assert not (cloud.fake / "said").exists()


if __name__ == "__main__":
    text = README.read_text()
    old = text.partition("<!-- chip-hours -->")[2].partition("<!-- end -->")[0]
    README.write_text(text.replace(f"<!-- chip-hours -->{old}", f"<!-- chip-hours -->\n\n{chip_hours()}\n\n"))
