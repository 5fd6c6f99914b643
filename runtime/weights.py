"""Read what torch.save wrote: checked for damage, rebuilt value by value, and with nothing in it executed.

content = weights.read("best.pt")     # tensors in dicts, lists and plain values
"""

import glob
import io
import math
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from runtime import cli
from runtime.errors import UserError
from runtime.files import MISTAKEN, read_bytes

MAX_BYTES = 2**32  # of a file
MAX_PARTS = 20_000  # of a file: each tensor is one
MAX_PICKLE = 2**23  # bytes of the part that is no tensor: weights' names, and logs that others keep beside them
MAX_OPERATIONS = 500_000  # of that part: each may take a few hundred bytes of memory, and a millionth of a second
MAX_NAME = 500  # characters of the name of a tensor, a storage or a part
MAX_DEPTH = 100  # of values within values
MAX_REPEATED = 2**24  # numbers in a tensor that shows a smaller storage again and again, as expand() makes them
MAX_DIMENSIONS = 64  # of a tensor
TOO_MUCH = "holds more than weights and some logs: refused; torch.save the state_dict alone"
# What saves the tensors of a file alone, wherever in it they are, which the user runs.
KEEP = (
    "keep = lambda c: c.state_dict() if isinstance(c, torch.nn.Module) else {{k: keep(v) for k, v in c.items() if "
    "isinstance(v, (dict, torch.Tensor, torch.nn.Module{arrays}))}} if isinstance(c, dict) else torch.as_tensor(c); "
    "torch.save(keep({opened}), 'weights.pt')"
)
UNUSUAL = re.compile(r"torch\._(utils|tensor) _rebuild_\w+|torch q\w+")  # tensors that cannot be read
NO_MODULE = ("collections", "argparse", "numpy", "builtins", "__builtin__", "pathlib", "datetime", "torch", "omegaconf")
HARMFUL = re.compile(  # what no honest file names
    r"(os|posix|nt|subprocess|sys|shutil|runpy|importlib|socket|pty)\b.*"
    r"|(builtins|__builtin__) (eval|exec|compile|getattr|open|__import__)"
)
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")  # keys others keep a state_dict under
OLD_FORMAT = re.compile(  # how torch.save began before version 1.6: a number, pickled by any protocol
    rb"\x80[\x02-\x05](\x95\x0d\0{7})?\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\."
)
OLD_VERSION = 1001
DTYPES = {  # of PyTorch's names of storages
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}  # by the operations of a pickle
KEYS = (str, int, float, bool, type(None))  # types of a dict's keys: a tuple within tuples can take for ever to hash
NESTING = (dict, list, tuple)
VALUES = {*KEYS, dict, OrderedDict, list, tuple, torch.Tensor, nn.Parameter}  # types of what is read

KERAS = (
    "weights of Keras: write the network in PyTorch, copy the arrays of model.get_weights() into it (a Dense kernel "
    "transposed, a Conv2D kernel permuted to 3, 2, 0, 1), and torch.save its state_dict"
)
ONNX = "an ONNX model: only a PyTorch state_dict can be read; torch.save that of the network it was exported from"
PACKED = "a compressed archive: unpack it, and give the file inside"
SIGNATURES = (  # the first bytes of files that people mistake for weights
    *MISTAKEN,
    (rb"\x89HDF\r\n\x1a\n", KERAS),
    (rb"\x08[\x01-\x20][\x12\x1a\x22\x3a\x42]", ONNX),
    (rb"\x93NUMPY", "an array of NumPy: a state_dict of PyTorch is needed, with the tensors' names"),
    (
        rb"(?s).{8}\{\s*\"",
        "safetensors: torch.save(safetensors.torch.load_file({file}), 'weights.pt') makes it readable",
    ),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd|Rar!|(?s:.{257}ustar)", PACKED),
)
ARCHIVES = (  # likewise what the names of parts of zip archives hold, which is searched for without going back
    (
        r"(^|/)(constants\.pkl$|code/)",
        "TorchScript: torch.save(torch.jit.load({file}).state_dict(), 'weights.pt') saves its weights",
    ),
    (
        r"(^|/)(archive_format|models/model\.json|serialized_exported_program\.json)$",
        "a program of torch.export: torch.save(torch.export.load({file}).state_dict, 'weights.pt') saves its weights",
    ),
    (
        r"\.npy$",
        "arrays of NumPy: torch.save({{k: torch.from_numpy(v) for k, v in numpy.load({file}).items()}}, 'weights.pt') "
        "makes it readable",
    ),
    (r"(^|/)model\.weights\.h5$", KERAS),
)


class CheckpointError(UserError):
    """A file that is no usable checkpoint."""


class AmbiguousError(CheckpointError):
    """Weights that fit several models."""


class _Unreadable(Exception):
    """What is whole, but not read; the text says what it is."""


def read(path: str | Path) -> Any:
    """Read a file of torch.save, checked as parse does.

    Raises CheckpointError when the file is missing, damaged, or holds more than tensors and plain values.
    """
    return parse(Path(path), contents(path))


def contents(path: str | Path) -> bytes:
    """Read the bytes of a file of at most 4 GiB, once. Raises CheckpointError where there is none."""
    path = Path(path)
    if not path.exists():
        if re.match("https?:/", str(path)):
            raise CheckpointError(f"{path}: an address: download the file, and give its name")
        if glob.has_magic(str(path)):
            raise CheckpointError(f"{path}: no such file: leave a pattern to the shell, without quotation marks")
        raise CheckpointError(f"{path}: no such file; `{cli.command('train.py', '--model', 'cnn')}` writes checkpoints")
    if path.is_dir():
        raise CheckpointError(f"{path}: not a file: name one in this folder")
    try:
        return read_bytes(path, MAX_BYTES, partial(_check_beginning, path))
    except MemoryError:
        raise CheckpointError(f"{path}: too large for the free memory") from None
    except UserError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(str(error)) from None


def _check_beginning(path: Path, content: bytes) -> None:
    """Refuse what is no file of torch.save by its first bytes, before gigabytes are read."""
    if not content.startswith(b"PK") and not OLD_FORMAT.match(content):
        parse(path, content)


def parse(path: Path, content: bytes) -> Any:
    """Return what a file of these bytes holds, checked for damage, with nothing in it executed; errors name the path.

    Tensors have the sizes, strides and shared storages that were saved. Their bytes are copies of those in the file.
    Raises CheckpointError when it is damaged, something else, or holds more than tensors and plain values.
    """
    try:
        if content.startswith(b"PK"):  # a zip archive, which torch.save writes
            found = _read_archive(path, content)
        elif start := OLD_FORMAT.match(content):
            found = _read_old(path, content, start.end())
        else:
            _recognise(path, content)
            _Reader(path, content).run(content[:MAX_PICKLE])  # which says it where it is a pickle of objects
            raise ValueError("not of torch.save")
        _check_values(path, found)
        return found
    except CheckpointError:
        raise
    except _Unreadable as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception:  # a hostile file can have anything anywhere
        raise CheckpointError(f"{path}: damaged, truncated or not a PyTorch checkpoint") from None


def to_bytes(content: Any) -> bytes:
    """Return what torch.save writes: a zip archive that holds a CRC-32 of each of its parts."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def from_bytes(content: bytes) -> Any:
    """Return what to_bytes was given, checked as parse does."""
    return parse(Path("checkpoint"), content)


def _recognise(path: Path, content: bytes) -> None:
    """Refuse a file that is known by its first bytes, with what to do about it."""
    for pattern, advice in SIGNATURES:
        if re.match(pattern, content[:512]):
            raise CheckpointError(f"{path}: {advice.format(file=repr(str(path)))}")


# --- the two formats: an archive, and five pickles in front of the numbers -------------------------------


def _read_archive(path: Path, content: bytes) -> Any:
    """Read what torch.save writes: a pickle, and each storage as another part."""
    parts = _parts(path, content)
    (name,) = [name for name in parts if re.fullmatch(r"[^/]+/data\.pkl", name)]
    root = name.removesuffix("data.pkl")
    if parts.get(f"{root}byteorder", b"little") != b"little":
        opened = f"torch.load({str(path)!r}, weights_only=True)"
        raise CheckpointError(f"{path}: of a big-endian machine: torch.save({opened}, 'weights.pt') makes it readable")
    reader = _Reader(path, content, lambda key, _: _storage_of(parts.pop(f"{root}data/{key}")))
    found = reader.run(parts[name])
    reader.check()
    return found


def _storage_of(part: bytes) -> torch.UntypedStorage:
    return torch.UntypedStorage.from_buffer(part, dtype=torch.uint8)


def _parts(path: Path, content: bytes) -> dict[str, bytes]:
    """Return the parts of a zip archive by name, each checked for damage."""
    if content.count(b"PK\x01\x02") > MAX_PARTS:  # how its list of parts begins each of them
        raise CheckpointError(f"{path}: {TOO_MUCH}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if any(len(each.filename) > MAX_NAME or not each.filename.isprintable() for each in members):
            raise CheckpointError(f"{path}: a zip archive with names that are too long or cannot be printed: refused")
        if _is_stored(members) and sum(member.file_size for member in members) > len(content):
            raise CheckpointError(f"{path}: damaged: its parts are longer than the file")  # they overlap
        for pattern, advice in ARCHIVES:
            if any(re.search(pattern, member.filename) for member in members):
                raise CheckpointError(f"{path}: {advice.format(file=repr(str(path)))}")
        if not _is_stored(members) or not any(member.filename.endswith("/data.pkl") for member in members):
            raise CheckpointError(
                f"{path}: a zip archive, but not one of torch.save: unpack it, and give the file inside"
            )
        if any(member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE for member in members):
            raise CheckpointError(f"{path}: {TOO_MUCH}")
        parts: dict[str, bytes] = {}
        for member in members:
            try:
                part = archive.read(member)
            except zipfile.BadZipFile:
                raise CheckpointError(
                    f"{path}: damaged: the checksum of {member.filename!r:.80} inside it is wrong"
                ) from None
            if parts.setdefault(member.filename, part) is not part:
                raise CheckpointError(f"{path}: damaged: it holds {member.filename!r:.80} twice")
        return parts


def _is_stored(members: Sequence[zipfile.ZipInfo]) -> bool:
    return all(member.compress_type == zipfile.ZIP_STORED for member in members)


def _read_old(path: Path, content: bytes, place: int) -> Any:
    """Read what torch.save wrote before version 1.6, which has no checksums: all that it lists must be there.

    place: where its second pickle begins.
    """
    reader = _Reader(path, content, lambda _, size: torch.UntypedStorage(size))
    found = []
    for _ in ("version", "machine", "content", "keys"):
        found.append(reader.run(content[place : place + MAX_PICKLE]))
        place += reader.length
    version, _, value, keys = found
    # Two lists are never compared: that can take for ever.
    if version != OLD_VERSION or not all(type(key) is str and key in reader.storages for key in keys):
        raise ValueError("its storages are not those it lists")
    if not len(keys) == len(set(keys)) == len(reader.storages):
        raise ValueError("it lists a storage twice, or too few")
    for storage, dtype in map(reader.storages.__getitem__, keys):
        if struct.unpack_from("<q", content, place) != (storage.nbytes() // dtype.itemsize,):
            raise ValueError("a storage of another length")
        storage.copy_(_storage_of(content[place + 8 : place + 8 + storage.nbytes()]))
        place += 8 + storage.nbytes()
    reader.check()
    return value


# --- pickles ---------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    """Numbers that tensors show: their bytes, and what these are."""

    content: torch.UntypedStorage
    dtype: torch.dtype


def _tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], requires_grad: bool, *rest: Any
) -> torch.Tensor:
    """Make a tensor, as torch._utils._rebuild_tensor_v2 does, but only of numbers that lie in its storage.

    Raises ValueError where one does not. rest: hooks, which nobody saves; and flags of complex tensors.
    """
    if len(rest) > 1:
        raise _Unreadable("holds a conjugate or negative view of a tensor: torch.save its resolve_conj().resolve_neg()")
    if type(storage) is not _Storage or len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise ValueError("not a plain tensor")
    if any(type(each) is not int or not 0 <= each <= MAX_BYTES for each in (offset, *size, *stride)):
        raise ValueError("not the sizes of a tensor")
    there = storage.content.nbytes() // storage.dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= there if all(size) else offset > there:
        raise ValueError("a tensor outside of its storage")
    if math.prod(n for n in size if n) > max(there, MAX_REPEATED):
        raise _Unreadable(
            f"holds a tensor that repeats its numbers more than {MAX_REPEATED:,} times, as expand() makes it: "
            "torch.save its clone()"
        )
    whole = torch.empty(0, dtype=storage.dtype)
    return whole.set_(storage.content, offset, size, stride).requires_grad_(requires_grad)


def _parameter(data: torch.Tensor, requires_grad: bool, _: Any) -> nn.Parameter:
    return nn.Parameter(data, requires_grad)


def _dict() -> OrderedDict[Any, Any]:
    return OrderedDict()


NAMES = {  # what a pickle of a state_dict names, and what it stands for here
    "collections OrderedDict": _dict,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    **{f"torch {name}Storage": dtype for name, dtype in DTYPES.items()},
}


class _Reader:
    """Builds the values that pickles of torch.save describe, by the few operations that these use.

    make(key, bytes) returns the storage of a key. Without it, the pickle is none of torch.save, and may name nothing.
    """

    def __init__(self, path: Path, content: bytes, make: Callable[[str, int], torch.UntypedStorage] | None = None):
        self.path, self.make = path, make
        self.storages: dict[str, _Storage] = {}
        self.left = len(content)  # bytes that its storages may still take
        self.steps = MAX_OPERATIONS  # that its pickles may still take
        self.length = 0  # of the pickle that was read last

    def run(self, pickled: bytes) -> Any:
        """Return the value of a pickle.

        Raises CheckpointError where it names objects or is too long, and any Exception where it is damaged.
        """
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[Any, Any] = {}
        stream = io.BytesIO(pickled)
        for operation, argument, _ in pickletools.genops(stream):
            self._spend(1)
            self._do(operation.name, argument)
        self.length = stream.tell()
        (value,) = self.stack
        return value

    def _spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise CheckpointError(f"{self.path}: {TOO_MUCH}")

    def check(self) -> None:
        """Raise ValueError where a byte of a truth value is neither 0 nor 1: what PyTorch does then is not defined."""
        for storage, dtype in self.storages.values():
            if dtype is torch.bool and (torch.empty(0, dtype=torch.uint8).set_(storage) > 1).any():
                raise ValueError("neither true nor false")

    def _do(self, operation: str, argument: Any) -> None:
        push, take = self.stack.append, self._take
        match operation:
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINFLOAT" | "BININT" | "BININT1" | "BININT2":
                push(argument)
            case "LONG1":
                if abs(argument) >= 2**64:
                    raise _Unreadable("holds a whole number of more than 64 bits: torch.save the state_dict alone")
                push(argument)
            case "SHORT_BINSTRING":  # of Python 2
                push(argument.encode("latin-1").decode())
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                push(CONSTANTS[operation])
            case "EMPTY_LIST" | "EMPTY_DICT":
                push([] if operation == "EMPTY_LIST" else {})
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(take(int(operation[5:]) if operation[5:] else None)))
            case "APPEND" | "APPENDS":
                self._append(take(1 if operation == "APPEND" else None))
            case "SETITEM" | "SETITEMS":
                self._set(take(2 if operation == "SETITEM" else None))
            case "GLOBAL" | "STACK_GLOBAL":
                push(self._named(argument or " ".join(take(2))))
            case "BINPERSID":
                push(self._storage(*take(1)))
            case "REDUCE":
                push(self._call(*take(2)))
            case "BUILD":
                self._build(*take(1))
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise ValueError(f"{operation} is not used for weights")

    def _take(self, count: int | None) -> list[Any]:
        """Take so many values from the stack, or, for None, those after the last mark."""
        lowest = self.marks[-1] if self.marks else 0
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < lowest:
            raise ValueError("values that are not there")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _append(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("values outside of a list")
        self.stack[-1].extend(values)

    def _set(self, pairs: list[Any]) -> None:
        if type(self.stack[-1]) not in (dict, OrderedDict):
            raise ValueError("keys outside of a dict")
        # Without a limit, two equal keys of megabytes could be compared again and again.
        if any(type(key) not in KEYS or (type(key) is str and len(key) > MAX_NAME) for key in pairs[::2]):
            raise CheckpointError(f"{self.path}: its dicts have keys that are no names: refused, nothing was run")
        self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def _named(self, name: str) -> Any:
        if self.make is None or name not in NAMES:
            raise CheckpointError(_objects(self.path, name, self.stack, self.make is not None))
        return NAMES[name]

    def _call(self, function: Any, arguments: Any) -> Any:
        if type(function) is not FunctionType or type(arguments) is not tuple:  # one of NAMES
            raise ValueError("a call of no function")
        return function(*arguments)

    def _build(self, attributes: Any) -> None:
        """Keep the versions of its layers' layouts, the one attribute that PyTorch gives a state_dict."""
        if type(self.stack[-1]) is not OrderedDict:
            raise ValueError("attributes of a value that has none")
        metadata = attributes.get("_metadata", {})
        self._spend(len(metadata))  # the same attributes can be given again and again
        versions = {key: each.get("version") for key, each in metadata.items()}
        kept = OrderedDict((key, {"version": each}) for key, each in versions.items() if type(each) is int)
        vars(self.stack[-1])["_metadata"] = kept

    def _storage(self, described: Any) -> _Storage:
        """Return the storage that a pickle describes as ("storage", dtype, key, device, numbers in it)."""
        kind, dtype, key, _, count, *rest = described
        if kind != "storage" or type(dtype) is not torch.dtype or type(key) is not str or type(count) is not int:
            raise ValueError("not a storage")
        if len(key) > MAX_NAME:  # as for the keys of a dict
            raise ValueError("no name of a storage")
        size = count * dtype.itemsize
        if key not in self.storages:
            self.left -= size
            if self.make is None or not 0 <= size <= size + self.left:
                raise ValueError("storages larger than the file")
            self.storages[key] = _Storage(self.make(key, size), dtype)
        found = self.storages[key]
        if found.dtype is not dtype or found.content.nbytes() != size or rest not in ([], [None]):
            raise ValueError("a storage of another length or dtype")
        return found


def _check_values(path: Path, content: Any) -> None:
    """Refuse values within values that are too deep or too many, each counted wherever it occurs, or of other types."""
    level, count = [content], 0
    for _ in range(MAX_DEPTH):
        if not {*map(type, level)} <= VALUES:
            raise ValueError("values of other types")
        within = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, NESTING)]
        count += sum(map(len, within))
        if count > MAX_OPERATIONS:
            raise CheckpointError(f"{path}: {TOO_MUCH}")
        level = [value for values in within for value in values]
    if level:
        raise CheckpointError(f"{path}: holds more than {MAX_DEPTH} levels of lists in lists: refused")


def _objects(path: Path, name: str, stack: list[Any], is_torch: bool) -> str:
    """Say which object a file holds, and how to save the weights alone; stack: what was read before it."""
    named = name.replace(" ", ".") if re.fullmatch(r"[\w.]{1,60} [\w.]{1,60}", name, re.ASCII) else "Python object"
    what = f"holds {named}, not only weights" if is_torch else f"a pickle with {named}, not a file of torch.save"
    said = f"{path}: {what}: refused, nothing was run"
    if HARMFUL.fullmatch(name) or named == "Python object":
        return said
    if UNUSUAL.fullmatch(name) and name not in NAMES:
        return f"{said}. Only plain dense tensors of the usual dtypes can be read: torch.save such a state_dict"
    opened = f"torch.load({str(path)!r}, weights_only=False)" if is_torch else f"pickle.load(open({str(path)!r}, 'rb'))"
    is_whole, root = all(isinstance(value, str) for value in stack), name.split(" ")[0].split(".")[0]
    if is_whole and root not in NO_MODULE:
        line = f"torch.save({opened}.state_dict(), 'weights.pt')"
    elif isinstance(next(iter(stack), None), dict) or name in ("collections defaultdict", "collections OrderedDict"):
        line = KEEP.format(opened=opened, arrays=", numpy.ndarray" if root == "numpy" else "")
    else:
        return f"{said}. If you trust it, open it with {opened}, and torch.save the state_dict in it alone"
    return f"{said}. If you trust it, this saves its weights alone: {line}"
