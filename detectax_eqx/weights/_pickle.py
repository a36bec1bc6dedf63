"""A restricted unpickler that never runs code from the file.

A pickle is a program, and Python's unpickler calls whatever that program names. This one builds plain containers, and
passes calls and references to a reader, which accepts a fixed set of names. Objects of any other name are never built:
a `Skipped` with the name stands for them, and their arguments and state are dropped. All other instructions are
rejected. The time and memory that a pickle can use are proportional to its length.
"""

import io
import pickletools
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

from ._trees import WeightsError


# A weights file has about 40 instructions per tensor. Training checkpoints may also hold a history of numbers.
MAX_INSTRUCTIONS = 1_000_000
# Keys must be cheap to hash and must not collide. Nested tuples and crafted integers could violate either.
MAX_KEY = 2**60

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
CONTAINERS = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
STRINGS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
PYTHON_2_STRINGS = ("STRING", "SHORT_BINSTRING", "BINSTRING")


class Name(NamedTuple):
    """A name that a pickle refers to. It is recorded, never imported."""

    name: str


class Skipped(NamedTuple):
    """A placeholder for an object that is not built, with the name of its class or of the function that returns it."""

    name: str


class Mapping(dict):
    """A dictionary whose pickle also holds attributes. These are ignored."""


class Reader(NamedTuple):
    """The names and callbacks that the unpickler uses.

    - `names`: the accepted names. Any other name becomes a `Skipped`, as do calls and instances of it.
    - `call(name, arguments)`: returns the result of a call.
    - `refer(id)`: returns the object of a persistent id.
    - `stateless`: types whose pickled state is accepted and dropped.
    - `build(object, state)`: sets the state of an object that `call` returned. Returns whether it is of such a type.
    - `encoding`: of Python 2's strings, `"utf-8"` or `"latin-1"`. The latter keeps the bytes of arrays.
    """

    names: frozenset[str]
    call: Callable[[str, tuple], Any]
    refer: Callable[[Any], Any]
    stateless: tuple[type, ...]
    build: Callable[[Any, Any], bool] = lambda target, state: False
    encoding: str = "utf-8"


@no_type_check
def unpickle(content: bytes, start: int, reader: Reader) -> tuple[Any, int]:
    """Returns the object pickled at `start`, and the position where its pickle ends.

    Raises a `WeightsError` for a rejected instruction. A damaged pickle may raise any exception.
    """
    stream = io.BytesIO(content)
    stream.seek(start)
    machine = _Machine(reader)
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if count == MAX_INSTRUCTIONS:
            raise WeightsError(f"its pickle has more than {count:,} instructions; no weights file has that many.")
        if opcode.name == "STOP":
            return machine.stack.pop(), position + 1
        if not (
            machine.put(opcode.name, argument) or machine.gather(opcode.name) or machine.build(opcode.name, argument)
        ):
            raise WeightsError(f"it has the instruction {opcode.name}, which a file of tensors does not need.")
    raise WeightsError("its pickle has no STOP instruction.")


@no_type_check
class _Machine:
    """A stack with marks and a memo. Each method runs one kind of instruction, and returns whether it knew this one."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.stack, self.marks, self.memo = [], [], {}

    def put(self, instruction: str, argument: Any) -> bool:
        """Pushes numbers, strings, constants and empty containers; handles marks and the memo."""
        stack = self.stack
        match instruction:
            case "PROTO" | "FRAME":
                pass
            case name if name in NUMBERS or name in STRINGS:
                stack.append(argument)
            case name if name in PYTHON_2_STRINGS:
                # `pickletools` has decoded the bytes as Latin-1.
                stack.append(argument if self.reader.encoding == "latin-1" else argument.encode("latin-1").decode())
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in CONTAINERS:
                stack.append(CONTAINERS[name]())
            case "MARK":
                self.marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._since_mark()
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case _:
                return False
        return True

    def gather(self, instruction: str) -> bool:
        """Collects stack items into tuples, lists and dictionaries."""
        stack = self.stack
        match instruction:
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(instruction[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "LIST":
                stack.append(self._since_mark())
            case "APPEND":
                add_items(stack[-2], [stack[-1]])
                stack.pop()
            case "APPENDS":
                items = self._since_mark()
                add_items(stack[-1], items)
            case "DICT":
                items = self._since_mark()
                stack.append(dict(checked_pairs(zip(items[::2], items[1::2], strict=True))))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                set_items(stack[-1], [(key, value)])
            case "SETITEMS":
                items = self._since_mark()
                set_items(stack[-1], zip(items[::2], items[1::2], strict=True))
            case _:
                return False
        return True

    def build(self, instruction: str, argument: Any) -> bool:
        """Resolves names, calls, instances and references through the reader, or to placeholders."""
        stack = self.stack
        match instruction:
            case "GLOBAL":
                stack.append(self._name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._name(module, attribute))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._called(function, arguments))
            case "NEWOBJ":
                stack.pop()
                stack[-1] = self._new(stack[-1])
            case "NEWOBJ_EX":
                del stack[-2:]
                stack[-1] = self._new(stack[-1])
            case "BUILD":
                state = stack.pop()
                stateless = isinstance(stack[-1], (Skipped, *self.reader.stateless))
                if not (stateless or self.reader.build(stack[-1], state)):
                    raise WeightsError(f"it sets the state of a {type(stack[-1]).__name__}.")
            case "BINPERSID":
                stack.append(self.reader.refer(stack.pop()))
            case "INST":
                self._since_mark()
                stack.append(self._new(self._name(*argument.split(" ", 1))))
            case _:
                return False
        return True

    def _since_mark(self) -> list:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _name(self, module: str, attribute: str) -> Name | Skipped:
        if type(module) is not str or type(attribute) is not str:
            raise WeightsError(f"it refers to the name {reprlib.repr((module, attribute))}.")
        name = f"{module}.{attribute}"
        return Name(name) if name in self.reader.names else Skipped(name[:200])

    def _called(self, function: Any, arguments: Any) -> Any:
        if type(function) is Skipped:
            return function
        if type(function) is not Name or type(arguments) is not tuple:
            raise WeightsError(f"it calls {reprlib.repr(function)}.")
        return self.reader.call(function.name, arguments)

    def _new(self, kind: Any) -> Skipped:
        if type(kind) is not Skipped:
            raise WeightsError(f"it creates an instance of {reprlib.repr(kind)}.")
        return kind


@no_type_check
def add_items(target: Any, items: list) -> None:
    """Appends items to a list. Items of a skipped object are dropped."""
    if type(target) is list:
        target.extend(items)
    elif type(target) is not Skipped:
        raise WeightsError(f"it appends to a {type(target).__name__}.")


@no_type_check
def set_items(target: Any, pairs: Any) -> None:
    """Sets items of a dictionary. Items of a skipped object are dropped."""
    if type(target) is dict or type(target) is Mapping:
        target.update(checked_pairs(pairs))
    elif type(target) is not Skipped:
        raise WeightsError(f"it sets items of a {type(target).__name__}.")


@no_type_check
def checked_pairs(pairs: Any) -> list[tuple]:
    """Returns the key-value pairs. Raises a `WeightsError` for keys that may be slow to hash or compare."""
    pairs = list(pairs)
    for key, _ in pairs:
        if not (type(key) in (str, bytes, bool, type(None)) or (type(key) is int and abs(key) < MAX_KEY)):
            raise WeightsError(f"it has a dictionary with the key {reprlib.repr(key)}.")
    return pairs
