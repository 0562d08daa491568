"""Minutes of mixed load on a served run: chats, streams, vanishing clients, bad requests; memory and /health.

python benchmarks/serve_load.py runs/quickstart --minutes 30 --out benchmarks/results/serve_load_cpu_smollm2

The server is ended by SIGTERM under load. Ends with 1, and says why, where an answer is another one than it
must be, /health is slow, memory grows, or the server does not end in peace.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
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
from typing import Any

import httpx
import psutil

from halfbyte.run_dir import provenance

CLIENTS = 12
HEALTH_EVERY_S = 0.25
WARM_UP_FRAC = 0.1  # of the time: until then buffers and threads are made
DRAWN_S = 0.5  # by which requests that were begun have reached the server
MAX_HEALTH_S = 0.1  # at the 99th percentile
MAX_GROWTH = 1.05  # of memory, from the first to the last tenth of the time after the warm-up
# What each kind may end with.
RIGHT: dict[str, set[int | str]] = {
    "chat": {200},
    "json": {200},
    "stream": {"whole"},
    "vanish": {"gone", "whole"},
    "health": {200},
}
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
        self.wrong: Counter[str] = Counter()

    def note(self, kind: str, end: int | str) -> None:
        """How a request ended, and whether it may."""
        self.seen[f"{kind}: {end}"] += 1
        refused = kind == "bad" and isinstance(end, int) and 400 <= end < 500
        if not refused and end not in RIGHT.get(kind, ()):
            self.wrong[f"{kind}: {end}"] += 1

    def client(self, seed: int) -> None:
        """One of many, until the end."""
        drawn = random.Random(seed)
        with httpx.Client(timeout=300) as http:
            while not self.ended.is_set():
                kinds = ("chat", "json", "stream", "vanish", "bad")
                (kind,) = drawn.choices(kinds, (4, 1, 3, 2, 1))
                try:
                    self.note(kind, self.once(http, kind, drawn))
                except httpx.HTTPError as error:
                    self.note(kind, type(error).__name__)

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
            "stream": kind in ("stream", "vanish"),
        }
        if drawn.random() < 0.3:
            asked |= {"logprobs": True, "top_logprobs": drawn.choice((0, 5, 20))}
        if kind == "json":
            asked["response_format"] = {"type": "json_object"}
        if not asked["stream"]:
            return http.post(url, json=asked).status_code
        with http.stream("POST", url, json=asked) as reply:
            for number, line in enumerate(reply.iter_lines()):
                if kind == "vanish" and number >= 4:
                    return "gone"
                if line == "data: [DONE]":
                    return "whole"
        return f"cut after {reply.status_code}"

    def figures(self, seconds: float) -> dict[str, Any]:
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
        """Clients and the watch; at the end the server is told to stop while answers are being made."""
        apart = multiprocessing.get_context("spawn")
        queue, stop = apart.Queue(), apart.Event()
        watcher = apart.Process(target=watch, args=(self.url, self.process.pid, stop, queue))
        watcher.start()
        clients = [
            threading.Thread(target=self.client, args=(seed,), daemon=True)
            for seed in range(CLIENTS)
        ]
        for thread in clients:
            thread.start()
        time.sleep(seconds)
        stop.set()
        self.health, self.rss, statuses = queue.get(timeout=60)
        for status in statuses:
            self.note("health", status)
        watcher.join(60)
        self.metrics = httpx.get(f"{self.url}/metrics").text
        self.ended.set()
        time.sleep(DRAWN_S)
        self.process.send_signal(signal.SIGTERM)
        for thread in clients:
            thread.join(300)


def watch(url: str, pid: int, stop: Any, queue: Any) -> None:
    """How fast /health answers, and the memory, until the end; a process of its own, which no client slows."""
    process, start = psutil.Process(pid), time.monotonic()
    health: list[float] = []
    rss: list[tuple[float, int]] = []
    statuses: list[int | str] = []
    with httpx.Client(timeout=30) as http:
        while not stop.is_set():
            begun = time.perf_counter()
            try:
                statuses.append(http.get(f"{url}/health").status_code)
            except httpx.HTTPError as error:
                statuses.append(type(error).__name__)
            health.append(time.perf_counter() - begun)
            rss.append((time.monotonic() - start, process.memory_info().rss))
            time.sleep(HEALTH_EVERY_S)
    queue.put((health, rss, statuses))


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
    try:
        load = Load(found.group(1), psutil.Process(server.pid))
        load.run(60 * arguments.minutes)
        ended: int | str = server.wait(60)
    except subprocess.TimeoutExpired:
        ended = "none within 60 s"
    finally:
        server.kill()
    figures = {"command": sys.argv, **load.figures(60 * arguments.minutes)}
    figures |= {"exit": ended, "engine errors": log.read_text().count("engine")}
    figures["faults"] = faults(load, figures)
    print(json.dumps(figures, indent=1))
    if arguments.out:
        record = {**figures, **provenance()}
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    if figures["faults"]:
        sys.exit("; ".join(figures["faults"]))


def faults(load: Load, figures: dict[str, Any]) -> list[str]:
    """What must not be."""
    rss, p99 = figures["rss_mb"], figures["health_ms"]["p99"]
    checks = {
        f"answers that are wrong: {dict(load.wrong)}": not load.wrong,
        f"/health took {p99:.0f} ms at the 99th percentile": p99 <= 1e3 * MAX_HEALTH_S,
        f"memory grew from {rss['first tenth']:.0f} to {rss['last tenth']:.0f} MB": (
            rss["last tenth"] <= MAX_GROWTH * rss["first tenth"]
        ),
        f"exit code {figures['exit']}": figures["exit"] == 0,
        f"{figures['engine errors']} errors of the engine": not figures["engine errors"],
    }
    return [told for told, is_right in checks.items() if not is_right]


if __name__ == "__main__":
    main()
