"""What `polygpt launch gke` and `skypilot` print is YAML with what the clusters need."""

import shlex
import subprocess

import pytest
import yaml

from polygpt.cli.main import main

COMMAND = ["--", "train", "mine.py", "--train.steps", "3", "--model.decoder.pattern", "[null, 'a b']"]


def printed(capsys, *words):
    assert main(["launch", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("slice", "label", "hosts", "chips", "kind"),
    [
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4, "v5litepod-256"),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1, "v5litepod-1"),
        ("v5p:8x8x8", "tpu-v5p-slice", 128, 4, "v5p-1024"),
        ("v5p:4x4x12", "tpu-v5p-slice", 48, 4, "v5p-384"),
        ("v6e:2x4", "tpu-v6e-slice", 2, 4, "v6e-8"),
        ("tpu7x:4x4x4", "tpu7x", 16, 4, "tpu7x-128"),
    ],
)
def test_a_jobset_asks_for_every_chip_of_the_slices(capsys, slice, label, hosts, chips, kind):
    text = printed(capsys, "gke", "--on", slice, "--slices", "2", "--name", "mine", "--bucket", "shelf", *COMMAND)
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "mine" and jobset["spec"]["failurePolicy"]["maxRestarts"] == 20
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == 2 and job["parallelism"] == job["completions"] == hosts
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": slice.partition(":")[2],
    }
    [container] = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}
    assert container["command"] == ["polygpt", *COMMAND[1:], "--workdir", "/runs/mine"]
    assert container["env"][1] == {"name": "JAX_COMPILATION_CACHE_DIR", "value": "/runs/compiled"}
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
    assert pod["terminationGracePeriodSeconds"] == 300 and pod["restartPolicy"] == "Never"  # time to save
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "shelf"
    comment = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))
    xpk = shlex.split(comment[comment.index("xpk workload create") :])
    assert f"--tpu-type={kind}" in xpk and "--num-slices=2" in xpk
    assert shlex.split(xpk[-1].removeprefix("--command=")) == container["command"]


def test_a_skypilot_task_with_gpus_tells_each_node_its_place(capsys):
    task = yaml.safe_load(printed(capsys, "skypilot", "--on", "H100:8", "--nodes", "4", "--spot", *COMMAND))
    assert task["num_nodes"] == 4 and task["resources"]["accelerators"] == "H100:8" and task["resources"]["use_spot"]
    lines = task["run"].splitlines()
    assert [line.split()[0] for line in lines] == ["export", "export", "polygpt"]
    assert "SKYPILOT_NODE_IPS" in lines[0] and "POLYGPT_PROCESS=" in lines[1]
    assert shlex.split(lines[2]) == ["polygpt", *COMMAND[1:], "--workdir", "/runs/polygpt"]


@pytest.mark.parametrize("value", ["two\nlines é", "a: b # c", "it's\ttabbed\\n", "{{x}} é", "null"])
def test_any_text_in_an_override_reaches_the_command_unchanged(capsys, value):
    command = ["--", "train", "mine.py", "--name", value]
    words = ["polygpt", *command[1:], "--workdir", "/runs/polygpt"]
    text = printed(capsys, "gke", "--on", "v5e:4x4", *command)
    pod = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == words
    comment = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))
    xpk = comment[comment.index("xpk workload create") :]
    assert bash(f"{xpk.replace('xpk', 'show', 1)}")[-1].startswith("--command=polygpt train mine.py")
    assert (
        bash(bash(xpk.replace("xpk", "show", 1))[-1].removeprefix("--command=").replace("polygpt", "show", 1))
        == words[1:]
    )
    task = yaml.safe_load(printed(capsys, "skypilot", "--on", "v5e:4x4", *command))
    assert shlex.split(task["run"]) == words
    task = yaml.safe_load(printed(capsys, "skypilot", "--on", "H100:8", "--nodes", "2", *command))
    assert shlex.split(task["run"])[-len(words) :] == words


def bash(script):
    """The words that bash passes to the command `show`."""
    show = "show() { printf '%s\\0' \"$@\"; }\n"
    return (
        subprocess.run(["bash", "-c", show + script], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    )


def test_a_skypilot_task_restarts_and_keeps_its_runs_in_the_bucket(capsys):
    task = yaml.safe_load(printed(capsys, "skypilot", "--on", "v5e:4x4", "--bucket", "shelf", *COMMAND))
    assert task["resources"]["job_recovery"] == {"strategy": "FAILOVER", "max_restarts_on_errors": 20}
    assert task["file_mounts"] == {"/runs": {"source": "gs://shelf", "mode": "MOUNT"}}
    assert task["resources"]["use_spot"] is False


def test_a_skypilot_task_with_a_slice_is_one_node(capsys):
    task = yaml.safe_load(printed(capsys, "skypilot", "--on", "v5p:4x4x4", *COMMAND, "--workdir", "w"))
    assert task["num_nodes"] == 1 and task["resources"]["accelerators"] == "tpu-v5p-128"
    assert task["resources"]["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv5"}
    assert shlex.split(task["run"]) == ["polygpt", *COMMAND[1:], "--workdir", "w"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["gke", "--on", "v5e:3x3"], "accepted for v5e are 1x1"),
        (["gke", "--on", "v5e"], "accepted for v5e are"),
        (["gke", "--on", "v5p-128"], "64 chips are v5p:4x4x4"),
        (["skypilot", "--on", "v5litepod-256"], "v5litepod-256 counts chips: it is v5e:16x16"),
        (["gke", "--on", "h100:8"], "such as v4:2x2x2, v5e:2x2"),
        (["gke", "--on", "v5e:4x4", "--name", "A b"], "lower-case letters"),
        (["skypilot", "--on", "tpu7x:4x4x4"], "see polygpt launch gke"),
        (["skypilot", "--on", "v5e:4x4", "--nodes", "2"], "see polygpt launch gke"),
        (["skypilot", "--on", "H100"], "such as H100:8"),
    ],
)
def test_faults_are_told_in_one_line(capsys, words, text):
    assert main(["launch", *words, *COMMAND]) == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1
