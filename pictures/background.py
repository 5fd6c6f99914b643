"""Tell the object of a picture from a background that has no single colour.

mask, clearness = find_object(pixels)      # uint8 (height, width, 3) -> bool (height, width), float from 0 to 1

Two Gaussian mixtures, of the background's colours and of the object's, are fitted in turns with the mask that they
give, as GrabCut does (Rother et al. 2004, doi:10.1145/1015706.1015720); a blur takes the place of its graph cut.
The first background is the picture's border. There are two first objects: the middle of the picture, and what is least
like the border there. Of the two masks that they end in, the one with the clearer edge is taken.

shades = fit_border(pixels, 0.9)           # a background that changes smoothly from edge to edge, if there is one
"""

import numpy as np
from PIL import Image

WORKING = 112  # pixels of the longest edge, at which the object is looked for
BAND = 0.04  # of the longest edge: the border
UNLIKE = 0.7  # of the middle's pixels: those least like the border
STARTS = ((4, 4, 1.0), (8, 4, UNLIKE))  # Gaussians of the background and of the object, and the share of the middle
FIRST_STEPS, STEPS = 8, 2  # of expectation and maximisation: at first, and in each round
ROUNDS = 6  # of fitting both mixtures and the mask
NOISE = 4.0  # added to the variances of L, a and b
CLIP = 8.0  # a pixel's log-likelihood ratio counts at most so much
BLUR = 1.5  # pixels
LARGE = 0.1  # of the largest part's size: smaller parts are specks
CLEAR = 20.0  # difference in L, a and b between neighbours, from which an edge is as clear as can be
CUT = 0.5  # weight of the share of the picture's border that a mask covers
FEW, MOST = 0.01, 0.99  # a mask of less or more of the picture is none
SHADE = 9.0  # distance in RGB from a smooth shade, up to which a pixel of the border has it
PIECE = 2048  # points of a matrix product: for more, NumPy starts threads, which takes longer
ROW, COLUMN = np.triu_indices(3)
TO_XYZ = np.array(  # IEC 61966-2-1, each row divided by its sum: the white of D65
    [[0.43388, 0.37622, 0.18990], [0.21267, 0.71515, 0.07218], [0.01776, 0.10947, 0.87277]], np.float32
)


def find_object(pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """Find the object in an RGB picture: its mask, bool (height, width), and how clear its edge is, from 0 to 1.

    pixels: uint8 (height, width, 3). The mask is empty where no object was found.
    """
    height, width = pixels.shape[:2]
    lab = to_lab(_reduced(pixels))
    masks = [without_thin_parts(_separate(lab, *start)) for start in STARTS]
    edges = _edges(lab)
    clearness, mask = max(((_clearness(mask, edges), mask) for mask in masks), key=lambda pair: pair[0])
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)), clearness


def fit_border(pixels: np.ndarray, least: float) -> np.ndarray | None:
    """Fit a background of smooth shades to the border of an RGB picture, such as a wall in uneven light.

    pixels: uint8 (height, width, 3). Returns the shades, float32 (height, width, 3), of which each channel is a
    polynomial of second degree; None where less than this share of the border has them. An object may cover the rest.
    """
    working = _reduced(pixels).astype(np.float32)
    is_border = _border(*working.shape[:2])
    y, x = (places[is_border] for places in np.mgrid[-1 : 1 : 1j * len(working), -1 : 1 : 1j * working.shape[1]])
    powers, colours = np.stack([np.ones_like(x), x, x * x, y, x * y, y * y], 1), working[is_border]
    used = np.ones(len(powers), bool)
    for _ in range(ROUNDS):
        factors = np.linalg.lstsq(powers[used], colours[used])[0].astype(np.float32)
        distance = np.linalg.norm(powers @ factors - colours, axis=1)
        used = distance <= max(SHADE, np.median(distance))
    if (distance <= SHADE).mean() < least:
        return None
    y, x = (np.linspace(-1, 1, edge, dtype=np.float32) for edge in pixels.shape[:2])
    y, x = y[:, None, None], x[:, None]
    one, x1, x2, y1, xy, y2 = factors
    return np.asarray(one + x * (x1 + x * x2) + y * (y1 + x * xy + y * y2))


def _reduced(pixels: np.ndarray) -> np.ndarray:
    """Reduce a picture, uint8 (height, width, 3), so that its longest edge has WORKING pixels, and none less than 8."""
    size = [max(8, round(WORKING * edge / max(pixels.shape[:2]))) for edge in pixels.shape[1::-1]]
    return np.asarray(Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.BOX))


def outermost(values: np.ndarray) -> np.ndarray:
    """Return the values, (height, width, ...), of the first and last row and column: (n, ...)."""
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def _border(height: int, width: int) -> np.ndarray:
    """Return which pixels are the border, a band around the picture: bool (height, width)."""
    band = max(1, round(BAND * max(height, width)))
    is_border = np.ones((height, width), bool)
    is_border[band:-band, band:-band] = False
    return is_border


def to_lab(pixels: np.ndarray) -> np.ndarray:
    """Convert sRGB, uint8 (..., 3), to CIE L*a*b* of D65, float32 (..., 3)."""
    value = np.arange(256, dtype=np.float32) / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    x, y, z = np.moveaxis(linear[pixels] @ TO_XYZ.T, -1, 0)
    x, y, z = (np.where(each > 0.008856, np.cbrt(each), 7.787 * each + 16 / 116) for each in (x, y, z))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1).astype(np.float32)


def _separate(lab: np.ndarray, behind: int, before: int, share: float) -> np.ndarray:
    """Separate object and background: bool (height, width), of colours (height, width, 3).

    behind, before: Gaussians of the background and of the object; share: of the middle's pixels, the object begins
    with this share that is least like the border.
    """
    from scipy import ndimage

    height, width = lab.shape[:2]
    points = _with_products(lab.reshape(-1, 3).T)
    is_border = _border(height, width)
    is_middle = np.zeros((height, width), bool)
    is_middle[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    background = _begin(points[:, is_border.ravel()], behind)
    middle = points[:, is_middle.ravel()]
    likeness = _log_density(middle, background)
    front = _begin(middle[:, likeness <= np.quantile(likeness, share)], before)
    for _ in range(ROUNDS):
        ratio = (_log_density(points, front) - _log_density(points, background)).reshape(height, width)
        mask = ndimage.gaussian_filter(ratio.clip(-CLIP, CLIP), BLUR, mode="nearest") > 0
        if not FEW < mask.mean() < MOST:
            break
        front = _refit(points[:, mask.ravel()][:, ::2], front, STEPS)
        background = _refit(points[:, ~mask.ravel()][:, ::2], background, STEPS)
    return mask


def without_thin_parts(mask: np.ndarray, rim: int = 0) -> np.ndarray:
    """Keep the large parts of a mask, without lines of one or two pixels and a rim of so many, and fill their holes."""
    from scipy import ndimage

    if rim:
        mask = ndimage.binary_erosion(mask, iterations=rim)
    return large_parts(ndimage.binary_opening(mask), LARGE)


def large_parts(mask: np.ndarray, share: float) -> np.ndarray:
    """Keep the parts of a mask that have this share of the largest connected part's size, and fill their holes."""
    from scipy import ndimage

    parts, count = ndimage.label(mask)
    if not count:
        return np.zeros_like(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return ndimage.binary_fill_holes((sizes >= share * sizes.max())[parts])


def _edges(lab: np.ndarray) -> np.ndarray:
    """Measure the largest change of colour at and beside each pixel, from 0 to 1."""
    from scipy import ndimage

    squares = sum(ndimage.sobel(lab[..., channel], axis) ** 2 for channel in range(3) for axis in (0, 1))
    return (ndimage.maximum_filter(np.sqrt(squares), 3) / (8 * CLEAR)).clip(0, 1)


def _clearness(mask: np.ndarray, edges: np.ndarray) -> float:
    """Say how clear the edge of a mask is: the mean change of colour along it, less where it leaves the picture."""
    from scipy import ndimage

    if not FEW < mask.mean() < MOST:
        return 0.0
    edge = mask & ~ndimage.binary_erosion(mask, border_value=1)
    cut = outermost(mask).mean()
    return max(0.0, float(edges[edge].mean() - CUT * cut))


# --- mixtures of Gaussians -------------------------------------------------------------------------------
# A mixture is an array (k, 10): mixture @ points are the log-densities of its k Gaussians. scikit-learn's would do, but
# takes a second to load.


def _with_products(colours: np.ndarray) -> np.ndarray:
    """Return the points (10, n) of colours (3, n): 1, the colour and the products of its values."""
    return np.ascontiguousarray(np.concatenate([np.ones_like(colours[:1]), colours, colours[ROW] * colours[COLUMN]]))


def _begin(points: np.ndarray, count: int) -> np.ndarray:
    """Fit a mixture of so many Gaussians, which begins with splits of the widest group (Orchard and Bouman 1991)."""
    colours, groups = points[1:4], np.zeros(points.shape[1], int)
    spreads = [_spread(colours)]
    for new in range(1, count):
        widest = max(range(new), key=lambda group: spreads[group][0])
        if not spreads[widest][0] > 0:
            break  # all of one colour
        along = spreads[widest][1] @ colours
        groups[(groups == widest) & (along > along[groups == widest].mean())] = new
        spreads[widest] = _spread(colours[:, groups == widest])
        spreads.append(_spread(colours[:, groups == new]))
    return _refit(points, _mixture(points, np.eye(count, dtype=np.float32)[:, groups]), FIRST_STEPS)


def _spread(colours: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the sum of squares of colours (3, n) along the widest direction, and this direction."""
    if colours.shape[1] < 4:
        return 0.0, np.ones(3, np.float32)
    values, vectors = np.linalg.eigh(np.cov(colours))
    return values[-1] * colours.shape[1], vectors[:, -1].astype(np.float32)


def _refit(points: np.ndarray, mixture: np.ndarray, steps: int) -> np.ndarray:
    """Take steps of expectation and maximisation."""
    for _ in range(steps):
        logs = _log_densities(points, mixture)
        shares = _exp(logs - logs.max(0))
        mixture = _mixture(points, shares / shares.sum(0))
    return mixture


def _mixture(points: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Fit the mixture whose Gaussians have these shares (k, n) of the points."""
    moments = (shares @ points.T).astype(np.float64)
    counts = moments[:, 0] + 1e-3
    means = moments[:, 1:4] / counts[:, None]
    covariances = np.empty((len(counts), 3, 3))
    products = moments[:, 4:] / counts[:, None] - means[:, ROW] * means[:, COLUMN]
    covariances[:, ROW, COLUMN] = covariances[:, COLUMN, ROW] = products
    covariances += NOISE * np.eye(3)
    inverses = np.linalg.inv(covariances)
    linear = np.einsum("kij,kj->ki", inverses, means)
    constant = np.log(counts / counts.sum()) - (np.log(np.linalg.det(covariances)) + (linear * means).sum(1)) / 2
    quadratic = -inverses[:, ROW, COLUMN] * np.where(ROW == COLUMN, 0.5, 1)
    return np.concatenate([constant[:, None], linear, quadratic], 1).astype(np.float32)


def _log_density(points: np.ndarray, mixture: np.ndarray) -> np.ndarray:
    """Return the logarithm of a mixture's density at points (10, n), but for a constant: (n,)."""
    logs = _log_densities(points, mixture)
    highest = logs.max(0)
    return highest + np.log(_exp(logs - highest).sum(0))


def _log_densities(points: np.ndarray, mixture: np.ndarray) -> np.ndarray:
    """Return the logarithms of the densities of a mixture's Gaussians at points (10, n): (k, n)."""
    pieces = range(0, points.shape[1], PIECE)
    return np.concatenate([mixture @ points[:, start : start + PIECE] for start in pieces], 1)


def _exp(logs: np.ndarray) -> np.ndarray:
    """Return the exponentials of logarithms, none so small that the processor would be slow with it."""
    return np.exp(np.maximum(logs, -50))
