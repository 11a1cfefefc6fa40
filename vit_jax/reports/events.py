"""How long a run took, read from the TensorBoard files that it wrote."""

import struct
from pathlib import Path


def wall_time(folder: Path) -> float | None:
    """Seconds from the first to the last event of each start of a run, added up; None without any event.

    A file is a chain of records: length uint64, its checksum, an Event of protobuf, its checksum. An Event begins with its time
    (field 1, a double).

    Args:
      folder: the run's folder `tensorboard`.
    """
    total = None
    for path in sorted(folder.glob("events*")):
        times, data, at = [], path.read_bytes(), 0
        while at + 21 <= len(data):
            if data[at + 12] == 9:
                times.append(struct.unpack_from("<d", data, at + 13)[0])
            at += 16 + struct.unpack_from("<Q", data, at)[0]
        if times and 0 <= (seconds := max(times) - min(times)) < 1e9:
            total = (total or 0) + seconds
    return total
