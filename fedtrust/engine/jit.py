"""Machine code for the processor at hand, made when it is first needed: a thin layer over LLVM (llvmlite).

`Code` writes one function, with loops, vectors and multiply-adds; `Code.compiled` turns it into something that can be called. Calls
release Python's lock. Nothing is kept on disk: the kernels of a small CNN take about half a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import llvmlite.binding as llvm
from llvmlite import ir

F32, I64, I32, I8 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)
FLOATS, BYTES = F32.as_pointer(), I8.as_pointer()

#: Channels that are worked on together. A power of two that fills whole vector registers of every width.
BLOCK = 16

_LOCK = threading.RLock()
_ENGINES: list[Any] = []  # own the machine code: as long as this process lives, somebody may call it

P = ParamSpec("P")
T = TypeVar("T")


def once(make: Callable[P, T]) -> Callable[P, T]:
    """Remember what was made for which arguments; threads that want the same wait for the first of them."""
    made: dict[Any, T] = {}

    @functools.wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        key = (args, *kwargs.items())
        if key not in made:
            with _LOCK:
                if key not in made:
                    made[key] = make(*args, **kwargs)
        return made[key]

    return get


Value = Any  # llvmlite has no types; an `ir.Value` or a plain int


class Host(NamedTuple):
    """The processor.

    Attributes:
        name: what LLVM calls it.
        features: its extensions, as LLVM wants them.
        lanes: floats in a vector register.
        registers: how many vector registers there are.
    """

    name: str
    features: str
    lanes: int
    registers: int

    @property
    def tile(self) -> int:
        """How many sums of `BLOCK` floats are kept in registers beside one factor of that size and one spread number."""
        each = max(1, BLOCK // self.lanes)
        return max(2, min(14, (self.registers - each - 1) // each))


@functools.cache
def host() -> Host:
    """Return the processor at hand.

    Raises:
        RuntimeError: LLVM cannot make code for it.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    found = dict(llvm.get_host_cpu_features())
    return of(llvm.get_host_cpu_name(), found)


def of(name: str, found: dict[str, bool]) -> Host:
    """Return the processor of this name with these extensions."""
    features = ",".join(("+" if there else "-") + feature for feature, there in sorted(found.items()))
    if found.get("avx512f") and found.get("avx512vl"):
        return Host(name, features + ",-prefer-256-bit", 16, 32)  # LLVM would use half of each register on some of them
    if found.get("avx"):
        return Host(name, features, 8, 16)
    return Host(name, features, 4, 32 if found.get("neon") else 16)


def missing() -> str:
    """Return why there is no machine code to be had here; empty if there is."""
    try:
        host()
    except Exception as error:  # an unknown processor, a system without executable memory: the other path needs neither
        return f"{type(error).__name__}: {error}"
    return ""


def target(on: Host) -> Any:
    """Return LLVM's description of what code is made for."""
    # Levels beyond 1 take half as long again and make the same loops: unrolling and vectors are written out already.
    return llvm.Target.from_default_triple().create_target_machine(cpu=on.name, features=on.features, opt=1)


class Kernel:
    """Machine code that can be called; its arguments are addresses and whole numbers.

    Attributes:
        address: where it stands.
        arity: how many arguments it takes.
    """

    def __init__(self, address: int, kinds: Sequence[Any]) -> None:
        self.address, self.arity = address, len(kinds)
        self._call = ctypes.CFUNCTYPE(None, *(ctypes.c_int64 if kind is I64 else ctypes.c_void_p for kind in kinds))(address)

    def __call__(self, *arguments: int) -> None:
        """Run it, without Python's lock."""
        self._call(*arguments)


class Code:
    """A function being written: pointers and whole numbers in, nothing out. Pointers must not overlap.

    Args:
        arguments: the types of its arguments (`FLOATS`, `BYTES`, `I64`).
        on: the processor; the one at hand if `None`.
    """

    def __init__(self, arguments: Sequence[Any], on: Host | None = None) -> None:
        self.host = on or host()
        self._module = ir.Module()
        self._types = list(arguments)
        function = ir.Function(self._module, ir.FunctionType(ir.VoidType(), self._types), "kernel")
        for argument in function.args:
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        self.arguments: Sequence[Any] = function.args
        self.do = ir.IRBuilder(function.append_basic_block("entry"))

    def number(self, value: Value) -> Value:
        """Return a whole number as LLVM wants it."""
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def times(self, a: Value, b: Value) -> Value:
        """Return the product of two whole numbers."""
        return a * b if isinstance(a, int) and isinstance(b, int) else self.do.mul(self.number(a), self.number(b))

    def slot(self, kind: Any) -> Any:
        """Return a place for a value that changes; LLVM makes a register of it."""
        with self.do.goto_entry_block():
            return self.do.alloca(kind)

    @contextlib.contextmanager
    def loop(self, start: Value, stop: Value, step: int = 1) -> Iterator[Any]:
        """Write what stands inside for start, start + step, … below stop."""
        do, counter = self.do, self.slot(I64)
        do.store(self.number(start), counter)
        head, body, done = (do.append_basic_block() for _ in range(3))
        do.branch(head)
        do.position_at_end(head)
        now = do.load(counter)
        do.cbranch(do.icmp_signed("<", now, self.number(stop)), body, done)
        do.position_at_end(body)
        yield now
        do.store(do.add(do.load(counter), self.number(step)), counter)
        do.branch(head)
        do.position_at_end(done)

    def at(self, pointer: Any, *offsets: Value) -> Any:
        """Return the pointer moved on by so many elements."""
        for offset in offsets:
            if not (isinstance(offset, int) and offset == 0):
                pointer = self.do.gep(pointer, [self.number(offset)])
        return pointer

    def load(self, pointer: Any, lanes: int) -> Any:
        """Return so many elements from there on, as a vector."""
        vector = ir.VectorType(pointer.type.pointee, lanes)
        return self.do.load(self.do.bitcast(pointer, vector.as_pointer()), align=_size(pointer))

    def store(self, value: Any, pointer: Any) -> None:
        """Write a vector there."""
        self.do.store(value, self.do.bitcast(pointer, value.type.as_pointer()), align=_size(pointer))

    def fill(self, value: float, lanes: int) -> Any:
        """Return a vector of one number."""
        return ir.Constant(ir.VectorType(F32, lanes), [float(value)] * lanes)

    def spread(self, pointer: Any, lanes: int) -> Any:
        """Return the number that stands there, in every lane."""
        vector = ir.VectorType(F32, lanes)
        nothing = ir.Constant(vector, ir.Undefined)
        one = self.do.insert_element(nothing, self.do.load(pointer), ir.Constant(I32, 0))
        return self.do.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))

    def mad(self, total: Any, a: Any, b: Any) -> Any:
        """Return total + a * b, rounded once where the processor can."""
        return self.do.fadd(total, self.do.fmul(a, b, flags=("contract",)), flags=("contract",))

    def add_to(self, slot: Any, a: Any, b: Any) -> None:
        """Add a * b to what stands in a slot."""
        self.do.store(self.mad(self.do.load(slot), a, b), slot)

    def optimised(self) -> Any:
        """Return LLVM's module, optimised."""
        with _LOCK:
            self.do.ret_void()
            module = llvm.parse_assembly(str(self._module))
            module.verify()
            options = llvm.create_pipeline_tuning_options(speed_level=1)
            options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
            passes = llvm.create_pass_builder(target(self.host), options)
            passes.getModulePassManager().run(module, passes)
            return module

    def compiled(self) -> Kernel:
        """Return the function."""
        module = self.optimised()
        with _LOCK:
            engine = llvm.create_mcjit_compiler(module, target(self.host))
            engine.finalize_object()
            _ENGINES.append(engine)
        return Kernel(engine.get_function_address("kernel"), self._types)


@once
def chain(arities: tuple[int, ...]) -> Kernel:
    """Return a kernel that calls others with so many arguments in turn, again and again, without coming back to Python in between.

    Returns:
        A function of (table, times). The table holds 64-bit numbers: for every call its kernel's address, and for each of the arguments
        what it is the first time and by how much it grows from one time to the next.
    """
    code = Code([I64.as_pointer(), I64])
    table, times = code.arguments
    with code.loop(0, times) as time:
        row = 0
        for arity in arities:
            kind = ir.FunctionType(ir.VoidType(), [I64] * arity)  # addresses are handed over as whole numbers are
            numbers = [code.do.load(code.at(table, row + i)) for i in range(1 + 2 * arity)]
            given = [code.do.add(first, code.do.mul(growth, time)) for first, growth in zip(numbers[1::2], numbers[2::2], strict=True)]
            code.do.call(code.do.inttoptr(numbers[0], kind.as_pointer()), given)
            row += len(numbers)
    return code.compiled()


def _size(pointer: Any) -> int:
    """Return how elements are aligned: as themselves, no better."""
    return 4 if pointer.type.pointee is F32 else 1


def blocks(code: Code, channels: int, sizes: Sequence[int] = (BLOCK,)) -> Iterator[tuple[Value, int]]:
    """Write what follows for every block of channels, the large sizes first: yields (the first channel, how many)."""
    done = 0
    for size in sizes:
        end = done + (channels - done) // size * size
        if end > done:
            with code.loop(done, end, size) as first:
                yield first, size
        done = end
    if channels > done:
        yield done, channels - done


def evenly(count: int, most: int) -> list[tuple[int, int, int]]:
    """Cut `count` into pieces of at most `most`, as equal as can be: (where they start, their size, how many)."""
    parts = -(-count // most)
    size, larger = divmod(count, parts)
    pieces = [(0, size + 1, larger), (larger * (size + 1), size, parts - larger)]
    return [piece for piece in pieces if piece[1] and piece[2]]
