"""HTTP downloads of checkpoints, data sets and images: resumable, checked, bounded in bytes and in time."""

import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError, printable
from vit_jax.files import locked, sha256
from vit_jax.transfer import Answer, Broken, Refused, Unreachable, content_length, min_bytes, open_url

__all__ = ["MAX_BYTES", "Refused", "Unreachable", "download", "read"]

_log = logging.getLogger("vit_jax")

_PAUSES = (1.0, 2.0, 4.0)  # seconds before each retry; a retry that brings `min_bytes` starts the count again
_RETRIED = (408, 429, 500, 502, 503, 504)  # temporary failures of a server
MAX_BYTES = 2**34  # if the caller knows no lower limit


def download(
    address: str,
    target: Path,
    size: int | None = None,
    most: int = MAX_BYTES,
    check: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Downloads `address` to `target`, which appears when it is complete and checked; one process at a time.

    The received bytes are in a hidden file next to the target, and a later call continues an interrupted download.

    Args:
      address: http:// or https://.
      target: path of the file. An existing file is checked and returned.
      size: of the file in bytes, if known.
      most: the largest size in bytes that is accepted if `size` is not known.
      check: raises a UserError if the file at a path is not the wanted one.

    Returns:
      `target`.

    Raises:
      Refused: if the server does not give the file; Unreachable if there is no connection.
      OSError: if the file cannot be written.
    """
    with locked(target.with_name(f".{target.name}.lock"), f"downloads {target.name}"):
        part = target.with_name(f".{target.name}.part")
        path = target if target.is_file() else part
        if path is part:
            _receive(address, part, size, most, target.name)
        try:
            wanted = _read_state(part).get("sha256") if path is part else None
            if wanted and (found := sha256(part)) != wanted:
                raise UserError(f"its SHA-256 is {found}, the server says {wanted}")
            check(path)
        except UserError as error:
            if path is part:
                part.unlink()  # otherwise the next call would continue it
            raise Refused(f"not that file: {str(error).replace(str(path), 'it')}") from None
        if path is part:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, target)
            _state_of(part).unlink(missing_ok=True)
    return target


def read(address: str, most: int, seconds: float) -> tuple[bytes, str]:
    """Returns the bytes at an http(s) address and their media type, such as "image/png".

    Args:
      address: http:// or https://.
      most: the largest size in bytes that is accepted.
      seconds: limit for the whole transfer.

    Raises:
      Refused: if the server does not give them; Unreachable if there is no connection.
    """
    content = bytearray()
    try:
        with open_url(address, {}, seconds) as (answer, chunks):
            if answer.status != 200:
                raise Refused(answer.status_line)
            total = content_length(answer, address)
            if total is not None and total > most:
                raise Refused(f"{total:,} bytes, expected at most {most:,}")
            for chunk in chunks:
                content += chunk
                if len(content) > most:
                    raise Refused(f"more than {most:,} bytes")
    except Broken as error:
        raise Refused(str(error)) from None
    if total is not None and len(content) != total:
        raise Refused(f"{len(content):,} of {total:,} bytes")
    return bytes(content), answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _receive(address: str, part: Path, size: int | None, most: int, title: str) -> None:
    """Downloads a file to `part`, continuing an earlier download; retries as long as requests bring bytes."""
    state = _read_state(part)
    if state.get("address") != address or _size_of(part) > (state["total"] or 0):
        part.unlink(missing_ok=True)
    best, tries = 0, 0
    while True:
        try:
            _request(address, part, size, most, title)
            return
        except Broken as error:
            there = _size_of(part)
            if there - best >= min_bytes():
                best, tries = there, 0
            if tries == len(_PAUSES):
                raise Refused(str(error)) from None
            _log.info("%s: %s after %d bytes; trying again in %g s", printable(address), error, there, _PAUSES[tries])
            time.sleep(_PAUSES[tries])
            tries += 1


def _request(address: str, part: Path, size: int | None, most: int, title: str) -> None:
    """Makes one request for the missing bytes of `part`."""
    there, state = _size_of(part), _read_state(part)
    if there and there == state["total"]:
        return  # an earlier process ended after the last byte and before the rename
    headers = {}
    if there and state["validator"] and state["total"]:
        headers = {"Range": f"bytes={there}-", "If-Range": state["validator"]}
    with open_url(address, headers, None) as (answer, chunks):
        if not (headers and answer.status == 206):
            if answer.status != 200:
                _refuse(answer, part, bool(headers))
            there = 0
        total = content_length(answer, address)
        if there:
            _check_range(answer, part, there, state["total"])
            total = state["total"]
        if total is not None and (total != size if size is not None else total > most):
            raise Refused(f"{total:,} bytes, expected {f'{size:,}' if size is not None else f'at most {most:,}'}")
        if not there:
            _start(address, part, answer, total)
        bound = total if total is not None else size if size is not None else most
        megabytes = f"{total / 1e6:.1f} MB" if total is not None else "of unknown size"
        _log.warning("downloading %s (%s%s)", printable(address), f"{there / 1e6:.1f} of " if there else "", megabytes)
        with open(part, "ab" if there else "wb") as file, _bar(title, total, there) as bar:
            for chunk in chunks:
                there += len(chunk)
                if there > bound:
                    raise Refused(f"more than the expected {bound:,} bytes")
                file.write(chunk)
                bar.update(len(chunk) / 1e6)
    if total is not None and there != total:
        raise Broken(f"{there:,} of {total:,} bytes")


def _refuse(answer: Answer, part: Path, ranged: bool) -> None:
    """Raises the error for an answer without the file."""
    if answer.status == 416 and ranged:
        part.unlink()
        raise Broken(answer.status_line)
    if answer.status in (206, 416):
        raise Refused(f"{answer.status_line}, although no range was asked for")
    if answer.status in _RETRIED:
        raise Broken(answer.status_line)
    raise Refused(answer.status_line)


def _check_range(answer: Answer, part: Path, there: int, total: int) -> None:
    """Raises Broken and removes the part, unless the answer continues it."""
    found = re.fullmatch(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", answer.headers.get("Content-Range", ""))
    if not found or int(found[1]) != there or int(found[3]) != total:
        part.unlink()
        raise Broken(f"{answer.status_line} with a range that was not asked for")


def _start(address: str, part: Path, answer: Answer, total: int | None) -> None:
    """Starts an empty part and writes down its address, and the validator by which the server knows an unchanged file."""
    part.unlink(missing_ok=True)  # first, so that old bytes never have a new validator
    etag = answer.headers.get("ETag", "")
    validator = etag if etag.startswith('"') else answer.headers.get("Last-Modified")
    state = {"address": address, "validator": validator, "total": total, "sha256": answer.digest}
    _state_of(part).write_text(json.dumps(state))


def _state_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_state(part: Path) -> dict[str, Any]:
    """Returns what `_start` wrote; without an address if the file is missing or damaged."""
    try:
        state = json.loads(_state_of(part).read_text())
        total = state["total"]
        if isinstance(state["address"], str) and (total is None or (type(total) is int and total > 0)):
            return {"validator": None, "sha256": None} | state
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    return {"total": None}


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _bar(title: str, total: int | None, there: int) -> Any:
    """Returns a progress bar in MB, which is shown only if standard error is a terminal."""
    from tqdm import tqdm

    known = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} MB [{elapsed}<{remaining}, {rate_fmt}]"
    layout = known if total else "{desc}: {n:.1f} MB [{elapsed}, {rate_fmt}]"
    return tqdm(
        total=total and total / 1e6, initial=there / 1e6, desc=printable(title), unit="MB", bar_format=layout, disable=None
    )
