"""Draw the tests' sample: 100 training and 50 test images of each class, with its own SHA256SUMS.

python tests/make_sample.py        # writes tests/sample/, the same bytes every time
"""

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data

SAMPLE = Path(__file__).resolve().parent / "sample"


def main():
    SAMPLE.mkdir(exist_ok=True)
    sums = []
    for split, part, per_class in (("train+val", "train", 100), ("test", "t10k", 50)):
        (published,) = data.load(split)
        labels = published.labels.numpy()
        random = np.random.RandomState(data.SPLIT_SEED)
        chosen = np.concatenate([random.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(10)])
        chosen.sort()
        images = published.images.numpy()[chosen]
        header = np.array([data.IMAGES_MAGIC, len(chosen), 28, 28], ">u4").tobytes()
        label_header = np.array([data.LABELS_MAGIC, len(chosen)], ">u4").tobytes()
        for name, content in (
            (f"{part}-images-idx3-ubyte", header + images.tobytes()),
            (f"{part}-labels-idx1-ubyte", label_header + labels[chosen].astype(np.uint8).tobytes()),
        ):
            (SAMPLE / f"{name}.gz").write_bytes(gzip.compress(content, 9, mtime=0))
            sums.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    (SAMPLE / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
