"""What deploys Farfault names options, ports, metrics and files that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from farfault_cli.settings import settings_of, variable_name

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
KUBERNETES_VERSIONS = ("1.31", kubernetes_validate.latest_version())
EXPOSURE_MAX = 20
"""Of systemd-analyze security, in tenths: 2.0, where 10 is a service without any protection."""
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


def resources(kind: str = "") -> list[dict[str, Any]]:
    found = [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]
    return [document for document in found if kind in ("", document["kind"])]


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_manifests_follow_the_schema(version: str) -> None:
    for document in resources():
        if document["apiVersion"].startswith("monitoring.coreos.com/"):
            continue  # a custom resource; the schemas are Kubernetes' own
        kubernetes_validate.validate(document, version, strict=True)


def test_labels_select_the_pods_that_they_are_meant_for() -> None:
    pods = [document["spec"]["template"]["metadata"]["labels"] for document in resources() if "Job" in document["kind"]]
    pods += [document["spec"]["template"]["metadata"]["labels"] for document in resources("DaemonSet")]
    services = [document["metadata"]["labels"] for document in resources("Service")]
    for kind in ("NetworkPolicy", "Service", "ServiceMonitor", "PodMonitor"):
        for document in resources(kind):
            selector = document["spec"].get("podSelector", document["spec"].get("selector"))
            wanted = selector.get("matchLabels", selector)
            targets = services if kind == "ServiceMonitor" else pods
            assert any(wanted.items() <= labels.items() for labels in targets), (kind, wanted)


def test_the_network_policy_opens_the_ports_that_are_served() -> None:
    (daemon_set,) = resources("DaemonSet")
    container = daemon_set["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    policy = next(document for document in resources("NetworkPolicy") if "source" in document["metadata"]["name"])

    opened = [port for rule in policy["spec"]["ingress"] for port in rule["ports"]]

    assert opened[0]["port"] == ports["pages"]
    assert range(opened[0]["port"], opened[0]["endPort"] + 1) == range(ports["pages"], ports["background"] + 1)
    assert opened[1]["port"] == ports["metrics"]


def test_every_variable_is_an_option_of_its_command() -> None:
    texts = [path.read_text() for path in (*MANIFESTS, *UNITS)]
    variables = {name for text in texts for name in re.findall(r"\bFARFAULT_[A-Z_]*[A-Z]\b", text)}

    assert len(variables) > 10
    assert variables <= {name for command in ("serve", "receive") for name in variables_of(command)}


def variables_of(command: str) -> set[str]:
    (entry,) = entry_points(group="farfault.commands", name=command)
    return {variable_name((command,), option) for option in settings_of(entry.load()).values()}


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_let_the_scheduler_be_asked(unit: Path) -> None:
    """Else faults wait behind bulk, and nothing says why: the first kind of call is refused in silence."""
    lists = re.findall(r"^SystemCallFilter=(~?)(.*)", unit.read_text(), re.MULTILINE)
    for call in ("sched_setattr", "sched_setaffinity"):
        allowed = None
        for denied, names in lists:  # the last list that has a call decides
            members = {member for name in names.split() for member in members_of(name)}
            if call in members:
                allowed = not denied
        assert allowed, f"{unit.name} refuses {call}"


def members_of(name: str) -> set[str]:
    """The system calls of a group of systemd's, or the one that is named."""
    if not name.startswith("@"):
        return {name}
    listed = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
    lines = [line.strip() for line in listed.stdout.splitlines()[1:]]
    return {call for line in lines if line and not line.startswith("#") for call in members_of(line)}


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_units_are_valid_and_hardened(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text()
    assert "ExecStart=/usr/bin/farfault " in text
    file = tmp_path / unit.name.replace("@", "@test")
    file.write_text(text.replace("/usr/bin/farfault", shutil.which("true") or "/bin/true"))

    verified = subprocess.run(["systemd-analyze", "verify", "--man=no", file], capture_output=True, text=True)
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", file],
        capture_output=True,
        text=True,
    )

    assert (verified.returncode, verified.stderr) == (0, "")
    assert judged.returncode == 0, judged.stdout


def test_units_never_give_up_but_do_not_repeat_a_verdict() -> None:
    receive = (DEPLOY / "systemd" / "farfault-receive@.service").read_text()
    serve = (DEPLOY / "systemd" / "farfault-serve@.service").read_text()

    assert "Restart=on-failure" in receive
    assert "RestartPreventExitStatus=2 3 4\n" in receive
    assert "RuntimeDirectoryPreserve=yes" in receive
    assert "StartLimitIntervalSec=0" in receive
    assert "StartLimitIntervalSec=0" in serve


def test_the_job_repeats_until_a_verdict() -> None:
    (job,) = resources("Job")

    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 3, 4]
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_the_container_has_all_parts_in_c() -> None:
    """They are built before the wheel, which takes them along."""
    text = (DEPLOY / "container" / "Containerfile").read_text()
    (parts,) = re.findall(r"for part in (.+?);", text)
    (wanted,) = re.findall(r"^NATIVE := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert parts.split() == wanted.split()
    assert text.index("for part in") < text.index("pip wheel")
    for part in parts.split():
        assert re.search(r"\.\./farfault_\w+/_native", (ROOT / part / "Makefile").read_text())
    assert '"*/farfault_*/_native/*"' in (ROOT / "pyproject.toml").read_text()
