"""Owns the proof that a chat template only copies contents, so that it need not run for each row.

Where a template takes decisions by the roles and the number of turns alone, and writes each content
as it is or with its ends trimmed, the text of a row is that of any row with the same roles, with its
own contents put in. The proof reads the template's syntax tree; what it does not know is no copy.
"""

from __future__ import annotations

from jinja2 import Environment, TemplateSyntaxError, nodes

# What an expression can hold. ``text`` has contents joined to other text, ``content`` is one alone.
PLAIN, CONTENT, TEXT, MESSAGE, MESSAGES, LOOP = (
    "plain",
    "content",
    "text",
    "message",
    "messages",
    "loop",
)
WRITTEN = (PLAIN, CONTENT, TEXT)
# True or false by the type alone; every content is a str.
TYPE_TESTS = ("defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number")
LOOP_FACTS = ("first", "last", "index", "index0", "revindex", "revindex0", "length")
FUNCTIONS = ("range", "namespace", "raise_exception")
# What a template may call besides, by any name: the clock, chance, and things with a memory.
UNKNOWN = ("strftime_now", "lipsum", "cycler", "joiner", "dict")
MAX_PASSES = 16


class _NotCopiedError(Exception):
    """The template may look into a content."""


def only_copies(template: str) -> bool:
    """Whether a chat template provably writes contents as they are or trimmed, and asks only for roles.

    It may not read the clock, draw random numbers or look at a content in any way. The messages are
    dicts of ``role`` and ``content``, both str.
    """
    # As transformers sets it up; its generation tag is unknown here, and so no copy.
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        tree = environment.parse(template)
    except TemplateSyntaxError:
        return False
    reader = _Reader()
    try:
        for _ in range(MAX_PASSES):
            before = dict(reader.names)
            reader.run(tree.body)
            if reader.names == before:
                return True
    except _NotCopiedError:
        return False
    return False


class _Reader:
    """Walks a template; ``names`` says what each name holds at most, wherever it was set."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {"messages": MESSAGES, "loop": LOOP}

    def run(self, body: list[nodes.Node]) -> None:
        for node in body:
            self._statement(node)

    def _statement(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.Output):
            for part in node.nodes:
                self._need(part, WRITTEN)
        elif isinstance(node, nodes.If) and self._is_string_test(node.test):
            self.run(node.body)
        elif isinstance(node, nodes.If):
            self._condition(node.test)
            self.run([*node.body, *node.elif_, *node.else_])
        elif isinstance(node, nodes.For):
            if node.recursive or node.test is not None:
                raise _NotCopiedError
            item = {MESSAGES: MESSAGE, PLAIN: PLAIN}.get(self._kind(node.iter))
            if item is None:
                raise _NotCopiedError
            self._assign(node.target, item)
            self.run([*node.body, *node.else_])
        elif isinstance(node, nodes.Assign):
            self._assign(node.target, self._kind(node.node))
        elif not isinstance(node, (nodes.Break, nodes.Continue)):
            raise _NotCopiedError

    def _assign(self, target: nodes.Node, kind: str) -> None:
        if isinstance(target, nodes.Name) and target.name != "loop" and kind != LOOP:
            self.names[target.name] = _join(self.names.get(target.name, kind), kind)
        elif kind != PLAIN or not isinstance(target, nodes.NSRef):
            raise _NotCopiedError

    def _is_string_test(self, node: nodes.Node) -> bool:
        """``content is string``, which is always true here."""
        if not isinstance(node, nodes.Test) or node.name != "string":
            return False
        return self._kind(node.node) in (CONTENT, TEXT)

    def _condition(self, node: nodes.Node) -> None:
        self._need(node, (PLAIN, MESSAGE, MESSAGES))

    def _need(self, node: nodes.Node, kinds: tuple[str, ...]) -> str:
        kind = self._kind(node)
        if kind not in kinds:
            raise _NotCopiedError
        return kind

    def _kind(self, node: nodes.Node) -> str:  # noqa: C901, PLR0911 (one case a kind of node)
        match node:
            case nodes.Const() | nodes.TemplateData():
                return PLAIN
            case nodes.Name():
                return self._named(node.name)
            case nodes.Getitem():
                return self._item(node)
            case nodes.Getattr():
                return self._field(self._kind(node.node), node.attr)
            case nodes.Filter():
                return self._filter(node)
            case nodes.Test():
                return self._test(node)
            case nodes.Call():
                return self._call(node)
            case nodes.Add() | nodes.Concat():
                parts = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
                kinds = {self._need(part, WRITTEN) for part in parts}
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

    def _named(self, name: str) -> str:
        if name in UNKNOWN:
            raise _NotCopiedError
        return self.names.get(name, PLAIN)

    def _all_plain(self, node: nodes.Node) -> str:
        """Every expression within ``node`` is plain."""
        for part in node.iter_child_nodes():
            if isinstance(part, (nodes.Operand, nodes.Pair, nodes.Keyword)):
                self._all_plain(part)
            else:
                self._need(part, (PLAIN,))
        return PLAIN

    def _item(self, node: nodes.Getitem) -> str:
        kind = self._kind(node.node)
        if kind == MESSAGES:
            self._need(node.arg, (PLAIN,))
            return MESSAGES if isinstance(node.arg, nodes.Slice) else MESSAGE
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self._field(kind, node.arg.value)
        self._need(node.arg, (PLAIN,))
        if kind != PLAIN:
            raise _NotCopiedError
        return PLAIN

    def _field(self, kind: str, name: str) -> str:
        """What ``message.name`` or ``loop.name`` is; a key that a dict lacks is undefined."""
        if kind == MESSAGE and name == "content":
            return CONTENT
        if kind == MESSAGE and not hasattr(dict, name):
            return PLAIN
        if kind == PLAIN or (kind == LOOP and name in LOOP_FACTS):
            return PLAIN
        raise _NotCopiedError

    def _filter(self, node: nodes.Filter) -> str:
        if node.node is None or node.name == "random":
            raise _NotCopiedError
        kind = self._kind(node.node)
        bare = not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        if kind == CONTENT and node.name == "trim" and bare:
            return CONTENT
        if kind == MESSAGES and node.name in ("length", "count") and bare:
            return PLAIN
        return self._all_plain(node)

    def _test(self, node: nodes.Test) -> str:
        bare = not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        if node.name in TYPE_TESTS and bare:
            if not isinstance(node.node, nodes.Name):
                self._kind(node.node)
            return PLAIN
        return self._all_plain(node)

    def _call(self, node: nodes.Call) -> str:
        called = node.node
        if isinstance(called, nodes.Name):
            if called.name not in FUNCTIONS or called.name in self.names:
                raise _NotCopiedError
            # A template that raises is run for each row, and tells its own reason.
            return PLAIN if called.name == "raise_exception" else self._all_plain(node)
        if not isinstance(called, nodes.Getattr):
            raise _NotCopiedError
        bare = not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        if called.attr == "strip" and bare and self._kind(called.node) == CONTENT:
            return CONTENT
        return self._all_plain(node)


def _join(one: str, other: str) -> str:
    """What holds either of two kinds."""
    if one == other:
        return one
    if one in WRITTEN and other in WRITTEN:
        return TEXT
    raise _NotCopiedError
