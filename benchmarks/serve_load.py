"""Minutes of mixed load on a served run: chats, streams, vanishing clients, bad requests; memory and /health.

python benchmarks/serve_load.py runs/quickstart --minutes 30 --out benchmarks/results/serve_load_cpu_smollm2

The server is ended by SIGTERM under load; answers that run by then must come, and it must exit with 0.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil

from halfbyte.run_dir import provenance

CLIENTS = 12
HEALTH_EVERY_S = 0.25
WARM_UP_FRAC = 0.1  # of the time: until then buffers and threads are made
BAD = (
    b"{",
    b'{"model": "nobody", "messages": []}',
    b'{"model": "\xff"}',
    b"[" * 100_000,
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
)


class Load:
    """What clients saw, and what the server's process took."""

    def __init__(self, url: str, process: psutil.Process) -> None:
        self.url, self.process = url, process
        self.models = [one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"]]
        self.seen: Counter[str] = Counter()
        self.health: list[float] = []
        self.rss: list[tuple[float, int]] = []
        self.ended = threading.Event()

    def client(self, seed: int) -> None:
        """One of many, until the end."""
        drawn = random.Random(seed)
        with httpx.Client(timeout=300) as http:
            while not self.ended.is_set():
                kind = drawn.choices(("chat", "stream", "vanish", "bad"), (4, 3, 2, 1))[0]
                try:
                    self.seen[f"{kind}: {self.once(http, kind, drawn)}"] += 1
                except httpx.HTTPError as error:
                    self.seen[f"{kind}: {type(error).__name__}"] += 1

    def once(self, http: httpx.Client, kind: str, drawn: random.Random) -> int | str:
        """One request of a kind."""
        url = f"{self.url}/v1/chat/completions"
        if kind == "bad":
            headers = {"content-type": "application/json"}
            return http.post(url, content=drawn.choice(BAD), headers=headers).status_code
        text = " ".join(
            drawn.choice(("heart", "acute", "pain", "left"))
            for _ in range(drawn.choice((4, 40, 200)))
        )
        asked = {
            "model": drawn.choice(self.models),
            "messages": [{"role": "user", "content": text}],
            "max_tokens": drawn.choice((4, 16, 64)),
            "temperature": drawn.choice((0, 1)),
            "stream": kind != "chat",
        }
        if kind == "chat":
            return http.post(url, json=asked).status_code
        with http.stream("POST", url, json=asked) as reply:
            for number, line in enumerate(reply.iter_lines()):
                if kind == "vanish" and number >= 4:
                    return "gone"
                if line == "data: [DONE]":
                    return "whole"
        return f"cut after {reply.status_code}"

    def watch(self) -> None:
        """How fast /health answers, and the memory, until the end."""
        start = time.monotonic()
        with httpx.Client(timeout=30) as http:
            while not self.ended.is_set():
                begun = time.perf_counter()
                status = http.get(f"{self.url}/health").status_code
                self.health.append(time.perf_counter() - begun)
                self.seen[f"health: {status}"] += 1
                self.rss.append((time.monotonic() - start, self.process.memory_info().rss))
                time.sleep(HEALTH_EVERY_S)

    def figures(self, seconds: float) -> dict[str, object]:
        """All of it."""
        settled = [rss for at, rss in self.rss if at > WARM_UP_FRAC * seconds]
        tenth = max(1, len(settled) // 10)
        cuts = statistics.quantiles(self.health, n=1000)
        totals = re.findall(r"^halfbyte_(\w+)_total (\S+)$", self.metrics, re.MULTILINE)
        return {
            "minutes": seconds / 60,
            "requests": dict(sorted(self.seen.items())),
            "health_ms": {
                "median": 1e3 * cuts[499],
                "p99": 1e3 * cuts[989],
                "max": 1e3 * max(self.health),
            },
            "rss_mb": {
                "first tenth": statistics.median(settled[:tenth]) / 1e6,
                "last tenth": statistics.median(settled[-tenth:]) / 1e6,
            },
            "server": {name: float(value) for name, value in totals},
        }

    def run(self, seconds: float) -> None:
        """Clients and the watch; at the end the server is told to stop while they ask on."""
        clients = [threading.Thread(target=self.client, args=(seed,)) for seed in range(CLIENTS)]
        watch = threading.Thread(target=self.watch)
        for thread in (watch, *clients):
            thread.start()
        time.sleep(seconds)
        self.metrics = httpx.get(f"{self.url}/metrics").text
        self.ended.set()
        self.process.send_signal(signal.SIGTERM)
        for thread in (watch, *clients):
            thread.join(300)


def main() -> None:
    """A server, its load → figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, help="writes OUT.json")
    arguments = parser.parse_args()
    command = [sys.executable, "eval/serve.py", str(arguments.run), "--port", "0"]
    log = arguments.run / "serve_load.log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    while not (found := re.search(r"serving at (\S+)", log.read_text())):
        if server.poll() is not None:
            sys.exit(log.read_text())
        time.sleep(0.5)
    load = Load(found.group(1), psutil.Process(server.pid))
    load.run(60 * arguments.minutes)
    figures = {"command": sys.argv, **load.figures(60 * arguments.minutes)}
    figures |= {"exit": server.wait(60), "engine errors": log.read_text().count("engine: ")}
    print(json.dumps(figures, indent=1))
    if arguments.out:
        record = {**figures, **provenance()}
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
