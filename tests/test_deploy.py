"""The example deployment fits the server: files, extras, keys, and figures that the dashboard shows."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from toys import ROOT

from halfbyte.serve.limits import PUBLIC
from halfbyte.serve.metrics import Metrics

DEPLOY = ROOT / "deploy"


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    read: dict[str, Any] = YAML(typ="safe").load((DEPLOY / name).read_text())
    return read


def test_dashboard_shows_figures_that_the_server_has() -> None:
    metrics = Metrics([])
    metrics.observe_request("/v1/models", 200, 0.1)
    metrics.first_token_observer("base")(0.1)
    exported = set(re.findall(r"^(\w+)(?:\{\S+\})? ", metrics.text().decode(), re.MULTILINE))
    board = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for expr in expressions for name in re.findall(r"(?:halfbyte|process)_\w+", expr)}
    assert len(named) > 8
    assert named <= exported
    source = YAML(typ="safe").load((DEPLOY / "grafana/datasource.yaml").read_text())
    uids = {one["uid"] for one in source["datasources"]}
    assert {panel["datasource"]["uid"] for panel in board["panels"]} <= uids


def test_compose_files_name_what_is_there() -> None:
    services = compose()["services"]
    mounted = [
        volume.split(":")[0]
        for service in services.values()
        for volume in service.get("volumes", ())
        if volume.startswith("./")
    ]
    assert len(mounted) == 3
    assert all((DEPLOY / path).is_file() for path in mounted)
    build = services["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    probe = " ".join(services["server"]["healthcheck"]["test"])
    assert any(f":8000{route}'" in probe for route in PUBLIC if route != "/")
    assert set(compose("compose.cuda.yaml")["services"]) <= set(services)
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_a_container_has_time_to_drain() -> None:
    script = (ROOT / "src/halfbyte/commands/serve.py").read_text()
    grace = re.search(r'"--grace-seconds", type=float, default=([\d.]+)', script)
    assert grace
    period = compose()["services"]["server"]["stop_grace_period"]
    assert float(period.removesuffix("s")) > float(grace.group(1))


def test_image_has_what_the_server_imports() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    extras = re.search(r"-e '\.\[([\w,]+)\]'", text)
    assert extras
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"serve", "gguf"} <= set(extras.group(1).split(","))
    assert set(extras.group(1).split(",")) <= set(known["optional-dependencies"])
    copied = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
    assert all((Path(ROOT) / path).exists() for line in copied for path in line.split())
