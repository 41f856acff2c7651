"""One call builds the groups of any layout over gloo or NCCL, after checks that fail on every rank with one error."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.substrate import cuda_stand_in
from megatron_hybrid.substrate.groups import data_parallel_size, initialize, shutdown
from megatron_hybrid.substrate.place import Place, place_from_environment
from megatron_hybrid.substrate.rendezvous import RankReport, RendezvousError, check_reports, threads_per_rank
from tests.distributed import RankFailure
from tests.substrate.runs import small_run

RunRanks = Callable[..., list[Any]]
REPORT = RankReport(host="a", backend="gloo", gpu="", cpus=(0, 1, 2, 3), config_digest="c", error="")


def describe_rank(parallel: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    substrate = initialize(small_run(parallel=parallel))
    groups = (substrate.tensor_group, substrate.pipeline_group, substrate.data_group)
    described = {
        "ranks": (substrate.tensor_rank, substrate.pipeline_rank, substrate.data_rank),
        "sizes": (substrate.tensor_size, substrate.pipeline_size, substrate.data_size),
        "groups": [dist.get_process_group_ranks(group) for group in groups],
        "control": dist.get_world_size(substrate.control_group),
        "threads": (substrate.num_threads, torch.get_num_threads()),
        "hosts": len(substrate.hosts),
        "draw": torch.rand(1).item(),
    }
    shutdown(substrate)
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    return described


@pytest.mark.parametrize(
    ("parallel", "sizes"),
    [
        ({}, (1, 1, 1)),
        ({"tensor": 2}, (2, 1, 1)),
        ({}, (1, 1, 2)),
        ({"tensor": 2, "pipeline": 2}, (2, 2, 1)),
        ({"pipeline": 2}, (1, 2, 2)),
        ({"pipeline": 2, "virtual_pipeline": 2, "data": 2}, (1, 2, 2)),
        ({"tensor": 4}, (4, 1, 1)),
    ],
)
def test_layouts(run_ranks: RunRanks, parallel: dict[str, Any], sizes: tuple[int, int, int]) -> None:
    tensor, pipeline, data = sizes
    ranks = run_ranks(describe_rank, tensor * pipeline * data, parallel)
    for rank, described in enumerate(ranks):
        assert described["sizes"] == sizes
        # megatron-core's order: tensor varies fastest, then data, then pipeline.
        assert described["ranks"] == (rank % tensor, rank // (tensor * data), rank // tensor % data)
        for group, own in zip(described["groups"], described["ranks"], strict=True):
            assert group[own] == rank
        assert described["control"] == described["hosts"] == len(ranks)
        assert described["threads"][0] == described["threads"][1] == max(1, len(os.sched_getaffinity(0)) // len(ranks))
    # Tensor and data ranks of a stage draw alike; dropout differs by tensor rank through megatron-core's tracker.
    draws = {described["ranks"][1]: described["draw"] for described in ranks}
    assert all(described["draw"] == draws[described["ranks"][1]] for described in ranks)
    assert len(set(draws.values())) == pipeline


def collectives() -> dict[str, Any]:
    substrate = initialize(small_run(parallel={"tensor": 2}))
    x = torch.arange(4.0, device=substrate.device) + 10 * substrate.rank
    total, average, gathered, scattered = x.clone(), x.clone(), x.new_empty(8), x.new_empty(2)
    dist.all_reduce(total, group=substrate.tensor_group)
    dist.all_reduce(average, dist.ReduceOp.AVG, group=substrate.tensor_group)
    dist.all_gather_into_tensor(gathered, x, group=substrate.tensor_group)
    dist.reduce_scatter_tensor(scattered, x, group=substrate.tensor_group)
    shutdown(substrate)
    results = {"total": total, "average": average, "gathered": gathered, "scattered": scattered}
    return {name: tensor.tolist() for name, tensor in results.items()}


def test_collectives_that_megatron_core_relies_on(run_ranks: RunRanks) -> None:
    for rank, result in enumerate(run_ranks(collectives, 2)):
        assert result["total"] == [10, 12, 14, 16]
        assert result["average"] == [5, 6, 7, 8]
        assert result["gathered"] == [0, 1, 2, 3, 10, 11, 12, 13]
        assert result["scattered"] == [[10, 12], [14, 16]][rank]


def split_linears(sequence_parallel: bool) -> float:
    """Column-parallel, squared, row-parallel, on megatron-core's layers; return the largest error against plain torch."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_hybrid.substrate.transformer_config import build_transformer_config

    run = small_run(parallel={"tensor": 2, "sequence_parallel": sequence_parallel})
    substrate = initialize(run)
    config = build_transformer_config(run, substrate)
    up = ColumnParallelLinear(32, 64, config=config, init_method=config.init_method, bias=False, gather_output=False)
    down = RowParallelLinear(64, 32, config=config, init_method=config.init_method, bias=False, input_is_parallel=True, skip_bias_add=False)
    assert up.weight.tensor_model_parallel
    generator = torch.Generator().manual_seed(0)
    up_weight, down_weight, x_LBD, weight_LBD = (
        torch.randn(shape, generator=generator, dtype=torch.float32) for shape in ((64, 32), (32, 64), (8, 2, 32), (8, 2, 32))
    )
    rows = slice(32 * substrate.tensor_rank, 32 * (substrate.tensor_rank + 1))
    part = slice(4 * substrate.tensor_rank, 4 * (substrate.tensor_rank + 1)) if sequence_parallel else slice(None)
    with torch.no_grad():
        up.weight.copy_(up_weight[rows])
        down.weight.copy_(down_weight[:, rows])
    mine = x_LBD[part].to(substrate.device, copy=True).requires_grad_()
    y, _ = down(up(mine)[0].square())
    (y * weight_LBD[part].to(substrate.device)).sum().backward()

    reference = x_LBD.clone().requires_grad_()
    plain_up, plain_down = up_weight.requires_grad_(), down_weight.requires_grad_()
    expected = (reference @ plain_up.T).square() @ plain_down.T
    (expected * weight_LBD).sum().backward()
    pairs = [
        (y, expected[part]),
        (mine.grad, reference.grad[part]),
        (up.weight.grad, plain_up.grad[rows]),
        (down.weight.grad, plain_down.grad[:, rows]),
    ]
    shutdown(substrate)
    return max(((ours.cpu() - plain).abs().max() / plain.abs().max()).item() for ours, plain in pairs)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_split_linears_equal_plain_torch(run_ranks: RunRanks, sequence_parallel: bool) -> None:
    # Sums of 64 fp32 products, in another order.
    assert max(run_ranks(split_linears, 2, sequence_parallel)) < 2e-6


@pytest.mark.parametrize(
    ("parallel", "train", "world_size", "message"),
    [
        ({"tensor": 2}, {}, 3, "parallel.tensor=2 x parallel.pipeline=1 needs a multiple of 2 ranks, but 3 were started; start 4 ranks"),
        ({"tensor": 4}, {}, 2, "needs a multiple of 4 ranks, but 2 were started; start 4 ranks"),
        ({"tensor": 2, "data": 1}, {}, 4, "parallel.data=1 uses 2 rank.s., but 4 were started; start 2, or change parallel.data"),
        ({"data": 4}, {}, 2, "uses 4 rank.s., but 2 were started; start 4"),
        ({}, {}, 3, "train.global_batch_size=8 does not divide by train.micro_batch_size=1 x 3 data-parallel rank.s. = 3"),
        ({}, {"micro_batch_size": 4}, 4, "= 16; make it a multiple of 16"),
        (
            {"pipeline": 4, "virtual_pipeline": 2},
            {"global_batch_size": 6},
            4,
            "rounds of parallel.pipeline=4, but a rank has 6 .* make train.global_batch_size a multiple of 4",
        ),
    ],
)
def test_ranks_that_do_not_fit_are_refused(parallel: dict[str, Any], train: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_parallel_size(small_run(parallel=parallel, train=train), world_size)


def initialize_and_catch(parallel: dict[str, Any], different_rank: int | None) -> str:
    rank = place_from_environment(os.environ).rank
    try:
        initialize(small_run(parallel=parallel, train={"steps": 3 if rank == different_rank else 2}))
    except ValueError as error:
        return str(error)
    return "no error"


def test_every_rank_fails_with_the_one_error(run_ranks: RunRanks) -> None:
    assert len(set(run_ranks(initialize_and_catch, 2, {"data": 1}, None))) == 1
    errors = run_ranks(initialize_and_catch, 2, {"tensor": 2}, 1)
    assert errors[0] == errors[1]
    assert "rank 1" in errors[0] and "another configuration than rank 0" in errors[0]


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([{}, {"error": "no CUDA"}], "rank 1 on a: no CUDA"),
        ([{"error": "no CUDA"}], "^no CUDA$"),
        ([{"backend": "nccl", "gpu": "1"}, {"host": "b"}], "rank 1 on b would use gloo, rank 0 on a nccl"),
        ([{"backend": "nccl", "gpu": "1"}, {"backend": "nccl", "gpu": "1"}], r"2 ranks on a share 1 GPU\(s\), NCCL needs one per rank"),
    ],
)
def test_hosts_that_do_not_fit_are_refused(reports: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_reports([RankReport(**{**vars(REPORT), **fields}) for fields in reports])


def test_one_gpu_per_rank_is_accepted_on_several_hosts() -> None:
    check_reports([RankReport(**{**vars(REPORT), "host": host, "backend": "nccl", "gpu": gpu}) for host in "ab" for gpu in "01"])


def test_threads_are_shared_by_ranks_that_share_cores() -> None:
    other_host = RankReport(**{**vars(REPORT), "host": "b"})
    bound = RankReport(**{**vars(REPORT), "cpus": (4, 5)})
    assert threads_per_rank([REPORT, REPORT, other_host, bound], 0) == 2
    assert threads_per_rank([REPORT, REPORT, other_host, bound], 2) == 4
    assert threads_per_rank([REPORT, REPORT, other_host, bound], 3) == 2
    assert threads_per_rank([REPORT] * 9, 0) == 1


def test_a_missing_rank_is_named_in_time() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    place = Place("torchrun", 0, 2, 0, "127.0.0.1", store.port, hosts_store=False)
    with pytest.raises(RendezvousError, match=r"1 of 2 ranks did not come .* within 1 s: missing ranks 1; .*torchrun.* started 2 "):
        initialize(small_run(parallel={"tensor": 2}, runtime={"timeout_s": 1.0}), place)


def test_an_unreachable_rendezvous_is_named_in_time() -> None:
    place = Place("slurm", 1, 2, 1, "127.0.0.1", 9, hosts_store=False)
    with pytest.raises(RendezvousError, match="rank 1 of 2 could not reach the rendezvous at 127.0.0.1:9 within 1 s"):
        initialize(small_run(parallel={"tensor": 2}, runtime={"timeout_s": 1.0}), place)


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
            initialize(small_run(runtime={"device": "cpu"}), Place("plain"))
    else:
        with pytest.raises(ValueError, match="runtime.device=cuda, but torch finds no CUDA device"):
            initialize(small_run(runtime={"device": "cuda"}), Place("plain"))


def deterministic_switches(deterministic: bool) -> tuple[bool, int]:
    substrate = initialize(small_run(runtime={"deterministic": deterministic, "threads_per_rank": 3}))
    shutdown(substrate)
    return torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()


@pytest.mark.parametrize("deterministic", [True, False])
def test_process_switches_follow_the_configuration(run_ranks: RunRanks, deterministic: bool) -> None:
    assert run_ranks(deterministic_switches, 1, deterministic) == [(deterministic, 3)]


def stand_in_is_used() -> bool:
    from megatron.core import parallel_state

    return vars(parallel_state).get("_torch_cuda_stand_in") is cuda_stand_in


@pytest.mark.skipif(torch.cuda.is_available(), reason="the hook is not there beside CUDA")
def test_ranks_use_the_cpu_host(run_ranks: RunRanks) -> None:
    assert run_ranks(stand_in_is_used, 1) == [True]


def leave_early(rank_that_raises: int) -> None:
    substrate = initialize(small_run(parallel={"tensor": 2}))
    if substrate.rank == rank_that_raises:
        raise ArithmeticError("on purpose")
    dist.barrier()


def test_the_pool_reports_the_failing_rank_and_recovers(run_ranks: RunRanks) -> None:
    with pytest.raises(RankFailure, match="rank 1 raised:(.|\n)*ArithmeticError: on purpose"):
        run_ranks(leave_early, 2, 1)
    with pytest.raises(RankFailure, match="rank 0 died with exit code 7"):
        run_ranks(os._exit, 1, 7)
    assert run_ranks(os.getpid, 2)
