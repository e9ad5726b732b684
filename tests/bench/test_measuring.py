"""What the bench's figures rest on: the same work for everybody, arithmetic and memory counted right, no noise in the answers."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from bench import machine, memory, rounds, startup, work
from bench.contender import ROOT, Contender, ContenderError
from bench.nets import NETS
from fedtrust.data.base import Task
from fedtrust.models.build import build

SMALL = work.Work("cnn", 6, 25)


@pytest.fixture(scope="module")
def by_hand():
    threads = torch.get_num_threads()
    player = work.PureLoop(SMALL)
    player.round()
    player.round()
    torch.set_num_threads(threads)
    return player


@pytest.mark.parametrize(("path", "aggregator"), [("loop", "weighted-mean"), ("auto", "weighted-mean"), ("auto", "flwr:FedAvg")])
def test_every_contender_trains_the_same_model_as_the_loop_written_by_hand(by_hand, path, aggregator):
    player = work.Player(SMALL, work.Way(path, "local", 2, aggregator))
    try:
        start = player.params.clone()
        player.round()
        player.round()
    finally:
        player.close()
    torch.testing.assert_close(player.params, by_hand.params, atol=1e-5, rtol=0)
    assert float((player.params - start).abs().max()) > 5e-3  # it has moved five hundred times as far as it may differ


def test_training_alone_repeats_the_very_chunks_of_the_round():
    player = work.Player(SMALL, work.Way("auto", "local", 2))
    try:
        player.round()
        before = player.params.clone()
        player.pure()
        assert torch.equal(player.params, before)
        clients = sorted(task.client for chunk in player._tap.chunks for task in chunk.tasks)
        assert clients == list(range(6))
    finally:
        player.close()


@pytest.mark.slow
def test_flowers_own_engine_ends_with_the_same_model(by_hand, tmp_path):
    saved = tmp_path / "flower.npy"
    command = [sys.executable, "-m", "bench.flower_app", "--clients", "6", "--samples", "25", "--rounds", "2", "--save", str(saved)]
    contender = Contender("Flower", command)
    try:
        assert [set(contender.read()) for _ in range(2)] == [{"seconds"}] * 2
        contender.finish()
    finally:
        contender.close()
    np.testing.assert_allclose(np.load(saved), by_hand.params.numpy(), atol=1e-5)


def test_a_batch_of_the_small_cnn_counts_the_operations_that_a_pencil_counts():
    forward = 2 * (784 * 16 * 25 + 196 * 16 * 144 + 784 * 64 + 64 * 10)
    to_inputs = 2 * (196 * 16 * 144 + 784 * 64 + 64 * 10)  # nobody asks for the gradient of the images
    assert machine.step_flops(NETS["cnn"](), torch.zeros(10, 1, 28, 28)) == 10 * (2 * forward + to_inputs)
    world = work.recipe(work.Work("cnn", 4, 25)).world  # 25 samples: three batches of ten, the last one filled up
    assert work.round_flops(world) == 4 * 3 * 10 * (2 * forward + to_inputs)


@pytest.mark.parametrize("name", list(NETS))
def test_the_models_of_the_gpu_bench_are_those_of_fedtrust(name):
    ours = build(name, {}, Task("classification", (1, 28, 28), 10, 0.0, 1.0), 3)
    theirs = NETS[name]()
    values = ours.state_dict()
    assert {n: p.shape for n, p in theirs.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}
    theirs.load_state_dict(values)
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x))


def test_memory_of_a_process_includes_its_children():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = "block = bytearray(200 << 20); print('ready', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code, child], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        with machine.watching(process.pid) as peak:
            pass
        own = machine.memory_of(process.pid).all
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()
    assert own < 50 * machine.MIB
    assert 200 * machine.MIB < peak.bytes < 280 * machine.MIB


def test_growth_is_taken_between_the_first_and_the_last_rounds_after_it_has_settled():
    settled = [900, 800, 700, 600, 500]
    assert memory._growth(settled + [100] * 20) == 0
    assert memory._growth(settled + [100 + 3 * i for i in range(20)]) == 42
    assert memory._growth([*settled, 100, 107]) == 7


def test_growth_over_the_limit_is_called_over():
    found = {"case": "flat", "clients": 3, "rounds": 9, "engine": "local", "bytes": {"driver": [memory.GROWTH * 9]}}
    assert memory.verdict(found | {"growth": {"driver": memory.GROWTH + 1}, "ok": False}).endswith("OVER")
    assert "+4.0" in memory.verdict(found | {"growth": {"driver": memory.GROWTH}, "ok": True})


def test_what_a_contender_prints_is_not_taken_for_an_answer():
    code = "from bench.contender import channel, say; a = channel(); print('noise'); say(a, x=1); input(); say(a, x=2)"
    contender = Contender("talker", [sys.executable, "-c", code])
    try:
        assert contender.read() == {"x": 1}
        assert contender.ask("on") == {"x": 2}
    finally:
        contender.close()


def test_a_contender_that_dies_says_why():
    contender = Contender("mortal", [sys.executable, "-c", "raise SystemExit('the disk is gone')"])
    try:
        with pytest.raises(ContenderError, match="mortal: ended with code 1: the disk is gone"):
            contender.read()
    finally:
        contender.close()


def test_a_contender_that_cannot_be_set_up_answers_with_the_reason():
    contender = Contender("wrong", [sys.executable, "-m", "bench.contender", "auto", "--model", "cnnn", "--clients", "4"])
    try:
        with pytest.raises(ContenderError, match=r"unknown model 'cnnn'.*did you mean 'cnn'"):
            contender.read()
    finally:
        contender.close()


def test_a_record_counts_when_its_line_is_whole(tmp_path):
    records = tmp_path / "rounds.jsonl"
    assert not startup._has_round(records)
    records.write_text('{"round": 0}\n{"round": 1')
    assert not startup._has_round(records)
    records.write_text('{"round": 0}\n{"round": 1}\n')
    assert startup._has_round(records)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--clients", "0"], "should be at least 1 (got 0)"),
        (["--clients", "4001"], "--clients: at most 4000 with cnn"),
        (["--model", "cnn-large", "--clients", "201"], "--clients: at most 200 with cnn-large"),
        (["--model", "vgg"], "invalid choice: 'vgg'"),
        (["--pfl", "/nowhere/python"], "--pfl: an interpreter's path"),
        (["--json", "/nowhere/x.json"], "--json: there is no folder /nowhere"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line_before_anything_is_measured(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as refused:
        rounds.main()
    line = capsys.readouterr().err
    assert refused.value.code == 2
    assert said in line
    assert line.count("\n") == 1


def test_without_a_gpu_the_ray_bench_says_so_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "bench.gpu_ray"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no GPU here" in done.stderr
