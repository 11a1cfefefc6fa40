"""Several hosts: processes of this machine with simulated devices. Their numbers, their ends, and what a single host does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.training.test_devices import assert_close
from vit_jax.config_files import read, to_json
from vit_jax.errors import ConfigError, TrainingError
from vit_jax.formats.google import read_npz
from vit_jax.training import hosts, journal, loop
from vit_jax.training.devices import Layout

ROOT = Path(__file__).parents[2]


def test_single_host_does_the_obvious(monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    hosts.initialize("", 1, 0)
    tree = {"a": np.arange(3)}
    assert hosts.is_first() and hosts.from_first(lambda: 5) == 5 and hosts.arrays_of_first(tree) is tree
    assert hosts.Agreement().signal(3, 15) == 15 and hosts.Agreement().signal(3, 0) == 0
    with pytest.raises(TrainingError), hosts.leaving_on_errors(""):
        raise TrainingError("as it is")


class Store(dict):
    """The coordinator's store, of a run whose hosts are all in this process."""

    def key_value_set(self, key, value):
        if key in self:
            raise hosts.jax.errors.JaxRuntimeError("it exists")
        self[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.items() if key.startswith(prefix)]

    def key_value_set_bytes(self, key, value):
        self[key] = value

    def blocking_key_value_get_bytes(self, key, timeout):
        return self[key]


@pytest.fixture
def store(monkeypatch):
    """Makes this process one of two hosts; the argument of the function in it says which."""
    found = Store()
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_store", lambda: found)

    def become(index):
        monkeypatch.setattr(hosts.jax, "process_index", lambda: index)
        monkeypatch.setattr(hosts, "_calls", iter(range(100)))

    return become


@pytest.mark.parametrize("signalled", [{0: 3}, {1: 3}, {0: 3, 1: 4}, {0: 4, 1: 3}, {0: 3, 1: 3}])
@pytest.mark.parametrize("leads", [0, 1])
def test_all_hosts_stop_after_the_same_step(store, signalled, leads):
    """Whichever host gets a signal, and whichever is a step ahead, as far as the steps' exchanges let it be."""
    store(0)
    one, other = hosts.Agreement(), hosts.Agreement()
    other._key = one._key
    stopped, both = {}, {0: one, 1: other}
    for step in range(1, 10):
        for host in (leads, 1 - leads):
            if host not in stopped and both[host].signal(step, 15 if step >= signalled.get(host, 99) else 0):
                stopped[host] = step
    assert len(set(stopped.values())) == 1 and len(stopped) == 2
    assert min(signalled.values()) + 2 == stopped[0]


def test_error_of_host_0_is_raised_on_every_host(store):
    def fail():
        raise ConfigError("no such task")

    store(0)
    with pytest.raises(ConfigError, match="^no such task$"):
        hosts.from_first(fail)
    assert hosts.from_first(lambda: {"step": 3}) == {"step": 3}
    assert hosts.from_first(lambda: OSError(28, "No space left on device")).errno == 28
    store(1)
    with pytest.raises(TrainingError, match="^host 0: no such task$"):
        hosts.from_first(fail)
    assert hosts.from_first(fail) == {"step": 3}
    assert hosts.from_first(fail).errno == 28  # an error that is returned is not raised


def test_only_host_0_writes_a_log(store, tmp_path, capsys):
    store(1)
    with journal.open_journal(tmp_path, 0, 5) as log:
        journal.say("loading")
        log.write(1, {"train/loss": 1.0})
        log.flush()
        log.say("resuming")
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_pmap_on_several_hosts_is_refused():
    two = [SimpleNamespace(process_index=index, platform="cpu") for index in range(2)]
    with pytest.raises(ConfigError, match="run.parallel = 'pmap' is for one host, and there are 2: use run.parallel = 'mesh'"):
        Layout("pmap", two)


def test_hosts_that_do_not_find_each_other_are_an_error(monkeypatch):
    monkeypatch.setattr(
        hosts.jax.distributed, "initialize", lambda **_: (_ for _ in ()).throw(RuntimeError("DEADLINE_EXCEEDED"))
    )
    with pytest.raises(ConfigError, match="--coordinator 10.0.0.1:99: the hosts did not find each other: DEADLINE_EXCEEDED"):
        hosts.initialize("10.0.0.1:99", 2, 1)


def test_launchers_that_jax_detects_need_no_option(monkeypatch):
    calls = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda **given: calls.append(given))
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
        hosts.initialize("", 1, 0)
        monkeypatch.setenv(name, "1")
        hosts.initialize("", 1, 0)
    hosts.initialize("auto", 1, 0)
    assert calls == [{"heartbeat_timeout_seconds": hosts.HEARTBEAT}] * 3


LAUNCHERS = {
    "Slurm": {"JOB_ID": 77, "STEP_NODELIST": "localhost", "NTASKS": 2, "STEP_NUM_TASKS": 2, "PROCID": "{}", "LOCALID": "{}"},
    "Open MPI": {
        **{f"COMM_WORLD_{name}": value for name, value in {"SIZE": 2, "RANK": "{}", "LOCAL_RANK": "{}"}.items()},
        "MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
    },
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_hosts_find_each_other_by_the_variables_of_a_launcher(launcher):
    prefix = {"Slurm": "SLURM_", "Open MPI": "OMPI_"}[launcher]
    script = "from vit_jax.training import hosts; hosts.initialize('', 1, 0); print(hosts.from_first(lambda: 'said by host 0'))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=os.environ | {prefix + name: str(value).format(index) for name, value in LAUNCHERS[launcher].items()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    assert [process.communicate(timeout=100)[0].splitlines()[-1] for process in started] == ["said by host 0"] * 2


class Start:
    """A start of `vit_jax train` in a process of its own."""

    def __init__(self, config: Path, workdir: Path, devices: int, *arguments: str):
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
        command = [sys.executable, "main.py", "--config", str(config), "--workdir", str(workdir), *arguments]
        environment = {**os.environ, "XLA_FLAGS": flags}
        self.workdir = workdir
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-3, stderr=-1, text=True)

    def end(self) -> tuple[int, str]:
        """The exit status, and the last line of standard error."""
        said = self.process.communicate(timeout=300)[1].splitlines()
        return self.process.returncode, said[-1] if said else ""

    def wait_for(self, step: int) -> None:
        """Returns when the run has logged a step."""
        while not any(line["step"] >= step for line in lines(self.workdir)):
            assert self.process.poll() is None
            time.sleep(0.02)

    def signal(self, host: int, number: int) -> None:
        """Sends a signal to a host."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            if Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[-2] == str(host).encode():
                os.kill(int(child), number)


def lines(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture
def file(config, written):
    """The configuration of 20 steps whose numbers do not depend on the layout, in a file."""
    config.optimizer.accumulator_dtype, config.training.steps = "float32", 20
    config.training.eval_every, config.training.save_every = 10, 3
    path = written / "run.json"
    path.write_text(to_json(config))
    return path


@pytest.fixture
def two_hosts(file, written):
    """The folder of a run on two hosts with four devices each, made once."""
    if not (written / "two").exists():
        assert Start(file, written / "two", 4, "--hosts=2").end()[0] == 0
    return written / "two"


def agree(ours: Path, theirs: Path) -> None:
    """Losses, test metrics and parameters of two runs agree to 1e-5."""
    for found, expected in zip(lines(ours), lines(theirs), strict=True):
        names = expected.keys() - {"train/images_per_second"}
        assert names <= found.keys()
        for name in names:
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert_close(read_npz(ours / "final.npz"), read_npz(theirs / "final.npz"))


@pytest.mark.slow
def test_hosts_give_the_numbers_of_one_process(file, two_hosts, written, monkeypatch):
    """Images on the devices and streamed, with and without FSDP; the files are the same, and only host 0 writes them."""
    one_device = hosts.jax.devices()[:1]
    monkeypatch.setattr(hosts.jax, "devices", lambda *_: one_device)
    loop.train(read(str(file)), written / "one")
    streamed = ("--config.run.device_budget_mib=0", "--config.run.data_workers=0", "--config.run.mesh=data:2,fsdp:2")
    assert Start(file, written / "four", 1, "--hosts=4", *streamed).end()[0] == 0
    agree(two_hosts, written / "one")
    agree(written / "four", written / "one")
    names = [{path.name for path in (written / run).iterdir()} for run in ("one", "two", "four")]
    assert names[0] | {"figures", "report.html"} == names[1] == names[2]
    assert len(list((two_hosts / "tensorboard").iterdir())) == 1
    assert "1 CPU" in (written / "one" / "environment.json").read_text()
    assert "on 2 hosts" in (two_hosts / "environment.json").read_text()


@pytest.mark.slow
def test_host_that_dies_ends_the_run_which_then_finishes_exactly(file, two_hosts, tmp_path):
    """Any host, also one that only stops to answer; all of them started again go on."""
    for step, host, number, said in (
        (5, 1, signal.SIGKILL, "host 1 of 2 was killed (SIGKILL)"),
        (10, 0, signal.SIGKILL, "host 0 of 2 was killed (SIGKILL)"),
        (14, 1, signal.SIGSTOP, "host 1 of 2 did not answer any more"),
    ):
        start = Start(file, tmp_path, 4, "--hosts=2")
        start.wait_for(step)
        start.signal(host, number)
        began = time.monotonic()
        status, error = start.end()
        assert status == 1 and time.monotonic() - began < 60
        assert error == f"error: {said}; the others were stopped. The same command continues from the newest saved state"
    assert Start(file, tmp_path, 4, "--hosts=2").end()[0] == 0
    ours, theirs = read_npz(tmp_path / "final.npz"), read_npz(two_hosts / "final.npz")
    assert all(map(np.array_equal, hosts.jax.tree.leaves(ours), hosts.jax.tree.leaves(theirs)))


@pytest.mark.slow
def test_signal_to_one_host_saves_on_all_and_another_layout_goes_on(file, two_hosts, tmp_path):
    start = Start(file, tmp_path, 4, "--hosts=2", "--config.run.mesh=data:4,fsdp:2")
    start.wait_for(4)
    start.signal(1, signal.SIGTERM)
    status, said = start.end()
    assert status == 128 + signal.SIGTERM and said.startswith("stopped and saved in")
    steps = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert max(steps) == lines(tmp_path)[-1]["step"] < 20
    assert Start(file, tmp_path, 8).end()[0] == 0
    agree(tmp_path, two_hosts)
