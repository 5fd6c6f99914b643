"""Make a data folder of ten classes of your own from a folder of pictures.

python -m pictures.folder IMAGES FOLDER
python train.py --model cnn --data-dir FOLDER --checkpoint-dir again/own

IMAGES holds train/<class>/* and test/<class>/*, as for torchvision's ImageFolder. The folders' names are the classes.
Pictures of 28x28 grey pixels are taken as they are; all others are converted as predict.py converts them.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import cli
from runtime.errors import UserError
from runtime.files import check_folder

if TYPE_CHECKING:
    import numpy as np

PROGRAM = "python -m pictures.folder"
CLASS_COUNT = 10
CONVERTED = "converted as predict.py does"
TAKEN = "taken as they are (28x28, grey, on black)"
TAKEN_TOO = "taken as they are (28x28, grey, but not on black: predict.py would convert them)"
PARTS = {"train": "train", "test": "t10k"}  # folder below IMAGES -> the part's name in the data folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser("Make a data folder of ten classes of your own from a folder of pictures.")
    parser.prog = PROGRAM
    parser.add_argument(
        "images", metavar="IMAGES", type=Path, help="holds train/<class>/* and test/<class>/*, ten classes"
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to write; must be empty or not exist yet")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the script."""
    args = parse_args(argv)
    from dataset import sources

    refuse_overwriting(args.folder)
    classes = find_classes(args.images)
    sources.check_classes(classes)  # at once; the pictures take a while
    parts = {part: read_part(args.images / name, classes) for name, part in PARTS.items()}
    sources.write(args.folder, parts, classes)
    print(f"{cli.shown(args.folder)}: a data set with the classes {', '.join(classes)}")
    words = ("--model", "cnn", "--data-dir", args.folder, "--checkpoint-dir", "again/own")
    print(f"next: {cli.command('train.py', *words)}")
    return 0


def refuse_overwriting(folder: Path) -> None:
    """Raise UserError unless the folder is empty or does not exist."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{cli.shown(folder)} is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{cli.shown(folder)} is not empty: nothing is overwritten; name a new folder")
    check_folder(folder)


def find_classes(images: Path) -> list[str]:
    """Return the ten class names, sorted: the folders in images/train, the same as in images/test.

    Raises UserError if there are not ten, or if train and test differ.
    """
    train, test = (_folders(images / name) for name in PARTS)
    if different := sorted(set(train) ^ set(test)):
        where = "train" if different[0] in train else "test"
        raise UserError(f"train and test have different class folders: {different[0]!r} is only in {where}")
    if len(train) != CLASS_COUNT:
        raise UserError(f"{cli.shown(images / 'train')} has {len(train)} class folders; it must have {CLASS_COUNT}")
    return train


def _folders(folder: Path) -> list[str]:
    """List the names of the folders in a folder, without hidden ones."""
    if not folder.is_dir():
        raise UserError(f"{cli.shown(folder)} is missing: IMAGES must hold train/<class>/* and test/<class>/*")
    return sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def read_part(folder: Path, classes: Sequence[str]) -> tuple["np.ndarray", "np.ndarray"]:
    """Read all pictures in folder/<class>: images uint8 (n, 28, 28), labels int64 (n,). Print how each was taken.

    Raises UserError for a class without pictures and for a picture that cannot be read.
    """
    import numpy as np
    from tqdm import tqdm

    files = list_pictures(folder, classes)
    images: list[np.ndarray] = []
    ways: Counter[str] = Counter()
    for path, _ in tqdm(files, desc=folder.name, unit=" pictures", disable=None):
        image, way = read_picture(path)
        images.append(image)
        ways[way] += 1
    print(f"{folder.name}: {len(files):,} pictures: {', '.join(f'{n:,} {way}' for way, n in sorted(ways.items()))}")
    return np.stack(images), np.array([label for _, label in files], np.int64)


def list_pictures(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """List the pictures of all classes in order, with their labels."""
    from pictures.read import files_below

    files = []
    for label, name in enumerate(classes):
        found = files_below(folder / name)
        if not found:
            raise UserError(f"{cli.shown(folder / name)}: there is no picture")
        files += [(path, label) for path in found]
    return files


def read_picture(path: Path) -> tuple["np.ndarray", str]:
    """Read a picture as an image of the data set, uint8 (28, 28), and say how it was taken."""
    import numpy as np

    from pictures.convert import convert, is_native, is_small_grey
    from pictures.read import PictureError, read

    try:
        picture = read(path)
        pixels = np.asarray(picture)
        if is_small_grey(pixels):
            return pixels[..., 0].copy(), TAKEN if is_native(pixels) else TAKEN_TOO
        return convert(picture), CONVERTED
    except PictureError as error:
        raise UserError(f"{cli.shown(path)}: {error}") from None


if __name__ == "__main__":
    cli.run(main, PROGRAM)
