import pytest
import torch

from fairtrial.tasks.streams import Streams


def draw(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def test_a_stream_is_fixed_by_seed_and_purpose() -> None:
    assert draw(Streams(3)("order")) == draw(Streams(3)("order"))
    different = [Streams(3)("order"), Streams(4)("order"), Streams(3)("model"), Streams(3).inside("a")("order")]
    assert len({draw(generator) for generator in different}) == 4


def test_streams_do_not_depend_on_the_process() -> None:
    # Values of the first release: if they change, every stored result becomes incomparable.
    assert [Streams(seed)("model").initial_seed() for seed in (0, 1)] == [1292732770, 2729008692]
    assert Streams(0).inside("pretraining 2").inside("x")("model").initial_seed() == 2244134405


def test_the_global_generator_is_borrowed_and_put_back() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with Streams(5).globally("training"):
        first = torch.rand(3)
        with Streams(5).globally("model"):
            torch.rand(100)
        second = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    expected = torch.rand(6, generator=Streams(5)("training"))
    assert torch.equal(torch.cat([first, second]), expected)


def test_it_is_put_back_after_an_error_too() -> None:
    def fail() -> None:
        with Streams(5).globally("training"):
            torch.rand(1)
            raise ZeroDivisionError

    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 1.0, None])
def test_seeds_are_whole_numbers(seed: object) -> None:
    with pytest.raises(ValueError, match="seed must be a whole number of at least 0"):
        Streams(seed)  # type: ignore[arg-type]
