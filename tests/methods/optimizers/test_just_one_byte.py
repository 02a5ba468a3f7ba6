import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.optimizers import (
    FloatCodec,
    InProcessCluster,
    LogCodec,
    MeZO,
    ReplayLog,
    SharedRandomnessWorker,
    direction_seed,
    replay,
)
from fairtrial.methods.optimizers.just_one_byte import Message, step_lengths, take_round_
from fairtrial.methods.optimizers.mezo import directions

F64 = torch.float64


def model():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return net


def batch(seed):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


def loss(net, pair):
    return F.cross_entropy(net(pair[0]), pair[1])


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def run(n_workers, rounds=6, samples=2, **options):
    cluster = InProcessCluster(model(), n_workers, loss, **{"lr": 0.01, **options})
    for t in range(rounds):
        cluster.take_round([[batch(100 * t + 10 * k + j) for j in range(samples)] for k in range(n_workers)])
    return cluster


@pytest.mark.parametrize(
    ("bits", "number", "restored"),
    [
        (9, 1.0, 1.0),
        (9, -0.5, -0.502832),
        (9, 3.3, 3.278874),
        (9, -1e-3, -0.000970693),
        (9, 1e-6, 0.000357098),
        (9, 5000.0, 2800.350873),
        (9, 0.0, 0.0),
        (8, 1.0, 1.0),
        (8, -0.5, -0.472367),
        (8, 3.3, 3.490343),
        (8, -1e-3, -0.00103330),
        (8, 1e-6, 0.000380129),
        (8, 5000.0, 2630.686190),
        (8, 0.0, 0.0),
    ],
)
def test_golden_codes(bits, number, restored):
    codec = LogCodec(bits)
    assert codec.h == 2.0 ** (5 - bits)
    assert codec.decode(codec.encode(number)) == pytest.approx(restored, rel=4e-6, abs=0)


@settings(deadline=None)
@given(bits=st.integers(3, 16), number=st.floats(-1e9, 1e9), step=st.sampled_from([None, 0.001, 0.04]))
def test_what_is_sent_is_near_what_was_meant(bits, number, step):
    codec = LogCodec(bits, step)
    data = codec.encode(number)
    assert len(data) == codec.n_bytes == (1 if bits <= 8 else 2)
    assert int.from_bytes(data, "little") < 2**bits
    restored = codec.decode(data)
    assert codec.decode(codec.encode(restored)) == restored
    assert math.copysign(1, restored) == math.copysign(1, number) or number == 0
    smallest, largest = (math.exp(side * codec.h * codec.largest_power) for side in (-1, 1))
    if number == 0:
        assert restored == 0
    elif smallest <= abs(number) <= largest:
        assert abs(restored / number - 1) <= math.expm1(codec.h / 2) * (1 + 1e-9)
    else:
        assert abs(restored) == pytest.approx(smallest if abs(number) < smallest else largest)


def test_a_byte_is_within_6_45_percent_and_nine_bits_within_3_17():
    assert math.expm1(LogCodec(8).h / 2) == pytest.approx(0.0645, abs=5e-5)
    assert math.expm1(LogCodec(9).h / 2) == pytest.approx(0.0317, abs=6e-5)
    ends = [math.exp(side * LogCodec(8).h * LogCodec(8).largest_power) for side in (-1, 1)]
    assert ends == pytest.approx([3.80e-4, 2630.7], rel=1e-3)
    assert (LogCodec(4).h, LogCodec(4).largest_power) == (2.0, 3)


@pytest.mark.parametrize("codec", [LogCodec(8), LogCodec(9), LogCodec(2), FloatCodec()], ids=str)
def test_every_code_is_different_and_what_is_not_finite_is_0(codec):
    for number in (math.nan, math.inf, -math.inf, 0.0):
        assert codec.decode(codec.encode(number)) == 0.0
    with pytest.raises(ValueError, match="data"):
        codec.decode(b"123")
    if isinstance(codec, LogCodec):
        P = codec.largest_power
        numbers = [0.0] + [sign * math.exp(codec.h * p) for p in range(-P, P + 1) for sign in (-1, 1)]
        assert len({codec.encode(number) for number in numbers}) == 2 * (2 * P + 1) + 1 <= 2**codec.n_bits
        unused = 2**codec.n_bits - 1
        with pytest.raises(ValueError, match="data"):
            codec.decode(unused.to_bytes(codec.n_bytes, "little"))
    else:
        assert codec.decode(codec.encode(0.1)) == pytest.approx(0.1, rel=1e-7)
        assert codec.decode(codec.encode(1e300)) == pytest.approx(3.4028235e38)


@pytest.mark.parametrize(("reduction", "expected"), [("sqrt", (0.978787, 2.056569)), ("mean", (0.985, 2.04))])
def test_golden_update(reduction, expected):
    theta = torch.tensor([1.0, 2], dtype=F64)
    z = torch.tensor([[1.0, -1], [0.5, 2]], dtype=F64)
    lengths = torch.tensor(step_lengths([0.4, -0.2], 0.1, reduction), dtype=F64)
    torch.testing.assert_close(theta + lengths @ z, torch.tensor(expected, dtype=F64), rtol=0, atol=5e-7)


def test_a_round_is_the_formula():
    params = [torch.ones(3, dtype=F64), torch.zeros(2, 2, dtype=F64)]
    expected = [p.clone() for p in params]
    take_round_(params, [(0, [0.4, 0.0]), (5, [-0.2])], round=7, run_seed=3, lr=0.1)
    for j, k, g in ((0, 0, 0.4), (0, 5, -0.2)):
        for p, (_, z) in zip(expected, directions(expected, direction_seed(3, 7, j, k)), strict=True):
            p -= 0.1 * g * z / math.sqrt(3)
    torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", ["sqrt", "mean"])
@pytest.mark.parametrize("codec", [LogCodec(8), LogCodec(9), FloatCodec()], ids=str)
def test_copies_stay_equal_and_can_be_rebuilt(codec, reduction):
    cluster = run(3, codec=codec, reduction=reduction)
    ends = [weights(worker.model) for worker in cluster.workers]
    assert not torch.equal(ends[0], weights(model()))
    log = ReplayLog.from_jsonl(cluster.log.to_jsonl())
    assert log == cluster.log
    for other in (*ends[1:], weights(cluster.late_joiner()), weights(replay(model(), log))):
        assert torch.equal(other, ends[0])


def test_a_late_joiner_goes_on_with_the_others():
    cluster = run(2, rounds=3)
    joined = SharedRandomnessWorker(cluster.late_joiner(), 1, loss, workers=range(2), lr=0.01)
    joined.round = cluster.workers[0].round
    cluster.workers[1] = joined
    cluster.take_round([[batch(1)], [batch(2)]])
    assert torch.equal(weights(joined.model), weights(cluster.workers[0].model))
    assert torch.equal(weights(joined.model), weights(cluster.late_joiner()))


def test_measuring_leaves_the_weights_and_global_randomness_alone():
    worker = SharedRandomnessWorker(model(), 0, loss, workers=[0])
    before, state = weights(worker.model), torch.get_rng_state()
    message = worker.propose([batch(0), batch(1)])
    assert torch.equal(weights(worker.model), before)
    worker.apply([message])
    assert torch.equal(torch.get_rng_state(), state)


def test_one_worker_with_one_sample_is_mezo():
    cluster, net = run(1, samples=1, codec=FloatCodec(), run_seed=4), model().eval()
    params = list(net.parameters())
    optimizer = MeZO(params, lr=0.01)
    for t in range(6):
        (slope,) = cluster.log.rounds[t][2].values()
        optimizer.seed, optimizer.steps = 4, t  # the direction itself has more numbers in its seed
        before = copy.deepcopy(params)
        optimizer.step(lambda t=t: loss(net, batch(100 * t)))
        with torch.no_grad():
            for p, old, (_, z) in zip(params, before, directions(before, direction_seed(4, t, 0, 0)), strict=True):
                p.copy_(old - 0.01 * FloatCodec().decode(slope) * z)
    torch.testing.assert_close(weights(net), weights(cluster.workers[0].model), rtol=0, atol=1e-6)


def test_bytes_are_counted_from_the_messages():
    cluster = run(3, rounds=5, samples=4)
    assert cluster.payload_bytes == 5 * 3 * 4
    assert cluster.header_bytes == 5 * 3 * 8
    assert run(3, rounds=5, samples=4, codec=LogCodec(9)).payload_bytes == 2 * cluster.payload_bytes
    assert run(3, rounds=5, samples=4, codec=FloatCodec()).payload_bytes == 4 * cluster.payload_bytes
    message = cluster.workers[2].propose([batch(0)])
    assert Message.from_bytes(message.to_bytes()) == message
    assert len(message.to_bytes()) == 9


def test_training_lowers_the_loss():
    cluster = InProcessCluster(model(), 2, loss, lr=0.02)
    data = batch(0)
    before = loss(cluster.workers[0].model, data).item()
    for _ in range(150):
        cluster.take_round([[data], [data]])
    assert loss(cluster.workers[0].model, data).item() < 0.7 * before


def test_wrong_messages_are_refused_before_anything_changes():
    worker = SharedRandomnessWorker(model(), 0, loss, workers=[0, 2], codec=LogCodec(9))
    mine = worker.propose([batch(0)])
    for name, messages in {
        "round": [mine, Message(1, 2, mine.payload)],
        "worker": [mine, Message(0, 1, mine.payload)],
        "payload": [mine, Message(0, 2, b"123")],
        "data": [mine, Message(0, 2, b"\xff\xff")],
    }.items():
        with pytest.raises(ValueError, match=name):
            worker.apply(messages)
    with pytest.raises(ValueError, match="only once"):
        worker.apply([mine, mine])
    assert worker.round == 0
    assert torch.equal(weights(worker.model), weights(model()))
    worker.apply([mine])
    with pytest.raises(ValueError, match="round"):
        worker.apply([mine])


def test_a_loss_that_is_not_finite_moves_nothing():
    worker = SharedRandomnessWorker(model(), 0, lambda net, x: math.nan, workers=[0])
    worker.apply([worker.propose([None, None])])
    assert torch.equal(weights(worker.model), weights(model()))


def test_damaged_logs_are_refused():
    text = run(1, rounds=1).log.to_jsonl()
    for wrong in ("", "{}\n", text[:-5], text.replace('"sent"', '"got"'), text.replace('"bits": 8', '"bits": 1')):
        with pytest.raises(ValueError):
            ReplayLog.from_jsonl(wrong)


def test_misuse_is_refused_with_the_argument_named(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks of types would come first
    bad = {"eps": (0.0, math.nan), "lr": (-0.1, math.nan), "reduction": ("sum",), "run_seed": (-1, 2**32)}
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match="numbers" if name == "run_seed" else name):
                SharedRandomnessWorker(model(), 0, loss, workers=[0], **{name: value})
    with pytest.raises(ValueError, match="worker_id"):
        SharedRandomnessWorker(model(), 3, loss, workers=[0, 1])
    for arguments in ({"bits": 1}, {"bits": 17}, {"bits": 8.5}, {"step": 0.0}, {"step": math.nan}, {"step": 12.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            LogCodec(**arguments)
    with pytest.raises(ValueError, match="n_workers"):
        InProcessCluster(model(), 0, loss)
