"""What a stand-in for gcloud does: a queued resource with one slice of several hosts, which are folders, in $CLOUD.

Command lines are read as strictly as gcloud reads them: an option that it does not have is an error.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

# Of version 528 of the SDK.
GLOBAL = {"--zone", "--format", "--filter", "--quiet"}
OPTIONS = {
    "queued-resources list": set(),
    "queued-resources create": {"--node-id", "--accelerator-type", "--runtime-version", "--spot", "--reserved"},
    "queued-resources delete": {"--force", "--async"},
    "tpu-vm describe": set(),
    "tpu-vm scp": {"--worker", "--recurse", "--compress"},
    "tpu-vm ssh": {"--worker", "--command"},
}
FLAGS = {"--force", "--quiet", "--spot", "--reserved", "--async", "--recurse", "--compress"}


def main(words: list[str]) -> int:
    assert words[:2] == ["compute", "tpus"]
    verb, cloud = " ".join(words[2:4]), pathlib.Path(os.environ["CLOUD"])
    options, names = {}, []
    for word in words[4:]:
        option, equals, value = word.partition("=")
        if not word.startswith("--"):
            names.append(word)
            continue
        assert option in GLOBAL | OPTIONS[verb], word
        assert bool(equals) != (option in FLAGS), word
        options[option] = value
    assert options["--zone"] == "us-east5-a"
    state = json.loads((cloud / "state.json").read_text())
    status = globals()[verb.replace(" ", "_").replace("-", "_")](cloud, state, names, options)
    (cloud / "state.json").write_text(json.dumps(state))
    return status or 0


def queued_resources_list(cloud, state, names, options):
    assert options["--filter"] == "name~/train$" and options["--format"] == "value(state.state)"
    request = state["request"].pop(0) if len(state["request"]) > 1 else state["request"][0]
    if request:
        print(request)


def queued_resources_create(cloud, state, names, options):
    assert names == ["train"] and options["--node-id"] == "train" and options["--runtime-version"] == "v2-alpha-tpuv6e"
    for host in state["hosts"]:
        shutil.rmtree(cloud / host, ignore_errors=True)
        (cloud / host).mkdir()
    state["request"], state["node"] = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"][-state["wait"] :], "READY"


def queued_resources_delete(cloud, state, names, options):
    assert names == ["train"] and "--force" in options  # else gcloud refuses while there are nodes
    state["request"] = [""]


def tpu_vm_describe(cloud, state, names, options):
    print(state["node"])


def tpu_vm_scp(cloud, state, names, options):
    (source, target), worker = names, options["--worker"]
    assert worker == "all" and target.partition(":")[0] == "train"
    for host in state["hosts"]:
        shutil.copy(source, cloud / host / (target.partition(":")[2] or os.path.basename(source)))


def tpu_vm_ssh(cloud, state, names, options):
    """The command on all hosts at the same time; the status of the first one that is not 0."""
    assert names == ["train"] and options["--worker"] == "all"
    if state["node"] != "READY":
        return 1
    children = []
    for number, host in enumerate(state["hosts"]):
        environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "WANDB_API_KEY")}
        environment |= {"HOME": str(cloud / host), "HOST": str(number)}
        command = " ".join(options["--command"].split(" "))  # as gcloud and ssh take it apart and together
        children.append(subprocess.Popen(["bash", "-c", command], cwd=cloud / host, env=environment))
    statuses = [child.wait() for child in children]
    if state["events"] and " run " in options["--command"]:
        state.update(state["events"].pop(0))
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
