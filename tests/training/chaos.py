"""Disturbs a small run at random moments and starts it again until it ends, many times: `make chaos`.

    python -m tests.training.chaos CASES FOLDER

A case is a number, which is also the seed of its draws: how a run is disturbed (KINDS) and when (MOMENTS), once or twice. Then
it is started until it ends, and compared with an uninterrupted run: parameters, predictions, metrics, descriptions, the names
of all files and their size. FOLDER/cases.jsonl has a line for each finished case, so that a campaign that is ended goes on.
The folders of cases with differences stay, and the exit status is then 1.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.training.starts import EVAL_EVERY, ROOT, STEPS, Start, differences, metrics, reached
from vit_jax.files import whole_file
from vit_jax.training import restore

DISK = 8 * 2**20  # bytes of the small disk
DAMAGES = ("bits flipped", "file truncated", "file missing")  # of one file of the newest state


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a run is disturbed.

    Attributes:
      statuses: the exit statuses that the process may then have.
      weight: how often the kind is drawn, next to the others.
      signals: which are sent one after the other; on several hosts, to one of them.
      then: what happens to its files afterwards: one of DAMAGES, or "read-only": it is started on a folder that cannot be
        written. Instead of signals, "full": its disk is full for a while.
    """

    statuses: set[int]
    weight: int = 1
    signals: tuple[int, ...] = ()
    then: str = ""
    hosts: int = 1


# Before its handlers are set, a signal ends a process by itself, which a shell reports as the same status. A run that is at its
# end when a signal arrives ends with 0.
KINDS = {
    "KILL": Kind({-9}, 6, (signal.SIGKILL,)),
    "STOP, KILL": Kind({-9}, 3, (signal.SIGSTOP, signal.SIGKILL)),
    "TERM": Kind({-15, 143, 0}, 3, (signal.SIGTERM,)),
    "INT": Kind({-2, 130, 0}, 1, (signal.SIGINT,)),
    "TERM, TERM": Kind({-15, 143, 0}, 1, (signal.SIGTERM, signal.SIGTERM)),
    "KILL one of two hosts": Kind({0, 1}, 2, (signal.SIGKILL,), hosts=2),
    # A host that has no handlers yet ends alone.
    "TERM to one of two hosts": Kind({0, 1, 143}, 1, (signal.SIGTERM,), hosts=2),
    "disk full": Kind({0, 1}, 2, then="full"),
    "folder read-only": Kind({-9}, 1, (signal.SIGKILL,), "read-only"),
    **{damage: Kind({-9}, 1, (signal.SIGKILL,), damage) for damage in DAMAGES},
}

# When: waits for that moment. The arguments are the process, its folder, a random step and the seconds that a run takes.
MOMENTS: dict[str, Callable[[Start, Path, int, float], object]] = {
    "any": lambda start, workdir, step, seconds: start.wait(seconds=seconds * step / STEPS),
    "start-up": lambda start, workdir, step, seconds: start.wait(lambda: reached(workdir, 1), seconds * step / STEPS),
    "step": lambda start, workdir, step, seconds: start.wait(lambda: reached(workdir, step)),
    "evaluation": lambda start, workdir, step, seconds: start.wait(
        lambda: reached(workdir, step // EVAL_EVERY * EVAL_EVERY + EVAL_EVERY - 1)
    ),
    "saving": lambda start, workdir, step, seconds: start.wait(
        lambda: reached(workdir, step) and any(workdir.glob("checkpoints/*orbax-checkpoint-tmp*"))
    ),
    "weights": lambda start, workdir, step, seconds: start.wait(lambda: any(workdir.glob(".*.npz.*.tmp"))),
    "last step": lambda start, workdir, step, seconds: start.wait(lambda: reached(workdir, STEPS - 1)),
}


def mount(*arguments: str | Path) -> None:
    """Raises PermissionError if this is not allowed."""
    if not shutil.which("mount"):
        raise PermissionError("there is no mount here")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr.strip())


def unmount(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # no such command
        subprocess.run(["umount", "--lazy", folder], capture_output=True)


def fill_disk(start: Start, draw: random.Random) -> None:
    """Fills the disk of a run for a random time, or until the run reports it."""
    full = start.workdir.parent / "full"
    free = shutil.disk_usage(full.parent).free - draw.choice([0, draw.randrange(300_000)])
    with contextlib.suppress(OSError):  # the run has written meanwhile
        full.write_bytes(bytes(max(free, 0) // 4096 * 4096))
    ends_soon = draw.random() < 0.5
    start.wait(lambda: ends_soon and "Earlier states are unchanged" in start.log_text(), draw.uniform(0.5, 20))
    full.unlink()


def start_read_only(config: Path, workdir: Path) -> list[str]:
    """Starts the run while its folder cannot be written; returns what is wrong with that."""
    if not workdir.is_dir():
        return []
    before = sorted(workdir.rglob("*"))
    mount("--bind", workdir, workdir)
    try:
        mount("-o", "remount,bind,ro", workdir)
        start = Start(config, workdir)
        status, last = start.wait(), start.log_text().splitlines()[-1]
    finally:
        unmount(workdir)
    right = status == 1 and last.startswith("error: ") and "Read-only file system" in last
    return [] if right and before == sorted(workdir.rglob("*")) else [f"status {status} on a read-only folder: {last}"]


def damage(workdir: Path, how: str, draw: random.Random) -> None:
    """Damages one file of the newest state."""
    newest = workdir / "checkpoints" / str(restore.steps(workdir / "checkpoints")[0])
    path = draw.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    if how == "file missing":
        path.unlink()
    elif content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content if how == "bits flipped" else content[: draw.randrange(len(content))])


def disturb(config: Path, workdir: Path, kind: Kind, draw: random.Random, seconds: float) -> tuple[str, list[str]]:
    """Starts the run and disturbs it before its end; returns the moment, and what is wrong."""
    while True:
        start, moment = Start(config, workdir, draw.random() > 0.08, kind.hosts), draw.choice([*MOMENTS])
        if kind.then in DAMAGES:
            start.wait(lambda: len(restore.steps(workdir / "checkpoints")) > 1)
        MOMENTS[moment](start, workdir, draw.randrange(1, STEPS), seconds)
        start.wait(seconds=draw.choice([0, draw.uniform(0, 0.02), draw.uniform(0, 0.3)]))
        lines, began = metrics(workdir).count("\n"), not start.ended()
        if began and kind.then == "full":
            fill_disk(start, draw)
        for number in kind.signals:
            start.send(number) if kind.hosts == 1 else start.send_to_host(draw.randrange(kind.hosts), number)
            time.sleep(draw.uniform(0, 0.1))
        status = start.wait()
        if began and (status or 0 in kind.statuses):
            break
        shutil.rmtree(workdir)  # it ended before
    moment += f", {lines} lines, status {status}"
    if status not in kind.statuses:
        start.send(signal.SIGKILL)
        return moment, [moment]
    if kind.then == "read-only":
        return moment, start_read_only(config, workdir)
    if kind.then in DAMAGES:
        damage(workdir, kind.then, draw)
    return moment, []


def finish(config: Path, workdir: Path, reference: Path, damaged: bool, hosts: int) -> list[str]:
    """Starts the run until it ends; returns what is wrong then."""
    start = Start(config, workdir, hosts=hosts)
    if start.wait():
        return [f"status {start.status} when started again"]
    said = [word for word in ("Traceback", "damaged") if word in start.log_text() and not (damaged and word == "damaged")]
    return said + differences(reference, workdir, ["checkpoints/damaged-"] * damaged)


def drawn(number: int) -> tuple[random.Random, str]:
    """The draws of a case, of which the first one is the name of its kind."""
    draw = random.Random(number)
    return draw, draw.choices([*KINDS], [kind.weight for kind in KINDS.values()])[0]


def run_case(number: int, folder: Path, config: Path, seconds: dict[int, float]) -> dict:
    """Returns the line of cases.jsonl; "skipped" says why a case was not made. `seconds` is what a run takes, by its hosts."""
    draw, name = drawn(number)
    kind, disk = KINDS[name], folder / f"case-{number}"
    found: dict = {"case": number, "kind": name, "moments": [], "fell_back": 0, "failed_saves": 0, "wrong": []}
    unmount(disk)  # of a campaign that was ended
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
    try:
        if kind.then == "full":
            mount("-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk)
        # Only once if a state is damaged: a run that is killed at once has no other state yet.
        for _ in range(1 if kind.then in DAMAGES else draw.choice([1, 1, 2])):
            moment, wrong = disturb(config, disk / "run", kind, draw, seconds[kind.hosts])
            found["moments"].append(moment)
            found["wrong"] += wrong
        reference = folder / f"reference-{kind.hosts}" / "run"
        for _ in range(draw.choice([1, 1, 2])):  # the second one is a finished run that is started again
            found["wrong"] += finish(config, disk / "run", reference, kind.then in DAMAGES, kind.hosts)
        found["fell_back"] = len([*(disk / "run" / "checkpoints").glob("damaged-*")])
        found["failed_saves"] = disk.with_suffix(".log").read_text(errors="replace").count("Earlier states are unchanged")
    except PermissionError as error:
        found["skipped"] = str(error)
    if not found["wrong"]:
        unmount(disk)
        shutil.rmtree(disk)
        disk.with_suffix(".log").unlink(missing_ok=True)
    return found


def uninterrupted(folder: Path, numbers: set[int]) -> tuple[Path, dict[int, float]]:
    """Makes the runs that the others are compared with, for each number of hosts; returns their configuration and seconds."""
    config = folder / "config.json"
    # In another process: a fork of a process that has used a device does not work.
    subprocess.run([sys.executable, "-m", "tests.training.starts", folder / "tiny.npz", config], cwd=ROOT, check=True)
    seconds = {}
    for hosts in numbers:
        # The first of two runs fills the cache of programs. Several hosts start slowly, so their seconds include compilation.
        for name in ["warm"] * (hosts == 1) + [f"reference-{hosts}"]:
            shutil.rmtree(folder / name, ignore_errors=True)
            start, began = Start(config, folder / name / "run", hosts=hosts), time.monotonic()
            assert start.wait() == 0, start.log_text()
        seconds[hosts] = time.monotonic() - began
    return config, seconds


def main(cases: int, folder: Path) -> int:
    """Runs the cases that are not finished; returns the exit status."""
    journal = folder / "cases.jsonl"
    files = sorted((ROOT / "vit_jax").rglob("*.py"))
    code = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
    done = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    done = [found for found in done if found["code"] == code and not found["wrong"]]  # what failed is made again
    missing = sorted({*range(cases)} - {found["case"] for found in done})
    config, seconds = uninterrupted(folder, {KINDS[drawn(number)[1]].hosts for number in missing})
    for number in missing:
        done.append(run_case(number, folder, config, seconds) | {"code": code})
        with whole_file(journal) as file:
            file.write("".join(json.dumps(line) + "\n" for line in done).encode())
        print(json.dumps(done[-1]), file=sys.stderr, flush=True)
    if left := [*map(str, [*(folder / "tmp").rglob("*"), *(folder / "cache").rglob(".*")])]:
        done.append({"case": -1, "kind": "temporary files", "moments": [], "wrong": left})
    moments = collections.Counter(moment.split(",")[0] for found in done for moment in found["moments"])
    summary = {"cases": len(done), "kinds": collections.Counter(found["kind"] for found in done), "moments": moments}
    summary |= {what: sum(found.get(what, 0) for found in done) for what in ("fell_back", "failed_saves")}
    summary |= {what: [found for found in done if found.get(what)] for what in ("skipped", "wrong")}
    print(json.dumps(summary))
    return bool(summary["wrong"])


if __name__ == "__main__":
    # Imported, not used: a fork of a process that has touched a device does not work.
    import orbax.checkpoint  # noqa: F401
    import tensorflow_datasets  # noqa: F401
    from tensorboardX.proto import event_pb2  # noqa: F401

    from vit_jax.training import loop  # noqa: F401

    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    place = Path(sys.argv[2]).absolute()
    (place / "tmp").mkdir(parents=True, exist_ok=True)
    os.environ |= {"JAX_PLATFORMS": "cpu", "VIT_JAX_CACHE": str(place / "cache"), "TMPDIR": str(place / "tmp")}
    sys.exit(main(int(sys.argv[1]), place))
