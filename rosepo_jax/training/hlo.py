"""What the text of a compiled program says: arrays, kernels, and what devices send each other, loops multiplied out.

The text is XLA's optimised HLO of one device. Loops state their length (CPU, GPU) or count to a constant (TPU); a loop
that ends when it will, such as a beam search, is counted as often as the caller says. Of a branch all sides count.
"""

import functools
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16}
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:, (.*))?$")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|branch_computations)=(?:\{(.*?)\}|%?([\w.\-]+))")


class Instruction(NamedTuple):
    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]  # names, or the text of a constant
    attributes: str
    is_root: bool


Program = dict[str, list[Instruction]]  # computation -> its instructions; "" is the entry's


class Collective(NamedTuple):
    """Devices that exchange an array."""

    kind: str
    bytes: int  # of the whole array: what is gathered, what is reduced, what one device sends to all or to the next
    times: int
    groups: np.ndarray  # [group, device]: numbers in the order of the mesh


class Loop(NamedTuple):
    body: str
    condition: str
    trips: int | None  # None: not known


def parse(text: str) -> Program:
    program: Program = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = program[header[2]] = []
            if header[1]:
                program[""] = current
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, operands, attributes = found.groups()
            names = re.findall(r"%([\w.\-]+)", operands) or [operands]
            current.append(Instruction(name, opcode, shape, tuple(names), attributes or "", bool(root)))
    return program


def executed(program: Program, rounds: int = 1) -> list[tuple[Instruction, int]]:
    """Every instruction with how often a run of the program executes it; loops of unknown length run `rounds` times."""
    times: Counter[str] = Counter()

    def visit(computation: str, often: int) -> None:
        times[computation] += often
        for instruction in program[computation]:
            if instruction.opcode == "while":
                loop = _loop(program, instruction)
                trips = rounds if loop.trips is None else loop.trips
                visit(loop.body, often * trips)
                visit(loop.condition, often * trips)
            elif instruction.opcode in ("fusion", "call", "conditional", "async-start"):
                for called in _called(instruction).values():
                    for name in called:
                        visit(name, often)

    visit("", 1)
    return [(instruction, times[name]) for name in times for instruction in program[name]]


def collectives(program: Program, rounds: int = 1) -> list[Collective]:
    """What devices exchange. One exchange that is spread over several instructions (same channel) counts once."""
    starts = {i.name: i for part in program.values() for i in part if i.opcode.endswith("-start")}
    found: dict[str, Collective] = {}
    for instruction, times in executed(program, rounds):
        kind = instruction.opcode.removesuffix("-done")
        if kind not in COLLECTIVES:
            continue
        # The result of a start is a tuple of buffers; that of its end is the array.
        stated = starts.get(instruction.operands[0], instruction) if kind != instruction.opcode else instruction
        groups = _groups(stated.attributes)
        size = nbytes(instruction.shape) * (groups.shape[1] if kind == "reduce-scatter" else 1)
        channel = re.search(r"channel_id=(\d+)", stated.attributes)
        key = channel[1] if channel else f"%{instruction.name}"
        if key not in found or times < found[key].times:
            found[key] = Collective(kind, size, times, groups)
    return list(found.values())


def kernels(program: Program) -> Counter[str]:
    """The hand-written kernels that are called, and at how many places: cuDNN's by target, Pallas' by their names."""
    found: Counter[str] = Counter()
    for instruction, _ in executed(program):
        target = re.search(r'custom_call_target="(.*?)"', instruction.attributes)
        if instruction.opcode == "custom-call" and target and target[1].startswith("__cudnn"):
            found[target[1].removeprefix("__")] += 1
        elif instruction.opcode == "custom-call" and target and target[1] == "tpu_custom_call":
            found[instruction.name.partition(".")[0]] += 1
    return found


def arrays(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """The (dtype, shape) of every array that the text names, those inside fusions, which take no memory, included."""
    return {(dtype, _dimensions(sizes)) for dtype, sizes in _ARRAY.findall(text)}


def nbytes(shape: str) -> int:
    """Bytes of an array or a tuple, "(bf16[4,8]{1,0}, s32[])" -> 68."""
    bits = 0
    for dtype, sizes in _ARRAY.findall(shape):
        width = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype))
        bits += width * math.prod(_dimensions(sizes))
    return bits // 8


def _dimensions(sizes: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, sizes.split(","))))


def _called(instruction: Instruction) -> dict[str, list[str]]:
    return {
        role: re.findall(r"[\w.\-]+", several or one) for role, several, one in _CALLED.findall(instruction.attributes)
    }


def _loop(program: Program, instruction: Instruction) -> Loop:
    called = _called(instruction)
    body, condition = called["body"][0], called["condition"][0]
    stated = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
    return Loop(body, condition, int(stated[1]) if stated else _counted(program[body], program[condition]))


def _counted(body: list[Instruction], condition: list[Instruction]) -> int | None:
    """How often a loop runs that counts from 0 up to a constant, in constant steps; None for any other."""
    at_end, in_body = ({i.name: i for i in part} for part in (condition, body))
    end = next((i for i in condition if i.is_root), None)
    if end is None or end.opcode != "compare" or "direction=LT" not in end.attributes:
        return None
    counter, bound = (at_end.get(name) for name in end.operands)
    index = counter and re.search(r"index=(\d+)", counter.attributes)
    if not index or bound is None or bound.opcode != "constant":
        return None
    root = next(i for i in body if i.is_root)
    added = in_body.get(root.operands[int(index[1])]) if root.opcode == "tuple" else None
    if added is None or added.opcode != "add":
        return None
    steps = [in_body[name].operands[0] for name in added.operands if in_body[name].opcode == "constant"]
    return -(-int(bound.operands[0]) // int(steps[0])) if steps else None


def _groups(attributes: str) -> np.ndarray:
    """The devices that take part, in the notations of XLA: lists, pairs, a reshaped iota, axes of a mesh."""
    if found := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return np.array([[int(x) for x in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return np.array([[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?)(?:,? |,?$)", attributes):
        return _numbers(found[2]).reshape(_dimensions(found[1]))
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? ?\{(.*?)\}", attributes):
        return _of_mesh(found[1], found[2] or "", found[3])
    raise ValueError(f"no devices named in: {attributes[:200]}")


@functools.cache
def _of_mesh(axes: str, devices: str, over: str) -> np.ndarray:
    """mesh['a'=2,'b'=4] {'b'} -> [[0, 1, 2, 3], [4, 5, 6, 7]]."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    names = re.findall(r"'(\w+)'", over)
    numbers = _numbers(devices) if devices else np.arange(math.prod(sizes.values()))
    places = [list(sizes).index(name) for name in names]
    grouped = np.moveaxis(numbers.reshape(tuple(sizes.values())), places, range(-len(places), 0))
    return grouped.reshape(-1, math.prod(sizes[name] for name in names))


def _numbers(text: str) -> np.ndarray:
    """ "[4,8]T(1,0)" -> 0 to 31 as 4 x 8, transposed; "3,1,2" -> as they stand."""
    if not (found := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)):
        return np.array(_dimensions(text))
    shape = _dimensions(found[1])
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(_dimensions(found[2])) if found[2] else numbers
