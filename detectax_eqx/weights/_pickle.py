"""A machine for pickles that runs nothing.

A pickle is a program. Python's own machine calls whatever the program names; this one builds plain containers, and
hands the names that a reader knows, their calls and references, to that reader. An object of any other name is never
built: a note of the name stands for it, and its arguments and state are dropped. Every other instruction is refused.
What a program can use up, in time and in memory, is proportional to its length.
"""

import io
import pickletools
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

from ._trees import WeightsError


# A file of weights has some 40 for each tensor, and its training checkpoint a history of numbers.
MOST_INSTRUCTIONS = 1_000_000
# A key's hash must not take long, nor be that of many others: nested tuples and chosen numbers could.
LARGEST_KEY = 2**60

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
CONTAINERS = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
TEXTS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
TEXTS_OF_PYTHON_2 = ("STRING", "SHORT_BINSTRING", "BINSTRING")


class Name(NamedTuple):
    """A name that a pickle refers to: a note, and no more."""

    name: str


class Skipped(NamedTuple):
    """What stands for an object that is not built: the name of its class, or of the function that would return it."""

    name: str


class Mapping(dict):
    """A dictionary with attributes in its pickle, which are of no use here."""


class Reader(NamedTuple):
    """What the machine asks.

    - `names`: those that it knows. Any other name, and whatever the program does with it, becomes a `Skipped`.
    - `call(name, arguments)`: the result of a call. `refer(id)`: what a persistent id stands for.
    - `stateless`: types that may be given a state, which is dropped.
    """

    names: frozenset[str]
    call: Callable[[str, tuple], Any]
    refer: Callable[[Any], Any]
    stateless: tuple[type, ...]


@no_type_check
def unpickle(content: bytes, start: int, reader: Reader) -> tuple[Any, int]:
    """The object that is pickled at `start`, and where its pickle ends.

    Raises a `WeightsError` for an instruction that is refused, and anything at all for what is damaged.
    """
    stream = io.BytesIO(content)
    stream.seek(start)
    machine = _Machine(reader)
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if count == MOST_INSTRUCTIONS:
            raise WeightsError(f"its pickle has more than {count:,} instructions, which no file of weights has.")
        if opcode.name == "STOP":
            return machine.stack.pop(), position + 1
        if not (
            machine.put(opcode.name, argument) or machine.gather(opcode.name) or machine.build(opcode.name, argument)
        ):
            raise WeightsError(f"it has the instruction {opcode.name}, which a file of tensors has no need of.")
    raise WeightsError("its pickle has no end.")


@no_type_check
class _Machine:
    """A stack with marks and a memo. Each method runs the instructions of one kind, and says whether it knew it."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.stack, self.marks, self.memo = [], [], {}

    def put(self, instruction: str, argument: Any) -> bool:
        """Numbers, texts, constants and empty containers, marks, and what was put into the memo."""
        stack = self.stack
        match instruction:
            case "PROTO" | "FRAME":
                pass
            case name if name in NUMBERS or name in TEXTS:
                stack.append(argument)
            case name if name in TEXTS_OF_PYTHON_2:
                stack.append(argument.encode("latin-1").decode())
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
        """What is on the stack into tuples, lists and dictionaries."""
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
        """Names, calls, instances and references, which are the reader's, or notes."""
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
                stack.pop()
                if not isinstance(stack[-1], (Skipped, *self.reader.stateless)):
                    raise WeightsError(f"it gives a {type(stack[-1]).__name__} a state.")
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
            raise WeightsError(f"it makes an instance of {reprlib.repr(kind)}.")
        return kind


@no_type_check
def add_items(target: Any, items: list) -> None:
    """Appends items to a list; those of an object that is not built are dropped."""
    if type(target) is list:
        target.extend(items)
    elif type(target) is not Skipped:
        raise WeightsError(f"it appends to a {type(target).__name__}.")


@no_type_check
def set_items(target: Any, pairs: Any) -> None:
    """Sets items of a dictionary; those of an object that is not built are dropped."""
    if type(target) is dict or type(target) is Mapping:
        target.update(checked_pairs(pairs))
    elif type(target) is not Skipped:
        raise WeightsError(f"it sets items of a {type(target).__name__}.")


@no_type_check
def checked_pairs(pairs: Any) -> list[tuple]:
    """Pairs of key and value whose keys are quick to hash and to compare."""
    pairs = list(pairs)
    for key, _ in pairs:
        if not (type(key) in (str, bytes, bool, type(None)) or (type(key) is int and abs(key) < LARGEST_KEY)):
            raise WeightsError(f"it has a dictionary with the key {reprlib.repr(key)}.")
    return pairs
