"""Owns which base something belongs to, and whether a base is that one."""

from __future__ import annotations

from halfbyte.errors import RunError
from halfbyte.record import Record, RecordPart

SHOWN_DIGITS = 12  # of a fingerprint, in messages


class BaseIdentity(RecordPart):
    """A base model, wherever it lies.

    Attributes:
        name: as the config wrote it.
        revision: the Hub commit, or None.
        origin: what the weights are, for reports.
        fingerprint: of config and weights; two bases with one fingerprint are the same.
    """

    name: str
    revision: str | None
    origin: str = ""
    fingerprint: str


class AdapterBase(BaseIdentity, Record):
    """``base.json`` beside an adapter: what it was trained on."""

    model_class: str = ""
    precision: str | None = None
    compute_dtype: str = ""


def check_same_base(
    recorded: BaseIdentity, base: BaseIdentity, subject: str, remedy: str = ""
) -> None:
    """Refuse to go on with another base than the recorded one.

    Args:
        recorded: the base that the subject belongs to.
        base: the base that is there now.
        subject: for the message, with what it did: ``runs/x: was trained on``.
        remedy: what to do about it.

    Raises:
        RunError: the fingerprints differ.
    """
    if recorded.fingerprint == base.fingerprint:
        return
    text = f"{subject} the base {_shown(recorded)}, and {_shown(base)} is here now"
    raise RunError(f"{text}. {remedy}" if remedy else text)


def _shown(base: BaseIdentity) -> str:
    return f"{base.name} (fingerprint {base.fingerprint[:SHOWN_DIGITS]})"
