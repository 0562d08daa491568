"""Owns a training from its config to its adapter: everything that can fail is tried before the first step."""

from __future__ import annotations

import shutil

from halfbyte.config import Run
from halfbyte.data.prepare import prepare
from halfbyte.data.prepared import Prepared
from halfbyte.data.preview import show_ledger, show_tokens
from halfbyte.data.render import Renderer, renderer_of
from halfbyte.host import is_main_process
from halfbyte.model.adapter import describe_model
from halfbyte.model.resolve import Base, resolve_base
from halfbyte.model.tokenizer import load_tokenizer
from halfbyte.plan.devices import this_machine
from halfbyte.plan.gate import check_weights
from halfbyte.tracking import outlook
from halfbyte.train.arguments import describe_schedule
from halfbyte.train.probe import first_look
from halfbyte.train.rehearsal import RehearsedError
from halfbyte.train.room import make_sure_of_room
from halfbyte.train.session import (
    Session,
    check_base,
    check_renderer,
    open_session,
    preflight_folder,
    record_data,
    save_trained,
    write_manifest,
)
from halfbyte.train.setup import Setup, set_up
from halfbyte.train.stops import train_until_stopped
from halfbyte.train.tracking import tracked
from halfbyte.train.trainer import build_trainer


def train(run: Run) -> Session:
    """Train a run, whose folder nobody else writes meanwhile, and return its session.

    With ``train.preflight_only`` all that precedes the first step is done and listed, and nothing is kept of it.

    Raises:
        UserError: config, rows, model, place or machine have a fault, or a signal stopped the training.
    """
    device = this_machine()
    check_weights(run, device)
    try:
        session = open_session(run)
        if session.finished:
            path = session.folder.path
            session.say(f"{path} is trained already; train.existing=replace starts over")
            session.say(session.next_commands)
        else:
            session.passed("config", "no fault, and no secret in it")
            session.passed("folder", f"{session.opening}; nobody else writes there")
            base, renderer, prepared = _read(session)
            scratch = session.folder.path
            setup = set_up(
                session.run, base, renderer, prepared, device, scratch, is_main=session.is_main
            )
            _train(session, setup)
    finally:
        if run.train.preflight_only and is_main_process():
            shutil.rmtree(preflight_folder(run).path, ignore_errors=True)
    return session


def _read(session: Session) -> tuple[Base, Renderer, Prepared]:
    """Find the base, and read and render the rows."""
    run = session.run
    base = resolve_base(run.model.name, run.model.revision, run.data.new_tokens)
    check_base(session, base)
    renderer = renderer_of(run.data, load_tokenizer(base))
    check_renderer(session, renderer)
    session.passed("template", _stops(renderer))
    prepared = prepare(run.data, renderer, run.seed)
    record_data(session, prepared)
    session.say(show_ledger(prepared), show_tokens(renderer))
    session.passed("rows", f"{len(prepared.train)} to train on")
    return base, renderer, prepared


def _train(session: Session, setup: Setup) -> None:
    """Record where everything comes from, look at the first step, train and save."""
    run, folder, say, passed = session.run, session.folder, session.say, session.passed
    say(setup.summary, describe_model(setup.loaded, setup.model))
    write_manifest(session, setup, setup.as_json())
    passed("plan", setup.summary.removeprefix("plan: ") or "left out, as train.ignore_plan says")
    passed("base", f"{setup.loaded.base.name}: all of its bytes are known")
    room = make_sure_of_room(setup, folder.path, session.resume_step) if session.is_main else ""
    passed("disk", room)
    with tracked(run, session) as tracker:
        passed("schedule", describe_schedule(run, len(setup.train)))
        if run.train.preflight_only and session.is_main:  # the server is waited for
            passed("W&B", outlook(run))
        trainer = build_trainer(setup, folder.checkpoints, tracker)
        report, memory = first_look(trainer, setup)
        say(report)
        passed("first step", "finite, and each adapter weight gets a gradient")
        how = "all steps are done"
        try:
            train_until_stopped(trainer, session)
        except RehearsedError as rehearsed:
            how = str(rehearsed)
        if run.train.preflight_only:
            passed("checkpoint", how)
            say("nothing was trained; without train.preflight_only the training starts")
            return
        save_trained(session, setup, trainer.last_logits)
        numbers = trainer.numbers() | memory
        where = tracker.where if tracker else ""
        write_manifest(session, setup, numbers | {"finished": True, "wandb": where})
    say(f"trained: {folder.path}\n  adapter  {folder.adapter}\n  numbers  {folder.metrics}")
    say(f"  W&B      {where}", session.next_commands)


def _stops(renderer: Renderer) -> str:
    tokens = renderer.tokenizer.convert_ids_to_tokens(renderer.stop_ids)
    return f"answers end at {' or '.join(tokens)}"
