"""Owns the start and end of a run: it opens a new folder, resumes or refuses one, and writes its manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.config import Run, read_run_folder, run_as_yaml
from halfbyte.data.ledger import Ledger
from halfbyte.data.prepared import Prepared
from halfbyte.data.questions import MAX_KEPT_ROWS
from halfbyte.data.render import Renderer
from halfbyte.errors import RunError
from halfbyte.host import is_main_process, num_processes
from halfbyte.model.adapter import save_adapter
from halfbyte.model.identity import check_same_base
from halfbyte.model.load import vision_modules
from halfbyte.model.resolve import Base
from halfbyte.model.tokenizer import save_tokenizer, tokenizer_sha256
from halfbyte.run_dir import (
    RunDir,
    digests,
    file_sha256,
    move_aside,
    provenance,
    replace_folder,
    write_jsonl,
    write_text,
)
from halfbyte.train.branch import branch, source_folder
from halfbyte.train.checkpoints import newest_checkpoint, step_of
from halfbyte.train.settings import check_same, settings_of
from halfbyte.train.setup import Setup
from halfbyte.trained.manifest import (
    ComputeDtype,
    Manifest,
    check_adapter_files,
    read_manifest,
)
from halfbyte.trained.reference_logprobs import record_reference_logprobs

if TYPE_CHECKING:
    import torch

NUM_FEWSHOT_POOL = 64
STAGED_ADAPTER = ".adapter"


@dataclass(frozen=True)
class Session:
    """An opened run folder.

    Attributes:
        run: the config; where it says ``auto``, steps are split as in the previous attempt.
        folder: the run folder.
        resume: the checkpoint to continue from.
        finished: whether the run is already trained.
        is_main: whether this process is the one that writes.
        started: when this attempt began, as a ``time.time`` value.
        opening: what is done with the run folder, in words.
        earlier: the manifest of the attempt that ``resume`` continues.
        began: that, or the manifest of the run that ``train.resume_from`` comes from.
    """

    run: Run
    folder: RunDir
    resume: Path | None
    finished: bool
    is_main: bool
    started: float
    opening: str
    earlier: Manifest | None
    began: Manifest | None

    def say(self, *lines: str) -> None:
        """Print non-empty lines, from the main process only."""
        for line in filter(None, lines if self.is_main else ()):
            print(line)

    def passed(self, what: str, how: str) -> None:
        """Print a line of the list of what is in order, where nothing but that list is wanted."""
        if self.run.train.preflight_only:
            self.say(f"ok  {what:<12}{how}")

    @property
    def next_commands(self) -> str:
        """The commands to run once training is finished."""
        path = self.folder.path
        return f"next: halfbyte merge {path}\n      halfbyte compare {path}"

    @property
    def resume_step(self) -> int:
        """The number of steps that are already done."""
        return step_of(self.resume) if self.resume else 0


def open_session(run: Run) -> Session:
    """Create the run folder, or find where an earlier run with the same settings stopped.

    Raises:
        RunError: the folder belongs to a run with different settings, its adapter or all of its checkpoints are
            damaged, or another number of processes began it.
    """
    folder = RunDir(Path(run.runs_dir) / str(run.name))
    is_main, only_looks = is_main_process(), run.train.preflight_only
    resume: Path | None = None
    finished = False
    earlier = began = None
    opening = f"{folder.path} is new"
    if folder.config.is_file() and run.train.existing == "replace":
        opening = f"{folder.path} holds an earlier run, which is moved aside"
        if is_main and not only_looks:
            print(f"moved the earlier run to {move_aside(folder.path)}")
    elif folder.config.is_file():
        resume, finished, began = _where_it_stopped(folder)
        if resume or finished:
            run, earlier = _on_its_day(run, folder), began
            check_same(run, folder)
            opening = f"{folder.path} goes on from {resume.name}, which is whole" if resume else ""
    if only_looks and not finished:
        folder = _look_elsewhere(run, folder, is_main=is_main)
    if not (resume or finished):
        if run.train.resume_from is not None:
            source = source_folder(run)
            run = _on_its_day(run, source)
            if is_main:
                branch(run, folder, settings_of(run), settings_of(read_run_folder(source.path)))
            began = read_manifest(source)
            resume = folder.checkpoints / Path(str(run.train.resume_from)).name
        run = _on_day(run, run.data.date or date.today())
    if is_main and not (finished and only_looks):
        folder.path.mkdir(parents=True, exist_ok=True)
        # What is gone on with from this file is neither replaced nor only looked at.
        goes_on = {"preflight_only": False, "existing": "resume"}
        train = run.train.model_copy(update=goes_on)
        write_text(folder.config, run_as_yaml(run.model_copy(update={"train": train})))
    run, now = _as_before(run, earlier), time.time()
    return Session(run, folder, resume, finished, is_main, now, opening, earlier, began)


def _where_it_stopped(folder: RunDir) -> tuple[Path | None, bool, Manifest | None]:
    """Return the checkpoint that an earlier run goes on from, whether it is finished, and what it recorded if not."""
    manifest = read_manifest(folder)
    if manifest is not None and manifest.finished:
        check_adapter_files(folder, manifest)
        return None, True, None
    resume = newest_checkpoint(folder.checkpoints, num_processes())
    return resume, False, manifest if resume else None


def preflight_folder(run: Run) -> RunDir:
    """Return the folder in which a run is only looked at, beside its own."""
    return RunDir(Path(run.runs_dir) / f".preflight-{run.name}")


def _look_elsewhere(run: Run, folder: RunDir, *, is_main: bool) -> RunDir:
    """Empty the folder for looking at a run, but for the ledger of the run that goes on."""
    elsewhere = preflight_folder(run)
    if is_main:
        shutil.rmtree(elsewhere.path, ignore_errors=True)
        elsewhere.path.mkdir(parents=True)
        if folder.ledger.is_file() and run.train.existing == "resume":
            shutil.copyfile(folder.ledger, elsewhere.ledger)
    return elsewhere


def check_base(session: Session, base: Base) -> None:
    """Check that a resumed run continues with the base that it started with.

    Raises:
        RunError: the base has changed.
    """
    if session.began is not None:
        check_same_base(
            session.began.base,
            base.identity,
            f"{session.folder.path}: began with",
            "Pin model.revision, or start over with train.existing=replace",
        )


def check_renderer(session: Session, renderer: Renderer) -> None:
    """Check that a resumed run renders rows with the tokenizer and the template that it started with.

    Raises:
        RunError: one of them has changed.
    """
    before = session.began
    if before is None:
        return
    for what, was, now in (
        ("chat template", before.chat_template_sha256, renderer.template_sha256),
        ("tokenizer", before.tokenizer_sha256, tokenizer_sha256(renderer.tokenizer)),
    ):
        if was not in (None, now):
            raise RunError(
                f"{session.folder.path}: the {what} has changed since this run began, so that the rest of it would be"
                " trained on other tokens. Put it back, or start over with train.existing=replace"
            )


def record_data(session: Session, prepared: Prepared) -> None:
    """Write the ledger, the held-out rows and a pool of few-shot examples into the run folder.

    Raises:
        RunError: the data of a resumed run differ from those that it started with.
    """
    folder = session.folder
    if session.resume and folder.ledger.is_file():
        earlier = Ledger.read(folder.ledger)
        if earlier.fingerprints != prepared.ledger.fingerprints:
            raise RunError(
                f"{folder.path}: the data has changed since this run began; train.existing=replace starts"
                " over"
            )
        now = prepared.ledger
        if (earlier.trained, earlier.held_out, earlier.tokens) != (
            now.trained,
            now.held_out,
            now.tokens,
        ):
            raise RunError(
                f"{folder.path}: this version of halfbyte splits or renders the rows otherwise than the one"
                " that began this run; finish it with that version, or start over with"
                " train.existing=replace"
            )
    if not session.is_main:
        return
    for name in ("validation", "test"):
        rows = getattr(prepared, name)
        write_jsonl(folder.data / f"{name}.jsonl", (row.as_json() for row in rows.rows()))
    kept = [row.as_json() for row in prepared.train.rows_by_digest(MAX_KEPT_ROWS)]
    write_jsonl(folder.data / "train.jsonl", kept)
    write_jsonl(folder.data / "fewshot.jsonl", kept[:NUM_FEWSHOT_POOL])
    files = {"files_sha256": digests(folder.data)}
    prepared.ledger.model_copy(update=files).write(folder.ledger)


def write_manifest(session: Session, setup: Setup, numbers: dict[str, Any]) -> None:
    """Write the run's provenance and cost to its manifest, from the main process only.

    Args:
        session: the opened run folder.
        setup: the setup of the training.
        numbers: further fields of ``Manifest``, including ``finished`` once the adapter is saved.
    """
    if not session.is_main:
        return
    loaded, renderer, finished = setup.loaded, setup.renderer, numbers.get("finished", False)
    before_s = session.earlier.seconds if session.earlier else 0.0
    Manifest(
        name=str(setup.run.name),
        base=loaded.base.identity,
        model_class=type(loaded.model).__name__,
        text_only=loaded.text_only,
        vision_modules=len(vision_modules(loaded.model)),
        precision=str(loaded.precision),
        compute_dtype=ComputeDtype(name=loaded.compute.name, why=loaded.compute.reason),
        device=str(loaded.compute.device),
        chat_template_sha256=renderer.template_sha256,
        tokenizer_sha256=tokenizer_sha256(renderer.tokenizer),
        stop_ids=renderer.stop_ids,
        bos_per_row=1 if renderer.has_bos else 0,
        seconds=round(time.time() - session.started + before_s, 1),
        adapter_sha256=digests(session.folder.adapter) if finished else None,
        ledger_sha256=file_sha256(session.folder.ledger) if finished else None,
        **numbers,
        **provenance(),
    ).write(session.folder.manifest)


def save_trained(
    session: Session, setup: Setup, last_logits: Callable[[list[int]], torch.Tensor]
) -> None:
    """Write the adapter, its tokenizer, and reference log-probabilities after a few prompts.

    Only the main process writes; the others hold the same adapter. The folder has its name once it is whole.

    Args:
        session: the opened run folder.
        setup: the setup of the training.
        last_logits: returns the trained model's logits (V,) after the given token ids.
    """
    if not session.is_main:
        return
    folder, staged = session.folder, session.folder.path / STAGED_ADAPTER
    if staged.exists():
        shutil.rmtree(staged)
    save_adapter(setup.model, setup.loaded, staged, folder.path)
    save_tokenizer(setup.renderer.tokenizer, staged)
    rows = (example.row for example in setup.held_out or setup.train)
    record_reference_logprobs(last_logits, setup.renderer, rows, staged)
    replace_folder(staged, folder.adapter)


def _as_before(run: Run, earlier: Manifest | None) -> Run:
    """Return the run with its ``auto`` settings for splitting steps as in the previous attempt.

    A resumed run therefore repeats the stopped one, however much memory is free now.
    """
    plan = earlier.memory if earlier else None
    if plan is None:
        return run
    settled: dict[str, Any] = {}
    if run.train.micro_batch_size == "auto":
        settled["micro_batch_size"] = plan["micro_batch_size"]
    if run.train.checkpointing == "auto":
        settled["checkpointing"] = plan["checkpointing"]
    return run.model_copy(update={"train": run.train.model_copy(update=settled)})


def _on_day(run: Run, day: date | None) -> Run:
    """Return the run with the day that its chat template is told for today."""
    return run.model_copy(update={"data": run.data.model_copy(update={"date": day})})


def _on_its_day(run: Run, folder: RunDir) -> Run:
    """Return the run with the day on which its training began, unless the config names one."""
    if run.data.date is not None:
        return run
    return _on_day(run, read_run_folder(folder.path).data.date)
