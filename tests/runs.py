"""Programs of this repository, started from their command line as processes of their own.

`call` starts them as a user does. Most tests take a `Launcher`: what it starts is a fork of a
process that has imported the libraries already, so a start costs tenths of a second where
`python main_pretrain.py` costs seconds. From there on it is the same: the script is run as
`__main__` with that command line, and ends, or is killed, as any process.
"""

import gc
import inspect
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.pictures import picture

ROOT = Path(__file__).resolve().parent.parent
MAIN = "main_pretrain.py"

# No GPU, so that the same bits come out everywhere; one thread each, so that runs do not fight.
ENV = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# What the programs import, apart from themselves.
LIBRARIES = (
    *("torch.distributed.launcher.api", "torch.nn.parallel", "torch.utils.tensorboard"),
    *("torchvision.utils", "torchvision.transforms.v2", "torchvision.datasets", "timm.data"),
    *(
        "timm.optim",
        "timm.loss",
        "timm.utils",
        "safetensors.torch",
        "tqdm",
        "matplotlib.pyplot",
        "sklearn.datasets",
        "sklearn.model_selection",
    ),
)


# --- images ------------------------------------------------------------------------------------


def write_images(folder: Path, count: int) -> Path:
    """PNG and JPEG files by turns, in two folders below `folder`."""
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:03d}.{('png', 'jpg')[i // 2 % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return folder


# --- as a user does ----------------------------------------------------------------------------


@dataclass
class Result:
    """How a process ended: exit code (negative for a signal), what it wrote."""

    code: int
    out: str
    err: str


def environment(extra: Mapping[str, object] | None = None) -> dict[str, str]:
    """This process's environment with `ENV`, without any launcher's variables."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return kept | ENV | {name: str(value) for name, value in (extra or {}).items()}


def call(*command: object, timeout: float = 1200, **env: object) -> Result:
    """Run `python *command` in the repository to its end."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env=environment(env), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def _text(path: Path) -> str:
    """The output of a program; names of files in it may be any bytes."""
    return path.read_text(errors="surrogateescape")


@dataclass
class Process:
    """A running program whose output goes to files.

    Attributes:
        pid: of the program; its process group has the same number.
        out, err: the files.
        ended: waits at most so many seconds and returns the exit code, None if it still runs.
    """

    pid: int
    out: Path
    err: Path
    ended: Callable[[float], int | None]

    def signal(self, number: int) -> None:
        """Send a signal to this process alone."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 1200) -> Result:
        """Wait for the end; one that comes too late fails the test."""
        code = self.ended(timeout)
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.ended(10)
            raise AssertionError(
                f"still running after {timeout} s:\n{_text(self.out)}\n{_text(self.err)}"
            )
        return Result(code, _text(self.out), _text(self.err))

    def wait_for(self, text: str, timeout: float = 1200) -> None:
        """Wait until it has written a text to stdout."""
        end = time.monotonic() + timeout
        while text not in _text(self.out):
            if self.ended(0.02) is not None or time.monotonic() > end:
                raise AssertionError(f"no {text!r} in:\n{_text(self.out)}{_text(self.err)}")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- as a fork ---------------------------------------------------------------------------------


@dataclass
class Launcher:
    """Starts programs as forks of one process, see above. Use as a context.

    Attributes:
        libraries: modules to import in that process, beside `LIBRARIES`.
    """

    libraries: Sequence[str] = ()
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="runs-")))
    count: int = 0

    def __enter__(self) -> "Launcher":
        address = str(self.folder / "socket")
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.runs", address, *self.libraries],
            cwd=ROOT, env=environment(), stdin=subprocess.PIPE,
        )  # fmt: skip
        while not os.path.exists(address):
            assert self.server.poll() is None, "the launcher could not start"
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.communicate()
        shutil.rmtree(self.folder)

    def start(
        self,
        *command: object,
        program: str = MAIN,
        before: str = "",
        env: Mapping[str, object] | None = None,
    ) -> Process:
        """Start `python program *command`.

        Args:
            command: arguments.
            program: a script of the repository, or the name of a module for `python -m`.
            before: Python code to run first, see `code_of`.
            env: environment variables to set.
        """
        self.count += 1
        out, err = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        out.touch(), err.touch()
        request = {"program": program, "command": list(map(str, command)), "before": before}
        request |= {"env": {k: str(v) for k, v in (env or {}).items()}}
        request |= {"out": str(out), "err": str(err)}
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.folder / "socket"))
        answers = connection.makefile("rw")
        answers.write(json.dumps(request) + "\n")
        answers.flush()
        pid = int(answers.readline())
        codes: list[int] = []

        def ended(timeout: float) -> int | None:
            if not codes:
                connection.settimeout(timeout)
                try:
                    codes.append(int(connection.recv(100)))
                except TimeoutError:
                    return None
                answers.close(), connection.close()
            return codes[0]

        return Process(pid, out, err, ended)

    def run(self, *command: object, timeout: float = 1200, **options: object) -> Result:
        """`start` and wait for the end."""
        return self.start(*command, **options).wait(timeout)

    def torchrun(self, *command: object, restarts: int = 0) -> Process:
        """Start `torchrun --nproc_per_node 2 main_pretrain.py *command`."""
        options = ["--nproc_per_node", 2, "--max_restarts", restarts]
        options += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
        # Else workers that are started again may get the addresses of the dead ones.
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1}
        return self.start(*options, MAIN, *command, program="torch.distributed.run", env=env)

    def start_ranks(self, *command: object, processes: int = 2, **options: object) -> list[Process]:
        """Start the processes of one distributed run with the environment that torchrun sets."""
        env = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        return [
            self.start(*command, env=env | {"RANK": rank, "LOCAL_RANK": rank}, **options)
            for rank in range(processes)
        ]

    def run_ranks(self, *command: object, timeout: float = 1200, **options: object) -> list[Result]:
        """`start_ranks` and wait for the end of all."""
        return [process.wait(timeout) for process in self.start_ranks(*command, **options)]


def code_of(function: Callable[..., None], **values: object) -> str:
    """Code that calls a function in another process: it must import all that it uses itself."""
    source = textwrap.dedent(inspect.getsource(function))
    return f"{source}\n{function.__name__}(**{values!r})\n"


def serve(address: str, *libraries: str) -> None:
    """Answer each connection with a fork that runs what it asks for, until stdin is closed.

    A connection gets the new process's number and, when that has ended, its exit code.
    """
    for name in (*LIBRARIES, *libraries):
        __import__(name)
    gc.collect(), gc.freeze()  # else each fork would look at all this again as it ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the forks that answer need no burial
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".new")
        server.listen()
        os.rename(address + ".new", address)
        while True:
            if sys.stdin in select.select([server, sys.stdin], [], [])[0]:
                return
            connection, _ = server.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection, connection.makefile("rw") as answers:
        request = json.loads(answers.readline())
        pid = os.fork()
        if pid:
            answers.write(f"{pid}\n")
            answers.flush()
            answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
            answers.flush()
            os._exit(0)
    become(**request)


def become(
    program: str, command: Sequence[str], before: str, env: Mapping[str, str], out: str, err: str
) -> None:
    """Turn this process into a program with its own session, output and command line."""
    os.setsid()
    for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(env)
    sys.argv = [program, *command]
    exec(compile(before, "before", "exec"), {})
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
