"""Say what a place holds that is no data set, and what to type instead.

raise DataError(diagnose.describe(Path("downloads"), "--data-dir", ["train", "t10k"]))
"""

import contextlib
import itertools
import re
import shlex
import zipfile
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from dataset import forms, idx
from dataset.idx import DataError
from runtime.errors import one_line

TORCH = ("", "processed", "FashionMNIST/processed")  # where torchvision's earlier versions put training.pt and test.pt
PACKED = re.compile(r"\.(t?gz|tar|7z|rar|xz|bz2)$")
IDX_NAMES = "train- and t10k-, each with images-idx3-ubyte and labels-idx1-ubyte, raw or .gz"
MOST_LOOKED_AT = 1_000  # files or names, for a line about them
FORMS = "docs/data.md lists the forms that are read"


def describe(place: Path, flag: str, parts: Sequence[str]) -> str:
    """Say why nothing in a place can be read as the parts of a data set; flag: what named the place."""
    if re.match(r"\w+:/+\w", str(place)):
        return "it is a web address: download the file, and name that"
    if not place.exists():
        return f"there is no such file or folder{_similar(place, flag)}"
    if not place.is_dir():
        return _describe_file(place) + (nearby(place, flag, parts) or f"; {FORMS}")
    return _describe_folder(place) + nearby(place, flag, parts)


def nearby(place: Path, flag: str, parts: Sequence[str]) -> str:
    """Name a folder below a place, or above it, that has all the parts; "" if there is none."""
    parent = place.absolute().parent
    for folder in [*(forms.folders_below(place) if place.is_dir() else []), parent]:
        try:
            for found in forms.find(Path(str(folder)), []):
                by_chance = folder == parent and (found.archive or found.form is forms.NPZ)  # as among downloads
                if by_chance or not all(map(found.files.get, parts)):
                    continue
                with contextlib.suppress(DataError):
                    for part in parts:
                        found.read(part)  # what is as bad is no advice
                    return f"; {folder} has {found.form.name}: {_option(flag, folder)}"
        except (OSError, DataError):
            continue
    return ""


def _option(flag: str, place: idx.File) -> str:
    return f"{flag}{' ' if flag.startswith('-') else '='}{shlex.quote(str(place))}"


def _similar(place: Path, flag: str) -> str:
    if not place.parent.is_dir():
        return ""
    beside = (each.name for each in itertools.islice(place.parent.iterdir(), MOST_LOOKED_AT))
    names = [name for name in beside if name != place.name]  # a link that leads nowhere
    near = get_close_matches(place.name, names, n=1)
    return f"; did you mean {_option(flag, place.with_name(near[0]))}?" if near else ""


def _describe_file(place: Path) -> str:
    if not place.is_file():
        return "it is neither a folder nor a file"
    if place.suffix.lower() == ".zip":
        return _describe_zip(place)
    if PACKED.search(place.name.lower()) and not idx.describe(place):
        return "it is packed: unpack it, and name the folder"
    held = idx.describe(place)
    return f"it is one file{f' of {held}' if held else ''}, not a folder, a .zip or an .npz"


def _describe_zip(place: Path) -> str:
    listed = forms.listed(zipfile.Path(idx.open_zip(place)))
    names = [str(each) for each in itertools.islice(listed, MOST_LOOKED_AT)]
    if any(name.endswith(".npy") for name in names):
        return "it is an .npz with another ending: rename it"
    held = one_line(", ".join(name.removeprefix(str(place)).strip("/") for name in names[:4]))
    return f"no data set is within two folders in it ({held or 'empty'}): unpack it, and name the folder of the files"


def _describe_folder(place: Path) -> str:
    for below in TORCH:
        if all((place / below / name).is_file() for name in ("training.pt", "test.pt")):
            return _convert_torch(place / below)
    folders: list[idx.File] = [place, *forms.folders_below(place, 1)]
    listed_files = (file for folder in folders for file in forms.listed(folder) if file.is_file())
    files = [file for file in itertools.islice(listed_files, MOST_LOOKED_AT) if isinstance(file, Path)]
    for file in files:
        if held := idx.describe(file):
            return f"{file.name} holds {held}, but has another name than is read; copy the files as {IDX_NAMES}"
    if pictures := [file for file in files if file.name.lower().endswith(forms.PICTURES)]:
        return f"it holds pictures ({pictures[0].name}), but not in train/<class>/ and test/<class>/"
    some = itertools.islice(place.iterdir(), MOST_LOOKED_AT)
    names = sorted(each.name + "/" * each.is_dir() for each in some)
    for name in names:
        if PACKED.search(name.lower()):
            return f"it holds {one_line(name)}, which is packed: unpack it, and name the folder"
        if name.endswith(".npy"):
            return f"it holds {one_line(name)}: put all arrays into one file: np.savez('all.npz', x_train=…, y_train=…)"
    listed = f"it holds {one_line(', '.join(names[:4]))}{' and more' if names[4:] else ''}" if names else "it is empty"
    return f"{listed}; {FORMS}"


def _convert_torch(folder: Path) -> str:
    """Give the command that turns torchvision's tensors into IDX files; they are pairs of images and labels."""
    paths = {part: str(folder / name) for part, name in (("train", "training.pt"), ("t10k", "test.pt"))}
    parts = ", ".join(f"{part!r}: torch.load({path!r}, weights_only=True)" for part, path in paths.items())
    code = f"import torch, data; data.write('NEW', {{{parts}}})"
    return f"training.pt and test.pt are of an early torchvision; convert them: {forms.command('-c', code)}"
