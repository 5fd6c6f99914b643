"""What Fashion-MNIST is: its classes, the SHA-256 of its files, and the order of its images.

Kaggle's CSV files and folders of pictures hold the published images in another order. Splits and results depend on the
order; restore() puts the images into the published one. It needs dataset/order.npz, which write_order() made from the
published files. A test makes it anew and compares the bytes.
"""

import hashlib
from pathlib import Path

import numpy as np

from dataset import idx
from dataset.idx import DataError

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
NAME = "Fashion-MNIST"

# SHA-256 of the decompressed files: distributions compress them anew, so the sums of the .gz differ.
PUBLISHED = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# What data.fingerprint gives of all published images: with the validation images apart, and among the training images;
# and of the training images alone, as fold runs record it.
FINGERPRINTS = (
    "c727e4c2ff3c5ec9954474d0f8feb2d2a77a29690bd9fb41b92ef1f7b8d5d2fa",
    "ece172613115fb18b120bec8f6c02271af90b8b8f0a5af5c51cbd5ceed68e619",
    "1f243a60b4b748a44c48b9a6f6907be2a08bee3e4e226f0e86fbde8e147b745a",
)
ORDER = Path(__file__).with_name("order.npz")  # "train" and "t10k": uint16 (n,), what order() computes


def check(name: str, array: np.ndarray, label: str) -> None:
    """Raise DataError unless the array is the content of the published file `name`; label: how the error calls it."""
    digest = hashlib.sha256(idx.encode(array)).hexdigest()
    if digest == PUBLISHED[name]:
        return
    known = {value: key for key, value in PUBLISHED.items()}
    if digest in known:
        raise DataError(f"{label} holds the content of {known[digest]}: swapped")
    what = idx.announced(name.split("-")[1], list(array.shape))
    expected = PUBLISHED[name][:12]
    raise DataError(f"{label} is not {NAME}'s, or is altered: {what}, SHA-256 {digest[:12]}…, not {expected}…")


def named(name: str, fingerprint: str | None) -> str:
    """Return the name of a set as a file gives it, or another where its fingerprint, if known, says that name lies."""
    return name if name != NAME or fingerprint in (None, *FINGERPRINTS) else f"{NAME} (own)"


def is_part(part: str, images: np.ndarray, labels: np.ndarray) -> bool:
    """Say whether these are the images and labels of a published part, in the published order."""
    pairs = ((idx.name_of(part, "images"), images), (idx.name_of(part, "labels"), labels))
    return all(hashlib.sha256(idx.encode(array)).hexdigest() == PUBLISHED[name] for name, array in pairs)


def order(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the indices, int64 (n,), that sort images by their pixels, and equal ones by their labels."""
    rows = np.concatenate([images.reshape(len(images), -1), labels[:, None]], axis=1)
    return np.argsort(rows.view(f"V{rows.shape[1]}").ravel(), kind="stable")


def restore(part: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put the images and labels of a published part into the published order; return others as they are."""
    with np.load(ORDER, allow_pickle=False) as stored:
        published = stored[part]
    if not len(images) == len(labels) == len(published) or is_part(part, images, labels):
        return images, labels
    index = np.empty(len(images), np.int64)
    index[published] = order(images, labels)  # the image of rank k in both orders is the same
    restored = images[index], labels[index]
    return restored if is_part(part, *restored) else (images, labels)


def write_order(path: Path, parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write the order of the published parts, images and labels by "train" and "t10k", as restore() reads it."""
    with open(path, "wb") as file:
        np.savez(file, **{part: order(*arrays).astype(np.uint16) for part, arrays in parts.items()})  # type: ignore[arg-type]
