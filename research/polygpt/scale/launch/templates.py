"""Files for managed clusters: a JobSet for GKE, with the xpk command of the same run, and a SkyPilot task.

Sources: GKE's pages on TPU slices and Multislice (cloud.google.com/kubernetes-engine/docs/concepts/tpus), xpk
(github.com/AI-Hypercomputer/xpk) and SkyPilot's YAML reference (docs.skypilot.co/en/latest/reference/yaml-spec.html).
"""

import dataclasses
import math
import re
import shlex
from collections.abc import Sequence

import yaml

from polygpt import topology
from polygpt.errors import UserError
from polygpt.runtime.processes import COORDINATOR, PROCESS, PROCESSES
from polygpt.spec import counted


@dataclasses.dataclass(frozen=True)
class Generation:
    """Names of a TPU generation on managed clusters.

    Attributes:
        gke: accelerator label of GKE nodes.
        prefix: slices are named prefix-N; `topology.UNITS_PER_CHIP` defines what N counts.
        runtime: runtime version of its TPU VMs, for SkyPilot; None if SkyPilot does not offer them.
    """

    gke: str
    prefix: str
    runtime: str | None


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "v4", "tpu-ubuntu2204-base"),
    "v5e": Generation("tpu-v5-lite-podslice", "v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": Generation("tpu-v5p-slice", "v5p", "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", "v6e", "v2-alpha-tpuv6e"),
    "tpu7x": Generation("tpu7x", "tpu7x", None),
}
CHIPS_PER_HOST = 4
"""For the machine types ct4p-hightpu-4t, ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t and tpu7x-standard-4t."""
PORT = 61499
"""Port of the coordinator, on clusters where a job has its machines to itself."""
GRACE = 300
"""Seconds that a pod has between SIGTERM and SIGKILL, to save a checkpoint."""
RESTARTS = 20
"""Restarts after failures, by default. Each time the run resumes."""
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "JAX_COMPILATION_CACHE_DIR": "/runs/compiled"}
"""Environment variables of every process."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice by its name, "v5e:16x16"."""

    name: str

    def __post_init__(self):
        topology.require(self.name)

    @property
    def sides(self) -> list[int]:
        return [int(n) for n in self.name.partition(":")[2].split("x")]

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    @property
    def hosts(self) -> int:
        return max(1, self.chips // CHIPS_PER_HOST)

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.name.partition(":")[0]]

    @property
    def type(self) -> str:
        """Its name in Google's tools, "v5litepod-256"."""
        return f"{self.generation.prefix}-{self.chips * topology.UNITS_PER_CHIP[self.name.partition(':')[0]]}"


def gke(
    command: Sequence[str],
    slice: Slice,
    slices: int = 1,
    name: str = "polygpt",
    image: str = "REGION-docker.pkg.dev/PROJECT/REPOSITORY/polygpt:latest",
    bucket: str = "BUCKET",
    cluster: str = "CLUSTER",
    project: str = "PROJECT",
    zone: str = "ZONE",
    restarts: int = RESTARTS,
) -> str:
    """A JobSet manifest, with the xpk command that submits the same run in its comments.

    Args:
        command: words after `polygpt`.
        slice: the slice; one process runs on each of its hosts.
        slices: number of such slices.
        name: name of the job.
        image: container image.
        bucket: bucket for run folders, mounted at /runs.
        cluster, project, zone: where the job runs, for xpk.
        restarts: number of restarts after failures; each time the run resumes.

    Raises:
        UserError: `name` is not a valid name of a Kubernetes object.
    """
    _require_name(name)
    words = with_workdir(command, f"/runs/{name}")
    text = " ".join(map(quote_on_one_line, ["polygpt", *words]))
    size = f"{counted(slice.chips * slices, 'chip')}, {counted(slice.hosts * slices, 'host')}"
    xpk = [
        f"xpk workload create --cluster={cluster} --project={project} --zone={zone} --workload={name}",
        f"--tpu-type={slice.type} --num-slices={slices} --docker-image={image} --max-restarts={restarts}",
        f"--command={shlex.quote(text)}",
    ]
    comment = f"""\
A run on {slices} x {slice.name}: {size}, one process per host.

  kubectl apply -f {name}.yaml

The image contains polygpt with its tpu extra and the experiment's file. Run folders are in a bucket that every pod
mounts. It needs a hierarchical namespace, so that renaming a folder is atomic:
  gcloud storage buckets create gs://{bucket} --uniform-bucket-level-access --enable-hierarchical-namespace
The Kubernetes service account of the pods ("default" unless you set another) needs roles/storage.objectUser there.

The same run with xpk, on a cluster that has the bucket attached at /runs (xpk storage attach):

  {(" " + chr(92) + chr(10) + "    ").join(xpk)}"""
    chips = {"google.com/tpu": min(slice.chips, CHIPS_PER_HOST)}
    container = {
        "name": "polygpt",
        "image": image,
        "command": ["polygpt", *words],
        "env": [{"name": key, "value": value} for key, value in ENVIRONMENT.items()],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"requests": dict(chips), "limits": dict(chips)},
        "volumeMounts": [{"name": "runs", "mountPath": "/runs"}],
    }
    attributes = {"bucketName": bucket, "mountOptions": "implicit-dirs"}
    pod = {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": GRACE,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": slice.generation.gke,
            "cloud.google.com/gke-tpu-topology": slice.name.partition(":")[2],
        },
        "containers": [container],
        "volumes": [{"name": "runs", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}],
    }
    job = {
        "parallelism": slice.hosts,
        "completions": slice.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": pod},
    }
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": restarts},
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }
    return _document(comment, jobset)


def skypilot(
    command: Sequence[str],
    on: str,
    nodes: int = 1,
    name: str = "polygpt",
    bucket: str = "BUCKET",
    spot: bool = False,
) -> str:
    """A SkyPilot task.

    Args:
        command: words after `polygpt`.
        on: a TPU slice, "v5e:4x8", or the GPUs of a node as SkyPilot names them, "H100:8".
        nodes: number of nodes with GPUs; a TPU slice is one node.
        name: name of the task.
        bucket: bucket for run folders, mounted at /runs.
        spot: whether to use preemptible machines; the task restarts elsewhere and resumes.

    Raises:
        UserError: the name or the hardware is not valid, or SkyPilot does not offer such a slice.
    """
    _require_name(name)
    text = shlex.join(["polygpt", *with_workdir(command, f"/runs/{name}")])
    if on.partition(":")[0] in GENERATIONS:
        slice = Slice(on)
        if slice.generation.runtime is None or nodes > 1:
            what = f"{on} there" if slice.generation.runtime is None else "several slices as one run there"
            raise UserError(f"SkyPilot: {what} is not supported: see polygpt launch gke")
        extra, where = "tpu", f"the slice has {counted(slice.hosts, 'host')}, which find each other by its metadata"
        resources = {"accelerators": f"tpu-{slice.type}"}
        resources["accelerator_args"] = {"runtime_version": slice.generation.runtime}
        place = ""
    else:
        if not re.fullmatch(r"[A-Za-z][\w.-]*:\d+", on):
            if said := topology.explain_name(on):
                raise UserError(f"--on is {on!r}: {said}")
            raise UserError(f"--on is {on!r}: it must be a TPU slice such as v5e:4x8 or GPUs of a node such as H100:8")
        extra, where = "gpu", "the first node coordinates"
        resources = {"accelerators": on}
        place = f"""\
export {COORDINATOR}="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"
export {PROCESSES}="$SKYPILOT_NUM_NODES" {PROCESS}="$SKYPILOT_NODE_RANK"
"""
    comment = f"""\
{nodes} x {on}, one process per machine; {where}.

  sky jobs launch {name}.yaml       restarts after preemptions and failures; the run resumes
  sky launch -c {name} {name}.yaml  once, on a cluster that stays"""
    task = {
        "name": name,
        "workdir": ".",
        "num_nodes": nodes,
        "resources": {
            **resources,
            "use_spot": spot,
            "job_recovery": {"strategy": "FAILOVER", "max_restarts_on_errors": RESTARTS},
        },
        "file_mounts": {"/runs": {"source": f"gs://{bucket}", "mode": "MOUNT"}},
        "envs": dict(ENVIRONMENT),
        "setup": f"pip install --editable '.[{extra}]'\n",
        "run": f"{place}{text}\n",
    }
    return _document(comment, task)


def machines(on: str, nodes: int) -> int:
    """Number of machines, and so of processes, of a SkyPilot task: a TPU slice's hosts, or the nodes."""
    return Slice(on).hosts if on.partition(":")[0] in GENERATIONS else nodes


def with_workdir(command: Sequence[str], workdir: str) -> list[str]:
    """The command with a run folder, unless it names one."""
    named = any(word == "--workdir" or word.startswith("--workdir=") for word in command)
    return [*command] if named else [*command, "--workdir", workdir]


def quote_on_one_line(word: str) -> str:
    """A word quoted for bash on one line: control characters become escapes of $'...'."""
    if word.isprintable():
        return shlex.quote(word)
    special = {"\\": r"\\", "'": r"\'"}
    escaped = (special.get(char, char) if char.isprintable() else f"\\U{ord(char):08x}" for char in word)
    return f"$'{''.join(escaped)}'"


class _Dumper(yaml.SafeDumper):
    """Writes scripts as literal blocks, which are easy to read and edit."""

    def ignore_aliases(self, data) -> bool:
        return True


def _script(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if text.endswith("\n") else None)


_Dumper.add_representer(str, _script)


def _document(comment: str, data: dict) -> str:
    """YAML below a comment."""
    lines = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    return lines + yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=10**6, allow_unicode=True)


def _require_name(name: str) -> None:
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):  # pods are called <name>-slice-0-0-xxxxx
        raise UserError(
            f"--name is {name!r}: it must be at most 40 lower-case letters, digits and dashes, and begin with a letter"
        )
