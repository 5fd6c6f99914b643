"""Read what torch.save wrote: recognised by its first bytes, checked for damage, and with nothing in it executed.

content = weights.read("best.pt")     # tensors in dicts, lists and plain values
"""

import glob
import io
import pickletools
import re
import warnings
import zipfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from runtime import cli
from runtime.errors import UserError
from runtime.files import MISTAKEN

MAX_BYTES = 2**32  # of a file
MAX_PICKLE = 2**23  # bytes of the part that is no tensor: weights' names, and logs that others keep beside them
MAX_OPERATIONS = 500_000  # of that part: each may take a few hundred bytes of memory
TOO_MUCH = "holds more than weights and some logs: refused; torch.save the state_dict alone"
# What saves the tensors of a file alone, wherever in it they are, which the user runs.
KEEP = (
    "keep = lambda c: c.state_dict() if isinstance(c, torch.nn.Module) else {{k: keep(v) for k, v in c.items() if "
    "isinstance(v, (dict, torch.Tensor, torch.nn.Module{arrays}))}} if isinstance(c, dict) else torch.as_tensor(c); "
    "torch.save(keep({opened}), 'weights.pt')"
)
UNUSUAL = re.compile(r"torch\._(utils|tensor) _rebuild_\w+|torch q\w+")  # tensors that cannot be read
NO_MODULE = ("collections", "argparse", "numpy", "builtins", "__builtin__", "pathlib", "datetime", "torch", "omegaconf")
PROTOCOL = 2  # of pickle: the one that torch.load reads without running code
ALLOWED = re.compile(  # what the pickle of a state_dict names
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
)
HARMFUL = re.compile(  # what no honest file names
    r"(os|posix|nt|subprocess|sys|shutil|runpy|importlib|socket|pty)\b.*"
    r"|(builtins|__builtin__) (eval|exec|compile|getattr|open|__import__)"
)
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")  # keys others keep a state_dict under
OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before version 1.6
PLAIN = ("str", "bytes", "bytes_or_str", "int", "int_or_bool", "bool", "float", "None")  # in the words of pickletools
SPECIAL = (
    "GLOBAL",
    "EMPTY_TUPLE",
    "LONG1",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
)  # whose kind _kind names more finely

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
ARCHIVES = (  # likewise parts of zip archives
    (
        r"(.*/)?(constants\.pkl|code/.*)",
        "TorchScript: torch.save(torch.jit.load({file}).state_dict(), 'weights.pt') saves its weights",
    ),
    (
        r"(.*/)?(archive_format|models/model\.json|serialized_exported_program\.json)",
        "a program of torch.export: torch.save(torch.export.load({file}).state_dict, 'weights.pt') saves its weights",
    ),
    (
        r".*\.npy",
        "arrays of NumPy: torch.save({{k: torch.from_numpy(v) for k, v in numpy.load({file}).items()}}, 'weights.pt') "
        "makes it readable",
    ),
    (r"(.*/)?model\.weights\.h5", KERAS),
)


class CheckpointError(UserError):
    """A file that is no usable checkpoint."""


class AmbiguousError(CheckpointError):
    """Weights that fit several models."""


def read(path: str | Path) -> Any:
    """Read a file of torch.save, checked as parse does.

    Raises CheckpointError when the file is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.exists():
        if re.match("https?:/", str(path)):
            raise CheckpointError(f"{path}: an address: download the file, and give its name")
        if glob.has_magic(str(path)):
            raise CheckpointError(f"{path}: no such file: leave a pattern to the shell, without quotation marks")
        raise CheckpointError(f"{path}: no such file; `{cli.command('train.py', '--model', 'cnn')}` writes checkpoints")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file{': name one in this folder' if path.is_dir() else ''}")
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_BYTES / 2**30:.0f} GiB, the most that is read")
    return parse(path, path.read_bytes())


def parse(path: Path, content: bytes) -> Any:
    """Return what a file of these bytes holds, checked for damage, with nothing in it executed; errors name the path.

    Raises CheckpointError when it is damaged, something else, or holds more than tensors and plain values.
    """
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):  # what torch.save writes; torch.load does not check the sums
            pickles = _checked_pickles(path, content)
        else:  # what it wrote before version 1.6: five pickles, the fourth of which is the content
            _recognise(path, content)
            pickles = [io.BytesIO(content[: 5 * MAX_PICKLE])] * 5
        for stream in pickles:
            _check_pickle(path, stream, content)
        return from_bytes(content)
    except CheckpointError:
        raise
    except Exception:  # a hostile file can make the unpickler raise anything
        raise CheckpointError(f"{path}: damaged, truncated or not a PyTorch checkpoint") from None


def to_bytes(content: Any) -> bytes:
    """Return what torch.save writes: a zip archive that holds a CRC-32 of each of its parts."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def from_bytes(content: bytes) -> Any:
    """Return what to_bytes was given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _recognise(path: Path, content: bytes) -> None:
    """Refuse a file that is known by its first bytes, with what to do about it."""
    for pattern, advice in SIGNATURES:
        if re.match(pattern, content[:512]):
            raise CheckpointError(f"{path}: {advice.format(file=repr(str(path)))}")


def _checked_pickles(path: Path, content: bytes) -> list[IO[bytes]]:
    """Check a zip archive for damage, and return streams of the pickles in it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > len(content) and _is_stored(members):
            raise CheckpointError(f"{path}: damaged: its parts are longer than the file")  # they overlap
        for pattern, advice in ARCHIVES:
            if any(re.fullmatch(pattern, member.filename) for member in members):
                raise CheckpointError(f"{path}: {advice.format(file=repr(str(path)))}")
        if not _is_stored(members) or not any(member.filename.endswith("data.pkl") for member in members):
            raise CheckpointError(
                f"{path}: a zip archive, but not one of torch.save: unpack it, and give the file inside"
            )
        if damaged := archive.testzip():
            raise CheckpointError(f"{path}: damaged: the checksum of {damaged!r} inside it is wrong")
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        if any(member.file_size > MAX_PICKLE for member in pickles):
            raise CheckpointError(f"{path}: {TOO_MUCH}")
        return [io.BytesIO(archive.read(member)) for member in pickles]


def _is_stored(members: Sequence[zipfile.ZipInfo]) -> bool:
    return all(member.compress_type == zipfile.ZIP_STORED for member in members)


def _check_pickle(path: Path, stream: IO[bytes], content: bytes) -> None:
    """Refuse what a state_dict does not need. torch.load runs no code, but knows functions that fill the memory.

    It follows the pickle's operations with the kinds of values in place of the values. Keys of dicts must be plain:
    tuples within tuples can take for ever to hash.
    """
    stack: list[str] = []
    marks: list[int] = []
    memo: dict[Any, str] = {}
    protocol: Any = 0
    texts: deque[str] = deque(maxlen=2)
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        name, takes = operation.name, operation.stack_before
        if name == "STACK_GLOBAL" or (name == "GLOBAL" and not ALLOWED.fullmatch(str(argument))):
            raise CheckpointError(_objects(path, argument or " ".join(texts), stack, protocol, content))
        if count > MAX_OPERATIONS:
            raise CheckpointError(f"{path}: {TOO_MUCH}")
        if name == "PROTO":
            protocol = argument
        if isinstance(argument, str):
            texts.append(argument)
        start = len(stack) - len(takes)
        if pickletools.markobject in takes:
            start = marks.pop() - takes.index(pickletools.markobject)
        taken, made = stack[start:], [each.name for each in operation.stack_after]
        del stack[start:]
        if name == "MARK":
            marks.append(len(stack))
        elif name == "MEMOIZE":
            memo[len(memo)], made = taken[0], taken
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            made = [memo[argument]]
        elif not _is_usual(name, taken):
            raise CheckpointError(f"{path}: its dicts have keys that are no names: refused, nothing was run")
        stack += [_kind(name, argument, taken)] if name in SPECIAL else made


def _is_usual(operation: str, taken: list[str]) -> bool:
    """Say whether the kinds of values that an operation of a pickle takes are those in a state_dict."""
    match operation:
        case "SETITEM" | "SETITEMS":  # dict, key, value; or dict, mark, key, value, key, value ...
            return all(key in PLAIN for key in (taken[1:2] if operation == "SETITEM" else taken[2::2]))
        case "REDUCE":
            return taken[0] == "function" or taken == ["OrderedDict", "empty"]
        case "BUILD":
            return taken[1] == "dict"
        case "BINPERSID":
            return taken[0] in ("flat", *PLAIN)
        case "NEWOBJ":
            return False
    return True


def _kind(operation: str, argument: Any, taken: list[str]) -> str:
    """Name the kind of value that one of the operations in SPECIAL makes."""
    if operation == "GLOBAL":
        return "OrderedDict" if argument.endswith("OrderedDict") else "function"
    if operation == "EMPTY_TUPLE":
        return "empty"
    if operation == "LONG1":
        return "int" if abs(argument) < 2**63 else "long"
    return "flat" if {*taken} <= {"mark", "function", *PLAIN} else "nested"


def _objects(path: Path, name: str, stack: list[str], protocol: int, content: bytes) -> str:
    """Say which object a file holds, and how to save the weights alone; stack: the kinds of what was read before it."""
    named = name.replace(" ", ".") if re.fullmatch(r"[\w.]{1,60} [\w.]{1,60}", name, re.ASCII) else "Python object"
    is_torch = content.startswith((b"PK", OLD_FORMAT))
    what = f"holds {named}, not only weights" if is_torch else f"a pickle with {named}, not a file of torch.save"
    if is_torch and ALLOWED.fullmatch(name):
        what = f"saved with pickle_protocol={protocol}, which cannot be read without the risk of running code"
    said = f"{path}: {what}: refused, nothing was run"
    if HARMFUL.fullmatch(name) or named == "Python object":
        return said
    if UNUSUAL.fullmatch(name) and not ALLOWED.fullmatch(name):
        return f"{said}. Only plain dense tensors of the usual dtypes can be read: torch.save such a state_dict"
    opened = f"torch.load({str(path)!r}, weights_only=False)" if is_torch else f"pickle.load(open({str(path)!r}, 'rb'))"
    is_whole, root = {*stack} <= {"str", "mark"}, name.split(" ")[0].split(".")[0]
    if is_whole and root not in NO_MODULE:
        line = f"torch.save({opened}.state_dict(), 'weights.pt')"
    elif stack[:1] in (["dict"], ["any"]) or name in ("collections defaultdict", "collections OrderedDict"):
        line = KEEP.format(opened=opened, arrays=", numpy.ndarray" if root == "numpy" else "")
    else:
        return f"{said}. If you trust it, open it with {opened}, and torch.save the state_dict in it alone"
    return f"{said}. If you trust it, this saves its weights alone: {line}"
