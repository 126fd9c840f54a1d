"""Texts for clusters that others run: a JobSet for GKE with the xpk command of the same run, and a SkyPilot task.

Sources: GKE's pages on TPU slices and Multislice (cloud.google.com/kubernetes-engine/docs/concepts/tpus), xpk
(github.com/AI-Hypercomputer/xpk) and SkyPilot's YAML reference (docs.skypilot.co/en/latest/reference/yaml-spec.html).
"""

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Sequence

from polygpt import topology
from polygpt.errors import UserError
from polygpt.runtime.processes import COORDINATOR, PROCESS, PROCESSES
from polygpt.spec import counted


@dataclasses.dataclass(frozen=True)
class Generation:
    """What clusters call a generation of TPUs.

    Attributes:
        gke: the accelerator label of its nodes.
        prefix: its slices are called prefix-N, N being what `topology.COUNTED` says.
        runtime: of TPU VMs, for SkyPilot; None where it does not offer them.
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
CHIPS_OF_A_HOST = 4
"""In the machine types ct4p-hightpu-4t, ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t and tpu7x-standard-4t."""
PORT = 61499
"""Of the coordinator, on clusters where a job has its machines to itself."""


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
        return max(1, self.chips // CHIPS_OF_A_HOST)

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.name.partition(":")[0]]

    @property
    def type(self) -> str:
        """As Google's tools call it, "v5litepod-256"."""
        return f"{self.generation.prefix}-{self.chips * topology.COUNTED[self.name.partition(':')[0]]}"


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
    restarts: int = 20,
) -> str:
    """A JobSet manifest, with the xpk command that submits the same run in its comments.

    Args:
        command: words after `polygpt`.
        slice, slices: one process runs on each of their hosts.
        name, image, cluster, project, zone: of the job and where it runs.
        bucket: a bucket that is mounted at /runs, for run folders.
        restarts: how often the job may start again after a failure; each time it resumes.
    """
    _require_name(name)
    words = with_workdir(command, f"/runs/{name}")
    text = shlex.join(["polygpt", *words])
    xpk = (
        f"xpk workload create --cluster={cluster} --project={project} --zone={zone} --workload={name}",
        f"  --tpu-type={slice.type} --num-slices={slices} --docker-image={image} --max-restarts={restarts}",
        f"  --command={shlex.quote(text)}",
    )
    size = f"{counted(slice.chips * slices, 'chip')}, {counted(slice.hosts * slices, 'host')}"
    return f"""\
# A run on {slices} x {slice.name}: {size}, one process on each.
#
#   kubectl apply -f {name}.yaml
#
# The image holds polygpt with its tpu extra and the experiment's file. Run folders lie in a bucket that every pod sees,
# with a hierarchical namespace, where renaming a folder is one step:
#   gcloud storage buckets create gs://{bucket} --uniform-bucket-level-access --enable-hierarchical-namespace
# The Kubernetes service account of the pods, "default" unless you set another, needs roles/storage.objectUser there.
#
# The same with xpk, on a cluster that has the bucket attached at /runs (xpk storage attach):
#
#   {(" " + chr(92) + chr(10) + "#   ").join(xpk)}
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: {restarts}
  replicatedJobs:
    - name: slice
      replicas: {slices}
      template:
        spec:
          parallelism: {slice.hosts}
          completions: {slice.hosts}
          completionMode: Indexed
          backoffLimit: 0
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: {slice.generation.gke}
                cloud.google.com/gke-tpu-topology: {json.dumps(slice.name.partition(":")[2])}
              containers:
                - name: polygpt
                  image: {json.dumps(image)}
                  command: {json.dumps(["polygpt", *words])}
                  env:
                    - name: PYTHONUNBUFFERED
                      value: "1"
                    - name: JAX_COMPILATION_CACHE_DIR
                      value: /runs/compiled
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  resources:
                    requests:
                      google.com/tpu: {min(slice.chips, CHIPS_OF_A_HOST)}
                    limits:
                      google.com/tpu: {min(slice.chips, CHIPS_OF_A_HOST)}
                  volumeMounts:
                    - name: runs
                      mountPath: /runs
              volumes:
                - name: runs
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: {json.dumps(bucket)}
                      mountOptions: implicit-dirs
"""


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
        on: a TPU slice, "v5e:4x8", or GPUs of a node as SkyPilot calls them, "H100:8".
        nodes: how many nodes with GPUs; a TPU slice is one.
        name: of the task.
        bucket: a bucket that is mounted at /runs, for run folders.
        spot: whether on machines that may be taken away; the task is started again and resumes.

    Raises:
        UserError: if SkyPilot does not offer such a slice.
    """
    _require_name(name)
    text = shlex.join(["polygpt", *with_workdir(command, f"/runs/{name}")])
    if on.partition(":")[0] in GENERATIONS:
        slice = Slice(on)
        if slice.generation.runtime is None or nodes > 1:
            what = f"{on} there" if slice.generation.runtime is None else "several slices as one run there"
            raise UserError(f"SkyPilot: {what} is not supported: see polygpt launch gke")
        extra, where = "tpu", f"the slice has {counted(slice.hosts, 'host')}, which find each other by its metadata"
        resources = f"tpu-{slice.type}\n  accelerator_args:\n    runtime_version: {slice.generation.runtime}"
        place = ""
    else:
        if not re.fullmatch(r"[A-Za-z][\w.-]*:\d+", on):
            if said := topology.translated(on):
                raise UserError(f"--on is {on!r}: {said}")
            raise UserError(f"--on is {on!r}: it must be a TPU slice such as v5e:4x8 or GPUs of a node such as H100:8")
        extra, where = "gpu", "the first node coordinates"
        resources = on
        place = f"""\
  export {COORDINATOR}="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"
  export {PROCESSES}="$SKYPILOT_NUM_NODES" {PROCESS}="$SKYPILOT_NODE_RANK"
"""
    return f"""\
# {nodes} x {on}, one process on each machine; {where}.
#
#   sky jobs launch {name}.yaml       started again when machines are taken away or a process fails; it resumes
#   sky launch -c {name} {name}.yaml  once, on a cluster that stays
name: {name}
workdir: .
num_nodes: {nodes}
resources:
  accelerators: {resources}
  use_spot: {str(spot).lower()}
  job_recovery:
    strategy: FAILOVER
    max_restarts_on_errors: 20
file_mounts:
  /runs:
    source: gs://{bucket}
    mode: MOUNT
envs:
  PYTHONUNBUFFERED: "1"
  JAX_COMPILATION_CACHE_DIR: /runs/compiled
setup: |
  pip install --editable '.[{extra}]'
run: |
{place}  {text}
"""


def machines(on: str, nodes: int) -> int:
    """How many machines, and so processes, a SkyPilot task has: a TPU slice's hosts, or the nodes."""
    return Slice(on).hosts if on.partition(":")[0] in GENERATIONS else nodes


def with_workdir(command: Sequence[str], workdir: str) -> list[str]:
    """The command with a run folder, unless it names one."""
    named = any(word == "--workdir" or word.startswith("--workdir=") for word in command)
    return [*command] if named else [*command, "--workdir", workdir]


def _require_name(name: str) -> None:
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):  # pods are called <name>-slice-0-0-xxxxx
        raise UserError(f"--name is {name!r}: it must be up to 40 small letters, digits and dashes, a letter first")
