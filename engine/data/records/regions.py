"""A detector's regions of a picture, in UNITER's form: read without executing anything, checked, selected."""

import io
import math
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np

from engine.data.records.record import Detections, RecordFault
from engine.sections import Regions

ARRAYS = ("features", "norm_bb", "conf", "soft_labels")
MAX_REGIONS = 1_000  # of one picture, before selection
MAX_BYTES = 1 << 26  # of a picture's file, and of any array in it
_BOX_TOLERANCE = 2e-3  # of boxes: what rounding to float16 does, and a little more
_SUM_TOLERANCE = 1e-2  # of the sum of 1,601 probabilities in float16


def read_npz(key: str, data: bytes, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the arrays `names` that an npz file holds. Sizes are checked before anything is unpacked."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {member.filename: member for member in archive.infolist()}
            return {
                name: _read_array(key, name, archive, members[f"{name}.npy"])
                for name in names
                if f"{name}.npy" in members
            }
    except RecordFault:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many types on broken files
        raise RecordFault(key, f"npz cannot be read ({type(error).__name__}: {error})") from None


def _read_array(key: str, name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.file_size > MAX_BYTES:
        raise RecordFault(key, f"{name} of {member.file_size} bytes, the limit is {MAX_BYTES}")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read_header(file)
        return array_of(key, name, shape, dtype, file.read(), "F" if fortran else "C")


def array_of(
    key: str, name: str, shape: tuple[int, ...], dtype: np.dtype, data: bytes, order: str = "C"
) -> np.ndarray:
    """The array in `data`, when it is one of plain numbers and the bytes are as many as its shape says."""
    if dtype.kind not in "fiub":
        raise RecordFault(key, f"{name} must hold numbers, got an array of {dtype}, which is never opened")
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise RecordFault(key, f"{name} of shape {list(shape)} must have {expected} bytes, got {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def count_regions(key: str, arrays: Mapping[str, np.ndarray], options: Regions) -> int:
    """How many regions of a picture are used, from its "conf" alone."""
    return number_used(_confidence(key, arrays), options)


def number_used(confidence: np.ndarray, options: Regions) -> int:
    """Those above the confidence, within min_count and max_count, as far as there are so many.

    >>> number_used(np.asarray([0.9, 0.5, 0.1, 0.1]), Regions(confidence=0.2, min_count=3, max_count=100))
    3
    """
    sure = int((confidence > options.confidence).sum())
    return min(len(confidence), max(options.min_count, min(options.max_count, sure)))


def select_regions(
    key: str, arrays: Mapping[str, np.ndarray], options: Regions, count: int | None = None
) -> Detections:
    """The `count` regions of highest confidence (none given: as `count_regions` says), checked.

    Without "soft_labels" in the arrays the regions have none.
    """
    confidence = _confidence(key, arrays)
    count = count_regions(key, arrays, options) if count is None else count
    # the first ones where they are sorted, as UNITER's are
    chosen = np.argsort(-confidence, kind="stable")[:count]

    def rows(name: str, *widths: int) -> np.ndarray:
        table = _array(key, arrays, name)
        if table.ndim != 2 or table.shape[1] not in widths or len(table) != len(confidence):
            wanted = " or ".join(str([len(confidence), width]) for width in widths)
            raise RecordFault(key, f"{name} must be {wanted}, got {list(table.shape)}")
        with np.errstate(over="ignore"):  # what does not fit is refused below
            return _finite(key, name, table[chosen].astype(np.float32))

    boxes = _with_area(key, rows("norm_bb", 6, 7))
    features = rows("features", options.feature_values)
    if "soft_labels" not in arrays:
        return Detections(features, boxes, None)
    return Detections(features, boxes, _distributions(key, rows("soft_labels", options.classes)))


def _confidence(key: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    confidence = _array(key, arrays, "conf")
    if confidence.ndim != 1:
        raise RecordFault(key, f"conf must be [regions], got {list(confidence.shape)}")
    if not 1 <= len(confidence) <= MAX_REGIONS:
        raise RecordFault(key, f"{len(confidence)} regions, must be 1 to {MAX_REGIONS}")
    return _finite(key, "conf", confidence.astype(np.float32))


def _array(key: str, arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise RecordFault(key, f"no {name} among its regions' arrays")
    return arrays[name]


def _finite(key: str, name: str, values: np.ndarray) -> np.ndarray:
    # the sum may overflow alone
    if not np.isfinite(values.sum()) and (broken := values[~np.isfinite(values)]).size:
        raise RecordFault(
            key, f"{name} holds {broken.size} values that are not finite, the first is {broken[0]}"
        )
    return values


def _with_area(key: str, boxes: np.ndarray) -> np.ndarray:
    """[n, 7] of [n, 6] or [n, 7]: the area computed anew, as UNITER does."""
    corners, sides = boxes[:, :4], boxes[:, 4:6]
    broken = ((corners < -_BOX_TOLERANCE) | (corners > 1 + _BOX_TOLERANCE)).any(1)
    broken |= (sides < 0).any(1) | (corners[:, 2:] < corners[:, :2]).any(1)
    broken |= (np.abs(corners[:, 2:] - corners[:, :2] - sides) > _BOX_TOLERANCE).any(1)
    if broken.any():
        first = [round(float(value), 4) for value in boxes[broken.argmax(), :6]]
        raise RecordFault(
            key,
            f"{broken.sum()} boxes are not x1 <= x2, y1 <= y2, w = x2 - x1, h = y2 - y1 within 0..1, "
            f"the first is {first}",
        )
    return np.concatenate([boxes[:, :6], sides.prod(1, keepdims=True)], axis=1)


def _distributions(key: str, soft_labels: np.ndarray) -> np.ndarray:
    if (low := float(soft_labels.min())) < 0:
        raise RecordFault(key, f"soft_labels must not be negative, got {low:.4g}")
    sums = soft_labels.sum(1)
    worst = float(sums[np.abs(sums - 1).argmax()])
    if abs(worst - 1) > _SUM_TOLERANCE:
        raise RecordFault(key, f"soft_labels of a region must sum to 1, got {worst:.4g}")
    return soft_labels
