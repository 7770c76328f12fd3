"""The seccomp profile that allows userfaultfd and io_uring in a container."""

import json
import sys
from typing import Any

from fremap.cli.report import print_json, show
from fremap.errors import ArgumentError

#: System calls that fremap uses and Docker's default profile refuses.
CALLS = (
    "cachestat",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "process_madvise",
    "userfaultfd",
)
RULE: dict[str, Any] = {"names": list(CALLS), "action": "SCMP_ACT_ALLOW"}

HOW_TO = """Add this rule to the list "syscalls" of the container's seccomp profile:

  {rule}

or let fremap add it, here to Docker's default profile:

  curl -fsSL https://raw.githubusercontent.com/moby/profiles/main/seccomp/default.json \\
    | fremap doctor --seccomp - > fremap-seccomp.json

Docker, Podman:

  docker run --security-opt seccomp=fremap-seccomp.json IMAGE

Kubernetes, with the file in /var/lib/kubelet/seccomp/ of each node:

  securityContext:
    seccompProfile:
      type: Localhost
      localhostProfile: fremap-seccomp.json

io_uring also needs sysctl kernel.io_uring_disabled=0. System calls that touch absent pages fail
with EFAULT unless the process has CAP_SYS_PTRACE or vm.unprivileged_userfaultfd is 1."""


def with_rule(text: str) -> dict[str, Any]:
    """Return the profile in `text`, with the rule for fremap added."""
    try:
        profile = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"doctor: the seccomp profile is not JSON: {error}") from error
    rules = profile.get("syscalls") if isinstance(profile, dict) else None
    if not isinstance(rules, list):
        raise ArgumentError('doctor: the seccomp profile has no list "syscalls"')
    return {**profile, "syscalls": [*rules, RULE]}


def run(source: str, *, as_json: bool) -> int:
    """Print the rule and how to use it; given a file or "-", print that profile with the rule."""
    if source:
        if source == "-":
            text = sys.stdin.read()
        else:
            with open(source, encoding="utf-8") as file:
                text = file.read()
        print_json(with_rule(text))
    elif as_json:
        print_json(RULE)
    else:
        show(HOW_TO.format(rule=json.dumps(RULE)))
    return 0
