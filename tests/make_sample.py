"""Draw the tests' sample: 100 training and 50 test images of each class, with a SHA256SUMS.

python tests/make_sample.py        # writes tests/sample/, the same bytes every time
"""

import gzip
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data

SAMPLE = Path(__file__).resolve().parent / "sample"


def main():
    parts = {}
    for split, part, per_class in (("train+val", "train", 100), ("test", "t10k", 50)):
        (published,) = data.load(split)
        labels = published.labels.numpy()
        random = np.random.RandomState(data.SPLIT_SEED)
        chosen = np.concatenate([random.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(10)])
        chosen.sort()
        parts[part] = published.images[chosen], published.labels[chosen]
    data.write(SAMPLE, parts)
    for path in SAMPLE.glob("*-ubyte"):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
        path.unlink()


if __name__ == "__main__":
    main()
