"""Placing trials on GPUs: the one file that imports ray.

Ray Tune drives, we hand it small adapters: a Searcher that asks the conductor, a Callback that tells it,
and a Trainable that runs one trial after another on the base that its actor keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import tune
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, Trainable, TuneConfig, Tuner
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import sweeps
import sweepsvc
from sweeps.errors import CannotContinue, CannotStart
from sweeps.result import Failure, Progress, TrialResult
from sweeps.signals import handled
from sweeps.sweep import CHECKPOINT_MINUTES, Resources
from sweepsvc.placed import Placed
from sweepsvc.protocols import Conductor, Later, Node
from sweepsvc.worker import Kept, Worker

T = TypeVar("T")

REAL_TRIALS = "sweeps.trial.run:TrialRunner"

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a trial's relative paths are the driver's
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer one prints a box even at verbose=0
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "10",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # stopping gently is the sweep's own business
    # The study is the ledger: Tune's own snapshots are never read, so write hardly any.
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
}


NODES_SECONDS = 5.0
"""How long what is known of the cluster's nodes is taken for true."""

ANSWER_SECONDS = 120.0
"""How long a node may take to run a check, the start of a process included."""

ANSWER_TRIES = 3
"""How often a node is asked that failed to run a check: one that has just joined, or one that is gone, which
Ray notices after some 15 seconds."""

ANSWER_PAUSE_SECONDS = 2.0
"""How long after that it is asked again: the other machines may not know yet of one that has just joined."""

MOST_PENDING = 1024
"""Trials that Tune may have waiting for a worker: more than are ever placed at once."""

CLIENT_TRIES = 3
"""How often a head is asked by `ray://`: it starts a process for it, and a busy one's 30 seconds may be over
before that answers."""

_JOB_STOP_SECONDS = "120"
"""How long `ray job stop` gives a driver to have its trials write their checkpoints."""

_MUTED = ("ray.tune.tune", "ray.tune.execution.experiment_state")
"""Loggers of Tune: which trials failed, we say; that its snapshots find no room, nobody needs to know."""


_NOTHING_KEPT = Kept()


class RayScheduler:
    """Runs one trial per GPU (or per set of CPUs), each in an actor that keeps its base model.

    Ray is started here, or joined at `address` (`auto`, or the head's `host:port`), else at `RAY_ADDRESS`.
    `tune` is a folder for Tune's own files. Trials write a checkpoint every `checkpoint_minutes`, and end as
    interrupted once the file `stop` is there. `runner` names, as `module:name`, the class that an actor makes
    once and calls for every trial.
    """

    def __init__(
        self,
        resources: Resources,
        tune: Path,
        kept: Kept = _NOTHING_KEPT,
        checkpoint_minutes: float = CHECKPOINT_MINUTES,
        runner: str = REAL_TRIALS,
        address: str | None = None,
    ) -> None:
        self._resources = resources
        self._tune = tune
        self._kept = kept
        self._checkpoint_minutes = checkpoint_minutes
        self._runner = runner
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._seen_room = (-math.inf, 0)
        self._fixed: dict[str, float] = {}

    def __enter__(self) -> RayScheduler:
        os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
        options: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        if self._address != "local":
            options = {} if _is_a_job() else {"runtime_env": shipped()}
        try:
            ray.init(self._address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise CannotStart(
                f"Ray must start or be reachable, got {self._address}: {error}; check --address or "
                "RAY_ADDRESS"
            ) from error
        for name in _MUTED:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return self

    def __exit__(self, *exception: object) -> None:
        ray.shutdown()

    def check(self) -> None:
        """Raise `CannotStart` if no node can ever hold one trial."""
        self._slots()

    def nodes(self) -> Sequence[Node]:
        """The machines that can hold a trial, and whether each is this one."""
        bundle, here = self._bundle(), ray.get_runtime_context().get_node_id()
        return [
            Node(node["NodeID"], node["NodeManagerHostname"], node["NodeID"] == here)
            for node in _alive()
            if _fits(bundle, node["Resources"])
        ]

    def on_each_node(self, work: Callable[..., T], *arguments: object) -> Mapping[Node, T]:
        """What `work`, a function of a module of ours, gives on each machine that can hold a trial.

        A machine that goes away meanwhile is left out. Raises `CannotStart` where one that stays does not
        answer in `ANSWER_SECONDS`, or `work` raises there.
        """
        heard: dict[Node, T] = {}
        failed: dict[Node, RayError] = {}
        for tries in range(ANSWER_TRIES):
            time.sleep(ANSWER_PAUSE_SECONDS if tries else 0)
            failed.clear()
            for node, answer in _ask(work, arguments, [node for node in self.nodes() if node not in heard]):
                try:
                    heard[node] = ray.get(answer, timeout=ANSWER_SECONDS)
                except (GetTimeoutError, RayTaskError) as error:
                    raise _no_answer(node, error) from error
                except RayError as error:
                    failed[node] = error
            if not failed:
                return heard
        node, failure = next(iter(failed.items()))
        raise _no_answer(node, failure) from failure

    def run(self, conductor: Conductor) -> None:
        """Run until the conductor has nothing left and every placed proposal has ended.

        Cut off by an exception, such as a `KeyboardInterrupt`, it ends what is running as interrupted.
        Raises `CannotContinue` where Ray fails before that.
        """
        self._slots()
        self._fixed = self._bundle_now()
        placed = Placed(conductor, self._room)
        forgetting = _Forgetting()
        actor = tune.with_resources(TrialActor, tune.PlacementGroupFactory([self._bundle()]))
        tuner = Tuner(
            actor,
            param_space={
                "worker": {
                    "runner": self._runner,
                    "threads": self._threads(),
                    "on_cpu": not self._resources.gpus,
                    "checkpoint_minutes": self._checkpoint_minutes,
                    "kept": dataclasses.asdict(self._kept),
                }
            },
            tune_config=TuneConfig(
                search_alg=_Proposer(placed),
                scheduler=forgetting,
                num_samples=-1,
                max_concurrent_trials=MOST_PENDING,
                reuse_actors=True,
            ),
            run_config=RunConfig(
                name=f"tune-{time.time_ns()}",  # a resumed sweep is a new run of Tune
                storage_path=str(self._tune),
                callbacks=[_Listener(placed), _StepEnd(forgetting)],
                failure_config=FailureConfig(max_failures=0),
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),  # a trial keeps its own
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except Exception as error:
            if placed.failure is not None:
                raise placed.failure from None
            # At its end Tune reads back its own files, which a full disk has left empty.
            if placed.is_done:
                return
            if not isinstance(error, RayError | TuneError | OSError):
                raise
            reason = str(error).strip().rpartition("\n")[2]
            raise CannotContinue(
                f"Ray must be able to run trials, got {type(error).__name__}: {reason}; mend that, then "
                "resume the sweep"
            ) from error
        finally:
            # Ctrl-C waits: the states of the last trials are being written
            with handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
                placed.close_open_trials()

    def _bundle(self) -> dict[str, float]:
        """What one trial takes; of a run that has begun always the same, whatever machines come and go."""
        return self._fixed or self._bundle_now()

    def _bundle_now(self) -> dict[str, float]:
        wanted = self._resources
        bundle: dict[str, float] = {"CPU": self._cpus()}
        if wanted.gpus:
            bundle["GPU"] = wanted.gpus
        if wanted.accelerator:
            bundle[f"accelerator_type:{wanted.accelerator}"] = 0.001
        return bundle

    def _cpus(self) -> int:
        """As the file says; else one beside a GPU, and the whole of the smallest node without."""
        if self._resources.cpus is not None:
            return self._resources.cpus
        if self._resources.gpus:
            return 1
        able = [int(node["CPU"]) for node in _nodes() if node.get("CPU", 0) >= 1]
        return min(able, default=1)

    def _threads(self) -> int | None:
        """A trial on CPUs computes with as many threads as it has CPUs."""
        return None if self._resources.gpus else int(self._bundle()["CPU"])

    def _slots(self) -> int:
        """How many trials fit at once."""
        bundle = self._bundle()
        slots = sum(_fits(bundle, node) for node in _nodes())
        if slots == 0:
            raise CannotStart(self._refusal(bundle))
        return self._at_most(slots)

    def _at_most(self, slots: int) -> int:
        return min(slots, self._resources.parallel or slots)

    def _room(self) -> int:
        """How many trials fit just now: machines come and go."""
        seen, room = self._seen_room
        if time.monotonic() - seen > NODES_SECONDS:
            bundle = self._bundle()
            room = self._at_most(sum(_fits(bundle, node) for node in _nodes()))
            self._seen_room = (time.monotonic(), room)
        return room

    def _refusal(self, bundle: Mapping[str, float]) -> str:
        gpus = [node.get("GPU", 0) for node in _nodes()]
        kinds = sorted(
            name.removeprefix("accelerator_type:")
            for name in ray.cluster_resources()
            if name.startswith("accelerator_type:")
        )
        asked = ", ".join(f"{name} {amount:g}" for name, amount in bundle.items())
        cpus = [node.get("CPU", 0) for node in _nodes()]
        return (
            f"one machine must hold a trial's resources ({asked}), got at most {max(gpus, default=0):g} GPUs "
            f"and {max(cpus, default=0):g} CPUs on one machine, accelerators {kinds or 'none'}; lower "
            "resources.gpus (0 trains on the CPU), or change resources.accelerator"
        )


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in _alive()]


def _ask(
    work: Callable[..., T], arguments: Sequence[object], nodes: Iterable[Node]
) -> list[tuple[Node, Any]]:
    remote = ray.remote(num_cpus=0, max_retries=0)(work)
    asked = []
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        asked.append((node, remote.options(scheduling_strategy=there).remote(*arguments)))
    return asked


def _no_answer(node: Node, error: RayError) -> CannotStart:
    reason = str(getattr(error, "cause", None) or error).strip().rpartition("\n")[2]
    return CannotStart(
        f"every machine of the cluster must answer, got {type(error).__name__} from {node.name}: {reason}; "
        "take it out of the cluster, or mend it"
    )


def _is_a_job() -> bool:
    """Whether this process is a job of the cluster, whose own environment has what is shipped."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def shipped() -> dict[str, Any]:
    """Ray's runtime environment: this very code on every machine, and how Ray itself is to behave.

    No variable of ours goes with it: Ray shows a job's environment to whoever sees its dashboard.
    """
    packages = [Path(module.__path__[0]) for module in (sweeps, sweepsvc)]
    return {
        "py_modules": [str(package) for package in packages],
        "env_vars": {**_ENVIRONMENT, "RAY_JOB_STOP_WAIT_TIME_S": _JOB_STOP_SECONDS},
    }


class RayJobs:
    """Commands that run on a cluster, on its head, and go on when this process ends.

    `address` is the head's dashboard (`http://host:8265`), Ray's own client address (`ray://host:10001`), or
    `auto` for the cluster that this machine is part of. It goes before `RAY_ADDRESS`, unlike in Ray. Raises
    `CannotStart` where it does not answer.
    """

    def __init__(self, address: str) -> None:
        with _reaching_jobs(address), _without_rays_own_addresses():
            self._client = _jobs_client(address)
        logging.getLogger("ray").setLevel(logging.WARNING)  # it would tell of each package that it uploads
        self._address = address

    def submit(self, job: str, command: str, folder: Path) -> None:
        """Start `command` as the job of that name, in a copy of `folder`, with the code of this process."""
        environment = {**shipped(), "working_dir": str(folder)}
        with _reaching_jobs(self._address):
            self._client.submit_job(entrypoint=command, submission_id=job, runtime_env=environment)

    def follow(self, job: str) -> Iterator[str]:
        """What the job prints, as it does, until it ends."""
        waiting = self._client.tail_job_logs(job)
        with asyncio.Runner() as runner, _reaching_jobs(self._address):
            while True:
                try:
                    yield runner.run(anext(waiting))
                except StopAsyncIteration:
                    return

    def exit_code(self, job: str) -> int | None:
        """With what the job's command ended; None while it is to start or runs.

        Raises `CannotStart` where it could not be started, or Ray lost it.
        """
        with _reaching_jobs(self._address):
            details = self._client.get_job_info(job)
        if not details.status.is_terminal():
            return None
        if str(details.status) == "STOPPED":
            return STOPPED
        if details.driver_exit_code is None:
            raise CannotStart(
                f"the cluster must be able to run the driver, got {str(details.message).strip()}; look at "
                f"`ray job logs {job}`"
            )
        return int(details.driver_exit_code)


def _jobs_client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for _ in range(CLIENT_TRIES - 1):
        with contextlib.suppress(ConnectionAbortedError):  # the head answers, its process for us does not
            return JobSubmissionClient(address)
    return JobSubmissionClient(address)


STOPPED = 4
"""The exit code of a driver that Ray was told to end: its sweep can be resumed."""


@contextlib.contextmanager
def _without_rays_own_addresses() -> Iterator[None]:
    kept = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in kept.items() if value is not None})


@contextlib.contextmanager
def _reaching_jobs(address: str) -> Iterator[None]:
    from aiohttp import ClientError  # Ray's jobs stand on it

    try:
        yield
    except (RuntimeError, ConnectionError, ValueError, OSError, ClientError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0]  # the head's own traceback
        raise CannotStart(
            f"the cluster's dashboard must answer, got {address}: {reason}; check --address (the head's "
            "http://HOST:8265 or ray://HOST:10001), and that Ray was installed as ray[default] there and here"
        ) from error


def _fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> int:
    return min(math.floor(node.get(name, 0) / amount) for name, amount in bundle.items())


class _Proposer(Searcher):
    """Tune's Searcher over the conductor."""

    def __init__(self, placed: Placed) -> None:
        super().__init__()
        self._placed = placed

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        proposal = self._placed.take(trial_id)
        if isinstance(proposal, Later):
            return None
        if proposal is None:
            return str(Searcher.FINISHED)
        folder = self._placed.conductor.folder(proposal)
        return {"trial": {"spec": proposal.spec.model_dump_json(), "folder": str(folder)}}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: the listener has told the study."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep is a new Tune run on the same study."""


class _Listener(Callback):
    """Tune's Callback to the conductor."""

    def __init__(self, placed: Placed) -> None:
        self._placed = placed

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._placed.start(trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if "progress" in result:
            self._placed.report(trial.trial_id, Progress.model_validate_json(result["progress"]))
        else:
            self._placed.end(trial.trial_id, TrialResult.model_validate_json(result["result"]))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        message = "the worker was lost, or could not write its result: see the traceback"
        lost = Failure(kind="process_lost", message=message, traceback=_ray_error(trial))
        self._placed.end(trial.trial_id, TrialResult(outcome="failed", failure=lost))


class _Forgetting(FIFOScheduler):
    """First in, first out; and Tune forgets each trial that has ended, but for the last one.

    Tune keeps every trial of a run for a restore that we never do, with its parameters, results and state,
    and looks through all of them many times for each new one: memory, and what a trial costs, would grow
    without end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._controller: Any = None
        self._ended: list[Trial] = []

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tuner writes a pickle of itself, for a restore that we never do."""
        return {}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        # What Tune gives is a wrapper, which warns of whatever is private.
        self._controller = getattr(tune_controller, "_tune_controller", tune_controller)

    def ended(self, trial: Trial) -> None:
        self._ended.append(trial)

    def forget(self) -> None:
        """Between two steps of Tune, where none of its loops is under way."""
        if len(self._ended) < 2:
            return
        *over, last = self._ended
        self._ended = [trial for trial in over if not self._forgot(trial)] + [last]

    def _forgot(self, trial: Trial) -> bool:
        """Whether it is forgotten: not while its actor is still to be stopped."""
        controller = self._controller
        if not trial.is_finished() or trial in controller._trial_to_actor:
            return False
        controller._trials.remove(trial)
        for among in (
            controller._live_trials,
            controller._stopped_trials,
            controller._failed_trials,
            controller._trials_to_cache,  # what the next snapshot is to hold of it
        ):
            among.discard(trial)
        controller._trial_metadata.pop(trial.trial_id, None)
        return True


class _StepEnd(TrialProgressCallback):
    """Tells `_Forgetting` which trials have ended, and when it may forget them.

    It stands where Tune would put a printer of its own, which keeps every trial and prints nothing here.
    """

    def __init__(self, forgetting: _Forgetting) -> None:
        super().__init__()
        self._forgetting = forgetting

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Nothing is printed."""

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._forgetting.ended(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._forgetting.ended(trial)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._forgetting.forget()


def _ray_error(trial: Trial) -> str:
    with contextlib.suppress(OSError, TypeError):
        return Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    return ""


class TrialActor(Trainable):
    """One worker process: a `Worker` in Tune's terms."""

    def setup(self, config: dict[str, Any]) -> None:
        self._worker = Worker(**config["worker"])
        self._worker.begin(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._worker.begin(new_config["trial"])
        return True

    def step(self) -> dict[str, Any]:
        return self._worker.step()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}  # the trial keeps its own

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the trial finds its own."""

    def cleanup(self) -> None:
        self._worker.close()
