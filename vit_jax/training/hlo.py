"""Reads the text of an optimised GPU program: its kernels with what they move and compute, its collectives, a roofline."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from vit_jax.training.cards import Card

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_NO_KERNEL = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "partition-id", "replica-id"}
_TRANSCENDENTAL = {"exponential", "exponential-minus-one", "log", "log-plus-one", "tanh", "rsqrt", "sqrt", "power", "logistic"}
_TRANSCENDENTAL |= {"divide", "erf", "sine", "cosine", "cbrt"}
_ELEMENTWISE = {"add", "subtract", "multiply", "maximum", "minimum", "select", "compare", "convert", "negate", "abs", "and"}
_ELEMENTWISE |= {"or", "xor", "not", "shift-left", "shift-right-logical", "shift-right-arithmetic", "remainder", "clamp"}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# What a good kernel reaches of a card's peak rates.
PRODUCT_SHARE, BANDWIDTH_SHARE = 0.66, 0.9


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The types and shapes of all arrays that a text names, as in "f32[64,12,197]"."""
    found = re.findall(r"\b(pred|[subf]\d+|bf16|c64|f8e\w+)\[([\d,]*)\]", text)
    return [(kind, tuple(map(int, filter(None, axes.split(","))))) for kind, axes in found]


def _bytes(shape: str) -> int:
    return int(sum(_BYTES.get(kind, 0) * math.prod(axes) for kind, axes in arrays(shape)))


@dataclasses.dataclass
class Instruction:
    """A line of a program: name = shape opcode(operands), attributes."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    inner: str  # the text between the parentheses
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in the attributes; "" if it does not occur."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass
class Module:
    """The computations of a program by name; `entry` is where it begins."""

    computations: dict[str, Computation]
    entry: str


def _close(text: str) -> int:
    """The place of the parenthesis that closes the one at the beginning of a text."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place
    return len(text)


def parse(text: str) -> Module:
    """The computations of the text that `compiled.as_text()` gives."""
    module, current = Module({}, ""), Computation()
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = module.computations.setdefault(found[2], {})
            module.entry = found[2] if found[1] else module.entry
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line):
            root, name, rest = bool(found[1]), found[2], found[3]
            end = _close(rest) + 1 if rest.startswith("(") else rest.index(" ")
            shape, rest = rest[:end], rest[end + 1 :]
            opcode = rest[: rest.index("(")]
            rest = rest[len(opcode) :]
            end = _close(rest)
            operands = re.findall(r"%([\w.\-]+)", rest[:end])
            current[name] = Instruction(name, shape, opcode, operands, rest[1:end], rest[end + 1 :], root)
    return module


@dataclasses.dataclass
class Kernel:
    """What the card is asked to do once (or `times` times, in a loop)."""

    name: str
    kind: str  # "product", "attention", "convolution", "fusion" (other arithmetic), "copy" or the opcode of a collective
    scope: str  # where it comes from in the model: the op_name
    target: str  # the function of a library; "" if XLA generated the kernel
    times: int
    bytes: float = 0  # read and written
    flops: float = 0  # of products
    type: str = ""  # of the operands of a product
    elementwise: float = 0  # operations
    transcendental: float = 0

    def seconds(self, card: Card) -> float:
        """The time by the card's tightest limit."""
        peak = card.bfloat16 if self.type in ("bf16", "f16") else card.float32
        limits = (
            self.bytes / (BANDWIDTH_SHARE * card.bandwidth),
            self.flops / (PRODUCT_SHARE * peak),
            self.elementwise / card.elementwise,
            self.transcendental / card.transcendental,
        )
        return self.times * max(limits)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _dot_flops(result: str, left: str, contracted: list[int]) -> float:
    axes = arrays(left)[0][1]
    return 2 * math.prod(arrays(result)[0][1]) * math.prod(axes[axis] for axis in contracted)


def _convolution_flops(call: Instruction, operands: list[str]) -> float:
    """Each element of the result takes a window of the features that the kernel reads."""
    kernel = arrays(operands[1])[0][1]
    labels = call.attribute(r"dim_labels=\w+_(\w+)->")
    window = math.prod(_numbers(call.attribute(r"window=\{size=([\dx]+)")))
    features = kernel[labels.index("i")] if "i" in labels else 1
    return 2 * math.prod(arrays(call.shape)[0][1]) * window * features


def _call_kernel(call: Instruction, kernel: Kernel, operands: list[str]) -> None:
    """Fills in the kernel of a library's function. Arrays of bytes in its result are its workspace."""
    results = [(kind, axes) for kind, axes in arrays(call.shape) if kind not in ("s8", "u8")]
    kernel.bytes = sum(map(_bytes, operands)) + sum(_BYTES[kind] * math.prod(axes) for kind, axes in results)
    kernel.type = arrays(operands[0])[0][0] if operands else ""
    if "matmul" in kernel.target or "gemm" in kernel.target:
        kernel.kind = "product"
        contracted = _numbers(call.attribute(r'"lhs_contracting_dimensions": ?\[([^\]]*)\]'))
        kernel.flops = _dot_flops(call.shape, operands[0], contracted)
    elif "fmha" in kernel.target:  # query and key are [B, T, heads, K]; the gradient has five products, not two
        kernel.kind = "attention"
        batch, tokens, heads, width = arrays(operands[0])[0][1]
        products = 5 if "Backward" in kernel.target else 2
        kernel.flops = products * 2 * batch * heads * tokens * arrays(operands[1])[0][1][1] * width
    elif "conv" in kernel.target:
        kernel.kind = "convolution"
        kernel.flops = _convolution_flops(call, operands)


def _read(fusion: Instruction, body: Computation, table: Computation) -> float:
    """Bytes that a fusion reads: of an operand that is only sliced or gathered from, what is taken."""
    users = collections.defaultdict(list)
    for inner in body.values():
        for name in inner.operands:
            users[name].append(inner)
    parameters = {int(inner.inner): inner.name for inner in body.values() if inner.opcode == "parameter"}
    total = 0.0
    for number, operand in enumerate(fusion.operands):
        if operand not in table or number not in parameters:
            continue
        whole, name = _bytes(table[operand].shape), parameters[number]
        taken = 0.0
        for user in users[name]:
            if user.opcode in ("gather", "dynamic-slice", "slice") and user.operands[0] == name:
                taken += _bytes(user.shape)
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):  # which writes in place
                taken = whole
        total += min(whole, taken)
    return total


def _fusion_kernel(fusion: Instruction, kernel: Kernel, body: Computation, table: Computation) -> None:
    """Fills in the kernel that XLA generated for a fusion."""
    root = next(inner for inner in body.values() if inner.root)
    written = body[root.operands[1]].shape if root.opcode == "dynamic-update-slice" else fusion.shape
    kernel.bytes = _read(fusion, body, table) + _bytes(written)
    for inner in body.values():
        shapes = arrays(inner.shape)
        size = math.prod(shapes[0][1]) if shapes else 0
        if inner.opcode == "dot":
            left = body[inner.operands[0]].shape
            kernel.kind, kernel.type = "product", arrays(left)[0][0]
            kernel.flops += _dot_flops(inner.shape, left, _numbers(inner.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")))
        elif inner.opcode == "reduce" and inner.operands[0] in body:
            kernel.elementwise += math.prod(arrays(body[inner.operands[0]].shape)[0][1])
        elif inner.opcode in _TRANSCENDENTAL:
            kernel.transcendental += size
        elif inner.opcode in _ELEMENTWISE:
            kernel.elementwise += size


def kernels(module: Module, computation: str = "", times: int = 1) -> Iterator[Kernel]:
    """Every kernel that a run of the program starts, in order; those of a loop once, with its number of turns."""
    table = module.computations[computation or module.entry]
    for line in table.values():
        if line.opcode == "while":
            turns = int(line.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
            yield from kernels(module, line.attribute(r"body=%?([\w.\-]+)"), times * turns)
        elif line.opcode in ("call", "conditional"):
            for name in re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line.attributes):
                yield from kernels(module, name, times)
        elif line.opcode not in _NO_KERNEL and not line.opcode.endswith(("-done", "-update")):
            operands = [table[name].shape for name in line.operands if name in table]
            target = line.attribute(r'custom_call_target="([^"]*)"')
            kernel = Kernel(line.name, "fusion", line.attribute(r'op_name="([^"]*)"'), target, times)
            if line.opcode == "fusion":
                body = module.computations[line.attribute(r"calls=%?([\w.\-]+)")]
                _fusion_kernel(line, kernel, body, table)
            elif line.opcode == "custom-call":
                _call_kernel(line, kernel, operands)
            else:
                kernel.kind = "copy" if "copy" in line.opcode else line.opcode.removesuffix("-start")
                kernel.bytes = sum(map(_bytes, [*operands, line.shape]))
            yield kernel


@dataclasses.dataclass
class Collective:
    """An exchange between the cards."""

    opcode: str  # "all-reduce", "all-gather", …
    bytes: int  # of the result, on each card
    types: tuple[str, ...]
    asynchronous: bool
    meanwhile: int  # kernels that are started before its result is waited for
    scope: str


def collectives(module: Module) -> list[Collective]:
    """The exchanges of a program, in order."""
    found, calls = [], r"calls=%?([\w.\-]+)"
    # A collective is written as a pair of opcodes, or as the body of a general asynchronous pair.
    lines_of = {name: list(table.values()) for name, table in module.computations.items()}
    wrapped = {line.attribute(calls) for lines in lines_of.values() for line in lines if line.opcode == "async-start"}
    for name, lines in lines_of.items():
        for place, line in enumerate(lines):
            body = lines_of.get(line.attribute(calls), []) if line.opcode == "async-start" else []
            inner = next((part for part in [line, *body] if part.opcode.startswith(_COLLECTIVES)), None)
            if inner is None or line.opcode.endswith("-done") or name in wrapped:
                continue
            ends = (i for i, other in enumerate(lines) if other.opcode.endswith("-done") and line.name in other.operands)
            end = next(ends, None)
            between = lines[place + 1 : end] if end else []
            result = lines[end].shape if end else inner.shape
            types = tuple(sorted({kind for kind, _ in arrays(result)}))
            meanwhile = sum(other.opcode in ("fusion", "custom-call") for other in between)
            scope = inner.attribute(r'op_name="([^"]*)"')
            opcode = inner.opcode.removesuffix("-start")
            found.append(Collective(opcode, _bytes(result), types, end is not None, meanwhile, scope))
    return found
