"""A Ray cluster to run jobs on: Hydra's own launcher for it, with one line where no cluster answers."""

import signal
import socket
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

WRONG_INPUT = 2
KNOCK_S = 30.0


class Cluster(Launcher):
    """Launches jobs on a cluster that is started for the sweep, or on a running one by its address."""

    def __init__(self, ray: DictConfig) -> None:
        """Take what `ray.init` and `ray.remote` get."""
        self.ray = ray
        self.launcher: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Build Hydra's launcher."""
        plugin: Any = import_module("hydra_plugins.hydra_ray_launcher.ray_launcher")
        self.launcher = plugin.RayLauncher(self.ray)
        self.launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; a cluster that can't be reached ends the sweep with exit code 2."""
        address = self.ray.init.get("address")
        try:
            knock(address)
            self._join()
            return self.launcher.launch(job_overrides, initial_job_idx)
        except ConnectionError as error:
            print(unreachable(address, error), file=sys.stderr, flush=True)
            sys.exit(WRONG_INPUT)
        except SystemExit:
            signal.alarm(0)  # Ray's own handler of SIGTERM aborts the process three seconds later
            raise

    def _join(self) -> None:
        """Start or join the cluster, which the launcher then finds there.

        Ray puts a handler of SIGTERM of its own in place, which would end the sweep with another exit code.
        """
        ray: Any = import_module("ray")
        if not ray.is_initialized():
            before = signal.getsignal(signal.SIGTERM)
            settings: Any = OmegaConf.to_container(self.ray.init, resolve=True)
            ray.init(**settings)
            signal.signal(signal.SIGTERM, before)


def knock(address: str | None) -> None:
    """See whether anything listens at an address, as Ray waits for minutes where nothing does.

    Raises:
        ConnectionError: If nothing does.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(str(error)) from error


def unreachable(address: str | None, error: Exception) -> str:
    """What to say where no cluster answers."""
    rule = "must be the address of a running Ray cluster (`ray start --head --port=6379` starts one here)"
    token = "one that asks for a token needs RAY_AUTH_MODE=token and the token of its machine, in ~/.ray/auth_token"
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return f"hydra.launcher.ray.init.address={address}: {rule}; {token} ({why})"
