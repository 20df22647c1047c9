"""`reducer=random`: a draw for every image, from the seed and the image alone."""

import pytest
import torch

import zoo
from reduction.errors import ZooError
from reduction.functional.lots import draw, lots
from zoo.cli.main import main
from zoo.data import ImageData
from zoo.results.rows import read_rows


def model(seed=0):
    reducer = {"name": "random", "seed": seed}
    return zoo.load("vit_digits", reducer=reducer, schedule={"name": "keep_rate", "rate": 0.3})


def images(count=6):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def kept(m, x):
    """Which patches reach the end, for every image."""
    return m(x, return_info=True)[1].source >= 0


def test_an_image_keeps_the_same_tokens_in_every_batch_and_place():
    m, x = model(), images()
    whole = kept(m, x)
    alone = torch.cat([kept(m, image[None]) for image in x])
    assert torch.equal(whole, alone)
    assert torch.equal(whole.flip(0), kept(m, x.flip(0)))
    assert torch.equal(whole, kept(m, torch.cat([images(40)[6:], x]))[-6:])


def test_images_and_seeds_get_draws_of_their_own():
    x = images()
    draws = [kept(model(seed), x) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any(1).all()
    assert draws[0].unique(dim=0).shape[0] == len(x)


def test_no_draw_decides_the_accuracy():
    data = ImageData(name="digits", val_split="val", test_split="test", eval_batch_size=360)
    data.attach(model())
    data.setup("test")
    x, labels = next(iter(data.test_dataloader()))
    with torch.inference_mode():
        hits = [int((model(seed)(x).argmax(1) == labels).sum()) for seed in range(4)]
    assert len(set(hits)) > 1 and max(hits) - min(hits) < 0.08 * len(x)


def test_every_place_is_as_likely_as_any_other():
    lot = lots(torch.randn(4000, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    chosen = torch.zeros(4000, 30).scatter(1, draw(lot, 30, 9, seed=5, round_=2), 1.0)
    assert (chosen.sum(1) == 9).all()
    single = chosen.mean(0)
    assert (single - 0.3).abs().max() < 4.5 * (0.3 * 0.7 / 4000) ** 0.5
    together = (chosen.T @ chosen / 4000)[~torch.eye(30, dtype=torch.bool)]
    share = 9 * 8 / (30 * 29)
    assert (together - share).abs().max() < 5 * (share * (1 - share) / 4000) ** 0.5


def test_torchs_seed_reaches_the_draw_and_is_written_down():
    made = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        made.append(zoo.load("vit_digits", reducer="random"))
    assert [m.recipe["reducer"]["seed"] for m in made] == [3, 4]
    assert not torch.equal(kept(made[0], images()), kept(made[1], images()))
    again = zoo.load("vit_digits", reducer=made[0].recipe["reducer"])
    assert torch.equal(kept(made[0], images()), kept(again, images()))


def test_training_draws_anew_each_time():
    m = model().train()
    torch.manual_seed(0)
    first, second = (m(images(), return_info=True)[1].source for _ in range(2))
    assert not torch.equal(first, second)


def test_a_seed_that_is_no_number_is_refused():
    for wrong in ("zero", 1.5, True):
        with pytest.raises(ZooError, match="seed must be a whole number"):
            model(wrong)


def test_the_draw_survives_compilers_and_exporters():
    m, x = model().eval(), images()
    with torch.inference_mode():
        expected = m(x)
    exported = torch.export.export(m, (x,)).module()
    assert torch.allclose(exported(x), expected, atol=1e-5)


def test_the_seed_of_the_command_reaches_the_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["eval", "weights=vit_digits", "reducer=random", "schedule=target_gmacs", "limit=100"]
    for seed in (0, 1, 1):
        assert main([*line, "schedule.fraction=0.35", "task=fidelity", f"seed={seed}"]) == 0
    capsys.readouterr()
    first, second, again = read_rows(tmp_path / "results" / "local" / "rows.jsonl")
    assert [row["reducer"]["seed"] for row in (first, second, again)] == [0, 1, 1]
    first, second, again = (row["fidelity"]["kl"] for row in (first, second, again))
    assert first != second == again
