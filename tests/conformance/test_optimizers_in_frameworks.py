"""Every registered optimizer within the frameworks that people train in, on real runs of a few steps.

Run as a program it is one of two processes that train together; one group of them serves all optimizers.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.conformance.test_optimizers import OPTIMIZERS, assert_equal, build, each_optimizer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from fairtrial.methods.optimizers.torch_contract import batches, descend_, with_gradient

ROOT = Path(__file__).parents[2]
STEPS, SAVED_AT = 6, 3
REFUSAL = "does not support DTensor parameters, such as FSDP2's: it needs whole tensors"
PROCESSES, BATCH = 2, 8  # samples of a batch, in all processes together

pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:::transformers")


class Net(nn.Module):
    """Matrices of several shapes, vectors, and a tensor of four dimensions; no statistics of a batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.ModuleList([nn.Linear(8, 7), nn.Linear(7, 8)])
        self.head = nn.Linear(8, 5)

    def forward(self, x, labels):
        h = self.norm(self.conv(x).flatten(1))
        for layer in self.hidden:
            h = torch.tanh(layer(h))
        return {"loss": F.cross_entropy(self.head(h), labels)}


def new_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double()


class Samples(IterableDataset):
    """Those of some of the steps, always in the same order."""

    def __init__(self, first, end):
        self.chosen = slice(first * BATCH, end * BATCH)

    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        xs = torch.randn(STEPS * BATCH, 1, 4, 4, generator=generator, dtype=torch.float64)
        labels = torch.randint(5, (STEPS * BATCH,), generator=generator)
        pairs = zip(xs[self.chosen], labels[self.chosen], strict=True)
        return ({"x": x, "labels": label} for x, label in pairs)


def loader(first=0, end=STEPS):
    return DataLoader(Samples(first, end), BATCH)


def decaying(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)


def train(net, optimizer, share=slice(None)):
    scheduler = decaying(optimizer)
    for batch in loader():
        optimizer.zero_grad()
        net(**{name: part[share] for name, part in batch.items()})["loss"].backward()
        optimizer.step()
        scheduler.step()


def trained_alone(entry):
    net = new_net()
    train(net, build(entry, net))
    return net.state_dict()


# Two processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What both processes have come to, by the way they share work and by optimizer."""
    folder = tmp_path_factory.mktemp("together")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, __file__, str(folder)]
    running = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(PROCESSES)]
    try:
        assert [process.wait(timeout=300) for process in running] == [0] * PROCESSES
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@each_optimizer
def test_two_processes_that_share_a_batch_come_to_what_one_does(entry, together):
    alone = trained_alone(entry)
    for found in together:
        torch.testing.assert_close(found["DDP"][entry.name], alone, rtol=1e-8, atol=1e-10)


@each_optimizer
def test_sharded_parameters_are_trained_as_whole_ones_or_refused(entry, together):
    alone = trained_alone(entry)
    for found in together:
        match found["FSDP2"][entry.name]:
            case str(refusal):
                assert refusal == f"RuntimeError: {entry.name} {REFUSAL}"
            case end:
                torch.testing.assert_close(end, alone, rtol=1e-8, atol=1e-10)


def test_an_elementwise_step_is_taken_on_shards(together):
    net = new_net()
    train(net, Momentum(net.parameters()))
    for found in together:
        torch.testing.assert_close(found["FSDP2"]["Momentum"], net.state_dict(), rtol=1e-8, atol=1e-10)


class Momentum(torch.optim.Optimizer):
    """Of what the family's optimizers share."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group, (params, grads) in zip(self.param_groups, with_gradient(self, elementwise=True), strict=True):
            buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
            for shards, slopes, moving in batches(params, grads, buffers, foreach=True):
                torch._foreach_lerp_(moving, slopes, 0.5)
                descend_(shards, moving, group["lr"])


def train_together(folder, rank):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    share = slice(rank, None, PROCESSES)
    found = {"DDP": {}, "FSDP2": {}}

    def train_sharded(name, make):
        net = new_net()
        for layer in (*net.hidden, net):
            fully_shard(layer, mesh=mesh)
        try:
            train(net, make(net), share)
            found["FSDP2"][name] = {key: p.full_tensor() for key, p in net.state_dict().items()}
        except Exception as error:
            found["FSDP2"][name] = f"{type(error).__name__}: {error}"

    for entry in OPTIMIZERS:
        replicated = DistributedDataParallel(new_net())
        train(replicated, build(entry, replicated.module), share)
        found["DDP"][entry.name] = replicated.module.state_dict()
        train_sharded(entry.name, partial(build, entry))
    train_sharded("Momentum", lambda net: Momentum(net.parameters()))
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


# Trainers ----------------------------------------------------------------------------------------------------------


@each_optimizer
def test_accelerate_trains_and_resumes(entry, tmp_path):
    from accelerate import Accelerator

    def prepared():
        accelerator, net = Accelerator(cpu=True), new_net()
        optimizer = build(entry, net)
        return accelerator, *accelerator.prepare(net, optimizer, decaying(optimizer))

    accelerator, net, optimizer, scheduler = prepared()
    for number, batch in enumerate(loader()):
        if number == SAVED_AT:
            accelerator.save_state(str(tmp_path))
            accelerator, net, optimizer, scheduler = prepared()
            accelerator.load_state(str(tmp_path))
        optimizer.zero_grad()
        accelerator.backward(net(**batch)["loss"])
        optimizer.step()
        scheduler.step()
    assert_equal(net.state_dict(), trained_alone(entry))


@each_optimizer
def test_the_trainer_of_transformers_trains_and_resumes(entry, tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        max_grad_norm=0.0,
        save_steps=SAVED_AT,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    for checkpoint in (None, str(tmp_path / f"checkpoint-{SAVED_AT}")):
        net = new_net()
        optimizer = build(entry, net)
        trainer = Trainer(net, arguments, train_dataset=Samples(0, STEPS), optimizers=(optimizer, decaying(optimizer)))
        trainer.train(resume_from_checkpoint=checkpoint)
        assert_equal(net.state_dict(), trained_alone(entry))


@each_optimizer
def test_lightning_trains_and_resumes(entry, tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = new_net()

        def training_step(self, batch):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            optimizer = build(entry, self.net)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decaying(optimizer), "interval": "step"}}

    def fit(first, end, saved=None):
        module = Module()
        trainer = lightning.Trainer(
            max_steps=end,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader(first, end), ckpt_path=saved, weights_only=True)
        return module, trainer

    module, _ = fit(0, STEPS)
    assert_equal(module.net.state_dict(), trained_alone(entry))
    _, trainer = fit(0, SAVED_AT)
    trainer.save_checkpoint(tmp_path / "saved")
    module, _ = fit(SAVED_AT, STEPS, tmp_path / "saved")
    assert_equal(module.net.state_dict(), trained_alone(entry))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_together(sys.argv[1], int(sys.argv[2]))
