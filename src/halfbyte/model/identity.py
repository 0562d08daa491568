"""Owns the identity of a base: which base something belongs to, and whether another base is the same."""

from __future__ import annotations

from halfbyte.errors import RunError
from halfbyte.record import Record, RecordPart

SHOWN_DIGITS = 12  # digits of a fingerprint shown in messages


class BaseIdentity(RecordPart):
    """A base model, identified independently of its location.

    Attributes:
        name: name of the base in the config.
        revision: the Hub commit, or None.
        origin: a description of the weights, for reports.
        fingerprint: digest of the config, and of headers, beginnings and ends of the weights; quick to compute.
        weights_sha256: digest of all bytes of the weights; "" in files before it was recorded.
    """

    name: str
    revision: str | None
    origin: str = ""
    fingerprint: str
    weights_sha256: str = ""


class AdapterBase(BaseIdentity, Record):
    """``base.json`` beside an adapter, which names the base that it was trained on."""

    model_class: str = ""
    precision: str | None = None
    compute_dtype: str = ""


def check_same_base(
    recorded: BaseIdentity, base: BaseIdentity, subject: str, remedy: str = ""
) -> None:
    """Check that a base is the recorded one.

    Args:
        recorded: the base that the subject belongs to.
        base: the base found now.
        subject: beginning of the message, such as ``runs/x: was trained on``.
        remedy: advice for the message on how to fix it.

    Raises:
        RunError: the fingerprints or the weights differ.
    """
    if recorded.fingerprint == base.fingerprint:
        digests = {recorded.weights_sha256, base.weights_sha256}
        if "" in digests or len(digests) == 1:
            return
        text = f"{subject} the base {_shown(recorded)}, and other weights are in its files now, of the same sizes"
        raise RunError(f"{text}. {remedy or 'Put back the files, or download the base again'}")
    text = f"{subject} the base {_shown(recorded)}, and {_shown(base)} is here now"
    raise RunError(f"{text}. {remedy}" if remedy else text)


def _shown(base: BaseIdentity) -> str:
    return f"{base.name} (fingerprint {base.fingerprint[:SHOWN_DIGITS]})"
