#!/usr/bin/env python3
"""`rosepo VERB ... --distributed` on a slice of TPUs or several GPU nodes of GKE, as a JobSet (0.10 or later).

    python launch/gke.py --name=NAME --image=IMAGE --claim=PVC --accelerator=tpu-v6e-slice --topology=4x4 VERB ...
    python launch/gke.py --name=NAME --image=IMAGE --claim=PVC --accelerator=nvidia-h100-80gb --hosts=2 VERB ...

The claim is mounted at /mnt/rosepo on all hosts. A job that was told to stop (status 75) or lost a node is made anew
without end, one that failed --restarts times, one with a mistake (status 2) not at all. --dry-run prints the manifest
that is otherwise handed to kubectl.
"""

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

MOUNT = "/mnt/rosepo"
PORT = 8476
JOB = "slice-job"  # the name that xpk's tools look for
LABELS = "cloud.google.com"
APPLY = ("kubectl", "apply", "--filename=-")


def manifest(args: argparse.Namespace) -> dict[str, Any]:
    """The JobSet: one job, with a pod on each host."""
    labels = {"xpk.google.com/workload": args.name}
    metadata: dict[str, Any] = {"name": args.name, "labels": dict(labels)}
    if args.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = args.queue
    if args.topology:  # a slice is a node pool, and serves one job
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": f"{LABELS}/gke-nodepool"}
    status = {"containerName": "rosepo", "operator": "In", "values": [2, 75]}
    lost = {"type": "DisruptionTarget", "status": "True"}
    job = {
        "parallelism": args.hosts,
        "completions": args.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": status}, {"action": "FailJob", "onPodConditions": [lost]}]
        },
        "template": {"metadata": {"labels": labels}, "spec": pod(args)},
    }
    # All pods start anew together: those that a job replaces one by one come back too far apart to find each other.
    # Which of the two statuses it was, the job's message says.
    again = {"name": "preempted", "action": "RestartJobSetAndIgnoreMaxRestarts"}
    rules = [
        {"name": "mistake", "action": "FailJobSet", "onJobFailureMessagePatterns": ["failed with exit code 2 "]},
        {**again, "onJobFailureReasons": ["PodFailurePolicy"]},
    ]
    spec = {
        "failurePolicy": {"maxRestarts": args.restarts, "rules": rules},
        "replicatedJobs": [{"name": JOB, "replicas": 1, "template": {"spec": job}}],
    }
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def pod(args: argparse.Namespace) -> dict[str, Any]:
    """What runs on one host."""
    key, selector = (
        ("google.com/tpu", "gke-tpu-accelerator") if args.topology else ("nvidia.com/gpu", "gke-accelerator")
    )
    nodes = {f"{LABELS}/{selector}": args.accelerator}
    tolerations = [{"key": key, "operator": "Exists"}]
    if args.topology:
        nodes[f"{LABELS}/gke-tpu-topology"] = args.topology
    if args.spot:
        nodes[f"{LABELS}/gke-spot"] = "true"
        tolerations.append({"key": f"{LABELS}/gke-spot", "operator": "Exists"})
    container: dict[str, Any] = {
        "name": "rosepo",
        "image": args.image,
        # No shell; Kubernetes itself would replace $(NAME), and reads $$ as $.
        "command": [word.replace("$", "$$") for word in ("rosepo", *args.words, "--distributed")],
        "env": environment(args),
        "resources": {"limits": {key: args.chips}},
        "volumeMounts": [{"name": "shared", "mountPath": MOUNT}, {"name": "memory", "mountPath": "/dev/shm"}],
    }
    if args.secret:
        container["envFrom"] = [{"secretRef": {"name": args.secret}}]
    return {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": 120,
        "nodeSelector": nodes,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": args.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},  # NCCL needs more than the usual 64 MiB
        ],
    }


def environment(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Variables of a host: where JAX finds the others, which on slices of TPUs GKE tells it."""
    # With the platform named, a host without accelerators is an error, and does not use its CPU.
    values = {"JAX_PLATFORMS": "tpu,cpu" if args.topology else "cuda,cpu", "HF_HOME": f"{MOUNT}/huggingface"}
    if not args.topology:
        values["JAX_COORDINATOR_ADDRESS"] = f"{args.name}-{JOB}-0-0.{args.name}:{PORT}"
        values["JAX_NUM_PROCESSES"] = str(args.hosts)
    found: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in values.items()]
    if not args.topology:
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        found.append({"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}})
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the JobSet, at most 40 characters")
    parser.add_argument("--image", required=True, help="with the project in it (launch/Dockerfile)")
    parser.add_argument("--claim", required=True, help=f"a ReadWriteMany volume claim, mounted at {MOUNT}")
    parser.add_argument("--accelerator", required=True, help="tpu-v6e-slice, tpu7x, nvidia-h100-80gb, ...")
    parser.add_argument("--topology", help="of a TPU slice: 4x4, 2x2x4, ...")
    parser.add_argument("--hosts", type=int, help="nodes; default: as many as the topology has, or 1")
    parser.add_argument("--chips", type=int, help="chips or GPUs of a node; default: 4 of TPUs, 8 GPUs")
    parser.add_argument("--spot", action="store_true", help="nodes that may be preempted")
    parser.add_argument("--secret", help="a Secret whose keys become environment variables: HF_TOKEN, ...")
    parser.add_argument("--queue", help="the LocalQueue where Kueue admits jobs (xpk: multislice-queue)")
    parser.add_argument("--restarts", type=int, default=3, help="how many failures are started again")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest, and do nothing")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="VERB ...", help="of rosepo, with its arguments")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{,38}[a-z0-9])?", args.name):
        parser.error(f"--name={args.name}: small letters, digits and hyphens, a letter first, 40 at most")
    if args.topology and not re.fullmatch(r"\d+(x\d+){1,2}", args.topology):
        parser.error(f"--topology={args.topology}: such as 4x4 or 2x2x4")
    if args.topology is None and args.accelerator.startswith("tpu"):
        parser.error("give --topology=4x4, the one of the node pool")
    if not any(word.startswith(f"--workdir={MOUNT}/") for word in args.words):
        parser.error(f"give a verb and --workdir={MOUNT}/DIR, which all hosts see")
    chips = math.prod(map(int, args.topology.split("x"))) if args.topology else 0
    args.chips = args.chips or (min(4, chips) if chips else 8)
    args.hosts = args.hosts or (chips // args.chips if chips else 1)
    if chips and args.hosts * args.chips != chips:
        parser.error(f"{args.hosts} hosts of {args.chips} chips do not make {args.topology}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    text = json.dumps(manifest(args), indent=2) + "\n"  # which is YAML too
    if args.dry_run:
        print(f"# {shlex.join(APPLY)}\n{text}", end="")
        return 0
    return subprocess.run(APPLY, input=text, text=True).returncode


if __name__ == "__main__":
    sys.exit(main())
