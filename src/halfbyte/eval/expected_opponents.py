"""Owns the opponents that a comparison will have, known from its rows before anything is trained."""

from __future__ import annotations

from halfbyte.config import Run
from halfbyte.data.prepared import Prepared
from halfbyte.data.questions import MAX_KEPT_ROWS, questions
from halfbyte.data.render import Renderer
from halfbyte.eval.base_opponents import base_opponents
from halfbyte.eval.likeness import Examples, Likeness, is_closed_set, is_copied
from halfbyte.eval.opponents import opponent_names
from halfbyte.eval.variants import asks_base
from halfbyte.scoring.rows import LOSS_METRIC


def expected_opponents(prepared: Prepared, renderer: Renderer, run: Run, context: int) -> str:
    """Return what kind of answers the rows have, and the opponents with the tokens that the base reads.

    Args:
        prepared: the rows of the config.
        renderer: of the run.
        run: the config.
        context: the most tokens that the base reads.
    """
    known = [row for row in prepared.train.rows_by_digest(MAX_KEPT_ROWS) if row.text is None]
    held_out = prepared.test if len(prepared.test) else prepared.validation
    held = [row for row in held_out.rows_by_digest(run.eval.rows) if row.text is None]
    if not known or not held or run.eval.metrics[0] == LOSS_METRIC:
        return "none: they need training rows and held-out rows with answers, and a metric that scores answers"
    likeness = Likeness(Examples.of(known, renderer), Examples.of(held, renderer))
    answers = likeness.known.answers
    kind = f"a closed set of {len(set(answers))}" if is_closed_set(answers) else "free"
    if is_copied(likeness.known):
        kind += ", spans of their prompts"
    counted, left_out = opponent_names(likeness, run)
    lines = [f"answers: {kind}", f"without a model: {', '.join(counted) or 'none'}", *left_out]
    if asks_base(run):
        plain = questions(held, renderer)
        with_base, left_out = base_opponents(likeness, plain, renderer, run, context)
        lines += [
            f"the variants read {sum(len(one.ids) for one in plain):,} tokens each",
            *(f"{one.name}: about {one.num_tokens:,} tokens ({one.what})" for one in with_base),
            *left_out,
        ]
    return "\n".join(lines)
