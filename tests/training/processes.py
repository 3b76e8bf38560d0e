"""Training runs in processes of their own that can be killed: ``Launcher().run(config, processes=2, …)``.

One server process imports the libraries once and forks a child for each process of a run, so that a run starts in a
tenth of a second. A child calls the command line, tools/train_net.py, as torchrun would: with RANK, WORLD_SIZE, ….
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Done:
    """How a run ended: exit status of each process (-9: killed), and what they said."""

    status: list[int]
    said: str

    def lines(self) -> list[str]:
        """The lines that train_net.py itself told."""
        return [line for line in self.said.replace("\r", "\n").splitlines() if line.startswith("train_net.py: ")]


class Launcher:
    """The client's side."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self,
        config: Path,
        *arguments: str,
        processes: int = 1,
        kill: int = 0,
        signal_at: int = 0,
        fault: str = "",
        seconds: float = 120,
    ) -> Done:
        """tools/train_net.py --config ``config`` ``arguments`` in so many processes.

        kill: SIGKILL the last process at its so-manieth write or step, then the others, as torchrun does. signal_at:
        SIGTERM to all when the first process begins that step. fault: a name of FAULTS.
        """
        order = {"arguments": ["--config", str(config), "--device", "cpu", *arguments], "processes": processes,
                 "kill": kill, "signal_at": signal_at, "fault": fault, "seconds": seconds}  # fmt: skip
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server has ended"
        return Done(**json.loads(answer))


@functools.cache
def launcher() -> Launcher:
    """The one server of a test session; it ends with its standard input."""
    return Launcher()


# ---- the server's side


def serve() -> None:
    """Orders in, answers out, one JSON object a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT / "tools"))
    import train_net

    own = ("data.formats", "evaluation.grounding", "training.run", "training.trainer", "model.groma")
    for name in (*(f"groma.{part}" for part in own), "omegaconf", "PIL.PngImagePlugin"):
        importlib.import_module(name)
    try:
        import deepspeed
        import torch._dynamo  # noqa: F401 - deepspeed asks for it later, child by child

        # Collectives through shared memory are compiled at first use, for a minute; gloo's are as good here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    except ImportError:
        pass
    for line in sys.stdin:
        done = perform(train_net.main, json.loads(line))
        answers.write(json.dumps(done) + "\n")
        answers.flush()


def perform(main: Callable[[list[str]], int], order: dict[str, Any]) -> dict[str, Any]:
    """Fork the processes of one run and wait for all; when one fails, kill the others as a launcher would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = order["processes"]
    with tempfile.TemporaryFile() as said:
        children = {}
        for rank in range(world):
            child = os.fork()
            if child == 0:
                become(main, order, rank, port, said.fileno())
            children[child] = rank
        status = [0] * world
        until = time.monotonic() + order["seconds"]
        running = set(children)
        while running:
            child, code = os.waitpid(-1, os.WNOHANG)
            if child in running:
                running.discard(child)
                status[children[child]] = os.waitstatus_to_exitcode(code)
            failed = any(status[children[c]] not in (0, 75) for c in children if c not in running)
            if time.monotonic() > until or failed:
                time.sleep(0.5 if failed and order["fault"] else 0)  # let them say what they have to say
                for other in running:
                    os.kill(other, signal.SIGKILL)
            if child == 0:
                time.sleep(0.005)
        said.seek(0)
        return {"status": status, "said": said.read().decode(errors="replace")}


def become(main: Callable[[list[str]], int], order: dict[str, Any], rank: int, port: int, said: int) -> None:
    """Be process ``rank`` of a run; never returns."""
    os.setsid()
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.close(0)
    world = order["processes"]
    sys.argv = ["tools/train_net.py"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    if world == 1 and "optim.deepspeed" not in " ".join(order["arguments"]):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    if order["kill"] and rank == world - 1:
        die_at(order["kill"])
    if order["signal_at"]:
        sigterm_at(order["signal_at"])
    if order["fault"]:
        FAULTS[order["fault"]](rank)
    status = 1
    try:
        status = main(order["arguments"])
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - told, and the status says so
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def die_at(count: int) -> None:
    """SIGKILL this process at its ``count``-th step, save, sync or rename; a save so met leaves half a file."""
    import shutil

    import torch

    from groma.training.trainer import GromaTrainer

    left = count

    def meets(*_: Any) -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def before(home: Any, name: str, prepare: Callable[..., None] = lambda *_: None) -> None:
        original = getattr(home, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if meets():
                prepare(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(home, name, wrapped)

    def half(_: Any, path: Any, *__: Any) -> None:
        Path(path).write_bytes(random.Random(count).randbytes(999))

    before(GromaTrainer, "training_step")
    before(torch, "save", half)
    before(os, "fsync")
    before(Path, "rename")
    before(shutil, "rmtree")


def sigterm_at(step: int) -> None:
    """SIGTERM to this process in the middle of its ``step``-th forward."""
    from groma.training.trainer import GromaTrainer

    original = GromaTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    GromaTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def nan_losses(rank: int) -> None:
    """In the last process alone, the loss of step 3 is NaN; in every process, the gradient of step 5 is infinite."""
    import torch

    from groma.model.groma import GromaForConditionalGeneration
    from groma.training.trainer import GromaTrainer

    forward, steps = GromaForConditionalGeneration.forward, GromaTrainer.compute_loss
    last = rank == int(os.environ.get("WORLD_SIZE", "1")) - 1
    step = 0

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            return gradient * float("inf")

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step = self.state.global_step + 1
        return steps(self, *args, **kwargs)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if step == 3 and last:
            output.losses = {name: value * float("nan") for name, value in output.losses.items()}
        if step == 5:
            output.losses = {name: Explode.apply(value) for name, value in output.losses.items()}
        return output

    GromaTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    GromaForConditionalGeneration.forward = wrapped  # type: ignore[method-assign]


def small_files(rank: int) -> None:
    """No file may exceed 200,000 bytes, which is how a full disk looks: metrics fit, weights do not."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


FAULTS: dict[str, Callable[[int], None]] = {"nan": nan_losses, "disk": small_files}


if __name__ == "__main__":
    serve()
