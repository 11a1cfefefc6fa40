"""How long a run took, read from its TensorBoard files."""

import struct
from pathlib import Path


def wall_time(folder: Path) -> float | None:
    """Returns the seconds from the first to the last event of each start of a run, summed; None if there are no events.

    A file is a sequence of records: length (uint64), its checksum, an Event (protobuf), its checksum. An Event begins with
    its time (field 1, a double).

    Args:
      folder: the run's folder `tensorboard`.
    """
    total = None
    for path in sorted(folder.glob("events*")):
        times, data, offset = [], path.read_bytes(), 0
        while offset + 21 <= len(data):
            if data[offset + 12] == 9:
                times.append(struct.unpack_from("<d", data, offset + 13)[0])
            offset += 16 + struct.unpack_from("<Q", data, offset)[0]
        if times and 0 <= (seconds := max(times) - min(times)) < 1e9:
            total = (total or 0) + seconds
    return total
