"""Owns the proof that a chat template only copies contents, so that it need not run for each row.

If a template decides by the roles and the number of turns alone, and writes each content as it is or
with its ends trimmed, then the text of a row is that of any row with the same roles, with its own
contents put in. The proof walks the template's syntax tree; a construct that it does not know counts
as one that may look into a content.
"""

from __future__ import annotations

from jinja2 import Environment, TemplateSyntaxError, nodes

# What an expression can hold: ``content`` is one message's content alone, ``text`` has contents joined
# to other text, and ``plain`` depends on no content.
PLAIN, CONTENT, TEXT, MESSAGE, MESSAGES, LOOP = (
    "plain",
    "content",
    "text",
    "message",
    "messages",
    "loop",
)
STRING_KINDS = (PLAIN, CONTENT, TEXT)  # what a template may write
# Tests that look at the type alone; every content is a str.
TYPE_TESTS = ("defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number")
LOOP_ATTRIBUTES = ("first", "last", "index", "index0", "revindex", "revindex0", "length")
ALLOWED_FUNCTIONS = ("range", "namespace", "raise_exception")
# Globals that no expression may use: the clock, random text, objects with state, and dict.
FORBIDDEN_NAMES = ("strftime_now", "lipsum", "cycler", "joiner", "dict")
MAX_PASSES = 16


class _NotCopiedError(Exception):
    """The template may look into a content."""


def only_copies(template: str) -> bool:
    """Return whether a chat template provably copies contents, whole or trimmed, and looks only at roles.

    Such a template does not read the clock, draw random numbers or look at a content in any way. The
    messages are dicts of ``role`` and ``content``, both str.
    """
    # Set up as in transformers, but without its generation tag: a template with one fails to parse.
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        tree = environment.parse(template)
    except TemplateSyntaxError:
        return False
    walker = _TemplateWalker()
    try:
        for _ in range(MAX_PASSES):
            before = dict(walker.kinds)
            walker.walk(tree.body)
            if walker.kinds == before:
                return True
    except _NotCopiedError:
        return False
    return False


class _TemplateWalker:
    """Walks a template's syntax tree and keeps track of what its variables can hold.

    Attributes:
        kinds: name of a variable to the most general kind that it is set to anywhere.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {"messages": MESSAGES, "loop": LOOP}

    def walk(self, body: list[nodes.Node]) -> None:
        """Walk some statements.

        Raises:
            _NotCopiedError: one of them may look into a content.
        """
        for node in body:
            self._statement(node)

    def _statement(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.Output):
            for part in node.nodes:
                self._require(part, STRING_KINDS)
        elif isinstance(node, nodes.If) and self._is_string_test(node.test):
            self.walk(node.body)
        elif isinstance(node, nodes.If):
            self._condition(node.test)
            self.walk([*node.body, *node.elif_, *node.else_])
        elif isinstance(node, nodes.For):
            if node.recursive or node.test is not None:
                raise _NotCopiedError
            item_kind = {MESSAGES: MESSAGE, PLAIN: PLAIN}.get(self._kind(node.iter))
            if item_kind is None:
                raise _NotCopiedError
            self._assign(node.target, item_kind)
            self.walk([*node.body, *node.else_])
        elif isinstance(node, nodes.Assign):
            self._assign(node.target, self._kind(node.node))
        elif not isinstance(node, (nodes.Break, nodes.Continue)):
            raise _NotCopiedError

    def _assign(self, target: nodes.Node, kind: str) -> None:
        if isinstance(target, nodes.Name) and target.name != "loop" and kind != LOOP:
            self.kinds[target.name] = _join(self.kinds.get(target.name, kind), kind)
        elif kind != PLAIN or not isinstance(target, nodes.NSRef):
            raise _NotCopiedError

    def _is_string_test(self, node: nodes.Node) -> bool:
        """Return whether the node is ``content is string``, which is always true here."""
        if not isinstance(node, nodes.Test) or node.name != "string":
            return False
        return self._kind(node.node) in (CONTENT, TEXT)

    def _condition(self, node: nodes.Node) -> None:
        self._require(node, (PLAIN, MESSAGE, MESSAGES))

    def _require(self, node: nodes.Node, kinds: tuple[str, ...]) -> str:
        """Return what the expression holds, which must be one of ``kinds``."""
        kind = self._kind(node)
        if kind not in kinds:
            raise _NotCopiedError
        return kind

    def _kind(self, node: nodes.Node) -> str:  # noqa: C901, PLR0911 (one case per kind of node)
        """Return what the expression holds."""
        match node:
            case nodes.Const() | nodes.TemplateData():
                return PLAIN
            case nodes.Name():
                return self._variable(node.name)
            case nodes.Getitem():
                return self._subscript(node)
            case nodes.Getattr():
                return self._attribute(self._kind(node.node), node.attr)
            case nodes.Filter():
                return self._filter(node)
            case nodes.Test():
                return self._test(node)
            case nodes.Call():
                return self._call(node)
            case nodes.Add() | nodes.Concat():
                parts = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
                kinds = {self._require(part, STRING_KINDS) for part in parts}
                return PLAIN if kinds == {PLAIN} else TEXT
            case nodes.CondExpr():
                self._condition(node.test)
                other = PLAIN if node.expr2 is None else self._kind(node.expr2)
                return _join(self._kind(node.expr1), other)
            case nodes.Not():
                self._condition(node.node)
                return PLAIN
            case nodes.Compare() | nodes.BinExpr() | nodes.UnaryExpr() | nodes.List():
                return self._all_plain(node)
            case nodes.Tuple() | nodes.Dict() | nodes.Slice():
                return self._all_plain(node)
        raise _NotCopiedError

    def _variable(self, name: str) -> str:
        if name in FORBIDDEN_NAMES:
            raise _NotCopiedError
        return self.kinds.get(name, PLAIN)

    def _all_plain(self, node: nodes.Node) -> str:
        """Require that every expression within ``node`` is plain."""
        for part in node.iter_child_nodes():
            if isinstance(part, (nodes.Operand, nodes.Pair, nodes.Keyword)):
                self._all_plain(part)
            else:
                self._require(part, (PLAIN,))
        return PLAIN

    def _subscript(self, node: nodes.Getitem) -> str:
        kind = self._kind(node.node)
        if kind == MESSAGES:
            self._require(node.arg, (PLAIN,))
            return MESSAGES if isinstance(node.arg, nodes.Slice) else MESSAGE
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self._attribute(kind, node.arg.value)
        self._require(node.arg, (PLAIN,))
        if kind != PLAIN:
            raise _NotCopiedError
        return PLAIN

    def _attribute(self, kind: str, name: str) -> str:
        """Return what ``message.name`` or ``loop.name`` holds; a key that a dict lacks is undefined."""
        if kind == MESSAGE and name == "content":
            return CONTENT
        if kind == MESSAGE and not hasattr(dict, name):
            return PLAIN
        if kind == PLAIN or (kind == LOOP and name in LOOP_ATTRIBUTES):
            return PLAIN
        raise _NotCopiedError

    def _filter(self, node: nodes.Filter) -> str:
        if node.node is None or node.name == "random":
            raise _NotCopiedError
        kind = self._kind(node.node)
        if kind == CONTENT and node.name == "trim" and not _has_arguments(node):
            return CONTENT
        if kind == MESSAGES and node.name in ("length", "count") and not _has_arguments(node):
            return PLAIN
        return self._all_plain(node)

    def _test(self, node: nodes.Test) -> str:
        if node.name in TYPE_TESTS and not _has_arguments(node):
            if not isinstance(node.node, nodes.Name):
                self._kind(node.node)
            return PLAIN
        return self._all_plain(node)

    def _call(self, node: nodes.Call) -> str:
        function = node.node
        if isinstance(function, nodes.Name):
            if function.name not in ALLOWED_FUNCTIONS or function.name in self.kinds:
                raise _NotCopiedError
            # A template that raises an exception is run for each row, so that the row gets its message.
            return PLAIN if function.name == "raise_exception" else self._all_plain(node)
        if not isinstance(function, nodes.Getattr):
            raise _NotCopiedError
        strips = function.attr == "strip" and not _has_arguments(node)
        if strips and self._kind(function.node) == CONTENT:
            return CONTENT
        return self._all_plain(node)


def _has_arguments(node: nodes.Filter | nodes.Test | nodes.Call) -> bool:
    return bool(node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)


def _join(one: str, other: str) -> str:
    """Return the kind that covers two kinds."""
    if one == other:
        return one
    if one in STRING_KINDS and other in STRING_KINDS:
        return TEXT
    raise _NotCopiedError
