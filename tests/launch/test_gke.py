"""launch/gke.py: the manifest against the published API, what it makes of an exit status, and what runs in its pods."""

import copy
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jsonschema
import pytest
from stand_ins import HOSTILE, REPOSITORY

SCRIPT = REPOSITORY / "launch" / "gke.py"
SCHEMA = json.loads((pathlib.Path(__file__).parent / "jobset.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())
COMMON = ("--name=llama", "--image=us-docker.pkg.dev/p/r/rosepo:1", "--claim=shared")
TPU = (*COMMON, "--accelerator=tpu-v6e-slice", "--topology=4x4")
GPU = (*COMMON, "--accelerator=nvidia-h100-80gb", "--hosts=2")
WORDS = ("run", "--config=configs/llama3_8b.py", "--workdir=/mnt/rosepo/a run")
EVERYTHING = ("--spot", "--secret=tokens", "--queue=multislice-queue", "--restarts=5")


@pytest.fixture
def launch(stand_ins):
    """The launcher's dry run: (what it printed, the manifest)."""
    stand_ins.add("kubectl", f"open({str(stand_ins.folder / 'stdin')!r}, 'w').write(sys.stdin.read())")

    def run(*words):
        done = stand_ins.run(sys.executable, SCRIPT, "--dry-run", *words)
        assert done.returncode == 0, done.stderr
        assert not stand_ins.calls()
        return done.stdout, json.loads(done.stdout.partition("\n")[2])

    return run


def pod(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def expanded(text, variables):
    """What Kubernetes makes of a word of `command`: $(NAME) of a variable becomes its value, $$ becomes $."""

    def replace(match):
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, text)


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_dry_run(launch, stand_ins, as_expected, kind):
    options = {"tpu": (*TPU, *EVERYTHING), "gpu": GPU}[kind]
    printed, _ = launch(*options, *WORDS)
    as_expected(f"gke_{kind}.yaml", printed)
    assert stand_ins.run(sys.executable, SCRIPT, *options, *WORDS).returncode == 0
    comment, _, text = printed.partition("\n")
    assert [comment.removeprefix("# ").split()] == stand_ins.calls()
    assert (stand_ins.folder / "stdin").read_text() == text


MANIFESTS = {
    "v5e": (*COMMON, "--accelerator=tpu-v5-lite-podslice", "--topology=2x4", "--chips=8"),
    "tpu7x": (*COMMON, "--accelerator=tpu7x", "--topology=2x2x4"),
    "tpu": TPU,
    "gpu": GPU,
    "tpu, everything": (*TPU, *EVERYTHING),
    "gpu, everything": (*GPU, "--chips=4", *EVERYTHING),
}


@pytest.mark.parametrize("options", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests_are_of_the_published_api(launch, options):
    _, manifest = launch(*options, *WORDS, *HOSTILE)
    assert [f"{list(error.path)}: {error.message}" for error in VALIDATOR.iter_errors(manifest)] == []


FREE = {"labels", "annotations", "nodeSelector", "limits"}  # maps with keys of the user


def places(value, path=()):
    """The paths of all fields."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not (path and path[-1] in FREE):
                yield (*path, key)
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def test_a_misspelt_or_mistyped_field_is_noticed(launch):
    _, manifest = launch(*TPU, *EVERYTHING, *WORDS)
    found = list(places(manifest))
    assert len(found) > 60
    for *path, key in found:
        for damage in ("name", "type"):
            broken = copy.deepcopy(manifest)
            parent = broken
            for step in path:
                parent = parent[step]
            value = parent.pop(key)
            parent.update({key + "s": value} if damage == "name" else {key: 1.5})
            assert not VALIDATOR.is_valid(broken), (*path, key, damage)


def outcome(manifest, status=None, condition=None):
    """What the controllers do when a pod ends so, after their documentation: the first rule that matches decides."""
    (job,) = (entry["template"]["spec"] for entry in manifest["spec"]["replicatedJobs"])
    assert job["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if codes and status is not None and (status in codes["values"]) == (codes["operator"] == "In"):
            message = f"Container {codes['containerName']} for pod default/llama-slice-job-0-0-x failed with exit code "
            message += f"{status} matching {rule['action']} rule at index {index}"
        elif any(wanted["type"] == condition for wanted in conditions):
            message = f"Pod default/llama-slice-job-0-0-x has condition {condition} matching FailJob rule at index 1"
        else:
            continue
        assert rule["action"] == "FailJob"
        reason = "PodFailurePolicy"
        break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
        if (not reasons or reason in reasons) and (not patterns or any(re.search(p, message) for p in patterns)):
            return rule["action"]
    return "RestartJobSet"


def test_what_is_started_again(launch):
    _, manifest = launch(*TPU, "--restarts=7", *WORDS)
    assert outcome(manifest, 2) == "FailJobSet"
    assert outcome(manifest, 75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(manifest, 143, "DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    for status in (1, 20, 22, 134, 137, 139, 143, 255):
        assert outcome(manifest, status) == "RestartJobSet"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert outcome(manifest, 2, "DisruptionTarget") == "FailJobSet"


def test_words_arrive_as_they_are(launch):
    for options in (TPU, GPU):
        _, manifest = launch(*options, *WORDS, *HOSTILE)
        (container,) = pod(manifest)["containers"]
        variables = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
        words = [expanded(word, variables) for word in container["command"]]
        assert words == ["rosepo", *WORDS, *HOSTILE, "--distributed"]
        assert not {"args", "workingDir"} & container.keys()


def test_secrets_are_named_and_not_held(launch, stand_ins):
    printed, manifest = launch(*TPU, "--secret=tokens", *WORDS)
    assert pod(manifest)["containers"][0]["envFrom"] == [{"secretRef": {"name": "tokens"}}]
    assert "TOKEN" not in printed and "API_KEY" not in printed
    assert "envFrom" not in pod(launch(*TPU, *WORDS)[1])["containers"][0]


@pytest.mark.parametrize(
    ("options", "hosts", "limits"),
    [
        (TPU, 4, {"google.com/tpu": 4}),
        (MANIFESTS["v5e"], 1, {"google.com/tpu": 8}),
        (MANIFESTS["tpu7x"], 4, {"google.com/tpu": 4}),
        ((*COMMON, "--accelerator=tpu-v6e-slice", "--topology=1x1"), 1, {"google.com/tpu": 1}),
        (GPU, 2, {"nvidia.com/gpu": 8}),
        ((*COMMON, "--accelerator=nvidia-l4", "--chips=2"), 1, {"nvidia.com/gpu": 2}),
    ],
)
def test_hosts_and_chips(launch, options, hosts, limits):
    _, manifest = launch(*options, *WORDS)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert pod(manifest)["containers"][0]["resources"]["limits"] == limits


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*TPU, "--name=A", *WORDS), "--name=A"),
        ((*TPU, f"--name={'a' * 41}", *WORDS), "--name"),
        ((*TPU, "--hosts=3", *WORDS), "do not make 4x4"),
        ((*TPU, "--topology=4by4", *WORDS), "--topology=4by4"),
        ((*COMMON, "--accelerator=tpu7x", *WORDS), "--topology"),
        ((*TPU, "run", "--workdir=runs/a"), "--workdir=/mnt/rosepo"),
        (TPU, "--workdir=/mnt/rosepo"),
    ],
)
def test_mistakes(stand_ins, words, said):
    stand_ins.add("kubectl")
    done = stand_ins.run(sys.executable, SCRIPT, *words)
    assert done.returncode == 2 and said in done.stderr and not stand_ins.calls()


def test_status_of_kubectl_is_passed_on(stand_ins):
    stand_ins.add("kubectl", "sys.exit(3)")
    assert stand_ins.run(sys.executable, SCRIPT, *TPU, *WORDS).returncode == 3


def test_real_processes_find_each_other_by_the_environment_of_the_pods(launch, tmp_path):
    """As Kubernetes would start the containers of GPU hosts, with this machine's name for that of the first pod."""
    _, manifest = launch(*GPU, *WORDS)
    (container,) = pod(manifest)["containers"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for index in range(2):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
        for entry in container["env"]:
            if entry["name"] == "JAX_COORDINATOR_ADDRESS":
                assert entry["value"] == "llama-slice-job-0-0.llama:8476"
                environment[entry["name"]] = f"127.0.0.1:{port}"
            elif "valueFrom" in entry:
                path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
                assert entry["valueFrom"] == {"fieldRef": {"fieldPath": path}}
                environment[entry["name"]] = str(index)
            elif entry["name"] != "JAX_PLATFORMS":
                environment[entry["name"]] = entry["value"]
        program, verb, *words = container["command"]
        assert (program, verb) == ("rosepo", "run")
        words = [word.replace("/mnt/rosepo", str(tmp_path)).replace("llama3_8b.py", "demo.py:smoke") for word in words]
        command = [sys.executable, "-m", "rosepo_jax", "prepare", *words]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        children.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes))
    said = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert ["prepare: done" in text for text in said] == [True, False]
    assert (tmp_path / "a run" / "prepare" / "manifest.json").exists()
