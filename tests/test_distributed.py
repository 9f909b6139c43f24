"Distributed training with fastai's DistributedTrainer: on two processes of the CPU, and on all GPUs that there are."

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
TRAIN = TESTS.parent / "nbs/examples/train.py"
BENCHMARK = TESTS.parent / "nbs/benchmarks/distributed.py"
WARNING = "Grad strides do not match bucket view strides"

N_PROCESSES = [
    pytest.param(
        n, marks=[pytest.mark.multi_gpu, pytest.mark.skipif(torch.cuda.device_count() < n, reason=f"{n} GPUs")]
    )
    for n in (2, 4, 8)
]


def run(*command, **environment):
    command = [sys.executable, "-W", "ignore", *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, **environment})


def launch_on_cpu(*command):
    "Two processes on the CPU, where Accelerate's own launcher would need MPI."
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2
    return run(*launcher, *command, ACCELERATE_USE_CPU="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


def launch_on_gpus(n, *command):
    launcher = "-m", "accelerate.commands.launch", "--num_machines", 1, "--mixed_precision", "no"
    return run(*launcher, "--dynamo_backend", "no", "--multi_gpu", "--num_processes", n, *command)


def results(done):
    "Of each process."
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


# The worker: search, summary, training and checkpoints


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return launch_on_cpu(TESTS / "distributed_worker.py", "cpu", tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory):
    n = torch.cuda.device_count()
    return launch_on_gpus(n, TESTS / "distributed_worker.py", "cuda", tmp_path_factory.mktemp("gpus"))


@pytest.fixture(params=["on_cpu", pytest.param("on_gpus", marks=pytest.mark.multi_gpu)])
def done(request):
    return request.getfixturevalue(request.param)


def test_processes_choose_the_same_format(done):
    first, *others = (result["search"] for result in results(done))
    assert others and all(other == first for other in others)
    assert (
        first["is_unchanged"]
        and first["n_hooks"] == 0
        and len(first["samples"]) == 2
        and "in process 0" in first["error"]
    )
    assert done.stdout.count("Sequential (input shape") == 4  # one process prints, for each of the four searches


def test_processes_train_in_the_same_fastest_format(done):
    first, *others = (result["fastest"] for result in results(done))
    assert others and set(others) == {first}


def test_process_that_fails_alone_where_none_waits_for_it(done):
    *_, last = found = results(done)
    which = f"(in process {len(found) - 1} of {len(found)})"
    assert all(result["search"]["error_alone"] == f"KeyError: 'alone at after_batch' {which}" for result in found)
    assert last["error_of_data"] == "OSError('no such file')"
    for result in found[:-1]:
        assert result["error_of_data"] == f"RuntimeError('OSError: no such file {which}')"


def test_processes_end_where_one_fails_alone_and_the_others_wait_for_it(on_cpu):
    results(on_cpu)
    first, last = sorted(json.loads(line[6:]) for line in on_cpu.stdout.splitlines() if line.startswith("ALONE "))
    assert last[:2] == [1, "KeyError"] and "process 1 of 2 cannot go on: another does not answer" in last[2]
    assert first[0] == 0 and "process 0 of 2 cannot go on" in first[2]
    assert "in fail_alone" in on_cpu.stderr and "in __call__" in on_cpu.stderr


def test_summary_is_that_of_the_model_without_its_wrapper(done):
    for result in results(done):
        summary = result["summary"]
        assert summary["is_unchanged"] and summary["shapes"] == [[8, 3, 8, 8]]
        assert summary["modules"] == [str(i) for i in range(8)] and summary["share"] > 0.8


def test_model_trains_in_channels_last_and_is_saved_contiguous(done):
    for result in results(done):
        assert all(result["training"].values()), result["training"]
        assert result["is_unwrapped"]


def test_gradients_match_the_buckets_of_distributed_data_parallel(done):
    "PyTorch warns where they do not, once: the model that is converted too late shows that it would."
    in_time, late = done.stderr.split("LATE", 1)
    assert WARNING not in in_time and WARNING in late


def test_gradients_and_buffers_are_those_of_distributed_data_parallel(done):
    for result in results(done):
        expected = {"gradients": True, "buffers": True, "sent": True, "reason": "alone", "no_reason": None}
        assert result["shares"] == expected


def test_losses_gathered_early_are_those_that_fastai_gathers(on_cpu):
    assert all(result["early_loss"] == {"is_same": True, "left": False} for result in results(on_cpu))


# CUDA graphs, in each process its own


@pytest.mark.parametrize("name, said", [("plain", None), ("own backward", None), ("fails", "it fails")])
def test_callback_of_graphs_trains_as_distributed_data_parallel_does(on_cpu, name, said):
    "With a module that runs as it is in the place of captured ones."
    for result in results(on_cpu):
        found = result["stub"][name]
        assert max(found["values"], found["recorded"]) < 1e-6 and found["n_hooks"] == 0
        assert found["reason"] == said and len(found["warned"]) <= 1
        assert found["has_backward"] == (name == "own backward") and found["calls"] in ([], [12])


def test_second_call_of_the_model_in_a_batch_is_refused(on_cpu):
    assert all("called twice in a batch" in result["twice"] for result in results(on_cpu))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", ["fp32", "fp16", "SyncBatchNorm", "compiled"])
def test_replays_train_as_distributed_data_parallel_does(on_gpus, name):
    for result in results(on_gpus):
        found = result["graphs"][name]
        assert found["reason"] is None and found["n_replays"] > 0 and not found["warned"]
        assert found["is_same_everywhere"] and found["n_hooks"] == found["stride_warnings"] == 0
        assert (found["n_compiled"] > 0) == (name == "compiled")
        tolerance = 1e-3 if name in ("fp16", "compiled") else 1e-4
        assert max(found["losses"], found["values"], found["weights"]) < tolerance, found


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name, said", [("hooks in one", "has hooks"), ("waits in one", "synchroniz")])
def test_all_processes_train_eagerly_where_one_cannot_capture(on_gpus, name, said):
    for result in results(on_gpus):
        found = result["graphs"][name]
        assert said in found["reason"] and len(found["warned"]) == 1
        assert found["is_same_everywhere"] and found["n_hooks"] == 0
        assert max(found["losses"], found["values"], found["weights"]) < 1e-5, found


# The benchmark: the losses of one process with the same global batch


def check_losses(printed, n_compared):
    record = json.loads(printed)
    assert len(record["losses"]) == n_compared
    assert sum("fused" in compared["processes"] for compared in record["losses"]) >= n_compared // 2
    for compared in record["losses"]:
        losses, differences = compared["losses"], compared["relative_differences"]
        assert len(losses) == 8 and losses[-1] < losses[0]
        assert differences[0] < 1e-6 and max(differences) < 1e-4, compared
    assert record["stride_warnings"] == 0


def test_losses_are_those_of_one_process_with_the_same_global_batch(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--device", "cpu", "--processes", "1,2"])
    runpy.run_path(str(BENCHMARK), run_name="__main__")  # it starts processes enough
    check_losses(capsys.readouterr().out, 2)


@pytest.mark.multi_gpu
def test_losses_on_gpus_are_those_of_one_with_the_same_global_batch():
    numbers = [n for n in (2, 4, 8) if n <= torch.cuda.device_count()]
    done = run(BENCHMARK, "--processes", ",".join(map(str, numbers)))
    assert done.returncode == 0, done.stderr[-3000:]
    check_losses(done.stdout, 6 * len(numbers))


# The training script


def check_training(done, said):
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("format:", "accuracy:", "training steps:"))]
    assert lines[0] == f"format: {said}" and len(lines) == 3  # of one process
    assert float(lines[1].removeprefix("accuracy: ")) > 0.8
    assert WARNING not in done.stderr


def test_training_script_on_two_processes(digits_folder):
    command = TESTS / "distributed_worker.py", "train.py", "--path", digits_folder, "--size", "16", "--bs", "8"
    options = "--epochs", "3", "--amp_mode", "fp32", "--device", "cpu"
    check_training(launch_on_cpu(*command, *options), "channels last fp32 on 2 x cpu")


@pytest.mark.parametrize("n", N_PROCESSES)
@pytest.mark.parametrize("options", [(), ("--local_bn",)], ids=["SyncBatchNorm", "BatchNorm"])
def test_training_script_on_gpus(n, options):
    done = launch_on_gpus(n, TRAIN, "--epochs", 10 if n > 2 else 5, *options)
    check_training(done, f"channels last fp16 on {n} x cuda")
