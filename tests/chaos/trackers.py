"""W&B that is unreachable, silent, wrong or broken: the training ends well, no later, with every step on disk."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from waiting import wait_until

from chaos.farm import Ended, start, wait
from chaos.outcome import Case
from chaos.scene import OFFLINE, STEPS, Scene, difference, learnt, train

KIND = "W&B"
KEY = "5e" * 20
MAX_ADDED_S = 5.0
Answer = Callable[[socket.socket], None]


def cases(scene: Scene, scale: float) -> Iterator[Case]:
    """Each fault once; the time that it adds is measured against a training without W&B."""
    folder = scene.folder("wandb-none")
    usual = [train(scene.config(folder, name=f"n{n}")).seconds for n in range(2)]
    wanted = learnt(folder / "runs" / "n0")
    for name, answer in SERVERS.items():
        yield Case(KIND, name, partial(_server, scene, name, answer, max(usual), wanted))
    yield Case(KIND, "its folder is a file", partial(_folder_taken, scene, max(usual), wanted))
    for number in (signal.SIGSTOP, signal.SIGKILL):
        name = f"its process gets {number.name}"
        yield Case(KIND, name, partial(_process, scene, name, number, max(usual), wanted))


def _silence(link: socket.socket) -> None:
    time.sleep(60)


def _say(text: bytes) -> Answer:
    def answer(link: socket.socket) -> None:
        link.recv(65536)
        link.sendall(text)

    return answer


def _drip(link: socket.socket) -> None:
    link.recv(65536)
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + b"{" * 999:
        link.sendall(bytes([byte]))
        time.sleep(1)


def _response(status: str, body: str) -> Answer:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return _say((head + body).encode())


SERVERS: dict[str, Answer | None] = {
    "no server": None,
    "a server that never answers": _silence,
    "a server that answers byte by byte": _drip,
    "a server that closes": lambda link: None,
    "a server with errors 500": _response("500 Internal Server Error", "{}"),
    "a server that is overloaded": _response("429 Too Many Requests", "{}"),
    "a server that refuses the key": _response("401 Unauthorized", '{"errors": ["no"]}'),
    "a server that answers nonsense": _response("200 OK", "<html>hello"),
    "a server that answers other JSON": _response("200 OK", '{"data": {"viewer": 7}}'),
    "a server that speaks no HTTP": _say(b"\0\xff" * 500),
}


def _server(
    scene: Scene, name: str, answer: Answer | None, usual_s: float, wanted: tuple[str, list[object]]
) -> str:
    folder = scene.folder("wandb-" + name.replace(" ", "-"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if answer is None:
            listener.close()
        else:
            threading.Thread(target=_serve, args=(listener, answer), daemon=True).start()
        environ = {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": KEY}
        ended = train(scene.config(folder, track={"wandb": "online"}), environ=environ)
    return _whole(folder, ended, usual_s, wanted)


def _serve(listener: socket.socket, answer: Answer) -> None:
    def one(link: socket.socket) -> None:
        with suppress(OSError), link:
            answer(link)

    with suppress(OSError):
        while True:
            link, _ = listener.accept()
            threading.Thread(target=one, args=(link,), daemon=True).start()


def _folder_taken(scene: Scene, usual_s: float, wanted: tuple[str, list[object]]) -> str:
    folder = scene.folder("wandb-folder-taken")
    (folder / "runs" / "tiny").mkdir(parents=True)
    (folder / "runs" / "tiny" / "wandb").write_text("a file where W&B wants a folder")
    ended = train(scene.config(folder, track={"wandb": "offline"}))
    return _whole(folder, ended, usual_s, wanted)


def _process(
    scene: Scene,
    name: str,
    number: signal.Signals,
    usual_s: float,
    wanted: tuple[str, list[object]],
) -> str:
    folder = scene.folder("wandb-" + name.replace(" ", "-"))
    log = folder / "log"
    config = scene.config(folder, track={"wandb": "offline"})
    child = start("train/sft.py", [config], log=log, environ=OFFLINE)
    metrics = folder / "runs" / "tiny" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.stat().st_size, "no steps")
    workers = _children(child)
    for worker in workers:
        os.kill(worker, number)
    ended = wait(child, log)
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    return ("" if workers else "W&B has no process") or _whole(folder, ended, usual_s, wanted)


def _children(parent: int) -> list[int]:
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(number) for number in listed]


def _whole(folder: Path, ended: Ended, usual_s: float, wanted: tuple[str, list[object]]) -> str:
    if ended.crash or ended.code != 0:
        return ended.crash or f"ended with {ended.code}: {ended.text[-300:]}"
    run_folder = folder / "runs" / "tiny"
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").open(encoding="utf-8")]
    steps = [record["step"] for record in records if "loss" in record]
    if steps != list(range(1, STEPS["max_steps"] + 1)):  # type: ignore[operator]
        return f"metrics.jsonl has the steps {steps}"
    if difference(learnt(run_folder), wanted):
        return difference(learnt(run_folder), wanted)
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        if KEY.encode() in path.read_bytes():
            return f"the key is in {path.relative_to(folder)}"
    added = ended.seconds - usual_s
    return f"took {added:.1f} s longer" if added > MAX_ADDED_S else ""
