"""Remove each guard in turn, and show that the test that owns it fails: ``python -m mutants`` from tests/.

A mutant is one text of a source file replaced by another. Its test runs against a copy of the project in a forked
child of a process that has the libraries loaded. A mutant whose test still passes has survived, which is an error,
and so is one whose text is no longer there.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("src", "tests", "train", "eval", "data", "configs", "docs", "pyproject.toml", "README.md")
WORKERS = 2
MAX_SECONDS = 180.0  # a test takes seconds; without its guard it may never end
FAILED, HANGS = 1, -1  # of pytest: tests were run, and one failed


@dataclass(frozen=True)
class Mutant:
    """A guard that is removed.

    Attributes:
        guard: what it guards against.
        file: the source file, below ``src/halfbyte``.
        old: the text that is replaced, once in the file.
        new: by what.
        test: the test that must fail, as pytest names it.
    """

    guard: str
    file: str
    old: str
    new: str
    test: str
    hangs: bool = False  # without it the test may not end


CHECKPOINTS, GUARDS, BOUNDS = "test_checkpoints.py", "test_guards.py", "test_bounds.py"
NAMED = f"{GUARDS}::test_what_is_not_finite_is_named_in_its_step_and_never_saved"
STILL = f"{GUARDS}::test_an_adapter_that_stands_still_is_an_error_with_its_cause"
FLIPPED = f"{CHECKPOINTS}::test_every_flipped_bit_of_every_file_is_seen_and_the_one_before_is_taken"
OWN = f"{CHECKPOINTS}::test_a_file_that_is_not_its_own_is_seen"
WORDS = "test_faults.py::test_what_libraries_say_becomes_words"
MUTANTS = (
    # Checkpoints
    Mutant("a changed file of a checkpoint", "train/checkpoints.py", "if file_sha256(path / name) != digest]", "if False]", FLIPPED),
    Mutant("a missing file of a checkpoint", "train/checkpoints.py", '("is missing", seal.sha256.keys() - present)', '("is missing", set())', OWN),
    Mutant("a strange file in a checkpoint", "train/checkpoints.py", "present - seal.sha256.keys())", "set())", f"{CHECKPOINTS}::test_a_strange_file_and_another_name_are_seen"),
    Mutant("a checkpoint of another step", "train/checkpoints.py", "if seal.step != step_of(path):", "if False:", f"{CHECKPOINTS}::test_a_strange_file_and_another_name_are_seen"),
    Mutant("no checkpoint is whole", "train/checkpoints.py", "    if faults:\n", "    if False:\n", f"{CHECKPOINTS}::test_none_whole_is_an_error_that_names_each"),
    Mutant("another number of processes", "train/checkpoints.py", "if seal.processes != processes:", "if False:", f"{CHECKPOINTS}::test_another_number_of_processes_is_refused_by_name"),
    Mutant("other libraries", "train/checkpoints.py", "!= before\n", "!= now\n", f"{CHECKPOINTS}::test_other_libraries_are_told"),
    Mutant("rotation through a link", "train/checkpoints.py", "        if path.is_symlink():\n            path.unlink()\n        else:\n            shutil.rmtree(path)", "        shutil.rmtree(path.resolve())", f"{CHECKPOINTS}::test_only_the_newest_are_kept_and_links_are_not_followed"),
    Mutant("NaN in what is saved", "train/finite.py", "        if num_bad:\n", "        if False:\n", f"{CHECKPOINTS}::test_nothing_that_is_not_finite_is_saved"),
    Mutant("older ones go last", "train/checkpoints.py", "            commit(written, folder, processes.num_processes)\n            keep_newest(folder, number)\n", "            keep_newest(folder, 0)\n            commit(written, folder, processes.num_processes)\n", f"{CHECKPOINTS}::test_a_kill_at_any_call_of_a_commit_leaves_the_checkpoint_before_or_the_new_one"),
    # The run folder
    Mutant("a digest of the record itself", "record.py", "if digest != _digest(content):", "if False:", "test_manifest.py::test_every_flipped_bit_of_a_manifest_is_seen"),
    Mutant("a changed adapter", "trained/manifest.py", "    check_files(folder.adapter,", "    check_files(folder.adapter, {}, '', '') if folder else check_files(folder.adapter,", "test_manifest.py::test_an_adapter_that_is_not_the_one_that_was_trained_is_refused"),
    Mutant("a file that differs from its report", "run_dir.py", "if not path.is_file() or file_sha256(path) != digest:", "if not path.is_file():", "test_manifest.py::test_an_adapter_that_is_not_the_one_that_was_trained_is_refused"),
    Mutant("a second writer", "run_lock.py", "if isinstance(error, Timeout):", "if False:", "test_run_lock.py::test_a_second_writer_is_refused_by_name_until_the_first_has_ended"),
    Mutant("a link out of the run folder", "run_lock.py", "if path.is_symlink() and", "if False and", "test_run_lock.py::test_a_link_out_of_the_folder_is_refused_and_one_within_is_not"),
    Mutant("a place that cannot be written", "run_lock.py", 'in UNWRITABLE:', "in ():", "test_run_lock.py::test_a_place_that_cannot_be_written_is_said_before_anything_else"),
    Mutant("a write is atomic", "run_dir.py", "        os.replace(temporary, path)\n", "        path.write_bytes(content)\n", "test_run_dir.py::test_write_text_never_shows_a_part_when_the_file_is_read_meanwhile"),
    Mutant("a full disk is no disk without a flush", "run_dir.py", "if error.errno not in NO_FLUSH:", "if False:", "test_run_dir.py::test_a_full_disk_is_not_taken_for_one_without_a_flush"),
    Mutant("other settings in a run folder", "train/settings.py", "    if changed:\n", "    if False:\n", "test_session.py::test_open_session_is_refused_with_key_and_both_values_when_a_setting_changed"),
    Mutant("a file that cannot be replaced", "run_lock.py", "if not (path.is_symlink() or _can_be_replaced(path)):", "if False:", "test_preflight.py::test_an_immutable_file_is_found_before_anything_else"),
    Mutant("a disk without room", "train/room.py", "    if number in FULL:", "    if False:", "test_preflight.py::test_a_disk_without_room_for_all_checkpoints_is_an_error_before_step_one"),
    Mutant("a checkpoint that is read back otherwise", "train/rehearsal.py", "fault_of(written) or saved_difference(trainer.model, written)", "fault_of(written)", "test_preflight.py::test_a_checkpoint_that_differs_from_memory_is_an_error_before_step_one"),
    Mutant("going on does not replace", "train/session.py", '"existing": "resume"}', "}", "test_preflight.py::test_what_goes_on_from_a_run_that_replaced_another_does_not_replace_it"),
    Mutant("an adapter that predicts otherwise", "trained/reference_logprobs.py", "    if not miss <= allowed:", "    if False:", "test_merge.py::test_an_adapter_that_predicts_otherwise_than_when_it_was_trained_is_not_merged"),
    Mutant("a byte of the base", "model/identity.py", 'if "" in digests or len(digests) == 1:', "if True:", "test_model.py::test_a_byte_in_the_middle_of_the_base_is_part_of_its_identity"),
    Mutant("another base", "model/identity.py", "if recorded.fingerprint == base.fingerprint:", "if True:", "test_adapter.py::test_adapter_on_another_base_is_refused"),
    # Numbers
    Mutant("NaN in a loss or a gradient", "train/guards.py", "            finite = finite & torch.isfinite(self.training.gradient_norm)\n", "            pass\n", f"{NAMED}[gradient]"),
    Mutant("NaN after a step", "train/guards.py", "        finite = all_finite([*self.training.trained, *optimizer_states(optimizer)])\n", "        finite = torch.tensor(True)\n", f"{NAMED}[first moment]"),
    Mutant("NaN in a state alone", "train/guards.py", "[*self.training.trained, *optimizer_states(optimizer)]", "[*self.training.trained]", f"{NAMED}[second moment]"),
    Mutant("the base is named", "train/diagnosis.py", "((False, \"the base's\"), (True, \"the adapter's\"))", "((True, \"the adapter's\"),)", f"{NAMED}[base]"),
    Mutant("the rows are named", "train/diagnosis.py", "if not math.isfinite(_loss(training, number))]", "if False]", f"{NAMED}[activation]"),
    Mutant("the base before step 1", "train/preflight.py", "        if not math.isfinite(value):\n", "        if False:\n", "test_training.py::test_not_finite_loss_is_an_error_before_step_one"),
    Mutant("an adapter without gradient", "train/preflight.py", '        elif "lora_B" in name and not gradient.abs().max() > 0:', "        elif False:", "test_training.py::test_check_before_step_one_names_an_adapter_that_cannot_learn"),
    Mutant("NaN is no number to record", "train/tracking.py", "        if bad:\n", "        if False:\n", "test_training.py::test_nan_is_never_written_as_a_number"),
    Mutant("an adapter that stands still", "train/learning.py", "if change is not None and change < LEAST_CHANGE:", "if False:", f"{STILL}[alpha]"),
    Mutant("gradients of zero", "train/learning.py", "int(self.num_still) >= MAX_STILL_STEPS", "False", f"{GUARDS}::test_gradients_of_zero_are_an_error_after_three_steps"),
    Mutant("a step without labels", "train/guards.py", "    if not divisor:\n", "    if False:\n", f"{GUARDS}::test_a_step_without_a_weight_is_an_error_with_its_rows"),
    Mutant("a damaged checkpoint to go on from", "train/branch.py", "    if fault:\n", "    if False:\n", "test_branch.py::test_a_damaged_checkpoint_is_refused"),
    Mutant("a setting that a checkpoint depends on", "train/branch.py", "    if fixed:\n", "    if False:\n", "test_branch.py::test_what_the_checkpoint_depends_on_is_refused"),
    Mutant("the new rate is used", "train/branch.py", "initial_lr=rate, lr=now, ", "", "test_branch.py::test_same_settings_repeat_the_run_and_others_change_only_what_follows"),
    # What comes from elsewhere
    Mutant("the size of a file", "bounds.py", "if about.st_size > max_bytes:", "if False:", f"{BOUNDS}::test_a_file_of_the_allowed_size_is_read_and_a_larger_one_is_not"),
    Mutant("deep JSON", "bounds.py", "    except RecursionError:\n", "    except ZeroDivisionError:\n", f"{BOUNDS}::test_deep_json_is_an_error_with_its_file"),
    Mutant("the memory of a template", "bounds.py", "(limit, hard))", "(soft, hard))", f"{BOUNDS}::test_time_and_memory_of_a_block_are_bounded_and_given_back"),
    Mutant("a template that was slow to compile", "bounds.py", "seconds, seconds / 4)", "seconds)", f"{BOUNDS}::test_a_template_without_end_is_an_error_within_seconds", hangs=True),
    Mutant("a long template", "data/chat_template.py", "if len(self.source) > MAX_TEMPLATE_CHARS:", "if False:", f"{BOUNDS}::test_a_long_template_is_refused"),
    Mutant("aliases that grow", "config/source.py", "if source.num_values > MAX_VALUES:", "if False:", f"{BOUNDS}::test_a_config_that_grows_is_refused[aliases]", hangs=True),
    Mutant("numbers of many digits", "config/source.py", "value.bit_length() > MAX_INT_BITS", "False", f"{BOUNDS}::test_a_config_that_grows_is_refused[digits]"),
    Mutant("a line without end", "data/files.py", "if not others and sum(map(len, parts)) > MAX_ROW_CHARS:", "if False:", f"{BOUNDS}::test_a_line_longer_than_any_row_is_refused_before_it_is_whole"),
    Mutant("counts in a GGUF header", "llamacpp/gguf_header.py", "if number * item_bytes > os.fstat(file.fileno()).st_size - file.tell():", "if False:", f"{BOUNDS}::test_a_gguf_header_that_claims_more_than_the_file_has_is_broken[key]"),
    Mutant("nested arrays in a GGUF header", "llamacpp/gguf_header.py", "if depth == MAX_DEPTH:", "if False:", f"{BOUNDS}::test_a_gguf_header_that_claims_more_than_the_file_has_is_broken[nested]"),
    Mutant("the header of weights", "model/untrusted.py", "if size > min(MAX_HEADER_BYTES, path.stat().st_size):", "if False:", f"{BOUNDS}::test_weights_that_are_not_whole_are_refused"),
    Mutant("the sizes of a model", "model/untrusted.py", "and not 0 <= value <= most:", "and False:", f"{BOUNDS}::test_a_size_beyond_any_model_is_refused"),
    # The machine
    Mutant("errors of libraries in Rust", "faults.py", "number = int(quoted.group(1) or quoted.group(2))", "number = None", WORDS),
    Mutant("errors of PyTorch's files", "faults.py", "if any(part in text for part in SHORT_WRITES):", "if False:", WORDS),
    Mutant("what is whole is said", "run_lock.py", "            error.add_note(what_is_safe(folder))\n", "            pass\n", "test_faults.py::test_a_full_disk_in_a_run_ends_with_what_is_whole"),
    Mutant("fewer processes than wanted", "launch.py", "    if wanted.isdigit() and int(wanted) > num_processes():", "    if False:", "test_launch.py::test_fewer_processes_than_wanted_and_threads_that_were_chosen_are_seen"),
    Mutant("a step that takes too long", "train/watchdog.py", "if now < max(LEAST_S, TIMES * usual):", "if True:", f"{GUARDS}::test_a_step_that_takes_far_longer_than_those_before_is_said_once"),
    Mutant("SIGTERM", "errors.py", "        signal.signal(signal.SIGTERM, end)\n", "        pass\n", "test_faults.py::test_a_signal_ends_any_script_with_its_code_and_cleans_up"),
    Mutant("a signal saves the step", "train/stops.py", "            control.should_save = control.should_training_stop = True\n", "            control.should_training_stop = True\n", "test_stops.py::test_a_signal_saves_the_step_and_the_run_goes_on_exactly"),
    Mutant("a full queue to W&B", "tracking.py", "        except queue.Full:\n", "        except ZeroDivisionError:\n", "test_wandb_process.py::test_a_frozen_process_costs_two_seconds_and_drops_what_does_not_fit"),
    Mutant("a W&B that hangs", "tracking.py", "                other.wait(left_s)\n", "                other.wait(30)\n", "test_wandb_process.py::test_a_frozen_process_costs_two_seconds_and_drops_what_does_not_fit"),
)  # fmt: skip


def main() -> None:
    """Try all mutants, and fail if one survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="those whose guard has this text")
    parser.add_argument("--list", action="store_true", help="print them as a table, and stop")
    arguments = parser.parse_args()
    wanted = arguments.only
    if arguments.list:
        print(as_markdown(), end="")
        return
    chosen = [mutant for mutant in MUTANTS if wanted in mutant.guard]
    _load_libraries()
    begun = time.monotonic()
    running: dict[int, tuple[Mutant, Path, float]] = {}
    survived: list[str] = []
    for mutant in [*chosen, *[None] * WORKERS]:
        if mutant is None or len(running) == WORKERS:
            if not running:
                continue
            child, code = _wait(running)
            done, folder, _ = running.pop(child)
            shutil.rmtree(folder)
            is_killed = code == FAILED or (code == HANGS and done.hangs)
            how = "killed  " if is_killed else f"SURVIVED ({code})"
            print(f"{how} {done.guard}: {done.test}", flush=True)
            survived += [] if is_killed else [done.guard]
        if mutant is not None:
            folder = Path(tempfile.mkdtemp(prefix="mutant-"))
            running[_start(mutant, folder)] = (mutant, folder, time.monotonic())
    print(
        f"{len(chosen) - len(survived)} of {len(chosen)} killed in {time.monotonic() - begun:.0f} s"
    )
    raise SystemExit(bool(survived))


def _wait(running: dict[int, tuple[Mutant, Path, float]]) -> tuple[int, int]:
    """Wait for a child; return it with its exit code, or HANGS for one that was ended after its time."""
    while True:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            return child, os.waitstatus_to_exitcode(status)
        for child, (_, _, begun) in running.items():
            if time.monotonic() - begun > MAX_SECONDS:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return child, HANGS
        threading.Event().wait(0.05)


def as_markdown() -> str:
    """Return the table of all mutants for docs/guarantees.md."""
    lines = ["| guard that is removed | file | test that goes red |", "| --- | --- | --- |"]
    lines += [f"| {m.guard} | `{m.file}` | `{m.test.partition('[')[0]}` |" for m in MUTANTS]
    return "\n".join(lines) + "\n"


def _load_libraries() -> None:
    """Import what the tests need, except for halfbyte itself."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    torch.set_num_threads(1)
    assert not any(name.startswith("halfbyte") for name in sys.modules)


def _start(mutant: Mutant, folder: Path) -> int:
    """Fork a child that runs the test on a copy of the project without the guard."""
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, folder / name)
    path = folder / "src" / "halfbyte" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.guard}: {text.count(mutant.old)} times in {mutant.file}: {mutant.old!r}"
        )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.chdir(folder)
        sys.path[:0] = [str(folder / "src"), str(folder / "tests")]
        os.environ["PYTHONPATH"] = str(folder / "src")
        sink = io.StringIO()
        with redirect_stdout(sink), redirect_stderr(sink):
            import pytest

            code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"tests/{mutant.test}"]))
        if code != 1:
            print(sink.getvalue()[-2000:], file=sys.__stderr__)
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
