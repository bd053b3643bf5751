"""A job of several ranks of eval.py or reproduce.py, in processes forked from one that has imported PyTorch."""

import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

from models import PRESETS, create_model
from util.processes import launch
from util.weights import save_safetensors

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["eval"])


def _rank(program: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment, OMP_NUM_THREADS="1")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [f"{program}.py", *arguments]
    torch.set_num_threads(1)
    code = launch(importlib.import_module(program).main)
    sys.stdout.flush()
    os._exit(code)  # what a rank leaves to the interpreter's shutdown is not what is tested here


def make_weights(folder: Path) -> list[str]:
    """Flags that name random weights of mar_tiny and its VAE, written to `folder`.

    A new network's head ignores its conditions; here it does not, so that a mistake anywhere shows in the images.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, vae = create_model("mar_tiny"), PRESETS["mar_tiny"].make_vae()
        for name, parameter in model.diffloss.named_parameters():
            if "adaLN" in name or "final" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    save_safetensors(model.state_dict(), folder / "checkpoint-last.safetensors", {})
    save_safetensors(vae.state_dict(), folder / "vae.safetensors", {})
    return ["--model", "mar_tiny", "--resume", str(folder), "--vae_path", str(folder / "vae.safetensors")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class Ranks:
    """A running job. `log` collects what its ranks print."""

    def __init__(self, arguments: list[str], log: Path, world_size: int = 1, program: str = "eval") -> None:
        self.log = log
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        environments = [{**address, "RANK": str(rank)} for rank in range(world_size)] if world_size > 1 else [{}]
        work = [(program, arguments, environment, str(log)) for environment in environments]
        self.processes = [CONTEXT.Process(target=_rank, args=each) for each in work]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int | None]:
        """The ranks' exit codes, when all have ended."""
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
