"""From a configuration to a running set of ranks: device, process groups, seeds, determinism and threads."""

from __future__ import annotations

import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.config.schema import RunConfig
from megatron_hybrid.substrate import rendezvous
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.place import Place, place_from_environment


def initialize(config: RunConfig, place: Place | None = None, store: dist.Store | None = None) -> Substrate:
    """Meet the other ranks, check that they can run ``config`` together, and build the groups.

    Every check is made before any group exists, and fails on all ranks with the same error. Sets what belongs to the process: the
    current CUDA device, torch's seed, its deterministic switches and its number of threads.

    Args:
        config: the run.
        place: this process's rank; unset, read from the environment.
        store: the connected store of all ranks; unset, opened here.

    Raises:
        ValueError: the layout does not fit the ranks or the batch, or the hosts do not fit the layout.
        RendezvousError: a rank did not come in time.
    """
    place = place or place_from_environment(os.environ)
    data_size = data_parallel_size(config, place.world_size)
    wait_s = rendezvous.wait_s(config)
    store = store or rendezvous.open_store(place, wait_s)
    reports = rendezvous.exchange_reports(store, place, rendezvous.make_report(config, place), wait_s)
    rendezvous.check_reports(reports)

    backend = reports[place.rank].backend
    device = torch.device("cuda", rendezvous.device_index(place)) if backend == "nccl" else torch.device("cpu")
    num_threads = config.runtime.threads_per_rank or rendezvous.threads_per_rank(reports, place.rank)
    torch.set_num_threads(num_threads)
    if backend == "nccl":
        torch.cuda.set_device(device)
        # Not the default stream, which cannot be captured as a graph: what autograd runs in backward runs on the stream it was made on.
        torch.cuda.set_stream(torch.cuda.Stream(device))
    set_deterministic(config.runtime.deterministic)
    try:
        control_group = _build_groups(config, place, store, backend)
        torch.manual_seed(config.seed)
        tensor_parallel.model_parallel_cuda_manual_seed(config.seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    except BaseException:
        destroy_groups()
        raise
    return Substrate(
        device=device,
        backend=backend,
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        hosts=tuple(report.host for report in reports),
        tensor_size=config.parallel.tensor,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_size=config.parallel.pipeline,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        virtual_pipeline_size=config.parallel.virtual_pipeline,
        data_size=data_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        num_threads=num_threads,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        control_group=control_group,
    )


def shutdown(substrate: Substrate) -> None:
    """Wait until every rank is done, then take the groups down. After a failure nobody may come: use ``destroy_groups``.

    Gives the device memory back that the run's stream had cached: the next run in this process has a stream of its own, which cannot use
    it, and other processes may share the device.
    """
    dist.barrier(group=substrate.control_group)
    destroy_groups()
    if substrate.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Return the data-parallel ranks of ``world_size`` ranks.

    Raises:
        ValueError: the ranks are not a whole number of model copies, or not the number asked for, or do not divide the batch.
    """
    parallel = config.parallel
    layout = f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}"
    if parallel.data is not None and world_size != parallel.model_ranks * parallel.data:
        raise ValueError(
            f"{layout} x parallel.data={parallel.data} uses {parallel.model_ranks * parallel.data} rank(s), but {world_size} were started; "
            f"start {parallel.model_ranks * parallel.data}, or change parallel.data (unset: whatever the ranks leave)"
        )
    if world_size % parallel.model_ranks:
        raise ValueError(
            f"{layout} needs a multiple of {parallel.model_ranks} ranks, but {world_size} were started; "
            f"start {-(-world_size // parallel.model_ranks) * parallel.model_ranks} ranks, or change parallel.tensor or parallel.pipeline"
        )
    data_size = world_size // parallel.model_ranks
    config.check_data_ranks(data_size)
    return data_size


def set_deterministic(deterministic: bool) -> None:
    """Choose deterministic algorithms in torch, cuDNN and cuBLAS, or let them be fast."""
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    # Deterministic mode would also fill every fresh tensor with NaN, which costs a write of each.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if deterministic:
        # cuBLAS reads this at its first call; without it torch refuses its matrix products in deterministic mode.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _build_groups(config: RunConfig, place: Place, store: dist.Store, backend: str) -> dist.ProcessGroup:
    """Build the groups of the whole job and of the layout; return the control group."""
    timeout = timedelta(seconds=config.runtime.timeout_s)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("groups", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        # No device_id: with it NCCL would make a communicator for each of megatron-core's twenty-odd groups at once, 7 GiB on an H100 of
        # one rank. Without, a group gets one when it is first used.
    )
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
    )
    return dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)


def destroy_groups() -> None:
    """Take down whatever groups there are, without waiting for other ranks."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
