"""Training: the schedule and loss of the head, the resumable loop, and the small pieces of `train.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import train
from diffusion.loss import HybridLoss
from diffusion.schedule import NoiseSchedule, respaced_timesteps
from models import AutoencoderKL, create_model
from util.errors import InputError
from util.training.loop import fit


def test_respacing_keeps_the_first_and_last_timestep_and_rounds_the_strides_between():
    timesteps = respaced_timesteps(100)
    assert timesteps[:4] == [0, 10, 20, 30]
    assert timesteps[-2:] == [989, 999]
    assert len(set(timesteps)) == 100
    assert respaced_timesteps(1000) == list(range(1000))


@pytest.mark.parametrize("steps", [1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="num_sampling_steps"):
        respaced_timesteps(steps)


def test_an_ancestral_step_keeps_the_marginal_of_the_forward_process():
    """With the true noise, x_t = a x0 + b e steps to a mean and a variance whose marginal is that of x_(t-1)."""
    schedule = NoiseSchedule.create(100)
    for index in (1, 50, 99):
        alpha_bar, previous = schedule.alpha_bars[index], schedule.alpha_bars[index - 1]
        x0_part = schedule.x_coefficient[index] * np.sqrt(alpha_bar)
        noise_part = schedule.x_coefficient[index] * np.sqrt(1 - alpha_bar) + schedule.eps_coefficient[index]
        smaller_variance = np.exp(2 * (schedule.log_std_base[index] - schedule.log_std_slope[index]))
        assert x0_part == pytest.approx(np.sqrt(previous), rel=1e-9)
        if index > 1:  # the first posterior variance is replaced by the second
            assert noise_part**2 + smaller_variance == pytest.approx(1 - previous, rel=1e-6)


def test_the_first_of_100_steps_multiplies_errors_by_316():
    # method: near t = 999 almost nothing of the token is left, and x0 is not clipped
    assert abs(NoiseSchedule.create(100).eps_coefficient[-1]) == pytest.approx(316, rel=0.01)


def test_the_bound_trains_the_variance_and_not_the_noise():
    outputs = torch.zeros(64, 8, requires_grad=True)
    noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    squared_error, bound = HybridLoss(torch.device("cpu"))(
        lambda *_: outputs, torch.ones(64, 4), torch.empty(64, 0), torch.arange(64) * 15, noise
    )
    (gradient,) = torch.autograd.grad((squared_error + bound).sum(), outputs)
    torch.testing.assert_close(gradient[:, :4], -2 * noise / 4)  # of the squared error alone
    assert (gradient[:, 4:].abs() > 0).any()


def test_a_new_head_predicts_the_noisiest_tokens_noise():
    torch.manual_seed(0)
    model = create_model("mar_tiny")
    x = torch.randn(1000, model.token_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eps = model.diffloss.net(x, torch.full((1000,), 999), torch.randn(1000, 128)).chunk(2, dim=1)[0]
    assert (eps - x).std() < 0.02


def make_regression(steps: int, folder) -> torch.nn.Module:
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)

    def loss(generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(32, 4, generator=generator)
        return (module(x) - x.sum(dim=1, keepdim=True)).square().mean()

    return module, lambda: fit(module, loss, folder=folder, steps=steps, lr=0.2, warmup=1, device=torch.device("cpu"))


def test_a_training_that_was_cut_off_ends_like_one_that_was_not(tmp_path, monkeypatch):
    module, run = make_regression(40, tmp_path / "whole")
    run()

    class Cut(Exception):
        pass

    other, run_other = make_regression(40, tmp_path / "cut")
    calls = []

    def cut_after_25(*args, **kwargs):
        calls.append(1)
        if len(calls) == 26:
            raise Cut
        return original(*args, **kwargs)

    original = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", cut_after_25)
    monkeypatch.setattr("util.training.loop.SAVE_EVERY", 0.0)
    with pytest.raises(Cut):
        run_other()
    monkeypatch.undo()
    resumed, run_resumed = make_regression(40, tmp_path / "cut")
    run_resumed()
    torch.testing.assert_close(resumed.weight, module.weight, rtol=0, atol=0)
    assert not torch.equal(other.weight, module.weight)
    assert (module.weight - 1).abs().max() < 0.1


def test_a_folder_of_another_training_is_refused(tmp_path):
    make_regression(5, tmp_path)[1]()
    with pytest.raises(InputError, match="--steps 5"):
        make_regression(6, tmp_path)[1]()


def test_mask_ratios_follow_the_truncated_normal():
    generator = torch.Generator().manual_seed(0)
    masked = np.array([train.masked_tokens(256, generator) for _ in range(4000)]) / 256
    assert masked.min() >= 0.7
    assert masked.max() <= 1
    # mean of N(1, 0.25) truncated to [0.7, 1], from its closed form: 0.8670; rounding up adds half a token
    assert masked.mean() == pytest.approx(0.8670 + 0.5 / 256, abs=0.005)


def test_rescaling_latents_leaves_the_reconstruction():
    torch.manual_seed(0)
    vae = AutoencoderKL(embed_dim=2, ch=32, ch_mult=(1, 2), num_res_blocks=1).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        before = vae.encode(x)
        image = vae.decode(before.mean)
        train.set_latent_std(vae, 2.0, 5.0)
        after = vae.encode(x)
        torch.testing.assert_close(after.mean, 2.5 * before.mean)
        torch.testing.assert_close(torch.exp(0.5 * after.logvar), 2.5 * torch.exp(0.5 * before.logvar))
        torch.testing.assert_close(vae.decode(after.mean), image)


def test_training_runs_from_a_folder_of_images_to_weights_that_load(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    common = ["--data", str(tmp_path / "data"), "--steps", "2", "--batch_size", "2", "--device", "cpu"]
    vae, mar = tmp_path / "vae", tmp_path / "mar"
    assert train.main(["vae", *common, "--output_dir", str(vae)]) == 0
    arguments = [
        "--vae_path",
        str(vae / "vae.safetensors"),
        "--head_tokens",
        "8",
        "--finish_steps",
        "2",
        "--output_dir",
        str(mar),
    ]
    assert train.main(["mar", *common, *arguments]) == 0
    train.load_weights(create_model("mar_tiny"), mar, what="mar_tiny")

    class Read(Exception):
        pass

    def encode_images(vae, images):
        raise Read

    monkeypatch.chdir(tmp_path)  # the preset's VAE is found from anywhere
    monkeypatch.setattr(train, "encode_images", encode_images)
    with pytest.raises(Read):
        train.main(["mar", *common])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["vae", "--data", "nowhere"], "--data nowhere"),
        (["vae", "--steps", "0"], "--steps"),
        (["mar", "--data", "nowhere"], "--data nowhere"),
        (["classifier", "--data", "elsewhere"], "--data elsewhere"),
        (["vae", "--fashion_mnist", "nowhere"], "nowhere/train-images-idx3-ubyte.gz does not exist"),
        (["mar", "--fashion_mnist", "nowhere"], "with --fashion_mnist"),
        (["classifier", "--fashion_mnist", "nowhere"], "nowhere/t10k-images-idx3-ubyte.gz does not exist"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(arguments, named, capsys):
    assert train.main([*arguments, "--device", "cpu"]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"], ids=["empty", "other", "truncated"])
def test_a_damaged_checkpoint_is_named(content: bytes, tmp_path):
    (tmp_path / "training.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"training\.pt is not of this training"):
        fit(torch.nn.Linear(1, 1), None, folder=tmp_path, steps=1, lr=0.1, device=torch.device("cpu"))
