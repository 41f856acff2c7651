"""Ranks are read from torchrun's or srun's environment, and a plain start is one rank."""

from __future__ import annotations

import pytest

from megatron_hybrid.substrate.place import Place, first_host, local_rank_environment, place_from_environment

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[011-014]",
    "SLURM_JOB_ID": "123456",
}


def test_nothing_in_the_environment_is_a_plain_start() -> None:
    assert place_from_environment({}) == Place("plain", rank=0, world_size=1)


def test_torchrun() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
    assert place_from_environment(environment) == Place("torchrun", 3, 4, 1, "node7", 29500, hosts_store=False)


def test_rank_0_serves_the_store_unless_torchruns_agent_does() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
    assert place_from_environment(environment).hosts_store
    assert not place_from_environment(environment | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts_store


def test_local_ranks_look_like_torchruns() -> None:
    assert place_from_environment(local_rank_environment(1, 2, 4000, "7")) == Place("torchrun", 1, 2, 1, "127.0.0.1", 4000, False, "7")


def test_slurm_needs_no_scontrol() -> None:
    place = place_from_environment(SLURM)
    assert place == Place("slurm", 5, 8, 1, "gpu011", 15000 + 123456 % 15000, hosts_store=False)
    assert place_from_environment(SLURM | {"SLURM_PROCID": "0"}).hosts_store


def test_slurm_ranks_agree_on_the_port_and_steps_of_one_job_do_not() -> None:
    ports = {place_from_environment(SLURM | {"SLURM_PROCID": str(rank)}).master_port for rank in range(8)}
    assert len(ports) == 1
    assert place_from_environment(SLURM | {"SLURM_STEP_ID": "1"}).master_port not in ports


def test_slurm_address_and_port_can_be_given() -> None:
    place = place_from_environment(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4321"})
    assert (place.master_host, place.master_port) == ("10.0.0.1", 4321)


def test_a_slurm_step_counts_its_own_tasks_and_hosts() -> None:
    place = place_from_environment(SLURM | {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu013"})
    assert (place.world_size, place.master_host) == (6, "gpu013")


def test_a_single_slurm_task_is_a_plain_start() -> None:
    assert place_from_environment(SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}).launcher == "plain"


def test_torchrun_inside_slurm_goes_by_torchrun() -> None:
    environment = SLURM | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert place_from_environment(environment).launcher == "torchrun"


@pytest.mark.parametrize(
    ("missing", "environment"),
    [
        ("MASTER_PORT", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}),
        ("LOCAL_RANK", {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}),
        ("SLURM_LOCALID", {key: value for key, value in SLURM.items() if key != "SLURM_LOCALID"}),
        ("SLURM_JOB_NODELIST", {key: value for key, value in SLURM.items() if key != "SLURM_JOB_NODELIST"}),
    ],
)
def test_an_incomplete_environment_names_what_is_missing(missing: str, environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{missing} is not set"):
        place_from_environment(environment)


def test_a_rank_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="RANK='first'"):
        place_from_environment({"RANK": "first", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("alone", "alone"),
        ("a,b", "a"),
        ("gpu[003-006,9],login1", "gpu003"),
        ("gpu[7,9]", "gpu7"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("rack2-node[07]-ib,x", "rack2-node07-ib"),
        ("n1.cluster.org,n2.cluster.org", "n1.cluster.org"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("text", ["", ",a", "[1-2]x]", "gpu["])
def test_no_node_list(text: str) -> None:
    with pytest.raises(ValueError, match="node list"):
        first_host(text)
