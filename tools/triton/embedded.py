"""The embedded server: the real tritonserver and its Python backend, out of the nvidia-pytriton wheel.

Only the wheel's binaries are used. It is started with explicit model control and strict configurations, and
leaves no process, port or shared-memory segment behind. `python -m tools.triton` runs it without the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import aiohttp

from build import gpu
from build.config import read_config, runtime_of
from build.errors import BuildError
from tools import access, preflight
from tools.command import (
    TRITON_DRAIN_SECONDS,
    Ports,
    ServerError,
    die_with_parent,
    ending,
    server_arguments,
)
from tools.repository import check_models
from tools.triton import wheel
from tools.triton.stubs import Stubs

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
SEGMENT_PREFIX = "triton-embeddings"
READY_SECONDS = 300
WATCH_SECONDS = 0.25
"""Seconds between two looks for models that were loaded since."""
SETTLING_SECONDS = 0.05
"""Seconds between two looks at whether an ended process is missed: till then Triton answers with errors."""
STARTING_SECONDS = 1.0
"""Seconds after which the process of a model that is being loaded is there."""
ASKING = aiohttp.ClientTimeout(5)
"""What Triton may take to say which models it has."""
DYING_SECONDS = 5.0
"""Seconds that a Triton may take to die: it writes its stack first, and its stubs may be gone before it."""
FAILED = ("failed to load", "Poll failed")
"""How Triton begins to say that a model or its configuration cannot be read."""
NOISE = "CudaDriverHelper|unable to create stream|text_format.cc"
"""Errors that Triton logs on every healthy machine without a GPU."""


log = logging.getLogger(__name__)


class EmbeddedTriton:
    """One tritonserver process that serves some models of a repository."""

    def __init__(
        self,
        repository: Path | str,
        models: Sequence[str],
        host: str,
        ports: Ports,
        work_folder: Path,
        log: Path | None,
        switched_on: Sequence[str] = (),
    ) -> None:
        self._repository = repository
        self._models = models
        self._host = host
        self._ports = ports
        self._work_folder = work_folder
        self._switched_on = switched_on
        self._secret = ""
        self._segments = f"{SEGMENT_PREFIX}-{os.getpid()}-"
        self._process: asyncio.subprocess.Process | None = None
        self._log = log
        self.left_out: dict[str, str] = {}
        """Model that was asked for and cannot be served -> why."""
        self.lost: set[str] = set()
        """Models whose process died while they were loaded, which Triton waits for ever for."""

    async def run(self, stop: asyncio.Event, ready: contextlib.AbstractAsyncContextManager[None]) -> None:
        """Runs Triton until `stop` is set, within `ready` once it answers; raises ServerError when it cannot."""
        stopped = asyncio.create_task(stop.wait())
        try:
            started = asyncio.create_task(self.start())
            await asyncio.wait((started, stopped), return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                started.cancel()
                return
            await started
            async with ready:
                died = asyncio.create_task(self.wait())
                await asyncio.wait((died, stopped), return_when=asyncio.FIRST_COMPLETED)
                if died.done():
                    raise ServerError(died.result())
        except asyncio.CancelledError:  # it is to end at once
            self._kill()
            raise
        finally:
            await self.stop()
            stopped.cancel()

    async def start(self) -> None:
        """Starts Triton and waits until it has loaded what it can; raises ServerError if that is nothing.

        A sentence on stderr says what is left out and why.
        """
        if isinstance(self._repository, Path):
            check_models(self._repository, self._models)
        for problem in preflight.problems():
            raise ServerError(problem)
        remove_orphaned_segments()
        steps = {name: self._steps(name) for name in self._models}
        for ensemble, own in steps.items():
            if foreign := _foreign(own):
                self.left_out[ensemble] = foreign
        self.left_out |= self._too_large(steps)
        wanted = [name for name in self._models if name not in self.left_out]
        if not wanted:
            raise ServerError("\n  ".join(self.left_out.values()))
        encoders = {step for name in wanted for step in steps[name] if step.endswith("-encoder")}
        environment = wheel.environment(with_object_store=not isinstance(self._repository, Path))
        environment["ENCODER_COUNT"] = str(max(1, len(encoders)))
        # Compiled kernels are code: not from a folder that any user of this machine may have made.
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(self._work_folder.resolve() / "torch")
        try:
            backends = wheel.assemble_backends(self._work_folder)
            self._secret = access.make_secret(access.secret_file(self._work_folder, self._ports.http))
            output = _new_log(self._log) if self._log else contextlib.nullcontext()
        except OSError as error:
            place = error.filename or self._work_folder
            raise ServerError(
                f"cannot write {place}: {error.strerror}; mend that or name another --work-folder"
            ) from None
        with output as file:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(backends, wanted),
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                # Ctrl-C reaches the terminal's group; Triton is stopped by us, after the gateway drained.
                start_new_session=True,
                preexec_fn=_be_a_child,
            )
        died = asyncio.create_task(self._process.wait())
        ready = asyncio.create_task(self._loaded(wanted))
        try:
            await asyncio.wait((died, ready), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise ServerError(self._cause_of_death("tritonserver did not start"))
            loaded = ready.result()
            access.hide_arguments(self._process.pid, self._secret)
            self._close_segments()
        finally:
            died.cancel()
            ready.cancel()
        if not loaded:
            raise ServerError(self._cause_of_death("no model could be loaded"))
        for name in wanted:
            if name not in loaded:
                self.left_out[name] = self.cause(name) or f"see {self._log or 'above'}"
        for name, cause in self.left_out.items():
            log.warning("%s is not served: %s", name, cause)

    async def wait(self) -> str:
        """Waits until Triton or the process of a model dies, and says which and why.

        Triton is killed with its first model: callers of a server that is gone ask elsewhere or try again, but
        Triton would answer each of their calls with an error.
        """
        assert self._process is not None
        exited = asyncio.create_task(self._process.wait())
        with Stubs(self._process.pid) as stubs:
            while not exited.done() and not stubs.lost.done():
                await asyncio.wait(
                    (exited, stubs.lost), timeout=WATCH_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                stubs.look()
                self.lost -= stubs.models
                self._close_segments()
                if stubs.lost.done() and not exited.done() and not await self._is_missed(stubs):
                    stubs.go_on()
            if stubs.lost.done():
                death = stubs.lost.result()
                if death.instance and death.status >= 0 and not death.stopped:
                    await asyncio.wait((exited,), timeout=DYING_SECONDS)
                if not exited.done():
                    self._process.kill()
                    what = "has been stopped for too long" if death.stopped else death.how
                    return self._cause_of_death(f"the process of {death.model} {what}; start the server again")
        return self._cause_of_death(f"tritonserver {ending(exited.result())}; start it again")

    async def stop(self) -> None:
        """Lets running requests finish, stops Triton and removes what it may have left."""
        process = self._process
        if process is None:
            return
        try:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(process.wait(), TRITON_DRAIN_SECONDS + 10)
        finally:
            self._kill()
            await process.wait()
            access.secret_file(self._work_folder, self._ports.http).unlink(missing_ok=True)
            _remove_segments(SHARED_MEMORY.glob(f"{self._segments}*"))

    def _kill(self) -> None:
        """Ends what is left of Triton; its stubs are in its own process group."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _is_missed(self, stubs: Stubs) -> bool:
        """Whether Triton counts on a stub that is gone: not where its model was unloaded, or is being loaded.

        A model may come and go while this looks: it is missed where Triton has it and there is no stub, twice.
        """
        death = stubs.lost.result()
        if death.stopped:
            return True
        for _ in range(2):
            try:
                states = await self._states()
            except (aiohttp.ClientError, asyncio.TimeoutError):
                return True
            stubs.look()  # after Triton was asked: what is ready has its stub before
            gone = {name for name in self._python_models() if name not in stubs.models}
            if death.instance:
                gone = set() if death.instance in stubs.instances else {death.model}
            if loading := {name for name in gone if states.get(name) == "LOADING"}:
                await asyncio.sleep(STARTING_SECONDS)
                stubs.look()
                self.lost |= loading - stubs.models
            if not any(states.get(name) == "READY" for name in gone):
                return False
            await asyncio.sleep(SETTLING_SECONDS)
        return True

    async def _states(self) -> dict[str, str]:
        """Model -> its state, as Triton has it."""
        url = f"http://{self._host}:{self._ports.http}/v2/repository/index"
        async with aiohttp.ClientSession(headers={access.HEADER: self._secret}, timeout=ASKING) as session:
            listed = await (await session.post(url, json={})).json(content_type=None)
        return {model["name"]: model.get("state", "") for model in listed}

    def _python_models(self) -> Iterator[str]:
        """Models of the repository that run in a process of their own."""
        if isinstance(self._repository, Path):
            for file in self._repository.glob("*/*/model.py"):
                yield file.parent.parent.name

    def _steps(self, ensemble: str) -> dict[str, str]:
        """The steps of an ensemble, each with its runtime, "" where only Triton can read what it is."""
        steps: dict[str, str] = {}
        if isinstance(self._repository, Path):
            unreadable = contextlib.suppress(BuildError)  # Triton names what is wrong
            with unreadable:
                scheduling = read_config(self._repository, ensemble).ensemble_scheduling
                steps = dict.fromkeys((step.model_name for step in scheduling.step), "")
            for name in steps:
                with unreadable:
                    steps[name] = runtime_of(read_config(self._repository, name))
        return steps

    def _too_large(self, steps: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Ensembles of torch that the GPUs have no memory for behind those before them -> why."""
        too_large: dict[str, str] = {}
        free, loaded = gpu.room(gpu.cards()), set[str]()
        for ensemble, own in steps.items():
            # What scores embeddings is of torch too, on the CPU.
            torches = {name for name, runtime in own.items() if runtime == "torch" and name.endswith("-encoder")}
            torches -= loaded
            if free is None or ensemble in self.left_out or not torches:
                continue
            assert isinstance(self._repository, Path)
            weights = (file for name in torches for file in (self._repository / name / "1").glob("*.data"))
            need = gpu.needed(sum(file.stat().st_size for file in weights))
            if need > free:
                too_large[ensemble] = (
                    f"it needs {need / 1e9:.1f} GB of the GPU's memory, and {free / 1e9:.1f} GB are left: serve "
                    "fewer or smaller models, or build it with RUNTIME=openvino"
                )
                continue
            free -= need
            loaded |= torches
        return too_large

    def _close_segments(self) -> None:
        """Keeps other users from the texts in shared memory, which Triton makes readable, whatever the umask."""
        for path in SHARED_MEMORY.glob(f"{self._segments}*"):
            with contextlib.suppress(FileNotFoundError):
                path.chmod(0o600)

    def _command(self, backends: Path, models: Sequence[str]) -> list[str]:
        server = wheel.server()
        return [
            str(server / "bin" / "tritonserver"),
            *server_arguments(self._repository, models, self._host, self._ports, self._switched_on, self._secret),
            f"--cache-directory={server / 'caches'}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self._segments}",
        ]

    async def _loaded(self, models: Sequence[str]) -> list[str]:
        """Waits until Triton listens, which it does when it has tried every model: those that it has loaded."""
        url = f"http://{self._host}:{self._ports.http}/v2"
        async with aiohttp.ClientSession() as session:
            for _ in range(READY_SECONDS * 10):
                with contextlib.suppress(aiohttp.ClientError):
                    if (await session.get(f"{url}/health/ready")).status == 200:
                        ready = {name: await session.get(f"{url}/models/{name}/ready") for name in models}
                        return [name for name, answer in ready.items() if answer.status == 200]
                await asyncio.sleep(0.1)
        raise ServerError(f"models not loaded after {READY_SECONDS} s; see {self._log or 'the log'}")

    def cause(self, ensemble: str) -> str | None:
        """Why Triton did not load an ensemble, the last time, by what it is made of or else by Triton's log."""
        steps = self._steps(ensemble)
        if foreign := _foreign(steps):
            return foreign
        if self._log is None:
            return None
        own = re.compile(rf"'(?:{'|'.join(map(re.escape, [ensemble, *steps]))})'")
        # Of one step of the last time, since the ensemble's own line says only that it lacks them.
        found = [line for line in causes(self._log) if own.search(line)]
        inner = [line for line in found if not line.startswith(f"failed to load '{ensemble}'")]
        return next(reversed(inner or found), None)

    def _cause_of_death(self, headline: str) -> str:
        if self._log is None:
            return headline
        return "\n  ".join([headline, *causes(self._log)[:5], f"the whole log is in {self._log}"])


def _be_a_child() -> None:
    """Has Triton end by its parent's word alone, or with it: others end by SIGTERM, and Triton by SIGINT as well.

    A supervisor's SIGTERM to all processes would have it refuse the calls that the gateway still finishes.
    """
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _new_log(path: Path) -> BinaryIO:
    """An empty log, with that of the last start beside it: it may say why that ended."""
    with contextlib.suppress(FileNotFoundError):
        path.rename(f"{path}.1")
    return path.open("wb")


def _foreign(steps: Mapping[str, str]) -> str | None:
    """Why an ensemble's steps, each with its runtime, cannot be run here, where one of them cannot."""
    available = ["python", "openvino", "", *(["torch"] if importlib.util.find_spec("torch") else [])]
    for name, runtime in steps.items():
        if runtime not in available:
            where = "is not installed here" if runtime == "torch" else "the embedded Triton does not have"
            return (
                f"{name} is built for {runtime}, which {where}: build it "
                "with RUNTIME=openvino, or mount the repository into NVIDIA's tritonserver image"
            )
    return None


def causes(log: Path) -> list[str]:
    """The lines of a Triton log that say why it stopped: a step's last words, models, errors, or its end."""
    lines = log.read_text(errors="replace").splitlines()
    if last_words := [line for line in lines if line.startswith("error: ")]:
        return last_words
    errors = [line for line in lines if re.match(r"E\d{4} .*]", line) and not re.search(NOISE, line)]
    messages = [line.split("] ", 1)[1].strip('"').replace('\\"', '"') for line in errors]
    failed_models = [message for message in messages if message.startswith(FAILED)]
    # A step's exception comes with its Python trace, which is in the log for whoever wants it.
    found = [message.split("\\n\\nAt:")[0][:400] for message in failed_models or messages]
    return found or [line for line in lines if not re.match(r"[IW]\d{4} ", line)][-3:]


def remove_orphaned_segments() -> None:
    """Removes shared memory of servers that were killed before they could do it themselves."""
    for path in SHARED_MEMORY.glob(f"{SEGMENT_PREFIX}-*"):
        owner = path.name.removeprefix(f"{SEGMENT_PREFIX}-").split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            _remove_segments([path])


def _remove_segments(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError, PermissionError):  # gone, or another user's to remove
            path.unlink()
